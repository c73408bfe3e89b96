"""`emotrain prepare`: documents become token shards."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_json, finish
from emotrain.data.documents import REASONS, Fields
from emotrain.data.prepare import SHARD_TOKENS, prepare
from emotrain.data.tokenizer import EOS_TOKEN
from emotrain.progress import ProgressBar

EPILOG = """\
example:
  emotrain prepare sample --out data/sample          (the corpus that comes with the project)
  emotrain prepare corpus/ --out data/mine --tokenizer tokenizer.json
  emotrain prepare a.jsonl.zst b.parquet --out data/mine --train-tokenizer --vocab-size 16384

Documents are lines of .jsonl (.gz, .zst), rows of .parquet, or whole .txt files. The text is in
"text"; "domain", "source" and "split" (train, valid) are optional. Nothing appears at --out before
all of it is complete."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `emotrain prepare`."""
    parser.description = (
        "Turn text documents into shuffled token shards that training reads in place."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files or folders of documents, or `sample`, the embedded corpus",
    )
    _add_result(parser)
    _add_tokenizer(parser)
    _add_documents(parser)
    add_json(parser)


def _add_result(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to make; refused if it exists, see --overwrite",
    )
    option(
        "--overwrite",
        action="store_true",
        help="replace the data set at --out once the new one is complete",
    )
    option(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help="tokens of a shard, about; memory in use is some 8 bytes each (default: %(default)s)",
    )
    option(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the shuffle and of the held-out share (default: %(default)s)",
    )
    option(
        "--workers",
        type=int,
        metavar="N",
        help="encoding threads (default: one a core); changes the time, not the result",
    )


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokenizer")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json to encode with")
    which.add_argument(
        "--train-tokenizer",
        action="store_true",
        help="train a byte-level BPE on the documents first (the default for `sample`)",
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of a trained tokenizer (default: %(default)s)",
    )
    group.add_argument(
        "--eos-token",
        default=EOS_TOKEN,
        metavar="TOKEN",
        help="token that ends a document (default: %(default)s)",
    )


def _add_documents(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("documents").add_argument
    option(
        "--valid-fraction",
        type=float,
        default=0.01,
        metavar="X",
        help="share of documents held out, among those without a split of their own (default: "
        "%(default)s)",
    )
    option(
        "--strict",
        action="store_true",
        help="stop at the first bad document; without it they are skipped and counted",
    )
    for name in vars(Fields()):
        option(
            f"--{name}-field",
            default=name,
            metavar="NAME",
            help=f"key or column of the {name} (default: %(default)s)",
        )


def run(args: argparse.Namespace) -> int:
    """`emotrain prepare`: progress on stderr, the result on stdout."""
    fields = Fields(**{name: getattr(args, f"{name}_field") for name in vars(Fields())})
    with ProgressBar() as bar:
        report = prepare(
            args.inputs,
            args.out,
            tokenizer=args.tokenizer,
            train_tokenizer=args.train_tokenizer,
            vocab_size=args.vocab_size,
            eos_token=args.eos_token,
            shard_tokens=args.shard_tokens,
            valid_fraction=args.valid_fraction,
            seed=args.seed,
            workers=args.workers,
            strict=args.strict,
            overwrite=args.overwrite,
            fields=fields,
            bar=bar,
        )
    skipped = ", ".join(
        f"{report[f'skipped_{reason}_documents']:,} {reason.replace('_', ' ')}"
        for reason in REASONS
        if report[f"skipped_{reason}_documents"]
    )
    finish(
        args,
        report,
        f"{report['train_documents']:,} documents ({report['train_tokens']:,} tokens) to train on, "
        f"{report['valid_documents']:,} ({report['valid_tokens']:,}) held out, {skipped or '0'} "
        f"skipped, "
        f"in {report['seconds']:.1f} s: {report['out']}",
    )
    return 0
