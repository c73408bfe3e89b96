"""Triton kernels that move rows: where slots lie, rows gathered into sorted order, and rows summed
back for each token.

Every output row has one writer, and the K rows of a token are added in the order of its choices, in
float32: no atomics, and the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emotrain.kernels.cost import Cost
from emotrain.kernels.slots import SortedSlots
from emotrain.kernels.triton_launch import check_operands, launch

PLAN_BLOCK = 128
"""Slots and tiles of one program of `plan_kernel`."""
ROW_BLOCK, COLUMN_BLOCK = 8, 256
"""Rows and columns that a program of the row-moving kernels holds at a time: 16 elements a
thread, two full-width loads."""


class SlotPlan(NamedTuple):
    """Sorted slots, and the tiles that GEMM kernels walk. A tile is up to `tile_rows` consecutive
    slots of one expert."""

    token_R: Tensor
    """int64: the token of each sorted slot."""
    slot_R: Tensor
    """int64: the flat (token, choice) of each sorted slot."""
    ends_N: Tensor
    """int64: one past the last slot of each expert."""
    position_R: Tensor
    """int32: where each flat (token, choice) lies among the sorted slots; -1 for an empty one."""
    tile_expert_P: Tensor
    """int32: the expert of each tile; -1 for the tiles that this routing does not need."""
    tile_row_P: Tensor
    """int32: the first sorted slot of each tile."""
    tile_rows: int
    """Slots of a full tile, which every kernel that walks the tiles takes at a time: one that took
    more would read and write those of the next tile and expert."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What autograd keeps; `tile_rows` makes a plan of them again."""
        return self[:-1]

    @property
    def num_tiles(self) -> int:
        return self.tile_expert_P.shape[0]

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a GEMM kernel reads to find its tiles."""
        return self.ends_N, self.tile_expert_P, self.tile_row_P


def plan_slots(slots: SortedSlots, rows: int = 128) -> SlotPlan:
    """Cut every expert's slots into tiles of `rows`, on the device. As many tiles are launched as
    any routing may need; those left over end at once."""
    num_slots, num_experts = slots.token_R.shape[0], slots.ends_N.shape[0]
    used = slots.num_rows
    # ceil(n / rows) <= (n - 1) / rows + 1 for an expert with slots, and 0 for one without.
    num_tiles = used // rows + min(num_experts, used)
    tile_expert_P, tile_row_P = (
        slots.ends_N.new_empty(num_tiles, dtype=torch.int32) for _ in range(2)
    )
    known = slots.position_R
    position_R = slots.ends_N.new_empty(num_slots, dtype=torch.int32) if known is None else known
    launch(
        plan_kernel,
        (triton.cdiv(num_tiles if known is not None else max(num_slots, num_tiles), PLAN_BLOCK),),
        None,
        Cost(
            reads=(None if known is not None else slots.slot_R, slots.ends_N),
            writes=(None if known is not None else position_R, tile_expert_P, tile_row_P),
        ),
        slots.slot_R,
        slots.ends_N,
        position_R,
        tile_expert_P,
        tile_row_P,
        num_slots,
        num_tiles,
        num_experts,
        POSITIONS=known is None,
        TILE_ROWS=rows,
        BLOCK_N=triton.next_power_of_2(num_experts),
        BLOCK=PLAN_BLOCK,
        num_warps=8,
    )
    return SlotPlan(
        slots.token_R, slots.slot_R, slots.ends_N, position_R, tile_expert_P, tile_row_P, rows
    )


@torch.compiler.disable
def permute_triton(x_TD: Tensor, slots: SortedSlots) -> Tensor:
    """`permute` in Triton."""
    check_operands("permute", x_TD)
    return _Permute.apply(x_TD, slots.num_rows, plan_slots(slots))


@torch.compiler.disable
def unpermute_triton(
    rows_RD: Tensor, slots: SortedSlots, num_tokens: int, weights_TK: Tensor | None
) -> Tensor:
    """`unpermute` in Triton; products and sums are formed in float32."""
    check_operands("unpermute", rows_RD)
    weights_TK = None if weights_TK is None else weights_TK.float().contiguous()
    return _Unpermute.apply(rows_RD, num_tokens, weights_TK, plan_slots(slots))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, num_rows, plan):
        ctx.save_for_backward(plan.position_R)
        ctx.num_tokens = x_TD.shape[0]
        return gather_rows(x_TD, plan, num_rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_RD):
        (position_R,) = ctx.saved_tensors
        return combine_rows(grad_RD.contiguous(), position_R, ctx.num_tokens), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, num_tokens, weights_TK, plan):
        ctx.save_for_backward(None if weights_TK is None else rows_RD, weights_TK, *plan.tensors)
        ctx.num_rows, ctx.tile_rows = rows_RD.shape[0], plan.tile_rows
        return combine_rows(rows_RD, plan.position_R, num_tokens, weights_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        rows_RD, weights_TK, *tensors = ctx.saved_tensors
        grad_weights_TK = None if weights_TK is None else torch.zeros_like(weights_TK)
        grad_RD = gather_rows(
            grad_TD.contiguous(),
            SlotPlan(*tensors, ctx.tile_rows),
            ctx.num_rows,
            weights_TK,
            rows_RD,
            grad_weights_TK,
        )
        return grad_RD, None, grad_weights_TK, None


def gather_rows(
    x_TD: Tensor,
    plan: SlotPlan,
    num_rows: int,
    weights_TK: Tensor | None = None,
    other_RD: Tensor | None = None,
    dots_TK: Tensor | None = None,
) -> Tensor:
    """The (weighted) row of its token for each of the first `num_rows` sorted slots -> [R, D];
    zeros for empty slots. Where given, `dots_TK` receives the unweighted row's product with the
    slot's row of `other_RD`, zero for empty slots."""
    width = x_TD.shape[1]
    rows_RD = x_TD.new_empty(num_rows, width)
    weighted = weights_TK is not None
    launch(
        gather_kernel,
        (triton.cdiv(num_rows, ROW_BLOCK),),
        None,
        Cost(
            reads=(plan.ends_N, weights_TK),
            # Rows of empty slots are written too: zeros.
            writes=(rows_RD, dots_TK),
            slots=num_rows,
            slot_reads=(plan.token_R, x_TD, plan.slot_R if weighted else None, other_RD),
        ),
        x_TD,
        rows_RD,
        weights_TK if weighted else x_TD,
        other_RD if weighted else x_TD,
        dots_TK if weighted else x_TD,
        plan.token_R,
        plan.slot_R,
        plan.ends_N,
        num_rows,
        plan.ends_N.shape[0],
        D=width,
        WEIGHTED=weighted,
        ROWS=ROW_BLOCK,
        COLUMNS=COLUMN_BLOCK,
        num_warps=4,
    )
    return rows_RD


def combine_rows(
    rows_RD: Tensor, position_R: Tensor, num_tokens: int, weights_TK: Tensor | None = None
) -> Tensor:
    """(Weighted) sum of each token's rows -> [T, D]. Rows of empty slots are not read.

    Args:
        rows_RD: one row a sorted slot, of unit stride along D.
        position_R: int32, where each slot's row lies; -1 for an empty slot.
    """
    width = rows_RD.shape[1]
    y_TD = rows_RD.new_empty(num_tokens, width)
    num_chosen = position_R.numel() // max(num_tokens, 1)
    launch(
        combine_kernel,
        (triton.cdiv(num_tokens, ROW_BLOCK), triton.cdiv(width, COLUMN_BLOCK)),
        None,
        Cost(
            reads=(position_R, weights_TK),
            writes=(y_TD,),
            slots=rows_RD.shape[0],
            slot_reads=(rows_RD,),
        ),
        rows_RD,
        position_R,
        y_TD,
        rows_RD if weights_TK is None else weights_TK,
        num_tokens,
        K=num_chosen,
        D=width,
        STRIDE=rows_RD.stride(0),
        WEIGHTED=weights_TK is not None,
        ROWS=ROW_BLOCK,
        COLUMNS=COLUMN_BLOCK,
        num_warps=4,
    )
    return y_TD


@triton.jit(do_not_specialize=["num_slots", "num_tiles"])
def plan_kernel(
    slot_R,
    ends_N,
    position_R,
    tile_expert_P,
    tile_row_P,
    num_slots,
    num_tiles,
    num_experts,
    POSITIONS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The table of tiles, for BLOCK of them; POSITIONS: and the inverse of the sort, for BLOCK
    slots."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if POSITIONS:
        slot = tl.load(slot_R + i, mask=i < num_slots, other=0)
        used = tl.load(ends_N + num_experts - 1)
        tl.store(position_R + slot, tl.where(i < used, i, -1), mask=i < num_slots)
        # There are far fewer tiles than slots.
        if tl.program_id(0) * BLOCK >= num_tiles:
            return
    n = tl.arange(0, BLOCK_N)
    end_n = tl.load(ends_N + n, mask=n < num_experts, other=0).to(tl.int32)
    start_n = tl.load(ends_N + n - 1, mask=(n > 0) & (n < num_experts), other=0).to(tl.int32)
    tiles_n = tl.cdiv(end_n - start_n, TILE_ROWS)
    last_n = tl.cumsum(tiles_n, axis=0)
    # The expert of a tile is the number of experts whose tiles all come before it. Lanes past the
    # last expert have none.
    expert = tl.sum((last_n[None, :] <= i[:, None]).to(tl.int32), axis=1)
    mine = n[None, :] == expert[:, None]
    first_tile = tl.sum(tl.where(mine, (last_n - tiles_n)[None, :], 0), axis=1)
    first_row = tl.sum(tl.where(mine, start_n[None, :], 0), axis=1)
    tl.store(tile_expert_P + i, tl.where(expert < num_experts, expert, -1), mask=i < num_tiles)
    tl.store(tile_row_P + i, first_row + (i - first_tile) * TILE_ROWS, mask=i < num_tiles)


@triton.jit(do_not_specialize=["num_slots"])
def gather_kernel(
    x_TD,
    rows_RD,
    weights_TK,
    other_RD,
    dots_TK,
    token_R,
    slot_R,
    ends_N,
    num_slots,
    num_experts,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rows[r] = x[token[r]] for ROWS sorted slots; WEIGHTED: times the slot's weight, and dots =
    <x[token[r]], other[r]>."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < num_slots
    in_use = row < tl.load(ends_N + num_experts - 1)
    token = tl.load(token_R + row, mask=exists, other=0).to(tl.int64)
    row = row.to(tl.int64)
    if WEIGHTED:
        slot = tl.load(slot_R + row, mask=exists, other=0)
        weight = tl.load(weights_TK + slot, mask=in_use, other=0.0)
        dot = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = in_use[:, None] & (d[None, :] < D)
        x = tl.load(x_TD + token[:, None] * D + d[None, :], mask=inside, other=0.0)
        if WEIGHTED:
            other = tl.load(other_RD + row[:, None] * D + d[None, :], mask=inside, other=0.0)
            dot += tl.sum(x.to(tl.float32) * other.to(tl.float32), axis=1)
            x = (x.to(tl.float32) * weight[:, None]).to(rows_RD.dtype.element_ty)
        tl.store(
            rows_RD + row[:, None] * D + d[None, :], x, mask=exists[:, None] & (d[None, :] < D)
        )
    if WEIGHTED:
        tl.store(dots_TK + slot, dot, mask=exists)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    rows_RD,
    position_R,
    y_TD,
    weights_TK,
    num_tokens,
    K: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[t] = sum over k of (weight *) row, for ROWS tokens and COLUMNS of D."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = token < num_tokens
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in tl.static_range(K):
        slot = token * K + k
        position = tl.load(position_R + slot, mask=exists, other=-1)
        in_use = position >= 0
        value = tl.load(
            rows_RD + position.to(tl.int64)[:, None] * STRIDE + d[None, :],
            mask=in_use[:, None] & (d[None, :] < D),
            other=0.0,
        ).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_TK + slot, mask=in_use, other=0.0)[:, None]
        acc += value
    tl.store(
        y_TD + token.to(tl.int64)[:, None] * D + d[None, :],
        acc.to(y_TD.dtype.element_ty),
        mask=exists[:, None] & (d[None, :] < D),
    )
