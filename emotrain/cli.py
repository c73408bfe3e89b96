"""The `emotrain` command: thin, one function a subcommand, imported when it is used."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

COMMANDS = {
    "prepare": ("emotrain.data.prepare", "turn documents (JSONL, Parquet, text) into token shards"),
    "inspect": (
        "emotrain.inspection",
        "count a configuration's parameters, memory and FLOPs without building it",
    ),
    "evaluate": (
        "emotrain.evaluation.sweep",
        "loss of each domain with all experts and with its best subsets",
    ),
    "report": ("emotrain.evaluation.report", "write a run's curves and subsets as one HTML page"),
    "plan": (
        "emotrain.planning.plan",
        "predict memory, traffic and speed of a run on a cluster without one",
    ),
    "verify": ("emotrain.verify", "check a checkpoint's files against its checksums"),
    "kernels": (
        "emotrain.kernels.compile_check",
        "compile the GPU kernels without a GPU and check their machine code",
    ),
    "settings": ("emotrain.settings", "list every setting with its default and meaning"),
}
"""Subcommand -> module with `add_arguments(parser)` and `run(args) -> int`, and its one-line
help."""


def main(arguments: list[str] | None = None) -> int:
    import emotrain

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="emotrain",
        description="Train and use modular Mixture-of-Experts language models.",
        epilog="Training itself: python launch/pretrain.py --help",
    )
    parser.add_argument("--version", action="version", version=f"emotrain {emotrain.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Only the chosen command's module is imported: `emotrain --help` must not wait for torch.
        if name == chosen:
            importlib.import_module(module).add_arguments(subparser)
    args, rest = parser.parse_known_args(arguments)
    # argparse gives up on `key=value` words that come after an option.
    if rest and (not hasattr(args, "settings") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.settings = [*args.settings, *rest]
    return guarded(importlib.import_module(COMMANDS[args.command][0]).run, args)


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command. What a person can mend is one line on stderr and exit code 2 (1 where it broke
    on the way); EMOTRAIN_TRACEBACK=1 shows where it came from."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        return run(args)
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        ModuleNotFoundError,
    ) as error:
        return _fail(error, 2)
    except OSError as error:
        hint = "; free space or choose another folder" if error.errno == errno.ENOSPC else ""
        return _fail(error, 1, hint)
    except RuntimeError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _fail(error: BaseException, code: int, hint: str = "") -> int:
    if os.environ.get("EMOTRAIN_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {' '.join(str(error).split()) or type(error).__name__}{hint}", file=sys.stderr)
    return code


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object, the last line of stdout",
    )


def finish(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Print a command's result: JSON where asked for, else text."""
    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    sys.exit(main())
