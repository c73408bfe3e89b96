"""A profile of a few steps: a Chrome trace of each rank, a table of the step's parts, and the rank
that the others wait for.

    RUN_DIR/profile/rank-N.trace.json.gz    for chrome://tracing or ui.perfetto.dev; the parts stand
                                            in it as `part: forward`, ...
                    rank-0.txt              the table, ranks by their own time, and the operations
                                            that took longest
                    summary.json            the same numbers of every rank, see `summarize`

Ranks that exchange something in every step take equally long for it: a slow one shows in the
others' waiting. So ranks are compared by their own time, which is the step without the time that
collectives were under way (on a GPU: that their kernels ran). The rank with the largest is the one
the others wait for. Two limits: work that overlaps a collective is not counted, and a slow network
between two nodes looks like waiting on both. A rank that is slow in another step than those
profiled is not seen.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from statistics import fmean, median, median_low
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from emotrain.config import ProfileConfig
from emotrain.distributed.ranks import Ranks
from emotrain.files import json_text, write_whole
from emotrain.tables import Table
from emotrain.training.engine import Phase, part, record_phases

log = logging.getLogger("emotrain")

Batch = TypeVar("Batch")

STRAGGLER_RATIO = 1.2
"""A rank is called slow when its own time is this many times the median's, in the median of the
profiled steps."""

STEP, PART = "step ", "part: "
"""How ranges are called in the trace."""

SHOWN_RANKS, SHOWN_OPERATIONS = 5, 20


def profiled_steps(
    batches: Iterable[Batch], first_step: int, settings: ProfileConfig, ranks: Ranks, run_dir: Path
) -> Generator[tuple[int, Batch], None, None]:
    """`enumerate(batches, first_step)` that profiles steps `start` to `start + steps - 1`; with
    `start` 0 it is nothing else.

    A step lasts from asking for its batch to asking for the next one. Close the generator
    (`contextlib.closing`) when leaving its loop early: a profile under way then ends without a
    result. Every rank must ask for the same steps: their numbers are gathered after the last
    profiled one.
    """
    if not settings.start:
        yield from enumerate(batches, first_step)
        return
    ahead, last_step = iter(batches), settings.start + settings.steps - 1
    window: _Window | None = None
    try:
        for step in count(first_step):
            if window is None and settings.start <= step <= last_step:
                window = _Window(ranks)
                record_phases(window.phase)
            with nullcontext() if window is None else window.range(f"{STEP}{step}"):
                with part(Phase.DATA):
                    batch = next(ahead, None)
                if batch is not None:
                    yield step, batch
            if window is not None and batch is not None:
                window.steps.append(step)
            if window is not None and (batch is None or step == last_step):
                record_phases(None)
                finished, window = window, None
                _report(finished, ranks, run_dir / "profile")
            if batch is None:
                return
    finally:
        if window is not None:
            record_phases(None)
            window.profiler.stop_trace()
            log.warning(
                "training ended before profile.steps=%d steps were profiled; no profile is written",
                settings.steps,
            )


class _Window:
    """The profiled steps: torch's profiler, with a range for each step and each part."""

    def __init__(self, ranks: Ranks):
        self.on_gpu = ranks.device.type == "cuda"
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        )
        self.profiler.prepare_trace()
        # Getting ready takes its time, and not the same on every rank.
        ranks.barrier()
        self.profiler.start_trace()
        self.steps: list[int] = []
        self.marks: list[list[torch.cuda.Event]] = []
        """Beginning and end of each range in the GPU's present stream, which runs behind the
        host; in order of the beginnings."""

    def phase(self, phase: str) -> AbstractContextManager[None]:
        return self.range(PART + phase)

    @contextmanager
    def range(self, label: str) -> Iterator[None]:
        marks = self._mark()
        self.marks.append(marks)
        with record_function(label):
            yield
        marks += self._mark()

    def _mark(self) -> list[torch.cuda.Event]:
        if not self.on_gpu:
            return []
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return [event]

    def measure(self) -> list[dict[str, tuple[float, float]]]:
        """For each step, the seconds of each of its parts, and those in which collectives were
        under way."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.profiler.stop_trace()
        events = self.profiler.events()
        ranges = sorted(
            (
                event
                for event in events
                if event.is_user_annotation
                and event.device_type == DeviceType.CPU
                and event.name.startswith((STEP, PART))
            ),
            key=lambda event: event.time_range.start,
        )
        if self.on_gpu:
            seconds = [begin.elapsed_time(end) / 1e3 for begin, end in self.marks]
        else:
            seconds = [event.time_range.elapsed_us() / 1e6 for event in ranges]
        collectives = collective_seconds(
            events, [(event.time_range.start, event.time_range.end) for event in ranges]
        )
        return step_parts(
            [event.name for event in ranges],
            [
                # Kernels that overlap others can add up to more than the range lasted.
                (whole, min(whole, under_way))
                for whole, under_way in zip(seconds, collectives, strict=True)
            ],
        )[: len(self.steps)]


def step_parts(
    labels: Sequence[str], times: Sequence[tuple[float, float]]
) -> list[dict[str, tuple[float, float]]]:
    """Add up the parts of each step, and put the rest of it under Phase.OTHER.

    Args:
        labels: `step N` before the `part: NAME` of the step, as they began.
        times: seconds and collectives' seconds of each.
    """
    steps: list[dict[str, tuple[float, float]]] = []
    for label, (seconds, collectives) in zip(labels, times, strict=True):
        if label.startswith(STEP):
            steps.append({Phase.OTHER: (seconds, collectives)})
            continue
        parts, name = steps[-1], label.removeprefix(PART)
        had, rest = parts.get(name, (0.0, 0.0)), parts[Phase.OTHER]
        parts[name] = (had[0] + seconds, had[1] + collectives)
        parts[Phase.OTHER] = (max(0.0, rest[0] - seconds), max(0.0, rest[1] - collectives))
    return steps


def collective_seconds(events: Iterable[Any], ranges: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds of each range in which collectives were under way.

    Args:
        events: of torch's profiler. On a CPU, gloo's own ranges say when a collective was under
            way. On a GPU, kernels of NCCL count for the range in which they were launched, by
            whichever thread: backward has its own.
        ranges: beginning and end in microseconds; one lies in another or beside it.
    """
    flights: list[list[float]] = []
    kernels: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda event: event.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        if event.name.startswith("gloo:"):
            if flights and start <= flights[-1][1]:
                flights[-1][1] = max(flights[-1][1], end)
            else:
                flights.append([start, end])
        kernels += [
            (start, kernel.duration) for kernel in event.kernels if kernel.name.startswith("nccl")
        ]
    return [
        (
            sum(max(0.0, min(end, until) - max(start, since)) for since, until in flights)
            + sum(duration for launched, duration in kernels if start <= launched < end)
        )
        / 1e6
        for start, end in ranges
    ]


def summarize(steps: Sequence[int], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `summary.json` holds.

    Args:
        steps: numbers of the profiled steps.
        measured: for each rank `host`, and `steps`: the result of `measure`.

    Returns:
        `steps`; `ranks`, for each rank `rank`, `host`, `seconds` and `own_seconds` of a step,
        `ratio` and `parts` (for each part its `seconds` and `collective_seconds`), all means over
        the steps but `ratio`: own time over the median rank's, in the median step;
        `slowest`: `rank`, `host`, `ratio` and the `part` in which it most exceeds the median rank,
            `straggler`: whether its ratio is
        above `straggler_ratio`; null for one rank.
    """
    own = [
        [
            sum(seconds - collectives for seconds, collectives in step.values())
            for step in rank["steps"]
        ]
        for rank in measured
    ]
    # The lower median: of two ranks the faster one is the measure.
    medians = [max(median_low(values), 1e-9) for values in zip(*own, strict=True)]
    ranks = []
    for number, (rank, own_seconds) in enumerate(zip(measured, own, strict=True)):
        parts = {
            name: {
                key: fmean(step.get(name, (0.0, 0.0))[index] for step in rank["steps"])
                for index, key in enumerate(("seconds", "collective_seconds"))
            }
            for name in dict.fromkeys(name for step in rank["steps"] for name in step)
        }
        ratio = median(mine / of_all for mine, of_all in zip(own_seconds, medians, strict=True))
        ranks.append(
            {
                "rank": number,
                "host": rank["host"],
                "seconds": sum(part["seconds"] for part in parts.values()),
                "own_seconds": fmean(own_seconds),
                "ratio": ratio,
                "parts": parts,
            }
        )
    summary: dict[str, Any] = {
        "steps": list(steps),
        "straggler_ratio": STRAGGLER_RATIO,
        "ranks": ranks,
        "slowest": None,
    }
    if len(ranks) > 1:
        slowest = max(ranks, key=lambda rank: rank["ratio"])
        summary["slowest"] = {
            "rank": slowest["rank"],
            "host": slowest["host"],
            "part": _excess_part(slowest, ranks),
            "ratio": slowest["ratio"],
            "straggler": slowest["ratio"] > STRAGGLER_RATIO,
        }
    return summary


def _excess_part(slowest: dict[str, Any], ranks: Sequence[dict[str, Any]]) -> str:
    def own_seconds(rank: dict[str, Any], name: str) -> float:
        part = rank["parts"].get(name, {"seconds": 0.0, "collective_seconds": 0.0})
        return part["seconds"] - part["collective_seconds"]

    return max(
        slowest["parts"],
        key=lambda name: (
            own_seconds(slowest, name) - median_low(own_seconds(rank, name) for rank in ranks)
        ),
    )


def table(summary: dict[str, Any]) -> str:
    """The parts of rank 0's step and, with several ranks, the slowest ranks, as text."""
    first, steps = summary["ranks"][0], summary["steps"]
    where = f"rank 0 of {len(summary['ranks'])} ({first['host']})"
    lines = [
        f"steps {steps[0]} to {steps[-1]}: {1e3 * first['seconds']:,.1f} ms a step on {where}",
        _parts_table(first).plain(),
    ]
    slowest = summary["slowest"]
    if slowest:
        lines.append("ranks with the most time of their own (a step without its collectives):")
        for rank in sorted(summary["ranks"], key=lambda rank: -rank["ratio"])[:SHOWN_RANKS]:
            lines.append(
                f"  rank {rank['rank']} on {rank['host']}: {1e3 * rank['own_seconds']:,.1f} ms, "
                f"{rank['ratio']:.2f} x the median"
            )
        lines.append(f"most of the excess of rank {slowest['rank']} is in: {slowest['part']}")
    return "\n".join(lines)


def _parts_table(rank: dict[str, Any]) -> Table:
    """The parts of a rank's step, the longest first."""
    parts = sorted(
        rank["parts"].items(), key=lambda item: (item[0] == Phase.OTHER, -item[1]["seconds"])
    )
    rows = tuple(
        (
            name,
            f"{1e3 * part['seconds']:,.1f}",
            f"{part['seconds'] / max(rank['seconds'], 1e-9):.1%}",
            f"{1e3 * part['collective_seconds']:,.1f} ms",
        )
        for name, part in parts
    )
    return Table("", ("part", "ms", "share", "of it in collectives"), rows)


def _report(window: _Window, ranks: Ranks, folder: Path) -> None:
    """Write this rank's trace; on the first rank also what all ranks measured."""
    measured = ranks.gather({"host": socket.gethostname(), "steps": window.measure()})
    folder.mkdir(parents=True, exist_ok=True)
    window.profiler.export_chrome_trace(str(folder / f"rank-{ranks.rank}.trace.json.gz"))
    if not window.steps or not ranks.is_first:
        return
    summary = summarize(window.steps, measured)
    text = table(summary)
    operations = window.profiler.key_averages()
    operations[:] = [operation for operation in operations if not operation.is_user_annotation]
    longest = operations.table(
        sort_by="self_device_time_total" if window.on_gpu else "self_cpu_time_total",
        row_limit=SHOWN_OPERATIONS,
        max_name_column_width=60,
    )
    write_whole(folder / "summary.json", (json_text(summary, indent=1) + "\n").encode())
    write_whole(
        folder / "rank-0.txt",
        f"{text}\n\noperations of rank 0 by their own time\n{longest}\n".encode(),
    )
    log.info("%s\nprofile written to %s", text, folder)
    slowest = summary["slowest"]
    if slowest and slowest["straggler"]:
        log.warning(
            "rank %d on %s is slow: its own time is %.2f x the median rank's, most of the excess "
            "in %s; look at that host",
            slowest["rank"],
            slowest["host"],
            slowest["ratio"],
            slowest["part"],
        )
