"""Proves the expert kernels: `grouped_mlp` against a loop over tokens, in plain torch, through the
kernel that is compiled for this CPU, and on torch's grouped GEMM (what a GPU runs), and the
shared experts."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from torch import Tensor
from torch.nn import functional as F

from emotrain.kernels import SortedSlots, cpu_grouped_mlp, grouped_mlp, sort_slots
from emotrain.kernels.grouped_mm import grouped_mm_mlp
from emotrain.model.moe import SharedExperts

NUM_EXPERTS, WIDTH, HIDDEN, CHOSEN = 5, 8, 16, 3
"""Widths are multiples of 16 bytes in every type, which grouped_mm asks of rows."""
CPU_WIDTH, CPU_HIDDEN = 96, 32
"""Multiples of 32, which the CPU's kernel asks of both."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def oracle(
    x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_NFD: Tensor, down_NHD: Tensor
) -> Tensor:
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
    return torch.where(
        torch.rand(num_tokens, CHOSEN) < 0.4, NUM_EXPERTS, distinct_choices(num_tokens)
    )


CASES = {
    "random": lambda: distinct_choices(20),
    "one token": lambda: distinct_choices(1),
    "all to one expert": lambda: torch.tensor([[2, NUM_EXPERTS, NUM_EXPERTS]] * 20),
    "first and last experts empty": lambda: torch.tensor([[1, 2, 3], [3, 1, 2]] * 5),
    "empty slots": lambda: with_empty_slots(20),
    "tokens without a slot": lambda: torch.cat(
        [torch.full((4, CHOSEN), NUM_EXPERTS), distinct_choices(6)]
    ),
    "nothing routed": lambda: torch.full((4, CHOSEN), NUM_EXPERTS),
}


def arguments(
    experts_TK: Tensor, dtype: torch.dtype, width: int = WIDTH, hidden: int = HIDDEN
) -> list[Tensor]:
    """x, weights and both banks as leaves with gradient; weights of empty slots are 0."""
    num_tokens = experts_TK.shape[0]
    weights_TK = torch.where(
        experts_TK < NUM_EXPERTS, torch.rand(num_tokens, CHOSEN, dtype=dtype), 0
    )
    tensors = [
        torch.randn(num_tokens, width, dtype=dtype),
        weights_TK,
        torch.randn(NUM_EXPERTS, 2 * hidden, width, dtype=dtype) * width**-0.5,
        torch.randn(NUM_EXPERTS, hidden, width, dtype=dtype) * hidden**-0.5,
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def slots_of(experts_TK: Tensor) -> SortedSlots:
    return sort_slots(experts_TK, NUM_EXPERTS)


def run_grouped_mm(
    x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor
) -> Tensor:
    """The path of a GPU; grouped_mm runs on a CPU too."""
    return grouped_mm_mlp(
        x_TD, weights_TK.reshape(-1)[slots.slot_R].to(x_TD.dtype), slots, gate_up_NFD, down_NHD
    )


def run_cpu_kernel(
    x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor
) -> Tensor:
    """The path of a CPU with a C++ compiler, whatever the size."""
    assert cpu_grouped_mlp.supports(x_TD, weights_TK, gate_up_NFD, down_NHD)
    return cpu_grouped_mlp.grouped_mlp_cpu(
        x_TD, weights_TK, slots.token_R, slots.slot_R, slots.ends_N, gate_up_NFD, down_NHD
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's kernel, compiled once for this file in a folder of its own."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    cpu_grouped_mlp.library.cache_clear()
    assert cpu_grouped_mlp.library() is not None
    yield
    cpu_grouped_mlp.library.cache_clear()


@pytest.fixture
def uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where the kernel will be, still empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_grouped_mlp.library.cache_clear()
    yield tmp_path / "emotrain"
    cpu_grouped_mlp.library.cache_clear()


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
        for ours, theirs in zip(
            gradients(y_TD, leaves), gradients(expected_TD, leaves), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"nothing routed"}))
def test_grouped_gemm_path_agrees_with_the_loop_path(
    case: str, dtype: torch.dtype, tolerance: float
) -> None:
    experts_TK = CASES[case]()
    leaves = arguments(experts_TK, dtype)
    slots = slots_of(experts_TK)
    y_TD, expected_TD = (
        path(*leaves[:2], slots, *leaves[2:]) for path in (run_grouped_mm, grouped_mlp)
    )
    assert y_TD.dtype == dtype
    for ours, theirs in zip(
        [y_TD, *gradients(y_TD, leaves)],
        [expected_TD, *gradients(expected_TD, leaves)],
        strict=True,
    ):
        torch.testing.assert_close(
            ours, theirs, atol=tolerance * max(1.0, theirs.abs().max().item()), rtol=0
        )


class _Poison(torch.autograd.Function):
    """NaN in the rows after the last group: of the value on the way forward, or of the gradient
    on the way back."""

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
            grad[ctx.stop :] = torch.nan
        return grad, None, None


@pytest.mark.parametrize("path", [grouped_mlp, run_grouped_mm, run_cpu_kernel])
def test_nothing_unused_reaches_the_result_or_a_gradient(
    path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the weights of empty slots, in tokens without a slot, in idle experts, and in every
    row that grouped_mm leaves unwritten in its result and in the gradient of its input."""
    grouped_mm = F.grouped_mm

    def poisoned(a_RD: Tensor, b_NDF: Tensor, offs: Tensor) -> Tensor:
        stop = int(offs[-1])
        return _Poison.apply(
            grouped_mm(_Poison.apply(a_RD, stop, False), b_NDF, offs=offs), stop, True
        )

    monkeypatch.setattr(F, "grouped_mm", poisoned)
    if path is run_cpu_kernel:
        request.getfixturevalue("compiled")
    experts_TK = with_empty_slots(20)
    experts_TK[experts_TK == 3] = NUM_EXPERTS
    experts_TK[7] = NUM_EXPERTS
    leaves = arguments(experts_TK, torch.float32, CPU_WIDTH, CPU_HIDDEN)
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
    assert torch.autograd.gradcheck(
        lambda *leaves: grouped_mlp(leaves[0], leaves[1], slots, *leaves[2:]),
        (x_TD, weights_TK, gate_up_NFD, down_NHD),
    )


def test_grouped_mm_needs_rows_of_sixteen_bytes() -> None:
    """The rule of torch's grouped GEMM that the CPU path does not have: why widths of 6 train on
    a CPU only."""
    with pytest.raises(RuntimeError, match="16 bytes"):
        F.grouped_mm(
            torch.randn(4, 6), torch.randn(2, 6, 6), offs=torch.tensor([2, 4], dtype=torch.int32)
        )


# ---- the kernel for this CPU


def assert_near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            our, their, atol=2e-6 * max(1.0, their.abs().max().item()), rtol=1e-5
        )


def results(path, leaves: list[Tensor], experts_TK: Tensor) -> list[Tensor]:
    y_TD = path(*leaves[:2], slots_of(experts_TK), *leaves[2:])
    return [y_TD.detach(), *gradients(y_TD, leaves)]


@pytest.mark.parametrize("width, hidden", [(32, 32), (CPU_WIDTH, CPU_HIDDEN), (64, 160)])
@pytest.mark.parametrize("case", CASES)
def test_cpu_kernel_agrees_with_the_oracle(
    case: str, width: int, hidden: int, compiled: None
) -> None:
    experts_TK = CASES[case]()
    leaves = arguments(experts_TK, torch.float32, width, hidden)
    ours = results(run_cpu_kernel, leaves, experts_TK)
    if (experts_TK == NUM_EXPERTS).all():
        assert not any(tensor.any() for tensor in ours)
        return
    expected_TD = oracle(*leaves[:2], experts_TK, *leaves[2:])
    assert_near(ours, [expected_TD, *gradients(expected_TD, leaves)])


def test_cpu_kernel_gives_the_same_bits_on_any_number_of_threads(
    compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of up to 300 rows in chunks of 24: many chunks add to the same tokens and the same
    weights."""
    monkeypatch.setattr(cpu_grouped_mlp, "CHUNK_ROWS", 24)
    experts_TK = with_empty_slots(300)
    experts_TK[:, 0] = 2
    leaves = arguments(experts_TK, torch.float32, CPU_WIDTH, CPU_HIDDEN)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(results(run_cpu_kernel, leaves, experts_TK))
    finally:
        torch.set_num_threads(before)
    assert_near(found[0], results(grouped_mlp, leaves, experts_TK))
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))


def test_cpu_kernel_saturates_and_propagates_as_torch_does(compiled: None) -> None:
    """Gates of +-100 and more, where exp leaves the range of float32, and a token that is not a
    number."""
    experts_TK = distinct_choices(20)
    leaves = arguments(experts_TK, torch.float32, CPU_WIDTH, CPU_HIDDEN)
    with torch.no_grad():
        leaves[0][:10] *= 100
    assert_near(
        results(run_cpu_kernel, leaves, experts_TK), results(grouped_mlp, leaves, experts_TK)
    )
    with torch.no_grad():
        leaves[0][3] = torch.nan
    y_TD = run_cpu_kernel(*leaves[:2], slots_of(experts_TK), *leaves[2:])
    assert y_TD.isnan().any(dim=1).nonzero().flatten().tolist() == [3] and y_TD[3].isnan().all()


def test_cpu_kernel_takes_operands_that_are_not_contiguous(compiled: None) -> None:
    experts_TK = distinct_choices(20)
    leaves = arguments(experts_TK, torch.float32, CPU_WIDTH, CPU_HIDDEN)
    turned = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in leaves]
    assert not turned[0].is_contiguous()
    for ours, theirs in zip(
        results(run_cpu_kernel, turned, experts_TK),
        results(run_cpu_kernel, leaves, experts_TK),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_only_large_float32_calls_left_to_auto_ask_for_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is compiled for a small model, another type, widths that no panel divides, or a
    backend asked for by name."""
    asked = []
    monkeypatch.setattr(cpu_grouped_mlp, "library", lambda: asked.append(True))
    experts_TK = distinct_choices(20)

    def ask(
        dtype: torch.dtype = torch.float32, width: int = CPU_WIDTH, backend: str = "auto"
    ) -> bool:
        asked.clear()
        leaves = arguments(experts_TK, dtype, width, CPU_HIDDEN)
        grouped_mlp(*leaves[:2], slots_of(experts_TK), *leaves[2:], backend=backend)
        return bool(asked)

    assert not ask()
    monkeypatch.setattr(
        cpu_grouped_mlp, "WORTH_COMPILING", experts_TK.numel() * CPU_WIDTH * CPU_HIDDEN
    )
    assert ask()
    assert not any(
        [ask(torch.bfloat16), ask(torch.float64), ask(width=CPU_WIDTH + 8), ask(backend="torch")]
    )


@pytest.mark.parametrize("compiler", [None, "/bin/false"])
def test_without_the_kernel_torch_runs_and_the_log_says_so_once(
    compiler: str | None,
    uncompiled: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a compiler, and with one that fails."""
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    monkeypatch.setattr(cpu_grouped_mlp, "WORTH_COMPILING", 0)
    experts_TK = distinct_choices(20)
    leaves = arguments(experts_TK, torch.float32, CPU_WIDTH, CPU_HIDDEN)
    with caplog.at_level(logging.WARNING, "emotrain"):
        ours, again = (results(grouped_mlp, leaves, experts_TK) for _ in range(2))
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "experts run in torch"
    ]
    expected = results(
        lambda *operands: grouped_mlp(*operands, backend="torch"), leaves, experts_TK
    )
    for first, second, third in zip(ours, again, expected, strict=True):
        assert torch.equal(first, third) and torch.equal(second, third)


def test_processes_that_compile_at_once_end_with_one_library(uncompiled: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=lambda: sys.exit(cpu_grouped_mlp.library() is None))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.suffix for path in uncompiled.iterdir()] == [".so"]


# ---- shared experts


def shared_experts(shared: int) -> SharedExperts:
    experts = SharedExperts(
        tiny_config(
            model__experts__routed=NUM_EXPERTS,
            model__experts__shared=shared,
            model__experts__top_k=2,
        ).model
    )
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    return experts.double()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shared", [1, 3])
def test_shared_experts_are_the_sum_of_each_alone(shared: int, weighted: bool) -> None:
    experts, x_TD = shared_experts(shared), torch.randn(6, 16, dtype=torch.float64)
    weights_TM = torch.rand(6, shared, dtype=torch.float64) if weighted else None
    expected_TD = torch.zeros_like(x_TD)
    for expert, (gate_up_FD, down_HD) in enumerate(
        zip(experts.gate_up_MFD, experts.down_MHD, strict=True)
    ):
        gate_TH, up_TH = (x_TD @ gate_up_FD.T).chunk(2, dim=-1)
        weight_T1 = 1 if weights_TM is None else weights_TM[:, expert, None]
        expected_TD = expected_TD + weight_T1 * ((F.silu(gate_TH) * up_TH) @ down_HD)
    torch.testing.assert_close(experts(x_TD, weights_TM), expected_TD)
