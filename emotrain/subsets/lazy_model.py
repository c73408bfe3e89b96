"""A model whose trunk is in memory and whose routed experts come when tokens are first routed to
them: `load_lazy`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from emotrain.config import Config
from emotrain.errors import UserError
from emotrain.folders import MANIFEST
from emotrain.interop.folder_tensors import FLOATING, tensors_of_file
from emotrain.interop.huggingface import CONFIG, HuggingFaceFolder, fill
from emotrain.interop.import_folder import run_config
from emotrain.interop.layouts import parameters_of
from emotrain.model.parts import layer_of, stored_tensors
from emotrain.model.transformer import Transformer
from emotrain.modular.expert_store import ExpertStore, Piece, WeightFile
from emotrain.modular.lazy_experts import LazyExperts
from emotrain.training.checkpoint import verified_model
from emotrain.training.checkpoint_folders import find, read_config, read_entries
from emotrain.training.tensor_files import load_parts
from emotrain.training.tensor_index import StoredTensors, TensorPart, stem_of

BANK = ".moe.experts."
"""In the name of each parameter of a bank of routed experts, after its first layer."""
MATRICES = ("gate_up_NFD", "down_NHD")

Pieces = dict[tuple[int, int], list[Piece]]
"""What makes up each expert, by first layer of its bank and number."""


@dataclass(frozen=True)
class LazyModel:
    """A model, and the store that its experts are in."""

    config: Config
    model: Transformer
    """It computes what the model that is loaded as a whole computes, to the bit, and takes every
    `RoutingRequest`. Its parameters are those of the trunk: it is not for training."""
    store: ExpertStore | None
    """Of the routed experts; None for a dense model."""
    trunk_bytes: int
    """Of embeddings, attention, norms, routers and shared experts, which stay in memory."""
    expert_bytes: int
    """Of all routed experts, as if they were loaded."""

    @property
    def resident_bytes(self) -> int:
        """Of all weights in memory."""
        return self.trunk_bytes + (self.store.resident_bytes if self.store else 0)


def load_lazy(
    checkpoint: str | Path, memory: int | None = None, dtype: torch.dtype = torch.float32
) -> LazyModel:
    """Load a model without its routed experts, which are read when tokens are first routed to them.

    The files of a checkpoint are checked against their checksums, in one pass that keeps nothing;
    a Hugging Face folder has none to check. Experts are computed on the CPU.

    Args:
        checkpoint: a checkpoint, a run folder (then its newest), or a Hugging Face folder.
        memory: bytes that the weights may take, trunk and experts together; None: no limit.
        dtype: of the weights in memory.
    Raises:
        UserError: damaged, or the trunk and one expert do not fit; says what they need.
    """
    path = Path(checkpoint)
    is_folder = (path / CONFIG).is_file() and not (path / MANIFEST).is_file()
    opened = _open_folder(path) if is_folder else _open_checkpoint(find(path))
    model, itemsize = opened.model, dtype.itemsize
    experts = sum(p.numel() for name, p in model.named_parameters() if BANK in name) * itemsize
    trunk = sum(p.numel() for p in model.parameters()) * itemsize - experts
    trunk += sum(buffer.nbytes for buffer in model.buffers())
    one_expert = experts // max(1, len(opened.pieces))
    least = trunk + one_expert
    if memory is not None and memory < least:
        raise UserError(
            f"--memory: {memory:,} bytes do not hold the trunk of {path} and one expert; give at "
            f"least {least:,} bytes ({math.ceil(least / 1e6)}MB)"
        )
    room = experts if memory is None else memory - trunk
    store = _place_experts(model, opened.pieces, room, dtype) if experts else None
    model = opened.load_trunk(model, dtype).requires_grad_(False)
    return LazyModel(opened.config, model, store, trunk, experts)


@dataclass(frozen=True)
class _Opened:
    """Files with a model in them, of which nothing has been read so far."""

    config: Config
    model: Transformer
    """On the meta device."""
    pieces: Pieces
    load_trunk: Callable[[Transformer, torch.dtype], Transformer]
    """Gives the parameters that a model has left their values."""


def _place_experts(
    model: Transformer, pieces: Pieces, room: int, dtype: torch.dtype
) -> ExpertStore:
    """Put a store in the place of the model's banks."""
    config = model.config
    hidden, width = config.experts.hidden, config.d_model
    store = ExpertStore(
        lambda bank, expert: pieces[bank, expert], len(pieces), hidden, width, room, dtype
    )
    lazy: dict[int, LazyExperts] = {}
    for layer, block in enumerate(model.blocks):
        if block.moe.experts is not None:
            new = LazyExperts(store, layer, config)
            block.moe.experts = lazy.setdefault(config.bank_of_layer(layer), new)
    return store


def _open_checkpoint(folder: Path) -> _Opened:
    config = read_config(folder)
    # Open before they are checked: what has passed is what will be read.
    files = {
        name: WeightFile(folder / name)
        for name in read_entries(folder)
        if name.startswith("model-") and name.endswith(".safetensors")
    }
    model, stored = verified_model(folder, config)

    def load_trunk(model: Transformer, dtype: torch.dtype) -> Transformer:
        model = model.to_empty(device="cpu")
        parts = {name: TensorPart.of(tensor) for name, tensor in stored_tensors(model).items()}
        load_parts(parts, folder, stored, distributed=False)
        # Parameters alone: the steps of routers' biases are smaller than bf16 tells apart.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    return _Opened(config, model, _pieces_of_checkpoint(stored, files), load_trunk)


def _open_folder(path: Path) -> _Opened:
    read = HuggingFaceFolder.read(path)
    read.warn()
    with torch.device("meta"):
        model = Transformer(read.config.model)

    def load_trunk(model: Transformer, dtype: torch.dtype) -> Transformer:
        model = model.to(dtype).to_empty(device="cpu")
        fill(dict(model.named_parameters()), read)
        return model

    return _Opened(run_config(read), model, _pieces_of_folder(read), load_trunk)


def _pieces_of_checkpoint(stored: StoredTensors, files: dict[str, WeightFile]) -> Pieces:
    """Every part of a bank that some rank wrote, an expert's rows of it each."""
    pieces: Pieces = {}
    headers = {name: tensors_of_file(file.path) for name, file in files.items()}
    metadata: Any = stored.metadata.state_dict_metadata
    for name, tensor in metadata.items():
        if BANK not in name or stem_of(name) != "model":
            continue
        layer, matrix = _place_of(name)
        for box in tensor.chunks:
            file = stored.files[MetadataIndex(name, box.offsets)]
            found = headers[file].get(name)
            if found is None or found.shape != tuple(box.sizes):
                raise UserError(
                    f"{files[file].path}: {name} is not what its index says; use another checkpoint"
                )
            (first, row, column), (count, rows, columns) = box.offsets, box.sizes
            dtype = FLOATING[found.dtype]
            for index in range(count):
                start = found.start + index * rows * columns * dtype.itemsize
                pieces.setdefault((layer, first + index), []).append(
                    Piece(files[file], start, dtype, matrix, (row, column), (rows, columns))
                )
    return pieces


def _place_of(name: str) -> tuple[int, int]:
    """First layer of the bank that a parameter is of, and which matrix of its experts it holds."""
    return layer_of(name), MATRICES.index(name.rsplit(".", 1)[-1])


def _pieces_of_folder(read: HuggingFaceFolder) -> Pieces:
    """An expert's gate, up and down, tensors of their own each, down transposed."""
    pieces: Pieces = {}
    files = {tensor.file: WeightFile(tensor.file) for tensor in read.tensors.values()}
    for name, of_parameter in parameters_of(read.links).items():
        if BANK not in name:
            continue
        layer, matrix = _place_of(name)
        for link in of_parameter:
            assert link.tensor is not None and link.row == 0, "a routed expert has its own tensors"
            tensor = read.tensors[link.tensor]
            (expert, row, column), (_, rows, columns) = link.offsets, link.sizes
            pieces.setdefault((layer, expert), []).append(
                Piece(
                    files[tensor.file],
                    tensor.start,
                    FLOATING[tensor.dtype],
                    matrix,
                    (row, column),
                    (rows, columns),
                    link.transposed,
                )
            )
    return pieces
