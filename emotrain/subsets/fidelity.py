"""How near a subset's predictions are to the full model's, on text without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.batch import PackedBatch
from emotrain.evaluation.perplexity import BLOCK_TOKENS
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import FULL, Transformer
from emotrain.modular.artefact import Fidelity
from emotrain.progress import Track, untracked


@dataclass(frozen=True)
class Predictor:
    """A model, and the experts that it may use."""

    model: Transformer
    request: RoutingRequest = FULL


@dataclass(frozen=True)
class Nearness:
    """How near predictions of some models are to those of the first one."""

    kl_nats: tuple[float, ...]
    """Mean over tokens of KL(first || other), of each other one."""
    acceptance: tuple[float, ...]
    """Mean over tokens of the sum of min(p, q) over the vocabulary."""
    max_difference_nats: float
    """Largest difference of a log probability between any of the others."""
    tokens: int


@torch.inference_mode()
def nearness(
    first: Predictor,
    others: Sequence[Predictor],
    batches: Sequence[PackedBatch],
    track: Track[PackedBatch] = untracked,
) -> Nearness:
    """Compare predictions at every position that has a target. Models are on one device."""
    device = first.model.head.weight.device
    arms = (first, *others)
    sums = torch.zeros(len(others), 2, dtype=torch.float64, device=device)
    widest = torch.zeros((), device=device)
    tokens = 0
    for batch in track(batches, "comparing with the full model"):
        batch = batch.to(device)
        is_counted_T = batch.targets_BS.reshape(-1) >= 0
        hidden = [arm.model(batch, arm.request).hidden_TD[is_counted_T] for arm in arms]
        tokens += len(hidden[0])
        for blocks in zip(*(hidden_tD.split(BLOCK_TOKENS) for hidden_tD in hidden), strict=True):
            full_tV, *found = (
                _log_probabilities(arm.model, x_tD) for arm, x_tD in zip(arms, blocks, strict=True)
            )
            sums += torch.stack([_compare(full_tV, other_tV) for other_tV in found])
            for other_tV in found[1:]:
                widest = torch.maximum(widest, (other_tV - found[0]).abs().amax())
    kl, acceptance = (sums / max(tokens, 1)).t().tolist()
    return Nearness(tuple(kl), tuple(acceptance), float(widest), tokens)


def fidelity(
    model: Transformer,
    batches: Sequence[PackedBatch],
    kept: Sequence[Tensor],
    documents: int,
    held_back: bool,
    track: Track[PackedBatch] = untracked,
) -> Fidelity:
    """Compare predictions with all experts and with some, at every position that has a target.

    Args:
        kept: for each layer bool [N], the routed experts of the subset.
        documents, held_back: what `batches` are made of, for the result.
    """
    found = nearness(Predictor(model), [masked(model, kept)], batches, track)
    return Fidelity(found.kl_nats[0], found.acceptance[0], documents, found.tokens, held_back)


def masked(model: Transformer, kept: Sequence[Tensor]) -> Predictor:
    """A model with masks over its experts, for each layer bool [N]."""
    device = model.head.weight.device
    return Predictor(model, RoutingRequest(kept=[mask_N.to(device) for mask_N in kept]))


def _log_probabilities(model: Transformer, hidden_tD: Tensor) -> Tensor:
    return F.log_softmax(model.head(hidden_tD).float(), dim=-1)


def _compare(full_tV: Tensor, subset_tV: Tensor) -> Tensor:
    """fp64 [2]: sums over tokens of KL(full || subset) and of the common probability."""
    full_p_tV, subset_p_tV = full_tV.exp(), subset_tV.exp()
    kl = (full_p_tV * (full_tV - subset_tV)).sum(dtype=torch.float64)
    common = torch.minimum(full_p_tV, subset_p_tV).sum(dtype=torch.float64)
    return torch.stack([kl, common])
