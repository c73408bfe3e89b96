"""Proves of a mixture's order that it is a function of (seed, position) alone, that every source is
read in its own order without a gap or a repetition, that shares are exact after every block, and
that stages and groups keep all of this; against a slow oracle, and far out."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.data.loader import keyed, permute
from emotrain.data.mixture_order import (
    MixtureOrder,
    Stage,
    block_size,
    shares,
    source_seed,
)
from emotrain.errors import UserError

F = Fraction


def stage(start: int, *amounts: int) -> Stage:
    return Stage(start, shares([F(amount) for amount in amounts]))


def slow_order(order: MixtureOrder, count: int) -> list[tuple[int, int]]:
    """Source and place of the first positions, one after the other: shares rounded by hand, a whole
    permutation a block, and a counter for each source."""
    read = [0] * len(order.names)
    found: list[tuple[int, int]] = []
    stages = list(order.stages)
    for number, of in enumerate(stages):
        end = stages[number + 1].start if number + 1 < len(stages) else count // order.span + 1
        size, group, given_out = block_size(of.weights), of.start, [0] * len(read)
        while group < end:
            done = group - of.start + size
            target = []
            for weight, name in zip(of.weights, order.names, strict=True):
                phase = F(source_seed(order.seed, f"{name} phase"), 2**63)
                target.append((weight * done + phase).__floor__())
            largest = max(range(len(read)), key=lambda i: (of.weights[i], -i))
            target[largest] = done - sum(t for i, t in enumerate(target) if i != largest)
            owners = [i for i, t in enumerate(target) for _ in range(t - given_out[i])]
            key = keyed(source_seed(order.seed, "blocks of the mixture"), np.array([group]))
            assert (
                len(owners) == size
                and min(t - g for t, g in zip(target, given_out, strict=True)) >= 0
            )
            for place in permute(np.arange(size), size, np.repeat(key, size)).tolist():
                if group < end:
                    source = owners[place]
                    found += [(source, read[source] * order.span + i) for i in range(order.span)]
                    read[source] += 1
                group += 1
            given_out = target
    return found[:count]


ORDERS = {
    "two": MixtureOrder(["a", "b"], [stage(0, 2, 1)], 3),
    "one": MixtureOrder(["a"], [stage(0, 1)], 3),
    "small weights": MixtureOrder("abcd", [stage(0, 10**6, 1, 3000, 500_000)], 1),
    "equal": MixtureOrder("abcde", [stage(0, 1, 1, 1, 1, 1)], 9),
    "groups": MixtureOrder("abc", [stage(0, 5, 2, 1)], 2, span=4),
    "stages": MixtureOrder(
        "abc", [stage(0, 5, 2, 0), stage(1500, 0, 1, 1), stage(1501, 1, 1, 8)], 4
    ),
    "stages of groups": MixtureOrder("abc", [stage(0, 5, 2, 1), stage(333, 1, 2, 3)], 5, span=3),
    "forty sources": MixtureOrder([f"s{i}" for i in range(40)], [stage(0, *range(1, 41))], 0),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_is_that_of_a_slow_loop(name: str) -> None:
    order, count = ORDERS[name], 5003
    wanted = slow_order(order, count)
    assert list(zip(*(a.tolist() for a in order.locate(range(count))), strict=True)) == wanted
    few = np.random.default_rng(0).permutation(count)[:50]  # in any order, resumed anywhere
    fresh = MixtureOrder(order.names, order.stages, order.seed, order.span)
    assert [wanted[i] for i in few] == list(
        zip(*(a.tolist() for a in fresh.locate(few)), strict=True)
    )
    for end in (0, 1, 7, 1024, 1499, 1500, 1501, 1502, 4096, count):
        sources = [source for source, _ in wanted[:end]]
        assert order.counts(end) == [sources.count(i) for i in range(len(order.names))]


@pytest.mark.parametrize("name", ORDERS)
def test_every_place_of_every_source_comes_once_and_in_order(name: str) -> None:
    source_B, place_B = ORDERS[name].locate(range(6000))
    for source in range(len(ORDERS[name].names)):
        places = place_B[source_B == source]
        assert places.tolist() == list(range(len(places)))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 10**9), min_size=1, max_size=8),
    st.integers(0, 2**40),
    st.integers(0, 10**12),
    st.sampled_from([1, 2, 8]),
)
def test_far_out_shares_are_exact_and_no_place_is_left_out(amounts, seed, start, span) -> None:
    names = [f"s{i}" for i in range(len(amounts))]
    order = MixtureOrder(names, [stage(0, *amounts)], seed, span)
    block = block_size(order.stages[0].weights) * span
    first = start // block * block
    positions = np.arange(first, first + 3 * block)
    source_B, place_B = order.locate(positions)
    before, after = order.counts(first), order.counts(first + len(positions))
    largest = amounts.index(max(amounts))
    for source, weight in enumerate(order.stages[0].weights):
        places = place_B[source_B == source]
        assert places.tolist() == list(range(before[source], after[source]))
        off = abs(F(before[source], span) - weight * (first // span))
        assert off < 1 or source == largest and off < len(amounts)
    assert sum(before) == first
    groups = source_B.reshape(-1, span)
    assert (groups == groups[:, :1]).all(), "a group has one source"
    pieces = [order.locate(positions[i : i + 37]) for i in range(0, len(positions), 37)]
    assert np.array_equal(np.concatenate([p[0] for p in pieces]), source_B)
    assert np.array_equal(np.concatenate([p[1] for p in pieces]), place_B)


def test_the_order_inside_of_a_block_looks_random() -> None:
    """The smaller of two sources of 3 to 1 comes in every fourth of a block alike (chi-squared, 3
    degrees of freedom, over 1,024 blocks), and after itself as often as after the other."""
    order = MixtureOrder("ab", [stage(0, 3, 1)], 5)
    is_b = order.locate(range(64 * 1024))[0] == 1
    fourths = is_b.reshape(1024, 4, 16).sum(axis=(0, 2))
    assert ((fourths - 4096) ** 2 / 4096).sum() < 16
    assert abs(is_b[1:][is_b[:-1]].mean() - 0.25) < 0.02


def test_small_sources_do_not_come_all_at_once() -> None:
    """Of 20 sources that come once in 8 blocks each, never more than 8 in one block."""
    size = 512
    amounts = [8 * size - 20, *[1] * 20]
    order = MixtureOrder([f"s{i}" for i in range(21)], [stage(0, *amounts)], 0)
    assert block_size(order.stages[0].weights) == size
    small = (order.locate(range(8 * size))[0] > 0).reshape(8, size).sum(axis=1)
    assert small.sum() == 20 and small.max() <= 8


def test_other_seeds_and_the_same_one() -> None:
    a, b, again = (MixtureOrder("ab", [stage(0, 1, 1)], s).locate(range(99))[0] for s in (0, 1, 0))
    assert a.tolist() == again.tolist() != b.tolist()
    assert source_seed(1, "web") != source_seed(0, "web") != source_seed(0, "code")


def test_order_is_stable() -> None:
    """These numbers are part of every checkpoint of a mixture."""
    order = MixtureOrder(["web", "code"], [stage(0, 2, 1)], 0)
    assert "".join(map(str, order.locate(range(24))[0])) == ("101001100100001000000110")


def test_what_is_no_order_is_refused() -> None:
    with pytest.raises(UserError, match="begin at groups \\[1\\]"):
        MixtureOrder("a", [stage(1, 1)], 0)
    with pytest.raises(UserError, match="they sum to 1"):
        MixtureOrder("ab", [Stage(0, (F(1), F(1)))], 0)
    with pytest.raises(UserError, match="position -1 is before the start"):
        MixtureOrder("a", [stage(0, 1)], 0).locate([-1])
