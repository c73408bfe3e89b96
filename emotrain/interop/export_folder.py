"""`emotrain export`: a checkpoint as a Hugging Face folder, streamed.

Every tensor of the format is read from the checkpoint link by link (`layouts`), wherever the ranks
that wrote it left its parts, and written as it comes: at no time is more in memory than one tensor
of an expert, or `BLOCK_BYTES` of a larger tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.files import json_text
from emotrain.folders import FileEntry
from emotrain.interop.config_json import write_config
from emotrain.interop.folder_tensors import BLOCK_BYTES, INDEX, WEIGHTS
from emotrain.interop.huggingface import CONFIG
from emotrain.interop.import_folder import in_files
from emotrain.interop.layouts import Layout, Link, links, shape_of, tensors_of
from emotrain.interop.model_code import AUTO_MAP, write_code
from emotrain.interop.side_files import read_kept, write_side_files
from emotrain.progress import ProgressBar
from emotrain.staging import Staging
from emotrain.training.checkpoint import verified_model
from emotrain.training.checkpoint_folders import find, read_config, read_entries, read_state
from emotrain.training.safetensors_file import TensorSpec, write_safetensors
from emotrain.training.tensor_files import load_parts
from emotrain.training.tensor_index import StoredTensors, TensorPart

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What an export has done."""

    folder: str
    checkpoint: str
    step: int
    layout: str
    dtype: str
    tensors: int
    parameters: int
    """That were written; a bank of experts that layers share counts in each of them."""
    bytes: int
    """Of all weight files."""
    files: dict[str, FileEntry]
    """Weight files by name; the hub knows them by their sha256."""
    vocab_size: int


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    layout: Layout,
    dtype: str = "fp32",
    bar: ProgressBar | None = None,
) -> Exported:
    """Write the model of a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a checkpoint folder, or a run folder (then its newest).
        out: folder to make.
        dtype: of the weights: `fp32`, or `bf16`, rounded to nearest.
        bar: where progress is shown, if anywhere.
    Raises:
        UserError: a checkpoint that is damaged or that the format cannot hold, or `out` exists.
            OSError: the disk is full.
    """
    folder, bar = find(checkpoint), bar or ProgressBar(shown=False)
    config = read_config(folder)
    name = str(DTYPES[dtype]).removeprefix("torch.")
    published = write_config(config, layout, name, read_kept(folder)) | {"auto_map": AUTO_MAP}
    of_tensors = tensors_of(list(links(config.model, layout)))
    specs = [
        TensorSpec(name, DTYPES[dtype], shape_of(of_tensor))
        for name, of_tensor in of_tensors.items()
    ]
    num_bytes = sum(spec.num_bytes for spec in specs)
    with Staging(out, num_bytes) as staging:
        entries = read_entries(folder).items()
        weights = (entry.bytes for name, entry in entries if not name.startswith("optimizer-"))
        bar.start("verifying", sum(weights))
        _, stored = verified_model(folder, config, bar.advance)
        read = _Reader(folder, stored, of_tensors, DTYPES[dtype])
        bar.start("exporting", num_bytes)
        groups, files = list(in_files(specs)), []
        weight_map: dict[str, str] = {}
        for number, of_file in enumerate(groups, start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            file = file if len(groups) > 1 else WEIGHTS
            files.append(write_safetensors(staging.folder / file, of_file, read, bar.advance))
            weight_map |= {spec.name: file for spec in of_file}
        if len(groups) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            (staging.folder / INDEX).write_text(json_text(index, indent=2), "utf-8")
        (staging.folder / CONFIG).write_text(json_text(published, indent=2), "utf-8")
        write_side_files(staging.folder, folder, published)
        write_code(staging.folder)
        staging.commit()
    return Exported(
        folder=str(out),
        checkpoint=str(folder),
        step=read_state(folder)[0].step,
        layout=layout,
        dtype=dtype,
        tensors=len(specs),
        parameters=num_bytes // DTYPES[dtype].itemsize,
        bytes=sum(file.bytes for file in files),
        files={file.name: FileEntry(file.bytes, file.sha256) for file in files},
        vocab_size=config.model.vocab_size,
    )


@dataclass(frozen=True)
class _Reader:
    """The values of a tensor of the format, from a checkpoint."""

    folder: Path
    stored: StoredTensors
    of_tensors: dict[str, list[Link]]
    dtype: torch.dtype

    def __call__(self, spec: TensorSpec) -> Iterator[Tensor]:
        of_tensor = self.of_tensors[spec.name]
        if of_tensor[0].transposed:
            rows = [self._rows(link, 0, link.rows) for link in of_tensor]
            yield (rows[0] if len(rows) == 1 else torch.cat(rows)).t().to(self.dtype)
            return
        for link in of_tensor:
            row_bytes = prod(link.shape[1:]) * torch.float32.itemsize
            step = max(1, BLOCK_BYTES // row_bytes)
            for first in range(0, link.rows, step):
                yield self._rows(link, first, min(step, link.rows - first)).to(self.dtype)

    def _rows(self, link: Link, first: int, count: int) -> Tensor:
        """`count` rows of a link from `first` on."""
        axis = max(0, len(link.sizes) - 2)
        offsets, sizes = list(link.offsets), list(link.sizes)
        offsets[axis] += first
        sizes[axis] = count
        metadata: Any = self.stored.metadata.state_dict_metadata[link.parameter]
        values = torch.empty(sizes)
        part = TensorPart(values, torch.Size(offsets), metadata.size)
        load_parts({link.parameter: part}, self.folder, self.stored, distributed=False)
        return values.view(count, *link.shape[1:])
