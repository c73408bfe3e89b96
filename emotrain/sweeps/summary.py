"""What the cells of a sweep say together: mean over domains, mean and spread over seeds. A number
of which a cell is missing is refused, not averaged over the rest."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from emotrain.evaluation.tables import plain
from emotrain.sweeps.cells import Sweep
from emotrain.sweeps.plan import FULL, Cell, Plan
from emotrain.sweeps.store import Entry, Measured
from emotrain.tables import Table

MEAN = ""
"""The domain of a row that is the mean over all of them, each with the same weight."""


@dataclass(frozen=True)
class Row:
    """A model with some experts, over the seeds of the plan. Numbers are None where a cell is
    missing."""

    model: str
    domain: str
    method: str
    keep: float
    experts: str
    """`8 of 32`, shared ones counted; empty where no cell is there."""
    calibration_documents: int
    seeds: int
    missing_cells: int
    loss_nats_per_token: float | None
    increase_nats_per_token: float | None
    """Over all experts."""
    increase_spread_nats_per_token: float | None
    """Standard deviation over seeds; None with one."""
    increase_standard_error_nats_per_token: float | None
    """Over documents, mean over seeds."""


@dataclass(frozen=True)
class Summary:
    """A sweep, read once."""

    plan: Plan
    cells: tuple[tuple[Entry, Measured | None, str | None], ...]
    """Of each its result, or why it has none; neither where it was not tried."""
    means: tuple[Row, ...]
    domains: tuple[Row, ...]

    @classmethod
    def of(cls, sweep: Sweep) -> Summary:
        cells = tuple((entry, entry.result, entry.failure) for entry in sweep.entries)
        results = {entry.cell: result for entry, result, _ in cells}
        subjects = list(dict.fromkeys(cell.subject for cell in results))
        groups: dict[tuple[str, str, float, int], list[int]] = {}
        for cell in results:
            key = (cell.model, cell.method, cell.keep, cell.calibration_documents)
            seeds = groups.setdefault(key, [])
            if cell.seed not in seeds:
                seeds.append(cell.seed)

        def rows(domain: str, of: Sequence[str]) -> list[Row]:
            return [_row(key, domain, of, seeds, results) for key, seeds in groups.items()]

        return cls(
            sweep.plan,
            cells,
            tuple(rows(MEAN, subjects)),
            tuple(row for subject in subjects for row in rows(subject, [subject])),
        )

    @property
    def failed(self) -> list[tuple[Cell, str]]:
        return [
            (entry.cell, why or "was not measured")
            for entry, result, why in self.cells
            if result is None
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "cells": len(self.cells),
            "failed": [{**asdict(cell), "error": why} for cell, why in self.failed],
            "plan": asdict(self.plan),
            "means": [asdict(row) for row in self.means],
            "domains": [asdict(row) for row in self.domains],
        }


def _row(
    key: tuple[str, str, float, int],
    domain: str,
    subjects: Sequence[str],
    seeds: Sequence[int],
    results: Mapping[Cell, Measured | None],
) -> Row:
    model, method, keep, documents = key
    by_seed = [
        [results[Cell(model, subject, method, keep, documents, seed)] for subject in subjects]
        for seed in seeds
    ]
    there = [found for of_seed in by_seed for found in of_seed if found is not None]
    missing = len(subjects) * len(seeds) - len(there)
    full = next((results[Cell(model, s, FULL, 1.0, 0, 0)] for s in subjects), None)
    loss = increase = spread = error = None
    if not missing:
        of_seeds = [[found for found in of_seed if found is not None] for of_seed in by_seed]
        changes = [statistics.fmean(found.change for found in of_seed) for of_seed in of_seeds]
        loss = statistics.fmean(found.value for found in there)
        increase = statistics.fmean(changes)
        spread = statistics.stdev(changes) if len(changes) > 1 else None
        # Domains hold different documents, seeds the same.
        error = statistics.fmean(
            math.hypot(*(found.change_standard_error for found in of_seed)) / len(of_seed)
            for of_seed in of_seeds
        )
    experts = _experts(keep, there, full)
    return Row(
        model, domain, method, keep, experts, documents, len(seeds), missing, loss, increase,
        spread, error,
    )  # fmt: skip


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
    """The means; and of each model, by domain, what the first method and the most text chose."""
    return [*(_domain_table(summary, model) for model in summary.plan.models), mean_table(summary)]


def mean_table(summary: Summary) -> Table:
    """Every row of the means."""
    return Table(
        "Loss with a share of the experts, and its increase over all experts, in nats/token; mean "
        "over domains, unweighted, and over seeds; ± standard deviation over seeds",
        ("model", "chosen by", "experts kept", "calibration docs", "seeds", "loss", "increase"),
        tuple(
            (
                row.model,
                "–" if row.method == FULL else row.method,
                row.experts or f"{row.keep:.3g} of each layer",
                str(row.calibration_documents or "–"),
                "–" if row.method == FULL else str(row.seeds),
                plain(row.loss_nats_per_token, 3),
                "" if row.method == FULL and not row.missing_cells else _increase(row),
            )
            for row in summary.means
        ),
        names=3,
    )


def _domain_table(summary: Summary, model: str) -> Table:
    method, documents = shown_choice(summary.plan)
    rows = {
        (row.domain, row.keep): row
        for row in summary.domains
        if row.model == model
        and (row.method == FULL or (row.method, row.calibration_documents) == (method, documents))
    }
    keeps = sorted({keep for _, keep in rows if keep < 1}, reverse=True)
    names = list(dict.fromkeys(domain for domain, _ in rows))
    by_text = f", by {documents} documents" if documents else ""
    labels = [
        next((r.experts for (_, k), r in rows.items() if k == keep and r.experts), "")
        for keep in keeps
    ]
    return Table(
        f"{model}: each domain with the experts that {method} chose{by_text}, in nats/token; ± "
        f"standard deviation over seeds",
        (
            "domain",
            "full loss",
            *(f"+ with {label or keep}" for label, keep in zip(labels, keeps, strict=True)),
        ),
        tuple(
            (
                name,
                plain(rows[name, 1.0].loss_nats_per_token, 3),
                *(_increase(rows[name, keep]) for keep in keeps),
            )
            for name in names
        ),
    )


def _increase(row: Row) -> str:
    if row.missing_cells:
        return f"refused: {row.missing_cells} cells missing"
    spread = row.increase_spread_nats_per_token
    return f"{row.increase_nats_per_token:+.3f}" + (
        f" ± {spread:.3f}" if spread is not None else ""
    )


def shown_choice(plan: Plan) -> tuple[str, int]:
    """The method and the calibration size that figures of one choice show: the first of the plan,
    and the largest."""
    method = plan.methods[0]
    return method, 0 if method == "random" else max(plan.calibration_documents)


def as_csv(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """Rows of equal keys; None is an empty field."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row[name] for name in names} for row in rows)
    return stream.getvalue().encode()


ROW_NAMES = tuple(field.name for field in fields(Row))


def row_dicts(summary: Summary) -> list[dict[str, Any]]:
    """Every row, as a line of rows.csv: the means first, whose domain is empty."""
    return [asdict(row) for row in (*summary.means, *summary.domains)]


def cell_rows(summary: Summary) -> list[dict[str, Any]]:
    """Every cell, as a line of cells.csv."""
    return [
        {
            **asdict(entry.cell),
            "loss_nats_per_token": result and result.value,
            "increase_nats_per_token": result and result.change,
            "increase_standard_error_nats_per_token": result and result.change_standard_error,
            "folder": entry.folder.name,
            "error": why,
        }
        for entry, result, why in summary.cells
    ]
