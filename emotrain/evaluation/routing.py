"""How far documents and groups of them spread over the experts, and how alike they are.

Sums over tokens come in, so that a long document weighs more in its group. U counts the documents
of a pass, J their groups, X rows of any kind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emotrain.evaluation.perplexity import DocumentLosses
from emotrain.evaluation.results import RoutingSummary


def sum_by_group(values_UX: Tensor, group_U: Tensor, num_groups: int | None = None) -> Tensor:
    """Sum over each group's documents -> [J, ...].

    Args:
        num_groups: J; None where groups are numbered without gaps.
    """
    num_groups = int(group_U.max()) + 1 if num_groups is None else num_groups
    sums_JX = values_UX.new_zeros(num_groups, *values_UX.shape[1:])
    return sums_JX.index_add_(0, group_U, values_UX)


def shares(sums_XN: Tensor) -> Tensor:
    """Each row as shares of its sum, float64."""
    sums_XN = sums_XN.double()
    return sums_XN / sums_XN.sum(dim=1, keepdim=True).clamp(min=1e-30)


def entropy_nats(sums_XN: Tensor) -> Tensor:
    """Entropy of each row's shares, float64 [X]. Its exp is the number of effective experts."""
    return torch.special.entr(shares(sums_XN)).sum(dim=1)


def cosine_table(sums_XN: Tensor) -> Tensor:
    """Cosine of every two rows, float64 [X, X]."""
    direction_XN = torch.nn.functional.normalize(sums_XN.double(), dim=1)
    return direction_XN @ direction_XN.T


def mean_of_pairs(table_XX: Tensor) -> Tensor:
    """Mean over two different rows; NaN for one row."""
    num_pairs = len(table_XX) * (len(table_XX) - 1)
    return (table_XX.sum() - table_XX.trace()) / num_pairs


def routing_summary(full: DocumentLosses, group_U: Tensor, num_groups: int) -> RoutingSummary:
    """How far the domains part ways: cosine of their mean routing, and experts that one document
    spreads over."""
    cosines, effective = [], []
    for scores_UN in full.routing:
        effective.append(entropy_nats(scores_UN).exp().mean())
        if num_groups > 1:
            cosines.append(mean_of_pairs(cosine_table(sum_by_group(scores_UN, group_U))))
    return RoutingSummary(
        domain_cosine_per_layer=tuple(map(finite, cosines)),
        domain_cosine=finite(torch.stack(cosines).mean()) if cosines else None,
        effective_experts_per_layer=tuple(map(finite, effective)),
        effective_experts=finite(torch.stack(effective).mean()) if effective else None,
    )


def finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
