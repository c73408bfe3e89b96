"""`emotrain placement`: which experts share a rank under expert parallelism."""

from __future__ import annotations

import argparse

from emotrain.commands.common import (
    add_checkpoint_and_data,
    add_device,
    add_json,
    finish,
    output_file,
)
from emotrain.files import json_text, write_whole
from emotrain.modular.placement import MAX_LOAD, TOKENS
from emotrain.progress import ProgressBar

DESCRIPTION = """\
Compute a balanced placement of each layer's routed experts from which of them tokens choose
together. A token is sent once to each rank that holds one of its experts, so that experts that
serve the same documents should share a rank. Half of the documents place the experts, the other
half measures the rows and the load. `parallel.placement=FILE` trains with it, with the same
result; `parallel.placement=auto` needs no file."""
EPILOG = """\
example:
  emotrain placement runs/quickstart --data data/sample --ep 8 --out placement.json

Reading it: `rows` are the ranks that a token is sent to, `contiguous` is the same where neighbours
in number share a rank. `load` is that of the fullest rank over the mean, over all tokens; `load of
an exchange` is that among the tokens that travel together, which is what the ranks wait for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint_and_data(parser)
    parser.add_argument(
        "--ep", type=int, required=True, metavar="RANKS", help="ranks to spread the experts over"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="JSON file to write: for each layer the experts of rank 0, then those of rank 1, …",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help="tokens to route, both halves together (default: %(default)s)",
    )
    parser.add_argument(
        "--max-load",
        type=float,
        default=MAX_LOAD,
        metavar="X",
        help="load of the fullest rank over the mean, on the half that places (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=0,
        metavar="ROWS",
        help="sequences of a rank in one exchange (default: as in training)",
    )
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.evaluation.placement import compute_placements

    out = output_file(args.out, "ep.json")
    with ProgressBar("batches") as bar:
        (result,) = compute_placements(
            args.checkpoint,
            args.data,
            [args.ep],
            max_tokens=args.tokens,
            max_load=args.max_load,
            micro_batch=args.micro_batch,
            device=args.device,
            track=bar.track,
        )
    text = json_text(result.to_json(), indent=1) + "\n"
    write_whole(out, text.encode())
    finish(args, result.to_json(), f"{result.table().text()}\nwrote {out}")
    return 0
