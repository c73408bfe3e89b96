"""`emotrain convert`: tokens of other formats become token shards."""

from __future__ import annotations

import argparse
from typing import get_args, get_type_hints

from emotrain.commands.common import add_json, finish
from emotrain.config import RawTokensConfig
from emotrain.data.stores.convert import SHARD_TOKENS, convert
from emotrain.progress import ProgressBar

EPILOG = """\
example:
  emotrain convert tokens/ --out data/mine --tokenizer tokenizer.json
  emotrain convert mix.txt --out data/mine --root /data --tokenizer tokenizer.json
  emotrain convert megatron/text_document --out data/mine --vocab-size 50304 --eos-id 0

PATH is what data.path would be (docs/data.md): training reads it in place too. A data set has
checksums, domains, and documents to evaluate on. Nothing appears at --out before all of it is
complete."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `emotrain convert`."""
    parser.description = (
        "Write tokens of other formats (Dolma, Megatron, MDS, Parquet) as shards with checksums."
    )
    parser.epilog = EPILOG
    option = parser.add_argument
    option("path", metavar="PATH", help="a file, a folder, a pattern, a list or a mix of files")
    option("--out", required=True, metavar="DIR", help="folder to make; refused if it exists")
    option(
        "--overwrite",
        action="store_true",
        help="replace the data set at --out once the new one is complete",
    )
    option(
        "--append-eos",
        action="store_true",
        help="give EOS to documents that do not end in it; without it they are refused",
    )
    option(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help="tokens of a shard, about (default: %(default)s)",
    )
    option(
        "--valid-fraction",
        type=float,
        default=0.01,
        metavar="X",
        help="share of documents held out (default: %(default)s)",
    )
    option("--seed", type=int, default=0, metavar="N", help="of the shuffle (default: 0)")
    group = parser.add_argument_group("tokens").add_argument
    group("--tokenizer", default="", metavar="FILE", help="tokenizer.json that wrote the tokens")
    for name, default in vars(RawTokensConfig()).items():
        kind = get_type_hints(RawTokensConfig)[name]
        choices = [value for value in get_args(kind) if isinstance(value, str)]
        group(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            choices=choices or None,
            metavar=None if choices else "N" if isinstance(default, int) else "TEXT",
            help=f"as data.raw.{name} (default: {default or 'none'})",
        )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """`emotrain convert`: progress on stderr, the result on stdout."""
    raw = RawTokensConfig(**{name: getattr(args, name) for name in vars(RawTokensConfig())})
    with ProgressBar() as bar:
        report = convert(
            args.path,
            args.out,
            tokenizer=args.tokenizer,
            raw=raw,
            append_eos=args.append_eos,
            shard_tokens=args.shard_tokens,
            valid_fraction=args.valid_fraction,
            seed=args.seed,
            overwrite=args.overwrite,
            bar=bar,
        )
    finish(
        args,
        report,
        f"{report['train_documents']:,} documents ({report['train_tokens']:,} tokens) to train on, "
        f"{report['valid_documents']:,} ({report['valid_tokens']:,}) held out, in "
        f"{report['seconds']:.1f} s: {report['out']}",
    )
    return 0
