"""Loss-free load balancing (Wang et al., arXiv 2408.15664): after a step, the bias by which routers
choose an expert moves by `losses.bias_rate` towards an even load (spec 2.8).

Counts are those of the whole global batch, as whole numbers, so that every rank of every layout
moves its biases by the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emotrain.config import Counts
from emotrain.distributed.ranks import Ranks
from emotrain.model.losses import layers_by_bank
from emotrain.model.report import RoutingReport
from emotrain.model.transformer import Transformer


def step_moves(
    reports: Sequence[RoutingReport], ranks: Ranks, exclusive: Counts
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """For each layer with routed experts, the slots of each expert over these reports and all
    ranks; and how the biases move, see `bias_moves`. One collective."""
    per_layer = []
    for layers in zip(*(report.layers for report in reports), strict=True):
        # What is in no token's pool has no probability.
        reached = torch.stack([layer.probability_sum_N > 0 for layer in layers]).sum(dim=0)
        per_layer.append(torch.stack([layer.counts_N for layer in layers]).sum(dim=0))
        per_layer.append(reached)
    sums = ranks.sum(torch.cat(per_layer)).split([len(values_N) for values_N in per_layer])
    counts, reached_by_layer = sums[::2], sums[1::2]
    return counts, bias_moves(layers_by_bank(reports[0]), counts, reached_by_layer, exclusive)


def bias_moves(
    banks: Sequence[Sequence[int]],
    counts: Sequence[Tensor],
    reached: Sequence[Tensor],
    exclusive: Counts = (),
) -> list[Tensor]:
    """For each layer int64 [N], the way the bias of each expert moves: 1 where it had fewer slots
    than the mean of its bank, -1 where more, 0 at the mean (algorithm 1 of the paper).

    An expert that was in no token's pool stays: its bias had no part in that. It would else rise
    for as long as no pool has it, and then take the tokens of the first one that does.

    Args:
        banks: the layers of each bank of experts, whose load is balanced together.
        counts: for each layer, the slots of each expert over the whole step.
        reached: for each layer int64 [N], 0 where no token had the expert in its pool.
        exclusive: of the model; exclusive experts have no part in the balance, and theirs stay.
    """
    last = sum(count for _, count in exclusive)
    moves = [torch.zeros_like(counts_N) for counts_N in counts]
    for layers in banks:
        slots_n = torch.stack([counts[i][: len(counts[i]) - last] for i in layers]).sum(dim=0)
        common = len(slots_n)
        toward_n = torch.sign(slots_n.sum() - common * slots_n)
        for i in layers:
            moves[i][:common] = torch.where(reached[i][:common] > 0, toward_n, 0)
    return moves


@torch.no_grad()
def move_biases(model: Transformer, moves: Sequence[Tensor], rate: float) -> None:
    """Move the biases of every router, in place, by `rate` times what `bias_moves` says."""
    routers = [block.moe.router for block in model.blocks if block.moe.router is not None]
    for router, move_N in zip(routers, moves, strict=True):
        assert router.choice_bias_N is not None
        router.choice_bias_N.add_(move_N.to(router.choice_bias_N.dtype), alpha=rate)
