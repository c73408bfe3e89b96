"""Which implementation of a kernel runs: `torch` (the readable twin), `triton`, or `megablocks`
(its grouped GEMM).

Every operation has one public function with the same signature for every backend. `auto` is Triton
on an NVIDIA GPU where Triton is installed and supports the case, else torch. A backend asked for by
name never falls back: what it cannot do is refused in one line.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from torch import Tensor

from emotrain.errors import MissingPackageError, UserError

BACKENDS = ("auto", "torch", "triton", "megablocks")

MAX_EXPERTS = 256
"""Routed experts of a layer that the Triton kernels support: a row of them is held in registers."""

TRITON_DTYPES = (torch.bfloat16, torch.float32)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(
    backend: str, tensor: Tensor, num_experts: int = 1, has_megablocks: bool = False
) -> str:
    """The backend that runs an operation on `tensor` with this number of routed experts (1 where it
    has none): never `auto`.

    MegaBlocks brings a grouped GEMM alone: operations without `has_megablocks` take `auto` for it.

    Raises:
        ValueError: an unknown backend, or one that cannot do this device, dtype or number of
            experts.
        ModuleNotFoundError: a backend that is not installed.
    """
    if backend not in BACKENDS:
        raise UserError(
            f"experts.backend={backend} is not known; choose one of {', '.join(BACKENDS)}"
        )
    if backend == "megablocks" and has_megablocks:
        if not tensor.is_cuda:
            raise UserError(
                f"experts.backend=megablocks runs on NVIDIA GPUs, not on {tensor.device.type}; use "
                f"auto or torch"
            )
        return backend
    if backend in ("auto", "megablocks"):
        supported = (
            tensor.is_cuda and tensor.dtype in TRITON_DTYPES and 1 <= num_experts <= MAX_EXPERTS
        )
        return (
            "triton"
            if supported
            and HAS_TRITON
            and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
            else "torch"
        )
    if backend == "triton":
        _check_triton(tensor, num_experts)
    return backend


def require_triton() -> None:
    if not HAS_TRITON:
        raise MissingPackageError("the Triton kernels need Triton: pip install 'emotrain[kernels]'")


def _check_triton(tensor: Tensor, num_experts: int) -> None:
    require_triton()
    # meta tensors are compiled for and never run; the interpreter runs on a CPU.
    if not (tensor.is_cuda or tensor.is_meta or _interpreting()):
        raise UserError(
            f"experts.backend=triton runs on NVIDIA GPUs, not on {tensor.device.type}; use auto or "
            f"torch"
        )
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        raise UserError(
            f"experts.backend=triton needs compute capability 8.0 (A100) or newer, not "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(tensor.device)))}; use torch"
        )
    if tensor.dtype not in TRITON_DTYPES:
        raise UserError(
            f"experts.backend=triton supports bfloat16 and float32, not "
            f"{str(tensor.dtype).removeprefix('torch.')}; "
            f"convert, or use torch"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise UserError(
            f"experts.backend=triton supports 1 to {MAX_EXPERTS} routed experts, not "
            f"{num_experts}; use torch"
        )


def _interpreting() -> bool:
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)
