"""The cells of a plan, and all that each depends on, before any is measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emotrain.data.formats import Dataset
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, precision_on
from emotrain.evaluation.reading import check_vocabulary, tokenizer_of
from emotrain.modular.counts import experts_kept
from emotrain.sweeps.plan import FULL, Cell, Plan, cells_of
from emotrain.sweeps.store import Entry
from emotrain.sweeps.task_subject import tasks_of
from emotrain.training.checkpoint_folders import find, identity, read_config

log = logging.getLogger("emotrain")


@dataclass(frozen=True)
class Sweep:
    """A plan, and where its cells lie."""

    plan: Plan
    out: Path
    entries: tuple[Entry, ...]
    checkpoints: dict[str, Path]
    """Of each model."""

    def full(self, cell: Cell) -> Entry:
        """The cell that another one is compared with."""
        wanted = Cell(cell.model, cell.kind, cell.subject, FULL, 1.0, 0, 0)
        return next(entry for entry in self.entries if entry.cell == wanted)


def prepared(plan: Plan, out: Path, device: str = "auto") -> Sweep:
    """The cells of a plan, and all that they depend on, without measuring any.

    Raises:
        UserError: a model or data that are not there or do not fit together, domains that are not
            known, shares that a model cannot keep.
    """
    target = choose_device(device)
    dataset = Dataset(plan.data) if plan.data else None
    domains = _domains(plan, dataset) if dataset else []
    checkpoints: dict[str, Path] = {}
    of_model: dict[str, dict[str, str]] = {}
    for model, path in plan.models.items():
        checkpoints[model] = checkpoint = find(path)
        config = read_config(checkpoint)
        if dataset:
            check_vocabulary(dataset.path, dataset.vocab_size, config, checkpoint)
        if plan.tasks:
            tokenizer_of(checkpoint, config)  # refuses one that does not fit
        for keep in plan.keep:
            experts_kept(config.model, keep)  # refuses what cannot be kept
        precision = str(precision_on(config, target) or torch.float32)
        of_model[model] = {"checkpoint": identity(checkpoint), "precision": precision}
    of_subject: dict[tuple[str, str], dict[str, Any]] = {}
    if dataset:
        of_data = {
            "data": {split: dataset.fingerprint(split) for split in ("train", "valid")},
            "documents": plan.documents,
            "document_tokens": plan.document_tokens,
        }
        of_subject |= dict.fromkeys((("domain", name) for name in domains), of_data)
    for file, task in zip(plan.tasks, tasks_of(plan) if plan.tasks else (), strict=True):
        of_subject["task", file] = {
            "task": task.file.fingerprint,
            "shots": plan.shots,
            "questions": plan.questions,
        }
    entries = tuple(
        Entry.of(cell, {**of_model[cell.model], **of_subject[cell.kind, cell.subject]}, out)
        for cell in cells_of(plan, domains)
    )
    return Sweep(plan, out, entries, checkpoints)


def _domains(plan: Plan, dataset: Dataset) -> list[str]:
    held_out = {name: each["documents"] for name, each in dataset.domains["valid"].items()}
    for name in plan.domains or sorted(held_out):
        if held_out.get(name, 0) >= 2:
            continue
        fault = f"domain {name!r} has {held_out.get(name, 0)} held-out documents, 2 are needed"
        if plan.domains:
            raise UserError(f"{dataset.path}: {fault}; name others of {', '.join(held_out)}")
        log.warning("%s: %s; it is left out", dataset.path, fault)
    found = [name for name in plan.domains or sorted(held_out) if held_out[name] >= 2]
    if not found:
        raise UserError(f"{dataset.path}: no domain has 2 held-out documents")
    return found
