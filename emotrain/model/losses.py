"""The loss of one optimizer step, normalised by the token counts of the whole global batch.

Every term is a sum over tokens divided by a count of the whole step, so that the gradients of all
micro-batches on all ranks simply add up to the gradient of the global loss, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emotrain.batch import PackedBatch
from emotrain.kernels import linear_cross_entropy
from emotrain.model.router import RoutingReport
from emotrain.model.transformer import ModelOutput


@dataclass(frozen=True)
class LossSums:
    """Sums over the tokens of one micro-batch; `lm` carries the gradient of the language-model
    terms."""

    lm: Tensor
    """Cross entropy plus its weighted z-loss."""
    cross_entropy: Tensor
    """Cross entropy in nats, without gradient."""
    z: Tensor
    """Squared log-normaliser of the logits, without gradient."""
    num_targets: Tensor
    """int64: positions with a loss."""


def language_model_sums(
    output: ModelOutput, head: nn.Linear, batch: PackedBatch, z_weight: float
) -> LossSums:
    """Language-model loss sums of a micro-batch (spec 5)."""
    hidden_TD = output.hidden_TD
    weight_VD = head.weight
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
    targets_T = batch.targets_BS.reshape(-1)
    lm, cross_entropy, z = linear_cross_entropy(hidden_TD, weight_VD, targets_T, z_weight)
    return LossSums(lm, cross_entropy, z, (targets_T >= 0).sum())


def load_balance_loss(
    counts_N: Tensor, probability_sum_N: Tensor, num_tokens: Tensor | float
) -> Tensor:
    """N * sum_i f_i P_i: 1 when balanced, up to N when all tokens go to one expert (spec 2.6).

    Args:
        counts_N: slots routed to each expert over the scope of the balance; no gradient. f_i is its
            share of the slots.
        probability_sum_N: sums over some tokens of the routing probabilities, with gradient.
        num_tokens: what makes these sums P_i: the number of tokens of the whole scope, so that the
            losses of its parts add up.
    """
    share_N = counts_N.to(probability_sum_N.dtype) / counts_N.sum().clamp(min=1)
    return counts_N.shape[0] * (share_N * probability_sum_N).sum() / num_tokens


def router_loss(
    report: RoutingReport, counts: Sequence[Tensor], num_tokens: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Balance and z-loss of one micro-batch, each the mean over layers, unweighted.

    Args:
        counts: for each layer, the slots of each expert over the balance scope.
        num_tokens: tokens of the whole step.
    """
    if not report.layers:
        zero = report.num_tokens.new_zeros((), dtype=torch.float32)
        return zero, zero
    balance = torch.stack(
        [
            load_balance_loss(c, layer.probability_sum_N, num_tokens)
            for c, layer in zip(counts, report.layers, strict=True)
        ]
    ).mean()
    z = torch.stack([layer.z_sum for layer in report.layers]).mean() / num_tokens
    return balance, z
