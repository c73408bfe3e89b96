"""The routed experts: every token through its own experts, weighted and summed. No padding, no
dropped token.

Slots (token, choice) are sorted by expert once; then each expert is a handful of GEMMs on its own
rows. Rows are gathered just before an expert's first GEMM and added to the output just after its
last one, so that no permuted copy of the tokens exists and an expert's rows are still in cache when
they are used.

This is the readable twin of triton_grouped_mlp.py, and of cpu_grouped_mlp.cpp for large float32
calls on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.kernels import cpu_grouped_mlp
from emotrain.kernels.backends import choose_backend
from emotrain.kernels.slots import SortedSlots


def grouped_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    slots: SortedSlots,
    gate_up_NFD: Tensor,
    down_NHD: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Sum over a token's slots of weight * SwiGLU of the slot's expert: y = (silu(x Wg) * (x Wu))
    Wd (spec 3.2).

    Args:
        x_TD: tokens, float32, float64 or bfloat16.
        weights_TK: routing weight of each slot; empty slots are never read.
        slots: `sort_slots` of the routing decision.
        gate_up_NFD: gate rows, then up rows, of each expert; F = 2 * H. Same dtype as `x_TD`.
        down_NHD: down projection, used as z @ down.
        backend: what computes it; see `choose_backend`, also for errors.
    Returns:
        [T, D] in the dtype of `x_TD`, with zero rows for tokens without a routed slot.
    """
    may_compile = backend == "auto"
    backend = choose_backend(backend, x_TD, gate_up_NFD.shape[0], has_megablocks=True)
    if backend == "triton":
        from emotrain.kernels.triton_grouped_mlp import grouped_mlp_triton

        return grouped_mlp_triton(x_TD, weights_TK, slots, gate_up_NFD, down_NHD)
    if backend == "megablocks":
        from emotrain.kernels.megablocks_adapter import grouped_mlp_megablocks

        return grouped_mlp_megablocks(x_TD, weights_TK, slots, gate_up_NFD, down_NHD)
    if may_compile and is_compiled(x_TD, weights_TK, gate_up_NFD, down_NHD):
        return cpu_grouped_mlp.grouped_mlp_cpu(
            x_TD, weights_TK, slots.token_R, slots.slot_R, slots.ends_N, gate_up_NFD, down_NHD
        )
    weights_R = weights_TK.reshape(-1)[slots.slot_R[: slots.num_rows]].to(x_TD.dtype)
    if x_TD.is_cuda and x_TD.dtype == torch.bfloat16:
        from emotrain.kernels.grouped_mm import grouped_mm_mlp

        return grouped_mm_mlp(x_TD, weights_R, slots, gate_up_NFD, down_NHD)
    return _LoopedMLP.apply(
        x_TD, weights_R, gate_up_NFD, down_NHD, slots.token_R[: slots.num_rows], slots.ends_N
    )


def is_compiled(x_TD: Tensor, weights_TK: Tensor, gate_up_NFD: Tensor, down_NHD: Tensor) -> bool:
    """Whether `auto` takes the compiled kernel: a large call that it can compute."""
    work = weights_TK.numel() * down_NHD[0].numel()
    return work >= cpu_grouped_mlp.WORTH_COMPILING and cpu_grouped_mlp.can_run(
        x_TD, weights_TK, gate_up_NFD, down_NHD
    )


class _LoopedMLP(torch.autograd.Function):
    """One expert after the other, in place, with a hand-written backward.

    Autograd over a loop would keep every intermediate and allocate a full-size gradient for each
    indexed weight. Here only the pre-activation is kept; the gathered rows and the activation are
    made again in backward.
    """

    @staticmethod
    def forward(ctx, x_TD, weights_R, gate_up_NFD, down_NHD, token_R, ends_N):
        lengths = ends_N.diff(prepend=ends_N.new_zeros(1)).tolist()
        hidden_RF = x_TD.new_empty(token_R.shape[0], gate_up_NFD.shape[1])
        y_TD = torch.zeros_like(x_TD)
        rows = rows_by_expert(lengths, token_R, weights_R[:, None], hidden_RF)
        for of_expert in zip(*rows, gate_up_NFD.unbind(), down_NHD.unbind(), strict=True):
            add_expert(y_TD, x_TD, *of_expert)
        ctx.save_for_backward(x_TD, weights_R, gate_up_NFD, down_NHD, token_R, hidden_RF)
        ctx.lengths = lengths
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        x_TD, weights_R, gate_up_NFD, down_NHD, token_R, hidden_RF = ctx.saved_tensors
        grad_x_TD, grad_weights_R = torch.zeros_like(x_TD), torch.zeros_like(weights_R)
        _, _, needs_gate_up, needs_down, *_ = ctx.needs_input_grad
        # Frozen experts have no gradient: a view of one number takes its place among the banks.
        grad_gate_up_NFD = _like(gate_up_NFD, needs_gate_up)
        grad_down_NHD = _like(down_NHD, needs_down)
        scratch_rF = hidden_RF.new_empty(max(ctx.lengths), hidden_RF.shape[1])
        rows = rows_by_expert(ctx.lengths, token_R, weights_R[:, None], grad_weights_R, hidden_RF)
        banks = [b.unbind() for b in (gate_up_NFD, down_NHD, grad_gate_up_NFD, grad_down_NHD)]
        for token_r, weight_r1, grad_weight_r, hidden_rF, *bank in zip(*rows, *banks, strict=True):
            gate_up_FD, down_HD, grad_gate_up_FD, grad_down_HD = bank
            if token_r.shape[0] == 0:
                if needs_gate_up:
                    grad_gate_up_FD.zero_()
                if needs_down:
                    grad_down_HD.zero_()
                continue
            gate_rH, up_rH = hidden_rF.chunk(2, dim=1)
            silu_rH = F.silu(gate_rH)
            act_rH = silu_rH * up_rH
            grad_rD = grad_TD.index_select(0, token_r)
            grad_act_rH = grad_rD @ down_HD.t()
            torch.sum(act_rH * grad_act_rH, dim=1, out=grad_weight_r)
            if needs_down:
                torch.mm(act_rH.mul_(weight_r1).t(), grad_rD, out=grad_down_HD)
            grad_act_rH.mul_(weight_r1)
            grad_hidden_rF = scratch_rF[: token_r.shape[0]]
            grad_gate_rH, grad_up_rH = grad_hidden_rF.chunk(2, dim=1)
            torch.mul(grad_act_rH, silu_rH, out=grad_up_rH)
            torch.ops.aten.silu_backward.grad_input(
                grad_act_rH.mul_(up_rH), gate_rH, grad_input=grad_gate_rH
            )
            if needs_gate_up:
                torch.mm(grad_hidden_rF.t(), x_TD.index_select(0, token_r), out=grad_gate_up_FD)
            grad_x_TD.index_add_(0, token_r, grad_hidden_rF @ gate_up_FD)
        grads = (
            grad_gate_up_NFD if needs_gate_up else None,
            grad_down_NHD if needs_down else None,
        )
        return grad_x_TD, grad_weights_R, *grads, None, None


def _like(bank: Tensor, needed: bool) -> Tensor:
    """An uninitialised tensor of the shape of a bank; one that takes no memory if not needed."""
    return torch.empty_like(bank) if needed else bank.new_empty(()).expand(bank.shape)


def add_expert(y_TD, x_TD, token_r, weight_r1, hidden_rF, gate_up_FD, down_HD) -> None:
    """Add one expert's weighted outputs to the rows of its tokens. `hidden_rF` gets what is before
    the activation."""
    if token_r.shape[0] == 0:
        return
    torch.mm(x_TD.index_select(0, token_r), gate_up_FD.t(), out=hidden_rF)
    gate_rH, up_rH = hidden_rF.chunk(2, dim=1)
    act_rH = F.silu(gate_rH).mul_(up_rH).mul_(weight_r1)
    y_TD.index_add_(0, token_r, act_rH @ down_HD)


def rows_by_expert(lengths: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each expert as views, of every tensor; rows of empty slots, at the end, are
    left out."""
    return [tensor[: sum(lengths)].split(lengths) for tensor in tensors]
