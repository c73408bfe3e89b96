"""A stand-in for the Python that launchers start: each process is a fork of one in which torch is
loaded, which saves the seconds of processor time that each new one takes to load it. Launchers,
their variables, signals and exit codes are the real ones."""

from __future__ import annotations

import array
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.processes import run_as_python

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

STAND_IN = """\
#!{python} -ISE
import array, json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    given = array.array("i", [0, 1, 2])
    size = len(request).to_bytes(8, "big")
    server.sendmsg([size], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
    server.sendall(request)
    answers = server.makefile()
    pid = int(answers.readline())
    for number in {forwarded!r}:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def python_of_forks(folder: Path) -> Iterator[Path]:
    """The stand-in: a program that takes `SCRIPT`, `-m MODULE` or `-c CODE` and arguments.

    What it starts is a fork of this process as it is now, with the directory, the variables and the
    files that the stand-in was started with. Where the stand-in is sent one of FORWARDED, the fork
    gets it.
    """
    address, program = folder / "socket", folder / "python"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        text = STAND_IN.format(
            python=sys.executable, address=str(address), forwarded=[int(n) for n in FORWARDED]
        )
        program.write_text(text)
        program.chmod(0o755)
        server = multiprocessing.get_context("fork").Process(
            target=_serve, args=(listener, program), daemon=True
        )
        server.start()
        try:
            yield program
        finally:
            server.kill()
            server.join()


def _serve(listener: socket.socket, program: Path) -> None:
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            _answer(connection, program)
        connection.close()


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _answer(connection: socket.socket, program: Path) -> None:
    """Start the process that is asked for and, at its end, say its exit code, or the signal that
    ended it, below zero."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, given, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    files = array.array("i", given[0][2])
    request = connection.makefile("rb").read(int.from_bytes(size, "big"))
    arguments, environ, folder = json.loads(request)
    pid = os.fork()
    if not pid:
        connection.close()
        _become(arguments, environ, folder, list(files), program)
    for file in files:
        os.close(file)
    with contextlib.suppress(BrokenPipeError):  # who asked was killed
        connection.sendall(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _become(
    arguments: list[str], environ: dict[str, str], folder: str, files: list[int], program: Path
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.executable = str(program)
    while arguments[0] == "-u":
        del arguments[0]
    script: Path | str | Callable[[], object]
    if arguments[0] == "-m":
        _, script, *rest = arguments
    elif arguments[0] == "-c":
        code = arguments[1]
        script, rest = (lambda: exec(code, {"__name__": "__main__"})), arguments[2:]
    else:
        script, rest = Path(arguments[0]), arguments[1:]
    run_as_python(script, rest, files)
