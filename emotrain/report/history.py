"""metrics.jsonl and expert_loads.jsonl as arrays. Nothing in them is trusted: a run may have been
killed in the middle of a line, gone back over its steps, or diverged."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MOST_STEP = 2**53
"""Steps above this are no numbers of steps."""


@dataclass(frozen=True)
class Series:
    """What one key of metrics.jsonl says over the steps."""

    steps: np.ndarray
    """int64 [n], rising."""
    values: np.ndarray
    """float64 [n, columns]: one column for a number, one a layer for a list. nan or inf where the
    run's number was not finite."""
    per_layer: bool

    @property
    def last(self) -> float:
        return float(self.values[-1, 0])


@dataclass(frozen=True)
class History:
    """All of a run's metrics, by key."""

    series: dict[str, Series] = field(default_factory=dict)
    dropped_lines: int = 0
    """Lines that are no records of metrics."""
    repeated_steps: int = 0
    """Records of a step that a later record replaces: the run went back and did it again."""

    def __contains__(self, key: str) -> bool:
        return key in self.series

    def last(self, key: str) -> float | None:
        return self.series[key].last if key in self.series else None


@dataclass(frozen=True)
class Loads:
    """The slots of every expert over the steps."""

    steps: np.ndarray
    """int64 [n], rising."""
    slots: list[np.ndarray]
    """For each layer with routed experts float64 [n, N]."""

    def relative(self, layer: int) -> np.ndarray:
        """float64 [n, N]: load over the mean load of the layer in that step; 0 where no expert has
        any."""
        slots = self.slots[layer]
        return slots / np.maximum(slots.mean(axis=1, keepdims=True), 1e-30)


@dataclass
class _Collected:
    """The values of a key as they are read: `width` numbers for each step. `order` is the number of
    the record, of which the last one of a step wins."""

    width: int
    per_layer: bool
    steps: array = field(default_factory=lambda: array("q"))
    values: array = field(default_factory=lambda: array("d"))

    def series(self) -> Series:
        steps = np.array(self.steps, dtype=np.int64)
        values = np.array(self.values, dtype=np.float64).reshape(len(steps), self.width)
        # The first of the turned-round records is the last.
        steps, turned = np.unique(steps[::-1], return_index=True)
        return Series(steps, values[::-1][turned], self.per_layer)


def read_history(path: Path) -> History:
    """The metrics of a run; an empty history where there is no file."""
    found: dict[str, _Collected] = {}
    seen: set[int] = set()
    repeated = dropped = 0
    for record in _records(path):
        if record is None:
            dropped += 1
            continue
        step = record.pop("step")
        repeated += step in seen
        seen.add(step)
        for key, value in record.items():
            numbers = [number_of(item) for item in (value if isinstance(value, list) else [value])]
            if not numbers or any(number is None for number in numbers):
                continue
            per_layer = isinstance(value, list)
            kept = found.get(key)
            if kept is None or (kept.width, kept.per_layer) != (len(numbers), per_layer):
                # Of a key that has changed its form, what it is now.
                kept = found[key] = _Collected(len(numbers), per_layer)
            kept.steps.append(step)
            kept.values.extend(numbers)
    series = {key: kept.series() for key, kept in found.items()}
    return History(series, dropped, repeated)


def read_loads(path: Path) -> Loads | None:
    """The expert loads of a run; None where there are none, as of a run from before they were
    written."""
    records: dict[int, list[np.ndarray]] = {}
    for record in _records(path):
        slots = _slots(record.get("slots")) if record else None
        if record and slots:
            records[record["step"]] = slots
    if not records:
        return None
    shapes = [tuple(map(len, slots)) for slots in records.values()]
    steps = [step for step, shape in zip(records, shapes, strict=True) if shape == shapes[-1]]
    steps.sort()
    layers = zip(*(records[step] for step in steps), strict=True)
    return Loads(np.array(steps, dtype=np.int64), [np.stack(layer) for layer in layers])


def _slots(value: Any) -> list[np.ndarray] | None:
    """Slots of each layer, or None of anything else."""
    try:
        slots = [np.array(layer, dtype=np.float64) for layer in value]
    except (TypeError, ValueError, OverflowError):
        return None
    good = all(s.ndim == 1 and s.size and np.isfinite(s).all() and (s >= 0).all() for s in slots)
    return slots if good else None


def _records(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line as an object with a whole `step`; None for one that is none."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            step = record.get("step") if isinstance(record, dict) else None
            yield record if type(step) is int and 0 <= step < MOST_STEP else None


def number_of(value: Any) -> float | None:
    """A number of metrics.jsonl, where null stands for one that is not finite; None of anything
    else."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def thin(x: np.ndarray, values: np.ndarray, most: int) -> np.ndarray:
    """Which rows to draw of a curve that has more points than can be seen: at most about `most`.

    The axis is cut into `most / 4` equal pieces; of each piece the first and the last row stay, the
    one with the lowest and the one with the highest value, and one that is not finite.

    Args:
        x: [n], rising. values: [n, columns].
    Returns:
        int64 [m], rising.
    """
    if len(x) <= most:
        return np.arange(len(x))
    finite = np.isfinite(values)
    low = np.where(finite, values, np.inf).min(axis=1)
    high = np.where(finite, values, -np.inf).max(axis=1)
    bad = ~finite.all(axis=1)
    edges = np.linspace(float(x[0]), float(x[-1]), max(1, most // 4) + 1)
    bounds = np.unique(np.concatenate([np.searchsorted(x, edges[:-1]), [len(x)]]))
    kept: set[int] = set()
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        piece = slice(start, stop)
        kept |= {start, stop - 1, start + int(low[piece].argmin())}
        kept |= {start + int(high[piece].argmax()), start + int(bad[piece].argmax())}
    return np.array(sorted(kept), dtype=np.int64)


def tail(values: Sequence[float] | np.ndarray, share: float = 0.1) -> np.ndarray:
    """The last part of a curve, at least one value of it."""
    values = np.asarray(values)
    return values[-max(1, int(len(values) * share)) :]
