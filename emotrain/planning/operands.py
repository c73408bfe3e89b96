"""What an operator reads, writes and computes, from its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

MOVES_NOTHING = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "empty_permuted",
    "wait_tensor",
    "set_",
    "resize_",
    "_local_scalar_dense",
    "is_same_size",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "barrier",
}
"""Operators that start no kernel; views are recognised by themselves."""
READS_ROWS = {"embedding", "index_select", "gather", "index"}
"""Operators that read as many elements of their source as they write."""
OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
"""Operators that write a tensor in place without reading it."""
ADDS_TO_FEW = {"scatter_add_", "index_add_", "index_add", "bincount", "histc"}
"""Operators of atomic additions."""
RADIX_BITS = 8
"""Bits of a key that a pass of a radix sort looks at (CUB)."""


def bytes_moved(func: Any, name: str, args: tuple, kwargs: dict, outputs: list[Tensor]) -> int:
    """Bytes that an operator reads and writes; what it changes in place it does both to."""
    if name == "all_gather_copy_in":
        # It writes this rank's part of the buffer that it is given and returns.
        return 2 * sum(map(nbytes, args[0]))
    inputs, changed, overwritten = tensors((args, kwargs)), [], []
    for argument, value in _named(func, args, kwargs):
        # A fused optimizer changes gradients where it is given a scale for them.
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes and not (name.startswith("_fused_") and argument.name == "grads"):
            changed += tensors(value)
            overwritten += tensors(value) if argument.is_out or name in OVERWRITES else []
    ours = {tensor.untyped_storage()._cdata for tensor in changed}
    made = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in ours]
    written = sum(map(nbytes, changed)) + sum(map(nbytes, made))
    if name in READS_ROWS:
        return 2 * written + sum(map(nbytes, inputs[1:]))
    if name in ("sort", "argsort"):
        return _sorted_bytes(inputs[0])
    return written + sum(map(nbytes, inputs)) - sum(map(nbytes, overwritten))


def serial_additions(name: str, args: tuple) -> int:
    """Additions to one address, all of them alike."""
    if name not in ADDS_TO_FEW or not isinstance(args[0], Tensor) or not args[0].numel():
        return 0
    into = args[0]
    elements = max((t.numel() for t in tensors(args[1:])), default=0)
    return elements // into.numel()


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a tree of arguments."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (tuple, list, dict)):
        return []
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def nbytes(tensor: Tensor) -> int:
    """Bytes that a kernel must touch: an expanded tensor repeats the same ones."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _named(func: Any, args: tuple, kwargs: dict) -> Iterator[tuple[Any, Any]]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        yield argument, value
    for argument in func._schema.arguments:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _sorted_bytes(keys: Tensor) -> int:
    """Keys are read once for their histogram; each pass reads and writes them with int64 places."""
    passes = keys.itemsize * 8 // RADIX_BITS
    return nbytes(keys) + passes * 2 * keys.numel() * (keys.itemsize + 8)


def _cpu_attention_flops(q: Tensor, k: Tensor, v: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_attention_backward_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_args: Any, **_kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


FLOPS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_attention_flops,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_attention_backward_flops,
}
"""Formulas that torch's own counter lacks."""


def first_dtype(inputs: list[Tensor], outputs: list[Tensor]) -> torch.dtype:
    """Of the first tensor of numbers, or of the first one."""
    every = (*inputs, *outputs)
    return next((t for t in every if t.is_floating_point()), every[0]).dtype
