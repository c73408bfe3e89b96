"""EMO and the architecture-matched standard MoE: what the benchmarks that train both are asked
alike."""

from __future__ import annotations

import argparse
from pathlib import Path

from emotrain.commands.common import add_json

ROOT = Path(__file__).resolve().parent.parent
EMO = ROOT / "configs/modularity_emo.yaml"
STANDARD = ROOT / "configs/modularity_stdmoe.yaml"


def pair_parser(description: str, out: str, results: str) -> argparse.ArgumentParser:
    """A parser of settings of both models, --data, --out and --json.

    Args:
        out: where --out points by default.
        results: what is written there beside both runs.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Further key=value settings go to both models, for example training.steps=1200.",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of both models")
    parser.add_argument(
        "--data",
        default="data/sample",
        help="folder written by `emotrain prepare` (default: %(default)s)",
    )
    parser.add_argument(
        "--out", default=out, help=f"folder of both runs and {results} (default: %(default)s)"
    )
    add_json(parser)
    return parser
