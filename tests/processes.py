"""Ranks on this machine: the way in which tests start the processes of one group. Tests that kill,
stop or hang ranks start their own (test_faults.py, test_checkpoint_kills.py)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from emotrain.distributed.ranks import Ranks


def run_ranks(
    body: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 240.0
) -> list[Any]:
    """What `body(ranks, *arguments)` returns in each rank, by rank. A single rank has no group.

    Ranks are forked, so that `body` may be a closure, and what a test has patched stays patched.

    Args:
        timeout_s: after so long the ranks are killed and the test fails: they wait for each other.
    Raises:
        ProcessRaisedException: a rank raised. The others are ended.
        ProcessExitedException: a rank ended otherwise. The others are ended.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = mp.start_processes(
            _rank,
            (body, world_size, folder, arguments),
            nprocs=world_size,
            join=False,
            start_method="fork",
        )
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"{body.__name__}: a rank was still waiting after {timeout_s:g} s")
        # Any object: only these ranks wrote there.
        return [
            torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)
        ]


def _rank(
    rank: int, body: Callable[..., Any], world_size: int, folder: Path, arguments: tuple
) -> None:
    # Else each of up to four ranks would take all cores.
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
        )
    result = body(Ranks(rank, world_size), *arguments)
    torch.save(result, folder / f"rank{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def started(
    script: Path | str, *arguments: object, first: Callable[[], object] = lambda: None
) -> Iterator[SimpleNamespace]:
    """A script (a path), or a module by its name, started as a command of its own: `process`, and
    the files `out` and `err`. At the end it is killed, where it is still running.

    The process is a fork of this one, where torch is loaded: a new one takes seconds of processor
    time for that. What a script does before it imports torch needs a new one (`run_command`), and
    so does what asks for compiled kernels.

    Args:
        first: what the process does before the script: its environment, its limits.
    """
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        for file in (out, err):
            file.touch()
        process = multiprocessing.get_context("fork").Process(
            target=_script, args=(script, list(map(str, arguments)), out, err, first)
        )
        process.start()
        try:
            yield SimpleNamespace(process=process, out=out, err=err)
        finally:
            process.kill()
            process.join()


def run_script(
    script: Path | str,
    *arguments: object,
    first: Callable[[], object] = lambda: None,
    timeout_s: float = 240.0,
) -> Any:
    """Run a script or module to its end, as `started` does -> `subprocess.CompletedProcess`."""
    with started(script, *arguments, first=first) as run:
        run.process.join(timeout_s)
        if run.process.is_alive():
            pytest.fail(f"{script} was still running after {timeout_s:g} s")
        return subprocess.CompletedProcess(
            [script, *arguments], run.process.exitcode, run.out.read_text(), run.err.read_text()
        )


def forked(
    command: list[Any],
    env: dict[str, str] | None = None,
    preexec_fn: Callable[[], object] | None = None,
    timeout: float = 240.0,
    check: bool = False,
    **_: Any,
) -> Any:
    """`subprocess.run` of `[sys.executable, script, ...]` by `run_script`, in the place of which it
    may be patched."""

    def first() -> None:
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        if preexec_fn is not None:
            preexec_fn()

    _, script, *arguments = command
    done = run_script(Path(script), *arguments, first=first, timeout_s=timeout)
    if check:
        done.check_returncode()
    return done


def _script(
    script: Path | str, arguments: list[str], out: Path, err: Path, first: Callable[[], object]
) -> None:
    files = [0, *(os.open(path, os.O_WRONLY | os.O_CREAT) for path in (out, err))]
    run_as_python(script, arguments, files, first)


def run_as_python(
    script: Path | str | Callable[[], object],
    arguments: list[str],
    files: list[int],
    first: Callable[[], object] = lambda: None,
) -> NoReturn:
    """Make this process, a fork, that of a script (a path), of a module by its name, or of a call.

    Args:
        files: descriptors of its standard input, output and errors.
        first: what it does before.
    """
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv = [str(script), *arguments]
    # OpenMP waits for ever in a fork of a process that has had several threads, where that asks
    # for several again.
    torch.set_num_threads(1)
    torch.set_num_threads = lambda number: None
    code: Any = 0
    try:
        first()
        if isinstance(script, str):
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        elif isinstance(script, Path):
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
        else:
            script()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of pytest, whose process this was.
    os._exit(code or 0)
