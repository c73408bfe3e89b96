"""`tensors.json`: where each part of each tensor of a checkpoint lies. Nothing in it is trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from emotrain.distributed.ranks import local_part, offsets_of
from emotrain.errors import UserError
from emotrain.training.safetensors_file import DTYPES


@dataclass(frozen=True)
class TensorPart:
    """The box of a tensor that this rank holds: all of it, or a shard."""

    local: Tensor
    """Its values, on any device; loading writes into it."""
    offsets: torch.Size
    """Where the box starts in the whole tensor."""
    shape: torch.Size
    """Of the whole tensor."""

    @classmethod
    def of(cls, tensor: Tensor) -> TensorPart:
        """This rank's part of a plain tensor or a DTensor."""
        tensor = tensor.detach()
        return cls(local_part(tensor), offsets_of(tensor), tensor.shape)

    @property
    def box(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(self.offsets, self.local.shape)


def stem_of(name: str) -> str:
    """The files that a tensor goes to: who only wants the model never opens those of the
    optimizer."""
    return "optimizer" if name.startswith(OPTIMIZER_PREFIXES) else "model"


OPTIMIZER_PREFIXES = ("exp_avg.", "exp_avg_sq.")
INDEX = "tensors.json"


@dataclass(frozen=True)
class StoredTensors:
    """What the files of a folder hold, checked: the parts of each tensor tile it."""

    metadata: Metadata
    """Dtype, shape and boxes of each tensor."""
    files: Mapping[MetadataIndex, str]
    """File of each part, by tensor and offsets."""

    def mismatch(self, parts: Mapping[str, TensorPart]) -> str | None:
        """The first difference in names, shapes or dtypes from `parts`, in words. Kinds of tensors
        (model, optimizer) that are not asked for may be there."""
        stored: Any = self.metadata.state_dict_metadata
        for name, part in parts.items():
            if name not in stored:
                return f"{name} is not in the checkpoint"
            if stored[name].size != part.shape:
                shape, wanted = tuple(stored[name].size), tuple(part.shape)
                return f"{name} is {shape} in the checkpoint and {wanted} in the model"
            dtype = stored[name].properties.dtype
            if dtype != part.local.dtype:
                return f"{name} is {dtype} in the checkpoint and {part.local.dtype} in the model"
        stems = {stem_of(name) for name in parts}
        unknown = next(
            (name for name in stored if name not in parts and stem_of(name) in stems), None
        )
        return None if unknown is None else f"{unknown} is not in the model"


def read_index(folder: Path, files: Iterable[str]) -> StoredTensors:
    """Read `tensors.json` and check it.

    Args:
        files: those that a part may lie in.

    Raises:
        ValueError: not an index, or parts that do not tile their tensor; one line that names the
            tensor.
    """
    dtypes, files = {name: dtype for dtype, name in DTYPES.items()}, set(files)
    try:
        tensors = json.loads((folder / INDEX).read_text(encoding="utf-8"))["tensors"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder}: its {INDEX} is not readable ({error}); use another checkpoint"
        ) from None
    metadata, where = {}, {}
    for name, entry in tensors:
        try:
            shape, dtype, boxes = _size(entry["shape"]), dtypes[entry["dtype"]], []
            for part in entry["parts"]:
                boxes.append(ChunkStorageMetadata(_size(part["offsets"]), _size(part["shape"])))
                if part["file"] not in files:
                    raise UserError(
                        f"its part lies in {part['file']!r}, which is not a file of this checkpoint"
                    )
                where[MetadataIndex(name, boxes[-1].offsets)] = part["file"]
            if not _tile(shape, boxes):
                raise UserError("its parts do not tile it")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder}/{INDEX}: {name} cannot be read ({error}); use another checkpoint"
            ) from None
        metadata[name] = TensorStorageMetadata(TensorProperties(dtype), shape, boxes)
    return StoredTensors(Metadata(dict(metadata)), where)


def _size(values: Any) -> torch.Size:
    if not isinstance(values, list) or not all(
        type(value) is int and value >= 0 for value in values
    ):
        raise UserError(f"{values!r} is not a list of sizes")
    return torch.Size(values)


def _tile(shape: torch.Size, boxes: list[ChunkStorageMetadata]) -> bool:
    """Whether boxes fill the shape exactly once, as a grid: what sharding along any axes gives."""
    if not boxes or any(
        len(box.offsets) != len(shape) or len(box.sizes) != len(shape) for box in boxes
    ):
        return False
    starts = [sorted({box.offsets[dim] for box in boxes}) for dim in range(len(shape))]
    ends = [
        dict(zip(of_dim, [*of_dim[1:], size], strict=True))
        for of_dim, size in zip(starts, shape, strict=True)
    ]
    return (
        len(boxes) == len({box.offsets for box in boxes}) == prod(map(len, starts))
        and all(of_dim[0] == 0 for of_dim in starts)
        and all(
            start + size == end[start]
            for box in boxes
            for start, size, end in zip(box.offsets, box.sizes, ends, strict=True)
        )
    )
