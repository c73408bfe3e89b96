"""Steps made ahead of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from emotrain.batch import PackedBatch
from emotrain.data.source import DataSource
from emotrain.errors import UserError


def prefetch(
    source: DataSource,
    start_step: int,
    num_steps: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    depth: int = 2,
) -> Prefetcher:
    """The results of `source.step` for `num_steps` steps from `start_step`, made ahead of time on a
    thread.

    Up to `depth` steps are held ready. Use it in a `with` block, or close it, so that the thread
    ends; an exception on the thread is raised where its step would have come.
    """
    if num_steps < 0 or depth < 1:
        raise UserError(
            f"num_steps={num_steps}, depth={depth}: steps must be at least 0 and depth at least 1"
        )

    def make(step: int) -> list[PackedBatch]:
        return source.step(step, global_batch, micro_batch, rank, world_size)

    return Prefetcher(make, range(start_step, start_step + num_steps), depth)


class Prefetcher(Iterator[list[PackedBatch]]):
    """Makes steps on a thread, up to `depth` of them ahead. Closing it, or leaving its `with`
    block, ends the thread."""

    def __init__(self, make: Callable[[int], list[PackedBatch]], steps: range, depth: int):
        self._make, self._steps = make, iter(steps)
        self._thread = ThreadPoolExecutor(1, "emotrain-loader")
        self._ahead: deque[Future[list[PackedBatch]]] = deque()
        for _ in range(depth):
            self._start_another()

    def _start_another(self) -> None:
        for step in islice(self._steps, 1):
            self._ahead.append(self._thread.submit(self._make, step))

    def __next__(self) -> list[PackedBatch]:
        try:
            if not self._ahead:
                raise StopIteration
            made = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._start_another()
        return made

    def close(self) -> None:
        """End the thread after the step that it is making. Calling it again does nothing."""
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
