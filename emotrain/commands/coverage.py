"""`emotrain coverage`: which experts domains use, and when they become modules."""

from __future__ import annotations

import argparse
from pathlib import Path

from emotrain.commands.common import (
    add_checkpoint_and_data,
    add_device,
    add_documents,
    add_json,
    add_micro_batch,
    finish,
)
from emotrain.progress import ProgressBar

DESCRIPTION = """\
Measure which experts documents and domains use, on held-out documents, in one pass: how many
experts, how alike two domains are in their routing, how far the experts overlap that they would
choose for themselves, and which experts are in the pools of the same documents. With --checkpoints,
the same over the steps of a run: when do the modules form?"""
EPILOG = """\
examples:
  emotrain coverage runs/quickstart --data data/sample
  emotrain coverage runs/quickstart --data data/sample --checkpoints all
  emotrain coverage runs/quickstart --data data/sample --checkpoints 100 200 450

A run keeps the checkpoints that training.keep_checkpoints and training.permanent_every say.
Each one that is done is in DIR/steps: the same command goes on where it was interrupted.

Reading it: in a modular model two domains choose other experts. Then the Jaccard index of two
domains is near that of chance, that of two halves of one domain's documents is high, the cosine is
low, and groups of experts are found again on other documents (modularity held out). In a standard
MoE of the same size two domains have more in common, and groups are weaker."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint_and_data(parser)
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        default=(),
        metavar="STEP",
        help="`all`, or steps of the run, to compare with the last of them (default: the newest "
        "alone)",
    )
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out checkpoints that are not whole, with a warning",
    )
    parser.add_argument(
        "--keep",
        type=float,
        nargs="+",
        default=(0.5, 0.25, 0.125),
        metavar="SHARE",
        help="shares of each layer's experts that a domain chooses, shared ones counted as in "
        "`emotrain evaluate` (default: 0.5 0.25 0.125)",
    )
    parser.add_argument(
        "--pool",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="the same share of a document's pool, for experts that go together (default: "
        "%(default)s)",
    )
    add_documents(parser, 64, 1024)
    parser.add_argument(
        "--domains", nargs="+", default=(), metavar="NAME", help="domains to measure (default: all)"
    )
    add_micro_batch(parser)
    add_device(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for coverage.json, coverage.md, pictures and their numbers (default: "
        "RUN_DIR/coverage)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.analysis.coverage import CoverageSettings
    from emotrain.analysis.coverage_files import write_coverage
    from emotrain.analysis.coverage_steps import choose_checkpoints, measure_run
    from emotrain.analysis.coverage_tables import coverage_json, coverage_tables
    from emotrain.evaluation.measure import default_folder
    from emotrain.files import make_writable

    settings = CoverageSettings(
        keep=tuple(args.keep),
        pool=args.pool,
        documents=args.documents,
        document_tokens=args.document_tokens,
        domains=tuple(args.domains),
    )
    chosen = choose_checkpoints(args.checkpoint, args.checkpoints, args.skip_broken)
    out = Path(args.out) if args.out else default_folder(chosen.newest, "coverage")
    make_writable(out)
    with ProgressBar("batches") as bar:
        found = measure_run(
            chosen,
            args.data,
            settings,
            out,
            device=args.device,
            micro_batch=args.micro_batch,
            track=bar.track,
        )
    finish(args, coverage_json(found), "\n\n".join(t.text() for t in coverage_tables(found)))
    written = write_coverage(found, out)
    if not args.json:
        print(*(f"wrote {path}" for path in written), sep="\n")
    return 0
