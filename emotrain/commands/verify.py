"""`emotrain verify`: the files of checkpoints against their checksums."""

from __future__ import annotations

import argparse
from pathlib import Path

from emotrain.commands.common import add_json, finish
from emotrain.training.verify import describe, verify_all

EPILOG = """\
examples:
  emotrain verify runs/quickstart
  emotrain verify runs/quickstart/checkpoints/step-00000360

Nothing is changed or removed. The exit code is 1 where a checkpoint is damaged."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="a run folder (all of its checkpoints) or RUN_DIR/checkpoints/step-…",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    result = verify_all([Path(path) for path in args.paths])
    finish(args, result, describe(result))
    return 0 if result["whole"] else 1
