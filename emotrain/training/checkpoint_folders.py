"""The checkpoints of a run as folders: their names, their state, which is the newest, which go."""

from __future__ import annotations

import json
import logging
import os
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.config import Config, load_config, save_config
from emotrain.errors import MissingFileError, UserError, WriteError
from emotrain.files import sha256_of
from emotrain.folders import MANIFEST, FileEntry, StagedFolder, check_files, read_manifest, remove
from emotrain.modular.placement import is_permutation
from emotrain.training.safetensors_file import WrittenFile
from emotrain.training.tensor_index import INDEX, StoredTensors, read_index

log = logging.getLogger("emotrain")

NAME = re.compile(r"step-(\d{8})")
LEFTOVER = re.compile(r"\.step-\d{8}\.(partial|removed)(-\w+)?")
"""Folders that a killed process leaves: a checkpoint on its way in, or on its way out."""
FORMAT = 2
STATE = "state.json"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides tensors to go on exactly."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens seen."""
    data_fingerprint: str
    """Of the data set and its sequence length: a checkpoint goes on only with the data it was
    trained on, unless `data.allow_change` says otherwise."""
    seed: int
    """Seed of data order and pool sizes."""
    global_batch: int
    """Sequences a step; the data position is (step - data_start_step) * global_batch."""
    lr: float
    """Learning rate of the last update."""
    skipped_steps: int = 0
    """Updates skipped so far for a loss or gradient that was not finite."""
    anneal_start_step: int = -1
    """Step at which annealing began; -1 without annealing."""
    anneal_start_lr: float = 0.0
    """Learning rate at which annealing began."""
    data_start_step: int = 0
    """Step at which the data were last changed on purpose, and read from their start."""
    origins: tuple[str, ...] = ()
    """Identities (`identity`) of the checkpoints that `training.resume=PATH` began from, oldest
    first."""
    placement: tuple[tuple[int, ...], ...] = ()
    """For each layer with routed experts, their order over the ranks of `parallel.ep` (those of the
    first rank, then those of the next, …); empty: by number. Tensors of a checkpoint are by number
    in any case."""


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return [path for path in step_folders(run_dir) if (path / MANIFEST).is_file()]


def step_folders(run_dir: Path) -> list[Path]:
    """Everything named like a checkpoint of a run, whole or not, oldest first."""
    found = (Path(run_dir) / "checkpoints").glob("step-*")
    return sorted(path for path in found if NAME.fullmatch(path.name))


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
        MissingFileError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() and (path / STATE).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise MissingFileError(
            f"{path}: no checkpoint here; give a folder like RUN_DIR/checkpoints/step-00001000, or "
            f"a RUN_DIR that has one"
        )
    return found[-1]


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, if it has any checkpoint at all.

    Raises:
        UserError: it has folders of checkpoints, and none is whole: starting at step 0 would
            write over the run.
    """
    folders, whole = step_folders(run_dir), list_checkpoints(run_dir)
    broken = [path for path in folders if path not in whole]
    if broken and not whole:
        raise UserError(
            f"{broken[-1]}: not a whole checkpoint (no {MANIFEST}), and {run_dir} has no other; "
            f"copy it again, or move it away to start at step 0"
        )
    if broken and broken[-1] > whole[-1]:
        log.warning(
            "%s: not a whole checkpoint (no %s); the newest whole one is %s",
            broken[-1],
            MANIFEST,
            whole[-1],
        )
    return whole[-1] if whole else None


def identity(checkpoint: Path) -> str:
    """What tells a checkpoint from every other, wherever it lies: the checksum of its manifest."""
    return sha256_of(checkpoint / MANIFEST)


def descendants(run_dir: Path, origin: str) -> list[Path]:
    """Whole checkpoints of a run that began at the checkpoint with this identity, oldest first."""
    return [path for path in list_checkpoints(run_dir) if origin in read_state(path)[0].origins]


def set_aside_after(run_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints of a run that are later than `step`, so that no reader takes them for
    the run's. Returns their new names."""
    moved = []
    for path in step_folders(run_dir):
        if int(path.name.removeprefix("step-")) > step:
            number = 1
            while os.path.lexists(aside := path.with_name(f"{path.name}.set-aside-{number}")):
                number += 1
            os.rename(path, aside)
            moved.append(aside)
    return moved


def prune(run_dir: Path, newest_name: str, keep: int, permanent_every: int) -> None:
    """Remove the oldest checkpoints but the `keep` newest (0 keeps all) and those of a multiple of
    `permanent_every` steps (0: none)."""
    older = [path for path in list_checkpoints(run_dir) if path.name < newest_name]
    if permanent_every:
        older = [path for path in older if int(path.name[5:]) % permanent_every]
    for path in older[: max(0, len(older) + 1 - keep)] if keep else []:
        try:
            remove(path)
        except OSError as error:
            log.warning(
                "%s: an old checkpoint could not be removed (%s)", path, error.strerror or error
            )


def commit_checkpoint(
    folder: StagedFolder,
    files: list[WrittenFile],
    index: dict[str, Any],
    config: Config,
    state: TrainingState,
    num_updates: int,
    tokenizer: Path | None,
) -> None:
    """Add what is not a tensor to the files of all ranks, and give the folder its name."""
    written = _check_seen(folder.path, files)
    (folder.path / INDEX).write_text(
        json.dumps(index, separators=(",", ":"), allow_nan=False), "utf-8"
    )
    save_config(config, folder.path / CONFIG)
    write_state(folder.path, state, num_updates)
    if tokenizer is not None and tokenizer.is_file():
        (folder.path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    folder.commit(FORMAT, written)


def _check_seen(folder: Path, files: list[WrittenFile]) -> dict[str, FileEntry]:
    """What all ranks have written, which this one must see."""
    for file in files:
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise WriteError(
                f"{file.name}, which another process wrote, is not seen by the first one: all "
                f"nodes must share this folder"
            )
    return {file.name: FileEntry(file.bytes, file.sha256) for file in files}


def read_entries(path: Path) -> dict[str, FileEntry]:
    """The files of a checkpoint, from its manifest; see `folders.read_manifest`."""
    return read_manifest(path, (FORMAT,), (INDEX, STATE, CONFIG))


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
        UserError: a file is missing, of another size, or damaged, or the folder has the name of
            another step; names the file.
    """
    entries = read_entries(path)
    check_files(path, entries, hashed, track)
    step, name = read_state(path)[0].step, NAME.fullmatch(path.name)
    if name and int(name[1]) != step:
        raise UserError(
            f"{path}: is the checkpoint of step {step} by its {STATE}; give the folder its name "
            f"back, step-{step:08d}"
        )
    return read_index(path, entries)


def read_config(folder: Path) -> Config:
    """The configuration of a checkpoint, after a look at its manifest, the sizes of its files and
    the contents of this one.

    Raises:
        UserError: see `verify`.
    """
    verify(folder, lambda names: [CONFIG])
    return load_config(folder / CONFIG)


def write_state(folder: Path, state: TrainingState, num_updates: int) -> None:
    values = {**vars(state), "num_updates": num_updates}
    (folder / STATE).write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")


def read_state(path: Path) -> tuple[TrainingState, int]:
    """The training state of a checkpoint, and AdamW's count of updates.

    Raises:
        UserError: not a state, or values of other types.
    """
    try:
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
        origins, placement = values.pop("origins", []), values.pop("placement", [])
        if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
            raise UserError(f"origins={origins!r} is not a list of identities")
        if not isinstance(placement, list) or not all(map(is_permutation, placement)):
            raise UserError(f"placement={placement!r:.60} is not a list of permutations")
        num_updates = values.pop("num_updates")
        kinds = {**typing.get_type_hints(TrainingState), "num_updates": int}
        del kinds["origins"], kinds["placement"]
        for name, kind in kinds.items():
            value = num_updates if name == "num_updates" else values.get(name, kind())
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f"{name}={value!r} is not of type {kind.__name__}")
        return (
            TrainingState(**values, origins=tuple(origins), placement=tuple(map(tuple, placement))),
            num_updates,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}/{STATE} is not readable ({error}); use another checkpoint"
        ) from None
