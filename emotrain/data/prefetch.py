"""Steps made ahead of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from emotrain.batch import PackedBatch


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
