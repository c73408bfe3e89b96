"""`emotrain data`: what a mixture of data sets reads over a run."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_json, finish, output_file
from emotrain.errors import UserError

DESCRIPTION = """\
Show a mixture before it is trained on: tokens, share, passes and repetition of each source over a
run. Counts are exact: they are those that the run will read."""
EPILOG = """\
examples:
  emotrain data show mix.yaml --tokens 50e9
  emotrain data show mix.yaml --config configs/quickstart.yaml --out mix.png

docs/mixtures.md says how to write a mixture. `data show` has --json."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show",
        help="tokens, share and repetition of each source over a run",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("mixture", metavar="MIX", help="YAML file that names the sources")
    length = show.add_mutually_exclusive_group()
    length.add_argument(
        "--tokens",
        metavar="N",
        help="of the run, such as 50e9 (default: those that the mixture names as tokens or epochs, "
        "else one pass over all sources)",
    )
    length.add_argument(
        "--config", metavar="CONFIG", help="the run's configuration: its length, seed and data.*"
    )
    show.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens of a sequence (default: the configuration's, else 4096)",
    )
    show.add_argument(
        "--out",
        metavar="PICTURE",
        help="picture to write, as PNG; its numbers go beside it, as .csv",
    )
    add_json(show)


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from emotrain.config import Config, load_config
    from emotrain.data.mixture_file import is_mixture, own_tokens, read_mixture
    from emotrain.files import write_whole
    from emotrain.report.mixture import curves, curves_csv, figure, run_of, table
    from emotrain.training.data_source import open_sources

    if not is_mixture(args.mixture):
        raise UserError(
            f"{args.mixture}: is no mixture, which is a .yaml file; `emotrain inspect DATA` shows "
            f"a data set"
        )
    plot = output_file(args.out, "mix.png") if args.out else None
    if plot is not None and plot.suffix == ".csv":
        raise UserError(f"--out {plot}: is the name of the numbers; name a picture, as mix.png")
    config = load_config(args.config) if args.config else Config()
    length = args.sequence_length or config.data.sequence_length
    setup = replace(config.data, path=args.mixture, sequence_length=length, verify_checksums=False)
    mixture = open_sources(replace(config, data=setup))
    if args.config:
        tokens = config.num_steps * config.training.global_batch * length
    elif args.tokens:
        tokens = _tokens(args.tokens)
    else:
        tokens = own_tokens(read_mixture(args.mixture), mixture) or mixture.num_sequences * length
    found = run_of(mixture, tokens)
    text = "\n".join([table(found).text(), *(f"warning: {line}" for line in found["warnings"])])
    if plot is not None:
        rows = curves(mixture, tokens)
        write_whole(plot, figure(rows))
        numbers = write_whole(plot.with_suffix(".csv"), curves_csv(rows).encode())
        text += f"\nwrote {plot}\nwrote {numbers}"
    finish(args, {**found, "plot": str(plot) if plot else None}, text)
    return 0


def _tokens(text: str) -> int:
    try:
        tokens = int(float(text))
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise UserError(f"--tokens {text}: is no positive number; give one, such as 50e9")
    return tokens
