"""How every Triton kernel is started: on its device with its tile sizes, or handed to a recorder
that compiles it instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emotrain.errors import UserError
from emotrain.kernels import tuning
from emotrain.kernels.cost import Cost
from emotrain.kernels.tuning import TileConfig


@dataclass(frozen=True)
class Launch:
    """One launch that a recorder saw."""

    kernel: Any
    grid: tuple[int, ...]
    config: TileConfig | None
    """Tile sizes of a GEMM; None for the others."""
    cost: Cost
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time constants and launch options."""

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


@dataclass(frozen=True)
class _Recorder:
    target: str
    seen: Callable[[Launch], None]


_RECORDER: ContextVar[_Recorder | None] = ContextVar("emotrain_kernel_recorder", default=None)
_TILES: ContextVar[dict[str, TileConfig] | None] = ContextVar("emotrain_kernel_tiles", default=None)


@contextlib.contextmanager
def recording(target: str, seen: Callable[[Launch], None]) -> Iterator[None]:
    """Within this context launches for `target` (such as sm_90) are handed to `seen`, and
    nothing runs."""
    token = _RECORDER.set(_Recorder(target, seen))
    try:
        yield
    finally:
        _RECORDER.reset(token)


@contextlib.contextmanager
def tiles(configs: dict[str, TileConfig]) -> Iterator[None]:
    """Within this context GEMM kernels use these tile sizes instead of the tuned ones.

    Raises:
        ValueError: rows that differ where kernels share them.
    """
    tuning.check_rows(configs)
    token = _TILES.set(configs)
    try:
        yield
    finally:
        _TILES.reset(token)


def tuned(kernel: str, tensor: Tensor) -> TileConfig:
    """Tile sizes of a GEMM kernel for the device and dtype of `tensor`."""
    override = _TILES.get()
    if override and kernel in override:
        return override[kernel]
    return tuning.default_tiles(_target(tensor), tensor.dtype)[kernel]


def _target(tensor: Tensor) -> str:
    if recorder := _RECORDER.get():
        return recorder.target
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return f"sm_{major}{minor}"
    return "interpreter"


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    config: TileConfig | None,
    cost: Cost,
    *arguments: Any,
    **options: Any,
) -> None:
    """Start `kernel` on the device of its first tensor. A grid with a zero starts nothing.

    Args:
        config: tile sizes of a GEMM; None for the others.
        cost: what the launch computes and moves.
    """
    if 0 in grid:
        return
    if config is not None:
        options |= config.options()
    if recorder := _RECORDER.get():
        recorder.seen(Launch(kernel, grid, config, cost, arguments, options))
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)


def float32_precision() -> str:
    """How tensor cores multiply float32: as `torch.set_float32_matmul_precision` says, in one TF32
    product or in three, whose result is as exact as float32 itself. (bfloat16 is not affected.)"""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def check_operands(operation: str, *tensors: Tensor, rows: Tensor | None = None) -> None:
    """Refuse operands of a Triton kernel that are not contiguous, or differ in dtype or device.

    Args:
        rows: an operand of which each row alone has to be contiguous.
    """
    first = tensors[0]
    for tensor in tensors if rows is None else (rows, *tensors):
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise UserError(
                f"{operation} got {first.dtype} on {first.device} with {tensor.dtype} on "
                f"{tensor.device}; "
                f"give one dtype (bfloat16 or float32) on one device"
            )
        if not (tensor.stride(-1) == 1 if tensor is rows else tensor.is_contiguous()):
            raise UserError(
                f"{operation} got strides {tuple(tensor.stride())} for shape "
                f"{tuple(tensor.shape)}; only contiguous "
                f"tensors are supported, call .contiguous() first"
            )
