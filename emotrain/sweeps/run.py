"""`emotrain sweep`: every cell of a plan that is not there yet, in one or several processes."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from emotrain.errors import RunError, UserError
from emotrain.evaluation.measure import mean_increase, rows_of
from emotrain.files import json_text, make_writable, write_whole
from emotrain.folders import exclusive_lock
from emotrain.progress import ProgressBar
from emotrain.sweeps.cells import Sweep
from emotrain.sweeps.figures import NAMES, figures
from emotrain.sweeps.measuring import Bench
from emotrain.sweeps.plan import Cell
from emotrain.sweeps.store import Entry, Failure, Measured
from emotrain.sweeps.subjects import Items
from emotrain.sweeps.summary import ROW_NAMES, Summary, as_csv, cell_rows, row_dicts, tables
from emotrain.sweeps.workers import Died, run_pieces

log = logging.getLogger("emotrain")


def run_sweep(
    sweep: Sweep,
    bar: ProgressBar,
    *,
    jobs: int = 1,
    device: str = "auto",
    micro_batch: int = 0,
    retry: bool = False,
) -> Summary:
    """Measure every cell that is not there, and write what all of them say together. A cell that
    fails is recorded, and the others go on.

    Args:
        jobs: processes, each with a model of its own.
        micro_batch: rows of one forward pass; 0 means as in training.
        retry: whether cells that failed before are tried again.
    Raises:
        RunError: another sweep writes to the folder.
    """
    if jobs < 1:
        raise UserError(f"jobs={jobs} does no work; give at least 1")
    rows_of(micro_batch, 1)
    make_writable(sweep.out)
    with exclusive_lock(sweep.out / ".lock") as alone:
        if not alone:
            raise RunError(
                f"{sweep.out}: another sweep writes to this folder; wait for its end or choose "
                f"another --out"
            )
        _remove_results(sweep.out)
        _measure_all(sweep, bar, jobs, device, micro_batch, retry)
        summary = Summary.of(sweep)
        _write_results(summary, sweep.out)
    return summary


def _measure_all(
    sweep: Sweep, bar: ProgressBar, jobs: int, device: str, micro_batch: int, retry: bool
) -> None:
    done = {entry.folder for entry in sweep.entries if entry.result is not None}
    wanted = {  # two names of one model are measured once
        entry.folder: entry for entry in sweep.entries if entry.folder not in done
    }
    todo = [
        entry
        for entry in wanted.values()
        if retry or (failure := entry.failure) is None or failure.killed
    ]
    log.info("%d cells: %d done, %d to do", len(sweep.entries), len(done), len(todo))
    pieces = [list(piece) for _, piece in groupby(todo, key=_measured_together)]
    prepare = partial(_worker, sweep, device, micro_batch)
    bar.start("cells", len(sweep.entries), len(sweep.entries) - len(todo))
    with closing(run_pieces(pieces, prepare, jobs, lambda piece: piece[0].cell.model)) as work:
        for piece, died in work:
            if died is not None:
                _record_death(piece, died)
            bar.advance(len(piece))


def _measured_together(entry: Entry) -> tuple[str, str, str]:
    return entry.cell.model, entry.cell.kind, entry.cell.subject


def _record_death(piece: Sequence[Entry], died: Died) -> None:
    error = f"its process ended in the middle of it (exit code {died.exit_code})"
    for entry in piece:
        if entry.result is None:
            entry.write(Failure(error, killed=True))


def _worker(sweep: Sweep, device: str, micro_batch: int) -> Callable[[Sequence[Entry]], None]:
    bench = Bench(sweep.plan, sweep.checkpoints, device, micro_batch)
    return lambda piece: measure_piece(sweep, bench, piece)


def measure_piece(sweep: Sweep, bench: Bench, piece: Sequence[Entry]) -> None:
    """Measure cells of one model and one domain, and record what they came to."""
    full = sweep.full(piece[0].cell)
    known = full.result
    if known is None and all(entry.cell != full.cell for entry in piece):
        piece = [full, *piece]  # it failed before
    try:
        found = bench.measure([entry.cell for entry in piece])
        outcomes = _outcomes(found, full.cell, known)
    except (UserError, RunError) as error:
        outcomes = dict.fromkeys((e.cell for e in piece), Failure(str(error)))
    except Exception as error:  # whatever it is, the other cells go on
        text = " ".join(f"{type(error).__name__}: {error}".split())
        failure = Failure(text, traceback.format_exc())
        outcomes = dict.fromkeys((entry.cell for entry in piece), failure)
    for entry in piece:
        entry.write(outcomes[entry.cell])


def _outcomes(
    found: dict[Cell, Items | UserError], full: Cell, known: Measured | None
) -> dict[Cell, Measured | Failure]:
    """
    Args:
        known: what all experts came to, where `found` does not have it.
    """
    base = found.get(full)
    if known is not None:
        base = Items(known.metric, known.item_amounts, known.item_sizes, ())
    assert isinstance(base, Items), "all experts need no text that could be missing"
    return {
        cell: Failure(str(items)) if isinstance(items, UserError) else _measured(items, base)
        for cell, items in found.items()
    }


def _measured(items: Items, full: Items) -> Measured | Failure:
    amounts_U, full_U, sizes_U = (
        torch.tensor(values, dtype=torch.float64)
        for values in (items.amounts, full.amounts, items.sizes)
    )
    group_U = torch.zeros(len(sizes_U), dtype=torch.int64)
    if not (amounts_U.isfinite().all() and full_U.isfinite().all()):
        return Failure("its numbers are not finite")
    if len(sizes_U) < 2:
        return Failure("a single item gives no standard error; give at least 2")
    (change, error), value = mean_increase(amounts_U - full_U, sizes_U, group_U), amounts_U.sum()
    return Measured(
        items.metric,
        float(value / sizes_U.sum()),
        float(change),
        float(error),
        items.experts_kept_per_layer,
        items.amounts,
        items.sizes,
    )


def _write_results(summary: Summary, out: Path) -> None:
    """sweep.json, sweep.md, rows.csv, cells.csv; and figures/NAME.png with its data beside it,
    where matplotlib is installed."""
    cells = cell_rows(summary)
    (out / "figures").mkdir(exist_ok=True)
    for name, content in {
        "sweep.json": json_text(summary.to_json(), indent=1, ensure_ascii=False).encode() + b"\n",
        "sweep.md": "\n".join(table.markdown() for table in tables(summary)).encode(),
        "rows.csv": as_csv(row_dicts(summary), ROW_NAMES),
        "cells.csv": as_csv(cells, tuple(cells[0])),
    }.items():
        write_whole(out / name, content)
    for name, (data, draw) in figures(summary).items():
        write_whole(out / "figures" / f"{name}.csv", data)
        try:
            write_whole(out / "figures" / f"{name}.png", draw())
        except ModuleNotFoundError as error:
            log.warning("figures/%s.png was not drawn: %s", name, error)


RESULTS = (
    *("sweep.json", "sweep.md", "rows.csv", "cells.csv"),
    *(f"figures/{name}.{kind}" for name in NAMES for kind in ("png", "csv")),
)


def _remove_results(out: Path) -> None:
    """What an earlier plan, or fewer cells, came to must not stand beside cells of this one."""
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
