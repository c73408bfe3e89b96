"""One safetensors file, written as a stream: no more of it is in memory than the piece that is
being written. It is hashed in the same pass and flushed to the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Element types that are stored, by their names in safetensors files."""

PIECE_BYTES = 16 << 20
"""Written and hashed at a time."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file before it has values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    name: str
    bytes: int
    sha256: str


def write_safetensors(
    path: Path,
    tensors: Sequence[TensorSpec],
    contents: Callable[[TensorSpec], Iterable[Tensor]],
    track: Callable[[int], object] = lambda num_bytes: None,
) -> WrittenFile:
    """Write a file of these tensors.

    Args:
        contents: the values of a tensor, in the order of its elements and of its dtype, in as many
            pieces of whatever shape as one likes.
        track: told the bytes of each piece that was written.
    """
    # Larger elements first keeps every tensor aligned to its own element size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    digest, size = sha256(), 0
    with open(path, "wb") as stream:

        def write(content: bytes | memoryview) -> int:
            nonlocal size
            for start in range(0, len(content), PIECE_BYTES):
                piece = content[start : start + PIECE_BYTES]
                stream.write(piece)
                digest.update(piece)
            size += len(content)
            return len(content)

        write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            left = tensor.num_bytes
            for values in contents(tensor):
                assert values.dtype == tensor.dtype, tensor.name
                written = write(
                    values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                )
                left -= written
                track(written)
            assert left == 0, f"{tensor.name}: {left} bytes are missing"
        stream.flush()
        os.fsync(stream.fileno())
    return WrittenFile(path.name, size, digest.hexdigest())
