"""Document-pool routing in one call: the readable twin composes the pure functions of
model/router.py, the Triton kernels fuse them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emotrain.kernels.backends import choose_backend


@dataclass(frozen=True)
class PoolRouting:
    """Which experts each token uses, and what the router's losses and readers need to know of
    it."""

    probabilities_TN: Tensor
    """Softmax over the document's pool, 0 outside it. With gradient."""
    weights_TK: Tensor
    """Routing weight of each slot, 0 in empty ones. With gradient."""
    experts_TK: Tensor
    """int64 routed expert of each slot, best first; N marks an empty slot."""
    lse_T: Tensor
    """logsumexp of the logits inside the pool. With gradient."""
    counts_N: Tensor
    """int64 slots that went to each expert."""
    scores_GN: Tensor
    """Sum over each document's tokens of the probabilities before a pool was drawn; without a drawn
    pool, over its valid tokens."""
    pool_GN: Tensor | None
    """bool, the experts that each document may use; None where it may use all."""


def pool_routing(
    logits_TN: Tensor,
    document_T: Tensor,
    num_documents: int,
    num_chosen: int,
    pool_size_G: Tensor | None = None,
    kept_GN: Tensor | None = None,
    valid_T: Tensor | None = None,
    gating: str = "softmax",
    normalize: bool = False,
    backend: str = "auto",
) -> PoolRouting:
    """Route every token inside the pool of its document (spec 2.3). No copy to the host.

    Args:
        logits_TN: router logits, rows of unit stride; float32, or float64 for the twin.
        document_T: int64 document of each token in [0, G); tokens of a document may lie anywhere.
        num_documents: G.
        num_chosen: K, experts of a token.
        pool_size_G: int64 pool size of each document; None draws no pool.
        kept_GN: bool, experts that each document may use at all, at least one each.
        valid_T: bool, False for padding, which is given no expert.
        gating, normalize: as in RouterConfig. Sigmoid gating is the twin's alone.
        backend: see `choose_backend`, also for errors.
    """
    if backend == "auto" and gating != "softmax":
        backend = "torch"
    if choose_backend(backend, logits_TN, logits_TN.shape[1]) == "triton":
        from emotrain.kernels.triton_routing import pool_routing_triton

        return pool_routing_triton(
            logits_TN,
            document_T,
            num_documents,
            num_chosen,
            pool_size_G,
            kept_GN,
            valid_T,
            gating,
            normalize,
        )
    return pool_routing_torch(
        logits_TN,
        document_T,
        num_documents,
        num_chosen,
        pool_size_G,
        kept_GN,
        valid_T,
        gating,
        normalize,
    )


def pool_routing_torch(
    logits_TN: Tensor,
    document_T: Tensor,
    num_documents: int,
    num_chosen: int,
    pool_size_G: Tensor | None,
    kept_GN: Tensor | None,
    valid_T: Tensor | None,
    gating: str,
    normalize: bool,
) -> PoolRouting:
    """The twin. Arguments as `pool_routing`."""
    # At call time: the router itself imports this package.
    from emotrain.model.router import document_scores, route, select_pool

    num_routed = logits_TN.shape[1]
    pool_GN = kept_GN
    if pool_size_G is not None:
        with torch.no_grad():
            free_TN = (
                logits_TN
                if kept_GN is None
                else logits_TN.masked_fill(~kept_GN[document_T], -torch.inf)
            )
            scores_GN = document_scores(torch.softmax(free_TN, dim=1), document_T, num_documents)
            pool_GN = select_pool(scores_GN, pool_size_G)
            pool_GN = pool_GN if kept_GN is None else pool_GN & kept_GN
    if pool_GN is not None:
        logits_TN = logits_TN.masked_fill(~pool_GN[document_T], -torch.inf)
    probabilities_TN, weights_TK, experts_TK = route(logits_TN, num_chosen, gating, normalize)
    if valid_T is not None:
        weights_TK = torch.where(valid_T[:, None], weights_TK, 0)
        experts_TK = torch.where(valid_T[:, None], experts_TK, num_routed)
    with torch.no_grad():
        counts = experts_TK.new_zeros(num_routed + 1)
        counts.scatter_add_(0, experts_TK.reshape(-1), torch.ones_like(experts_TK.reshape(-1)))
        if pool_size_G is None:
            counted_TN = (
                probabilities_TN
                if valid_T is None
                else torch.where(valid_T[:, None], probabilities_TN, 0)
            )
            scores_GN = document_scores(counted_TN, document_T, num_documents)
    return PoolRouting(
        probabilities_TN,
        weights_TK,
        experts_TK,
        torch.logsumexp(logits_TN, dim=1),
        counts[:-1],
        scores_GN,
        pool_GN,
    )
