"""A folder in a Hugging Face format: `config.json` and the tensors (spec 10.1, 10.2), checked
against each other before anything is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.config import ModelConfig
from emotrain.errors import UserError
from emotrain.interop.config_json import PublishedConfig, read_config
from emotrain.interop.folder_tensors import FLOATING, FolderTensor, find_tensors, read_json, some
from emotrain.interop.layouts import EMBEDDING, HEAD, Link, links, shape_of, tensors_of
from emotrain.model.transformer import Transformer

CONFIG = "config.json"

MOST_PADDING = 1024
"""Rows of a vocabulary that can be padding: a larger difference is a contradiction."""


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A folder whose configuration and tensors agree."""

    path: Path
    published: dict[str, Any]
    """Its config.json."""
    config: PublishedConfig
    tensors: dict[str, FolderTensor]
    links: list[Link]
    dropped_rows: int
    """Rows of embedding and head after those of config.json's vocabulary: padding, not read."""

    @classmethod
    def read(cls, path: str | Path) -> HuggingFaceFolder:
        """Read what the folder says of itself. Nothing in it is trusted: names, shapes and types
        are checked before memory is taken, and nothing but the folder's own files is opened.

        Raises:
            UserError: a setting or a tensor that is missing, unexpected or unsupported.
                MissingFileError: no such files.
        """
        path = Path(path)
        tensors = find_tensors(path)
        published = read_json(path / CONFIG)
        config = read_config(published, path / CONFIG, num_tensors=len(tensors))
        all_links = list(links(config.model, config.layout))
        dropped = _check_tensors(path, tensors, tensors_of(all_links))
        return cls(path, published, config, tensors, all_links, dropped)

    def warn(self) -> None:
        """Name the settings of config.json that are not used, if any."""
        if self.config.unused:
            warnings.warn(
                f"{self.path / CONFIG}: not used, and not known to have no effect: "
                f"{some(self.config.unused)}",
                stacklevel=3,
            )

    def values(self, link: Link) -> Iterator[Tensor]:
        """The numbers of a link, as on disk, in pieces of some of its rows."""
        if link.tensor is None:
            yield torch.zeros(link.shape)
        elif link.transposed:
            yield self.tensors[link.tensor].rows().t()[link.row : link.row + link.rows]
        else:
            yield from self.tensors[link.tensor].blocks(link.row, link.rows)


def load_huggingface(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[ModelConfig, Transformer]:
    """Read a model into memory; at no time is more than it and one tensor there. A row of tokens is
    one document to it: use `PackedBatch.from_rows`, without pools.

    Args:
        folder: see `HuggingFaceFolder.read`.
        dtype: of the parameters; what is on disk is converted.
    """
    read = HuggingFaceFolder.read(folder)
    read.warn()
    with torch.device("meta"):
        model = Transformer(read.config.model)
    model = model.to(dtype).to_empty(device="cpu")
    fill(dict(model.named_parameters()), read)
    return read.config.model, model


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], read: HuggingFaceFolder) -> None:
    """Give parameters the values of a folder; those of the model that are not here are not read."""
    for link in read.links:
        if link.parameter not in parameters:
            continue
        box = parameters[link.parameter]
        for axis, (start, size) in enumerate(zip(link.offsets, link.sizes, strict=True)):
            box = box.narrow(axis, start, size)
        row = 0
        for values in read.values(link):
            box.view(link.shape)[row : row + len(values)] = values
            row += len(values)


def _check_tensors(
    folder: Path, tensors: dict[str, FolderTensor], expected: dict[str, list[Link]]
) -> int:
    """Names, shapes and types of the tensors on disk are those of the model. Returns the rows of
    the vocabulary that are padding."""
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(
            f"{folder}: missing {some(missing)}; config.json belongs to another checkpoint, or a "
            f"file is missing"
        )
    if unexpected := [name for name in tensors if name not in expected]:
        raise UserError(
            f"{folder}: unexpected {some(unexpected)}; config.json belongs to another checkpoint"
        )
    padding = _padding(tensors, shape_of(expected[EMBEDDING]))
    for name, of_tensor in expected.items():
        tensor, shape = tensors[name], shape_of(of_tensor)
        if name in (EMBEDDING, HEAD):
            shape = (shape[0] + padding, *shape[1:])
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, config.json says "
                f"{list(shape)}; they belong to different checkpoints"
            )
        if tensor.dtype not in FLOATING:
            raise UserError(
                f"{tensor.file}: {name} has type {tensor.dtype}, weights must be one of "
                f"{', '.join(sorted(FLOATING))}; convert the model"
            )
    return padding


def _padding(tensors: dict[str, FolderTensor], vocabulary: tuple[int, ...]) -> int:
    """Rows that embedding and head both have beyond the vocabulary; 0 where they cannot be
    padding."""
    rows = {tensors[name].shape[0] if tensors[name].shape else 0 for name in (EMBEDDING, HEAD)}
    beyond = min(rows) - vocabulary[0]
    return beyond if len(rows) == 1 and 0 < beyond < MOST_PADDING else 0
