"""The grouped GEMMs of the routed experts in Triton; triton_grouped_mlp.py launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile_of_program(num_tiles, num_columns, GROUP: tl.constexpr):
    """(row tile, column tile) of this program. GROUP row tiles take turns on one column tile, so
    that an expert's weights and rows are still in the L2 cache when the next program wants them."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    group_rows = tl.minimum(num_tiles - group * GROUP, GROUP)
    inside = program - group * GROUP * num_columns
    return group * GROUP + inside % group_rows, inside // group_rows


@triton.jit(do_not_specialize=["num_tiles"])
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
    STRIDE: tl.constexpr,
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
    x_ptr = x_TD + token.to(tl.int64)[:, None] * STRIDE + k[None, :]
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


@triton.jit(do_not_specialize=["num_tiles"])
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


@triton.jit(do_not_specialize=["num_tiles", "num_slots"])
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
    STRIDE: tl.constexpr,
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
        b = tl.load(b_column + token.to(tl.int64)[:, None] * STRIDE, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    grad_row = grad_NJD + tl.cast(expert, tl.int64) * (J * D) + j[:, None] * D
    tl.store(
        grad_row + d[None, :],
        acc.to(grad_NJD.dtype.element_ty),
        mask=(j[:, None] < J) & (d[None, :] < D),
    )
