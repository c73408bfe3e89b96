"""What every command does alike: `--json`, and one way to print a result."""

from __future__ import annotations

import argparse
from typing import Any

from emotrain.files import json_text


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object, the last line of stdout",
    )


def finish(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Print a command's result: JSON where asked for, else text."""
    print(json_text(result) if args.json else text)
