"""Proves RMSNorm, rotary positions and SwiGLU: the twins by their formulas and gradcheck, the
Triton kernels against the twins in the interpreter, and what each keeps for backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from triton_interpreter import backwards, poisoned_memory  # noqa: F401

from emotrain.errors import UserError
from emotrain.kernels import rms_norm, rotate_heads, swiglu_down, triton_rowwise
from emotrain.kernels.rowwise import InTorch

assert triton_interpreter.triton.knobs.runtime.interpret

EPS = 1e-5
Work = Callable[[str], list[Tensor]]


def angles(length: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length)[:, None] * 10.0 ** -torch.linspace(0, 2, pairs)
    return angle.cos(), angle.sin()


def solved(outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Results, and the gradients of the leaves under a cotangent without symmetry."""
    slopes = [torch.linspace(-1, 1.5, y.numel()).view_as(y).to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, slopes)]


def norm(rows: int, width: int, dtype: torch.dtype) -> Work:
    x_TD = torch.randn(rows, width).mul_(3).to(dtype).requires_grad_()
    weight_D = (torch.rand(width) + 0.5).to(dtype).requires_grad_()
    leaves = (x_TD, weight_D)
    return lambda backend: solved((rms_norm(*leaves, EPS, backend),), leaves)


def rotary(batch: int, length: int, heads: tuple[int, int], pairs: int, dtype: torch.dtype) -> Work:
    width = (heads[0] + 2 * heads[1]) * 2 * pairs
    x_BSF = torch.randn(batch, length, width).to(dtype).requires_grad_()
    table = angles(length, pairs)
    # Of something that needs no result, as a projection needs none.
    return lambda backend: solved(rotate_heads(x_BSF + 0, *table, *heads, backend), (x_BSF,))


def swiglu(rows: int, experts: int, hidden: int, dtype: torch.dtype) -> Work:
    hidden_TMF = torch.randn(rows, experts, 2 * hidden).mul_(2).to(dtype).requires_grad_()
    down_XD = torch.randn(experts * hidden, 6).to(dtype).requires_grad_()
    leaves = (hidden_TMF, down_XD)
    return lambda backend: solved((swiglu_down(*leaves, backend),), leaves)


def check(work: Work, tolerance: float) -> None:
    for ours, theirs in zip(work("triton"), work("torch"), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = max(theirs.abs().max().item(), 1) if theirs.numel() else 1
        torch.testing.assert_close(ours, theirs, atol=tolerance * scale, rtol=0)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


# ---- the twins


def test_the_norm_is_its_formula() -> None:
    x_TD, weight_D = torch.randn(7, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    for x_D, y_D in zip(x_TD, rms_norm(x_TD, weight_D, EPS), strict=True):
        rms = math.sqrt(sum(float(value) ** 2 for value in x_D) / 5 + EPS)
        torch.testing.assert_close(y_D, x_D / rms * weight_D)


def test_queries_and_keys_turn_and_values_do_not() -> None:
    """As products in the complex plane, token by token."""
    x_BSF = torch.randn(2, 6, 4 * 8, dtype=torch.float64)
    cos, sin = angles(6, 4)
    parts = rotate_heads(x_BSF.clone(), cos, sin, 2, 1)
    heads_BSAC = x_BSF.view(2, 6, 4, 8)
    for part, given_BSAC in zip(parts[:2], heads_BSAC.split((2, 1, 1), dim=2)[:2], strict=True):
        for token in range(6):
            pairs = torch.complex(given_BSAC[:, token, :, :4], given_BSAC[:, token, :, 4:])
            pairs = pairs * torch.complex(cos[token].double(), sin[token].double())
            torch.testing.assert_close(part[:, token], torch.cat((pairs.real, pairs.imag), -1))
    assert torch.equal(parts[2], heads_BSAC[:, :, 3:])


def test_swiglu_is_its_formula() -> None:
    hidden_TMF, down_XD = torch.randn(5, 2, 6), torch.randn(6, 4)
    gate, up = hidden_TMF.chunk(2, dim=-1)
    wanted = (F.silu(gate) * up).flatten(1) @ down_XD
    torch.testing.assert_close(swiglu_down(hidden_TMF, down_XD), wanted)


def test_gradcheck_of_the_twins() -> None:
    def leaf(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, requires_grad=True)

    cos, sin = (part.double() for part in angles(4, 3))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (leaf(2, 3, 5), leaf(5)))
    assert torch.autograd.gradcheck(
        lambda x: rotate_heads(x + 0, cos, sin, 2, 1), (leaf(2, 4, 4 * 6),)
    )
    assert torch.autograd.gradcheck(swiglu_down, (leaf(4, 2, 6), leaf(6, 3)))


def test_bfloat16_is_rounded_once() -> None:
    """Arithmetic on bfloat16 is in fp32: the result is that of the wide operands, rounded."""
    x_TD, weight_D = torch.randn(9, 40).bfloat16(), torch.rand(40).bfloat16()
    wide = rms_norm(x_TD.float(), weight_D.float(), EPS)
    assert torch.equal(rms_norm(x_TD, weight_D, EPS), wide.bfloat16())
    x_BSF, table = torch.randn(1, 9, 3 * 8).bfloat16(), angles(9, 4)
    wide_parts = rotate_heads(x_BSF.float(), *table, 1, 1)
    for ours, theirs in zip(rotate_heads(x_BSF, *table, 1, 1), wide_parts, strict=True):
        assert torch.equal(ours, theirs.bfloat16())


# ---- the kernels


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(5, 40), (33, 128), (2, 9000), (700, 8), (0, 16)])
def test_the_norm_agrees_with_its_twin(
    rows: int, width: int, dtype: torch.dtype, poisoned_memory: None  # noqa: F811
) -> None:  # fmt: skip
    torch.manual_seed(0)
    check(norm(rows, width, dtype), TOLERANCE[dtype])


def test_each_row_of_a_norm_has_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than programs, in steps of several rows, the last step cut."""
    monkeypatch.setattr(triton_rowwise, "PARTIAL_SUMS", 3)
    monkeypatch.setattr(triton_rowwise, "NORM_ELEMENTS", 64)
    torch.manual_seed(0)
    for rows in (1, 23, 24, 25, 37):
        check(norm(rows, 30, torch.float32), 1e-5)


@DTYPES
@pytest.mark.parametrize(
    ("batch", "length", "heads", "pairs"),
    [(2, 20, (2, 2), 4), (1, 5, (4, 1), 6), (3, 17, (1, 1), 64), (0, 4, (1, 1), 4)],
)
def test_rotation_agrees_with_its_twin(
    batch: int, length: int, heads: tuple[int, int], pairs: int, dtype: torch.dtype,
    poisoned_memory: None,  # noqa: F811
) -> None:  # fmt: skip
    torch.manual_seed(0)
    check(rotary(batch, length, heads, pairs, dtype), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("rows", "experts", "hidden"), [(5, 1, 40), (9, 2, 600), (0, 1, 8)])
def test_swiglu_agrees_with_its_twin(
    rows: int, experts: int, hidden: int, dtype: torch.dtype, poisoned_memory: None  # noqa: F811
) -> None:  # fmt: skip
    torch.manual_seed(0)
    check(swiglu(rows, experts, hidden, dtype), TOLERANCE[dtype])


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_shape_agrees(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    check(norm(rows, width, dtype), TOLERANCE[dtype])
    check(swiglu(rows, 1 + seed % 3, width, dtype), TOLERANCE[dtype])
    check(rotary(1 + seed % 2, rows, (2, 1), width, dtype), TOLERANCE[dtype])


def test_the_same_bits_in_any_order(request: pytest.FixtureRequest) -> None:
    work = norm(600, 40, torch.float32)
    once = work("triton")
    request.getfixturevalue("backwards")
    for first, second in zip(once, work("triton"), strict=True):
        assert torch.equal(first, second)


def test_gradients_of_any_strides_are_read_as_they_are() -> None:
    """Attention returns gradients of heads in another order of memory."""
    x_BSF, table = torch.randn(2, 5, 4 * 8, requires_grad=True), angles(5, 4)
    results = []
    for backend in ("triton", "torch"):
        parts = rotate_heads(x_BSF + 0, *table, 2, 1, backend)
        slopes = [torch.linspace(0, 1, p.numel()).view(2, p.shape[2], 5, 8) for p in parts]
        slopes = [slope.transpose(1, 2) for slope in slopes]
        results.append(torch.autograd.grad(parts, x_BSF, slopes)[0])
    torch.testing.assert_close(*results)


def test_what_a_kernel_cannot_read_is_refused() -> None:
    with pytest.raises(AssertionError, match="rows lie side by side"):
        rotate_heads(torch.randn(2, 6, 24)[:, :5], *angles(5, 4), 1, 1, "triton")
    with pytest.raises(UserError, match="supports bfloat16 and float32, not float64"):
        rms_norm(torch.randn(2, 4).double(), torch.ones(4).double(), EPS, "triton")


# ---- what is kept


def kept_by(work: Callable[[], object]) -> list[Tensor]:
    """Tensors that `work` keeps for backward."""
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = work()
    assert result is not None
    return kept


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operands_are_kept_as_they_came(backend: str) -> None:
    x_TD = torch.randn(6, 16).bfloat16().requires_grad_()
    weight_D = torch.ones(16).bfloat16().requires_grad_()
    kept = kept_by(lambda: rms_norm(x_TD, weight_D, EPS, backend))
    assert [t.data_ptr() for t in kept[:2]] == [x_TD.data_ptr(), weight_D.data_ptr()]
    assert [(t.numel(), t.dtype) for t in kept[2:]] == [(6, torch.float32)]

    x_BSF, (cos, sin) = torch.randn(1, 6, 24).bfloat16().requires_grad_(), angles(6, 4)
    qkv_BSF = x_BSF + 0
    parts: list[Tensor] = []
    kept = kept_by(lambda: parts.extend(rotate_heads(qkv_BSF, cos, sin, 1, 1, backend)) or parts)
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]
    storages = {part.untyped_storage().data_ptr() for part in parts}
    assert storages == {qkv_BSF.untyped_storage().data_ptr()}

    hidden_TF = torch.randn(6, 16).bfloat16().requires_grad_()
    down_XD = torch.randn(8, 4).bfloat16().requires_grad_()
    kept = kept_by(lambda: swiglu_down(hidden_TF, down_XD, backend))
    assert [t.data_ptr() for t in kept] == [hidden_TF.data_ptr(), down_XD.data_ptr()]


def test_what_torch_compile_reads_is_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Triton was asked for: it makes its own kernels of it, and without a break."""
    from emotrain.kernels import rowwise

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert rowwise._passes("triton", torch.ones(2)) is InTorch
