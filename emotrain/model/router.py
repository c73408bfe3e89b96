"""The router, which is EMO: a document's tokens choose their experts from one pool.

`decide` is the method, in five steps: score → pool → mask → choose → count. Its parts are pure
functions (`sum_by_document`, `select_pool`, `route`), and so is what it is asked for
(`draw_pool_sizes`, `RoutingRequest`). `DocumentPoolRouter` holds the weights. Losses and readers
get `LayerStatistics`, which is small; logits and choices only on request. No Python loop over
tokens or documents, no copy to the host.

To add a rule that draws pools: a kind in `PoolConfig`, a function here, a line in `POOL_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from emotrain.batch import PackedBatch, mix64
from emotrain.config import ModelConfig, PoolConfig, RouterConfig
from emotrain.errors import UserError
from emotrain.kernels.backends import choose_backend
from emotrain.kernels.decision import TRITON_GATINGS, TRITON_POOLS, Decision, decided
from emotrain.kernels.rowwise import wide_linear
from emotrain.model.pool_units import PoolUnits, pool_units
from emotrain.model.report import LayerStatistics, RoutingDetails
from emotrain.model.subset import among_all, experts_of_domain, without_exclusive

NO_POOL = 2**30
"""Pool size of a document that may use all experts, however many a layer has."""

# ---- what is asked of a router


@dataclass(frozen=True)
class LayerRequest:
    """What is asked of the router of one layer for a micro-batch of G documents."""

    pool: PoolConfig | None = None
    """The rule by which each document gets its pool; None draws none, as at inference."""
    pool_size_G: Tensor | None = None
    """int64 pool sizes, where the rule is one of sizes."""
    kept_GN: Tensor | None = None
    """bool, experts that each document may use at all (an expert subset), at least one each."""
    z_logits: str = "pool"
    """Logits under the z-loss: those of the `pool`, or `all`."""
    details: bool = False
    """Whether the statistics carry `RoutingDetails`."""
    choices: bool = False
    """Whether the statistics carry the experts that each token chose."""
    subset_n: Tensor | None = None
    """int64, ascending: the only experts there are, for every document."""
    num_forced: int = 0
    """How many of the last experts are in every drawn pool, beyond its size."""
    units: PoolUnits | None = None
    """What has a pool and what chooses it; None: a document, and its own tokens."""


@dataclass(frozen=True)
class RoutingRequest:
    """What is asked of all routers for a micro-batch; the fields are those of `LayerRequest`, for
    every layer. The default is the full model without pools."""

    pool: PoolConfig | None = None
    pool_sizes_LG: Tensor | None = None
    kept: Sequence[Tensor] | None = None
    """For each layer bool [N], or [G, N] for each document its own."""
    z_logits: str = "pool"
    details: bool = False
    choices: bool = False
    subset: Sequence[Tensor] | None = None
    """For each layer int64 [n], ascending: the experts of a subset. The layer computes what one
    that was extracted with these experts computes, to the bit where both run the same kernels."""
    units: PoolUnits | None = None

    def layer(self, index: int, num_documents: int) -> LayerRequest:
        return LayerRequest(
            self.pool,
            None if self.pool_sizes_LG is None else self.pool_sizes_LG[index],
            None if self.kept is None else self.kept[index].expand(num_documents, -1),
            self.z_logits,
            self.details,
            self.choices,
            None if self.subset is None else self.subset[index],
            units=self.units,
        )


def training_request(
    model: ModelConfig, batch: PackedBatch, seed: int, step: int, z_logits: str = "pool"
) -> RoutingRequest:
    """What training asks for: pools as configured, drawn anew in every step."""
    pool = model.pool
    if pool.kind == "none":
        return RoutingRequest(z_logits=z_logits)
    sizes_LG = draw_pool_sizes(pool, batch.document_ids_G, model.num_layers, seed, step)
    published = pool.unit == pool.chosen_by == "document" and pool.across_windows == 1
    units = None if published else pool_units(pool, batch)
    return RoutingRequest(pool, sizes_LG, z_logits=z_logits, units=units)


def draw_pool_sizes(
    pool: PoolConfig, document_ids_G: Tensor, num_layers: int, seed: int, step: int
) -> Tensor | None:
    """Pool size of every document in every layer -> int64 [L, G], or None where the pool is off
    (spec 2.3d). A document without a pool has the size `NO_POOL`.

    A pure function of (seed, step, layer, permanent document id): the same for every layout, after
    a resume and under recomputation. The draw is a splitmix64 hash of the four numbers.
    """
    if pool.kind == "none":
        return None
    layers_L = torch.arange(num_layers, device=document_ids_G.device)
    key = mix64(mix64(torch.full((), seed, device=document_ids_G.device)) + step)
    if pool.kind == "fixed":
        sizes_LG = torch.full((num_layers, len(document_ids_G)), pool.size, device=key.device)
    else:
        assert pool.min <= pool.max, "a setting of 0 is resolved by ModelConfig.pool"
        layer_key_L = layers_L if pool.per == "layer" else torch.zeros_like(layers_L)
        hash_LG = mix64(mix64(key + layer_key_L)[:, None] + document_ids_G)
        sizes_LG = pool.min + _below(pool.max - pool.min + 1, hash_LG)
    warm = min(1.0, step / pool.warmup_steps) if pool.warmup_steps else 1.0
    if without := round((1 - warm * (1 - pool.none_share)) * 2**31):
        # -1 keys no layer: another draw than those of sizes.
        drawn_G = _below(2**31, mix64(mix64(key - 1) + document_ids_G))
        sizes_LG = torch.where(drawn_G < without, NO_POOL, sizes_LG)
    return sizes_LG


def _below(count: int, hashes: Tensor) -> Tensor:
    """Draws from {0..count - 1}, uniform to 1 part in 2^31 / count: the upper 31 bits times the
    count, shifted down. No division."""
    return ((hashes >> 33) & 0x7FFFFFFF) * count >> 31


# ---- the method


def decide(
    logits_TN: Tensor,
    batch: PackedBatch,
    num_chosen: int,
    config: RouterConfig,
    request: LayerRequest,
    backend: str = "auto",
    choice_bias_N: Tensor | None = None,
) -> Decision:
    """Route every token inside the pool of its document (spec 2.3).

    Args:
        logits_TN: router logits, rows of unit stride; float32, or float64 on the PyTorch path.
        num_chosen: K, routed experts of a token.
        choice_bias_N: see `route`. Pools are chosen without it: they are EMO's, and loss-free
            balancing (Wang et al., arXiv 2408.15664) has none that load should change.
        backend: see `choose_backend`, also for errors. `auto` takes the Triton kernels only for
            rules that they list.
    """
    kind = "none" if request.pool is None else request.pool.kind
    scores = "masked" if request.pool is None else request.pool.scores
    in_triton = kind in TRITON_POOLS and config.gating in TRITON_GATINGS
    in_triton = in_triton and scores == "masked" and request.units is None
    if backend == "auto" and not in_triton:
        backend = "torch"
    if choose_backend(backend, logits_TN, logits_TN.shape[1]) != "triton":
        return decide_in_torch(logits_TN, batch, num_chosen, config, request, choice_bias_N)
    if not in_triton:
        raise UserError(
            f"experts.backend=triton does not route with pool.kind={kind}, gating={config.gating} "
            f"and these pool.unit, chosen_by, across_windows and scores; use auto or torch"
        )
    from emotrain.kernels.triton_routing import decide_in_triton

    return decide_in_triton(
        logits_TN,
        batch.document_T,
        batch.num_documents,
        num_chosen,
        request.pool_size_G,
        request.kept_GN,
        batch.valid_T,
        config.normalize_weights,
        request.num_forced,
        choice_bias_N,
    )


def decide_in_torch(
    logits_TN: Tensor,
    batch: PackedBatch,
    num_chosen: int,
    config: RouterConfig,
    request: LayerRequest,
    choice_bias_N: Tensor | None = None,
) -> Decision:
    """`decide`, to be read: the same as the Triton kernels, and for every rule."""
    document_T, valid_T, num_routed = batch.document_T, batch.valid_T, logits_TN.shape[1]
    if request.kept_GN is not None:
        logits_TN = logits_TN.masked_fill(~request.kept_GN[document_T], -torch.inf)
    scores_GN, pool_GN, pool_TN = None, request.kept_GN, None
    if request.pool is not None:
        with torch.no_grad():
            free_TN = torch.softmax(logits_TN, dim=1)
            scores_GN = sum_by_document(free_TN, document_T, batch.num_documents)
            if request.units is None:
                drawn_GN = _draw(scores_GN, request.pool_size_G, request)
                pool_GN = drawn_GN if pool_GN is None else drawn_GN & pool_GN
                pool_TN = pool_GN[document_T]
            else:
                scores_UN, sizes_U = request.units.scores(free_TN, request.pool_size_G)
                pool_TN = _draw(scores_UN, sizes_U, request)[request.units.unit_T]
        if request.pool.scores == "masked":
            logits_TN, pool_TN = logits_TN.masked_fill(~pool_TN, -torch.inf), None
    probabilities_TN, weights_TK, experts_TK = route(
        logits_TN, num_chosen, config.gating, config.normalize_weights, pool_TN, choice_bias_N
    )
    if valid_T is not None:
        weights_TK = torch.where(valid_T[:, None], weights_TK, 0)
        experts_TK = torch.where(valid_T[:, None], experts_TK, num_routed)
    with torch.no_grad():
        counts = experts_TK.new_zeros(num_routed + 1)
        counts.scatter_add_(0, experts_TK.reshape(-1), torch.ones_like(experts_TK.reshape(-1)))
        if scores_GN is None:
            counted_TN = _valid(probabilities_TN, valid_T)
            scores_GN = sum_by_document(counted_TN, document_T, batch.num_documents)
    lse_T = torch.logsumexp(logits_TN, dim=1)
    return Decision(
        probabilities_TN, weights_TK, experts_TK, lse_T, counts[:-1], scores_GN, pool_GN
    )


def _draw(scores_GN: Tensor, pool_size_G: Tensor | None, request: LayerRequest) -> Tensor:
    """The pool of each document, or of each part of one that has its own, bool [G, N], by the rule
    that was asked for."""
    assert request.pool is not None
    rule, common = POOL_RULES[request.pool.kind], scores_GN.shape[1] - request.num_forced
    drawn_GN = decided(rule(scores_GN[:, :common], replace(request, pool_size_G=pool_size_G)))
    return nn.functional.pad(drawn_GN, (0, request.num_forced), value=True)


def _valid(values_TN: Tensor, valid_T: Tensor | None) -> Tensor:
    """0 for padding."""
    return values_TN if valid_T is None else torch.where(valid_T[:, None], values_TN, 0)


# ---- its parts


def sum_by_document(values_TX: Tensor, document_T: Tensor, num_documents: int) -> Tensor:
    """Sum over the tokens of each document (spec 2.3c) -> [G, X]. Tokens of a document may lie
    anywhere in the batch."""
    sums_GX = values_TX.new_zeros(num_documents, values_TX.shape[1])
    return sums_GX.index_add_(0, document_T, values_TX)


def select_pool(scores_GN: Tensor, pool_size_G: Tensor) -> Tensor:
    """The `pool_size` experts of highest score of each document -> bool [G, N]. Ties go to the
    lower index."""
    order_GN = torch.sort(scores_GN, dim=1, descending=True, stable=True).indices
    ranks_N = torch.arange(scores_GN.shape[1], device=scores_GN.device)
    return torch.zeros_like(scores_GN, dtype=torch.bool).scatter_(
        1, order_GN, ranks_N < pool_size_G[:, None]
    )


def route(
    logits_TN: Tensor,
    num_chosen: int,
    gating: str,
    normalize: bool,
    pool_TN: Tensor | None = None,
    choice_bias_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts by their probability; logits of -inf are never chosen (spec 2.3, steps 5 and
    6), nor are experts outside of `pool_TN`, bool, whose probabilities stay.

    Args:
        choice_bias_N: added to probabilities where experts are chosen, and nowhere else (2.8).
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
    best_TN = probabilities_TN.detach()
    best_TN = best_TN if pool_TN is None else torch.where(pool_TN, best_TN, 0)
    none = 0.0 if choice_bias_N is None else -torch.inf
    if choice_bias_N is not None:
        best_TN = torch.where(best_TN > 0, best_TN + choice_bias_N, none)
    best_TK, experts_TK = torch.topk(best_TN, num_chosen, dim=1)
    # A pool smaller than K leaves slots whose expert is outside it. A probability of zero inside
    # the pool is one too: it underflowed, and its expert would add nothing.
    experts_TK = decided(torch.where(best_TK > none, experts_TK, num_routed))
    weights_TK = probabilities_TN.gather(1, experts_TK.clamp(max=num_routed - 1))
    weights_TK = torch.where(experts_TK < num_routed, weights_TK, 0)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    return probabilities_TN, weights_TK, experts_TK


def _best_experts(scores_GN: Tensor, request: LayerRequest) -> Tensor:
    assert request.pool_size_G is not None, "a pool by size needs the sizes"
    return select_pool(scores_GN, request.pool_size_G)


POOL_RULES: dict[str, Callable[[Tensor, LayerRequest], Tensor]] = {
    "fixed": _best_experts,
    "uniform": _best_experts,
}
"""`pool.kind` -> the function of a document's scores and the request that gives its pool, bool
[G, N]. Without gradient."""


# ---- the module


class DocumentPoolRouter(nn.Module):
    """Token-choice router whose choices lie inside the pool of the token's document; without a
    pool, a standard one."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.bank = config.bank_of_layer(layer)
        self.num_routed = config.routed_in_layer(layer)
        self.num_chosen = config.chosen_in_layer(layer)
        self.exclusive = config.experts.exclusive
        self.config = config.router
        self.backend = config.experts.backend
        # One row an expert of the layer, the shared ones last, as in the published checkpoints.
        # Rows of shared experts are read only where their weight is not 1.
        self.weight_ED = nn.Parameter(torch.empty(config.experts_in_layer(layer), config.d_model))
        # No parameter, so that no optimizer decays it and FSDP neither cuts nor rounds it.
        bias_N = torch.zeros(self.num_routed) if config.router.choice_bias else None
        self.choice_bias_N: Tensor | None
        self.register_buffer("choice_bias_N", bias_N)

    def forward(
        self, x_TD: Tensor, batch: PackedBatch, request: LayerRequest
    ) -> tuple[Decision, Tensor]:
        """Decide where every token goes -> the decision, and the logits [T, E]. All arithmetic is
        in fp32 or wider, on operands of the type of `x_TD` (spec 1.5)."""
        weight_ED: Tensor = self.weight_ED
        bias_N = self.choice_bias_N
        num_routed, subset_n = self.num_routed, request.subset_n
        if self.exclusive and subset_n is None:
            subset_n, num_forced = experts_of_domain(self.exclusive, num_routed, batch)
            request = replace(request, num_forced=num_forced)
        if subset_n is not None:
            weight_ED = torch.cat([weight_ED[subset_n], weight_ED[num_routed:]])
            num_routed = len(subset_n)
            bias_N = None if bias_N is None else bias_N[subset_n]
            if request.kept_GN is not None:
                request = replace(request, kept_GN=request.kept_GN[:, subset_n])
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = wide_linear(x_TD, weight_ED.to(x_TD.dtype))
            decision = decide(
                logits_TE[:, :num_routed],
                batch,
                min(self.num_chosen, num_routed),
                self.config,
                request,
                self.backend,
                bias_N,
            )
        if subset_n is None:
            return decision, logits_TE
        return among_all(decision, logits_TE, subset_n, self.num_routed)

    def statistics(
        self, decision: Decision, logits_TE: Tensor, batch: PackedBatch, request: LayerRequest
    ) -> LayerStatistics:
        """What losses and readers need of a decision. It is apart from `forward`, so that it runs
        while tokens travel."""
        logits_TN, valid_T = logits_TE[:, : self.num_routed], batch.valid_T
        lse_T = decision.lse_T
        if request.z_logits == "all":
            lse_T = torch.logsumexp(logits_TN, dim=1)
        counted_TN, z_T = decision.probabilities_TN, lse_T.square()
        if self.config.gating == "sigmoid":
            # Gates of a token do not sum to 1: unnormalised, the balance loss would push all of
            # them down instead of balancing.
            counted_TN = counted_TN / counted_TN.sum(dim=1, keepdim=True).clamp(min=1e-30)
        counted_TN = _valid(counted_TN, valid_T)
        if valid_T is not None:
            z_T = torch.where(valid_T, z_T, 0)
        balanced_TN = counted_TN
        if self.exclusive:
            balanced_TN = without_exclusive(counted_TN, self.exclusive)
        with torch.no_grad():
            entropy_sum = torch.special.entr(counted_TN).sum()
            scores_GN = decision.scores_GN.double()
            share_GN = scores_GN / scores_GN.sum(dim=1, keepdim=True).clamp(min=1e-30)
            effective_G = torch.special.entr(share_GN).sum(dim=1).exp()
        details = None
        if request.details:
            details = RoutingDetails(
                logits_TN.detach(), decision.weights_TK, decision.experts_TK, decision.scores_GN
            )
        return LayerStatistics(
            decision.counts_N,
            balanced_TN.sum(dim=0),
            z_T.sum(),
            entropy_sum,
            effective_G,
            request.pool_size_G,
            self.bank,
            details,
            decision.experts_TK.int() if request.choices else None,
            None if (bias_N := self.choice_bias_N) is None else bias_N.max() - bias_N.min(),
        )

    def shared_weights(self, logits_TE: Tensor) -> Tensor | None:
        """Weights [T, M] of the shared experts; None where each is 1."""
        if self.config.shared_weight == "one" or logits_TE.shape[1] - self.num_routed < 2:
            return None
        return torch.softmax(logits_TE[:, self.num_routed :], dim=1)
