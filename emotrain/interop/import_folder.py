"""`emotrain import`: a Hugging Face folder as a checkpoint of ours, streamed.

Every parameter is a row of links (`layouts`), in the order of its elements: its values are read
link by link and written as they come. At no time is more in memory than one tensor of an expert,
or `BLOCK_BYTES` of a larger tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.config import Config, config_from_dict, config_to_dict
from emotrain.errors import UserError
from emotrain.interop.config_json import LARGEST_SIZE
from emotrain.interop.huggingface import CONFIG, HuggingFaceFolder
from emotrain.interop.layouts import Link, parameters_of
from emotrain.interop.side_files import TOKENIZER, check_tokenizer, read_texts, write_kept
from emotrain.model.transformer import Transformer
from emotrain.progress import ProgressBar
from emotrain.staging import Staging
from emotrain.training.checkpoint_folders import NAME, TrainingState, commit_checkpoint
from emotrain.training.safetensors_file import TensorSpec, WrittenFile, write_safetensors

FILE_BYTES = 5_000_000_000
"""Of a weight file, unless a tensor alone has more."""


@dataclass(frozen=True)
class Imported:
    """What an import has done."""

    checkpoint: str
    folder: str
    layout: str
    tensors: int
    """That were read."""
    parameters: int
    bytes: int
    """Of all weight files."""
    files: int
    """That hold weights."""
    dtypes: list[str]
    """That the folder's tensors had; the checkpoint has float32."""
    vocab_size: int
    dropped_vocab_rows: int
    """Rows beyond config.json's vocab_size, which were left out."""
    padded_vocab_rows: int | None
    """Rows that no token of the tokenizer has, which were kept; null without a tokenizer."""
    unused_settings: list[str]
    """Of config.json, and not known to have no effect."""


def import_folder(folder: str | Path, out: str | Path, bar: ProgressBar | None = None) -> Imported:
    """Write a checkpoint of step 0 with the model of a Hugging Face folder, its tokenizer and what
    else an export would need.

    Args:
        folder: in the published or the clean layout; see `HuggingFaceFolder.read`.
        out: folder to make.
        bar: where progress is shown, if anywhere.
    Raises:
        UserError: a folder that cannot be used, or `out` exists. OSError: the disk is full.
    """
    out, bar = Path(out), bar or ProgressBar(shown=False)
    step = NAME.fullmatch(out.name)
    if step and int(step[1]):
        raise UserError(
            f"{out}: is a name for the checkpoint of step {int(step[1])}, and an import is one of "
            f"step 0; choose another --out"
        )
    read = HuggingFaceFolder.read(folder)
    texts = read_texts(read.path)
    tokenizer = read.path / TOKENIZER
    vocab_size = read.config.model.vocab_size
    padded = check_tokenizer(tokenizer, vocab_size) if tokenizer.is_file() else None
    config = run_config(read)
    parameters = parameters_of(read.links)
    specs = _specs(config, parameters)
    num_bytes = sum(spec.num_bytes for spec in specs)
    with Staging(out, num_bytes) as staging:
        bar.start("importing", num_bytes)
        index: dict[str, Any] = {}
        files = []
        for number, of_file in enumerate(in_files(specs)):
            name = f"model-{number:05d}.safetensors"
            files.append(_write(staging.folder / name, of_file, read, parameters, bar))
            index |= {spec.name: index_entry(spec, name) for spec in of_file}
        for name, content in texts.items():
            (staging.folder / name).write_bytes(content)
        write_kept(staging.folder, read.published)
        state = TrainingState(
            step=0,
            tokens=0,
            data_fingerprint="",
            seed=config.training.seed,
            global_batch=config.training.global_batch,
            lr=0.0,
        )
        staging.commit(
            lambda: commit_checkpoint(
                staging.staged, files, {"tensors": index}, config, state, 0, tokenizer
            )
        )
    return Imported(
        checkpoint=str(out),
        folder=str(folder),
        layout=read.config.layout,
        tensors=len(read.tensors),
        parameters=num_bytes // torch.float32.itemsize,
        bytes=sum(file.bytes for file in files),
        files=len(files),
        dtypes=sorted({tensor.dtype for tensor in read.tensors.values()}),
        vocab_size=vocab_size,
        dropped_vocab_rows=read.dropped_rows,
        padded_vocab_rows=padded,
        unused_settings=read.config.unused,
    )


def in_files(specs: list[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Neighbouring tensors together, as many as fit into `FILE_BYTES`."""
    of_file: list[TensorSpec] = []
    for spec in specs:
        if of_file and sum(other.num_bytes for other in of_file) + spec.num_bytes > FILE_BYTES:
            yield of_file
            of_file = []
        of_file.append(spec)
    yield of_file


def run_config(read: HuggingFaceFolder) -> Config:
    """The configuration of a run that goes on from the model of a folder."""
    settings = config_to_dict(Config(model=read.config.model))
    length = read.published.get("max_position_embeddings")
    if type(length) is int and 0 < length <= LARGEST_SIZE:
        settings["data"]["sequence_length"] = length
    try:
        return config_from_dict(settings)
    except ValueError as error:
        raise UserError(f"{read.path / CONFIG}: {error}") from None


def _specs(config: Config, parameters: dict[str, list[Link]]) -> list[TensorSpec]:
    with torch.device("meta"):
        model = Transformer(config.model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes.keys() == parameters.keys()
    return [TensorSpec(name, torch.float32, shapes[name]) for name in parameters]


def _write(
    path: Path,
    specs: list[TensorSpec],
    read: HuggingFaceFolder,
    parameters: dict[str, list[Link]],
    bar: ProgressBar,
) -> WrittenFile:
    def contents(spec: TensorSpec) -> Iterator[Tensor]:
        for link in parameters[spec.name]:
            for values in read.values(link):
                yield values.to(spec.dtype)

    return write_safetensors(path, specs, contents, bar.advance)


def index_entry(spec: TensorSpec, file: str) -> dict[str, Any]:
    """What `tensors.json` says of an fp32 tensor that lies whole in a file."""
    part = {"file": file, "offsets": [0] * len(spec.shape), "shape": list(spec.shape)}
    return {"dtype": "F32", "shape": list(spec.shape), "parts": [part]}
