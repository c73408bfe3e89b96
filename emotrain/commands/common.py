"""What commands do alike: a configuration, a checkpoint and data, `--json`, and one way to print a
result."""

from __future__ import annotations

import argparse
from typing import Any

from emotrain.files import json_text


def add_config(parser: argparse.ArgumentParser, example: str = "configs/quickstart.yaml") -> None:
    """CONFIG, which is needed, and settings, which are not."""
    parser.add_argument("config", metavar="CONFIG", help=f"YAML file, for example {example}")
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings that override the file's, for example optimizer.lr=1e-3 (`emotrain "
        "settings` lists them)",
    )


def add_checkpoint_and_data(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT and --data, of commands that run a model on a data set."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run folder (its newest checkpoint) or RUN_DIR/checkpoints/step-…",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder written by `emotrain prepare`, with the model's tokenizer",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, of the same commands."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run (default: %(default)s)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object, the last line of stdout",
    )


def finish(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Print a command's result: JSON where asked for, else text."""
    print(json_text(result) if args.json else text)
