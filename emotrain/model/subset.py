"""Routing inside a subset of experts, as if the others were not there; and which subset documents
use where a model has exclusive experts (spec 11).

    experts 0 1 2 3 4 5 | 6 7  | 8     exclusive: {rust: 2, haskell: 1}
    rust        *          *           6 common experts, which every document may use, and its own
    haskell     *                *
    others      *

A router is the subset's, rows and all: so a document of no exclusive domain computes to the bit
what it did before exclusive experts were added, and one of `rust` what it did before `haskell` was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Counts
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


def own_range(exclusive: Counts, num_routed: int, domain: str) -> range:
    """The experts of a layer with `num_routed` that are exclusive to a domain."""
    first = num_routed - sum(count for _, count in exclusive)
    for name, count in exclusive:
        if name == domain:
            return range(first, first + count)
        first += count
    return range(0)


def experts_of_domain(exclusive: Counts, num_routed: int, batch: PackedBatch) -> tuple[Tensor, int]:
    """int64 [n], ascending: the experts that the documents of a batch may use; and how many of
    them, the last ones, are exclusive to its domain."""
    device, own = batch.document_ids_G.device, own_range(exclusive, num_routed, batch.domain)
    common = torch.arange(num_routed - sum(count for _, count in exclusive), device=device)
    return torch.cat([common, torch.arange(own.start, own.stop, device=device)]), len(own)


def without_exclusive(probabilities_TN: Tensor, exclusive: Counts) -> Tensor:
    """Probabilities among the common experts, 0 for exclusive ones: what load balance sees. It is
    independent of the logits of exclusive experts, and neither draws tokens to them nor away."""
    num_exclusive = sum(count for _, count in exclusive)
    common_Tn = probabilities_TN[:, : probabilities_TN.shape[1] - num_exclusive]
    total_T1 = common_Tn.sum(dim=1, keepdim=True)
    return torch.nn.functional.pad(common_Tn / total_T1.clamp(min=1e-30), (0, num_exclusive))
