"""`emotrain inspect`: what a configuration is and costs, before anything is built; and what a data
set looks like to the method."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emotrain.commands.common import add_json, finish, output_file
from emotrain.config import load_config
from emotrain.errors import UserError
from emotrain.inspection import describe, run_costs

EPILOG = """\
examples:
  emotrain inspect configs/quickstart.yaml
  emotrain inspect configs/emo_1b14b_1t.yaml model.experts.routed=63 training.tokens=1e11
  emotrain inspect data/sample --window 256 --html sample.html

Of a configuration nothing is allocated: it takes a second for any model. `emotrain plan` predicts
the memory and speed of one GPU of a cluster. Of a data set --tokens are read, the start of every
shard: lengths of documents against a window, where windows cut them, domains, some sequences as
training packs them, and whether the tokenizer gives texts back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show a configuration's experts and document pool, parameters, steps, FLOPs, memory, layout"
        "\nand data, without building the model; or the documents of a data set."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "config",
        metavar="CONFIG|DATA",
        help="YAML file of a configuration, or a folder written by `emotrain prepare`",
    )
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings that override the configuration's, for example optimizer.lr=1e-3 "
        "(`emotrain settings` lists them)",
    )
    data = parser.add_argument_group("of a data set")
    for name, default, metavar, help_ in (
        ("--window", 4096, "TOKENS", "tokens of a sequence of training"),
        ("--tokens", 100_000_000, "N", "tokens to read, about"),
        ("--sequences", 2, "N", "sequences to show"),
        ("--seed", 0, "N", "of the sequences that are shown"),
    ):
        data.add_argument(
            name, type=int, default=default, metavar=metavar, help=f"{help_} (default: %(default)s)"
        )
    data.add_argument("--split", choices=("train", "valid"), default="train")
    data.add_argument("--html", metavar="FILE", default="", help="write a page too")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if Path(args.config).is_dir():
        return _inspect_data(args)
    if args.html:
        raise UserError(f"--html is of a data set, and {args.config} is no folder; leave it out")
    config = load_config(args.config, args.settings)
    costs = run_costs(config)
    finish(args, costs, describe(config, costs))
    return 0


def _inspect_data(args: argparse.Namespace) -> int:
    from emotrain.data.formats import Dataset
    from emotrain.data.survey import survey
    from emotrain.report.data_page import text, write_data_page

    if args.settings:
        raise UserError(
            f"{args.settings[0]}: a data set has no settings; give --window and others, or the "
            f"file of a configuration"
        )
    out = output_file(args.html, "data.html") if args.html else None
    dataset = Dataset(args.config)

    def domain_of(document: int) -> str:
        split, index, row = dataset.locate(document)
        shard = dataset.shard(split, index)
        return shard.domains[shard.domain_of[row]]

    found = survey(
        dataset.store(args.split),
        args.window,
        tokens=args.tokens,
        windows=args.sequences,
        seed=args.seed,
        tokenizer=dataset.tokenizer(),
        domains=dataset.domains[args.split],
        domain_of=domain_of,
    )
    result: dict[str, Any] = found.json()
    if out is not None:
        result["html"] = str(write_data_page(found, out))
    finish(args, result, text(found) + (f"\n\npage: {out}" if out else ""))
    return 0
