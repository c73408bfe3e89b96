"""Triton's CPU interpreter for tests. Import this before anything that imports Triton: what a
kernel becomes, interpreted or compiled, is decided when it is defined.

The interpreter holds bfloat16 as bare 16-bit integers: it multiplies and compares bit patterns and
rounds towards zero (Triton 3.6 to 3.9). The patch below widens the operands of `tl.dot` and rounds
to the nearest even, as a GPU does, and refuses any other arithmetic in bfloat16, which our kernels
do in float32.
"""

from __future__ import annotations

import os
import sys

import pytest

_LATE = "triton" in sys.modules
os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip(
    "triton", reason="Triton is not installed: pip install 'emotrain[kernels]'"
)
# The setting stays with this process; the variable would reach the processes that other tests
# start.
triton.knobs.runtime.interpret = True
del os.environ["TRITON_INTERPRET"]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

if _LATE and not isinstance(tl.cdiv, interpreter.InterpretedFunction):
    raise ImportError(
        "Triton was imported before tests/triton_interpreter.py, so its library is compiled, not "
        "interpreted; "
        "tests/conftest.py has to come first"
    )

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_dot, _cast, _binary = Builder.create_dot, Builder.cast_impl, Builder.binary_op


def _widened(handle: Handle) -> Handle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values, to the nearest even."""
    as_torch = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return (
        as_torch.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
    )


def _create_dot(self, a, b, d, *options):
    return _dot(self, _widened(a), _widened(b), d, *options)


def _cast_impl(self, source, target_type):
    source_type, target = source.dtype.scalar, target_type.scalar
    if target == tl.bfloat16 and source_type != tl.bfloat16:
        return Handle(_rounded(_cast(self, source, tl.float32).data), tl.bfloat16)
    if source_type == tl.bfloat16 and target != tl.bfloat16:
        return _cast(self, _widened(source), target_type)
    return _cast(self, source, target_type)


def _binary_op(self, left, right, operation):
    assert left.dtype.scalar != tl.bfloat16, "arithmetic in bfloat16: convert to float32 first"
    return _binary(self, left, right, operation)


Builder.create_dot, Builder.cast_impl, Builder.binary_op = _create_dot, _cast_impl, _binary_op

_patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    """As Triton 3.7 does: 3.6 makes numbers of arrays of one element, which numpy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


interpreter._patch_lang_tensor = _patch_lang_tensor

# Twice as fast: no check of integer overflow, and the language patched once a module rather than at
# every inner call.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
_patched_modules: set[str] = set()


def _call(self, *arguments, **options):
    if self.fn.__module__ not in _patched_modules:
        interpreter._patch_lang(self.fn)
        _patched_modules.add(self.fn.__module__)
    return self.rewrite()(*arguments, **options)


interpreter.InterpretedFunction.__call__ = _call


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run in the opposite order, last one first."""
    set_index = Builder.set_grid_idx

    def mirrored(self, x: int, y: int, z: int) -> None:
        set_index(
            self, *(size - 1 - index for size, index in zip(self.grid_dim, (x, y, z), strict=True))
        )

    monkeypatch.setattr(Builder, "set_grid_idx", mirrored)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or the largest integer: what a kernel should have written and did
    not, shows."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        allocate = getattr(owner, name)

        def poisoned(*arguments, allocate=allocate, **options) -> torch.Tensor:
            tensor = allocate(*arguments, **options)
            return tensor.fill_(
                torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
            )

        monkeypatch.setattr(owner, name, poisoned)
