"""Routing inside a subset of experts, as if the others were not there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from emotrain.kernels.decision import Decision


def among_all(
    decision: Decision, logits_TE: Tensor, subset_n: Tensor, num_routed: int
) -> tuple[Decision, Tensor]:
    """A decision among the n experts of a subset, and its logits, in the numbers of all N experts:
    the others have no probability."""

    def spread(values_Xn: Tensor, absent: float | bool = 0) -> Tensor:
        shape = (*values_Xn.shape[:-1], num_routed)
        return values_Xn.new_full(shape, absent).index_copy(-1, subset_n, values_Xn)

    num_kept, pool_Gn = len(subset_n), decision.pool_GN
    if pool_Gn is None:
        pool_Gn = torch.ones_like(decision.scores_GN, dtype=torch.bool)
    number_of = torch.cat([subset_n, subset_n.new_tensor([num_routed])])
    logits_TE = torch.cat(
        [spread(logits_TE[:, :num_kept], -torch.inf), logits_TE[:, num_kept:]], dim=1
    )
    return replace(
        decision,
        probabilities_TN=spread(decision.probabilities_TN),
        experts_TK=number_of[decision.experts_TK],
        counts_N=spread(decision.counts_N),
        scores_GN=spread(decision.scores_GN),
        pool_GN=spread(pool_Gn, False),
    ), logits_TE
