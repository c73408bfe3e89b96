"""`emotrain kernels`: the GPU kernels compiled without a GPU, and their machine code checked."""

from __future__ import annotations

import argparse
import sys

from emotrain.commands.common import add_json, finish
from emotrain.errors import UserError
from emotrain.tables import Table

EPILOG = """\
examples:
  emotrain kernels
  emotrain kernels --target sm_90 --defaults-only

It needs Triton and no GPU. The exit code is 1 where a kernel spills registers, misses the tensor
cores or adds in no fixed order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--target",
        default="sm_80,sm_90",
        metavar="LIST",
        help="of sm_80, sm_90, sm_100 (default: %(default)s)",
    )
    parser.add_argument("--defaults-only", action="store_true", help="leave out the tuning space")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.kernels.compile_check import DEVICES, HEADER, compile_all, summarize

    targets = [target.strip() for target in args.target.split(",")]
    if unknown := [target for target in targets if target not in DEVICES]:
        raise UserError(f"target {unknown[0]} is not known; choose of {', '.join(DEVICES)}")
    rows = compile_all(targets, with_space=not args.defaults_only)
    failures = [line for row in rows for line in row.failures()]
    table = Table("", HEADER, tuple(row.cells() for row in rows), names=5, notes=1)
    result = summarize(rows, failures)
    if args.json:
        result |= _of_a_step()
    finish(args, result, table.text())
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failures else 0


def _of_a_step() -> dict[str, float]:
    """What starves the device: times that a training step waits for it without expert parallelism,
    and launches and exchanges of a layer with it. Neither layers nor micro-batches add to these, so
    that two of each do."""
    from emotrain.config import config_from_dict
    from emotrain.planning.dry_run import dry_run

    alone, spread = (
        config_from_dict(
            {
                "model": {"num_layers": 2},
                "training": {"global_batch": 8 * ranks},
                "parallel": {"ep": ranks},
            }
        )
        for ranks in (1, 8)
    )
    waits = dry_run(alone, 1).waits
    return {"host_waits_per_step": waits, **dry_run(spread, 8).dispatch_per_layer(layers=2)}
