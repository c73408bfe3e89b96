"""The terms of the loss of one optimizer step.

Every term is a sum over tokens, and is divided by a count of the whole step, here or in `step.py`.
So the gradients of all micro-batches on all ranks add up to that of the global loss, on any layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Counts
from emotrain.kernels import HeadGradient, OfBlock, linear_cross_entropy
from emotrain.model.report import LossSums, ModelOutput, RoutingReport
from emotrain.model.source_losses import SourceLosses
from emotrain.model.transformer import Head


def language_model_sums(
    output: ModelOutput,
    head: Head,
    batch: PackedBatch,
    z_weight: float,
    backend: str = "auto",
    head_gradient: HeadGradient | None = None,
    of_block: OfBlock | None = None,
) -> LossSums:
    """Language-model loss sums of a micro-batch (spec 5).

    Args:
        backend: what runs the cross entropy (`linear_cross_entropy`).
        head_gradient: shared by the micro-batches of a step, whose losses are all divided by the
            same count.
        of_block: another loss than cross entropy (`linear_cross_entropy`).
    """
    targets_T = batch.targets_BS.reshape(-1)
    sources = SourceLosses(batch) if batch.num_sources > 1 and of_block is None else None

    def loss(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if torch.is_autocast_enabled(hidden_TD.device.type):
            dtype = torch.get_autocast_dtype(hidden_TD.device.type)
            hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        return linear_cross_entropy(
            hidden_TD, weight_VD, targets_T, z_weight, backend, head_gradient, of_block, sources
        )

    lm, cross_entropy, z = head(output.hidden_TD, loss)
    num_targets = (targets_T >= 0).sum()
    return LossSums(lm, cross_entropy, z, num_targets, None if sources is None else sources.sums())


def load_balance_loss(
    counts_LN: Tensor, probability_sum_LN: Tensor, num_tokens: Tensor | float
) -> Tensor:
    """N * sum_i f_i P_i over one bank of experts: 1 when balanced, up to N when all tokens go to
    one expert (spec 2.6). Where L layers share the bank, f_i and P_i are means over them (UniPool,
    arXiv 2605.06665, section 3).

    Args:
        counts_LN: slots routed to each expert over the scope of the balance; no gradient. f_i is
            its share of a layer's slots.
        probability_sum_LN: sums over some tokens of the routing probabilities, with gradient.
        num_tokens: what makes these sums P_i: the number of tokens of the whole scope, so that the
            losses of its parts add up.
    """
    counts_LN = counts_LN.to(probability_sum_LN.dtype)
    share_LN = counts_LN / counts_LN.sum(dim=1, keepdim=True).clamp(min=1)
    balance = (share_LN.mean(dim=0) * probability_sum_LN.mean(dim=0)).sum()
    return counts_LN.shape[1] * balance / num_tokens


def router_loss(
    report: RoutingReport,
    counts: Sequence[Tensor] | None,
    num_tokens: Tensor | float,
    exclusive: Counts = (),
) -> tuple[Tensor, Tensor]:
    """Balance loss, the mean over banks of experts, and z-loss, the mean over layers, of one
    micro-batch; both unweighted.

    Args:
        counts: for each layer, the slots of each expert over the balance scope; None for no
            balance loss, which is then 0.
        num_tokens: tokens of the whole step.
        exclusive: of the model; exclusive experts have no part in the balance.
    """
    zero = report.num_tokens.new_zeros((), dtype=torch.float32)
    if not report.layers:
        return zero, zero
    z = torch.stack([layer.z_sum for layer in report.layers]).mean() / num_tokens
    # A router with a NaN scores every expert NaN. If its pool leaves out the expert that has it,
    # all that is computed inside the pool is finite: the NaN is carried to the loss from here.
    z = z + 0 * torch.cat([layer.effective_experts_G for layer in report.layers]).sum().to(z.dtype)
    if counts is None:
        return zero, z
    sums, last = [layer.probability_sum_N for layer in report.layers], sum(n for _, n in exclusive)
    balance = [
        load_balance_loss(
            torch.stack([counts[i][: len(counts[i]) - last] for i in layers]),
            torch.stack([sums[i][: len(sums[i]) - last] for i in layers]),
            num_tokens,
        )
        for layers in layers_by_bank(report)
    ]
    return torch.stack(balance).mean(), z


def layers_by_bank(report: RoutingReport) -> list[list[int]]:
    """Of each bank of routed experts, the layers that use it, by their place in the report."""
    banks: dict[int, list[int]] = {}
    for index, layer in enumerate(report.layers):
        banks.setdefault(layer.bank, []).append(index)
    return list(banks.values())
