"""How much each routed expert does for a domain: every published criterion, in one forward pass.

Each criterion is a sum over routed slots only, so that a pass costs what inference costs. With g
the routing weight of a slot, E the output of its expert, x the residual stream before the experts,
x' the same after the norm, r the sum of the token's routed experts and s that of its shared ones:

    router_once        mean over tokens of the routing probability (spec 7.3, "global")
    frequency          share of the tokens that choose the expert
    reap               mean over the slots of an expert of g |E|  (REAP, arXiv 2510.13999)
    easy_ep            sum of g |E| (1 - cos(x, x + r))  (EASY-EP, arXiv 2504.06792)
    easy_ep_reference  sum of g |E| max(0, 1 - cos(x', x' + r + s))  (as the reference deviates)

The published greedy criterion, `router`, looks at layers below that are pruned already: it is in
`emotrain.modular.select`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.batch import PackedBatch
from emotrain.kernels import Decision, sort_slots
from emotrain.model.moe import RoutedExperts
from emotrain.model.router import LayerRequest, sum_by_document
from emotrain.model.transformer import Block, Transformer
from emotrain.modular.select import group_of_documents
from emotrain.progress import Track, untracked

CRITERIA = ("router_once", "frequency", "reap", "easy_ep", "easy_ep_reference")
"""What `collect_scores` measures."""

Scores = tuple[dict[str, Tensor], ...]
"""For each layer, by criterion, float64 [J, N]."""


@torch.no_grad()
def collect_scores(
    model: Transformer,
    batches: Sequence[PackedBatch],
    document_group_U: Tensor,
    num_groups: int,
    track: Track[Any] = untracked,
) -> Scores:
    """Every criterion of every layer for every group of documents, in one pass through the full
    model. Sums are taken in fp64.

    Args:
        batches: calibration documents; padding is left out.
        document_group_U: int64, the group of each document.
    """
    device = model.head.weight.device
    document_group_U = document_group_U.to(device)
    sums = [
        torch.zeros(len(_SUMS), num_groups, model.config.routed_in_layer(layer)).double().to(device)
        for layer in range(model.config.num_layers)
    ]
    tokens_J = torch.zeros(num_groups, dtype=torch.float64, device=device)
    for batch in track(batches, "scoring experts"):
        batch = batch.to(device)
        valid_T = (batch.document_ids_G >= 0)[batch.document_T]
        group_T = group_of_documents(batch, document_group_U)[batch.document_T]
        tokens_J.index_add_(0, group_T, valid_T.double())
        x_BSD, view = model.embed(batch)
        for block, sums_XJN in zip(model.blocks, sums, strict=True):
            h_BSD = block.attend(x_BSD, view)
            x_BSD = _score_layer(block, h_BSD, batch, valid_T, group_T, sums_XJN)
    return tuple(_criteria(sums_XJN, tokens_J) for sums_XJN in sums)


_SUMS = ("probability", "slots", "weighted_norm", "easy_ep", "easy_ep_reference")


def _score_layer(
    block: Block, h_BSD: Tensor, batch: PackedBatch, valid_T: Tensor, group_T: Tensor, sums: Tensor
) -> Tensor:
    """Add one batch to the sums of a layer -> the hidden states after the layer."""
    x_TD, moe = block.moe_norm(h_BSD).flatten(0, 1), block.moe
    if torch.is_autocast_enabled(x_TD.device.type):
        x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
    if moe.router is None or moe.experts is None:
        return block.use_experts(h_BSD, batch, LayerRequest())[0]
    decision, logits_TE = moe.router(x_TD, batch, LayerRequest())
    routed_TD, norm_TK = _expert_outputs(x_TD, decision, moe.experts)
    output_TD = routed_TD
    if moe.shared is not None:
        output_TD = routed_TD + moe.shared(x_TD, moe.router.shared_weights(logits_TE))

    residual_TD, num_groups = h_BSD.flatten(0, 1), sums.shape[1]
    changed_T = _turn(residual_TD, residual_TD + routed_TD)
    changed_reference_T = _turn(x_TD, x_TD + output_TD).clamp(min=0)
    valid_T1 = valid_T[:, None].double()
    weighted_TK = decision.weights_TK.double() * norm_TK * valid_T1
    per_slot = (
        valid_T1.expand_as(weighted_TK),
        weighted_TK,
        weighted_TK * changed_T[:, None],
        weighted_TK * changed_reference_T[:, None],
    )
    sums[0] += sum_by_document(decision.probabilities_TN.double() * valid_T1, group_T, num_groups)
    for sum_JN, values_TK in zip(sums[1:], per_slot, strict=True):
        _add_by_expert(sum_JN, values_TK, group_T, decision.experts_TK)
    return h_BSD + output_TD.view_as(h_BSD)


def _expert_outputs(
    x_TD: Tensor, decision: Decision, experts: RoutedExperts
) -> tuple[Tensor, Tensor]:
    """Weighted sum of each token's routed experts [T, D], and the norm of each one's own output,
    fp64 [T, K]. One choice at a time: outputs of all slots at once would be K times the tokens."""
    num_routed = len(decision.counts_N)
    routed_TD, norms = torch.zeros_like(x_TD), []
    for choice, weight_T in zip(
        decision.experts_TK.unbind(1), decision.weights_TK.unbind(1), strict=True
    ):
        slots = sort_slots(choice[:, None], num_routed)
        y_TD = experts(x_TD, torch.ones_like(weight_T)[:, None], slots)
        norms.append(torch.linalg.vector_norm(y_TD, dim=1, dtype=torch.float64))
        routed_TD = routed_TD + (y_TD * weight_T[:, None].to(y_TD.dtype))
    return routed_TD, torch.stack(norms, dim=1)


def _turn(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """1 - cos of the angle between two vectors of each token, fp64 [T]."""
    return 1 - F.cosine_similarity(a_TD.double(), b_TD.double(), dim=1)


def _add_by_expert(sum_JN: Tensor, values_TK: Tensor, group_T: Tensor, experts_TK: Tensor) -> None:
    """Add a value of each slot to its token's group and its expert; empty slots (N) are left
    out."""
    num_groups, num_routed = sum_JN.shape
    in_use_TK = experts_TK < num_routed
    index_TK = group_T[:, None] * num_routed + experts_TK.clamp(max=num_routed - 1)
    values_TK = torch.where(in_use_TK, values_TK, 0)
    flat = sum_JN.new_zeros(num_groups * num_routed)
    sum_JN += flat.index_add_(0, index_TK.flatten(), values_TK.flatten()).view_as(sum_JN)


def _criteria(sums_XJN: Tensor, tokens_J: Tensor) -> dict[str, Tensor]:
    probability_JN, slots_JN, norm_JN, easy_JN, easy_reference_JN = sums_XJN.cpu()
    tokens_J1 = tokens_J.cpu()[:, None].clamp(min=1)
    return {
        "router_once": probability_JN / tokens_J1,
        "frequency": slots_JN / tokens_J1,
        "reap": norm_JN / slots_JN.clamp(min=1),
        "easy_ep": easy_JN,
        "easy_ep_reference": easy_reference_JN,
    }
