"""Checkpoints: whole or not there at all.

    RUN_DIR/checkpoints/step-00001000/
        model.safetensors      parameters, fp32, named as in `Transformer.state_dict`
        optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME, step.NAME of every parameter
        config.yaml            the resolved configuration
        state.json             step, tokens, data fingerprint, learning rate
        tokenizer.json         of the training data, where it has one
        manifest.json          size and sha256 of each of the above, written last

Files are written to a hidden staging folder beside the others, flushed to disk, and the folder is renamed: whoever dies at
whatever moment leaves either a whole checkpoint or one that no reader looks at. No file is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.config import Config, load_config, save_config
from emotrain.files import flush_to_disk, sha256_of
from emotrain.model.transformer import Transformer

NAME = re.compile(r"step-(\d{8})")
MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides tensors to go on exactly."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens seen."""
    data_fingerprint: str
    """Of the data set and its sequence length: a checkpoint goes on only with the data it was trained on."""
    seed: int
    """Seed of data order and pool sizes."""
    global_batch: int
    """Sequences a step; the data position is step * global_batch."""
    lr: float
    """Learning rate of the last update."""
    skipped_steps: int = 0
    """Updates skipped so far for a loss or gradient that was not finite."""
    anneal_start_step: int = -1
    """Step at which annealing began; -1 without annealing."""
    anneal_start_lr: float = 0.0
    """Learning rate at which annealing began."""


def save(run_dir: Path, model: Transformer, optimizer: torch.optim.Optimizer, config: Config, state: TrainingState,
         tokenizer: Path | None = None, keep: int = 0) -> Path:
    """Write a checkpoint, then remove all but the `keep` newest (0 keeps all). Returns its folder.

    Raises:
        OSError: it could not be written, for example on a full disk; no trace of it is left, older ones stay.
    """
    from safetensors.torch import save_file

    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step-{state.step:08d}"
    staging = root / f".{target.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        save_file(_on_cpu(model.state_dict()), staging / "model.safetensors")
        save_file(_on_cpu(_optimizer_tensors(model, optimizer)), staging / "optimizer.safetensors")
        save_config(config, staging / "config.yaml")
        (staging / "state.json").write_text(json.dumps(vars(state), indent=1), encoding="utf-8")
        if tokenizer is not None and tokenizer.is_file():
            shutil.copyfile(tokenizer, staging / "tokenizer.json")
        _write_manifest(staging)
        if target.exists():
            shutil.rmtree(target)
        os.rename(staging, target)
        flush_to_disk(root)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if type(error).__name__ == "SafetensorError":
            raise OSError(f"{target}: could not be written: {error}; free space or choose another training.run_dir") from error
        raise
    if keep:
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    return target


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [path for path in (Path(run_dir) / "checkpoints").glob("step-*") if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found)


def find(path: str | Path) -> Path:
    """A checkpoint folder from its own path or that of its run (then the newest).

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() and (path / "state.json").is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint here; give a folder like RUN_DIR/checkpoints/step-00001000, or a RUN_DIR that has one")
    return found[-1]


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        ValueError: a file is missing, of another size, or damaged; names the file.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its {MANIFEST} is not readable ({error}); use another checkpoint") from None
    for name in ("model.safetensors", "state.json", "config.yaml"):
        if name not in entries:
            raise ValueError(f"{path}: {name} is not in its {MANIFEST}; use another checkpoint")
    for name, (size, digest) in entries.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{path}: {name} is missing; use another checkpoint")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: {file.stat().st_size} bytes where {size} were written; use another checkpoint")
        if sha256_of(file) != digest:
            raise ValueError(f"{file}: contents differ from the checksum in {MANIFEST}; use another checkpoint")


def load_state(path: Path) -> TrainingState:
    """The `state.json` of a checkpoint."""
    try:
        return TrainingState(**json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}/state.json is not readable ({error}); use another checkpoint") from None


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[Config, Transformer]:
    """Configuration and model of a checkpoint, checked against its manifest.

    Args:
        path: a checkpoint folder, or a run folder (then its newest checkpoint).
    """
    folder = find(path)
    verify(folder)
    config = load_config(folder / "config.yaml")
    with torch.device("meta"):
        model = Transformer(config.model)
    model = model.to_empty(device=device)
    _load_parameters(model, folder)
    return config, model


def restore(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Load a checkpoint into a model and its optimizer, in place and bit for bit.

    Raises:
        ValueError: damaged, or of another shape than the model; names the first parameter that differs.
    """
    verify(path)
    _load_parameters(model, path)
    tensors = _read_tensors(path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        state = {}
        for moment in MOMENTS:
            tensor = tensors.get(f"{moment}.{name}")
            if tensor is None or (moment != "step" and tensor.shape != parameter.shape):
                raise ValueError(f"{path}/optimizer.safetensors: {moment} of {name} is missing or of another shape; use the "
                                 f"checkpoint with the configuration it was written with")
            # AdamW keeps its step counts where the fused kernel reads them: beside the parameter.
            state[moment] = tensor.to(parameter.device)
        optimizer.state[parameter] = state
    return load_state(path)


def _load_parameters(model: Transformer, path: Path) -> None:
    tensors = _read_tensors(path / "model.safetensors")
    own = model.state_dict()
    for name in own.keys() ^ tensors.keys():
        where = "not in the checkpoint" if name in own else "not in the model"
        raise ValueError(f"{path}: parameter {name} is {where}; use the configuration the checkpoint was written with")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{path}: parameter {name} is {tuple(tensors[name].shape)} in the checkpoint and {tuple(tensor.shape)} in the "
                             f"model; use the configuration the checkpoint was written with")
    model.load_state_dict(tensors)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not readable ({error}); use another checkpoint") from None


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{moment}.{name}": optimizer.state[parameter][moment] for name, parameter in model.named_parameters() for moment in MOMENTS}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write_manifest(folder: Path) -> None:
    files: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        flush_to_disk(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": files}, indent=1), encoding="utf-8")
    flush_to_disk(manifest)
    flush_to_disk(folder)
