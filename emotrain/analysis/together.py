"""Which experts go together: those that are in the pools of the same documents.

A document's pool is here the experts that it gives the most routing probability, as in training,
but of one size for every document. Two experts go together where they share more pools than chance
says; groups are sets of experts that do. Placement wants them on one rank, and a subset that is
composed of two wants to know which experts come as a set.

    counts_NN   pools that hold both of two experts; the diagonal, those that hold each
"""

from __future__ import annotations

import numpy as np


def count_pools(pool_UN: np.ndarray) -> np.ndarray:
    """How many pools hold both of two experts, int64 [N, N].

    Args:
        pool_UN: bool, the pool of each document.
    """
    member_UN = pool_UN.astype(np.float64)  # a product of integers would not use BLAS
    return (member_UN.T @ member_UN).round().astype(np.int64)


def by_chance(counts_NN: np.ndarray) -> np.ndarray:
    """How many pools would hold both of two experts by chance, float64 [N, N], zero on the
    diagonal: in proportion to the pools that hold each, and in all as many pairs as were counted.

    (The product of the shares of two experts alone is too much: experts of one pool take each
    other's place.)
    """
    uses_N = counts_NN.diagonal().astype(np.float64)
    product_NN = np.outer(uses_N, uses_N)
    np.fill_diagonal(product_NN, 0)
    num_pairs = counts_NN.sum() - uses_N.sum()
    return product_NN * (num_pairs / max(product_NN.sum(), 1e-30))


def lift(counts_NN: np.ndarray) -> np.ndarray:
    """Pools that hold both of two experts, over those by chance, float64 [N, N]: 1 is chance, its
    logarithm the pointwise mutual information. NaN on the diagonal and where chance gives none."""
    chance_NN = by_chance(counts_NN)
    return np.where(chance_NN > 0, counts_NN / np.where(chance_NN > 0, chance_NN, 1), np.nan)


def group_experts(counts_NN: np.ndarray) -> np.ndarray:
    """Groups of experts that are together more often than chance says -> the group of each, int64
    [N], from 0, the largest first; -1 for experts in no pool.

    Greedy, in two steps that repeat until neither gains: join the two groups whose experts have
    the largest mean excess over chance, while it is above 0; move the expert that gains most to
    another group. What grows is the modularity of the graph of shared pools (Newman 2006); the
    number of groups follows.
    """
    excess_NN = counts_NN - by_chance(counts_NN)
    np.fill_diagonal(excess_NN, 0)
    group_N, before_N = np.arange(len(excess_NN)), None
    while before_N is None or (group_N != before_N).any():
        before_N = group_N
        group_N = _move(excess_NN, _join(excess_NN, group_N))
    used_N = counts_NN.diagonal() > 0
    groups = [np.flatnonzero((group_N == group) & used_N) for group in np.unique(group_N[used_N])]
    numbered_N = np.full(len(group_N), -1)
    for number, members in enumerate(sorted(groups, key=lambda members: (-len(members), *members))):
        numbered_N[members] = number
    return numbered_N


def _join(excess_NN: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Join groups, best first, while experts of two are together more than by chance."""
    group_N = np.unique(group_N, return_inverse=True)[1]
    member_NX = np.eye(group_N.max() + 1)[group_N]
    excess_XX, size_X = member_NX.T @ excess_NN @ member_NX, member_NX.sum(0)
    np.fill_diagonal(excess_XX, -np.inf)
    while len(size_X) > 1:
        mean_XX = excess_XX / np.outer(size_X, size_X)
        a, b = np.unravel_index(mean_XX.argmax(), mean_XX.shape)
        if mean_XX[a, b] <= 1e-9:
            break
        excess_XX[a] += excess_XX[b]
        excess_XX[:, a] = excess_XX[a]
        excess_XX[a, a] = -np.inf
        excess_XX[b] = excess_XX[:, b] = -np.inf
        size_X[a] += size_X[b]
        group_N = np.where(group_N == b, a, group_N)
    return group_N


def _move(excess_NN: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Move one expert at a time to the group where it gains most, until none gains."""
    group_N, places = group_N.copy(), np.arange(len(group_N))
    near_NX = excess_NN @ np.eye(group_N.max() + 1)[group_N]
    while True:
        gain_NX = near_NX - near_NX[places, group_N][:, None]
        expert, group = np.unravel_index(gain_NX.argmax(), gain_NX.shape)
        if gain_NX[expert, group] <= 1e-9:
            return group_N
        near_NX[:, group_N[expert]] -= excess_NN[:, expert]
        near_NX[:, group] += excess_NN[:, expert]
        group_N[expert] = group


def modularity(counts_NN: np.ndarray, group_N: np.ndarray) -> float:
    """Share of the pairs of experts in pools that are of one group, less what chance gives: 0 for
    groups that say nothing, below 1. NaN without a pair."""
    pairs_NN = counts_NN - np.diag(counts_NN.diagonal())
    same_NN = (group_N[:, None] == group_N) & (group_N >= 0)
    total = pairs_NN.sum()
    excess_NN = pairs_NN - by_chance(counts_NN)
    return float(excess_NN[same_NN].sum() / total) if total else float("nan")


def closest_partners(counts_NN: np.ndarray, most: int) -> list[list[int]]:
    """For each expert those that go with it, at most so many: most surely first, by the excess over
    chance in standard deviations of a count, and none below chance."""
    chance_NN = by_chance(counts_NN)
    sure_NN = (counts_NN - chance_NN) / np.sqrt(np.where(chance_NN > 0, chance_NN, 1))
    np.fill_diagonal(sure_NN, 0)
    order_NN = np.argsort(-sure_NN, axis=1, kind="stable")[:, :most]
    return [
        [expert for expert in row.tolist() if sure_N[expert] > 0]
        for row, sure_N in zip(order_NN, sure_NN, strict=True)
    ]
