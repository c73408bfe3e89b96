"""Triton kernels of rowwise.py, in fp32 inside: the functions are those of `InTorch`, its readable
twin.

Each reads its rows once and writes its result once; a row lies in the registers of one program. The
gradient of a norm's weight sums over rows: every program sums those of its own, in their order, and
the partial sums are added up at the end, so that the bits are the same every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emotrain.kernels.cost import Cost
from emotrain.kernels.triton_launch import launch

NORM_ELEMENTS = 8192
"""Elements that a program of the norms holds at a time, in 8 warps: two rows of four loads a
thread at the published width."""
PARTIAL_SUMS = 512
"""Most programs among which backward of a norm divides the rows, whatever the device: several for
each of its multiprocessors."""
TURN_TOKENS = 16
"""Tokens of one program of the rotary kernels; with 64 pairs a head, 16 bytes a thread and load."""
ROW_BLOCK, COLUMN_BLOCK = 4, 512
"""Rows and columns of one program of the SwiGLU kernels."""


def normalize(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `InTorch`."""
    width = x.shape[-1]
    y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    block, rows = _norm_tile(width)
    launch(
        norm_kernel,
        (triton.cdiv(scale.numel(), rows),),
        None,
        Cost(reads=(x, weight_D), writes=(y, scale)),
        x,
        weight_D,
        y,
        scale,
        scale.numel(),
        eps,
        D=width,
        BLOCK_D=block,
        ROWS=rows,
        num_warps=8,
    )
    return y, scale


def normalize_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `InTorch`."""
    grad, width, num_rows = grad.contiguous(), x.shape[-1], scale.numel()
    block, rows = _norm_tile(width)
    steps = triton.cdiv(triton.cdiv(num_rows, PARTIAL_SUMS), rows)
    grad_x = torch.empty_like(x)
    partial_PD = x.new_empty(
        triton.cdiv(num_rows, max(steps * rows, 1)), width, dtype=torch.float32
    )
    launch(
        norm_backward_kernel,
        (partial_PD.shape[0],),
        None,
        Cost(reads=(grad, x, weight_D, scale), writes=(grad_x, partial_PD)),
        grad,
        x,
        weight_D,
        scale,
        grad_x,
        partial_PD,
        num_rows,
        steps,
        D=width,
        BLOCK_D=block,
        ROWS=rows,
        num_warps=8,
    )
    return grad_x, partial_PD.sum(dim=0).to(weight_D.dtype)


def _norm_tile(width: int) -> tuple[int, int]:
    """Columns and rows that a program of the norms holds."""
    block = triton.next_power_of_2(width)
    return block, max(1, NORM_ELEMENTS // block)


def rotate_(x_BSAC: Tensor, num_turned: int, cos: Tensor, sin: Tensor) -> None:
    """See `InTorch`."""
    assert x_BSAC.is_contiguous(), "rows lie side by side"
    batch, length, heads, width = x_BSAC.shape
    half, turned_BSAC = width // 2, x_BSAC[:, :, :num_turned]
    launch(
        rotate_kernel,
        (triton.cdiv(batch * length, TURN_TOKENS),),
        None,
        Cost(reads=(turned_BSAC, cos, sin), writes=(turned_BSAC,)),
        x_BSAC,
        cos,
        sin,
        batch * length,
        length,
        F=heads * width,
        HEADS=num_turned,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        TOKENS=TURN_TOKENS,
        num_warps=4,
    )


def rotate_back(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `InTorch`."""
    grads = [grad.contiguous() for grad in (grad_q, grad_k, grad_v)]
    batch, length, num_heads, width = grad_q.shape
    kv_heads, half = grad_k.shape[2], width // 2
    grad_BSF = grad_q.new_empty(batch, length, (num_heads + 2 * kv_heads) * width)
    launch(
        rotate_back_kernel,
        (triton.cdiv(batch * length, TURN_TOKENS),),
        None,
        Cost(reads=(*grads, cos, sin), writes=(grad_BSF,)),
        *grads,
        grad_BSF,
        cos,
        sin,
        batch * length,
        length,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        TOKENS=TURN_TOKENS,
        num_warps=4,
    )
    return grad_BSF


def swiglu(hidden_XF: Tensor) -> Tensor:
    """See `InTorch`."""
    *sizes, inner = hidden_XF.shape
    act_XH = hidden_XF.new_empty(*sizes, inner // 2)
    _swiglu(swiglu_kernel, act_XH, Cost(reads=(hidden_XF,), writes=(act_XH,)), hidden_XF, act_XH)
    return act_XH


def swiglu_backward(grad_act_XH: Tensor, hidden_XF: Tensor) -> tuple[Tensor, Tensor]:
    """See `InTorch`."""
    grad_act_XH = grad_act_XH.contiguous()
    grad_hidden_XF, act_XH = torch.empty_like(hidden_XF), torch.empty_like(grad_act_XH)
    cost = Cost(reads=(grad_act_XH, hidden_XF), writes=(grad_hidden_XF, act_XH))
    tensors = (grad_act_XH, hidden_XF, grad_hidden_XF, act_XH)
    _swiglu(swiglu_backward_kernel, act_XH, cost, *tensors)
    return grad_hidden_XF, act_XH


def _swiglu(kernel: Any, act_XH: Tensor, cost: Cost, *tensors: Tensor) -> None:
    hidden = act_XH.shape[-1]
    num_rows = act_XH.numel() // hidden
    launch(
        kernel,
        (triton.cdiv(num_rows, ROW_BLOCK), triton.cdiv(hidden, COLUMN_BLOCK)),
        None,
        cost,
        *tensors,
        num_rows,
        H=hidden,
        ROWS=ROW_BLOCK,
        COLUMNS=COLUMN_BLOCK,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(
    x_TD,
    weight_D,
    y_TD,
    scale_T,
    num_rows,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = x * scale * weight with scale = 1 / rms(x), for ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (d < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    x = tl.load(x_TD + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    weight = tl.load(weight_D + d, mask=d < D, other=0.0).to(tl.float32)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_TD + at, y.to(y_TD.dtype.element_ty), mask=inside)
    tl.store(scale_T + row, scale, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "steps"])
def norm_backward_kernel(
    grad_TD,
    x_TD,
    weight_D,
    scale_T,
    grad_x_TD,
    partial_PD,
    num_rows,
    steps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grad_x = scale * weight * grad - x * scale^3 * <weight * grad, x> / D for `steps` times ROWS
    rows, and the sum over them of grad * x * scale."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_D + d, mask=d < D, other=0.0).to(tl.float32)
    partial = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (d < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        x = tl.load(x_TD + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_TD + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_T + row, mask=row < num_rows, other=0.0)
        unit = x * scale[:, None]
        partial += tl.sum(grad * unit, axis=0)
        weighted = grad * weight[None, :]
        along = tl.sum(weighted * unit, axis=1) / D
        grad_x = (weighted - unit * along[:, None]) * scale[:, None]
        tl.store(grad_x_TD + at, grad_x.to(grad_x_TD.dtype.element_ty), mask=inside)
    tl.store(partial_PD + program.to(tl.int64) * D + d, partial, mask=d < D)


@triton.jit
def _turned(source, target, at, to, cos, sin, inside, HALF: tl.constexpr):
    """Turn pairs of `source`, whose first halves lie at `at`, into those of `target` at `to`."""
    first = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + at + HALF, mask=inside, other=0.0).to(tl.float32)
    kind: tl.constexpr = target.dtype.element_ty
    tl.store(target + to, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(target + to + HALF, (second * cos + first * sin).to(kind), mask=inside)


@triton.jit
def _angles(cos_SX, sin_SX, token, length, HALF: tl.constexpr, BLOCK: tl.constexpr, inside):
    pair = tl.arange(0, BLOCK)
    at = (token % length)[:, None] * HALF + pair[None, :]
    cos = tl.load(cos_SX + at, mask=inside, other=0.0)
    return cos, tl.load(sin_SX + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "length"])
def rotate_kernel(
    x_TF,
    cos_SX,
    sin_SX,
    num_tokens,
    length,
    F: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The first HEADS heads of TOKENS rows, in place."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, BLOCK)
    inside = (token < num_tokens)[:, None] & (pair < HALF)[None, :]
    cos, sin = _angles(cos_SX, sin_SX, token, length, HALF, BLOCK, inside)
    at = token.to(tl.int64)[:, None] * F + pair[None, :]
    for head in range(HEADS):
        place = at + head * 2 * HALF
        _turned(x_TF, x_TF, place, place, cos, sin, inside, HALF)


@triton.jit(do_not_specialize=["num_tokens", "length"])
def rotate_back_kernel(
    grad_q_TF,
    grad_k_TF,
    grad_v_TF,
    grad_TF,
    cos_SX,
    sin_SX,
    num_tokens,
    length,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Gradients of queries and keys turned back, and those of values as they are, side by side."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, BLOCK)
    inside = (token < num_tokens)[:, None] & (pair < HALF)[None, :]
    cos, sin = _angles(cos_SX, sin_SX, token, length, HALF, BLOCK, inside)
    token = token.to(tl.int64)[:, None]
    C: tl.constexpr = 2 * HALF
    to = token * ((HEADS + 2 * KV_HEADS) * C) + pair[None, :]
    at = token * (HEADS * C) + pair[None, :]
    for head in range(HEADS):
        _turned(grad_q_TF, grad_TF, at + head * C, to + head * C, cos, -sin, inside, HALF)
    at = token * (KV_HEADS * C) + pair[None, :]
    for head in range(KV_HEADS):
        place = to + (HEADS + head) * C
        _turned(grad_k_TF, grad_TF, at + head * C, place, cos, -sin, inside, HALF)
        for part in tl.static_range(2):
            value = tl.load(grad_v_TF + at + head * C + part * HALF, mask=inside, other=0.0)
            tl.store(grad_TF + place + KV_HEADS * C + part * HALF, value, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    hidden_TF, act_TH, num_rows, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """silu(gate) * up for ROWS rows and COLUMNS of H."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    h = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows) & (h < H)
    gate = tl.load(hidden_TF + row * 2 * H + h, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden_TF + row * 2 * H + H + h, mask=inside, other=0.0).to(tl.float32)
    act = gate * tl.sigmoid(gate) * up
    tl.store(act_TH + row * H + h, act.to(act_TH.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_backward_kernel(
    grad_act_TH,
    hidden_TF,
    grad_hidden_TF,
    act_TH,
    num_rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of gate and up, and the product once more."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    h = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows) & (h < H)
    gate = tl.load(hidden_TF + row * 2 * H + h, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden_TF + row * 2 * H + H + h, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_act_TH + row * H + h, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    kind: tl.constexpr = act_TH.dtype.element_ty
    tl.store(grad_hidden_TF + row * 2 * H + h, grad_gate.to(kind), mask=inside)
    tl.store(grad_hidden_TF + row * 2 * H + H + h, (grad * silu).to(kind), mask=inside)
    tl.store(act_TH + row * H + h, (silu * up).to(kind), mask=inside)
