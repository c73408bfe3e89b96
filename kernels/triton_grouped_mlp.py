"""Triton kernels of the routed experts: the same function as `grouped_mlp`, its readable twin.

Forward, two GEMMs over the slots sorted by expert and one small sum:

    gate_up_kernel   gathers a tile's rows of x by token in its loads, multiplies with gate and up,
                     applies SwiGLU
    rows_kernel      multiplies with down, then weights each row and stores it at its (token,
                     choice)
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

from dataclasses import replace

import torch
import triton
from torch import Tensor

from emotrain.kernels.cost import Cost
from emotrain.kernels.slots import SortedSlots
from emotrain.kernels.triton_grouped_gemms import (
    gate_up_kernel,
    grad_hidden_kernel,
    rows_kernel,
    weight_grad_kernel,
)
from emotrain.kernels.triton_launch import check_operands, float32_precision, launch, tuned
from emotrain.kernels.triton_permute import SlotPlan, combine_rows, plan_slots
from emotrain.kernels.tuning import TileConfig


@torch.compiler.disable
def grouped_mlp_triton(
    x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor
) -> Tensor:
    """`grouped_mlp` in Triton: bfloat16 or float32, accumulated in float32, on contiguous tensors
    of one CUDA device; rows of `x_TD` may lie apart.

    Products of the combine weights are formed in float32. Gradients for `x_TD`, `weights_TK` and
    both banks.
    """
    check_operands("grouped_mlp", gate_up_NFD, down_NHD, rows=x_TD)
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
        slots.position_R,
    )


class _GroupedMLP(torch.autograd.Function):
    """Keeps x, the combine weights and the pre-activation [R, F]; the activation is made again
    in backward."""

    @staticmethod
    def forward(ctx, x_TD, weights_TK, gate_up_NFD, down_NHD, keeps_hidden, *slots):
        slots = SortedSlots(*slots)
        plan = plan_slots(slots, tuned("gate_up", x_TD).rows)
        hidden = down_NHD.shape[1]
        hidden_RF = x_TD.new_empty(slots.num_rows if keeps_hidden else 0, 2 * hidden)
        act_RH = x_TD.new_empty(slots.num_rows, hidden)
        _gate_up(x_TD, gate_up_NFD, hidden_RF, act_RH, plan)
        y_RD = _multiply_rows(act_RH, down_NHD, plan, weights_TK, weighted=True)
        ctx.save_for_backward(x_TD, weights_TK, gate_up_NFD, down_NHD, hidden_RF, *plan.tensors)
        ctx.tile_rows = plan.tile_rows
        return combine_rows(y_RD, plan.position_R, weights_TK.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        x_TD, weights_TK, gate_up_NFD, down_NHD, hidden_RF, *tensors = ctx.saved_tensors
        plan, grad_TD = SlotPlan(*tensors, ctx.tile_rows), grad_TD.contiguous()
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
            *(None,) * 6,
        )


def _tiles_of(plan: SlotPlan, kernel: str, tensor: Tensor) -> TileConfig:
    """Tile sizes of a kernel that walks the tiles of a plan: its rows are the plan's."""
    return replace(tuned(kernel, tensor), rows=plan.tile_rows)


def _gate_up(
    x_TD: Tensor, gate_up_NFD: Tensor, hidden_RF: Tensor, act_RH: Tensor, plan: SlotPlan
) -> None:
    width, hidden = x_TD.shape[1], act_RH.shape[1]
    config = _tiles_of(plan, "gate_up", x_TD)
    launch(
        gate_up_kernel,
        (plan.num_tiles * triton.cdiv(2 * hidden, config.columns),),
        config,
        Cost(
            reads=(gate_up_NFD, *plan.tables),
            writes=(),
            slots=act_RH.shape[0],
            slot_reads=(plan.token_R, x_TD),
            slot_writes=(hidden_RF, act_RH),
            slot_flops=4 * width * hidden,
        ),
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
        STRIDE=x_TD.stride(0),
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
    config = _tiles_of(plan, "rows", a_RJ)
    launch(
        rows_kernel,
        (plan.num_tiles * triton.cdiv(width, config.columns),),
        config,
        Cost(
            reads=(bank_NJD, weights_TK if weighted else None, *plan.tables),
            writes=(),
            slots=a_RJ.shape[0],
            slot_reads=(plan.slot_R if weighted else None, a_RJ),
            slot_writes=(y_RD,),
            slot_flops=2 * inner * width,
        ),
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
    config = _tiles_of(plan, "grad_hidden", grad_TD)
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
        Cost(
            reads=(down_NHD, weights_TK, *plan.tables),
            writes=(partial_PR,),
            slots=hidden_RF.shape[0],
            slot_reads=(plan.token_R, plan.slot_R, grad_TD, hidden_RF),
            slot_writes=(grad_hidden_RF, weighted_RH),
            slot_flops=2 * width * hidden,
        ),
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
        Cost(
            reads=(plan.ends_N,),
            writes=(grad_NJD,),
            slots=a_RJ.shape[0],
            slot_reads=(plan.token_R, a_RJ, b_TD),
            slot_flops=2 * inner * width,
        ),
        a_RJ,
        b_TD,
        grad_NJD,
        plan.token_R,
        plan.ends_N,
        J=inner,
        D=width,
        STRIDE=b_TD.stride(0),
        PRECISION=float32_precision(),
    )
    return grad_NJD
