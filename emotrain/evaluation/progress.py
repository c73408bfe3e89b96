"""One progress bar on stderr for the many passes of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from emotrain.batch import PackedBatch
from emotrain.modular.select import Track


@contextmanager
def progress_bar() -> Iterator[Track]:
    """A `Track` whose one bar shows the pass under way. Only a terminal shows it; it is gone
    afterwards."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("loading")

        def track(batches: Sequence[PackedBatch], description: str) -> Iterable[PackedBatch]:
            progress.reset(task, total=len(batches), description=description)
            for batch in batches:
                yield batch
                progress.advance(task)

        yield track
