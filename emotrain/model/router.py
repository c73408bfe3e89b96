"""The router: which experts each token uses, decided once, and what the losses and readers need to
know of it.

The five ideas of EMO are five pure functions: `document_scores`, `draw_pool_sizes`, `select_pool`,
`route`, and `load_balance_loss` (in losses.py). No Python loop over tokens or documents, no copy to
the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig, PoolConfig
from emotrain.kernels import PoolRouting, pool_routing


@dataclass(frozen=True)
class LayerRouting:
    """One layer's routing decision and its statistics over the valid (not padding) tokens of the
    batch."""

    weights_TK: Tensor
    """Routing weight of each slot, 0 in empty ones. Carries the gradient of the task loss to the
    router."""
    experts_TK: Tensor
    """int64 routed expert of each slot; N marks an empty slot."""
    counts_N: Tensor
    """int64 slots that went to each routed expert."""
    probability_sum_N: Tensor
    """Sum over tokens of the routing probabilities, with gradient."""
    z_sum: Tensor
    """Sum over tokens of logsumexp(logits)^2, with gradient."""
    entropy_sum: Tensor
    """Sum over tokens of the entropy of the routing probabilities, in nats."""
    document_scores_GN: Tensor
    """Sum over each document's tokens of the probabilities before a pool was drawn: what the pool
    is chosen by, and what selection, coverage and clustering read."""
    pool_size_G: Tensor | None
    """int64 pool size of each document; None without a drawn pool."""
    shared_weights_TM: Tensor | None
    """Weights of M shared experts where they are not simply 1."""
    logits_TN: Tensor
    """Router logits before any mask, without gradient."""


@dataclass(frozen=True)
class RoutingReport:
    """What every reader of routing gets: the layers' routing, and how many tokens it is over."""

    layers: tuple[LayerRouting, ...]
    """One entry a layer with routed experts, in order."""
    num_tokens: Tensor
    """int64 scalar: valid tokens of the batch."""
    document_tokens_G: Tensor
    """int64 tokens of each document."""
    real_G: Tensor
    """bool, False for the pseudo-document of padding."""


def document_scores(probabilities_TN: Tensor, document_T: Tensor, num_documents: int) -> Tensor:
    """Sum of the routing probabilities over each document's tokens (spec 2.3c) -> [G, N].

    Tokens of a document may lie anywhere in the batch.
    """
    scores_GN = probabilities_TN.new_zeros(num_documents, probabilities_TN.shape[1])
    return scores_GN.index_add_(0, document_T, probabilities_TN)


def draw_pool_sizes(
    pool: PoolConfig, document_ids_G: Tensor, num_layers: int, seed: int, step: int
) -> Tensor | None:
    """Pool size of every document in every layer -> int64 [L, G], or None where the pool is off
    (spec 2.3d).

    A pure function of (seed, step, layer, permanent document id): the same for every layout, after
    a resume and under recomputation. The draw is a splitmix64 hash of the four numbers.
    """
    if pool.kind == "none":
        return None
    if pool.kind == "fixed":
        return torch.full(
            (num_layers, document_ids_G.shape[0]), pool.size, device=document_ids_G.device
        )
    layers_L = torch.arange(num_layers, device=document_ids_G.device)
    layer_key_L = layers_L if pool.per == "layer" else torch.zeros_like(layers_L)
    key = _mix64(_mix64(torch.full((), seed, device=document_ids_G.device)) + step)
    hash_LG = _mix64(_mix64(key + layer_key_L)[:, None] + document_ids_G)
    # The upper 31 bits times the width, shifted down: uniform to 1 part in 2^31 / width, and no
    # division.
    return pool.min + (((hash_LG >> 33) & 0x7FFFFFFF) * (pool.max - pool.min + 1) >> 31)


def select_pool(scores_GN: Tensor, pool_size_G: Tensor) -> Tensor:
    """The `pool_size` experts of highest score of each document -> bool [G, N]. Ties go to the
    lower index."""
    order_GN = torch.sort(scores_GN, dim=1, descending=True, stable=True).indices
    ranks_N = torch.arange(scores_GN.shape[1], device=scores_GN.device)
    return torch.zeros_like(scores_GN, dtype=torch.bool).scatter_(
        1, order_GN, ranks_N < pool_size_G[:, None]
    )


def route(
    logits_TN: Tensor, num_chosen: int, gating: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts by their probability; logits of -inf are never chosen (spec 2.3, steps 5 and
    6).

    Returns:
        probabilities [T, N]; weights [T, K]; experts int64 [T, K] with N in empty slots, whose
        weight is 0. Weights are the probabilities themselves unless `normalize` divides them by
        their sum.
    """
    num_routed = logits_TN.shape[1]
    if gating == "softmax":
        probabilities_TN = torch.softmax(logits_TN, dim=1)
    else:
        probabilities_TN = torch.where(logits_TN == -torch.inf, 0, torch.sigmoid(logits_TN) + 1e-7)
    weights_TK, experts_TK = torch.topk(probabilities_TN, num_chosen, dim=1)
    # A pool smaller than K leaves slots whose expert is outside it. A probability of zero inside
    # the pool is one too: it underflowed, and its expert would add nothing.
    experts_TK = torch.where(weights_TK > 0, experts_TK, num_routed)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    return probabilities_TN, weights_TK, experts_TK


class DocumentPoolRouter(nn.Module):
    """Token-choice router whose choices lie inside the pool of the token's document; without a
    pool, a standard one."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.num_routed = config.routed_in_layer(layer)
        self.num_chosen = config.chosen_in_layer(layer)
        self.router = config.router
        self.backend = config.experts.backend
        # One row an expert of the bank, the shared ones last, as in the published checkpoints. Rows
        # of shared experts are read only where their weight is not 1.
        self.weight_ED = nn.Parameter(torch.empty(config.experts_in_layer(layer), config.d_model))

    def forward(
        self,
        x_TD: Tensor,
        batch: PackedBatch,
        pool_size_G: Tensor | None = None,
        kept_GN: Tensor | None = None,
    ) -> tuple[PoolRouting, Tensor]:
        """Decide where every token goes -> the decision, and the logits [T, E]. All arithmetic is
        in fp32 or wider, on operands of the type of `x_TD` (spec 1.5).

        Args:
            pool_size_G: draw the pool from the document's own scores with these sizes.
            kept_GN: bool, experts that each document may use at all (an expert subset).
        """
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(dtype), self.weight_ED.to(x_TD.dtype).to(dtype))
            routing = pool_routing(
                logits_TE[:, : self.num_routed],
                batch.document_T,
                batch.num_documents,
                self.num_chosen,
                pool_size_G,
                kept_GN,
                batch.valid_T,
                self.router.gating,
                self.router.normalize_weights,
                self.backend,
            )
        return routing, logits_TE

    def statistics(
        self,
        routing: PoolRouting,
        logits_TE: Tensor,
        batch: PackedBatch,
        pool_size_G: Tensor | None = None,
        z_logits: str = "pool",
    ) -> LayerRouting:
        """What losses and readers need of a decision. Apart from `forward`, so that it can run
        while tokens travel.

        Args:
            z_logits: logits under the z-loss, those of the `pool` or `all`.
        """
        all_logits_TN, valid_T = logits_TE[:, : self.num_routed], batch.valid_T
        lse_T = routing.lse_T if z_logits == "pool" else torch.logsumexp(all_logits_TN, dim=1)
        counted_TN, z_T = routing.probabilities_TN, lse_T.square()
        if valid_T is not None:
            counted_TN, z_T = (
                torch.where(valid_T[:, None], counted_TN, 0),
                torch.where(valid_T, z_T, 0),
            )
        with torch.no_grad():
            entropy_sum = torch.special.entr(counted_TN).sum()
        return LayerRouting(
            weights_TK=routing.weights_TK,
            experts_TK=routing.experts_TK,
            counts_N=routing.counts_N,
            probability_sum_N=counted_TN.sum(dim=0),
            z_sum=z_T.sum(),
            entropy_sum=entropy_sum,
            document_scores_GN=routing.scores_GN,
            pool_size_G=pool_size_G,
            shared_weights_TM=self._shared_weights(logits_TE),
            logits_TN=all_logits_TN.detach(),
        )

    def _shared_weights(self, logits_TE: Tensor) -> Tensor | None:
        if self.router.shared_weight == "one" or logits_TE.shape[1] - self.num_routed < 2:
            return None
        return torch.softmax(logits_TE[:, self.num_routed :], dim=1)


def _mix64(key: Tensor) -> Tensor:
    """splitmix64's step and finaliser on int64, whose arithmetic wraps: every bit of the key
    moves every bit of the result."""
    key = key + -7046029254386353131
    key = (key ^ _shift_right(key, 30)) * -4658895280553007687
    key = (key ^ _shift_right(key, 27)) * -7723592293110705685
    return key ^ _shift_right(key, 31)


def _shift_right(key: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own keeps the sign."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)
