"""The plan of a sweep, from a YAML file: which models, with how many of their experts, chosen how,
by how much text, drawn how often, are measured on what."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from emotrain.config.reading import read_settings
from emotrain.errors import UserError
from emotrain.subsets.selection import METHODS

ALL = -1
"""As a number of calibration documents: as many as there are. Written `all`."""
FULL = "full"
"""The method of a cell that keeps all experts: what every other one is compared with."""


@dataclass(frozen=True)
class Plan:
    """What a plan may say; every key but `models` may be left out."""

    models: dict[str, str]
    """By the name that tables show: a run (its newest checkpoint) or a checkpoint."""
    data: str = ""
    """Folder of `emotrain prepare`: the losses of its held-out documents are measured."""
    domains: tuple[str, ...] = ()
    """Of `data`; none means all."""
    tasks: tuple[str, ...] = ()
    """Files of questions, as of `emotrain evaluate --tasks`."""
    shots: int = 0
    """Examples before each question of a task."""
    questions: int = 0
    """Most questions of a task; 0 asks all."""
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    """Shares of each layer's experts, shared ones counted, below 1. All experts are measured
    always."""
    methods: tuple[str, ...] = ("router", "random")
    """Who chooses: those of `emotrain select --method`. The figures of one method show the
    first."""
    calibration_documents: tuple[int, ...] = (8,)
    """Documents of a domain that choose its experts; `all` of its training split, too."""
    seeds: tuple[int, ...] = (0,)
    """Each a draw of its own: of the calibration documents, or of the experts (`random`)."""
    documents: int = 64
    """Most held-out documents of a domain."""
    document_tokens: int = 0
    """Tokens of a document that count, from its start; 0 for all."""
    out: str = ""
    """Folder of cells, tables and figures; `--out` comes before it."""

    def __post_init__(self) -> None:
        for name in ("keep", "methods", "domains", "tasks", "calibration_documents", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name} names something twice; name each once")
        for holds, fault in (
            (self.models, "models is empty; name at least one, as in `EMO: runs/quickstart`"),
            (all(self.models.values()), "models has a name without a path; give its run"),
            (
                self.data or self.tasks,
                "there is nothing to measure on; give data, a folder of `emotrain prepare`, or "
                "tasks, files of questions",
            ),
            (self.data or not self.domains, "domains are those of data; give it, too"),
            (min(self.shots, self.questions) >= 0, "shots and questions are whole numbers from 0"),
            (
                self.tasks or not (self.shots or self.questions),
                "shots and questions are of tasks; name some, or leave them out",
            ),
            (self.keep, "keep is empty; give shares of the experts, for example [0.5, 0.25]"),
            (all(0 < keep < 1 for keep in self.keep), "keep has shares above 0 and below 1"),
            (self.methods, f"methods is empty; choose some of {', '.join(METHODS)}"),
            (self.seeds and min(self.seeds) >= 0, "seeds are whole numbers from 0 on, at least 1"),
            (
                self.calibration_documents
                and all(size >= 1 or size == ALL for size in self.calibration_documents),
                "calibration_documents are whole numbers from 1 on, or all; at least one of them",
            ),
            (self.documents >= 2, "documents must be at least 2: one gives no standard error"),
            (
                self.document_tokens == 0 or self.document_tokens >= 2,
                "document_tokens must be at least 2, or 0 for whole documents",
            ),
        ):
            if not holds:
                raise UserError(fault)
        for method in self.methods:
            if method not in METHODS:
                raise UserError(
                    f"methods={method} is not known; choose some of {', '.join(METHODS)}"
                )


def read_plan(path: str | Path) -> Plan:
    """The plan that a file holds; `base:` names another one that it builds on.

    Raises:
        UserError: not YAML, a key that is not known, or a value that cannot be.
    """
    types, given = typing.get_type_hints(Plan), read_settings(path)
    try:
        values: dict[str, Any] = {}
        for key, value in given.items():
            if key not in types:
                near = difflib.get_close_matches(key, types, n=1)
                hint = f"did you mean {near[0]}?" if near else f"keys are {', '.join(types)}"
                raise UserError(f"{key} is not a key of a plan; {hint}")
            if key == "calibration_documents" and isinstance(value, list):
                value = [ALL if x == "all" else 0 if x == ALL else x for x in value]
            values[key] = _value(key, value, types[key])
        if "models" not in values:
            raise UserError("models is missing; name at least one, as in `EMO: runs/quickstart`")
        return Plan(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


WORDS = {str: "text", int: "a whole number", float: "a number"}


def _value(key: str, value: Any, kind: Any) -> Any:
    """A value of YAML as one of the type of its field."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key}={value!r} must be `name: path` lines")
        return {_value(key, str(name), str): _value(key, item, str) for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{key}={value!r} must be a list, for example [{value}]")
        return tuple(_value(key, item, parts[0]) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is str and not (value.isprintable())):
        raise UserError(f"{key}={value!r} must be {WORDS[kind]}")
    return value


@dataclass(frozen=True)
class Cell:
    """One number of a sweep: a model with some of its experts on a domain."""

    model: str
    """Its name in the plan."""
    kind: Literal["domain", "task"]
    subject: str
    """A domain of the plan's data, or a task's file."""
    method: str
    """Of `emotrain select --method`; `FULL` keeps all experts."""
    keep: float
    calibration_documents: int
    """0 where no text chooses, `ALL` where all of it does."""
    seed: int


def cells_of(plan: Plan, domains: Sequence[str]) -> list[Cell]:
    """Every cell of a plan once, those of a model and a domain together, with all experts first."""
    subjects: list[tuple[Literal["domain", "task"], str]] = [
        *(("domain", name) for name in domains),
        *(("task", file) for file in plan.tasks),
    ]
    found: list[Cell] = []
    for model, (kind, name) in product(plan.models, subjects):
        found.append(Cell(model, kind, name, FULL, 1.0, 0, 0))
        for method, keep in product(plan.methods, sorted(plan.keep, reverse=True)):
            sizes = (0,) if method == "random" else plan.calibration_documents
            for size in sizes:
                # Of all documents there is one draw.
                for seed in plan.seeds[:1] if size == ALL else plan.seeds:
                    found.append(Cell(model, kind, name, method, keep, size, seed))
    return found


def in_words(size: int) -> str:
    """A number of calibration documents as tables show it."""
    return "all" if size == ALL else str(size or "–")


def by_amount(size: int) -> float:
    """What numbers of calibration documents are ordered by."""
    return math.inf if size == ALL else size
