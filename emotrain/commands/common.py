"""What every command does alike: a configuration, `--json`, and one way to print a result."""

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


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object, the last line of stdout",
    )


def finish(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Print a command's result: JSON where asked for, else text."""
    print(json_text(result) if args.json else text)
