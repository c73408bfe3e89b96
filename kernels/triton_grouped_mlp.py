"""Triton kernels of the routed experts: the same function as `grouped_mlp`, its readable twin.

Forward, two GEMMs over the slots sorted by expert and one small sum:

    gate_up_kernel   gathers a tile's rows of x by token in its loads, multiplies with gate and up, applies SwiGLU
    rows_kernel      multiplies with down, then weights each row and stores it at its (token, choice)
    combine_kernel   adds the K rows of each token (triton_permute.py)

Backward mirrors it: `grad_hidden_kernel` (gathers rows of dy), `rows_kernel` and `combine_kernel`
for dx, and `weight_grad_kernel` twice. Every sum has a fixed order, so that two runs give the same
bits: the alternative to writing K rows a token and reading them again, 2 * T * K * D elements, is a
float atomic, whose order is the scheduler's.

Tiles are found on the device from `ends_N` (`plan_slots`), so that nothing waits for the host. The
first GEMM takes a row of gate, then a row of up, and so on: both values of a hidden unit then lie
in the same thread of a tensor-core accumulator, and SwiGLU needs no exchange between threads. In
memory gate and up lie side by side, as the bank has them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emotrain.kernels.backends import check_operands
from emotrain.kernels.grouped_mlp import SortedSlots
from emotrain.kernels.triton_launch import float32_precision, launch, tuned
from emotrain.kernels.triton_permute import SlotPlan, combine_rows, plan_slots


@torch.compiler.disable
def grouped_mlp_triton(
    x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor
) -> Tensor:
    """`grouped_mlp` in Triton: bfloat16 or float32, accumulated in float32, on contiguous tensors
    of one CUDA device.

    Products of the combine weights are formed in float32. Gradients for `x_TD`, `weights_TK` and
    both banks.
    """
    check_operands("grouped_mlp", x_TD, gate_up_NFD, down_NHD)
    # Inside an autograd function the gradient mode is always off: only out here can inference be
    # told from training.
    keeps = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x_TD, weights_TK, gate_up_NFD, down_NHD)
    )
    return _GroupedMLP.apply(
        x_TD,
        weights_TK.float().contiguous(),
        gate_up_NFD,
        down_NHD,
        keeps,
        slots.token_R,
        slots.slot_R,
        slots.ends_N,
        slots.in_use,
    )


class _GroupedMLP(torch.autograd.Function):
    """Keeps x, the combine weights and the pre-activation [R, F]; the activation is made again
    in backward."""

    @staticmethod
    def forward(
        ctx, x_TD, weights_TK, gate_up_NFD, down_NHD, keeps_hidden, token_R, slot_R, ends_N, in_use
    ):
        slots = SortedSlots(token_R, slot_R, ends_N, in_use)
        plan = plan_slots(slots, tuned("gate_up", x_TD).rows)
        hidden = down_NHD.shape[1]
        hidden_RF = x_TD.new_empty(slots.num_rows if keeps_hidden else 0, 2 * hidden)
        act_RH = x_TD.new_empty(slots.num_rows, hidden)
        _gate_up(x_TD, gate_up_NFD, hidden_RF, act_RH, plan)
        y_RD = _multiply_rows(act_RH, down_NHD, plan, weights_TK, weighted=True)
        ctx.save_for_backward(x_TD, weights_TK, gate_up_NFD, down_NHD, hidden_RF, *plan)
        return combine_rows(y_RD, plan.position_R, weights_TK.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        x_TD, weights_TK, gate_up_NFD, down_NHD, hidden_RF, *plan = ctx.saved_tensors
        plan, grad_TD = SlotPlan(*plan), grad_TD.contiguous()
        needs_x, needs_weights, needs_gate_up, needs_down, *_ = ctx.needs_input_grad
        grad_hidden_RF, weighted_RH, grad_weights_TK = _grad_hidden(
            grad_TD, down_NHD, hidden_RF, weights_TK, plan
        )
        grad_down_NHD = _weight_grad(weighted_RH, grad_TD, down_NHD, plan) if needs_down else None
        del weighted_RH
        grad_gate_up_NFD = (
            _weight_grad(grad_hidden_RF, x_TD, gate_up_NFD, plan) if needs_gate_up else None
        )
        grad_x_TD = None
        if needs_x:
            grad_RD = _multiply_rows(grad_hidden_RF, gate_up_NFD, plan, weights_TK, weighted=False)
            grad_x_TD = combine_rows(grad_RD, plan.position_R, weights_TK.shape[0])
        return (
            grad_x_TD,
            grad_weights_TK if needs_weights else None,
            grad_gate_up_NFD,
            grad_down_NHD,
            None,
            None,
            None,
            None,
            None,
        )


def _gate_up(
    x_TD: Tensor, gate_up_NFD: Tensor, hidden_RF: Tensor, act_RH: Tensor, plan: SlotPlan
) -> None:
    width, hidden = x_TD.shape[1], act_RH.shape[1]
    config = tuned("gate_up", x_TD)
    launch(
        gate_up_kernel,
        (plan.num_tiles * triton.cdiv(2 * hidden, config.columns),),
        config,
        x_TD,
        gate_up_NFD,
        hidden_RF,
        act_RH,
        plan.token_R,
        plan.ends_N,
        plan.tile_expert_P,
        plan.tile_row_P,
        plan.num_tiles,
        D=width,
        H=hidden,
        KEEP_HIDDEN=hidden_RF.shape[0] > 0,
        PRECISION=float32_precision(),
    )


def _multiply_rows(
    a_RJ: Tensor, bank_NJD: Tensor, plan: SlotPlan, weights_TK: Tensor, weighted: bool
) -> Tensor:
    """Each sorted row times its expert's matrix (times its weight) -> [R, D]. Rows of empty slots
    stay unwritten; `combine_rows` does not read them."""
    inner, width = bank_NJD.shape[1:]
    y_RD = a_RJ.new_empty(a_RJ.shape[0], width)
    config = tuned("rows", a_RJ)
    launch(
        rows_kernel,
        (plan.num_tiles * triton.cdiv(width, config.columns),),
        config,
        a_RJ,
        bank_NJD,
        y_RD,
        weights_TK,
        plan.slot_R,
        plan.ends_N,
        plan.tile_expert_P,
        plan.tile_row_P,
        plan.num_tiles,
        J=inner,
        D=width,
        WEIGHTED=weighted,
        PRECISION=float32_precision(),
    )
    return y_RD


def _grad_hidden(
    grad_TD: Tensor, down_NHD: Tensor, hidden_RF: Tensor, weights_TK: Tensor, plan: SlotPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the pre-activation [R, F], the weighted activation [R, H], the gradient of the
    weights."""
    hidden, width = down_NHD.shape[1:]
    config = tuned("grad_hidden", grad_TD)
    num_columns = triton.cdiv(hidden, config.columns)
    grad_hidden_RF, weighted_RH = (
        torch.empty_like(hidden_RF),
        hidden_RF.new_empty(hidden_RF.shape[0], hidden),
    )
    partial_PR = weights_TK.new_empty(num_columns, weights_TK.numel())
    launch(
        grad_hidden_kernel,
        (plan.num_tiles * num_columns,),
        config,
        grad_TD,
        down_NHD,
        hidden_RF,
        weights_TK,
        grad_hidden_RF,
        weighted_RH,
        partial_PR,
        plan.token_R,
        plan.slot_R,
        plan.ends_N,
        plan.tile_expert_P,
        plan.tile_row_P,
        plan.num_tiles,
        weights_TK.numel(),
        D=width,
        H=hidden,
        PRECISION=float32_precision(),
    )
    # Slots in use alone were written: the rest is masked by selection, never by a product with 0.
    grad_weights_R = torch.where(plan.position_R >= 0, partial_PR.sum(dim=0), 0)
    return grad_hidden_RF, weighted_RH, grad_weights_R.view_as(weights_TK)


def _weight_grad(a_RJ: Tensor, b_TD: Tensor, bank_NJD: Tensor, plan: SlotPlan) -> Tensor:
    """Per expert, the transposed rows of `a` times the tokens' rows of `b` -> like the bank;
    zero for idle experts."""
    num_experts, inner, width = bank_NJD.shape
    grad_NJD = torch.empty_like(bank_NJD)
    config = tuned("weight_grad", a_RJ)
    launch(
        weight_grad_kernel,
        (triton.cdiv(inner, config.rows) * triton.cdiv(width, config.columns), num_experts),
        config,
        a_RJ,
        b_TD,
        grad_NJD,
        plan.token_R,
        plan.ends_N,
        J=inner,
        D=width,
        PRECISION=float32_precision(),
    )
    return grad_NJD


@triton.jit
def _tile_of_program(num_tiles, num_columns, GROUP: tl.constexpr):
    """(row tile, column tile) of this program. GROUP row tiles take turns on one column tile, so
    that an expert's weights and rows are still in the L2 cache when the next program wants them."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    group_rows = tl.minimum(num_tiles - group * GROUP, GROUP)
    inside = program - group * GROUP * num_columns
    return group * GROUP + inside % group_rows, inside // group_rows


@triton.jit
def gate_up_kernel(
    x_TD,
    gate_up_NFD,
    hidden_RF,
    act_RH,
    token_R,
    ends_N,
    tile_expert_P,
    tile_row_P,
    num_tiles,
    D: tl.constexpr,
    H: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """act = silu(x Wg^T) * (x Wu^T) for ROWS slots of one expert and COLUMNS / 2 hidden units."""
    tile, column = _tile_of_program(num_tiles, tl.cdiv(2 * H, COLUMNS), GROUP)
    expert = tl.load(tile_expert_P + tile)
    if expert < 0:
        return
    first = tl.load(tile_row_P + tile)
    i = tl.arange(0, ROWS)
    live = i < tl.load(ends_N + expert) - first
    # Rows past the expert's last one read token 0 and are never stored.
    token = tl.load(token_R + first + i, mask=live, other=0)
    j = column * COLUMNS + tl.arange(0, COLUMNS)
    bank_row = tl.where(j < 2 * H, (j % 2) * H + j // 2, 0)
    k = tl.arange(0, DEPTH)
    x_ptr = x_TD + token.to(tl.int64)[:, None] * D + k[None, :]
    bank_ptr = gate_up_NFD + expert.to(tl.int64) * (2 * H * D) + bank_row[None, :] * D + k[:, None]
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, D, DEPTH):
        if D % DEPTH == 0:
            x, bank = tl.load(x_ptr), tl.load(bank_ptr)
        else:
            x = tl.load(x_ptr, mask=k[None, :] < D - start, other=0.0)
            bank = tl.load(bank_ptr, mask=k[:, None] < D - start, other=0.0)
        acc = tl.dot(x, bank, acc, input_precision=PRECISION)
        x_ptr += DEPTH
        bank_ptr += DEPTH
    first = first.to(tl.int64)
    hidden_RF, act_RH = hidden_RF + first * (2 * H), act_RH + first * H
    left, right = _halves(acc)
    for half in tl.static_range(2):
        gate, up = tl.split(tl.reshape(left if half == 0 else right, (ROWS, COLUMNS // 4, 2)))
        h = column * (COLUMNS // 2) + half * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        inside = live[:, None] & (h[None, :] < H)
        if KEEP_HIDDEN:
            gate_ptr = hidden_RF + (i[:, None] * (2 * H) + h[None, :])
            tl.store(gate_ptr, gate.to(hidden_RF.dtype.element_ty), mask=inside)
            tl.store(gate_ptr + H, up.to(hidden_RF.dtype.element_ty), mask=inside)
        act = gate * tl.sigmoid(gate) * up
        tl.store(
            act_RH + (i[:, None] * H + h[None, :]), act.to(act_RH.dtype.element_ty), mask=inside
        )


@triton.jit
def rows_kernel(
    a_RJ,
    bank_NJD,
    y_RD,
    weights_TK,
    slot_R,
    ends_N,
    tile_expert_P,
    tile_row_P,
    num_tiles,
    J: tl.constexpr,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(weight *) a @ bank for ROWS slots of one expert and COLUMNS of D."""
    tile, column = _tile_of_program(num_tiles, tl.cdiv(D, COLUMNS), GROUP)
    expert = tl.load(tile_expert_P + tile)
    if expert < 0:
        return
    first = tl.load(tile_row_P + tile)
    i = tl.arange(0, ROWS)
    live = i < tl.load(ends_N + expert) - first
    d = column * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    a_ptr = a_RJ + first.to(tl.int64) * J + (tl.where(live, i, 0)[:, None] * J + k[None, :])
    bank_ptr = bank_NJD + expert.to(tl.int64) * (J * D) + k[:, None] * D + d[None, :]
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, J, DEPTH):
        if J % DEPTH == 0 and D % COLUMNS == 0:
            a, bank = tl.load(a_ptr), tl.load(bank_ptr)
        else:
            a = tl.load(a_ptr, mask=k[None, :] < J - start, other=0.0)
            bank = tl.load(bank_ptr, mask=(k[:, None] < J - start) & (d[None, :] < D), other=0.0)
        acc = tl.dot(a, bank, acc, input_precision=PRECISION)
        a_ptr += DEPTH
        bank_ptr += DEPTH * D
    if WEIGHTED:
        slot = tl.load(slot_R + first + i, mask=live, other=0)
        acc *= tl.load(weights_TK + slot, mask=live, other=0.0)[:, None]
    y_ptr = y_RD + first.to(tl.int64) * D + (i[:, None] * D + d[None, :])
    tl.store(y_ptr, acc.to(y_RD.dtype.element_ty), mask=live[:, None] & (d[None, :] < D))


@triton.jit
def grad_hidden_kernel(
    grad_TD,
    down_NHD,
    hidden_RF,
    weights_TK,
    grad_hidden_RF,
    weighted_RH,
    partial_PR,
    token_R,
    slot_R,
    ends_N,
    tile_expert_P,
    tile_row_P,
    num_tiles,
    num_slots,
    D: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dy @ down^T for ROWS slots of one expert and COLUMNS hidden units, then back through the
    weight and SwiGLU."""
    tile, column = _tile_of_program(num_tiles, tl.cdiv(H, COLUMNS), GROUP)
    expert = tl.load(tile_expert_P + tile)
    if expert < 0:
        return
    first = tl.load(tile_row_P + tile)
    i = tl.arange(0, ROWS)
    live = i < tl.load(ends_N + expert) - first
    token = tl.load(token_R + first + i, mask=live, other=0)
    h = column * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    grad_ptr = grad_TD + token.to(tl.int64)[:, None] * D + k[None, :]
    down_ptr = (
        down_NHD + expert.to(tl.int64) * (H * D) + tl.where(h < H, h, 0)[None, :] * D + k[:, None]
    )
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, D, DEPTH):
        if D % DEPTH == 0:
            grad, down = tl.load(grad_ptr), tl.load(down_ptr)
        else:
            grad = tl.load(grad_ptr, mask=k[None, :] < D - start, other=0.0)
            down = tl.load(down_ptr, mask=k[:, None] < D - start, other=0.0)
        acc = tl.dot(grad, down, acc, input_precision=PRECISION)
        grad_ptr += DEPTH
        down_ptr += DEPTH
    slot = tl.load(slot_R + first + i, mask=live, other=0)
    weight = tl.load(weights_TK + slot, mask=live, other=0.0)
    first = first.to(tl.int64)
    hidden_RF, grad_hidden_RF, weighted_RH = (
        hidden_RF + first * (2 * H),
        grad_hidden_RF + first * (2 * H),
        weighted_RH + first * H,
    )
    # A quarter of the columns at a time: all at once would need more registers than there are.
    left, right = _halves(acc)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for quarter in tl.static_range(4):
        half = left if quarter < 2 else right
        first_half, second_half = _halves(half)
        columns = column * COLUMNS + quarter * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        total += _back_through_swiglu(
            first_half if quarter % 2 == 0 else second_half,
            weight,
            hidden_RF,
            grad_hidden_RF,
            weighted_RH,
            i,
            columns,
            live,
            H,
        )
    tl.store(partial_PR + column.to(tl.int64) * num_slots + slot, total, mask=live)


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def _back_through_swiglu(
    grad_act, weight, hidden_RF, grad_hidden_RF, weighted_RH, i, h, live, H: tl.constexpr
):
    """Gradient of the pre-activation and the weighted activation for columns `h`, stored; and
    each row's <act, grad_act>."""
    inside = live[:, None] & (h[None, :] < H)
    gate_at = i[:, None] * (2 * H) + h[None, :]
    gate = tl.load(hidden_RF + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden_RF + gate_at + H, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * up
    # Past column H the activation is 0.
    total = tl.sum(act * grad_act, axis=1)
    tl.store(
        weighted_RH + (i[:, None] * H + h[None, :]),
        (act * weight[:, None]).to(weighted_RH.dtype.element_ty),
        mask=inside,
    )
    grad_act *= weight[:, None]
    # d silu(g) / dg = sigmoid(g) + silu(g) * (1 - sigmoid(g))
    grad_gate = grad_act * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(grad_hidden_RF + gate_at, grad_gate.to(grad_hidden_RF.dtype.element_ty), mask=inside)
    tl.store(
        grad_hidden_RF + gate_at + H,
        (grad_act * silu).to(grad_hidden_RF.dtype.element_ty),
        mask=inside,
    )
    return total


@triton.jit
def weight_grad_kernel(
    a_RJ,
    b_TD,
    grad_NJD,
    token_R,
    ends_N,
    J: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """a^T @ b over one expert's slots, for ROWS of J and COLUMNS of D. An expert without slots
    gets zeros."""
    row_tile, column = _tile_of_program(tl.cdiv(J, ROWS), tl.cdiv(D, COLUMNS), GROUP)
    expert = tl.program_id(1)
    first = tl.load(ends_N + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    end = tl.load(ends_N + expert).to(tl.int32)
    j = row_tile * ROWS + tl.arange(0, ROWS)
    d = column * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    a_column, b_column = a_RJ + j[:, None], b_TD + d[None, :]
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, end, DEPTH):
        row = start + k
        live = row < end
        token = tl.load(token_R + row, mask=live, other=0)
        # Both sides are masked: 0 * NaN is NaN.
        a_mask, b_mask = live[None, :], live[:, None]
        if J % ROWS != 0:
            a_mask &= j[:, None] < J
        if D % COLUMNS != 0:
            b_mask &= d[None, :] < D
        a = tl.load(a_column + row.to(tl.int64)[None, :] * J, mask=a_mask, other=0.0)
        b = tl.load(b_column + token.to(tl.int64)[:, None] * D, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    grad_row = grad_NJD + tl.cast(expert, tl.int64) * (J * D) + j[:, None] * D
    tl.store(
        grad_row + d[None, :],
        acc.to(grad_NJD.dtype.element_ty),
        mask=(j[:, None] < J) & (d[None, :] < D),
    )
