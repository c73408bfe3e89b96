"""Proves the five ideas of the router, each against a slow loop that states it (spec 2.3), and what
EMO promises of them: one document's routing is its own business."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from helpers import random_document_T, route_all, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import PoolConfig, RouterConfig
from emotrain.errors import UserError
from emotrain.model import router as router_module
from emotrain.model.losses import load_balance_loss
from emotrain.model.report import RoutingReport
from emotrain.model.router import (
    DocumentPoolRouter,
    LayerRequest,
    decide,
    draw_pool_sizes,
    route,
    select_pool,
    sum_by_document,
)
from emotrain.training.step import detached


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


fast = settings(max_examples=25, deadline=None)


# ---- oracles: the method as loops over tokens, documents and experts


def scores_oracle(
    probabilities_TN: Tensor, document_T: Tensor, num_documents: int
) -> list[list[float]]:
    scores = [[0.0] * probabilities_TN.shape[1] for _ in range(num_documents)]
    for token, document in enumerate(document_T.tolist()):
        for expert, probability in enumerate(probabilities_TN[token].tolist()):
            scores[document][expert] += probability
    return scores


def pool_oracle(scores: list[float], size: int) -> list[bool]:
    best = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))[:size]
    return [expert in best for expert in range(len(scores))]


def route_oracle(
    logits: list[float], num_chosen: int, gating: str, normalize: bool
) -> dict[int, float]:
    """Expert -> weight of one token; -inf is outside the pool. Equal logits go to any of the
    equals."""
    inside = [expert for expert, logit in enumerate(logits) if logit > -math.inf]
    if gating == "softmax":
        total = sum(math.exp(logits[expert]) for expert in inside)
        probability = {expert: math.exp(logits[expert]) / total for expert in inside}
    else:
        probability = {expert: 1 / (1 + math.exp(-logits[expert])) + 1e-7 for expert in inside}
    chosen = sorted(inside, key=lambda expert: -probability[expert])[:num_chosen]
    divisor = sum(probability[expert] for expert in chosen) if normalize else 1
    return {expert: probability[expert] / divisor for expert in chosen}


def choices(weights_TK: Tensor, experts_TK: Tensor, num_routed: int) -> list[dict[int, float]]:
    """Expert -> weight of each token, without empty slots (which must weigh nothing)."""
    assert (weights_TK[experts_TK == num_routed] == 0).all()
    return [
        {e: w for e, w in zip(experts, weights, strict=True) if e < num_routed}
        for experts, weights in zip(experts_TK.tolist(), weights_TK.tolist(), strict=True)
    ]


# ---- document_scores, select_pool, route


@pytest.mark.parametrize("num_documents", [1, 5, 40])
def test_document_scores_sum_each_documents_tokens(num_documents: int) -> None:
    document_T = random_document_T(40, num_documents, seed=1)
    probabilities_TN = torch.rand(40, 6, dtype=torch.float64)
    expected = torch.tensor(
        scores_oracle(probabilities_TN, document_T, num_documents), dtype=torch.float64
    )
    torch.testing.assert_close(
        sum_by_document(probabilities_TN, document_T, num_documents), expected
    )


@fast
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.data()
)
def test_select_pool_takes_the_best_and_ties_go_to_the_lower_expert(
    scores: list[list[int]], data: st.DataObject
) -> None:
    sizes = [data.draw(st.integers(0, 8)) for _ in scores]
    pool_GN = select_pool(torch.tensor(scores, dtype=torch.float32), torch.tensor(sizes))
    assert pool_GN.tolist() == [
        pool_oracle(row, size) for row, size in zip(scores, sizes, strict=True)
    ]


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pool_size", [1, 2, 3, 8])
def test_route_agrees_with_the_loop(gating: str, normalize: bool, pool_size: int) -> None:
    """Also where the pool holds fewer experts than a token may choose: the rest of its slots are
    empty."""
    logits_TN = torch.randn(12, 8, dtype=torch.float64)
    outside_TN = torch.rand(12, 8).argsort(dim=1) >= pool_size
    logits_TN = logits_TN.masked_fill(outside_TN, -torch.inf)
    probabilities_TN, weights_TK, experts_TK = route(logits_TN, 3, gating, normalize)
    for token, chosen in enumerate(choices(weights_TK, experts_TK, 8)):
        assert chosen == pytest.approx(
            route_oracle(logits_TN[token].tolist(), 3, gating, normalize)
        )
        assert len(chosen) == min(3, pool_size)
    assert (probabilities_TN[outside_TN] == 0).all()
    if gating == "softmax":
        torch.testing.assert_close(probabilities_TN.sum(dim=1), torch.ones(12, dtype=torch.float64))


def test_weights_are_the_probabilities_of_the_chosen_not_renormalised() -> None:
    probabilities_TN, weights_TK, experts_TK = route(
        torch.randn(5, 8), 3, "softmax", normalize=False
    )
    assert torch.equal(weights_TK, probabilities_TN.gather(1, experts_TK))
    assert (weights_TK.sum(dim=1) < 1).all()


# ---- draw_pool_sizes


def sizes(
    ids: list[int] | Tensor,
    kind: Literal["none", "fixed", "uniform"] = "uniform",
    low: int = 8,
    high: int = 128,
    per: Literal["layer", "document"] = "layer",
    layers: int = 4,
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    pool = PoolConfig(kind=kind, min=low, max=high, size=32, per=per)
    return draw_pool_sizes(pool, torch.as_tensor(ids), layers, seed, step)


def test_drawn_sizes_are_uniform_over_the_inclusive_range() -> None:
    drawn = sizes(torch.arange(30_000), layers=2, seed=7).flatten()
    assert (drawn.min(), drawn.max()) == (8, 128)
    counts = torch.bincount(drawn - 8, minlength=121)
    chi_square = ((counts - counts.sum() / 121) ** 2 / (counts.sum() / 121)).sum().item()
    assert 60 < chi_square < 200, "120 degrees of freedom: mean 120, deviation 15.5"


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}])
def test_draws_of_another_seed_step_layer_or_document_are_unrelated(other: dict[str, int]) -> None:
    ids = torch.arange(20_000)
    first = sizes(ids, layers=2).double()
    for second in (
        sizes(ids, layers=2, **other).double()[0],
        first[1],
        sizes(ids + 1, layers=2).double()[0],
    ):
        correlation = torch.corrcoef(torch.stack([first[0], second]))[0, 1]
        assert abs(correlation) < 0.03, "four deviations of 1 / sqrt(20000)"


@fast
@given(
    st.lists(st.integers(-1, 2**62), min_size=1, max_size=8),
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**7),
    st.permutations(range(8)),
)
def test_a_draw_depends_on_its_own_document_only(
    ids: list[int], seed: int, step: int, order: list[int]
) -> None:
    """Not on the rest of the batch nor on its order; the same after any number of other draws."""
    drawn = sizes(ids, seed=seed, step=step)
    order = [i for i in order if i < len(ids)]
    assert torch.equal(sizes([ids[i] for i in order], seed=seed, step=step), drawn[:, order])
    assert torch.equal(sizes(ids[-1:], seed=seed, step=step), drawn[:, -1:])
    assert torch.equal(sizes(ids, seed=seed, step=step, layers=2), drawn[:2])
    assert ((drawn >= 8) & (drawn <= 128)).all()


def test_kinds_of_pools() -> None:
    assert sizes([1, 2], kind="none") is None
    assert sizes([1, 2], kind="fixed").tolist() == [[32, 32]] * 4
    assert (sizes([1, 2, 3], low=5, high=5) == 5).all()
    per_document, per_layer = (sizes(torch.arange(50), per=per) for per in ("document", "layer"))
    assert (per_document == per_document[0]).all() and per_document[0].unique().numel() > 20
    assert not (per_layer == per_layer[0]).all()


# ---- the router as a whole

WIDTH, ROUTED = 6, 8


def make_router(seed: int = 0, **overrides) -> DocumentPoolRouter:
    router = DocumentPoolRouter(
        tiny_config(**{"model__d_model": WIDTH, "model__num_heads": 1, **overrides}).model, layer=0
    ).double()
    torch.nn.init.normal_(router.weight_ED.data, generator=torch.Generator().manual_seed(seed))
    return router


def flat_batch(
    document_T: Tensor, ids_G: Tensor | None = None, has_padding: bool = False
) -> PackedBatch:
    ids_G = torch.arange(int(document_T.max()) + 1) if ids_G is None else ids_G
    return PackedBatch(document_T[None], document_T[None], document_T[None], ids_G, has_padding)


def run(
    router: DocumentPoolRouter, x_TD: Tensor, document_T: Tensor, size_G: Tensor | None, **arguments
) -> SimpleNamespace:
    return route_all(router, x_TD, flat_batch(document_T), size_G, **arguments)


def per_token(routing: SimpleNamespace, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return routing.experts_TK[tokens], routing.weights_TK[tokens].detach()


def test_the_router_is_its_parts_in_order() -> None:
    """Scores before the pool, a pool a document, softmax inside it, choices, counts, losses: all
    by loops."""
    router, x_TD, document_T = (
        make_router(),
        torch.randn(30, WIDTH, dtype=torch.float64),
        random_document_T(30, 4, seed=2),
    )
    size_G = torch.tensor([1, 3, 5, 9])
    routing = run(router, x_TD, document_T, size_G)
    logits_TN = (x_TD @ router.weight_ED[:ROUTED].T).detach()
    scores = scores_oracle(logits_TN.softmax(dim=1), document_T, 4)
    pools = [pool_oracle(row, size) for row, size in zip(scores, size_G.tolist(), strict=True)]
    counts, probability_sum, z, entropy = (
        [0] * ROUTED,
        torch.zeros(ROUTED, dtype=torch.float64),
        0.0,
        0.0,
    )
    chosen_T = choices(routing.weights_TK, routing.experts_TK, ROUTED)
    for token, document in enumerate(document_T.tolist()):
        inside = [
            logit if pool else -math.inf
            for logit, pool in zip(logits_TN[token].tolist(), pools[document], strict=True)
        ]
        assert chosen_T[token] == pytest.approx(route_oracle(inside, 3, "softmax", False))
        for expert in chosen_T[token]:
            counts[expert] += 1
        mass = sum(math.exp(logit) for logit in inside)
        probability_sum += torch.tensor([math.exp(logit) / mass for logit in inside])
        z += math.log(mass) ** 2
        entropy -= sum(
            p * math.log(p) for p in (math.exp(logit) / mass for logit in inside) if p > 0
        )
    assert routing.counts_N.tolist() == counts
    torch.testing.assert_close(routing.probability_sum_N.detach(), probability_sum)
    assert (routing.z_sum.item(), routing.entropy_sum.item()) == pytest.approx((z, entropy))
    torch.testing.assert_close(
        routing.document_scores_GN, torch.tensor(scores, dtype=torch.float64)
    )


@pytest.mark.parametrize("size", [ROUTED, ROUTED + 1, 128])
def test_a_pool_of_all_experts_is_no_pool(size: int) -> None:
    router, x_TD, document_T = (
        make_router(),
        torch.randn(20, WIDTH, dtype=torch.float64),
        random_document_T(20, 3, seed=3),
    )
    pooled, free = (
        run(router, x_TD, document_T, torch.full((3,), size)),
        run(router, x_TD, document_T, None),
    )
    for name in (
        "weights_TK",
        "experts_TK",
        "counts_N",
        "probability_sum_N",
        "z_sum",
        "document_scores_GN",
    ):
        assert torch.equal(getattr(pooled, name), getattr(free, name)), name


def test_probabilities_in_the_pool_are_the_free_ones_over_their_mass() -> None:
    router, x_TD, document_T = (
        make_router(),
        torch.randn(20, WIDTH, dtype=torch.float64),
        random_document_T(20, 3, seed=4),
    )
    size_G = torch.tensor([3, 4, 6])
    routing = run(router, x_TD, document_T, size_G)
    free_TN = routing.logits_TN.softmax(dim=1)
    pool_TN = select_pool(routing.document_scores_GN, size_G)[document_T]
    expected_TN = free_TN * pool_TN / (free_TN * pool_TN).sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.probability_sum_N.detach(), expected_TN.sum(dim=0))
    torch.testing.assert_close(
        routing.weights_TK.detach(), expected_TN.gather(1, routing.experts_TK)
    )
    assert pool_TN.gather(1, routing.experts_TK).all()


def test_z_loss_over_the_pool_or_over_all_logits() -> None:
    router, x_TD, document_T = (
        make_router(),
        torch.randn(10, WIDTH, dtype=torch.float64),
        random_document_T(10, 2, seed=5),
    )
    by_scope = {
        scope: run(router, x_TD, document_T, torch.tensor([3, 3]), z_logits=scope).z_sum.item()
        for scope in ("pool", "all")
    }
    everything = run(router, x_TD, document_T, None)
    assert by_scope["all"] == pytest.approx(
        everything.logits_TN.logsumexp(dim=1).square().sum().item()
    )
    assert by_scope["pool"] != pytest.approx(by_scope["all"])


@pytest.mark.parametrize("size_G", [None, torch.tensor([2, 5, 3])])
def test_kept_experts_bound_the_pool(size_G: Tensor | None) -> None:
    router, x_TD, document_T = (
        make_router(),
        torch.randn(20, WIDTH, dtype=torch.float64),
        random_document_T(20, 3, seed=6),
    )
    kept_GN = torch.rand(3, ROUTED).argsort(dim=1) < 4
    routing = run(router, x_TD, document_T, size_G, kept_GN=kept_GN)
    for token, chosen in enumerate(choices(routing.weights_TK, routing.experts_TK, ROUTED)):
        document = document_T[token]
        assert all(kept_GN[document, expert] for expert in chosen)
        assert len(chosen) == min(3, 4 if size_G is None else size_G[document])


@pytest.mark.parametrize("size", [None, 4])
def test_padding_changes_no_statistic(size: int | None) -> None:
    router, x_TD = make_router(), torch.randn(20, WIDTH, dtype=torch.float64)
    document_T = torch.arange(3).repeat_interleave(torch.tensor([6, 6, 8]))
    size_3, size_2 = (
        (None, None) if size is None else (torch.full((3,), size), torch.full((2,), size))
    )
    padded = route_all(
        router, x_TD, flat_batch(document_T, torch.tensor([5, 6, -1]), has_padding=True), size_3
    )
    bare = route_all(router, x_TD[:12], flat_batch(document_T[:12], torch.tensor([5, 6])), size_2)
    for name in ("counts_N", "probability_sum_N", "z_sum", "entropy_sum"):
        torch.testing.assert_close(getattr(padded, name), getattr(bare, name), msg=name)
    torch.testing.assert_close(padded.document_scores_GN[:2], bare.document_scores_GN)
    assert torch.equal(padded.experts_TK[:12], bare.experts_TK)
    assert (padded.experts_TK[12:] == ROUTED).all() and (padded.weights_TK[12:] == 0).all()


@fast
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 20))
def test_routing_survives_any_reordering_of_the_batch(
    seed: int, num_documents: int, extra: int
) -> None:
    """Permuting the tokens of all documents, interleaved as they come, permutes the routing and
    nothing else."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_documents + extra
    router, x_TD = (
        make_router(seed),
        torch.randn(num_tokens, WIDTH, dtype=torch.float64, generator=generator),
    )
    document_T, size_G = (
        random_document_T(num_tokens, num_documents, seed),
        torch.randint(1, 9, (num_documents,), generator=generator),
    )
    order = torch.randperm(num_tokens, generator=generator)
    before = run(router, x_TD, document_T, size_G)
    after = run(router, x_TD[order], document_T[order], size_G)
    assert torch.equal(after.experts_TK, before.experts_TK[order])
    torch.testing.assert_close(after.weights_TK, before.weights_TK[order])
    assert torch.equal(after.counts_N, before.counts_N)


@fast
@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(0, 20))
def test_a_document_is_routed_as_if_it_were_alone(
    seed: int, num_documents: int, extra: int
) -> None:
    """So whatever its neighbours say, its pool and its tokens' experts stay the same."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_documents + extra
    router, x_TD = (
        make_router(seed),
        torch.randn(num_tokens, WIDTH, dtype=torch.float64, generator=generator),
    )
    document_T, size_G = (
        random_document_T(num_tokens, num_documents, seed),
        torch.randint(1, 9, (num_documents,), generator=generator),
    )
    together = run(router, x_TD, document_T, size_G)
    own_T = document_T == 0
    alone = run(router, x_TD[own_T], document_T[own_T], size_G[:1])
    changed_TD = torch.where(own_T[:, None], x_TD, -3 * x_TD)
    with_others = run(router, changed_TD, document_T, size_G)
    for routing in (together, with_others):
        experts_TK, weights_TK = per_token(routing, own_T)
        assert torch.equal(experts_TK, alone.experts_TK)
        torch.testing.assert_close(weights_TK, alone.weights_TK.detach())
        assert torch.equal(
            select_pool(routing.document_scores_GN, size_G)[0],
            select_pool(alone.document_scores_GN, size_G[:1])[0],
        )


# ---- shared experts, gradients, precision


def test_the_routers_row_of_the_shared_expert_gets_no_gradient() -> None:
    router, x_TD = make_router(), torch.randn(10, WIDTH, dtype=torch.float64)
    routing = run(router, x_TD, torch.zeros(10, dtype=torch.int64), torch.tensor([5]))
    (
        routing.weights_TK.square().sum() + routing.probability_sum_N.square().sum() + routing.z_sum
    ).backward()
    assert (router.weight_ED.grad[-1] == 0).all()
    assert (router.weight_ED.grad[:-1] != 0).any(dim=1).sum() == 5, (
        "experts outside the pool get none either"
    )


def test_shared_weights_are_one_or_a_softmax_over_their_logits() -> None:
    x_TD, document_T = (
        torch.randn(10, WIDTH, dtype=torch.float64),
        torch.zeros(10, dtype=torch.int64),
    )
    for shared, rule, expected in ((2, "one", None), (1, "softmax", None), (2, "softmax", 2)):
        router = make_router(model__experts__shared=shared, model__router__shared_weight=rule)
        weights_TM = run(router, x_TD, document_T, None).shared_weights_TM
        if expected is None:
            assert weights_TM is None
        else:
            torch.testing.assert_close(
                weights_TM, (x_TD @ router.weight_ED.T)[:, -expected:].softmax(dim=1)
            )


def test_the_pool_itself_carries_no_gradient_but_the_probabilities_do() -> None:
    router, x_TD = make_router(), torch.randn(6, WIDTH, dtype=torch.float64)
    routing = run(router, x_TD, torch.zeros(6, dtype=torch.int64), torch.tensor([4]))
    assert not routing.document_scores_GN.requires_grad and not routing.logits_TN.requires_grad
    assert (
        routing.weights_TK.requires_grad
        and routing.probability_sum_N.requires_grad
        and routing.z_sum.requires_grad
    )


def test_router_arithmetic_is_fp32_on_bf16_operands_under_autocast() -> None:
    """As in the reference, whose gathered router weights are bf16 (spec 1.5)."""
    router, x_TD = make_router().float(), torch.randn(10, WIDTH).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = run(router, x_TD, torch.zeros(10, dtype=torch.int64), torch.tensor([4]))
    assert routing.logits_TN.dtype == routing.weights_TK.dtype == torch.float32
    torch.testing.assert_close(
        routing.logits_TN, (x_TD.float() @ router.weight_ED[:ROUTED].bfloat16().float().T).detach()
    )


def test_gates_count_in_the_balance_by_their_share() -> None:
    """Sigmoid gates do not sum to 1 a token. The balance loss takes each over their sum, so that
    it is 1 when balanced and its gradient does not push all gates down."""
    router = make_router(model__router__gating="sigmoid")
    router.weight_ED.data.zero_()
    x_TD, document_T = torch.randn(12, WIDTH, dtype=torch.float64), torch.arange(12) // 4
    routing = run(router, x_TD, document_T, None)
    torch.testing.assert_close(
        routing.probability_sum_N, torch.full((ROUTED,), 12 / ROUTED, dtype=torch.float64)
    )
    assert routing.entropy_sum.item() == pytest.approx(12 * math.log(ROUTED))
    torch.nn.init.normal_(router.weight_ED.data)
    routing = run(router, x_TD, document_T, torch.tensor([3, 5, 8]))
    assert routing.probability_sum_N.sum().item() == pytest.approx(12)
    loss = load_balance_loss(routing.counts_N[None], routing.probability_sum_N[None], 12)
    (grad_ED,) = torch.autograd.grad(loss, router.weight_ED)
    assert grad_ED.abs().sum() > 0


# ---- a new rule


def test_a_new_rule_runs_everywhere_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of pool that the Triton kernels do not list: `auto` runs it in PyTorch even where a
    GPU could run Triton, and `triton` asked for by name refuses it. It never becomes another."""

    def upper_half(scores_GN: Tensor, request: LayerRequest) -> Tensor:
        return scores_GN >= scores_GN.median(dim=1, keepdim=True).values

    monkeypatch.setitem(router_module.POOL_RULES, "upper_half", upper_half)
    # As on a GPU that could run the kernels: whoever asks `auto` gets Triton.
    monkeypatch.setattr(
        router_module,
        "choose_backend",
        lambda backend, *_: "triton" if backend in ("auto", "triton") else backend,
    )
    logits_TN, document_T = torch.randn(20, 6), torch.arange(20) // 7
    batch, request = flat_batch(document_T), LayerRequest(PoolConfig(kind=cast(Any, "upper_half")))
    decision = decide(logits_TN, batch, 2, RouterConfig(), request)
    scores_GN = sum_by_document(logits_TN.softmax(dim=1), document_T, 3)
    assert torch.equal(decision.pool_GN, upper_half(scores_GN, request))
    assert decision.pool_GN[document_T].gather(1, decision.experts_TK).all()
    with pytest.raises(UserError, match="triton does not route with pool.kind=upper_half"):
        decide(logits_TN, batch, 2, RouterConfig(), request, backend="triton")


# ---- what a layer returns is small


def test_statistics_are_numbers_an_expert_and_a_document() -> None:
    """Nothing of the size of the tokens outlives the layer unless it is asked for."""
    router, x_TD = make_router(), torch.randn(50, WIDTH, dtype=torch.float64)
    batch = flat_batch(torch.arange(50) // 10)
    request = LayerRequest(PoolConfig(), torch.full((5,), 4))
    decision, logits_TE = router(x_TD, batch, request)
    statistics = router.statistics(decision, logits_TE, batch, request)
    assert statistics.details is None
    sizes = [v.numel() for v in vars(statistics).values() if isinstance(v, Tensor)]
    assert max(sizes) == ROUTED
    alone = detached(RoutingReport((statistics,), *[torch.zeros(())] * 3)).layers[0]
    assert not any(v.requires_grad for v in vars(alone).values() if isinstance(v, Tensor))
