"""What parameters start from: every element is a function of (seed, name of its parameter, index in
it) and of nothing else. A process makes the part that it holds, on its device, and no element is
made twice.

Element i gets output i of the generator splitmix64, seeded by a hash of (seed, name). The upper 16
of its 64 bits choose one of 65,536 equally likely intervals of a normal distribution that is cut at
three deviations, the next 24 a place in it. Floats are added and multiplied, one rounding at a
time, and nothing else is done to them: a CPU and a GPU get the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from emotrain.batch import mix64

CUT = 3.0
"""Deviations at which the normal distribution ends (spec 1.4)."""

INTERVALS = 1 << 16

GOLDEN = -7046029254386353131
"""Increment of splitmix64's state, as int64."""

BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements made at a time: what a core's cache holds, or what a GPU takes 1 GiB for."""


@torch.no_grad()
def fill_normal(
    part: Tensor,
    seed: int,
    name: str,
    std: float,
    offsets: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
) -> None:
    """Fill a box of a tensor with its values of a cut normal distribution, in place.

    Args:
        part: the box, contiguous, in any floating dtype; values are made in fp32.
        seed, name: what the values of the tensor are a function of.
        std: deviation before the cut, which takes 1.34 % off it.
        offsets: where the box starts in the tensor; at its start by default.
        shape: of the tensor; that of the box by default.
    """
    shape = part.shape if shape is None else shape
    offsets = [0] * part.ndim if offsets is None else offsets
    if part.numel() == 0:
        return
    rows, width = _runs(part.shape, offsets, shape)
    key, block = _key(seed, name), BLOCK.get(part.device.type, BLOCK["cpu"])
    quantiles = (_quantiles() * std).to(torch.float32)
    table = quantiles[:-1].to(part.device), quantiles.diff().to(part.device)
    first_states, runs = rows * GOLDEN + key, part.view(len(rows), width)
    step = max(1, block // width)
    for left in range(0, width, block):
        columns = torch.arange(left, min(width, left + block), device=part.device) * GOLDEN
        for first in range(0, len(first_states), step):
            states = first_states[first : first + step, None].to(part.device) + columns
            runs[first : first + step, left : left + block] = _cut_normal(states, *table)


def _cut_normal(states: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
    """fp32 values of int64 states of any shape, from intervals of equal probability."""
    bits = mix64(states)
    interval = ((bits >> 48) & (INTERVALS - 1)).flatten()
    place = ((bits >> 24) & 0xFFFFFF).flatten().to(torch.float32).mul_(2.0**-24)
    values = place.mul_(sizes.index_select(0, interval)).add_(starts.index_select(0, interval))
    return values.view_as(states)


def _runs(box: Sequence[int], offsets: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, int]:
    """A box as runs of elements that follow each other in the whole tensor: the index of the first
    of each, int64 [runs], and the length of all."""
    split = len(box)
    while split > 1 and box[split - 1] == shape[split - 1]:
        split -= 1
    # Axes from `split` on are whole, and the one before it is where a run begins and ends.
    width, starts = math.prod(box[split - 1 :]), torch.zeros(1, dtype=torch.int64)
    for axis in range(split):
        stride = math.prod(shape[axis + 1 :])
        count = box[axis] if axis < split - 1 else 1
        of_axis = (torch.arange(count) + offsets[axis]) * stride
        starts = (starts[:, None] + of_axis).flatten()
    return starts, width


def _key(seed: int, name: str) -> int:
    """int64: the generator's first state for a parameter. Of 200 parameters with 2^30 elements
    each, any two get outputs in common with probability 2^-18."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@cache
def _quantiles() -> Tensor:
    """fp64 [INTERVALS + 1] on the CPU: the ends of the intervals, symmetric about 0. A value is
    within 5e-6 of where the quantile itself would be."""
    device = torch.device("cpu")
    tail = torch.special.ndtr(torch.tensor(-CUT, dtype=torch.float64, device=device))
    half = torch.arange(1, INTERVALS // 2, dtype=torch.float64, device=device)
    left = torch.special.ndtri(tail + (1 - 2 * tail) * half / INTERVALS)
    middle = left.new_zeros(1)
    return torch.cat(
        [left.new_full((1,), -CUT), left, middle, -left.flip(0), left.new_full((1,), CUT)]
    )
