"""Processes that do the pieces and shards of a half-done data set.

A worker is told what to do by lines of JSON on its stdin and answers on its stdout. All that it
makes lies in files, so that a worker that dies, or is killed with the command, leaves nothing but a
piece that is done again. Small inputs are done without workers: starting one takes some tenths of a
second.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from emotrain.data.records import Span
from emotrain.errors import RunError, UserError
from emotrain.preparation.encoding import PieceEncoder, Tick
from emotrain.preparation.pieces import Part
from emotrain.preparation.recipe import Recipe
from emotrain.preparation.shuffle import Shuffler
from emotrain.preparation.spill import Buckets, read_piece

Job = dict[str, Any]
"""`{"piece": 12, "parts": [...]}` or `{"bucket": 3, "split": "train", "shard": 2,
"places": [first, last]}`."""

PROGRAM = "from emotrain.preparation.workers import serve; serve()"


class Hands:
    """Does jobs, one after the other.

    Args:
        orders: what all jobs have in common, as JSON: `folder`, `data`, `files`, `recipe`,
            `buckets`, `pieces` (how many there are).
    """

    def __init__(self, orders: dict[str, Any]):
        self.folder, self.data = Path(orders["folder"]), Path(orders["data"])
        self.files = [Path(name) for name in orders["files"]]
        self.recipe = Recipe.from_json(orders["recipe"])
        self.pieces: int = orders["pieces"]
        self.buckets = Buckets(orders["buckets"], self.recipe.seed, self.recipe.valid_fraction)
        self._encoder: PieceEncoder | None = None
        self._shuffler: Shuffler | None = None

    def do(self, job: Job, tick: Tick) -> None:
        if "piece" in job:
            self._encoder = self._encoder or PieceEncoder(
                self.folder, self.data, self.files, self.recipe
            )
            piece = tuple(
                Part(file, Span(start, stop), first, last)
                for file, start, stop, first, last in job["parts"]
            )
            self._encoder.encode(job["piece"], piece, self.buckets, tick)
        else:
            if self._shuffler is None:
                known = [read_piece(self.folder, n, hashed=False) for n in range(self.pieces)]
                whole = [piece for piece in known if piece is not None]
                if len(whole) < len(known):
                    raise RunError(f"{self.folder}: pieces vanished; give the same command again")
                self._shuffler = Shuffler(self.folder, self.data, self.files, whole)
            self._shuffler.write(job["bucket"], job["split"], job["shard"], tuple(job["places"]))


def _unticked(_size: int, _tokens: int) -> None:
    """Nobody looks at the progress inside of jobs."""


def do_all(
    orders: dict[str, Any],
    jobs: Sequence[Job],
    workers: int,
    tick: Tick = _unticked,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Do jobs, on so many processes; with one, in this one.

    Args:
        tick: told of the progress of encoding. after: called after each job.
    Raises:
        UserError, OSError: what a job raised, the first of the jobs in order. RunError: a worker
            died.
    """
    if workers <= 1 or len(jobs) <= 1 or not sys.executable:
        hands = Hands(orders)
        with _one_thread():
            for job in jobs:
                hands.do(job, tick)
                after()
        return
    waiting: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
    for item in enumerate(jobs):
        waiting.put(item)
    failures: list[tuple[int, BaseException]] = []
    lock = threading.Lock()

    def told(answer: dict[str, Any]) -> None:
        with lock:
            if "tick" in answer:
                tick(*answer["tick"])
            else:
                after()

    processes = [_start(orders) for _ in range(min(workers, len(jobs)))]
    threads = [
        threading.Thread(target=_lead, args=(process, waiting, failures, told), daemon=True)
        for process in processes
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that Ctrl-C comes through
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]


def _start(orders: dict[str, Any]) -> subprocess.Popen[str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
    )
    _say(process.stdin, orders)
    return process


def _say(stream: IO[str] | None, message: dict[str, Any]) -> None:
    assert stream is not None
    with contextlib.suppress(BrokenPipeError):  # why it ended is asked when it is read from
        # Names of files that are not UTF-8 pass as escapes.
        stream.write(json.dumps(message, allow_nan=False) + "\n")
        stream.flush()


def _lead(
    process: subprocess.Popen[str],
    waiting: queue.SimpleQueue[tuple[int, Job]],
    failures: list[tuple[int, BaseException]],
    told: Callable[[dict[str, Any]], None],
) -> None:
    """Give a worker job after job, until there are none or one has failed."""
    assert process.stdout is not None
    while not failures:
        try:
            number, job = waiting.get_nowait()
        except queue.Empty:
            return
        _say(process.stdin, job)
        for line in process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                failures.append((number, _error(answer["error"])))
                return
            told(answer)
            if "tick" not in answer:
                break
        else:
            failures.append((number, _died(process)))


def _died(process: subprocess.Popen[str]) -> RunError:
    code = process.wait()
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    why = "; it may have needed more memory than there is" if code == -signal.SIGKILL else ""
    return RunError(f"a worker ended {how}{why}; the same command goes on from here")


def _error(said: dict[str, Any]) -> BaseException:
    kind, text = said["kind"], said["text"]
    if kind == "UserError":
        return UserError(text)
    if kind == "OSError":
        return OSError(said["errno"], text)
    return RunError(text)


def serve() -> None:
    """Be a worker, until stdin ends."""
    # Ctrl-C reaches all processes of a terminal; the command ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # the command is gone: whatever is being done is done again

    threading.Thread(target=listen, daemon=True).start()
    answers, sys.stdout = sys.stdout, sys.stderr
    hands = Hands(json.loads(lines.get()))

    def tick(size: int, tokens: int) -> None:
        _say(answers, {"tick": [size, tokens]})

    while True:
        job = json.loads(lines.get())
        _say(answers, _answer(hands, job, tick))


def _answer(hands: Hands, job: Job, tick: Tick) -> dict[str, Any]:
    """Do a job, and say how it ended."""
    try:
        hands.do(job, tick)
    except UserError as error:
        return {"error": {"kind": "UserError", "text": str(error)}}
    except RunError as error:
        return {"error": {"kind": "RunError", "text": str(error)}}
    except OSError as error:
        text = error.strerror or str(error)
        return {"error": {"kind": "OSError", "errno": error.errno, "text": text}}
    except Exception as error:
        traceback.print_exc()
        return {"error": {"kind": "", "text": f"{type(error).__name__}: {error}"}}
    return {"done": True}


@contextlib.contextmanager
def _one_thread() -> Any:
    """The library's own threads are left to whoever wants another core."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
