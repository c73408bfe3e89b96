"""The `emotrain` command: finds the subcommand, runs it, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

from emotrain.commands import COMMANDS
from emotrain.errors import EXIT_FAILED, EXIT_MISTAKE, RunError, UserError


def main(arguments: list[str] | None = None) -> int:
    import emotrain

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="emotrain", description="Train and use modular Mixture-of-Experts language models."
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
    return guarded(_module(args.command).run, args)


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command. What a person can mend is one line on stderr and exit code 2 (1 where it broke
    on the way); a defect keeps its traceback. EMOTRAIN_TRACEBACK=1 shows every traceback."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        return run(args)
    except UserError as error:
        return _fail(error, EXIT_MISTAKE)
    except OSError as error:
        hint = "; free space or choose another folder" if error.errno == errno.ENOSPC else ""
        return _fail(error, EXIT_FAILED, hint)
    except RunError as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"emotrain.commands.{command}")


def _fail(error: BaseException, code: int, hint: str = "") -> int:
    if os.environ.get("EMOTRAIN_TRACEBACK"):
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    # One write: ranks that fail together must not share a line.
    sys.stderr.write(f"error: {text}{hint}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
