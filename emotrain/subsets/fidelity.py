"""How near a subset's predictions are to the full model's, on text without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.batch import PackedBatch
from emotrain.evaluation.perplexity import BLOCK_TOKENS
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import FULL, Transformer
from emotrain.modular.artefact import Fidelity
from emotrain.progress import Track, untracked


@torch.inference_mode()
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
    device = model.head.weight.device
    request = RoutingRequest(kept=[mask_N.to(device) for mask_N in kept])
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in track(batches, "comparing with the full model"):
        batch = batch.to(device)
        is_counted_T = batch.targets_BS.reshape(-1) >= 0
        hidden = [model(batch, asked).hidden_TD[is_counted_T] for asked in (FULL, request)]
        for full_tD, subset_tD in zip(*(part.split(BLOCK_TOKENS) for part in hidden), strict=True):
            sums += _compare(*(_log_probabilities(model, x_tD) for x_tD in (full_tD, subset_tD)))
    kl, acceptance, tokens = sums.tolist()
    return Fidelity(
        kl / max(tokens, 1), acceptance / max(tokens, 1), documents, int(tokens), held_back
    )


def _log_probabilities(model: Transformer, hidden_tD: Tensor) -> Tensor:
    return F.log_softmax(model.head(hidden_tD).float(), dim=-1)


def _compare(full_tV: Tensor, subset_tV: Tensor) -> Tensor:
    """fp64 [3]: sums over tokens of KL(full || subset) and of the common probability, and the
    number of tokens."""
    full_p_tV, subset_p_tV = full_tV.exp(), subset_tV.exp()
    kl = (full_p_tV * (full_tV - subset_tV)).sum(dtype=torch.float64)
    common = torch.minimum(full_p_tV, subset_p_tV).sum(dtype=torch.float64)
    return torch.stack([kl, common, common.new_tensor(len(full_tV))])
