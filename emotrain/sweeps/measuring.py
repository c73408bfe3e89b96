"""A bench that cells are measured on: one model at a time, and the data of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emotrain.config import Config
from emotrain.data.formats import Dataset
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, rows_of
from emotrain.evaluation.reading import tokenizer_of
from emotrain.model.transformer import Transformer
from emotrain.sweeps.plan import Cell, Plan
from emotrain.sweeps.subjects import Domain, Items, Subject
from emotrain.sweeps.task_subject import TaskSubject
from emotrain.training.checkpoint import load_model


class Bench:
    """Measures cells, with one model loaded at a time: the one that was asked for last."""

    def __init__(self, plan: Plan, checkpoints: dict[str, Path], device: str, micro_batch: int):
        """
        Args:
            checkpoints: of each model of the plan.
            micro_batch: rows of one forward pass; 0 means as in training.
        """
        self._plan, self._checkpoints, self._micro_batch = plan, checkpoints, micro_batch
        self._device = choose_device(device)
        self._dataset = Dataset(plan.data) if plan.data else None
        self._loaded: tuple[str, Config, Transformer] | None = None

    def measure(self, cells: Sequence[Cell]) -> dict[Cell, Items | UserError]:
        """Cells of one model and one subject; those that cannot be have an error."""
        model = cells[0].model
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # two models need not fit
            self._loaded = (model, *load_model(self._checkpoints[model], self._device))
        return self._subject(cells[0], *self._loaded[1:]).measure(cells)

    def _subject(self, cell: Cell, config: Config, model: Transformer) -> Subject:
        rows = rows_of(self._micro_batch, config.training.micro_batch)
        if cell.kind == "task":
            tokenizer = tokenizer_of(self._checkpoints[cell.model], config)
            return TaskSubject(model, config, self._plan, rows, cell.subject, tokenizer=tokenizer)
        own = cell.subject if cell.subject in dict(config.model.experts.exclusive) else ""
        return Domain(model, config, self._plan, rows, cell.subject, own, self._dataset)
