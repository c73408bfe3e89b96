"""What a document loses with the experts that its own beginning chose: how a subset is used that a
prompt chooses.

A document is cut in halves. The first half chooses the experts of each layer, as calibration
documents do (`greedy_rankings`); the loss is that of the second half, which the choice has not
seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from emotrain.batch import IGNORE, PackedBatch
from emotrain.config import Config
from emotrain.errors import UserError
from emotrain.evaluation.measure import group_of_each, mean_increase
from emotrain.evaluation.perplexity import autocast, losses_of_arms, pack
from emotrain.model.pool_units import places
from emotrain.model.transformer import Transformer
from emotrain.modular.counts import experts_kept
from emotrain.modular.select import greedy_rankings
from emotrain.progress import Track, untracked


@dataclass(frozen=True)
class PromptedLosses:
    """Losses in nats a token of second halves; means over domains, unweighted."""

    loss_nats: float
    """With all experts."""
    increase_nats: dict[str, float]
    """By share of a layer's experts: with those that the first half chose, over `loss_nats`."""
    standard_error_nats: dict[str, float]
    """Of the increase, over documents."""


@torch.no_grad()
def prompted_losses(
    model: Transformer,
    config: Config,
    domains: Mapping[str, Sequence[np.ndarray]],
    keep: Sequence[float],
    rows_per_batch: int,
    precision: torch.dtype | None = None,
    track: Track[Any] = untracked,
) -> PromptedLosses:
    """Measure second halves of documents.

    Args:
        domains: token ids of the documents of each domain, 4 tokens or more each, two documents or
            more a domain; what a sequence does not hold is left out.
        keep: shares of a layer's experts, shared ones counted.
        rows_per_batch: rows of one forward pass.
        precision: run under autocast in this dtype; None means in the model's own.
    Raises:
        UserError: a share that cannot be kept, or a document too short to be halved.
    """
    length, mask = config.data.sequence_length, config.model.attention.document_mask
    whole = [ids[:length] for of_domain in domains.values() for ids in of_domain]
    if (shortest := min(map(len, whole))) < 4:
        raise UserError(f"a document of {shortest} tokens has no halves; give documents of 4")
    sizes = [experts_kept(config.model, share) for share in keep]
    domain_U, document_U = group_of_each(list(domains.values())), torch.arange(len(whole))
    prompts = pack([ids[: len(ids) // 2] for ids in whole], length, rows_per_batch, mask)
    with autocast(model.head.weight.device, precision):
        found = greedy_rankings(model, prompts, document_U, len(whole), sizes, track)
    arms = [None, *(subsets for subsets, _ in found)]
    rows = max(1, rows_per_batch // len(arms))
    batches = [second_halves(batch) for batch in pack(whole, length, rows, mask)]
    what = f"second halves with {len(sizes)} subsets"
    full, *others = losses_of_arms(
        model, batches, document_U, arms, track, what, precision, rows_per_batch
    )
    increase, error = {}, {}
    for share, losses in zip(keep, others, strict=True):
        change_U = losses.loss_U - full.loss_U
        increase_J, error_J = mean_increase(change_U, full.targets_U, domain_U)
        increase[str(float(share))] = float(increase_J.mean())
        error[str(float(share))] = float(error_J.square().sum().sqrt() / len(error_J))
    loss_J, _ = mean_increase(full.loss_U, full.targets_U, domain_U)
    return PromptedLosses(float(loss_J.mean()), increase, error)


def second_halves(batch: PackedBatch) -> PackedBatch:
    """The batch with the tokens of the second half of each document as its only targets."""
    place_T, length_T = places(batch.document_T, batch.num_documents)
    # A position predicts the token after it.
    in_second_BS = (place_T + 1 >= length_T // 2).view_as(batch.targets_BS)
    return replace(batch, targets_BS=torch.where(in_second_BS, batch.targets_BS, IGNORE))
