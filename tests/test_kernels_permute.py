"""Proves permute and unpermute: their twins by gradcheck and by a loop, their Triton kernels
against the twins in the interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import backwards, poisoned_memory  # noqa: F401

from emotrain.kernels.permute import permute, unpermute
from emotrain.kernels.slots import SortedSlots, sort_slots

assert triton_interpreter.triton.knobs.runtime.interpret

NUM_RANKS = 4


def destinations(num_tokens: int, num_chosen: int, empty: float, seed: int = 0) -> Tensor:
    """Ranks that each token goes to; NUM_RANKS marks an empty slot."""
    generator = torch.Generator().manual_seed(seed)
    ranks_TK = torch.rand(num_tokens, NUM_RANKS, generator=generator).argsort(dim=1)[:, :num_chosen]
    return torch.where(
        torch.rand(num_tokens, num_chosen, generator=generator) < empty, NUM_RANKS, ranks_TK
    )


def slots_of(ranks_TK: Tensor) -> SortedSlots:
    return sort_slots(ranks_TK, NUM_RANKS)


def round_trip(
    x_TD: Tensor, slots: SortedSlots, weights_TK: Tensor | None, backend: str
) -> list[Tensor]:
    """There, something done to the rows, and back: both results and the gradients of the inputs."""
    rows_RD = permute(x_TD, slots, backend)
    factor_R1 = torch.linspace(0.5, 1.5, slots.token_R.shape[0])[: rows_RD.shape[0], None].to(
        rows_RD.dtype
    )
    y_TD = unpermute(rows_RD * factor_R1, slots, x_TD.shape[0], weights_TK, backend)
    cotangent_TD = torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD).to(y_TD.dtype)
    inputs = (x_TD,) if weights_TK is None else (x_TD, weights_TK)
    return [rows_RD, y_TD, *torch.autograd.grad(y_TD, inputs, cotangent_TD)]


def check(
    num_tokens: int, num_chosen: int, empty: float, width: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    ranks_TK = destinations(num_tokens, num_chosen, empty, seed)
    x_TD = torch.randn(num_tokens, width).to(dtype).requires_grad_()
    weights_TK = torch.rand(num_tokens, num_chosen).requires_grad_()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    every = slots_of(ranks_TK)
    few = replace(every, in_use=int(every.ends_N[-1]))
    for slots, weights in itertools.product((every, few), (weights_TK, None)):
        ours, theirs = (
            round_trip(x_TD, slots, weights, backend) for backend in ("triton", "torch")
        )
        for our, their in zip(ours, theirs, strict=True):
            assert our.dtype == their.dtype
            scale = max(their.abs().max().item(), 1) if their.numel() else 1
            torch.testing.assert_close(our, their, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_of_empty_slots_need_not_be_made(weighted: bool, backend: str) -> None:
    slots, x_TD = slots_of(destinations(20, 3, 0.4)), torch.randn(20, 40, requires_grad=True)
    weights_TK = torch.rand(20, 3, requires_grad=True) if weighted else None
    used = int(slots.ends_N[-1])
    every, few = (
        round_trip(x_TD, replace(slots, in_use=known), weights_TK, backend)
        for known in (None, used)
    )
    assert few[0].shape[0] == used < every[0].shape[0]
    for with_all, without in zip(every[1:], few[1:], strict=True):
        assert torch.equal(with_all, without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "num_tokens, num_chosen, empty, width",
    [
        (20, 3, 0.0, 40),
        (20, 3, 0.4, 40),
        (1, 1, 0.0, 8),
        (9, 2, 1.0, 300),
        (33, 4, 0.1, 257),
        (0, 2, 0.0, 16),
    ],
)
def test_kernels_agree_with_the_twins(
    num_tokens: int, num_chosen: int, empty: float, width: int, dtype: torch.dtype
) -> None:
    check(num_tokens, num_chosen, empty, width, dtype, seed=0)


@given(
    num_tokens=st.integers(1, 40),
    num_chosen=st.integers(1, NUM_RANKS),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
    width=st.sampled_from([1, 16, 70]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_destinations_agree(**case) -> None:
    check(**case)


def test_the_twins_say_what_the_loop_says() -> None:
    ranks_TK = destinations(6, 3, 0.3)
    x_TD, weights_TK = torch.randn(6, 5), torch.rand(6, 3)
    slots = slots_of(ranks_TK)
    rows_RD = permute(x_TD, slots, "torch")
    in_order = [
        x_TD[token]
        for rank in range(NUM_RANKS)
        for token in range(6)
        for choice in range(3)
        if ranks_TK[token, choice] == rank
    ]
    assert (
        torch.equal(rows_RD[: len(in_order)], torch.stack(in_order))
        and (rows_RD[len(in_order) :] == 0).all()
    )
    factor_T1 = torch.where(ranks_TK < NUM_RANKS, weights_TK, 0).sum(dim=1, keepdim=True)
    torch.testing.assert_close(unpermute(rows_RD, slots, 6, weights_TK, "torch"), factor_T1 * x_TD)


def test_gradcheck_of_the_twins() -> None:
    slots = slots_of(destinations(5, 3, 0.3))
    x_TD = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    rows_RD = torch.randn(15, 4, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x_TD: permute(x_TD, slots, "torch"), (x_TD,))
    assert torch.autograd.gradcheck(
        lambda rows_RD, weights_TK: unpermute(rows_RD, slots, 5, weights_TK, "torch"),
        (rows_RD, weights_TK),
    )
    assert torch.autograd.gradcheck(
        lambda rows_RD: unpermute(rows_RD, slots, 5, backend="torch"), (rows_RD,)
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_empty_slots_are_neither_read_nor_left_unwritten(
    backend: str,
    poisoned_memory: None,  # noqa: F811
) -> None:
    ranks_TK = destinations(12, 3, 0.4)
    slots = slots_of(ranks_TK)
    used = int(slots.ends_N[-1])
    x_TD = torch.ones(12, 40, requires_grad=True)
    weights_TK = torch.where(ranks_TK < NUM_RANKS, 0.5, torch.nan).requires_grad_()
    rows_RD = permute(x_TD, slots, backend)
    assert (rows_RD[used:] == 0).all()
    poison_RD = torch.where(torch.arange(36)[:, None] < used, 0.0, torch.nan)
    y_TD = unpermute(rows_RD + poison_RD, slots, 12, weights_TK, backend)
    grads = torch.autograd.grad(y_TD, (x_TD, weights_TK), torch.ones(12, 40))
    assert y_TD.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    assert (grads[1][ranks_TK == NUM_RANKS] == 0).all()


def test_the_same_bits_in_any_order(request: pytest.FixtureRequest) -> None:
    slots, x_TD = slots_of(destinations(30, 3, 0.2)), torch.randn(30, 40, requires_grad=True)
    weights_TK = torch.rand(30, 3, requires_grad=True)
    once = round_trip(x_TD, slots, weights_TK, "triton")
    request.getfixturevalue("backwards")
    for first, second in zip(once, round_trip(x_TD, slots, weights_TK, "triton"), strict=True):
        assert torch.equal(first, second)
