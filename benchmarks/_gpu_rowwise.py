"""Items of gpu.py about norms, rotary positions and SwiGLU: `correct` and `kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _gpu_run import PhaseRun, one_thread_of_autograd, poisoned_memory, relative_error
from _measure import time_in_turn
from torch import Tensor
from torch.nn import functional as F

from emotrain.kernels import rms_norm, rotate_heads, swiglu_down
from emotrain.kernels.triton_launch import Launch, recording

EPS = 1e-6
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}
"""Largest relative error of a kernel against its twin in float32."""


class Shape(NamedTuple):
    """A block's rows: the published ones by default."""

    rows: int = 8
    length: int = 4096
    width: int = 2048
    heads: int = 16
    hidden: int = 1024


TINY = Shape(2, 20, 40, 2, 24)


class Operation(NamedTuple):
    """One of rowwise.py."""

    leaves: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    """Called with the leaves and `backend`."""
    eager: Callable[..., Tensor]
    """The same of torch's own operators, called with the leaves."""

    def solve(self, compute: Callable[..., Tensor], **options: str) -> list[Tensor]:
        """Result and gradients."""
        y = compute(*self.leaves, **options)
        slope = torch.linspace(-1, 1.5, y.numel(), device=y.device).view_as(y).to(y.dtype)
        return [y, *torch.autograd.grad(y, self.leaves, slope)]

    def wide(self) -> Operation:
        """The same numbers in float32."""
        leaves = tuple(leaf.detach().float().requires_grad_() for leaf in self.leaves)
        return self._replace(leaves=leaves)


def operations(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Operation]:
    generator = torch.Generator(device).manual_seed(0)

    def leaf(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, device=device)
        return values.to(dtype).requires_grad_()

    rows, length, width, heads, hidden = shape
    half = width // heads // 2
    angle = torch.arange(length, device=device)[:, None] * 1e4 ** -torch.linspace(
        0, 1, half, device=device
    )
    cos, sin = angle.cos(), angle.sin()

    def rotated(qkv_BSF: Tensor, backend: str) -> Tensor:
        # In place, so in a copy: a projection would have made it.
        return torch.cat(rotate_heads(qkv_BSF.clone(), cos, sin, heads, heads, backend), dim=2)

    def eager_rotated(qkv_BSF: Tensor) -> Tensor:
        qkv = qkv_BSF.clone().unflatten(-1, (3 * heads, -1))
        first, second = qkv[:, :, : 2 * heads].float().chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
        return torch.cat((turned.to(qkv.dtype), qkv[:, :, 2 * heads :]), dim=2)

    def eager_swiglu(hidden_TF: Tensor, down_HD: Tensor) -> Tensor:
        gate_TH, up_TH = hidden_TF.chunk(2, dim=-1)
        return (F.silu(gate_TH) * up_TH) @ down_HD

    return {
        "rms_norm": Operation(
            (leaf(rows * length, width), leaf(width)),
            lambda x, weight, backend: rms_norm(x, weight, EPS, backend),
            lambda x, weight: F.rms_norm(x.float(), x.shape[-1:], weight.float(), EPS).to(x.dtype),
        ),
        "rotate_heads": Operation((leaf(rows, length, 3 * width),), rotated, eager_rotated),
        "swiglu_down": Operation(
            (leaf(rows * length, 2 * hidden), leaf(hidden, width)), swiglu_down, eager_swiglu
        ),
    }


def _cases(run: PhaseRun) -> tuple[Shape, list[torch.dtype]]:
    small = run.tiny or not run.is_cuda
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    dtypes = [torch.bfloat16, torch.float32] if run.is_cuda else [torch.float32]
    return (TINY if small else Shape()), dtypes


def correct(run: PhaseRun) -> None:
    """Every kernel against its twin in float32, and twice for equal bits."""
    shape, dtypes = _cases(run)
    for dtype in dtypes:
        for name in operations(TINY, dtype, run.device):
            item = f"rowwise {name} {str(dtype).removeprefix('torch.')}"
            run.item(item, lambda n=name, d=dtype: _agrees(run, shape, n, d))


def _agrees(run: PhaseRun, shape: Shape, name: str, dtype: torch.dtype) -> list[float]:
    """Relative errors of the result and of each gradient. Raises AssertionError."""
    operation = operations(shape, dtype, run.device)[name]
    with poisoned_memory():
        ours, again = (operation.solve(operation.run, backend="triton") for _ in range(2))
    theirs = operation.wide().solve(operation.run, backend="torch")
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) < LIMITS[dtype], f"relative errors {errors}, limit {LIMITS[dtype]}"
    assert all(map(torch.equal, ours, again)), "the second call gave other bits"
    return errors


def kernels(run: PhaseRun) -> None:
    """Each launch at the published shape, and forward with backward in turn with torch's own
    operators."""
    shape, (dtype, *_) = _cases(run)
    for name in operations(TINY, dtype, run.device):
        run.item(f"rowwise {name}", lambda n=name: _times(run, shape, n, dtype))


def _times(run: PhaseRun, shape: Shape, name: str, dtype: torch.dtype) -> dict[str, Any]:
    operation = operations(shape, dtype, run.device)[name]
    launches: list[Launch] = []
    with one_thread_of_autograd(), recording("sm_90", launches.append):
        operation.solve(operation.run, backend="triton")
    rows = {}
    for launch in launches:

        def start(launch: Launch = launch) -> None:
            launch.kernel[launch.grid](*launch.arguments, **launch.options)

        ms = run.milliseconds(start)
        moved = launch.cost.bytes_read() + launch.cost.bytes_written()
        rows[launch.name] = {"ms": ms, "tb_s": moved / ms / 1e9}
    arms = {
        "triton": lambda: operation.solve(operation.run, backend="triton"),
        "twin": lambda: operation.solve(operation.run, backend="torch"),
        "eager": lambda: operation.solve(operation.eager),
    }
    timings = time_in_turn(arms, 1 if run.tiny else 10, settle=run.settle)
    ms_of = {arm: timing.median for arm, timing in timings.items()}
    speedup = ms_of["eager"] / ms_of["triton"]
    return {"launches": rows, "ms": ms_of, "speedup_over_eager": speedup}
