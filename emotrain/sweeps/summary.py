"""What the cells of a sweep say together: mean over domains, mean and spread over seeds. A number
of which a cell is missing is refused, not averaged over the rest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from emotrain.evaluation.tables import plain
from emotrain.sweeps.cells import Sweep
from emotrain.sweeps.plan import ALL, FULL, Cell, Plan, in_words
from emotrain.sweeps.store import Entry, Measured
from emotrain.tables import Table, csv_text

LOSS = "loss_nats_per_token"


@dataclass(frozen=True)
class Row:
    """A model with some experts, over the seeds of the plan. Numbers are None where a cell is
    missing."""

    model: str
    subject: str
    """A domain or a task; empty for the mean over all subjects of the metric."""
    metric: str
    method: str
    keep: float
    experts: str
    """`8 of 32`, shared ones counted; empty where no cell is there."""
    calibration_documents: int
    seeds: int
    missing_cells: int
    value: float | None
    """In the unit of the metric, as all that follow."""
    change: float | None
    """From all experts."""
    change_spread: float | None
    """Standard deviation over seeds; None with one."""
    change_standard_error: float | None
    """Over documents or questions, mean over seeds."""


@dataclass(frozen=True)
class Summary:
    """A sweep, read once."""

    plan: Plan
    cells: tuple[tuple[Entry, Measured | None, str | None], ...]
    """Of each its result, or why it has none; neither where it was not tried."""
    means: tuple[Row, ...]
    subjects: tuple[Row, ...]

    @classmethod
    def of(cls, sweep: Sweep) -> Summary:
        cells = tuple(
            (entry, entry.result, failure.error if (failure := entry.failure) else None)
            for entry in sweep.entries
        )
        results = {entry.cell: result for entry, result, _ in cells}
        metric_of = {
            (cell.kind, cell.subject): LOSS if cell.kind == "domain" else "" for cell in results
        }
        for cell, found in results.items():
            if found is not None:
                metric_of[cell.kind, cell.subject] = found.metric
        seeds_of: dict[Key, dict[int, None]] = {}
        for cell in results:
            key = (cell.model, cell.method, cell.keep, cell.calibration_documents)
            seeds_of.setdefault(key, {})[cell.seed] = None

        def rows(name: str, metric: str, subjects: Sequence[Subject]) -> list[Row]:
            return [
                _row(key, name, metric, subjects, list(seeds), results)
                for key, seeds in seeds_of.items()
            ]

        by_metric = {
            metric: [subject for subject, of in metric_of.items() if of == metric]
            for metric in dict.fromkeys(metric_of.values())
        }
        means = [row for metric, names in by_metric.items() for row in rows("", metric, names)]
        each = [row for subject, of in metric_of.items() for row in rows(subject[1], of, [subject])]
        return cls(sweep.plan, cells, tuple(means), tuple(each))

    @property
    def failed(self) -> list[tuple[Cell, str]]:
        return [
            (entry.cell, why or "was not measured")
            for entry, result, why in self.cells
            if result is None
        ]

    def to_json(self) -> dict[str, Any]:
        sizes = ["all" if size == ALL else size for size in self.plan.calibration_documents]
        return {
            "cells": len(self.cells),
            "failed": [{**_named(asdict(cell)), "error": why} for cell, why in self.failed],
            "plan": {**asdict(self.plan), "calibration_documents": sizes},
            "means": [_named(asdict(row)) for row in self.means],
            "subjects": [_named(asdict(row)) for row in self.subjects],
        }


Subject = tuple[Literal["domain", "task"], str]
Key = tuple[str, str, float, int]
"""Model, method, share kept, calibration documents."""


def _row(
    key: Key,
    subject: str,
    metric: str,
    subjects: Sequence[Subject],
    seeds: Sequence[int],
    results: Mapping[Cell, Measured | None],
) -> Row:
    model, method, keep, documents = key

    def result(subject: Subject, *choice: Any) -> Measured | None:
        return results[Cell(model, *subject, *choice)]

    by_seed = [[result(of, method, keep, documents, seed) for of in subjects] for seed in seeds]
    there = [[found for found in of_seed if found is not None] for of_seed in by_seed]
    missing = sum(map(len, by_seed)) - sum(map(len, there))
    value = change = spread = error = None
    if not missing:
        changes = [statistics.fmean(found.change for found in of_seed) for of_seed in there]
        value = statistics.fmean(found.value for of_seed in there for found in of_seed)
        change = statistics.fmean(changes)
        spread = statistics.stdev(changes) if len(changes) > 1 else None
        # Subjects hold different items, seeds the same.
        error = statistics.fmean(
            math.hypot(*(found.change_standard_error for found in of_seed)) / len(of_seed)
            for of_seed in there
        )
    full = next((result(of, FULL, 1.0, 0, 0) for of in subjects), None)
    every = [found for of_seed in there for found in of_seed]
    return Row(
        model=model,
        subject=subject,
        metric=metric,
        method=method,
        keep=keep,
        experts=_experts(keep, every, full),
        calibration_documents=documents,
        seeds=len(seeds),
        missing_cells=missing,
        value=value,
        change=change,
        change_spread=spread,
        change_standard_error=error,
    )


def _experts(keep: float, there: Sequence[Measured], full: Measured | None) -> str:
    if full is None:
        return ""
    kept = {count for found in there for count in found.experts_kept_per_layer}
    of = set(full.experts_kept_per_layer)
    if len(kept) == len(of) == 1:
        return f"{kept.pop()} of {of.pop()}"
    return f"{keep:.3g} of each layer" if there else ""


# ---- as tables and files


def tables(summary: Summary) -> list[Table]:
    """Of each model, by subject, what the first method and the most text chose; then the means."""
    metrics = dict.fromkeys(row.metric for row in summary.means)
    return [
        *(_subject_table(summary, model, m) for model in summary.plan.models for m in metrics),
        *(_mean_table(summary, metric) for metric in metrics),
    ]


def words_of(metric: str) -> str:
    """A metric and its unit."""
    known = {LOSS: "loss (nats/token)", "bits_per_byte": "bits per byte"}
    return known.get(metric, f"{metric.replace('_', ' ')} (share of questions)")


def _mean_table(summary: Summary, metric: str) -> Table:
    """Every row of the means."""
    return Table(
        f"Mean {words_of(metric)} with a share of the experts, and its change from all experts; "
        f"over {'domains' if metric == LOSS else 'tasks'}, unweighted, and over seeds; ± standard "
        f"deviation over seeds",
        ("model", "chosen by", "experts kept", "calibration docs", "seeds", "mean", "change"),
        tuple(
            (
                row.model,
                "–" if row.method == FULL else row.method,
                row.experts or f"{row.keep:.3g} of each layer",
                in_words(row.calibration_documents),
                "–" if row.method == FULL else str(row.seeds),
                plain(row.value, 3),
                "" if row.method == FULL and not row.missing_cells else _change(row),
            )
            for row in summary.means
            if row.metric == metric
        ),
        names=3,
    )


def _subject_table(summary: Summary, model: str, metric: str) -> Table:
    method = summary.plan.methods[0]
    documents = most_documents(summary.plan, method)
    rows = {
        (row.subject, row.keep): row
        for row in summary.subjects
        if (row.model, row.metric) == (model, metric)
        and (row.method == FULL or (row.method, row.calibration_documents) == (method, documents))
    }
    keeps = sorted({keep for _, keep in rows if keep < 1}, reverse=True)
    names = list(dict.fromkeys(subject for subject, _ in rows))
    plural = "" if documents == 1 else "s"
    by_text = f", by {in_words(documents)} document{plural}" if documents else ""
    labels = {keep: f"{keep:g}" for keep in keeps}
    labels |= {row.keep: row.experts for row in rows.values() if row.experts and row.keep < 1}
    return Table(
        f"{model}, {words_of(metric)}: with all experts, and the change with those that {method} "
        f"chose{by_text}; ± standard deviation over seeds",
        ("domain" if metric == LOSS else "task", "all", *labels.values()),
        tuple(
            (
                name,
                plain(rows[name, 1.0].value, 3),
                *(_change(rows[name, keep]) for keep in keeps),
            )
            for name in names
        ),
    )


def _change(row: Row) -> str:
    if row.missing_cells:
        return f"refused: {row.missing_cells} cells missing"
    spread = "" if row.change_spread is None else f" ± {row.change_spread:.3f}"
    return f"{row.change:+.3f}{spread}"


def most_documents(plan: Plan, method: str) -> int:
    """The calibration size that tables and figures of one size show: the largest of which there are
    several draws, and so a spread; all documents where nothing else is there."""
    return 0 if method == "random" else max(plan.calibration_documents)


def as_csv(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """Rows of equal keys; None is an empty field."""
    return csv_text(names, ([_named(row)[name] for name in names] for row in rows)).encode()


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row or a cell with `all` for all calibration documents."""
    size = row["calibration_documents"]
    return {**row, "calibration_documents": "all" if size == ALL else size}


ROW_NAMES = tuple(field.name for field in fields(Row))


def row_dicts(summary: Summary) -> list[dict[str, Any]]:
    """Every row, as a line of rows.csv: the means first, whose subject is empty."""
    return [asdict(row) for row in (*summary.means, *summary.subjects)]


def cell_rows(summary: Summary) -> list[dict[str, Any]]:
    """Every cell, as a line of cells.csv."""
    return [
        {
            **asdict(entry.cell),
            "metric": result and result.metric,
            "value": result and result.value,
            "change": result and result.change,
            "change_standard_error": result and result.change_standard_error,
            "folder": entry.folder.name,
            "error": why,
        }
        for entry, result, why in summary.cells
    ]
