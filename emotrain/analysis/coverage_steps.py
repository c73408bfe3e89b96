"""Coverage over the checkpoints of a run: when do the modules form?

    OUT/steps/step-00000100.json    what is needed of a checkpoint, and what it was measured with

The newest checkpoint is measured first: the others are compared with it. A file that was measured
with the same weights, documents and settings is not measured again, so that a command that was
interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emotrain.analysis.coverage import (
    FORMAT,
    Coverage,
    CoverageSettings,
    PackedDomains,
    measure,
    read_packed,
)
from emotrain.config import Config
from emotrain.errors import MissingFileError, UserError
from emotrain.evaluation.measure import choose_device
from emotrain.evaluation.results import read_as
from emotrain.files import json_text, make_writable, write_whole
from emotrain.modular.algebra import jaccard_table
from emotrain.progress import Track, untracked
from emotrain.training.checkpoint_folders import find, identity, read_config, step_folders

log = logging.getLogger("emotrain")

SKIP = "leave it out with --skip-broken"


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What a checkpoint is found to be by itself."""

    step: int
    checkpoint: str
    domain_cosine: float | None
    """Of the mean routing of two domains, mean over pairs and layers."""
    document_effective_experts: float
    """By slots, mean over domains and layers."""
    domain_effective_experts: float
    between: dict[str, float | None]
    within: dict[str, float | None]
    """Share kept -> of `SubsetOverlap`."""
    held_out_modularity: float | None
    """Mean over banks."""


@dataclass(frozen=True, kw_only=True)
class StepRecord(StepNumbers):
    """What is kept of a checkpoint. Domains are by name."""

    subsets: dict[str, dict[str, tuple[tuple[int, ...], ...]]]
    """Share kept -> domain -> for each layer the experts that it chooses."""
    routing: dict[str, tuple[tuple[float, ...], ...]]
    """Domain -> for each layer its mean routing probability."""


@dataclass(frozen=True, kw_only=True)
class StepCoverage(StepNumbers):
    """A checkpoint of a run beside the last one that was measured."""

    subset_jaccard: dict[str, dict[str, float]]
    """Share kept -> domain -> Jaccard index of its subset with that of the last step, mean over
    layers."""
    subset_jaccard_mean: dict[str, float]
    """Mean over domains."""
    routing_cosine: dict[str, float]
    """Domain -> cosine of its mean routing with that of the last step, mean over layers."""
    routing_cosine_mean: float


@dataclass(frozen=True)
class RunCoverage:
    """Coverage of the last checkpoint, and what came before."""

    last: Coverage
    steps: tuple[StepCoverage, ...] = ()
    """Empty where one checkpoint was asked for."""
    skipped: tuple[str, ...] = ()
    """Checkpoints that could not be used."""

    @property
    def settled_step(self) -> dict[str, int | None]:
        """For each share kept, the step from which on subsets have as much in common with those of
        the last step as halves of a domain's documents have there: what still changes is no more
        than the choice of documents changes. None where the last step alone has."""
        found: dict[str, int | None] = {}
        for keep, overlap in self.last.overlap.items():
            settled = None
            for of in reversed(self.steps[:-1]):
                if overlap.within is None or of.subset_jaccard_mean[keep] < overlap.within:
                    break
                settled = of.step
            found[keep] = settled
        return found


@dataclass(frozen=True)
class ChosenCheckpoints:
    """What to measure."""

    configs: dict[Path, Config]
    """Of each whole checkpoint, oldest first."""
    broken: tuple[str, ...] = ()
    over_steps: bool = False
    """Whether checkpoints of a run are compared, also where there is one."""
    skip_broken: bool = False

    @property
    def newest(self) -> Path:
        return list(self.configs)[-1]


def choose_checkpoints(
    path: str | Path, wanted: Sequence[str], skip_broken: bool = False
) -> ChosenCheckpoints:
    """Find the checkpoints to measure.

    Args:
        path: a run, or a checkpoint where none are named.
        wanted: `all`, or steps; none means the newest.
        skip_broken: leave out those that are not whole, with a warning.
    Raises:
        UserError: no run, a step that it does not have, or a checkpoint that is not whole.
    """
    if not wanted:
        folder = find(path)
        return ChosenCheckpoints({folder: read_config(folder)})
    folders = {
        folder.name.removeprefix("step-").lstrip("0") or "0": folder
        for folder in step_folders(Path(path))
    }
    if not folders:
        raise MissingFileError(
            f"{path}: has no checkpoints/step-…, and --checkpoints is for a run; give a run folder"
        )
    if list(wanted) != ["all"]:
        if unknown := [step for step in wanted if step not in folders]:
            raise UserError(
                f"--checkpoints {unknown[0]}: the run has no such step; give `all`, or some of "
                f"{', '.join(folders)}"
            )
        folders = {step: folder for step, folder in folders.items() if step in wanted}
    whole: dict[Path, Config] = {}
    broken = []
    for folder in folders.values():
        try:
            whole[folder] = read_config(folder)
        except UserError as error:
            broken.append(_skip(folder, error, skip_broken))
    if not whole:
        raise UserError(f"{path}: none of its checkpoints is whole; copy them again")
    if len(whole) == 1:
        log.warning("%s: has one checkpoint to measure, and no other to compare it with", path)
    return ChosenCheckpoints(whole, tuple(broken), True, skip_broken)


def _skip(folder: Path, error: UserError, skip_broken: bool) -> str:
    """Say that a checkpoint is left out; raise where that was not asked for."""
    if not skip_broken:
        raise UserError(f"{error}; or {SKIP}") from error
    log.warning("%s is left out: %s", folder, error)
    return str(folder)


def measure_run(
    chosen: ChosenCheckpoints,
    data: str | Path,
    settings: CoverageSettings,
    out: Path,
    *,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
) -> RunCoverage:
    """Measure checkpoints on the same documents, which are read once.

    Args:
        data: a folder written by `emotrain prepare`.
        out: the folder of results, where earlier checkpoints are kept.
        micro_batch: rows of one forward pass; 0 means as in training.
    Raises:
        UserError: settings, data or a checkpoint that cannot be used, or checkpoints of several
            models.
    """
    target = choose_device(device)
    *earlier, newest = chosen.configs
    config = chosen.configs[newest]
    for folder in earlier:
        if chosen.configs[folder].model != config.model:
            raise UserError(
                f"{folder}: is of another model than {newest}; name the steps of one model with "
                f"--checkpoints"
            )
    packed = read_packed(data, config, newest, settings, micro_batch)
    if not chosen.over_steps:
        return RunCoverage(measure(newest, data, packed, settings, target, track))
    make_writable(out / "steps")
    skipped = list(chosen.broken)

    def measured(folder: Path) -> Coverage | None:
        try:
            return measure(folder, data, packed, settings, target, track, folder.name)
        except UserError as error:
            skipped.append(_skip(folder, error, chosen.skip_broken))
            return None

    last = measured(newest)
    while last is None and earlier:
        last = measured(newest := earlier.pop())
    if last is None:
        raise UserError(f"{newest}: neither it nor a later one can be used; copy them again")
    last_record = _record(last)
    records = []
    for folder in [*earlier, newest]:
        file = out / "steps" / f"{folder.name}.json"
        key = _key(folder, packed, settings, target)
        record = last_record if folder == newest else _read_record(file, key, last_record)
        if record is None and (found := measured(folder)) is not None:
            record = _record(found)
        if record is not None:
            content = json_text({**key, "record": dataclasses.asdict(record)})
            write_whole(file, content.encode())
            records.append(record)
    steps = tuple(_compare(record, last_record, last.names) for record in records)
    return RunCoverage(last, steps, tuple(skipped))


def _key(
    folder: Path, packed: PackedDomains, settings: CoverageSettings, device: torch.device
) -> dict[str, Any]:
    """All that a record depends on."""
    return {
        "format": FORMAT,
        "weights": identity(folder),
        "documents": packed.fingerprint,
        "keep": list(settings.keep),
        "pool": settings.pool,
        "device": device.type,
    }


def _record(measured: Coverage) -> StepRecord:
    def mean(scope: str) -> float:
        return float(measured.use["slots"][scope]["effective_experts"].mean())

    modularities = [of.held_out_modularity for of in measured.together]
    known = [value for value in modularities if value is not None]
    return StepRecord(
        step=measured.step,
        checkpoint=measured.checkpoint,
        subsets={
            keep: {
                name: tuple(tuple(np.flatnonzero(kept_JN[j]).tolist()) for kept_JN in layers)
                for j, name in enumerate(measured.names)
            }
            for keep, layers in measured.subsets.items()
        },
        routing={
            name: tuple(
                tuple(float(f"{share:.6g}") for share in share_JN[j])
                for share_JN in measured.routing
            )
            for j, name in enumerate(measured.names)
        },
        domain_cosine=measured.domain_cosine,
        document_effective_experts=mean("document"),
        domain_effective_experts=mean("domain"),
        between={keep: of.between for keep, of in measured.overlap.items()},
        within={keep: of.within for keep, of in measured.overlap.items()},
        held_out_modularity=float(np.mean(known)) if known else None,
    )


def _read_record(file: Path, key: dict[str, Any], newest: StepRecord) -> StepRecord | None:
    """The record of a file, where it was measured with the same key. Nothing in it is trusted."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values = dict(values)
        content = values.pop("record", None)
        if values != key:
            return None
        record: StepRecord = read_as(StepRecord, content)
        if _shape(record) != _shape(newest) or not _experts_exist(record):
            raise UserError("its domains, layers or experts are others")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        log.warning("%s is not a record of a checkpoint (%s) and is measured again", file, error)
        return None


def _shape(record: StepRecord) -> Any:
    """Names and lengths of all that is compared."""
    return (
        {
            keep: {name: [len(experts) for experts in layers] for name, layers in of.items()}
            for keep, of in record.subsets.items()
        },
        {name: [len(shares) for shares in layers] for name, layers in record.routing.items()},
        record.between.keys(),
        record.within.keys(),
    )


def _experts_exist(record: StepRecord) -> bool:
    return all(
        0 <= expert < len(shares)
        for of in record.subsets.values()
        for name, layers in of.items()
        for experts, shares in zip(layers, record.routing[name], strict=True)
        for expert in experts
    )


def _compare(record: StepRecord, last: StepRecord, names: Sequence[str]) -> StepCoverage:
    def in_common(keep: str, name: str) -> float:
        """Jaccard index of a domain's subset with that of the last step, mean over layers."""
        indices = []
        of_layers = record.subsets[keep][name], last.subsets[keep][name]
        for shares, *sets in zip(last.routing[name], *of_layers, strict=True):
            kept_2N = np.zeros((2, len(shares)), bool)
            for kept_N, experts in zip(kept_2N, sets, strict=True):
                kept_N[list(experts)] = True
            indices.append(jaccard_table(kept_2N)[0, 1])
        return float(np.mean(indices))

    jaccard = {keep: {name: in_common(keep, name) for name in names} for keep in record.subsets}
    cosine = {
        name: float(
            np.mean(
                [
                    np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other))
                    for one, other in zip(record.routing[name], last.routing[name], strict=True)
                ]
            )
        )
        for name in names
    }
    own = {field.name: getattr(record, field.name) for field in dataclasses.fields(StepNumbers)}
    return StepCoverage(
        **own,
        subset_jaccard=jaccard,
        subset_jaccard_mean={
            keep: float(np.mean(list(of.values()))) for keep, of in jaccard.items()
        },
        routing_cosine=cosine,
        routing_cosine_mean=float(np.mean(list(cosine.values()))),
    )
