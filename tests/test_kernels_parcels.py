"""Proves what travels between ranks: where parcels go and what is in them against a loop, gradients
as the adjoint of what left, and the Triton kernels, in the interpreter, against their twins to the
bit. And the sort of slots by counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import backwards, poisoned_memory  # noqa: F401

from emotrain.kernels.parcels import (
    ParcelLayout,
    Spread,
    combine,
    destinations,
    pack,
    spread_rows,
    unpack_gradients,
)
from emotrain.kernels.slots import sort_slots

assert triton_interpreter.triton.knobs.runtime.interpret

BACKENDS = ("torch", "triton")


def choices(num_tokens: int, num_chosen: int, num_experts: int, empty: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    liked_TN = torch.rand(num_tokens, num_experts, generator=generator)
    experts_TK = liked_TN.argsort(dim=1)[:, :num_chosen]
    is_empty_TK = torch.rand(num_tokens, num_chosen, generator=generator) < empty
    return experts_TK.masked_fill(is_empty_TK, num_experts)


def everything(
    backend: str, experts_TK: Tensor, spread: Spread, width: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """All that happens to the tokens of one rank, there and back, and to their gradients."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x_TD, weights_TK = normal(len(experts_TK), width), torch.rand(experts_TK.shape).abs()
    weights_TK = (weights_TK + 0.1).to(torch.promote_types(dtype, torch.float32))
    position_TW, send_W2 = destinations(experts_TK, spread, backend)
    num_parcels = int(send_W2[:, 0].sum())
    layout = ParcelLayout.of(x_TD, weights_TK, spread.per_rank)
    parcels_OB = pack(
        x_TD, weights_TK, experts_TK, position_TW, num_parcels, layout, spread, backend
    )
    back = layout.of_gradients
    gradients_OB = back.empty(x_TD, num_parcels)
    back.rows(gradients_OB).copy_(normal(num_parcels, width))
    back.weights(gradients_OB).copy_(normal(num_parcels, experts_TK.shape[1]))
    grad_x_TD, grad_weights_TK = unpack_gradients(
        gradients_OB, experts_TK, position_TW, back, spread, backend
    )
    return {
        "position": position_TW,
        "send": send_W2,
        "rows": layout.rows(parcels_OB),
        "weights": layout.weights(parcels_OB),
        "choices": layout.choices(parcels_OB).long(),
        "sums": combine(normal(num_parcels, width), position_TW, backend),
        "spread rows": spread_rows(x_TD, position_TW, num_parcels, backend),
        "grad x": grad_x_TD,
        "grad weights": grad_weights_TK,
        "sent x": x_TD,
        "sent weights": weights_TK,
        "row gradients": back.rows(gradients_OB),
        "weight gradients": back.weights(gradients_OB),
    }


def check(experts_TK: Tensor, spread: Spread, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = everything("triton", experts_TK, spread, width, dtype)
    torch.manual_seed(0)
    theirs = everything("torch", experts_TK, spread, width, dtype)
    for name, our in ours.items():
        their = theirs[name]
        assert our.dtype == their.dtype and our.shape == their.shape, name
        if name in ("sums", "grad x") and dtype == torch.bfloat16:
            # The kernel adds in float32, the twin in bfloat16.
            torch.testing.assert_close(our, their, rtol=2e-2, atol=5e-2)
        else:
            assert torch.equal(our, their), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_parcels_are_what_the_loop_says(backend: str) -> None:
    spread = Spread(num_experts=7, num_ranks=3, per_rank=3)
    experts_TK = choices(9, 3, 7, 0.3, seed=2)
    experts_TK[4] = 7  # a token without an expert
    got = everything(backend, experts_TK, spread, 5, torch.float32)
    wanted, slots = [], []
    for rank in range(3):
        slots.append(0)
        for token, experts in enumerate(experts_TK.tolist()):
            local = [e - 3 * rank if e < 7 and e // 3 == rank else 3 for e in experts]
            if local != [3, 3, 3]:
                wanted.append((token, rank, local))
                slots[rank] += sum(choice < 3 for choice in local)
    sent = [sum(parcel[1] == rank for parcel in wanted) for rank in range(3)]
    assert got["send"].tolist() == [list(pair) for pair in zip(sent, slots, strict=True)]
    for number, (token, rank, local) in enumerate(wanted):
        assert got["position"][token, rank] == number
        assert torch.equal(got["rows"][number], got["sent x"][token])
        assert got["choices"][number].tolist() == local
        weights = [
            w if c < 3 else 0.0
            for w, c in zip(got["sent weights"][token].tolist(), local, strict=True)
        ]
        assert got["weights"][number].tolist() == weights
    assert len(got["rows"]) == len(wanted) and (got["position"] >= 0).sum() == len(wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_adjoint_of_what_left(backend: str) -> None:
    """<what left, a gradient> = <what was there, what comes of the gradient>, both for rows and
    for weights."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    spread, experts_TK = Spread(7, 2, 4), choices(20, 3, 7, 0.2, seed=3)
    got = everything(backend, experts_TK, spread, 6, dtype)
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-12} if backend == "torch" else {"rtol": 1e-4, "atol": 1e-4}
    )
    for left, gradient, there, came in (
        ("rows", "row gradients", "sent x", "grad x"),
        ("weights", "weight gradients", "sent weights", "grad weights"),
    ):
        torch.testing.assert_close(
            (got[left] * got[gradient]).sum(), (got[there] * got[came]).sum(), **tolerance
        )
    assert (got["grad weights"][experts_TK == 7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "num_chosen", "spread", "empty", "width"),
    [
        (40, 3, Spread(7, 2, 4), 0.2, 40),
        (33, 7, Spread(127, 8, 16), 0.0, 300),
        (300, 2, Spread(8, 4, 2), 0.1, 16),  # several blocks of tokens
        (5, 3, Spread(6, 2, 3), 1.0, 16),
        (0, 2, Spread(6, 2, 3), 0.0, 16),
        (3, 1, Spread(3, 3, 1), 0.0, 257),
    ],
    ids=str,
)
def test_kernels_agree_with_the_twins(
    num_tokens: int,
    num_chosen: int,
    spread: Spread,
    empty: float,
    width: int,
    dtype: torch.dtype,
    poisoned_memory: None,  # noqa: F811
) -> None:
    check(choices(num_tokens, num_chosen, spread.num_experts, empty, 0), spread, width, dtype)


@given(
    num_tokens=st.integers(1, 50),
    num_chosen=st.integers(1, 4),
    num_ranks=st.integers(1, 4),
    empty=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_choices_agree(
    num_tokens: int, num_chosen: int, num_ranks: int, empty: float, seed: int
) -> None:
    experts_TK = choices(num_tokens, num_chosen, 9, empty, seed)
    check(experts_TK, Spread(9, num_ranks, -(-9 // num_ranks)), 24, torch.float32)


def test_parts_of_a_parcel_lie_apart_and_where_a_sector_begins() -> None:
    for width, chosen, per_rank, dtype in (
        (2048, 7, 16, torch.bfloat16),
        (33, 3, 300, torch.float32),
        (5, 2, 4, torch.float64),
    ):
        weights = torch.promote_types(dtype, torch.float32)
        layout = ParcelLayout.of(
            torch.empty(1, width, dtype=dtype), torch.empty(1, chosen, dtype=weights), per_rank
        )
        parcels = torch.zeros(3, layout.num_bytes, dtype=torch.uint8)
        parts = layout.rows(parcels), layout.weights(parcels), layout.choices(parcels)
        for number, part in enumerate(parts, start=1):
            part.fill_(number)
        assert [part.unique().tolist() for part in parts] == [[1], [2], [3]]
        assert layout.num_bytes % 32 == 0 and layout.of_gradients.num_bytes <= layout.num_bytes
    # 35 bytes of weights and choices go with a published row, in 64.
    published = ParcelLayout(2048, 7, torch.bfloat16, torch.float32, torch.uint8)
    assert published.choices_at + 7 == 4096 + 35 and published.num_bytes == 4096 + 64


# ---- slots by experts


def sorted_by(backend: str, experts_TK: Tensor, num_experts: int) -> dict[str, Any]:
    slots = sort_slots(experts_TK, num_experts, backend=backend)
    return {"token": slots.token_R, "slot": slots.slot_R, "ends": slots.ends_N} | (
        {"position": slots.position_R} if slots.position_R is not None else {}
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_tokens", "num_chosen", "num_experts", "empty"),
    [(20, 3, 5, 0.3), (800, 3, 127, 0.1), (700, 2, 3, 0.0), (4, 2, 6, 1.0), (0, 2, 4, 0.0)],
)
def test_slots_are_sorted_as_the_loop_says(
    num_tokens: int,
    num_chosen: int,
    num_experts: int,
    empty: float,
    backend: str,
    poisoned_memory: None,  # noqa: F811
) -> None:
    experts_TK = choices(num_tokens, num_chosen, num_experts, empty, seed=4)
    flat = experts_TK.reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda slot: flat[slot])
    ends = [sum(e <= expert for e in flat) for expert in range(num_experts)]
    got = sorted_by(backend, experts_TK, num_experts)
    assert got["slot"].tolist() == order
    assert got["token"].tolist() == [slot // num_chosen for slot in order]
    assert got["ends"].tolist() == ends
    if backend == "triton":
        wanted = [
            order.index(slot) if expert < num_experts else -1 for slot, expert in enumerate(flat)
        ]
        assert got["position"].tolist() == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_choices_of_a_parcel_are_sorted_where_they_lie(backend: str) -> None:
    """Bytes a stride apart; whatever is no expert of this rank is an empty slot."""
    parcels = torch.full((30, 32), 9, dtype=torch.uint8)
    choices_IK = parcels[:, 4:7].copy_(choices(30, 3, 4, 0.3, seed=5))
    experts_IK = choices_IK.long()
    # The last rank holds 3 experts where others hold 4.
    for ours, wanted in zip(
        sorted_by(backend, choices_IK, 3).values(),
        sorted_by(backend, experts_IK.clamp(max=3), 3).values(),
        strict=True,
    ):
        assert torch.equal(ours, wanted)


def test_the_same_bits_in_any_order(request: pytest.FixtureRequest) -> None:
    spread, experts_TK = Spread(9, 4, 3), choices(300, 3, 9, 0.1, seed=6)
    # Choices may lie in any order in memory.
    experts_TK = experts_TK.t().contiguous().t()

    def all_of_it() -> list[Tensor]:
        torch.manual_seed(0)
        got = everything("triton", experts_TK, spread, 40, torch.float32)
        return [*got.values(), *sorted_by("triton", experts_TK, 9).values()]

    once = all_of_it()
    request.getfixturevalue("backwards")
    for first, second in zip(once, all_of_it(), strict=True):
        assert torch.equal(first, second)
