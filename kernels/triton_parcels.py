"""Triton kernels of the exchange between ranks: where parcels go, what is in them, and the
gradients that come back. Their twins are in parcels.py.

A token's row is read once and written to each of its parcels; every number has one writer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from emotrain.kernels.cost import Cost
from emotrain.kernels.triton_launch import launch
from emotrain.kernels.triton_permute import COLUMN_BLOCK, ROW_BLOCK
from emotrain.kernels.triton_slots import PLACED, counts_of_blocks

if TYPE_CHECKING:
    from emotrain.kernels.parcels import ParcelLayout, Spread

SLOT_BLOCK = 1024
"""Slots of one program of `pick_weights_kernel`."""


def destinations_triton(experts_TK: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
    """`destinations` in Triton: two passes over the choices, as `sort_slots_triton`."""
    experts_TK = experts_TK.contiguous()
    num_tokens, num_chosen = experts_TK.shape
    num_ranks, block_w = spread.num_ranks, triton.next_power_of_2(spread.num_ranks)
    tokens = max(16, min(128, PLACED // block_w))
    num_blocks = triton.cdiv(num_tokens, tokens)
    counts_PX = experts_TK.new_empty(num_blocks, 2 * num_ranks, dtype=torch.int32)
    position_TW = experts_TK.new_empty(num_tokens, num_ranks, dtype=torch.int32)
    # Without tokens no program runs that would write it.
    send_W2 = (experts_TK.new_empty if num_tokens else experts_TK.new_zeros)(num_ranks, 2)
    for place in (False, True):
        launch(
            destination_kernel,
            (num_blocks,),
            None,
            Cost(
                reads=(experts_TK, counts_PX if place else None),
                writes=(position_TW, send_W2) if place else (counts_PX,),
            ),
            experts_TK,
            counts_PX,
            position_TW,
            send_W2,
            num_tokens,
            spread.num_experts,
            spread.per_rank,
            num_ranks,
            K=num_chosen,
            PLACE=place,
            TOKENS=tokens,
            BLOCK_W=block_w,
            COUNTS=max(1, 512 // block_w),
            num_warps=4,
        )
    return position_TW, send_W2


def pack_triton(
    x_TD: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    position_TW: Tensor,
    parcels_OB: Tensor,
    layout: ParcelLayout,
    spread: Spread,
) -> None:
    """`pack` in Triton, into `parcels_OB`."""
    num_chosen = weights_TK.shape[1]
    weights_TK, experts_TK = weights_TK.contiguous(), experts_TK.contiguous()
    weights_OK, choices_OK = layout.weights(parcels_OB), layout.choices(parcels_OB)
    _write_rows(
        x_TD,
        position_TW,
        layout.rows(parcels_OB),
        Cost(reads=(weights_TK, experts_TK), writes=(), slot_writes=(weights_OK, choices_OK)),
        (weights_TK, experts_TK, weights_OK, choices_OK),
        (spread.num_experts, spread.per_rank),
        {
            "K": num_chosen,
            "BLOCK_K": triton.next_power_of_2(num_chosen),
            "WEIGHT_STRIDE": weights_OK.stride(0),
            "CHOICE_STRIDE": choices_OK.stride(0),
        },
    )


def spread_rows_triton(x_TD: Tensor, position_TW: Tensor, num_rows: int) -> Tensor:
    """`spread_rows` in Triton."""
    rows_OD = x_TD.new_empty(num_rows, x_TD.shape[1])
    unused = {"K": 0, "BLOCK_K": 1, "WEIGHT_STRIDE": 0, "CHOICE_STRIDE": 0}
    _write_rows(x_TD, position_TW, rows_OD, Cost((), ()), (x_TD,) * 4, (0, 0), unused)
    return rows_OD


def _write_rows(
    x_TD: Tensor,
    position_TW: Tensor,
    rows_OD: Tensor,
    others: Cost,
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, int],
    constants: dict[str, int],
) -> None:
    """Launch `pack_kernel`; `others` is the cost of what goes with the rows."""
    x_TD = x_TD.contiguous()
    num_tokens, width = x_TD.shape
    launch(
        pack_kernel,
        (triton.cdiv(num_tokens, ROW_BLOCK), triton.cdiv(width, COLUMN_BLOCK)),
        None,
        Cost(
            reads=(x_TD, position_TW, *others.reads),
            writes=(),
            slots=rows_OD.shape[0],
            slot_writes=(rows_OD, *others.slot_writes),
        ),
        x_TD,
        position_TW,
        rows_OD,
        *tensors,
        num_tokens,
        *numbers,
        W=position_TW.shape[1],
        D=width,
        ROW_STRIDE=rows_OD.stride(0),
        ROWS=ROW_BLOCK,
        COLUMNS=COLUMN_BLOCK,
        **constants,
        num_warps=4,
    )


def pick_weights_triton(
    weights_OK: Tensor, experts_TK: Tensor, position_TW: Tensor, spread: Spread
) -> Tensor:
    """The number of each slot in its parcel -> [T, K], 0 for empty slots."""
    experts_TK = experts_TK.contiguous()
    picked_TK = weights_OK.new_empty(experts_TK.shape)
    num_slots = experts_TK.numel()
    launch(
        pick_weights_kernel,
        (triton.cdiv(num_slots, SLOT_BLOCK),),
        None,
        Cost(
            reads=(experts_TK, position_TW),
            writes=(picked_TK,),
            slots=weights_OK.shape[0],
            slot_reads=(weights_OK,),
        ),
        weights_OK,
        experts_TK,
        position_TW,
        picked_TK,
        num_slots,
        spread.num_experts,
        spread.per_rank,
        W=spread.num_ranks,
        K=experts_TK.shape[1],
        STRIDE=weights_OK.stride(0),
        BLOCK=SLOT_BLOCK,
        num_warps=4,
    )
    return picked_TK


@triton.jit(do_not_specialize=["num_tokens"])
def destination_kernel(
    experts_TK,
    counts_PX,
    position_TW,
    send_W2,
    num_tokens,
    N,
    per_rank,
    W,
    K: tl.constexpr,
    PLACE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Of TOKENS tokens: how many parcels and slots each rank gets, or (PLACE) where the parcels
    lie."""
    block = tl.program_id(0)
    w = tl.arange(0, BLOCK_W)
    if PLACE:
        num_blocks = tl.cdiv(num_tokens, TOKENS)
        every, before = counts_of_blocks(counts_PX, num_blocks, 2 * W, w, W, COUNTS)
        start = tl.cumsum(every, axis=0) - every + before
        if block == 0:
            all_slots, _ = counts_of_blocks(counts_PX + W, num_blocks, 2 * W, w, W, COUNTS)
            tl.store(send_W2 + 2 * w, every.to(tl.int64), mask=w < W)
            tl.store(send_W2 + 2 * w + 1, all_slots.to(tl.int64), mask=w < W)
    token = block * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    slots = tl.zeros((TOKENS, BLOCK_W), dtype=tl.int32)
    for k in range(K):
        expert = tl.load(experts_TK + token.to(tl.int64) * K + k, mask=exists, other=N).to(tl.int32)
        owner = tl.where(expert < N, expert // per_rank, BLOCK_W)
        slots += (owner[:, None] == w[None, :]).to(tl.int32)
    goes = tl.minimum(slots, 1)
    if PLACE:
        position = start[None, :] + tl.cumsum(goes, axis=0)
        tl.store(
            position_TW + token.to(tl.int64)[:, None] * W + w[None, :],
            goes * position - 1,
            mask=exists[:, None] & (w[None, :] < W),
        )
    else:
        row = counts_PX + block * (2 * W)
        tl.store(row + w, tl.sum(goes, axis=0), mask=w < W)
        tl.store(row + W + w, tl.sum(slots, axis=0), mask=w < W)


@triton.jit(do_not_specialize=["num_tokens"])
def pack_kernel(
    x_TD,
    position_TW,
    rows_OD,
    weights_TK,
    experts_TK,
    weights_OK,
    choices_OK,
    num_tokens,
    N,
    per_rank,
    W: tl.constexpr,
    D: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    CHOICE_STRIDE: tl.constexpr,
):
    """COLUMNS of the rows of ROWS tokens into their parcels; with K, weights and choices too."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = token < num_tokens
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d[None, :] < D
    x = tl.load(
        x_TD + token.to(tl.int64)[:, None] * D + d[None, :], mask=exists[:, None] & inside, other=0
    )
    place = position_TW + token.to(tl.int64) * W
    for w in range(W):
        position = tl.load(place + w, mask=exists, other=-1).to(tl.int64)
        to = rows_OD + position[:, None] * ROW_STRIDE + d[None, :]
        tl.store(to, x, mask=(position >= 0)[:, None] & inside)
    if K > 0:  # noqa: SIM102 - known at compile time
        if tl.program_id(1) == 0:
            k = tl.arange(0, BLOCK_K)
            slot = token.to(tl.int64)[:, None] * K + k[None, :]
            chosen = exists[:, None] & (k[None, :] < K)
            expert = tl.load(experts_TK + slot, mask=chosen, other=N).to(tl.int32)
            weight = tl.load(weights_TK + slot, mask=chosen, other=0.0)
            for w in range(W):
                position = tl.load(place + w, mask=exists, other=-1).to(tl.int64)[:, None]
                here = (position >= 0) & (k[None, :] < K)
                local = expert - w * per_rank
                mine = (local >= 0) & (local < per_rank) & (expert < N)
                tl.store(
                    weights_OK + position * WEIGHT_STRIDE + k[None, :],
                    tl.where(mine, weight, 0.0),
                    mask=here,
                )
                tl.store(
                    choices_OK + position * CHOICE_STRIDE + k[None, :],
                    tl.where(mine, local, per_rank).to(choices_OK.dtype.element_ty),
                    mask=here,
                )


@triton.jit(do_not_specialize=["num_slots"])
def pick_weights_kernel(
    weights_OK,
    experts_TK,
    position_TW,
    picked_TK,
    num_slots,
    N,
    per_rank,
    W: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For BLOCK slots the number in the parcel that took their token to the rank of their
    expert."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = slot < num_slots
    expert = tl.load(experts_TK + slot, mask=exists, other=N).to(tl.int32)
    used = expert < N
    at = (slot // K).to(tl.int64) * W + expert // per_rank
    position = tl.load(position_TW + at, mask=used, other=0).to(tl.int64)
    number = tl.load(weights_OK + position * STRIDE + slot % K, mask=used, other=0.0)
    tl.store(picked_TK + slot, number, mask=exists)
