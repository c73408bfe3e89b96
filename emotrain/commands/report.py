"""`emotrain report`: a run, or several beside each other, as one HTML page."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from emotrain.commands.common import add_json, finish, output_file

DESCRIPTION = """\
Write one page of a run, from the files in its folder: what stands out, curves of loss, experts and
speed, the load of every expert, subsets, settings, data and environment. Several runs are compared
on one page. The page is one file: it loads nothing, and every plot has its numbers as CSV. A run
that is still going on can be looked at, too."""
EPILOG = """\
examples:
  emotrain report runs/quickstart
  emotrain report runs/emo runs/standard --out comparison.html
  emotrain report runs/mine --base configs/quickstart.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "runs", metavar="RUN_DIR", nargs="+", help="training.run_dir of a run; several are compared"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page (default: RUN_DIR/report.html; for several runs comparison.html in the "
        "first one's folder)",
    )
    parser.add_argument(
        "--base",
        metavar="CONFIG",
        help="configuration file to compare the settings with (default: the defaults)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.config import load_config
    from emotrain.report.page import write_report

    out = output_file(args.out, "report.html") if args.out else None
    base = (args.base, load_config(args.base)) if args.base else None
    report = write_report(args.runs, out, base)
    look = [finding for finding in report.findings if finding.kind == "look"]
    result = {
        "report": str(report.path),
        "runs": report.runs,
        "findings": [asdict(finding) for finding in report.findings],
    }
    lines = [*(f"look at this: {f.run}: {f.text}" for f in look), str(report.path)]
    finish(args, result, "\n".join(lines))
    return 0
