"""A tuned subset back in the model that it was taken from: `emotrain reinsert`.

The full checkpoint is read part by part and written as it comes, in the files that it lies in, with
the rows of the experts that came back in place of the old ones. So an untouched subset gives the
very bytes of the full model's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from emotrain.config import Config
from emotrain.config.finetune import PARTS, FinetuneConfig
from emotrain.errors import UserError
from emotrain.interop.folder_tensors import BLOCK_BYTES
from emotrain.model.parts import layer_of, part_of
from emotrain.modular.artefact import Subset, read_subset
from emotrain.progress import Track, untracked
from emotrain.staging import Staging
from emotrain.subsets.extraction import BY_EXPERT, config_of
from emotrain.subsets.selection import require_same_model
from emotrain.training.checkpoint import load_state, verified_model
from emotrain.training.checkpoint_folders import commit_checkpoint, find, read_config
from emotrain.training.safetensors_file import TensorSpec, WrittenFile, write_safetensors
from emotrain.training.tensor_files import read_box
from emotrain.training.tensor_index import StoredTensors, stem_of


@dataclass(frozen=True)
class Reinserted:
    """A checkpoint that was written."""

    path: Path
    parts: tuple[str, ...]
    """That were taken from the tuned subset."""
    tensors: int
    """Of the model."""
    changed_tensors: tuple[str, ...]
    """Those with any other value than before."""
    changed_parameters: int


def reinsert(
    checkpoint: str | Path,
    tuned: str | Path,
    subset: str | Path | Subset,
    out: str | Path,
    *,
    parts: str = "routed",
    blend: float = 1.0,
    track: Track[str] = untracked,
) -> Reinserted:
    """Write the full model with a tuned subset in the places where it was taken from.

    Args:
        checkpoint: the full model, of any layout, or the folder of a run (then its newest).
        tuned: the checkpoint of the subset, extracted and then tuned.
        subset: the experts that were extracted, or their file.
        parts: what comes back, as `finetune.train` names it. Rows of experts go to the numbers that
            they had.
        blend: share of the tuned values; the full model's have the rest.
        out: a folder that does not exist.
    Raises:
        UserError: a subset of another model, a tuned model that is not of this subset, or `out`
            exists.
    """
    folder, small = find(checkpoint), find(tuned)
    if isinstance(subset, (str, Path)):
        subset = read_subset(subset)
    names = FinetuneConfig(train=parts).parts
    if unknown := sorted(names - set(PARTS)):
        raise UserError(
            f"parts={parts}: {unknown[0]!r} is no part of a model; choose of all, trunk, "
            f"{', '.join(PARTS)}, with commas between"
        )
    if not 0 < blend <= 1:
        raise UserError(
            f"blend={blend} is the share of the tuned values; give more than 0, up to 1"
        )
    config = read_config(folder)
    require_same_model(subset, folder, config)
    _check_tuned(small, subset, config)
    full_model, full = verified_model(folder, config)
    _, stored = verified_model(small, read_config(small))
    num_bytes = 4 * sum(p.numel() for p in full_model.parameters())
    with Staging(out, num_bytes) as staging:
        merging = _Merging(_Stored(folder, full), _Stored(small, stored), subset, names, blend)
        files, index = merging.write(staging.folder, track)
        state, tokenizer = load_state(folder), folder / "tokenizer.json"
        staging.commit(
            lambda: commit_checkpoint(staging.staged, files, index, config, state, 0, tokenizer)
        )
        written = staging.out
    changed = merging.changed
    return Reinserted(
        written,
        tuple(name for name in PARTS if name in names),
        len(list(full_model.named_parameters())),
        tuple(sorted(changed)),
        sum(changed.values()),
    )


def _check_tuned(small: Path, subset: Subset, config: Config) -> None:
    """Refuse a checkpoint that has not the shapes of the extracted one."""
    extracted, found = config_of(config, subset).model, read_config(small).model
    router = replace(extracted.router, choice_bias=found.router.choice_bias)
    found = replace(found, router=router)
    found = replace(found, experts=replace(found.experts, backend=extracted.experts.backend))
    if found != extracted:
        here, there = (
            model.experts.routed_per_layer or model.experts.routed for model in (found, extracted)
        )
        raise UserError(
            f"{small}: is not the model of this subset ({here} routed experts, not {there}); "
            f"give the checkpoint that was extracted with the subset, or one tuned from it"
        )


@dataclass(frozen=True)
class _Stored:
    """The parameters of a checkpoint on the disk."""

    folder: Path
    tensors: StoredTensors

    def read(self, name: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box of a tensor."""
        metadata: Any = self.tensors.metadata.state_dict_metadata[name]
        values = torch.empty(tuple(shape), dtype=metadata.properties.dtype)
        return read_box(name, offsets, values, self.folder, self.tensors)


_Boxes = dict[str, ChunkStorageMetadata]
"""The part of each tensor that a file holds."""


def _layout(stored: StoredTensors) -> tuple[dict[str, _Boxes], dict[str, Any]]:
    """The parts of the model's tensors that each file of a checkpoint holds, and the index of these
    files alone."""
    boxes: dict[str, _Boxes] = {}
    index: dict[str, Any] = {}
    for at, file in stored.files.items():
        if stem_of(at.fqn) != "model":
            continue
        metadata: Any = stored.metadata.state_dict_metadata[at.fqn]
        box = next(box for box in metadata.chunks if box.offsets == at.offset)
        boxes.setdefault(file, {})[at.fqn] = box
        entry = index.setdefault(
            at.fqn, {"dtype": "F32", "shape": list(metadata.size), "parts": []}
        )
        entry["parts"].append(
            {"file": file, "offsets": list(box.offsets), "shape": list(box.sizes)}
        )
    return boxes, index


@dataclass
class _Merging:
    """The full model's tensors with those of a subset in them."""

    full: _Stored
    small: _Stored
    subset: Subset
    parts: frozenset[str]
    blend: float

    def __post_init__(self) -> None:
        self.changed: dict[str, int] = {}
        """Of each tensor that has changed, how many of its numbers."""

    def write(self, folder: Path, track: Track[str]) -> tuple[list[WrittenFile], dict[str, Any]]:
        """All weight files, laid out as those of the full model, and their index."""
        boxes, index = _layout(self.full.tensors)
        files = []
        for file in track(sorted(boxes), "putting experts back"):
            of_file = boxes[file]
            specs = [
                TensorSpec(name, torch.float32, tuple(of_file[name].sizes))
                for name in sorted(of_file)
            ]

            def contents(spec: TensorSpec, of_file: _Boxes = of_file) -> Iterator[Tensor]:
                return self._values(spec.name, of_file[spec.name])

            files.append(write_safetensors(folder / file, specs, contents))
        return files, {"tensors": index}

    def _values(self, name: str, box: ChunkStorageMetadata) -> Iterator[Tensor]:
        """The new values of a box of a tensor, some rows at a time."""
        first, num_rows = box.offsets[0], box.sizes[0]
        comes_back = part_of(name) in self.parts
        by_expert = name.endswith(BY_EXPERT)
        row_bytes = 4 * prod(box.sizes[1:])
        size = 1 if by_expert else max(1, BLOCK_BYTES // max(1, row_bytes))
        places = {row: at for at, row in enumerate(self._rows(name))} if by_expert else {}
        for row in range(first, first + num_rows, size):
            rows = min(size, first + num_rows - row)
            shape = (rows, *box.sizes[1:])
            values = self.full.read(name, (row, *box.offsets[1:]), shape)
            place = places.get(row) if by_expert else row
            if comes_back and place is not None:
                tuned = self.small.read(name, (place, *box.offsets[1:]), shape)
                if self.blend < 1:
                    tuned = values.lerp(tuned, self.blend)
                # Compared as bits: 0 and -0 are not the same weights.
                different = int((values.view(torch.int32) != tuned.view(torch.int32)).sum())
                if different:
                    self.changed[name] = self.changed.get(name, 0) + different
                values = tuned
            yield values

    def _rows(self, name: str) -> Sequence[int]:
        """Numbers in the full model of the rows of the subset's tensor."""
        layer = layer_of(name)
        if name.endswith(".weight_ED"):
            return self.subset.experts_kept_per_layer[layer]
        return self.subset.routed(layer)
