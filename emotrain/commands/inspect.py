"""`emotrain inspect`: what a configuration is and costs, before anything is built; and what a data
set looks like to the method."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from emotrain.commands.common import add_json, finish, output_file
from emotrain.config import Config, load_config, with_settings
from emotrain.errors import UserError
from emotrain.inspection import describe, run_costs

if TYPE_CHECKING:
    from emotrain.data.formats import SplitStore
    from emotrain.data.source import TokenStore
    from emotrain.data.tokenizer import TextTokenizer

EPILOG = """\
examples:
  emotrain inspect configs/quickstart.yaml
  emotrain inspect configs/emo_1b14b_1t.yaml model.experts.routed=63 training.tokens=1e11
  emotrain inspect data/sample --window 256 --html sample.html
  emotrain inspect tokens/ data.tokenizer=tokenizer.json --tokens 1000000

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
        help="YAML file of a configuration, or data as of data.path: a folder written by `emotrain "
        "prepare`, arrays of tokens and others",
    )
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings that override the configuration's, for example optimizer.lr=1e-3 "
        "(`emotrain settings` lists them); of data those of data, for example data.tokenizer=FILE",
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
    if not args.config.endswith((".yaml", ".yml")):
        return _inspect_data(args)
    if args.html:
        raise UserError(f"--html is of a data set, and {args.config} is none; leave it out")
    config = load_config(args.config, args.settings)
    costs = run_costs(config)
    finish(args, costs, describe(config, costs))
    return 0


def _inspect_data(args: argparse.Namespace) -> int:
    from emotrain.data.formats import SplitStore
    from emotrain.data.opening import open_store
    from emotrain.data.survey import survey
    from emotrain.report.data_page import text, write_data_page

    if strange := [setting for setting in args.settings if not setting.startswith("data.")]:
        raise UserError(
            f"{strange[0]}: is no setting of data; give data.tokenizer, data.raw and others of "
            f"`emotrain settings data`, or the file of a configuration"
        )
    setup = with_settings(Config(), {}, args.settings).data
    out = output_file(args.html, "data.html") if args.html else None
    store = open_store(
        args.config,
        args.split,
        tokenizer=setup.tokenizer,
        raw=setup.raw,
        verify_checksums=setup.verify_checksums,
        domain=setup.domain,
    )
    found = survey(
        store,
        args.window,
        tokens=args.tokens,
        windows=args.sequences,
        seed=args.seed,
        tokenizer=_tokenizer(store),
        **(_domains(store) if isinstance(store, SplitStore) else {}),
    )
    result: dict[str, Any] = found.json()
    if out is not None:
        result["html"] = str(write_data_page(found, out))
    finish(args, result, text(found) + (f"\n\npage: {out}" if out else ""))
    return 0


def _tokenizer(store: TokenStore) -> TextTokenizer | None:
    from emotrain.data.tokenizer import TextTokenizer, read_tokenizer

    if not store.tokenizer_file.is_file():
        return None
    backend = read_tokenizer(store.tokenizer_file)
    return TextTokenizer(backend, backend.id_to_token(store.eos_id) or "")


def _domains(store: SplitStore) -> dict[str, Any]:
    """Domains of a split, and the one of a document, as `survey` takes them."""
    dataset = store.dataset

    def domain_of(document: int) -> str:
        split, index, row = dataset.locate(document)
        shard = dataset.shard(split, index)
        return shard.domains[shard.domain_of[row]]

    known: dict[str, Any] = {"domains": dataset.domains[store.split]}
    # Far away, all of a shard would be fetched for the domain of a document.
    return known if isinstance(store.path, str) else known | {"domain_of": domain_of}
