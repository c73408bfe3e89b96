"""The tensors of a Hugging Face folder: `model.safetensors`, or shards with
`model.safetensors.index.json`. Nothing in them is trusted, and nothing but the folder's own files
is opened.

The library checks a file's header: its length, that types and shapes have the bytes that they say,
that these bytes do not overlap and fill the file. Values are read at their offsets and not through
its memory map: pages of a map that were touched count as memory of the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.errors import MissingFileError, UserError
from emotrain.folders import is_safe_name

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types that a weight may have on disk."""

LARGEST_JSON = 64 << 20
"""Bytes of a configuration or an index; the index of the released models has 0.6 MB."""

BLOCK_BYTES = 32 << 20
"""Read at a time, as far as a tensor is read in rows."""


@dataclass(frozen=True)
class FolderTensor:
    """What a weight file says of one of its tensors."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As the file calls it."""
    start: int
    """Offset of its first byte in the file."""

    def blocks(self, first: int = 0, count: int | None = None) -> Iterator[Tensor]:
        """Rows from `first` on in pieces of at most `BLOCK_BYTES`, but of at least one row.

        Raises:
            UserError: the file has become shorter.
        """
        dtype = FLOATING[self.dtype]
        row_shape = self.shape[1:]
        row_bytes = prod(row_shape) * dtype.itemsize
        stop = self.shape[0] if count is None else first + count
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.start + first * row_bytes)
            for row in range(first, stop, step):
                values = torch.empty(min(step, stop - row), *row_shape, dtype=dtype)
                self._fill(stream, values.view(-1).view(torch.uint8).numpy().data)
                yield values

    def rows(self, first: int = 0, count: int | None = None) -> Tensor:
        """`count` rows from `first` on; all of them by default."""
        blocks = list(self.blocks(first, count))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _fill(self, stream: Any, buffer: memoryview) -> None:
        while buffer:
            if not (read := stream.readinto(buffer)):
                raise UserError(
                    f"{self.file}: ends inside of {self.name}; it was changed while it was read"
                )
            buffer = buffer[read:]


def find_tensors(folder: Path) -> dict[str, FolderTensor]:
    """Every tensor, from the one file or from the shards that the index names.

    Raises:
        UserError: files or an index that cannot be read, that lie, or that disagree.
            MissingFileError: one of them is not there.
    """
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise MissingFileError(
                f"{folder}: neither {WEIGHTS} nor {INDEX} is here; give the folder of a Hugging "
                f"Face checkpoint"
            )
        return tensors_of_file(folder / WEIGHTS)
    weight_map = _weight_map(folder)
    if (folder / WEIGHTS).is_file() and WEIGHTS not in weight_map.values():
        # A save in one file and a later one in shards leave both; either can be the older one.
        raise UserError(
            f"{folder}: has both {WEIGHTS} and {INDEX}, which does not name it; a checkpoint is "
            f"one file or shards, remove the one that is left from another save"
        )
    shards = {shard: tensors_of_file(folder / shard) for shard in sorted(set(weight_map.values()))}
    absent = [name for name, shard in weight_map.items() if name not in shards[shard]]
    unlisted = [
        name
        for shard, tensors in shards.items()
        for name in tensors
        if weight_map.get(name) != shard
    ]
    if absent or unlisted:
        raise UserError(
            f"{folder / INDEX} and its files disagree about {some(absent + unlisted)}; download "
            f"them again"
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _weight_map(folder: Path) -> dict[str, str]:
    """The shard of each tensor, from the index."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: weight_map must name the file of each tensor")
    for tensor, shard in weight_map.items():
        # Without a drive or a leading dot either, which could lead out of the folder.
        if (
            not isinstance(shard, str)
            or not is_safe_name(shard)
            or not shard.endswith(".safetensors")
            or shard.startswith(".")
            or ":" in shard
        ):
            raise UserError(
                f"{folder / INDEX}: {tensor} is said to be in {shard!r}; it must be a .safetensors "
                f"file of this folder"
            )
    return weight_map


def tensors_of_file(file: Path) -> dict[str, FolderTensor]:
    """The tensors of one file.

    Raises:
        UserError: not readable as safetensors. MissingFileError: no such file.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise MissingFileError(f"{file}: no such file; the download is not complete")
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass  # it has checked the header
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
        return {
            name: FolderTensor(
                name,
                file,
                tuple(entry["shape"]),
                entry["dtype"],
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not readable as safetensors ({' '.join(str(error).split())}); download it "
            f"again"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder.

    Raises:
        UserError: it is none, too large, or has a key twice. MissingFileError: no such file.
    """
    if not file.is_file():
        raise MissingFileError(
            f"{file}: no such file; give the folder of a Hugging Face checkpoint"
        )
    if (size := file.stat().st_size) > LARGEST_JSON:
        raise UserError(
            f"{file}: has {size:,} bytes, and at most {LARGEST_JSON:,} are read; download it again"
        )
    try:
        settings = json.loads(
            file.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); download it again") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file}: must hold a JSON object, not a {type(settings).__name__}")
    return settings


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands there twice")
        found[key] = value
    return found


def some(names: list[str]) -> str:
    """Up to three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
