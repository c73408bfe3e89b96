"""Checkpoints: whole or not there at all, and the same for every layout of processes.

    RUN_DIR/checkpoints/step-00001000/
        model-00000.safetensors, ...      parameters, fp32, named as in `Transformer.named_parameters`; a file a rank
        optimizer-00000.safetensors, ...  exp_avg.NAME and exp_avg_sq.NAME of every parameter
        tensors.json                      where each part of each tensor lies (see `tensor_files.py`)
        config.yaml                       the resolved configuration
        state.json                        step, tokens, data fingerprint, learning rate, AdamW's count of updates
        tokenizer.json                    of the training data, where it has one
        manifest.json                     size and sha256 of each of the above, written last

Every rank writes its own files into a hidden staging folder beside the others and flushes them to
disk; the first rank adds the rest and renames the folder. Whoever dies at whatever moment leaves
either a whole checkpoint or one that no reader looks at. No file is a pickle. Several nodes must
share the file system that RUN_DIR is on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
import time
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from emotrain.config import Config, load_config, save_config
from emotrain.errors import MissingFileError, UserError
from emotrain.files import flush_to_disk, sha256_of
from emotrain.model.transformer import Transformer
from emotrain.training.tensor_files import (
    INDEX,
    StoredTensors,
    TensorFilesWriter,
    TensorPart,
    WrittenFile,
    load_parts,
    read_index,
    save_parts,
)

log = logging.getLogger("emotrain")

NAME = re.compile(r"step-(\d{8})")
LEFTOVER = re.compile(r"\.step-\d{8}\.(partial|removed)")
"""Folders that a killed process leaves: a checkpoint on its way in, or on its way out."""
MANIFEST = "manifest.json"
FORMAT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides tensors to go on exactly."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens seen."""
    data_fingerprint: str
    """Of the data set and its sequence length: a checkpoint goes on only with the data it was
    trained on."""
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


@dataclass(frozen=True)
class Written:
    """A checkpoint that is whole, and what it cost."""

    path: Path
    step: int
    snapshot_s: float
    """Seconds for which training stood still: the copy to host memory, or the whole write where
    it is not asynchronous."""
    write_s: float
    """Seconds from then until the folder had its name; of this rank, which waits for the others."""
    bytes: int
    """Of all tensors, over all ranks."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. A context manager: leaving it waits for the
    last one.

    All ranks construct it and call it alike. While it is asynchronous, `save` returns after the
    copy of this rank's parts to host memory (kept for the next one), and a thread does the rest;
    its collectives have a process group of their own.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int = 0,
        asynchronous: bool = False,
        on_error: str = "stop",
        timeout_s: float = 1800,
        alone: bool = False,
    ):
        """
        Args:
            keep: how many of the newest checkpoints stay; 0 keeps all.
            on_error: what a full disk or an unwritable folder does: `stop` raises OSError on every
                rank, from the next `save` or `wait`; `warn` logs one line.
            timeout_s: how long a rank waits for the files of the others before it raises.
            alone: whether only this process of several writes, because it holds the whole model.
        """
        self.run_dir, self.keep, self.asynchronous, self.on_error = (
            Path(run_dir),
            keep,
            asynchronous,
            on_error,
        )
        self.last: Written | None = None
        """The newest checkpoint that this writer has finished."""
        self._group = None
        if not alone and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(
                backend="gloo", timeout=timedelta(seconds=timeout_s), group_desc="checkpoints"
            )
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        config: Config,
        state: TrainingState,
        tokenizer: Path | None = None,
    ) -> None:
        """Begin a checkpoint, after the one before is done; finish it too where the writer is not
        asynchronous.

        Raises:
            OSError: this one (or, asynchronous, the one before) could not be written; older ones
                are untouched.
        """
        self.save_parts(*_parts(model, optimizer), config, state, tokenizer)

    def save_parts(
        self,
        parts: dict[str, TensorPart],
        num_updates: int,
        config: Config,
        state: TrainingState,
        tokenizer: Path | None = None,
    ) -> None:
        """As `save`, of this rank's parts of parameters and moments, and AdamW's count of
        updates."""
        self.wait()
        started = time.perf_counter()
        if self.asynchronous:
            parts = self._copy_to_host(parts)
        write = partial(
            self._write, parts, config, state, num_updates, tokenizer, time.perf_counter() - started
        )
        if self.asynchronous:
            # A daemon, so that a second Ctrl-C ends the process; `wait` is what lets a write
            # finish.
            self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            write()
            self.wait()

    def wait(self) -> Written | None:
        """Wait for the write under way. Returns the newest whole checkpoint of this writer, if any.

        Raises:
            OSError: it could not be written, and on_error is `stop`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self.last

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception as own:
            if kind is None:
                raise
            log.error("%s", own)

    def _copy_to_host(self, parts: Mapping[str, TensorPart]) -> dict[str, TensorPart]:
        copies, on_gpu = {}, False
        for name, part in parts.items():
            host = self._host.get(name)
            if host is None or host.shape != part.local.shape or host.dtype != part.local.dtype:
                host = self._host[name] = torch.empty(
                    part.local.shape, dtype=part.local.dtype, pin_memory=part.local.is_cuda
                )
            host.copy_(part.local, non_blocking=True)
            on_gpu |= part.local.is_cuda
            copies[name] = replace(part, local=host)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(
        self,
        parts: Mapping[str, TensorPart],
        config: Config,
        state: TrainingState,
        num_updates: int,
        tokenizer: Path | None,
        snapshot_s: float,
    ) -> None:
        """Write one checkpoint; its outcome, the same on every rank, goes to `last` or `_error`."""
        started = time.perf_counter()
        folder = _StagedFolder(
            self.run_dir / "checkpoints" / f"step-{state.step:08d}",
            config,
            state,
            num_updates,
            tokenizer,
            self.keep,
        )
        is_first = self._group is None or dist.get_rank(self._group) == 0
        try:
            save_parts(
                parts, TensorFilesWriter(folder.staging, folder.begin, folder.commit), self._group
            )
        except OSError as error:
            reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            if is_first:
                shutil.rmtree(folder.staging, ignore_errors=True)
            whole = list_checkpoints(self.run_dir)
            last = (
                f"the last whole checkpoint is {whole[-1]}"
                if whole
                else "there is no earlier checkpoint"
            )
            failure = f"{folder.target}: could not be written ({reason}); {last}"
            if self.on_error == "stop":
                self._error = OSError(
                    f"{failure}; free space or choose another training.run_dir, and start again"
                )
            elif is_first:
                log.warning("%s; training goes on (training.on_checkpoint_error=warn)", failure)
        except BaseException as error:
            if is_first:
                shutil.rmtree(folder.staging, ignore_errors=True)
            self._error = error
        else:
            write_s = time.perf_counter() - started
            if not self.asynchronous:
                snapshot_s += write_s
            self.last = Written(folder.target, state.step, snapshot_s, write_s, folder.bytes)
            if is_first:
                log.info(
                    "checkpoint %s: %.1f MB, training waited %.2f s, written in %.2f s (%.0f MB/s)",
                    folder.target,
                    folder.bytes / 1e6,
                    snapshot_s,
                    write_s,
                    folder.bytes / 1e6 / max(write_s, 1e-9),
                )


@dataclass
class _StagedFolder:
    """The folder of one checkpoint, on the first rank: what happens before and after all ranks
    have written their tensors."""

    target: Path
    config: Config
    state: TrainingState
    num_updates: int
    tokenizer: Path | None
    keep: int
    bytes: int = 0

    @property
    def staging(self) -> Path:
        return self.target.with_name(f".{self.target.name}.partial")

    def begin(self, num_bytes: int) -> None:
        """Make room for `num_bytes` of tensors."""
        self.bytes = num_bytes
        root = self.target.parent
        root.mkdir(parents=True, exist_ok=True)
        for leftover in list_leftovers(root.parent):
            shutil.rmtree(leftover)
        free = shutil.disk_usage(root).free
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"it needs {num_bytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free",
            )
        self.staging.mkdir()

    def commit(self, files: list[WrittenFile], index: dict[str, Any]) -> None:
        """Add what is not a tensor, and give the folder its name."""
        staging, manifest = self.staging, {}
        for file in files:
            if (
                not (staging / file.name).is_file()
                or (staging / file.name).stat().st_size != file.bytes
            ):
                raise OSError(
                    f"{file.name}, which another process wrote, is not seen by the first one: all "
                    f"nodes must share this folder"
                )
            manifest[file.name] = {"bytes": file.bytes, "sha256": file.sha256}
        (staging / INDEX).write_text(json.dumps(index, separators=(",", ":")), encoding="utf-8")
        save_config(self.config, staging / "config.yaml")
        state = {**vars(self.state), "num_updates": self.num_updates}
        (staging / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        if self.tokenizer is not None and self.tokenizer.is_file():
            (staging / "tokenizer.json").write_bytes(self.tokenizer.read_bytes())
        for file in sorted(staging.iterdir()):
            if file.name not in manifest:
                flush_to_disk(file)
                manifest[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        (staging / MANIFEST).write_text(
            json.dumps({"format": FORMAT, "files": manifest}, indent=1), encoding="utf-8"
        )
        flush_to_disk(staging / MANIFEST)
        flush_to_disk(staging)
        if self.target.exists():
            # Only a run that went back to an earlier checkpoint comes here a second time, and it
            # still has the earlier one.
            _remove(self.target)
        os.rename(staging, self.target)
        flush_to_disk(self.target.parent)
        self._prune()

    def _prune(self) -> None:
        """Remove checkpoints of earlier steps, now that this one is whole."""
        older = [
            path
            for path in list_checkpoints(self.target.parents[1])
            if path.name < self.target.name
        ]
        try:
            for path in older[: max(0, len(older) + 1 - self.keep)] if self.keep else []:
                _remove(path)
        except OSError as error:
            log.warning(
                "%s: an old checkpoint could not be removed (%s)", path, error.strerror or error
            )


def save(
    run_dir: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    config: Config,
    state: TrainingState,
    tokenizer: Path | None = None,
    keep: int = 0,
) -> Path:
    """Write a checkpoint of a model that this process holds alone; see `CheckpointWriter`.
    Returns its folder."""
    writer = CheckpointWriter(run_dir, keep, alone=True)
    writer.save(model, optimizer, config, state, tokenizer)
    return writer.last.path


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [
        path
        for path in (Path(run_dir) / "checkpoints").glob("step-*")
        if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()
    ]
    return sorted(found)


def list_leftovers(run_dir: Path) -> list[Path]:
    """What killed processes have left among the checkpoints of a run. The next save removes it."""
    return sorted(
        path
        for path in (Path(run_dir) / "checkpoints").glob(".step-*")
        if LEFTOVER.fullmatch(path.name)
    )


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
        raise MissingFileError(
            f"{path}: no checkpoint here; give a folder like RUN_DIR/checkpoints/step-00001000, or "
            f"a RUN_DIR "
            f"that has one"
        )
    return found[-1]


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file of a checkpoint, by its name.

    Raises:
        ValueError: not a manifest, or one that names files it must not.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(
                f"format {manifest['format']!r} is not {FORMAT}, the one this version reads"
            )
        entries = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        for name, (size, digest) in entries.items():
            if type(size) is not int or not isinstance(digest, str):
                raise UserError(f"size and checksum of {name!r} are {size!r} and {digest!r}")
            if Path(name).name != name or "\\" in name or "\0" in name or name in ("", ".", ".."):
                raise UserError(f"{name!r} is not the name of a file in it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: its {MANIFEST} is not readable ({error}); use another checkpoint"
        ) from None
    for name in (INDEX, "state.json", "config.yaml"):
        if name not in entries:
            raise UserError(f"{path}: {name} is not in its {MANIFEST}; use another checkpoint")
    return entries


def verify(
    path: Path,
    hashed: Callable[[list[str]], Iterable[str]] = lambda names: names,
    track: Callable[[int], object] = lambda num_bytes: None,
) -> StoredTensors:
    """Check every file of a checkpoint against its manifest. Returns where its tensors lie.

    Args:
        hashed: picks those of the named files whose contents are read, all by default; sizes are
            checked of all.
        track: told the bytes of each file that was read.

    Raises:
        ValueError: a file is missing, of another size, or damaged; names the file.
    """
    entries = read_manifest(path)
    for name, (size, _) in entries.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise UserError(f"{path}: {name} is missing; use another checkpoint")
        if file.stat().st_size != size:
            raise UserError(
                f"{file}: {file.stat().st_size} bytes where {size} were written; use another "
                f"checkpoint"
            )
    for name in hashed(sorted(entries)):
        if sha256_of(path / name) != entries[name][1]:
            raise UserError(
                f"{path / name}: contents differ from the checksum in {MANIFEST}; use another "
                f"checkpoint"
            )
        track(entries[name][0])
    return read_index(path, entries)


def load_state(path: Path) -> TrainingState:
    """The `state.json` of a checkpoint."""
    return _read_state(path)[0]


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[Config, Transformer]:
    """Configuration and model of a checkpoint of any layout, in this process alone. Files of the
    optimizer are not read.

    Args:
        path: a checkpoint folder, or a run folder (then its newest checkpoint).
    """
    folder = find(path)
    stored = verify(
        folder, lambda names: [name for name in names if not name.startswith("optimizer-")]
    )
    config = load_config(folder / "config.yaml")
    with torch.device("meta"):
        model = Transformer(config.model)
    model = model.to_empty(device=device)
    parts = {name: TensorPart.of(parameter) for name, parameter in model.named_parameters()}
    _require_match(folder, stored, parts)
    load_parts(parts, folder, stored, distributed=False)
    return config, model


def restore(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Load a checkpoint of any layout into a model and its optimizer of any layout, in place and
    bit for bit.

    With a process group of several ranks all of them must call this; each checks the checksums of a
    share of the files.

    Raises:
        ValueError: damaged, or of another shape than the model; names the first parameter that
            differs. On all ranks alike.
    """
    moments: dict[str, Tensor] = {}

    def wanted(num_updates: int) -> dict[str, TensorPart]:
        if num_updates:
            for name, parameter in model.named_parameters():
                moments.update(
                    {f"{moment}.{name}": torch.zeros_like(parameter) for moment in MOMENTS}
                )
        return {
            name: TensorPart.of(tensor)
            for name, tensor in [*model.named_parameters(), *moments.items()]
        }

    state, num_updates = restore_parts(path, wanted)
    for name, parameter in model.named_parameters():
        optimizer.state.pop(parameter, None)
        if num_updates:
            # AdamW keeps its step counts where the fused kernel reads them: beside the parameter.
            step = torch.tensor(float(num_updates), device=parameter.device)
            optimizer.state[parameter] = {
                "step": step,
                **{moment: moments[f"{moment}.{name}"] for moment in MOMENTS},
            }
    return state


def restore_parts(
    path: Path, wanted: Callable[[int], dict[str, TensorPart]]
) -> tuple[TrainingState, int]:
    """Fill the parts that `wanted` names for AdamW's count of updates: parameters, and moments
    where it is not 0; see `restore`. Returns the training state and that count."""
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

    def check() -> tuple[TrainingState, int, StoredTensors, dict[str, TensorPart]]:
        stored = verify(path, lambda names: names[rank::world_size])
        state, num_updates = _read_state(path)
        parts = wanted(num_updates)
        _require_match(path, stored, parts)
        return state, num_updates, stored, parts

    state, num_updates, stored, parts = _on_every_rank(check, world_size)
    load_parts(parts, path, stored, distributed)
    return state, num_updates


def _parts(
    model: Transformer, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, TensorPart], int]:
    """This rank's parts of parameters and moments, and how often AdamW has updated them: as
    often each, or never."""
    parameters = dict(model.named_parameters())
    parts = {name: TensorPart.of(parameter) for name, parameter in parameters.items()}
    if not any(optimizer.state.get(parameter) for parameter in parameters.values()):
        return parts, 0
    steps = []
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter)
        if not state:
            raise UserError(
                f"{name} has never been updated though others have: give it a gradient, if of "
                f"zeros, or freeze no parameter"
            )
        parts.update({f"{moment}.{name}": TensorPart.of(state[moment]) for moment in MOMENTS})
        steps.append(state["step"])
    counts = torch.stack(steps).unique().tolist()
    if len(counts) > 1:
        raise UserError(
            f"parameters have been updated {counts} times: all must be updated at every step to be "
            f"saved"
        )
    return parts, int(counts[0])


def _on_every_rank(check: Callable[[], T], world_size: int) -> T:
    """The result of `check`, unless it failed on any rank: then all raise what the first of them
    met."""
    result, failure = None, None
    try:
        result = check()
    except (OSError, ValueError) as error:
        failure = str(error)
    failures = [failure]
    if world_size > 1:
        failures *= world_size
        dist.all_gather_object(failures, failure)
    if any(failures):
        raise UserError(next(filter(None, failures)))
    return result


def _require_match(path: Path, stored: StoredTensors, parts: Mapping[str, TensorPart]) -> None:
    if difference := stored.mismatch(parts):
        raise UserError(
            f"{path}: {difference}; use the configuration the checkpoint was written with"
        )


def _read_state(path: Path) -> tuple[TrainingState, int]:
    """The training state, and AdamW's count of updates."""
    try:
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        num_updates = values.pop("num_updates")
        for name, kind in {**typing.get_type_hints(TrainingState), "num_updates": int}.items():
            value = num_updates if name == "num_updates" else values.get(name, kind())
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f"{name}={value!r} is not of type {kind.__name__}")
        return TrainingState(**values), num_updates
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}/state.json is not readable ({error}); use another checkpoint"
        ) from None


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint: it is out of sight at once, whoever dies on the way."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)
