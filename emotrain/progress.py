"""The one progress bar, on stderr: live on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

    Self = TypeVar("Self", bound="ProgressBar")

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30
"""What takes less says nothing where there is no terminal."""

Track = Callable[[Sequence[Item], str], Iterable[Item]]
"""Passes items through and shows how far one got: (items, what is being done) -> the same items.
`ProgressBar.track` is one."""


def untracked(items: Sequence[Item], _what: str) -> Iterable[Item]:
    """The `Track` that shows nothing."""
    return items


class ProgressBar:
    """Shows the pass under way, one after the other.

        with ProgressBar("batches") as bar:
            for batch in bar.track(batches, "full model"):
                ...

    Descriptions and notes are plain text, never markup.
    """

    def __init__(
        self,
        unit: str = "",
        shown: bool = True,
        stays: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            unit: what is counted; `bytes` are shown as MB and MB/s, and without a unit the bar
                shows per cent.
            shown: whether to show anything (one rank of many does).
            stays: whether the bar stays on the terminal after its end.
            stream: where to, stderr if not given.
            clock: seconds, for tests.
        """
        self._unit, self._stays, self._clock = unit, stays, clock
        self._stream = stream or sys.stderr
        self._shown = shown
        self._live: Progress | None = None
        self._what, self._total, self._done, self._note = "", 0.0, 0.0, ""
        self._last_line = clock()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, what: str, total: float, done: float = 0) -> None:
        """Begin a pass; the bar shows it in place of the one before."""
        self._what, self._total, self._done, self._note = what, total, done, ""
        if self._shown and self._live is None and self._stream.isatty():
            self._live = _live_bar(self._unit, self._stays, self._stream)
            self._live.start()
        if self._live is not None:
            for task in self._live.task_ids:
                self._live.remove_task(task)
            self._live.add_task(what, total=total, completed=int(done), note="")

    def advance(self, amount: float = 1) -> None:
        """Say that more is done."""
        self.update(self._done + amount, self._note)

    def update(self, done: float, note: str = "", line: bool = False) -> None:
        """Say how much is done.

        Args:
            note: what else to show.
            line: without a terminal, print a line now, however soon after the last one.
        """
        self._done, self._note = done, note
        if self._live is not None:
            self._live.update(self._live.task_ids[-1], completed=done, note=note)
        elif self._shown and (line or self._clock() - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = self._clock()
            # A full disk behind stderr must not end what the bar is about.
            with contextlib.suppress(OSError):
                print(self._line(), file=self._stream, flush=True)

    def track(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """The items, one after the other, as a pass of this bar."""
        self.start(what, len(items))
        for item in items:
            yield item
            self.advance()

    def close(self) -> None:
        """End the bar. What is printed next begins on a line of its own."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._shown = False

    def _line(self) -> str:
        if self._unit == "bytes":
            count = f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
        elif self._unit:
            count = f"{self._done:g}/{self._total:g} {self._unit}"
        else:
            count = f"{self._done / self._total if self._total else 1:.0%}"
        return f"{self._what} {count}{'  ' + self._note if self._note else ''}"


def _live_bar(unit: str, stays: bool, stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: tuple[ProgressColumn, ...]
    if unit == "bytes":
        counts = (DownloadColumn(), TransferSpeedColumn())
    elif unit:
        counts = (MofNCompleteColumn(), TextColumn(unit, markup=False))
    else:
        counts = (TaskProgressColumn(),)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counts,
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
        console=Console(file=stream),
        transient=not stays,
    )
