"""`emotrain report`: the curves and subsets of a run as one HTML page."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_json, finish
from emotrain.evaluation.report import write_report

EPILOG = """\
example:
  emotrain evaluate runs/quickstart --data data/sample
  emotrain report runs/quickstart"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        help="training.run_dir of a run; the page is written there as report.html",
    )
    add_json(parser)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    page = str(write_report(args.run_dir))
    finish(args, {"report": page}, page)
    return 0
