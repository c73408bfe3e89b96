"""What the benchmarks share: arms timed in turn in one process, and one way to print what was
measured.

Arms run in rounds, one call of each a round, and every other round in reverse order, so that a busy
neighbour or a changing clock hits all of them alike. Ratios are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emotrain.batch import PackedBatch
from emotrain.data.packing import packed_rows


@dataclass(frozen=True)
class Timing:
    """Wall times of one arm, in ms, in the order they were taken."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def minimum(self) -> float:
        return min(self.ms)


def time_in_turn(
    arms: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    settle: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Call every arm `repeats` times in turn, after `warmup` rounds that are not counted. `settle`
    waits for the device before and after each call."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(-warmup, repeats):
        names = list(arms) if round_ % 2 == 0 else list(reversed(list(arms)))
        for name in names:
            settle()
            start = time.perf_counter()
            arms[name]()
            settle()
            ms = (time.perf_counter() - start) * 1e3
            if round_ >= 0:
                taken[name].append(ms)
    return {name: Timing(tuple(ms)) for name, ms in taken.items()}


def random_documents(
    rows: int, length: int, documents: int, vocab_size: int, seed: int = 0
) -> PackedBatch:
    """`documents` documents of random lengths and tokens that fill `rows` sequences of `length`
    tokens, at least one in each."""
    rng = np.random.default_rng(seed)
    row_starts = np.arange(rows) * length
    inside = np.setdiff1d(np.arange(rows * length), row_starts)
    starts = np.sort(
        np.concatenate([row_starts, rng.choice(inside, documents - rows, replace=False)])
    )
    lengths, row_of = np.diff(starts, append=rows * length), starts // length
    return packed_rows(
        rng.integers(vocab_size, size=(rows, length)),
        [lengths[row_of == row].tolist() for row in range(rows)],
        [np.flatnonzero(row_of == row).tolist() for row in range(rows)],
        cross_document_targets=False,
    )


def arguments(doc: str, repeats: int) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has; the first line of `doc` describes it."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object as the last line of standard output",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="threads of torch (default: all cores, %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=repeats,
        help="timed calls of each arm (default: %(default)s)",
    )
    return parser


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def report(
    title: str, timings: Mapping[str, Timing], results: Mapping[str, Any], as_json: bool
) -> None:
    """A table of times and results to standard error and, if asked, all of it as JSON on
    standard output."""
    from rich.console import Console
    from rich.table import Table

    described = machine()
    console = Console(file=sys.stderr)
    table = Table(
        "arm",
        "median ms",
        "min ms",
        title=title,
        title_justify="left",
        caption="  ".join(f"{key} {value}" for key, value in described.items()),
        caption_justify="left",
    )
    for name, timing in timings.items():
        table.add_row(name, f"{timing.median:,.2f}", f"{timing.minimum:,.2f}")
    console.print(table)
    for key, value in results.items():
        console.print(
            f"{key}: {value:,.3f}" if isinstance(value, float) else f"{key}: {value}",
            highlight=False,
        )
    if as_json:
        times = {
            name: {"median_ms": timing.median, "min_ms": timing.minimum}
            for name, timing in timings.items()
        }
        print(json.dumps({**results, "times": times, "machine": described}))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
