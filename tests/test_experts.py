"""Proves the expert kernels: `grouped_mlp` against a loop over tokens, on the CPU's own path and on torch's grouped GEMM
(what a GPU runs), and the shared experts."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_config
from torch import Tensor
from torch.nn import functional as F

from emotrain.kernels import SortedSlots, grouped_mlp, sort_slots
from emotrain.kernels.grouped_mlp import _grouped_mm_mlp
from emotrain.model.experts import SharedExperts

NUM_EXPERTS, WIDTH, HIDDEN, CHOSEN = 5, 8, 16, 3
"""Widths are multiples of 16 bytes in every type, which grouped_mm asks of rows."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def oracle(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_NFD: Tensor, down_NHD: Tensor) -> Tensor:
    """Token by token, choice by choice, differentiable."""
    rows = []
    for x_D, weights_K, experts_K in zip(x_TD, weights_TK, experts_TK.tolist(), strict=True):
        y_D = torch.zeros_like(x_D)
        for weight, expert in zip(weights_K, experts_K, strict=True):
            if expert < gate_up_NFD.shape[0]:
                gate_H, up_H = (gate_up_NFD[expert] @ x_D).chunk(2)
                y_D = y_D + weight * ((F.silu(gate_H) * up_H) @ down_NHD[expert])
        rows.append(y_D)
    return torch.stack(rows)


def distinct_choices(num_tokens: int) -> Tensor:
    return torch.rand(num_tokens, NUM_EXPERTS).argsort(dim=1)[:, :CHOSEN]


def with_empty_slots(num_tokens: int) -> Tensor:
    return torch.where(torch.rand(num_tokens, CHOSEN) < 0.4, NUM_EXPERTS, distinct_choices(num_tokens))


CASES = {
    "random": lambda: distinct_choices(20),
    "one token": lambda: distinct_choices(1),
    "all to one expert": lambda: torch.tensor([[2, NUM_EXPERTS, NUM_EXPERTS]] * 20),
    "first and last experts empty": lambda: torch.tensor([[1, 2, 3], [3, 1, 2]] * 5),
    "empty slots": lambda: with_empty_slots(20),
    "tokens without a slot": lambda: torch.cat([torch.full((4, CHOSEN), NUM_EXPERTS), distinct_choices(6)]),
    "nothing routed": lambda: torch.full((4, CHOSEN), NUM_EXPERTS),
}


def arguments(experts_TK: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """x, weights and both banks as leaves with gradient; weights of empty slots are 0."""
    num_tokens = experts_TK.shape[0]
    weights_TK = torch.where(experts_TK < NUM_EXPERTS, torch.rand(num_tokens, CHOSEN, dtype=dtype), 0)
    tensors = [torch.randn(num_tokens, WIDTH, dtype=dtype), weights_TK, torch.randn(NUM_EXPERTS, 2 * HIDDEN, WIDTH, dtype=dtype) / 3,
               torch.randn(NUM_EXPERTS, HIDDEN, WIDTH, dtype=dtype) / 3]
    return [tensor.requires_grad_() for tensor in tensors]


def slots_of(experts_TK: Tensor) -> SortedSlots:
    return sort_slots(experts_TK, torch.bincount(experts_TK.flatten(), minlength=NUM_EXPERTS + 1)[:NUM_EXPERTS])


def run_grouped_mm(x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor) -> Tensor:
    """The path of a GPU; grouped_mm runs on a CPU too."""
    return _grouped_mm_mlp(x_TD, weights_TK.reshape(-1)[slots.slot_R].to(x_TD.dtype), slots, gate_up_NFD, down_NHD)


def gradients(y_TD: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    cotangent_TD = torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    return list(torch.autograd.grad(y_TD, leaves, cotangent_TD))


# ---- sorting


def test_slots_are_sorted_by_expert_and_tokens_keep_their_order() -> None:
    slots = slots_of(torch.tensor([[4, 1], [1, 5], [0, 4], [5, 1]]))
    assert slots.token_R.tolist() == [2, 0, 1, 3, 0, 2, 1, 3]
    assert slots.slot_R.tolist() == [4, 1, 2, 7, 0, 5, 3, 6]
    assert slots.ends_N.tolist() == [1, 4, 4, 4, 6]


# ---- the two paths of grouped_mlp


@pytest.mark.parametrize("case", CASES)
def test_loop_path_agrees_with_the_oracle(case: str) -> None:
    experts_TK = CASES[case]()
    leaves = arguments(experts_TK, torch.float64)
    x_TD, weights_TK, gate_up_NFD, down_NHD = leaves
    y_TD = grouped_mlp(x_TD, weights_TK, slots_of(experts_TK), gate_up_NFD, down_NHD)
    expected_TD = oracle(x_TD, weights_TK, experts_TK, gate_up_NFD, down_NHD)
    torch.testing.assert_close(y_TD, expected_TD)
    if (experts_TK < NUM_EXPERTS).any():
        for ours, theirs in zip(gradients(y_TD, leaves), gradients(expected_TD, leaves), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"nothing routed"}))
def test_grouped_gemm_path_agrees_with_the_loop_path(case: str, dtype: torch.dtype, tolerance: float) -> None:
    experts_TK = CASES[case]()
    leaves = arguments(experts_TK, dtype)
    slots = slots_of(experts_TK)
    y_TD, expected_TD = (path(*leaves[:2], slots, *leaves[2:]) for path in (run_grouped_mm, grouped_mlp))
    assert y_TD.dtype == dtype
    for ours, theirs in zip([y_TD, *gradients(y_TD, leaves)], [expected_TD, *gradients(expected_TD, leaves)], strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance * max(1.0, theirs.abs().max().item()), rtol=0)


class _Poison(torch.autograd.Function):
    """NaN in the rows after the last group: of the value on the way forward, or of the gradient on the way back."""

    @staticmethod
    def forward(ctx, rows, stop, poison_value):
        ctx.stop, ctx.poison_gradient = stop, not poison_value
        rows = rows.clone()
        if poison_value:
            rows[stop:] = torch.nan
        return rows

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        if ctx.poison_gradient:
            grad[ctx.stop:] = torch.nan
        return grad, None, None


@pytest.mark.parametrize("path", [grouped_mlp, run_grouped_mm])
def test_nothing_unused_reaches_the_result_or_a_gradient(path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the weights of empty slots, in tokens without a slot, in idle experts, and in every row that grouped_mm
    leaves unwritten in its result and in the gradient of its input."""
    grouped_mm = F.grouped_mm

    def poisoned(a_RD: Tensor, b_NDF: Tensor, offs: Tensor) -> Tensor:
        stop = int(offs[-1])
        return _Poison.apply(grouped_mm(_Poison.apply(a_RD, stop, False), b_NDF, offs=offs), stop, True)

    monkeypatch.setattr(F, "grouped_mm", poisoned)
    experts_TK = with_empty_slots(20)
    experts_TK[experts_TK == 3] = NUM_EXPERTS
    experts_TK[7] = NUM_EXPERTS
    leaves = arguments(experts_TK, torch.float32)
    clean = oracle(leaves[0], leaves[1], experts_TK, *leaves[2:])
    expected = [clean, *gradients(clean, leaves)]
    with torch.no_grad():
        leaves[0][7], leaves[2][3], leaves[3][3] = torch.nan, torch.nan, torch.nan
        leaves[1][experts_TK == NUM_EXPERTS] = torch.nan
    y_TD = path(*leaves[:2], slots_of(experts_TK), *leaves[2:])
    for ours, theirs in zip([y_TD, *gradients(y_TD, leaves)], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_gradcheck() -> None:
    experts_TK = with_empty_slots(4)
    x_TD, weights_TK, gate_up_NFD, down_NHD = arguments(experts_TK, torch.float64)
    slots = slots_of(experts_TK)
    assert torch.autograd.gradcheck(lambda *leaves: grouped_mlp(leaves[0], leaves[1], slots, *leaves[2:]),
                                    (x_TD, weights_TK, gate_up_NFD, down_NHD))


def test_grouped_mm_needs_rows_of_sixteen_bytes() -> None:
    """The rule of torch's grouped GEMM that the CPU path does not have: why widths of 6 train on a CPU only."""
    with pytest.raises(RuntimeError, match="16 bytes"):
        F.grouped_mm(torch.randn(4, 6), torch.randn(2, 6, 6), offs=torch.tensor([2, 4], dtype=torch.int32))


# ---- shared experts


def shared_experts(shared: int) -> SharedExperts:
    experts = SharedExperts(tiny_config(model__experts__count=NUM_EXPERTS + 1, model__experts__shared=shared,
                                        model__experts__per_token=shared + 2).model)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    return experts.double()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shared", [1, 3])
def test_shared_experts_are_the_sum_of_each_alone(shared: int, weighted: bool) -> None:
    experts, x_TD = shared_experts(shared), torch.randn(6, 16, dtype=torch.float64)
    weights_TM = torch.rand(6, shared, dtype=torch.float64) if weighted else None
    expected_TD = torch.zeros_like(x_TD)
    for expert, (gate_up_FD, down_HD) in enumerate(zip(experts.gate_up_MFD, experts.down_MHD, strict=True)):
        gate_TH, up_TH = (x_TD @ gate_up_FD.T).chunk(2, dim=-1)
        weight_T1 = 1 if weights_TM is None else weights_TM[:, expert, None]
        expected_TD = expected_TD + weight_T1 * ((F.silu(gate_TH) * up_TH) @ down_HD)
    torch.testing.assert_close(experts(x_TD, weights_TM), expected_TD)
