"""Checkpoints: whole or not there at all, and the same for every layout of processes.

    RUN_DIR/checkpoints/step-00001000/
        model-00000.safetensors, ...      parameters and biases of routers, fp32, named as in
                                          `stored_tensors`; a file a rank
        optimizer-00000.safetensors, ...  exp_avg.NAME and exp_avg_sq.NAME of every parameter
        tensors.json                      where each part of each tensor lies (see
                                          `tensor_files.py`)
        config.yaml                       the resolved configuration
        state.json                        step, tokens, data fingerprint, learning rate, AdamW's
                                          count of updates
        tokenizer.json                    of the training data, where it has one
        manifest.json                     size and sha256 of each of the above, written last

Every rank writes its own files into a hidden staging folder beside the others and flushes them to
disk; the first rank adds the rest and renames the folder. Whoever dies at whatever moment leaves
either a whole checkpoint or one that no reader looks at. No file is a pickle. Several nodes must
share the file system that RUN_DIR is on.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from emotrain.config import Config
from emotrain.distributed.agreement import on_every_rank
from emotrain.distributed.placement import by_number
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError, WriteError
from emotrain.folders import StagedFolder, remove
from emotrain.model.parts import stored_tensors, trained_parameters
from emotrain.model.transformer import Transformer
from emotrain.training.checkpoint_folders import (
    TrainingState,
    commit_checkpoint,
    find,
    list_checkpoints,
    list_leftovers,
    prune,
    read_config,
    read_state,
    verify,
)
from emotrain.training.safetensors_file import WrittenFile
from emotrain.training.tensor_files import TensorFilesWriter, load_parts, save_parts
from emotrain.training.tensor_index import StoredTensors, TensorPart

log = logging.getLogger("emotrain")

MOMENTS = ("exp_avg", "exp_avg_sq")

T = TypeVar("T")


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
        permanent_every: int = 0,
    ):
        """
        Args:
            keep: how many of the newest checkpoints stay; 0 keeps all.
            permanent_every: checkpoints of a multiple of this many steps stay too; 0: none.
            on_error: what a full disk or an unwritable folder does: `stop` raises OSError on every
                rank, from the next `save` or `wait`; `warn` logs one line.
            timeout_s: how long a rank waits for the files of the others before it raises.
            alone: whether only this process of several writes, because it holds the whole model.
        """
        self.run_dir, self.asynchronous, self.on_error = Path(run_dir), asynchronous, on_error
        self.keep, self.permanent_every = keep, permanent_every
        self.last: Written | None = None
        """The newest checkpoint that this writer has finished."""
        self._group = None
        if not alone and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(
                backend="gloo", timeout=timedelta(seconds=timeout_s), group_desc="checkpoints"
            )
        # The folders of this writer have names of their own while they are written, the same on
        # all ranks.
        self._token = _agreed(secrets.token_hex(4), self._group)
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
        with by_number(model, optimizer):
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
        target = self.run_dir / "checkpoints" / f"step-{state.step:08d}"
        folder = StagedFolder(target, self._token)
        num_bytes = 0
        is_first = self._group is None or dist.get_rank(self._group) == 0

        def begin(total: int) -> None:
            nonlocal num_bytes
            num_bytes = total
            for leftover in list_leftovers(self.run_dir):
                remove(leftover)
            folder.make(total)

        def commit(files: list[WrittenFile], index: dict[str, Any]) -> None:
            commit_checkpoint(folder, files, index, config, state, num_updates, tokenizer)
            prune(self.run_dir, target.name, self.keep, self.permanent_every)

        try:
            save_parts(parts, TensorFilesWriter(folder.path, begin, commit), self._group)
        except BaseException as error:
            if is_first:
                folder.discard()
            self._error = self._failure(target, error, is_first)
            return
        write_s = time.perf_counter() - started
        if not self.asynchronous:
            snapshot_s += write_s
        self.last = Written(target, state.step, snapshot_s, write_s, num_bytes)
        if is_first:
            log.info(
                "checkpoint %s: %.1f MB, training waited %.2f s, written in %.2f s (%.0f MB/s)",
                target,
                num_bytes / 1e6,
                snapshot_s,
                write_s,
                num_bytes / 1e6 / max(write_s, 1e-9),
            )

    def _failure(self, target: Path, error: BaseException, is_first: bool) -> BaseException | None:
        """The error that a failed write raises, if it raises one."""
        if not isinstance(error, OSError):
            return error
        reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        whole = list_checkpoints(self.run_dir)
        last = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no earlier one"
        failure = f"{target}: could not be written ({reason}); {last}"
        if self.on_error == "stop":
            return WriteError(
                f"{failure}; free space or choose another training.run_dir, and start again"
            )
        if is_first:
            log.warning("%s; training goes on (training.on_checkpoint_error=warn)", failure)
        return None


def _agreed(value: str, group: dist.ProcessGroup | None) -> str:
    """The first rank's value, on every rank."""
    values = [value]
    if group is not None:
        dist.broadcast_object_list(values, group_src=0, group=group)
    return values[0]


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
    assert writer.last is not None
    return writer.last.path


def load_state(path: Path) -> TrainingState:
    """The `state.json` of a checkpoint."""
    return read_state(path)[0]


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[Config, Transformer]:
    """Configuration and model of a checkpoint of any layout, in this process alone. Files of the
    optimizer are not read.

    Args:
        path: a checkpoint folder, or a run folder (then its newest checkpoint).
    """
    folder = find(path)
    config = read_config(folder)
    model, stored = verified_model(folder, config)
    model = model.to_empty(device=device)
    parts = {name: TensorPart.of(tensor) for name, tensor in stored_tensors(model).items()}
    load_parts(parts, folder, stored, distributed=False)
    return config, model


def verified_model(
    folder: Path, config: Config, track: Callable[[int], object] = lambda num_bytes: None
) -> tuple[Transformer, StoredTensors]:
    """A checkpoint's model on the meta device, and where its parameters lie, once the files have
    been found whole and of this configuration. Those of the optimizer are not read. `track` is told
    the bytes of each file that was.
    """
    stored = verify(folder, _weights, track)
    with torch.device("meta"):
        model = Transformer(config.model)
    parts = {name: TensorPart.of(tensor) for name, tensor in stored_tensors(model).items()}
    _require_match(folder, stored, parts)
    return model, stored


def _weights(names: list[str]) -> list[str]:
    """Files of a checkpoint without those of the optimizer."""
    return [name for name in names if not name.startswith("optimizer-")]


def restore(
    path: Path, model: Transformer, optimizer: torch.optim.Optimizer, weights_only: bool = False
) -> TrainingState:
    """Load a checkpoint of any layout into a model and its optimizer of any layout, in place and
    bit for bit; with `weights_only` the optimizer starts anew.

    With a process group of several ranks all of them must call this; each checks the checksums of a
    share of the files.

    Raises:
        ValueError: damaged, or of another shape than the model; names the first parameter that
            differs. On all ranks alike.
    """
    moments: dict[str, Tensor] = {}

    def wanted(num_updates: int) -> dict[str, TensorPart]:
        if num_updates and not weights_only:
            for name, parameter in trained_parameters(model):
                moments.update({f"{kind}.{name}": torch.zeros_like(parameter) for kind in MOMENTS})
        return {
            name: TensorPart.of(tensor)
            for name, tensor in [*stored_tensors(model).items(), *moments.items()]
        }

    with by_number(model, optimizer):
        state, num_updates = restore_parts(path, wanted, weights_only)
        for name, parameter in trained_parameters(model):
            optimizer.state.pop(parameter, None)
            if moments:
                # AdamW keeps its step counts where the fused kernel reads them: beside the
                # parameter.
                step = torch.tensor(float(num_updates), device=parameter.device)
                optimizer.state[parameter] = {
                    "step": step,
                    **{moment: moments[f"{moment}.{name}"] for moment in MOMENTS},
                }
    return state


def restore_parts(
    path: Path, wanted: Callable[[int], dict[str, TensorPart]], weights_only: bool = False
) -> tuple[TrainingState, int]:
    """Fill the parts that `wanted` names for AdamW's count of updates: parameters, and moments
    where it is not 0; see `restore`. Files of the optimizer are read unless `weights_only`.
    Returns the training state and that count."""
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    ranks = Ranks(dist.get_rank(), dist.get_world_size()) if distributed else Ranks()

    def check() -> tuple[TrainingState, int, StoredTensors, dict[str, TensorPart]]:
        stored = verify(
            path,
            lambda names: (_weights(names) if weights_only else names)[
                ranks.rank :: ranks.world_size
            ],
        )
        state, num_updates = read_state(path)
        parts = wanted(num_updates)
        _require_match(path, stored, parts)
        return state, num_updates, stored, parts

    state, num_updates, stored, parts = on_every_rank(check, ranks)
    load_parts(parts, path, stored, distributed)
    return state, num_updates


def _parts(
    model: Transformer, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, TensorPart], int]:
    """This rank's parts of parameters and moments, and how often AdamW has updated them: as
    often each that is trained, or never."""
    parts = {name: TensorPart.of(tensor) for name, tensor in stored_tensors(model).items()}
    parameters = dict(trained_parameters(model))
    if not any(optimizer.state.get(parameter) for parameter in parameters.values()):
        return parts, 0
    steps = []
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter)
        if not state:
            raise UserError(
                f"{name} has never been updated though others have; give it a gradient or freeze it"
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


def _require_match(path: Path, stored: StoredTensors, parts: Mapping[str, TensorPart]) -> None:
    if difference := stored.mismatch(parts):
        raise UserError(
            f"{path}: {difference}; use the configuration the checkpoint was written with"
        )
