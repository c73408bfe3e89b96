"""Processes that each do one piece of work at a time. One that dies takes its piece with it, and
another one goes on with the rest; when the process that started them dies, so do they."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Piece = TypeVar("Piece")

context = multiprocessing.get_context("spawn")  # a GPU's context does not survive a fork


@dataclass(frozen=True)
class Died:
    """A process ended in the middle of its work."""

    exit_code: int


class _Worker:
    def __init__(self, prepare: Callable[[], Callable[[Any], None]], threads: int):
        self.connection, other = context.Pipe()
        # Nothing is ever sent over it: it is closed when this process ends, however it ends.
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work, args=(other, lifeline, prepare, threads), daemon=True
        )
        self.process.start()
        other.close()
        lifeline.close()
        self.piece: Any = None

    def give(self, piece: Any) -> None:
        self.piece = piece
        self.connection.send(piece)

    def outcome(self) -> Died | None:
        """Of its piece, which has ended."""
        try:
            self.connection.recv()
            return None
        except EOFError:
            self.process.join()
            return Died(self.process.exitcode or 0)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        self._lifeline.close()


def _work(
    connection: Connection,
    lifeline: Connection,
    prepare: Callable[[], Callable[[Any], None]],
    threads: int,
) -> None:
    import torch

    def end_with_parent() -> None:
        try:
            lifeline.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Ctrl-C reaches all processes of a terminal; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    work = prepare()
    while True:
        work(connection.recv())
        connection.send(None)


def run_pieces(
    pieces: Sequence[Piece],
    prepare: Callable[[], Callable[[Piece], None]],
    jobs: int,
    kind: Callable[[Piece], Any] = lambda _: None,
) -> Generator[tuple[Piece, Died | None]]:
    """Do all pieces, and tell of each when it has ended.

    Args:
        prepare: makes what does a piece, in each process; it is pickled. What it raises ends the
            process.
        jobs: processes; 1 does the work in this one.
        kind: what a process had better not change: it gets pieces of the kind it had, as long as
            there are any, and else of the kind that most are left of.
    """
    left = list(pieces)
    if jobs == 1:
        work = prepare()
        for piece in sorted(left, key=lambda piece: str(kind(piece))):
            work(piece)
            yield piece, None
        return

    def next_piece(last: Any) -> Piece:
        kinds = [kind(piece) for piece in left]
        chosen = last if last in kinds else max(dict.fromkeys(kinds), key=kinds.count)
        return left.pop(kinds.index(chosen))

    threads = max(1, (os.cpu_count() or 1) // jobs)
    workers: list[_Worker] = []
    try:
        for _ in range(min(jobs, len(left))):
            workers.append(_Worker(prepare, threads))
            workers[-1].give(next_piece(None))
        while workers:
            ready = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in ready]:
                piece, outcome = worker.piece, worker.outcome()
                if outcome is not None or not left:
                    worker.end()
                    workers.remove(worker)
                    if left:
                        worker = _Worker(prepare, threads)
                        workers.append(worker)
                if left:
                    worker.give(next_piece(kind(piece)))
                yield piece, outcome
    finally:
        for worker in workers:
            worker.end()
