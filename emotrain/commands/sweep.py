"""`emotrain sweep`: models, shares of experts, methods, domains, tasks, calibration sizes and
seeds, each with each, as tables and figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from emotrain.commands.common import add_device, add_json, add_micro_batch, finish
from emotrain.errors import EXIT_FAILED, UserError
from emotrain.progress import ProgressBar

DESCRIPTION = """\
Measure every cell of a plan: each of its models, with each share of the experts, chosen by each
method and by each number of documents, drawn with each seed, on each domain and task. Then write
the means and their spread over seeds as tables and figures."""
EPILOG = """\
example:
  emotrain sweep configs/sweeps/quickstart.yaml --jobs 2

A plan is a YAML file; docs/evaluation.md lists its keys. Each cell is a folder of its own under
--out. The same command goes on after an interruption, and a changed plan measures only what is new.
A cell that fails is recorded, and the others go on; the sweep then ends with exit code 1, and
--retry tries such cells again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument("plan", metavar="PLAN", help="YAML file: models, data, keep, methods, …")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of cells, tables and figures (default: the plan's)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes that measure, each with a model of its own (default: %(default)s)",
    )
    parser.add_argument("--retry", action="store_true", help="try cells again that failed before")
    add_micro_batch(parser)
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.sweeps.cells import prepared
    from emotrain.sweeps.plan import in_words, read_plan
    from emotrain.sweeps.run import run_sweep
    from emotrain.sweeps.summary import tables

    plan = read_plan(args.plan)
    if not (args.out or plan.out):
        raise UserError(f"{args.plan}: has no out; say where to write: --out DIR")
    sweep = prepared(plan, Path(args.out or plan.out), args.device)
    with ProgressBar("cells") as bar:
        summary = run_sweep(
            sweep,
            bar,
            jobs=args.jobs,
            device=args.device,
            micro_batch=args.micro_batch,
            retry=args.retry,
        )
    finish(args, summary.to_json(), "\n\n".join(table.text() for table in tables(summary)))
    if not args.json:
        print(f"wrote {sweep.out}/sweep.md, sweep.json, rows.csv, cells.csv and figures")
    for cell, why in summary.failed:
        words = f"{cell.model}, {cell.subject}, {cell.method}, keep {cell.keep:g}"
        print(
            f"failed: {words}, {in_words(cell.calibration_documents)} documents, seed {cell.seed}: "
            f"{why}",
            file=sys.stderr,
        )
    if summary.failed:
        print(
            f"{len(summary.failed)} of {len(summary.cells)} cells failed; --retry tries them again",
            file=sys.stderr,
        )
        return EXIT_FAILED
    return 0
