"""A checkpoint with some of its experts only, or a Hugging Face folder: `emotrain extract`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Config, PoolConfig, load_config
from emotrain.errors import ExistingFileError
from emotrain.folders import remove
from emotrain.interop.export_folder import export_checkpoint
from emotrain.interop.folder_tensors import BLOCK_BYTES
from emotrain.interop.layouts import Layout
from emotrain.model.counts import parameter_counts
from emotrain.model.parts import CHOICE_BIAS, layer_of, stored_tensors
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Transformer
from emotrain.modular.artefact import Subset, read_subset
from emotrain.progress import Track, untracked
from emotrain.staging import Staging
from emotrain.subsets.selection import require_same_model
from emotrain.training.checkpoint import load_model, load_state, verified_model
from emotrain.training.checkpoint_folders import commit_checkpoint, find
from emotrain.training.safetensors_file import WrittenFile
from emotrain.training.tensor_files import TensorFilesWriter, read_box, save_parts
from emotrain.training.tensor_index import StoredTensors, TensorPart

BY_EXPERT = (
    ".moe.experts.gate_up_NFD",
    ".moe.experts.down_NHD",
    ".moe.router.weight_ED",
    CHOICE_BIAS,
)
"""Tensors with a row for each expert, by the ends of their names."""

CHECK_TOKENS = 256
"""Tokens of which `check` compares the logits."""


@dataclass(frozen=True)
class Extracted:
    """A checkpoint that was written."""

    path: Path
    parameters: int
    full_parameters: int
    experts_per_layer: tuple[int, ...]
    max_difference: float | None
    """Largest difference of a logit from the full model with the other experts masked; None where
    it was not asked for."""


def extract(
    checkpoint: str | Path,
    subset_file: str | Path,
    out: str | Path,
    *,
    check: bool = False,
    track: Track[str] = untracked,
) -> Extracted:
    """Write the checkpoint of a subset. No more is read than is written: one expert at a time comes
    into the tensors of the smaller model.

    Training goes on from it as from any checkpoint, with a new optimizer. Its experts have new
    numbers, 0 to n - 1, in the order of the old ones; shared experts come last. It draws no pools:
    a subset is one.

    Raises:
        UserError: a target that exists, a subset of another checkpoint, or a damaged checkpoint.
    """
    folder, subset, out = find(checkpoint), read_subset(subset_file), Path(out)
    config = load_config(folder / "config.yaml")
    require_same_model(subset, folder, config)
    smaller = config_of(config, subset)
    num_bytes = 4 * parameter_counts(smaller.model)["total_parameters"]
    with Staging(out, num_bytes, check_replaceable=_refuse) as staging:
        full, stored = verified_model(folder, config)
        with torch.device("meta"):
            model = Transformer(smaller.model)
        model = model.to_empty(device="cpu")
        tensors = {name: tensor.detach() for name, tensor in stored_tensors(model).items()}
        for name in track(list(tensors), "reading the experts that are kept"):
            _read(folder, stored, name, _rows(name, subset), tensors[name])
        _commit(staging, tensors, folder, smaller)
    return Extracted(
        out,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in full.parameters()),
        tuple(len(kept) for kept in subset.experts_kept_per_layer),
        max_difference(folder, subset, out) if check else None,
    )


def extract_folder(
    checkpoint: str | Path,
    subset_file: str | Path,
    out: str | Path,
    layout: Layout,
    dtype: str = "fp32",
    *,
    check: bool = False,
    track: Track[str] = untracked,
) -> Extracted:
    """`extract` as a Hugging Face folder (`export_checkpoint`, also for `layout` and `dtype`). The
    checkpoint of the subset lies in a hidden folder beside `out` meanwhile. `check` compares that
    checkpoint, in fp32.

    Raises:
        UserError: as `extract`; or a model that the format cannot hold.
    """
    out = Path(out)
    with Staging(out, check_replaceable=_refuse) as staging:
        small = staging.folder / "checkpoint"
        done = extract(checkpoint, subset_file, small, check=check, track=track)
        folder = staging.folder / "folder"
        export_checkpoint(small, folder, layout, dtype)
        remove(small)
        for file in folder.iterdir():
            file.rename(staging.folder / file.name)
        folder.rmdir()
        staging.commit()
    return replace(done, path=out)


@torch.no_grad()
def taken_from(full: Transformer, config: Config, subset: Subset) -> Transformer:
    """The model of a subset, of one that is in memory, on its device."""
    with torch.device("meta"):
        model = Transformer(config_of(config, subset).model)
    model = model.to_empty(device=full.head.weight.device)
    every = stored_tensors(full)
    for name, tensor in stored_tensors(model).items():
        rows, values = _rows(name, subset), every[name]
        tensor.copy_(values if rows is None else values[list(rows)])
    return model


def config_of(config: Config, subset: Subset) -> Config:
    """The configuration of the extracted model."""
    routed = tuple(len(subset.routed(layer)) for layer in range(len(subset.experts_per_layer)))
    # Exclusive experts that are kept are experts like any other: a subset is of one domain.
    experts = replace(
        config.model.experts, routed=max(routed), routed_per_layer=routed, exclusive=()
    )
    if experts.top_k > experts.routed:
        experts = replace(experts, top_k=experts.routed)
    router = replace(config.model.router, pool=PoolConfig(kind="none"))
    model = replace(config.model, experts=experts, router=router)
    return replace(config, model=model)


def _rows(name: str, subset: Subset) -> Sequence[int] | None:
    """Rows of the full parameter that the extracted one has; None for all."""
    if not name.endswith(BY_EXPERT):
        return None
    layer = layer_of(name)
    if name.endswith(".weight_ED"):
        return subset.experts_kept_per_layer[layer]
    return subset.routed(layer)


def _read(
    folder: Path, stored: StoredTensors, name: str, rows: Sequence[int] | None, target: Tensor
) -> None:
    """Fill `target` with rows of a stored tensor, an expert at a time; with all of it, in blocks,
    for None."""
    if rows is None:
        count = max(1, BLOCK_BYTES // target[:1].nbytes)
        blocks = target.split(count)
        boxes = zip(range(0, len(target), count), blocks, strict=True)
    else:
        boxes = zip(rows, target.split(1), strict=True)
    for row, values in boxes:
        read_box(name, [row, *[0] * (target.ndim - 1)], values, folder, stored)


def _refuse(out: Path) -> None:
    raise ExistingFileError(f"{out}: exists; remove it or choose another --out")


def _commit(staging: Staging, tensors: dict[str, Tensor], source: Path, config: Config) -> None:
    """Write the tensors into the staged folder, and give it its name as a checkpoint."""

    def commit(files: list[WrittenFile], index: dict[str, Any]) -> None:
        tokenizer, state = source / "tokenizer.json", load_state(source)
        staging.commit(
            lambda: commit_checkpoint(staging.staged, files, index, config, state, 0, tokenizer)
        )

    writer = TensorFilesWriter(staging.folder, lambda num_bytes: None, commit)
    save_parts({name: TensorPart.of(tensor) for name, tensor in tensors.items()}, writer)


def check_batch(model: Transformer) -> PackedBatch:
    """A few tokens that a model knows, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, CHECK_TOKENS // 2)
    return PackedBatch.from_rows(torch.randint(model.config.vocab_size, shape, generator=generator))


@torch.inference_mode()
def max_difference(checkpoint: Path, subset: Subset, extracted: Path) -> float:
    """Largest difference of a logit between an extracted model and the full one with the other
    experts masked, on a few tokens, in fp32 on the CPU."""
    _, full = load_model(checkpoint)
    _, small = load_model(extracted)
    batch = check_batch(full)
    experts = [torch.tensor(subset.routed(layer)) for layer in range(full.config.num_layers)]
    masked = full.logits(full(batch, RoutingRequest(subset=experts)))
    return float((masked - small.logits(small(batch))).abs().max())
