"""Held-out loss with a document pool of one size, as the published training measures it (spec 2.5):
what a document loses when its tokens agree on so many experts of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from emotrain.config import ModelConfig, PoolConfig
from emotrain.distributed.ranks import Ranks
from emotrain.distributed.shares import ALONE
from emotrain.errors import UserError
from emotrain.evaluation.measure import exclusive_domains, group_of_each
from emotrain.evaluation.perplexity import losses_of_arms, pack_groups
from emotrain.evaluation.reading import DomainDocuments
from emotrain.evaluation.routing import sum_by_group
from emotrain.model.transformer import Transformer


def pool_of(model: ModelConfig, size: int) -> PoolConfig:
    """The model's rule of pools with one size for every document and layer: each has one, and no
    piece of a cut document shares that of another.

    Raises:
        UserError: fewer experts than a token uses, or more than any layer has.
    """
    least = model.experts.top_k
    most = max(map(model.common_in_layer, range(model.num_layers)))
    if not least <= size <= most or not most:
        rule = f"give {least} (model.experts.top_k) to {most}, the routed experts of a layer"
        rule = rule if most else "the model is dense and has no pools; leave it out"
        raise UserError(f"evaluation.pool_size={size} cannot be a pool; {rule}")
    fixed = replace(model.router.pool, kind="fixed", size=size, across_windows=1)
    return replace(fixed, none_share=0.0, warmup_steps=0)


def pool_losses(
    model: Transformer,
    domains: Mapping[str, DomainDocuments],
    pool: PoolConfig,
    row_length: int,
    rows_per_batch: int,
    precision: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float | None]:
    """The loss of each domain's held-out documents with pools by this rule, in nats a token, and
    under "" the mean over domains; None where it is not finite.

    Args:
        row_length, rows_per_batch: of a forward pass.
        precision: run under autocast in this dtype; None means in the model's own.
        ranks: those that have the model between them, all of which get the same.
    """
    names = sorted(domains)
    documents = [domains[name].held_out for name in names]
    batches = pack_groups(
        documents,
        exclusive_domains(names, model.config),
        row_length,
        rows_per_batch,
        model.config.attention.document_mask,
    )
    group_U = group_of_each(documents)
    [found] = losses_of_arms(
        model, batches, group_U, [None], precision=precision, ranks=ranks, pool=pool
    )
    loss_J = sum_by_group(found.loss_U, group_U) / sum_by_group(found.targets_U.double(), group_U)
    losses = {"": float(loss_J.mean())} | dict(zip(names, loss_J.tolist(), strict=True))
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
