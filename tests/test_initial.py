"""Proves that initial values are functions of (seed, name, index): an oracle in plain Python, and
any box as the same box of the whole, in blocks of any size, on any layout; that their distribution
is the cut normal one; and that neighbours, parameters and seeds know nothing of each other."""

from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
import torch
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from emotrain.config import Config
from emotrain.distributed.parallelize import build_model
from emotrain.distributed.ranks import Ranks
from emotrain.model import initial
from emotrain.model.initial import CUT, INTERVALS, fill_normal
from emotrain.model.transformer import Transformer
from tests.layouts import whole
from tests.processes import run_ranks

NORMAL = NormalDist()
MASK = (1 << 64) - 1


def values(*shape: int, seed: int = 0, name: str = "weight", std: float = 1.0) -> torch.Tensor:
    tensor = torch.full(shape, torch.nan)
    fill_normal(tensor, seed, name, std)
    return tensor


def splitmix64(key: int, number: int) -> int:
    """Output `number` of the generator with the state `key`: as published, in Python's integers."""
    z = (key + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def quantile(share: float) -> float:
    """Of the normal distribution cut at CUT deviations."""
    tail = NORMAL.cdf(-CUT)
    return NORMAL.inv_cdf(tail + (1 - 2 * tail) * share)


def test_every_element_is_a_quantile_of_its_own_hash() -> None:
    std, key = 0.02, initial._key(7, "a.weight")
    made = values(3, 5, 7, seed=7, name="a.weight", std=std).flatten()
    table = (initial._quantiles() * std).float().numpy()
    for index, value in enumerate(made.numpy()):
        bits = splitmix64(key & MASK, index)
        interval, place = bits >> 48, np.float32((bits >> 24 & 0xFFFFFF) / 2**24)
        start, end = table[interval : interval + 2]
        assert value == start + place * (end - start), "one rounding at a time"
        exact = quantile((interval + float(place)) / INTERVALS) * std
        assert abs(value - exact) < 5e-6 * std


def test_intervals_are_equally_likely_and_symmetric() -> None:
    ends = initial._quantiles()
    assert torch.equal(ends, -ends.flip(0)) and ends[0] == -CUT and (ends.diff() > 0).all()
    for i in (1, 2, 1000, INTERVALS // 2 - 1, INTERVALS - 1):
        assert ends[i].item() == pytest.approx(quantile(i / INTERVALS), abs=1e-9)


# ---- boxes and blocks


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_box_is_that_of_the_whole(data: st.DataObject) -> None:
    """Whatever its place and the size of blocks."""
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = tuple(slice(first, last) for first, last in ends)
    part = torch.full([last - first for first, last in ends], torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(initial.BLOCK, "cpu", data.draw(st.integers(1, 40)))
        fill_normal(part, 1, "w", 0.02, [first for first, _ in ends], shape)
    assert torch.equal(part, values(*shape, seed=1, name="w", std=0.02)[box])


@pytest.mark.parametrize("block", [1, 7, 63, 64, 65, 1 << 20])
@pytest.mark.parametrize("shape", [(5, 64), (64, 5), (1, 321)])
def test_blocks_leave_no_seam(block: int, shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = values(*shape)
    monkeypatch.setitem(initial.BLOCK, "cpu", block)
    assert torch.equal(values(*shape), wanted)


def test_values_are_those_of_fp32_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        tensor = torch.empty(3, 50, dtype=dtype)
        fill_normal(tensor, 0, "weight", 1.0)
        assert torch.equal(tensor, values(3, 50).to(dtype))


class Operators(TorchDispatchMode):
    """Counts what runs, and the elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter = Counter()
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.ran[operation] += 1
        # A view is as large as what it looks at, which need not be made.
        if isinstance(result, torch.Tensor) and result._base is None:
            self.largest = max(self.largest, result.numel())
        return result


def test_memory_is_bounded_and_operators_go_with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    initial._quantiles()
    monkeypatch.setitem(initial.BLOCK, "cpu", 1000)
    counts = []
    for rows in (10, 20, 40):
        part = torch.empty(rows, 500)
        with Operators() as operators:
            fill_normal(part, 0, "weight", 1.0, [7, 0], [100, 500])
        counts.append(operators.ran.total())
        assert operators.largest <= INTERVALS + 1, "beside the table of quantiles, a block"
    # 5, 10 and 20 blocks.
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) <= 10 * 40


# ---- the distribution


def test_the_distribution_is_a_normal_one_cut_at_three_deviations() -> None:
    x = values(1 << 10, 1 << 10).double().flatten()
    count = len(x)
    # Moments of the cut distribution: E x^2 = 1 - 2 c phi(c) / Z, E x^4 = 3 E x^2 - 2 c^3 phi(c) /
    # Z.
    of_cut = 2 * CUT * NORMAL.pdf(CUT) / (1 - 2 * NORMAL.cdf(-CUT))
    second = 1 - of_cut
    fourth = 3 * second - CUT**2 * of_cut
    assert abs(x.mean()) < 4 * math.sqrt(second / count)
    assert abs(x.pow(2).mean() - second) < 4 * math.sqrt((fourth - second**2) / count)
    assert abs(x.pow(4).mean() - fourth) < 4 * math.sqrt(x.pow(4).var() / count)
    assert 2.99 < x.max() <= CUT and -2.99 > x.min() >= -CUT
    # Kolmogorov and Smirnov at 1 in 10,000.
    tail = NORMAL.cdf(-CUT)
    share = ((torch.special.ndtr(x) - tail) / (1 - 2 * tail)).sort().values
    distance = (share - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 2.23 / math.sqrt(count)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def test_neighbours_parameters_and_seeds_are_independent() -> None:
    x = values(1 << 9, 1 << 9)
    limit = 4 / math.sqrt(x.numel())
    for lag in (1, 2, 3, 8, 512):
        flat = x.flatten()
        for a, b in ((flat[lag:], flat[:-lag]), (flat[lag:].abs(), flat[:-lag].abs())):
            assert abs(correlation(a, b)) < limit, lag
    for other in (
        values(1 << 9, 1 << 9, name="weight2"),
        values(1 << 9, 1 << 9, seed=1),
        values(1 << 9, 1 << 9, seed=1, name="0 weight"),
        x.t(),
    ):
        assert abs(correlation(x, other)) < limit
    # Pairs of neighbours fill a square evenly: chi-square of 255 degrees of freedom at 4 deviations
    pairs = ((torch.special.ndtr(x.double()) * 16).long().clamp(0, 15)).view(-1, 2)
    shares = torch.bincount(pairs.flatten(), minlength=16).double() / x.numel()
    found = torch.bincount(pairs[:, 0] * 16 + pairs[:, 1], minlength=256).double()
    expected = (shares[:, None] * shares).flatten() * len(pairs)
    assert ((found - expected) ** 2 / expected).sum() < 255 + 4 * math.sqrt(2 * 255)


# ---- models on layouts


LAYOUTS = ({}, {"replicate": 2}, {"ep": 2}, {"ep": 4}, {"replicate": 2, "ep": 2})


def model_config(**parallel: int) -> Config:
    """Seven routed experts and 331 words are cut unevenly."""
    return tiny_config(
        model__vocab_size=331,
        model__experts__routed=7,
        model__router__pool__max=7,
        training__global_batch=8,
        training__micro_batch=1,
        **{f"parallel__{key}": value for key, value in parallel.items()},
    )


def starts(ranks: Ranks) -> list[dict[str, torch.Tensor]]:
    return [
        whole(build_model(model_config(**parallel), ranks).named_parameters())
        for parallel in LAYOUTS
    ]


def test_every_layout_starts_from_the_same_bits() -> None:
    wanted = Transformer(model_config().model).initialize(0).state_dict()
    for of_rank in run_ranks(starts, 4):
        for parallel, made in zip(LAYOUTS, of_rank, strict=True):
            assert made.keys() == wanted.keys()
            for name, one in wanted.items():
                assert torch.equal(made[name], one), (parallel, name)
