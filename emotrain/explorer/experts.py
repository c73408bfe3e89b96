"""What the page of an expert says: where its load comes from, and which experts go with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from emotrain.analysis.together import by_chance, count_pools
from emotrain.explorer.documents import ShownDocuments
from emotrain.explorer.routing import DocumentRouting

POOL = 8
"""Experts of a document's pool: those with the largest mean probability, which training's pool rule
would choose for a pool of this size."""
TOP_DOCUMENTS, TOP_TOKENS, TOP_EXPERTS = 8, 24, 6
"""Entries of the lists of a page."""
LEAST_TOKENS = 16
"""Of a document that stands in the list of an expert: a short one is all of one kind by chance."""


def pools(mean_UN: np.ndarray, size: int = POOL) -> np.ndarray:
    """The pool of each document, int64 [U, size], the most used expert first (ties: the lower
    number); N in places that a layer has no expert for."""
    num_experts = mean_UN.shape[1]
    order_UN = np.argsort(-mean_UN, axis=1, kind="stable")[:, :size]
    return np.pad(order_UN, ((0, 0), (0, size - order_UN.shape[1])), constant_values=num_experts)


def expert_pages(
    documents: ShownDocuments, routing: DocumentRouting, place: int, cluster_U: np.ndarray
) -> list[dict[str, Any]]:
    """The page of each expert of a layer.

    Args:
        place: of the layer among those of `routing`.
        cluster_U: the cluster of each document.
    Returns:
        for each expert: `load`, its share of the routing probability; `domains`, its mean
        probability in each; `documents`, pairs of a document's place and its mean probability;
        `tokens`, triples of a token id, how often it chose the expert first, and the share of its
        occurrences; `neighbours`, pairs of an expert and the cosine of the router's rows;
        `partners`, pairs of an expert and how many times as often as by chance it is in the same
        pools; `cluster`, the one that uses it most.
    """
    mean_UN = routing.mean[place]
    lengths_U = np.diff(documents.start_U)
    load_N = lengths_U @ mean_UN / lengths_U.sum()
    domain_YN = group_means(mean_UN, documents.domain_U, len(documents.domains), lengths_U)
    cluster_YN = group_means(mean_UN, cluster_U, int(cluster_U.max()) + 1, lengths_U)
    long_U = np.flatnonzero(lengths_U >= min(LEAST_TOKENS, lengths_U.max()))
    best = long_U[np.argsort(-mean_UN[long_U], axis=0, kind="stable")[:TOP_DOCUMENTS]]
    tokens = typical_tokens(
        np.concatenate(documents.tokens), routing.first[place], mean_UN.shape[1]
    )
    neighbours = _pairs(router_cosines(routing.router[place]))
    partners = _pairs(*pool_lifts(pools(mean_UN), mean_UN.shape[1]))
    return [
        {
            "load": _round(load_N[e]),
            "domains": [_round(p) for p in domain_YN[:, e]],
            "documents": [(int(u), _round(mean_UN[u, e])) for u in best[:, e]],
            "tokens": tokens[e],
            "neighbours": neighbours[e],
            "partners": partners[e],
            "cluster": int(cluster_YN[:, e].argmax()),
        }
        for e in range(mean_UN.shape[1])
    ]


def group_means(
    mean_UN: np.ndarray, group_U: np.ndarray, num_groups: int, lengths_U: np.ndarray
) -> np.ndarray:
    """Mean over the tokens of each group of documents -> float64 [Y, N]; 0 for an empty one."""
    sums_YN = np.zeros((num_groups, mean_UN.shape[1]))
    np.add.at(sums_YN, group_U, mean_UN.astype(np.float64) * lengths_U[:, None])
    tokens_Y = np.bincount(group_U, weights=lengths_U, minlength=num_groups)
    return sums_YN / np.maximum(tokens_Y, 1)[:, None]


def typical_tokens(
    token_T: np.ndarray, first_T: np.ndarray, num_experts: int
) -> list[list[tuple[int, int, float]]]:
    """For each expert its most typical tokens: (token id, times it chose the expert first, share of
    its occurrences that did).

    A token's rank is its part of the divergence of the expert's tokens from all tokens:
    count * log(p(token | expert) / p(token)). So a token is both frequent and more frequent than
    elsewhere.
    """
    pair_X, count_X = np.unique(
        token_T.astype(np.int64) * (num_experts + 1) + first_T, return_counts=True
    )
    token_X, expert_X = pair_X // (num_experts + 1), pair_X % (num_experts + 1)
    everywhere_V = np.bincount(token_T)
    of_expert_N = np.bincount(first_T, minlength=num_experts + 1)
    expected_X = everywhere_V[token_X] * of_expert_N[expert_X] / len(token_T)
    score_X = count_X * np.log(count_X / expected_X)
    found = []
    for e in range(num_experts):
        own = np.flatnonzero((expert_X == e) & (score_X > 0))
        own = own[np.argsort(-score_X[own], kind="stable")[:TOP_TOKENS]]
        found.append(
            [
                (int(token_X[r]), int(count_X[r]), _round(count_X[r] / everywhere_V[token_X[r]]))
                for r in own
            ]
        )
    return found


def router_cosines(rows_ND: np.ndarray) -> np.ndarray:
    """Cosine of the router's rows, float64 [N, N]. Their mean is taken off first: what all rows
    share changes no choice."""
    rows_ND = rows_ND.astype(np.float64) - rows_ND.mean(0)
    rows_ND /= np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)
    return rows_ND @ rows_ND.T


def pool_lifts(pool_UX: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """How many times as often as by chance two experts are in one pool, float64 [N, N], and how
    sure that is: the excess over the expected number in its standard deviations. Both as of
    `emotrain coverage`.

    Args:
        pool_UX: of `pools`.
    """
    member_UN = np.zeros((len(pool_UX), num_experts + 1), bool)
    np.put_along_axis(member_UN, pool_UX, True, axis=1)
    together_NN = count_pools(member_UN[:, :num_experts])
    chance_NN = np.maximum(by_chance(together_NN), 1e-12)
    return together_NN / chance_NN, (together_NN - chance_NN) / np.sqrt(chance_NN)


def _pairs(
    values_NN: np.ndarray, order_NN: np.ndarray | None = None
) -> list[list[tuple[int, float]]]:
    """For each expert the others of the largest values (of the largest `order_NN`, if given)."""
    order_NN = (values_NN if order_NN is None else order_NN).copy()
    np.fill_diagonal(order_NN, -np.inf)
    best = np.argsort(-order_NN, axis=1, kind="stable")[:, : min(TOP_EXPERTS, len(order_NN) - 1)]
    return [[(int(j), _round(values_NN[e, j])) for j in others] for e, others in enumerate(best)]


def _round(value: float) -> float:
    """Digits that a page can show."""
    return round(float(value), 5)
