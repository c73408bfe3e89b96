"""Triton kernels that sort by counting: keys are of few kinds, so that two passes over them do what
a radix sort does in many.

    count_kernel   keys of each block -> how many of each kind
    place_kernel   the counts of all blocks -> where the kinds of this block begin -> where each of
                   its keys lies

Counts are integers and every number has one writer: no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emotrain.kernels.cost import Cost
from emotrain.kernels.triton_launch import launch

BLOCK = 1024
"""Slots of one program. It reads the counts of all blocks, so that smaller ones would read more
counts than slots."""
PLACED = 4096
"""Slots times experts that a program of `place_kernel` looks at together: 16 numbers a thread."""


class Sorted(NamedTuple):
    """The tensors of `SortedSlots`, in its order but for `in_use`."""

    token_R: Tensor
    slot_R: Tensor
    ends_N: Tensor
    position_R: Tensor


def sort_slots_triton(experts_TK: Tensor, num_experts: int) -> Sorted:
    """`sort_slots` in Triton."""
    if experts_TK.stride(1) != 1:
        experts_TK = experts_TK.contiguous()
    num_chosen = experts_TK.shape[1]
    num_slots = experts_TK.numel()
    num_blocks = triton.cdiv(num_slots, BLOCK)
    block_n = max(32, triton.next_power_of_2(num_experts))
    counts_PN = experts_TK.new_empty(num_blocks, num_experts, dtype=torch.int32)
    shape = {"K": num_chosen, "STRIDE": experts_TK.stride(0), "BLOCK": BLOCK, "BLOCK_N": block_n}
    launch(
        count_kernel,
        (num_blocks,),
        None,
        Cost(reads=(experts_TK,), writes=(counts_PN,)),
        experts_TK,
        counts_PN,
        num_slots,
        num_experts,
        **shape,
        num_warps=4,
    )
    token_R, slot_R = (experts_TK.new_empty(num_slots, dtype=torch.int64) for _ in range(2))
    position_R = experts_TK.new_empty(num_slots, dtype=torch.int32)
    # Without slots no program runs that would write it.
    make = experts_TK.new_empty if num_slots else experts_TK.new_zeros
    ends_N = make(num_experts, dtype=torch.int64)
    launch(
        place_kernel,
        (num_blocks,),
        None,
        Cost(reads=(experts_TK, counts_PN), writes=(token_R, slot_R, position_R, ends_N)),
        experts_TK,
        counts_PN,
        token_R,
        slot_R,
        position_R,
        ends_N,
        num_slots,
        num_experts,
        **shape,
        SLOTS=min(BLOCK, PLACED // block_n),
        COUNTS=PLACED // block_n,
        num_warps=8,
    )
    return Sorted(token_R, slot_R, ends_N, position_R)


@triton.jit
def counts_of_blocks(counts_PX, num_blocks, stride, x, X, COUNTS: tl.constexpr):
    """(counts of all blocks, of those before this one) for the columns `x` of [P, X], COUNTS blocks
    at a time."""
    block = tl.program_id(0)
    every = tl.zeros(x.shape, dtype=tl.int32)
    before = tl.zeros(x.shape, dtype=tl.int32)
    for first in range(0, num_blocks, COUNTS):
        p = first + tl.arange(0, COUNTS)
        count = tl.load(
            counts_PX + p[:, None] * stride + x[None, :],
            mask=(p[:, None] < num_blocks) & (x[None, :] < X),
            other=0,
        )
        every += tl.sum(count, axis=0)
        before += tl.sum(tl.where(p[:, None] < block, count, 0), axis=0)
    return every, before


@triton.jit(do_not_specialize=["num_slots"])
def count_kernel(
    experts_TK,
    counts_PN,
    num_slots,
    N,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """How many of BLOCK slots went to each expert."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    at = (slot // K).to(tl.int64) * STRIDE + slot % K
    expert = tl.load(experts_TK + at, mask=slot < num_slots, other=N).to(tl.int32)
    count = tl.histogram(tl.where(expert < N, expert, 0), BLOCK_N, mask=expert < N)
    n = tl.arange(0, BLOCK_N)
    tl.store(counts_PN + block * N + n, count, mask=n < N)


@triton.jit(do_not_specialize=["num_slots"])
def place_kernel(
    experts_TK,
    counts_PN,
    token_R,
    slot_R,
    position_R,
    ends_N,
    num_slots,
    N,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Where BLOCK slots lie among the sorted ones, SLOTS at a time, and which slot lies there."""
    block = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    every, before = counts_of_blocks(counts_PN, tl.cdiv(num_slots, BLOCK), N, n, N, COUNTS)
    end = tl.cumsum(every, axis=0)
    if block == 0:
        tl.store(ends_N + n, end.to(tl.int64), mask=n < N)
    start = end - every + before
    # Empty slots follow those in use: how many come before is what is left of the slots before.
    empty = tl.sum(every, axis=0) + block * BLOCK - tl.sum(before, axis=0)
    for first in range(block * BLOCK, block * BLOCK + BLOCK, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        exists = slot < num_slots
        at = (slot // K).to(tl.int64) * STRIDE + slot % K
        expert = tl.load(experts_TK + at, mask=exists, other=N).to(tl.int32)
        used = expert < N
        mine = (expert[:, None] == n[None, :]) & used[:, None]
        up_to = tl.cumsum(mine.to(tl.int32), axis=0)
        position = tl.sum(tl.where(mine, start[None, :] + up_to - 1, 0), axis=1)
        unused = (~used).to(tl.int32)
        position = tl.where(used, position, empty + tl.cumsum(unused, axis=0) - 1)
        tl.store(position_R + slot, tl.where(used, position, -1), mask=exists)
        tl.store(slot_R + position, slot.to(tl.int64), mask=exists)
        tl.store(token_R + position, (slot // K).to(tl.int64), mask=exists)
        start += tl.sum(mine.to(tl.int32), axis=0)
        empty += tl.sum(unused, axis=0)
