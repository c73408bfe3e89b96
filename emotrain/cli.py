"""The `emotrain` command: finds the subcommand, runs it, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import logging
import os
import select
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

from emotrain.commands import COMMANDS
from emotrain.errors import EXIT_FAILED, EXIT_MISTAKE, EXIT_PIPE, RunError, UserError
from emotrain.threads import share_the_cores

EPILOG = """\
start here:
  emotrain prepare sample --out data/sample
  emotrain train configs/quickstart.yaml
  emotrain evaluate runs/quickstart --data data/sample
  emotrain COMMAND --help

exit codes:
   0  done
   1  it broke on the way (a full disk, a lost rank, a defect): the same command may pass later
   2  a mistake in the command, a setting or a file: mend it first
  75  training was asked to stop and saved: the same command goes on from there
 130  interrupted

A mistake is told in one line. A defect shows its traceback; EMOTRAIN_TRACEBACK=1 shows it for every
error."""


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a letter must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if arguments is None else arguments
    share_the_cores()
    try:
        code = guarded(lambda: _run(words))
    except SystemExit:  # of argparse: help, or how to use a command
        if code := _flush():
            return code
        raise
    return _flush() or code


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`. What a person can mend is one line on stderr and exit code 2 (1 where
    it broke on the way); a defect keeps its traceback. EMOTRAIN_TRACEBACK=1 shows every one."""
    logging.basicConfig(level=logging.INFO, handlers=[_Stderr()], format="%(message)s")
    try:
        return run()
    except UserError as error:
        return _fail(error, str(error), EXIT_MISTAKE)
    except RunError as error:
        return _fail(error, str(error), EXIT_FAILED)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            _discard_output()
            return EXIT_PIPE
        if error.errno is None:  # made by a library, which says nothing of the system
            raise
        return _fail(error, _what_the_system_said(error), EXIT_FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Stderr(logging.Handler):
    """Writes to stderr as it is at the moment: a live progress bar stands in for it and keeps log
    lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def _run(arguments: list[str]) -> int:
    args = _parse(arguments)
    return int(_module(args.command).run(args))


def _parse(arguments: list[str]) -> argparse.Namespace:
    import emotrain

    parser = argparse.ArgumentParser(
        prog="emotrain",
        description="Train and use modular Mixture-of-Experts language models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"emotrain {emotrain.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Only the chosen command's module is imported: `emotrain --help` must not wait for torch.
        if name == chosen:
            _module(name).add_arguments(subparser)
    args, rest = parser.parse_known_args(arguments)
    # argparse gives up on `key=value` words that come after an option.
    if rest and (not hasattr(args, "settings") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.settings = [*args.settings, *rest]
    return args


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"emotrain.commands.{command}")


def _flush() -> int:
    """Write what stdout still holds. Returns 0, or an exit code where it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard_output()
        if isinstance(error, BrokenPipeError):
            return EXIT_PIPE
        return _fail(error, f"stdout: {_what_the_system_said(error)}", EXIT_FAILED)
    return 0


def _nobody_reads() -> bool:
    """Whether it is stdout whose other end is closed, and not some other pipe or socket."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
        return bool(poll.poll(0))
    except (OSError, ValueError):  # no file behind it
        return False


def _discard_output() -> None:
    # The interpreter flushes once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _what_the_system_said(error: OSError) -> str:
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f"{' -> '.join(files)}: " if files else ""
    hint = "; free space or choose another folder" if error.errno == errno.ENOSPC else ""
    return f"{where}{error.strerror or error}{hint}"


def _fail(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("EMOTRAIN_TRACEBACK"):
        traceback.print_exception(error)
    text = " ".join(message.split()) or type(error).__name__
    # One write: ranks that fail together must not share a line.
    sys.stderr.write(f"error: {text}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
