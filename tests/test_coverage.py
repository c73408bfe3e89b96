"""Proves that the numbers of `emotrain coverage` are those of loops over documents, that what it
compares with chance is chance where nothing is planted and is found where something is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.analysis.coverage import (
    CoverageSettings,
    PackedDomains,
    coverage_of,
    document_routing,
)
from emotrain.analysis.coverage_numbers import (
    DocumentRouting,
    choose_experts,
    subset_overlap,
    use_of_experts,
)
from emotrain.analysis.together import (
    by_chance,
    closest_partners,
    count_pools,
    group_experts,
    lift,
    modularity,
)
from emotrain.batch import PackedBatch
from emotrain.evaluation.measure import group_of_each
from emotrain.evaluation.perplexity import pack_groups
from emotrain.model.router import RoutingRequest

ROW = 16
KINDS = {
    "uniform pools": {},
    "fixed pools": {"model__router__pool__kind": "fixed", "model__router__pool__size": 4},
    "no pools": {"model__router__pool__kind": "none"},
    "pools of segments": {"model__router__pool__unit": "segment:4"},
    "sigmoid": {"model__router__gating": "sigmoid"},
    "layers of unequal size": {"model__experts__routed_per_layer": [5, 8]},
    "layers that share a bank": {"model__experts__sharing": "all"},
    "exclusive experts": {"model__experts__exclusive": {"a": 2}, "model__router__pool__max": 6},
    "attention across documents": {"model__attention__document_mask": False},
}


def documents_of(num_domains, seed, count=3):
    """Random documents of each domain, from its own part of the vocabulary, EOS (0) last."""
    random = np.random.default_rng(seed)
    return [
        [np.append(random.integers(1 + 9 * j, 20 + 9 * j, random.integers(2, 40)), 0) for _ in of]
        for j, of in enumerate([range(count + j) for j in range(num_domains)])
    ]


def packed_of(model, groups, names):
    exclusive = dict(model.config.experts.exclusive)
    domains = [name if name in exclusive else "" for name in names]
    mask = model.config.attention.document_mask
    batches = pack_groups(groups, domains, ROW, 2, mask)
    tokens = tuple(sum(map(len, group)) for group in groups)
    return PackedDomains(tuple(names), batches, group_of_each(groups), tokens, "")


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """A model, documents of three domains, and their routing in one packed pass."""
    model = tiny_model(**KINDS[request.param])
    groups = documents_of(3, seed=len(request.param))
    packed = packed_of(model, groups, "abc")
    return model, groups, packed, document_routing(model, packed.batches, len(packed.group_U))


def routing_alone(model, document, domain):
    """Probabilities and choices of one document, each piece a batch of its own, token by token ->
    for each layer (probability [N], slots [N])."""
    sums = None
    for start in range(0, len(document), ROW):
        batch = PackedBatch.from_rows(torch.from_numpy(document[start : start + ROW])[None])
        batch = PackedBatch(**{**vars(batch), "domain": domain})
        with torch.no_grad():
            layers = model(batch, RoutingRequest(details=True)).routing.layers
        for i, layer in enumerate(layers):
            sums = sums or [[np.zeros(len(layer.counts_N)) for _ in "ps"] for layer in layers]
            for token, logits_N in enumerate(layer.details.logits_TN):
                if model.config.router.gating == "sigmoid":
                    sums[i][0] += torch.sigmoid(logits_N).numpy() + 1e-7
                else:
                    sums[i][0] += torch.softmax(logits_N, 0).numpy()
                for expert in layer.details.experts_TK[token].tolist():
                    if expert < len(logits_N):
                        sums[i][1][expert] += 1
    return sums


def test_routing_of_documents_is_that_of_each_alone(case):
    model, groups, packed, routing = case
    number = 0
    exclusive = dict(model.config.experts.exclusive)
    for name, group in zip(packed.names, groups, strict=True):
        for document in group:
            alone = routing_alone(model, document, name if name in exclusive else "")
            for i, (probability_N, slots_N) in enumerate(alone):
                assert routing.probability[i][number].numpy() == pytest.approx(
                    probability_N, rel=1e-4, abs=1e-5
                )
                assert routing.slots[i][number].tolist() == slots_N.tolist()
            number += 1


def test_every_number_is_that_of_a_loop(case):
    model, groups, packed, routing = case
    measured = coverage_of(routing, model.config, packed, CoverageSettings())
    assert sorted(measured["names"]) == ["a", "b", "c"]
    for j, name in enumerate(measured["names"]):
        domain = packed.names.index(name)
        own = [u for u, group in enumerate(packed.group_U.tolist()) if group == domain]
        assert measured["documents"][j] == len(own) == len(groups[domain])
        assert measured["tokens"][j] == sum(map(len, groups[domain]))
        for measure, layers in (("slots", routing.slots), ("probability", routing.probability)):
            for i, sums_UN in enumerate(layers):
                config = model.config
                width = config.common_in_layer(i) + dict(config.experts.exclusive).get(name, 0)
                rows = [sums_UN[u].tolist() for u in own]
                alone = [by_hand(row, width) for row in rows]
                whole = by_hand([sum(column) for column in zip(*rows, strict=True)], width)
                for number, value in whole.items():
                    of = measured["use"][measure]
                    mean = sum(one[number] for one in alone) / len(alone)
                    assert of["document"][number][j, i] == pytest.approx(mean)
                    assert of["domain"][number][j, i] == pytest.approx(value)
    entropies = measured["use"]["slots"]["document"]["entropy_nats"].mean(1)
    assert (np.diff(entropies) >= 0).all(), "the domains of the fewest experts come first"


def by_hand(sums, width):
    shares = sorted((value / sum(sums) for value in sums), reverse=True)
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    found = {
        "used_experts": sum(value > 0 for value in sums),
        "above_uniform_experts": sum(share > (1 + 1e-9) / width for share in shares),
        "entropy_nats": entropy,
        "effective_experts": math.exp(entropy),
    }
    for level in (50, 90, 99):
        carried = list(itertools.accumulate(shares))
        enough = [place for place, share in enumerate(carried) if share >= level / 100 - 1e-9]
        found[f"carry_{level}_experts"] = enough[0] + 1
    return found


def test_subsets_and_cosines_are_those_of_loops(case):
    model, _, packed, routing = case
    measured = coverage_of(routing, model.config, packed, CoverageSettings(keep=(0.25, 0.5)))
    assert list(measured["subsets"]) == ["0.5", "0.25"]
    for i, sums_UN in enumerate(routing.probability):
        common, sums = model.config.common_in_layer(i), {}
        for name in measured["names"]:
            own_U = packed.group_U == packed.names.index(name)
            sums[name] = sums_UN[own_U].sum(0)
        for keep, layers in measured["subsets"].items():
            count = max(2, round(float(keep) * (common + 1))) - 1
            for j, name in enumerate(measured["names"]):
                ranked = sorted(range(common), key=lambda e, of=sums[name]: (-float(of[e]), e))
                assert layers[i][j].nonzero()[0].tolist() == sorted(ranked[:count])
        for (a, one), (b, other) in itertools.product(enumerate(measured["names"]), repeat=2):
            cosine = float(torch.cosine_similarity(sums[one], sums[other], 0))
            assert measured["cosine_LJJ"][i, a, b] == pytest.approx(cosine)
    banks = [bank.layers for bank in measured["together"]]
    shares_a_bank = model.config.experts.sharing == "all"
    assert banks == ([(0, 1)] if shares_a_bank else [(0,), (1,)])


# ---- properties


@st.composite
def sums(draw, least_groups=1):
    """Random routing of a few documents in ascending groups: (float64 [U, N], group_U)."""
    counts = draw(st.lists(st.integers(1, 4), min_size=least_groups, max_size=4))
    num_experts = draw(st.integers(2, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = random.random((sum(counts), num_experts)) ** 3 + 1e-3
    group_U = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.from_numpy(values), group_U


@settings(max_examples=25, deadline=None)
@given(sums())
def test_numbers_of_experts_are_in_their_bounds(given):
    sums_XN, _ = given
    num_experts = sums_XN.shape[1]
    found = use_of_experts(sums_XN, torch.full((len(sums_XN),), num_experts))
    half, most, nearly = (found[f"carry_{level}_experts"] for level in (50, 90, 99))
    assert ((half >= 1) & (half <= most) & (most <= nearly) & (nearly <= num_experts)).all()
    assert (found["effective_experts"] <= num_experts + 1e-9).all()
    assert (found["effective_experts"] >= 1 - 1e-9).all()
    # Half of the routing is in no more experts than there are effective ones, doubled.
    assert (found["used_experts"] == num_experts).all()
    even = use_of_experts(torch.ones(1, num_experts), torch.tensor([num_experts]))
    assert even["above_uniform_experts"].item() == 0
    assert even["effective_experts"].item() == pytest.approx(num_experts)
    assert even["carry_50_experts"].item() == -(-num_experts // 2)


@settings(max_examples=25, deadline=None)
@given(sums(least_groups=2), st.data())
def test_overlap_is_bounded_and_moves_with_the_domains(given, data):
    sums_UN, group_U = given
    count = data.draw(st.integers(1, sums_UN.shape[1]))
    half_U = torch.cat([torch.arange(n) % 2 for n in torch.bincount(group_U).tolist()])
    found = subset_overlap([sums_UN], group_U, half_U, [count])
    known = found.jaccard[np.isfinite(found.jaccard)]
    assert ((known >= 0) & (known <= 1)).all()
    least = max(0, 2 * count - sums_UN.shape[1]) / min(sums_UN.shape[1], 2 * count)
    assert (known >= least - 1e-12).all() and least - 1e-12 <= found.chance <= 1
    np.testing.assert_allclose(found.jaccard, found.jaccard.T)
    single_J = torch.bincount(group_U).numpy() < 2
    assert (np.isnan(found.jaccard).any(1) >= single_J).all()
    order = data.draw(st.permutations(range(len(single_J))))
    moved_U = torch.tensor(order).argsort()[group_U]
    moved = subset_overlap([sums_UN], moved_U, half_U, [count])
    np.testing.assert_allclose(moved.jaccard, found.jaccard[np.ix_(order, order)])
    assert moved.between == pytest.approx(found.between) and moved.chance == found.chance


def test_domains_in_another_order_give_the_same_matrices():
    model = tiny_model()
    groups = documents_of(3, seed=1)
    measured = []
    for order in ((0, 1, 2), (2, 0, 1)):
        packed = packed_of(model, [groups[j] for j in order], ["abc"[j] for j in order])
        routing = document_routing(model, packed.batches, len(packed.group_U))
        measured.append(coverage_of(routing, model.config, packed, CoverageSettings()))
    one, other = measured
    assert one["names"] == other["names"] and one["tokens"] == other["tokens"]
    np.testing.assert_allclose(one["cosine_LJJ"], other["cosine_LJJ"], rtol=1e-6)
    for keep, overlap in one["overlap"].items():
        np.testing.assert_allclose(overlap.jaccard, other["overlap"][keep].jaccard)


def test_domains_that_are_one_overlap_as_its_halves_do_and_random_ones_by_chance():
    random = np.random.default_rng(0)
    count, experts, group_U = 8, 32, torch.arange(8).repeat_interleave(16)
    half_U = torch.arange(len(group_U)) % 2
    taste = random.random(experts) ** 4
    alike = torch.from_numpy(taste + 0.3 * random.random((len(group_U), experts)))
    found = subset_overlap([alike], group_U, half_U, [count])
    assert found.within == pytest.approx(found.between, abs=0.1) and found.within > 0.5
    found = subset_overlap(
        [torch.from_numpy(random.random((128, experts))) for _ in range(8)],
        group_U,
        half_U,
        [8] * 8,
    )
    assert found.between == pytest.approx(found.chance, abs=2 * found.chance_deviation)
    assert found.within == pytest.approx(found.chance, abs=2 * found.chance_deviation)
    apart = found.jaccard[np.triu_indices(8, 1)]
    # Means over four pairs of halves that are not independent: less than one pair, more than a
    # quarter of it.
    assert found.chance_deviation / 4 < apart.std() < found.chance_deviation


# ---- experts that go together


def random_pools(num_documents, num_experts, size, seed, weight=None):
    random = np.random.default_rng(seed)
    score_UN = random.random((num_documents, num_experts))
    if weight is not None:
        score_UN = score_UN ** (1 / weight)  # a draw without replacement in proportion to weights
    pool = choose_experts(torch.from_numpy(score_UN), size).numpy()
    assert (pool.sum(1) == size).all()
    return pool


def test_pools_are_counted_as_by_a_loop():
    pool_UN = random_pools(20, 6, 3, seed=0)
    counts_NN = count_pools(pool_UN)
    for a, b in itertools.product(range(6), repeat=2):
        assert counts_NN[a, b] == sum(a in row and b in row for row in map(members, pool_UN))
    chance_NN = by_chance(counts_NN)
    assert chance_NN.sum() == pytest.approx(counts_NN.sum() - counts_NN.trace())
    assert (chance_NN.diagonal() == 0).all()


def members(pool_N):
    return set(np.flatnonzero(pool_N).tolist())


@pytest.mark.parametrize("uneven", [False, True])
def test_lift_of_independent_draws_is_near_1(uneven):
    """Also where some experts are in many more pools than others."""
    weight = np.linspace(0.5, 2, 16) if uneven else None
    counts_NN = count_pools(random_pools(20_000, 16, 4, seed=1, weight=weight))
    lift_NN = lift(counts_NN)
    assert np.isnan(lift_NN.diagonal()).all()
    apart = lift_NN[~np.eye(16, dtype=bool)]
    assert abs(apart - 1).max() < (0.2 if uneven else 0.12) and apart.mean() == pytest.approx(
        1, abs=0.03
    )


def test_groups_that_were_planted_are_found_and_chance_has_none():
    random = np.random.default_rng(2)
    subject_U = np.arange(400) // 2 % 4
    own_UN = subject_U[:, None] == np.arange(24) // 6
    pool_UN = choose_experts(torch.from_numpy(random.random((400, 24)) + 0.7 * own_UN), 6).numpy()
    counts_NN = count_pools(pool_UN[::2])
    group_N = group_experts(counts_NN)
    assert group_N.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert modularity(count_pools(pool_UN[1::2]), group_N) > 0.4
    assert all(
        set(partners) <= set(range(6 * (e // 6), 6 * (e // 6) + 6)) - {e}
        for e, partners in enumerate(closest_partners(counts_NN, 5))
    )
    by_accident = random_pools(400, 24, 6, seed=3)
    group_N = group_experts(count_pools(by_accident[::2]))
    assert modularity(count_pools(by_accident[::2]), group_N) > 0.02
    assert abs(modularity(count_pools(by_accident[1::2]), group_N)) < 0.02


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(2, 9), st.data())
def test_no_join_and_no_move_makes_groups_better(num_documents, num_experts, data):
    size = data.draw(st.integers(1, num_experts))
    pool_UN = random_pools(num_documents, num_experts, size, data.draw(st.integers(0, 2**32 - 1)))
    counts_NN = count_pools(pool_UN)
    group_N = group_experts(counts_NN)
    assert ((group_N < 0) == ~pool_UN.any(0)).all()
    sizes = np.bincount(group_N[group_N >= 0])
    assert (sizes > 0).all() and (np.diff(sizes) <= 0).all()
    best = modularity(counts_NN, group_N)
    if size == 1:
        assert math.isnan(best)
        return
    for a, b in itertools.combinations(range(len(sizes)), 2):
        joined_N = np.where(group_N == b, a, group_N)
        assert modularity(counts_NN, joined_N) <= best + 1e-9
    for expert in np.flatnonzero(group_N >= 0):
        for group in range(len(sizes)):
            moved_N = group_N.copy()
            moved_N[expert] = group
            assert modularity(counts_NN, moved_N) <= best + 1e-9


def test_an_expert_in_every_pool_and_one_in_none_say_nothing():
    pool_UN = random_pools(50, 6, 3, seed=4)
    pool_UN[:, 0], pool_UN[:, 5] = True, False
    counts_NN = count_pools(pool_UN)
    group_N = group_experts(counts_NN)
    assert group_N[5] == -1 and np.isnan(lift(counts_NN)[5]).all()
    assert modularity(np.zeros((3, 3), int), np.zeros(3, int)) != modularity(counts_NN, group_N)
    everything = count_pools(np.ones((4, 3), bool))
    assert modularity(everything, group_experts(everything)) == pytest.approx(0)


def test_one_document_and_one_domain_have_no_halves():
    model = tiny_model()
    packed = packed_of(model, [documents_of(1, seed=5)[0][:1]], "a")
    routing = document_routing(model, packed.batches, 1)
    measured = coverage_of(routing, model.config, packed, CoverageSettings())
    overlap = measured["overlap"]["0.25"]
    assert overlap.between is None and overlap.within is None and 0 < overlap.chance < 1
    assert all(bank.held_out_modularity is None for bank in measured["together"])
    assert isinstance(routing, DocumentRouting) and measured["documents"] == (1,)
