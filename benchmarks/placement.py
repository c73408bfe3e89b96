"""Rows that expert parallelism sends when experts that are chosen together share a rank, against
experts placed by their number: EMO and the architecture-matched standard MoE.

    python benchmarks/placement.py [--json] [--data data/sample] [key=value ...]

Trains both on the same data, order, seed and tokens (about ten minutes on two idle cores; with
`--checkpoints EMO STANDARD` nothing is trained). Then both route the sequences that training would
read next, with pools drawn as in training. Documents with even numbers place the experts, the
others measure:

    rows_over_contiguous          distinct ranks that a token is sent to, over those with experts
                                  placed by number; mean over layers
    load_max_over_mean            slots of the fullest rank over the mean, over all measured tokens;
                                  the worst layer
    exchange_load_max_over_mean   the same among the tokens of one exchange, `--micro-batch`
                                  sequences of each rank; mean over exchanges, the worst layer

A small model on a small corpus: what larger ones save is to be measured on them
(`emotrain placement`). Rows are counted, no time is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _pair import EMO, STANDARD, pair_parser

from emotrain.files import json_text

MODELS = {"emo": EMO, "standard": STANDARD}
SETTINGS = [
    "model.d_model=96",
    "model.num_layers=2",
    "model.num_heads=3",
    "model.experts.routed=128",
    "model.experts.top_k=7",
    "model.experts.hidden=32",
    "model.router.pool.min=8",
    "model.router.pool.max=128",
    "optimizer.lr=6e-3",
    "training.steps=300",
    "training.global_batch=16",
    "training.micro_batch=16",
    "training.checkpoint_every=100",
]
"""As many experts as the published models have, and as many for a token; all else is small."""


def main(arguments: list[str] | None = None) -> int:
    from emotrain.cli import guarded
    from emotrain.modular.placement import TOKENS

    parser = pair_parser(
        __doc__.split("\n\n")[0].replace("\n", " "), "runs/placement", "placement.json"
    )
    parser.add_argument(
        "--checkpoints",
        nargs=2,
        metavar=("EMO", "STANDARD"),
        help="checkpoints or runs to place, instead of training",
    )
    parser.add_argument(
        "--ep",
        type=int,
        nargs="+",
        default=[2, 4, 8],
        help="numbers of ranks (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        help="tokens to route, both halves together (default: %(default)s)",
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=16,
        help="sequences of a rank in one exchange (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    from emotrain.evaluation.placement import compute_placements
    from emotrain.progress import ProgressBar

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = args.checkpoints or [trained(name, args) for name in MODELS]
    whole: dict[str, Any] = {}
    with ProgressBar("batches") as bar:
        for name, checkpoint in zip(MODELS, checkpoints, strict=True):
            results = compute_placements(
                checkpoint,
                args.data,
                args.ep,
                max_tokens=args.tokens,
                micro_batch=args.micro_batch,
                track=bar.track,
            )
            whole[name] = {f"ep_{result.ep}": result.to_json() for result in results}
    # What the comparison is judged by: EMO over the largest number of ranks.
    judged = whole["emo"][f"ep_{max(args.ep)}"]
    keys = ("ep", "rows_over_contiguous", "load_max_over_mean", "exchange_load_max_over_mean")
    whole = {**{key: judged[key] for key in keys}, **whole}
    (out / "placement.json").write_text(json_text(whole, indent=1) + "\n", encoding="utf-8")
    print(f"{table(whole)}\nresults in {out}/placement.json", file=sys.stderr)
    if args.json:
        print(json_text(whole))
    return 0


def trained(name: str, args: argparse.Namespace) -> Path:
    """The run folder of a model, trained to its end; goes on where it was interrupted."""
    from emotrain.config import load_config
    from emotrain.training.run import train

    folder = Path(args.out) / name
    places = [f"data.path={args.data}", f"training.run_dir={folder}"]
    train(load_config(MODELS[name], [*SETTINGS, *places, *args.settings]))
    return folder


def table(whole: dict[str, Any]) -> str:
    from emotrain.tables import Table

    header = ("model", "ep", "rows", "contiguous", "ratio", "load", "load of an exchange", "before")
    rows = [
        (
            name,
            str(result["ep"]),
            f"{result['rows_per_token']:.2f}",
            f"{result['contiguous_rows_per_token']:.2f}",
            f"{result['rows_over_contiguous']:.3f}",
            f"{result['load_max_over_mean']:.3f}",
            f"{result['exchange_load_max_over_mean']:.2f}",
            f"{result['contiguous_exchange_load_max_over_mean']:.2f}",
        )
        for name in MODELS
        for result in whole[name].values()
    ]
    return Table("Ranks that a token is sent to, and the fullest rank", header, tuple(rows)).plain()


if __name__ == "__main__":
    sys.exit(main())
