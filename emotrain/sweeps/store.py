"""The folder of a sweep: a folder for each cell, with what it depends on and what it came to.

    OUT/cells/EMO-rust-router-0.25-8-0-1f3a…/settings.json    what the number depends on
                                             result.json      the number; or
                                             failure.json     why there is none

The name ends in a hash of the settings: of the checkpoint, the data and everything that the number
depends on. What changes in a plan, or behind it, gets other folders, and what does not is found
again. A result is written whole or is not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.errors import UserError
from emotrain.files import json_text, write_whole
from emotrain.sweeps.plan import ALL, Cell

log = logging.getLogger("emotrain")

FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """What a cell came to. `value` is the sum of the items' amounts over the sum of their sizes."""

    metric: str
    """`loss_nats_per_token` of a domain; of a task its headline metric."""
    value: float
    change: float
    """From all experts."""
    change_standard_error: float
    """Over items."""
    experts_kept_per_layer: tuple[int, ...]
    """Shared ones counted."""
    item_amounts: tuple[float, ...]
    """Of each document in nats, of each question in points (or bits): what later cells are compared
    with."""
    item_sizes: tuple[float, ...]
    """Tokens of each document that were predicted; 1 for a question (or its bytes)."""


@dataclass(frozen=True)
class Failure:
    """Why a cell has no number."""

    error: str
    """One line."""
    traceback: str = ""
    """Empty where a person can mend it."""
    killed: bool = False
    """Whether its process ended in the middle of it: it may pass when it is measured again."""


@dataclass(frozen=True)
class Entry:
    """A cell of a plan, and where it lies."""

    cell: Cell
    settings: dict[str, Any]
    """All that its number depends on, as JSON."""
    folder: Path

    @classmethod
    def of(cls, cell: Cell, depends_on: dict[str, Any], out: Path) -> Entry:
        """
        Args:
            depends_on: what is not in the cell itself. A model's name is none of it: under another
                one its cells are found again.
        """
        of_cell = dataclasses.asdict(cell)
        del of_cell["model"]
        settings = {"format": FORMAT, **of_cell, **depends_on}
        digest = hashlib.sha256(json_text(settings).encode()).hexdigest()[:16]
        name = cell.subject.rpartition("/")[2]
        size = "all" if cell.calibration_documents == ALL else cell.calibration_documents
        words = (name, cell.method, cell.keep, size, cell.seed)
        # A name is any text, and that of a folder is not.
        name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", str(word))[:40] for word in words)
        return cls(cell, settings, out / "cells" / f"{name.lstrip('.')}-{digest}")

    @property
    def result(self) -> Measured | None:
        """What the cell came to; None where it is not there, or not readable."""
        file = self.folder / "result.json"
        if not file.is_file():
            return None
        try:
            return _measured(json.loads(file.read_text(encoding="utf-8")), self.settings)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            log.warning("%s: not the result of its cell (%s); it is measured again", file, error)
            return None

    @property
    def failure(self) -> Failure | None:
        """Why the cell has no number; None where it has one or was not tried."""
        file = self.folder / "failure.json"
        if not file.is_file() or self.result is not None:
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return Failure(str(values["error"]), killed=values["killed"] is True)
        except (ValueError, TypeError, KeyError, RecursionError):
            return Failure("its failure.json is not readable", killed=True)

    def write(self, outcome: Measured | Failure) -> None:
        """Record what the cell came to, in place of what was there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("settings.json", self.settings)
        values = dataclasses.asdict(outcome)
        if isinstance(outcome, Failure):
            self._write("failure.json", values)
            return
        self._write("result.json", {"settings": self.settings, **values})
        (self.folder / "failure.json").unlink(missing_ok=True)

    def _write(self, name: str, values: dict[str, Any]) -> None:
        write_whole(self.folder / name, (json_text(values, indent=1) + "\n").encode())


def _measured(values: Any, settings: dict[str, Any]) -> Measured:
    """Nothing of a file is trusted."""
    if not isinstance(values, dict):
        raise UserError("it is no object")
    # Through JSON, which has no tuples.
    if values.pop("settings") != json.loads(json_text(settings)):
        raise UserError("it is of other settings")
    found = Measured(**values)
    for name, kinds in (
        ("item_amounts", (int, float)),
        ("item_sizes", (int, float)),
        ("experts_kept_per_layer", (int,)),
    ):
        items = getattr(found, name)
        if not isinstance(items, list) or any(type(item) not in kinds for item in items):
            raise UserError(f"{name} is not a list of numbers")
    numbers = (found.value, found.change, found.change_standard_error)
    if any(type(number) not in (int, float) for number in numbers):
        raise UserError("a number is missing")
    every = [*numbers, *found.item_amounts, *found.item_sizes]
    if not all(map(math.isfinite, every)) or not isinstance(found.metric, str):
        raise UserError("a number is not finite")
    if len(found.item_amounts) != len(found.item_sizes) or not found.item_sizes:
        raise UserError("it has not one size an amount")
    return dataclasses.replace(
        found,
        experts_kept_per_layer=tuple(found.experts_kept_per_layer),
        item_amounts=tuple(map(float, found.item_amounts)),
        item_sizes=tuple(map(float, found.item_sizes)),
    )
