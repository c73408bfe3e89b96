"""Proves the Triton kernel of the head's loss in the interpreter: against its twin and against
torch's cross entropy, with what it may not touch and what it has to notice. (The twin itself, its
gradcheck too, is in `test_losses.py`.)"""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from triton_interpreter import backwards, poisoned_memory  # noqa: F401

from emotrain.kernels import HeadGradient, linear_cross_entropy, triton_cross_entropy
from emotrain.kernels.linear_cross_entropy import GPU_BLOCK_BYTES, IGNORE, block_tokens
from emotrain.kernels.triton_cross_entropy import cross_entropy_triton

assert triton_interpreter.triton.knobs.runtime.interpret

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program holds 128 logits at a time in float32 and 256 in bfloat16, and takes several
    turns."""
    monkeypatch.setattr(triton_cross_entropy, "LANES", 32)
    torch.manual_seed(0)


def arguments(num_tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which every third is ignored."""
    targets_T = torch.randint(vocab, (num_tokens,))
    targets_T[1::3] = IGNORE
    return 3 * torch.randn(num_tokens, vocab).to(dtype), targets_T


def expected(logits_TV: Tensor, targets_T: Tensor, z_weight: float) -> list[Tensor]:
    """Cross entropy, squared log-normaliser and gradient of the logits in float64."""
    leaf_TV = logits_TV.double().requires_grad_()
    cross_entropy_T = F.cross_entropy(leaf_TV, targets_T, ignore_index=IGNORE, reduction="none")
    z_T = torch.where(targets_T == IGNORE, 0, leaf_TV.logsumexp(dim=1).square())
    loss = cross_entropy_T.sum() + z_weight * z_T.sum()
    return [cross_entropy_T, z_T, *torch.autograd.grad(loss, [leaf_TV])]


def check(num_tokens: int, vocab: int, dtype: torch.dtype, z_weight: float) -> None:
    logits_TV, targets_T = arguments(num_tokens, vocab, dtype)
    wanted = expected(logits_TV, targets_T, z_weight)
    ours = [*cross_entropy_triton(logits_TV, targets_T, z_weight, IGNORE, True), logits_TV]
    # Losses are float32 whatever the logits are; their gradient is rounded to the type of these.
    for our, their, precision in zip(
        ours, wanted, (torch.float32, torch.float32, dtype), strict=True
    ):
        assert our.dtype == precision
        scale = max(1.0, their.abs().max().item())
        torch.testing.assert_close(
            our.double(), their, rtol=TOLERANCE[precision], atol=1e-6 * scale
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize(
    ("num_tokens", "vocab"),
    [(1, 1), (1, 300), (7, 33), (4, 128), (4, 256), (9, 1000)],
)
def test_the_kernel_agrees_with_torch(
    num_tokens: int, vocab: int, z_weight: float, dtype: torch.dtype
) -> None:
    """One token, one turn, whole turns, and a rest."""
    check(num_tokens, vocab, dtype, z_weight)


@given(
    num_tokens=st.integers(1, 6),
    vocab=st.integers(1, 700),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    z_weight=st.sampled_from([0.0, 1e-5, 1.0]),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_shape_agrees(**case) -> None:
    check(**case)


@pytest.mark.usefixtures("backwards", "poisoned_memory")
def test_the_order_of_programs_and_old_memory_do_not_show() -> None:
    check(9, 300, torch.float32, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_the_logits_stay(dtype: torch.dtype) -> None:
    logits_TV, targets_T = arguments(5, 300, dtype)
    before_TV = logits_TV.clone()
    read = cross_entropy_triton(logits_TV, targets_T, 0.0, IGNORE, False)
    assert torch.equal(logits_TV, before_TV)
    written = cross_entropy_triton(logits_TV, targets_T, 0.0, IGNORE, True)
    assert all(torch.equal(a, b) for a, b in zip(read, written, strict=True))


def test_ignored_rows_are_not_read_and_their_gradient_is_zero() -> None:
    logits_TV, targets_T = arguments(6, 300, torch.float32)
    ignored_T = targets_T == IGNORE
    logits_TV[ignored_T] = torch.nan
    values = cross_entropy_triton(logits_TV, targets_T, 0.1, IGNORE, True)
    assert all((value[ignored_T] == 0).all() and value.isfinite().all() for value in values)
    assert (logits_TV[ignored_T] == 0).all() and logits_TV.isfinite().all()


@pytest.mark.parametrize("target", [300, -1, 10**9])
def test_a_target_outside_of_the_vocabulary_shows(target: int) -> None:
    """No wait for the host can refuse it; the step has no finite loss, and is skipped."""
    logits_TV, targets_T = arguments(3, 300, torch.float32)
    targets_T[0] = target
    cross_entropy_T, _ = cross_entropy_triton(logits_TV, targets_T, 0.0, IGNORE, True)
    assert cross_entropy_T[0].isnan() and cross_entropy_T[2].isfinite()


def test_extreme_logits() -> None:
    """Far apart, impossible ones among them, and one that is not finite."""
    logits_TV = torch.tensor([[3e4, -3e4, 0.0], [-1e4, -1e4, -1e4], [torch.nan, 0.0, 0.0]])
    logits_TV = F.pad(logits_TV, (0, 200), value=-torch.inf)
    targets_T = torch.tensor([0, 1, 2])
    wanted_T = expected(logits_TV, targets_T, 0.0)[0]
    ours_T, _ = cross_entropy_triton(logits_TV, targets_T, 0.0, IGNORE, True)
    torch.testing.assert_close(ours_T.double(), wanted_T, rtol=1e-6, atol=0, equal_nan=True)
    assert ours_T[2].isnan() and (logits_TV[0] == 0).all()
    torch.testing.assert_close(
        logits_TV[1, :3], torch.tensor([1 / 3, -2 / 3, 1 / 3]), rtol=1e-3, atol=0
    )


# ---- the whole head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("shared", [False, True])
def test_head_and_loss_agree_with_the_twin(
    dtype: torch.dtype, z_weight: float, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three blocks, the last one smaller."""
    monkeypatch.setitem(linear_cross_entropy.__globals__, "BLOCK_BYTES", 4 * 150 * 4)
    hidden_TD = torch.randn(10, 16).to(dtype).requires_grad_()
    head_VD = torch.randn(150, 16).to(dtype).requires_grad_()
    targets_T = arguments(10, 150, dtype)[1]
    outcomes = []
    for backend in ("triton", "torch"):
        gradient = HeadGradient() if shared else None
        values = linear_cross_entropy(hidden_TD, head_VD, targets_T, z_weight, backend, gradient)
        gradients = torch.autograd.grad(0.25 * values[0], (hidden_TD, head_VD))
        outcomes.append([*values, *gradients])
    for our, their in zip(*outcomes, strict=True):
        assert our.dtype == their.dtype and our.shape == their.shape
        torch.testing.assert_close(
            our, their, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * their.abs().max().item()
        )


@given(num_tokens=st.integers(0, 10**6), vocab=st.integers(1, 300_000))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_blocks_of_a_gpu(num_tokens: int, vocab: int) -> None:
    """Multiples of 128 within the bytes of a block, as few as these allow, and none much smaller
    than the others."""
    block = block_tokens(num_tokens, 2 * vocab, on_gpu=True)
    most = max(128, GPU_BLOCK_BYTES // (2 * vocab) // 128 * 128)
    assert block % 128 == 0 and 128 <= block <= most
    blocks = -(-num_tokens // block)
    assert blocks <= -(-num_tokens // most) and num_tokens >= blocks * (block - 128)


def test_blocks_at_the_published_shape() -> None:
    for num_tokens, block in ((32768, 4736), (16384, 4096), (4096, 4096)):
        assert block_tokens(num_tokens, 2 * 100352, on_gpu=True) == block
