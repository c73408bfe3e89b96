"""The routed experts: every token through its own experts, weighted and summed. No padding, no dropped token.

Slots (token, choice) are sorted by expert once; then each expert is a handful of GEMMs on its own rows. Rows are
gathered just before an expert's first GEMM and added to the output just after its last one, so that no permuted copy of
the tokens exists and an expert's rows are still in cache when they are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SortedSlots:
    """Routed slots in the order of their experts. Empty slots come last and belong to no expert."""

    token_R: Tensor
    """int64: the token of each slot."""
    slot_R: Tensor
    """int64: the position of each sorted slot in the flattened [T, K] choices."""
    ends_N: Tensor
    """int64: one past the last slot of each expert; `ends_N[-1]` slots are in use."""


def sort_slots(experts_TK: Tensor, counts_N: Tensor) -> SortedSlots:
    """Sort slots by expert; within an expert, tokens keep their order.

    Args:
        experts_TK: int64 expert of each slot in [0, N], where N marks an empty slot.
        counts_N: int64 slots of each expert.
    """
    slot_R = torch.sort(experts_TK.reshape(-1), stable=True).indices
    return SortedSlots(slot_R // experts_TK.shape[1], slot_R, counts_N.cumsum(0))


def grouped_mlp(x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor) -> Tensor:
    """Sum over a token's slots of weight * SwiGLU of the slot's expert: y = (silu(x Wg) * (x Wu)) Wd (spec 3.2).

    Args:
        x_TD: tokens, float32, float64 or bfloat16.
        weights_TK: routing weight of each slot; empty slots are never read.
        slots: `sort_slots` of the routing decision.
        gate_up_NFD: gate rows, then up rows, of each expert; F = 2 * H. Same dtype as `x_TD`.
        down_NHD: down projection, used as z @ down.
    Returns:
        [T, D] in the dtype of `x_TD`, with zero rows for tokens without a routed slot.
    """
    weights_R = weights_TK.reshape(-1)[slots.slot_R].to(x_TD.dtype)
    if x_TD.is_cuda and x_TD.dtype == torch.bfloat16:
        return _grouped_mm_mlp(x_TD, weights_R, slots, gate_up_NFD, down_NHD)
    return _LoopedMLP.apply(x_TD, weights_R, gate_up_NFD, down_NHD, slots.token_R, slots.ends_N)


def _grouped_mm_mlp(x_TD: Tensor, weights_R: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor) -> Tensor:
    """The same through torch's grouped GEMM, without a host copy of the counts (CUDA, bfloat16)."""
    ends_N = slots.ends_N.to(torch.int32)
    # grouped_mm leaves the rows after the last group unwritten, in its result and in the gradient of its input. Both ends
    # are masked, so that whatever is there reaches neither a sum nor a gradient, not even as 0 * inf.
    in_use_R = torch.arange(slots.token_R.shape[0], device=x_TD.device) < ends_N[-1]
    x_RD = torch.where(in_use_R[:, None], x_TD[slots.token_R], 0)
    hidden_RF = F.grouped_mm(x_RD, gate_up_NFD.transpose(1, 2), offs=ends_N)
    gate_RH, up_RH = hidden_RF.chunk(2, dim=-1)
    y_RD = F.grouped_mm(F.silu(gate_RH) * up_RH, down_NHD, offs=ends_N)
    y_RD = torch.where(in_use_R[:, None], y_RD, 0) * torch.where(in_use_R, weights_R, 0)[:, None]
    return torch.zeros_like(x_TD).index_add(0, slots.token_R, y_RD)


class _LoopedMLP(torch.autograd.Function):
    """One expert after the other, in place, with a hand-written backward.

    Autograd over a loop would keep every intermediate and allocate a full-size gradient for each indexed weight. Here only
    the pre-activation is kept; the gathered rows and the activation are made again in backward.
    """

    @staticmethod
    def forward(ctx, x_TD, weights_R, gate_up_NFD, down_NHD, token_R, ends_N):
        bounds = _bounds(ends_N)
        hidden_RF = x_TD.new_empty(token_R.shape[0], gate_up_NFD.shape[1])
        y_TD = torch.zeros_like(x_TD)
        for expert, start, stop in bounds:
            token = token_R[start:stop]
            hidden_rF = torch.mm(x_TD.index_select(0, token), gate_up_NFD[expert].t(), out=hidden_RF[start:stop])
            gate_rH, up_rH = hidden_rF.chunk(2, dim=-1)
            y_rD = F.silu(gate_rH).mul_(up_rH) @ down_NHD[expert]
            y_TD.index_add_(0, token, y_rD.mul_(weights_R[start:stop, None]))
        ctx.save_for_backward(x_TD, weights_R, gate_up_NFD, down_NHD, token_R, hidden_RF)
        ctx.bounds = bounds
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        x_TD, weights_R, gate_up_NFD, down_NHD, token_R, hidden_RF = ctx.saved_tensors
        grad_x_TD, grad_weights_R = torch.zeros_like(x_TD), torch.zeros_like(weights_R)
        grad_gate_up_NFD, grad_down_NHD = torch.zeros_like(gate_up_NFD), torch.zeros_like(down_NHD)
        for expert, start, stop in ctx.bounds:
            token, weight_r1 = token_R[start:stop], weights_R[start:stop, None]
            gate_rH, up_rH = hidden_RF[start:stop].chunk(2, dim=-1)
            sigmoid_rH = torch.sigmoid(gate_rH)
            silu_rH = gate_rH * sigmoid_rH
            act_rH = silu_rH * up_rH
            grad_rD = grad_TD.index_select(0, token)
            grad_act_rH = grad_rD @ down_NHD[expert].t()
            torch.sum(act_rH * grad_act_rH, dim=1, out=grad_weights_R[start:stop])
            torch.mm(act_rH.mul_(weight_r1).t(), grad_rD, out=grad_down_NHD[expert])
            grad_act_rH.mul_(weight_r1)
            # d silu(g) / dg = sigmoid(g) + silu(g) * (1 - sigmoid(g))
            grad_gate_rH = (1 - sigmoid_rH).mul_(silu_rH).add_(sigmoid_rH).mul_(up_rH).mul_(grad_act_rH)
            grad_hidden_rF = torch.cat((grad_gate_rH, silu_rH.mul_(grad_act_rH)), dim=1)
            torch.mm(grad_hidden_rF.t(), x_TD.index_select(0, token), out=grad_gate_up_NFD[expert])
            grad_x_TD.index_add_(0, token, grad_hidden_rF @ gate_up_NFD[expert])
        return grad_x_TD, grad_weights_R, grad_gate_up_NFD, grad_down_NHD, None, None


def _bounds(ends_N: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first slot, one past the last slot) of every expert with slots. On a CPU this reads memory, no device."""
    ends = ends_N.tolist()
    return [(expert, start, stop) for expert, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)) if stop > start]
