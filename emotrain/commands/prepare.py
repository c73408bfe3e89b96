"""`emotrain prepare`: documents become token shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from emotrain.commands.common import add_json, finish
from emotrain.data.documents import REASONS, Fields
from emotrain.data.tokenizer import EOS_TOKEN
from emotrain.errors import UserError
from emotrain.preparation.joining import FILTERS
from emotrain.preparation.prepare import prepare
from emotrain.preparation.recipe import SHARD_TOKENS, WINDOW
from emotrain.progress import ProgressBar

EPILOG = """\
example:
  emotrain prepare sample --out data/sample          (the corpus that comes with the project)
  emotrain prepare corpus/ --out data/mine --tokenizer tokenizer.json
  emotrain prepare a.jsonl.zst b.parquet --out data/mine --train-tokenizer --vocab-size 16384
  emotrain prepare corpus/ --out /shared/mine --tokenizer tokenizer.json --part 3/16
  emotrain prepare corpus/ --out /shared/mine --tokenizer tokenizer.json --join

Documents are lines of .jsonl (.gz, .zst), rows of .parquet, or whole .txt files. The text is in
"text"; "domain", "source", "split" (train, valid) and "license" are optional. Nothing appears at
--out before all of it is complete; a command that was killed goes on when it is given again."""


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
    _add_filters(parser)
    _add_boundaries(parser)
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
        help="replace the data set at --out once the new one is complete; begin anew where half of "
        "another one is made",
    )
    option(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help="tokens of a shard, about; memory in use is some 8 bytes each for every shard that is "
        "written at a time, at most 8 (default: %(default)s)",
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
        help="processes (default: one a core); changes the time, not the result",
    )
    option(
        "--part",
        metavar="K/N",
        help="encode the K-th of N parts alone, into a folder beside --out that all machines see",
    )
    option("--join", action="store_true", help="make the data set of parts that are all done")


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
    group.add_argument(
        "--allow-special",
        action="store_true",
        help="let special tokens that a text spells become their ids (not the one that ends "
        "documents); without it they are text",
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
    option(
        "--max-document-mb",
        type=float,
        default=256.0,
        metavar="MB",
        help="a longer line or text is skipped and counted, or refused with --strict, and never "
        "held in memory (default: %(default)g)",
    )
    for name in vars(Fields()):
        option(
            f"--{name}-field",
            default=name,
            metavar="NAME",
            help=f"key or column of the {name} (default: %(default)s)",
        )


def _add_filters(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("filters, counted by reason").add_argument
    option(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="keep documents whose field holds FIELD=VALUE[,VALUE], FIELD!=VALUE, FIELD>=NUMBER or "
        "FIELD<=NUMBER; may be given several times, and names may have dots",
    )
    option(
        "--min-tokens",
        type=int,
        default=0,
        metavar="N",
        help="keep documents of so many tokens or more, EOS not counted",
    )
    option(
        "--max-tokens",
        type=int,
        default=0,
        metavar="N",
        help="keep documents of so many tokens or fewer (default: 0, no limit)",
    )
    option(
        "--language",
        default="",
        metavar="CODES[:X]",
        help="keep documents in these languages, en or en,de, told with a confidence of X or more "
        "by py3langid (pip install 'emotrain[language]')",
    )
    option(
        "--deduplicate",
        default="",
        metavar="exact|near:S",
        help="keep the first of equal texts, or of texts that share so much of their runs of 5 "
        "words, by rensa (pip install 'emotrain[dedup]'); takes 16 bytes of disk a document, or 8 "
        "a band",
    )


def _add_boundaries(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("boundaries of documents").add_argument
    option(
        "--boundary",
        default="field",
        metavar="RULE",
        help="what a document is: field (a record), none (a file), heading[:LEVEL], blank:N "
        "(lines), fixed:N (characters), marker:TEXT; none+RULE joins a file and cuts it (default: "
        "%(default)s)",
    )
    option(
        "--join-field",
        default="",
        metavar="NAME",
        help="join neighbouring records that have the same value in this field",
    )
    option(
        "--window",
        type=int,
        default=WINDOW,
        metavar="N",
        help="tokens of a window of training, against which lengths are reported (default: "
        "%(default)s)",
    )


def _part(text: str) -> tuple[int, int]:
    which, slash, count = text.partition("/")
    if not (slash and which.isdecimal() and count.isdecimal()):
        raise UserError(f"--part {text!r} is none; give which of how many, as 3/16")
    return int(which), int(count)


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
            part=None if args.part is None else _part(args.part),
            join=args.join,
            allow_special=args.allow_special,
            max_document_bytes=int(args.max_document_mb * 1e6),
            boundary=args.boundary,
            join_field=args.join_field,
            where=tuple(args.where),
            language=args.language,
            min_tokens=args.min_tokens,
            max_tokens=args.max_tokens,
            deduplicate=args.deduplicate,
            window=args.window,
        )
    finish(args, report, _text(report) if args.part is None else _part_text(report))
    return 0


def _part_text(report: dict[str, Any]) -> str:
    which, count = report["part"]
    return (
        f"part {which}/{count}: {report['documents']:,} documents ({report['tokens']:,} tokens) in "
        f"{report['pieces']:,} of {report['all_pieces']:,} pieces; when all parts are done, join "
        f"them with --join"
    )


def _text(report: dict[str, Any]) -> str:
    """What a person is told."""
    skipped = _counted(report, "skipped", REASONS)
    filtered = _counted(report, "filtered", FILTERS)
    lines = [
        f"{report['train_documents']:,} documents ({report['train_tokens']:,} tokens) to train on, "
        f"{report['valid_documents']:,} ({report['valid_tokens']:,}) held out, {skipped or '0'} "
        f"skipped, {filtered + ' left out, ' if filtered else ''}"
        f"in {report['seconds']:.1f} s: {report['out']}"
    ]
    found = report["boundaries"]
    if found["documents"]:
        quantiles = found["tokens_quantiles"]
        lines.append(
            f"tokens of a document: median {quantiles['0.5']:,}, 95 % {quantiles['0.95']:,}, "
            f"longest {found['tokens_max']:,}; {found['longer_than_window']:.1%} are longer than a "
            f"window of {found['window']:,}"
        )
    if near := report.get("deduplication", {}).get("chance_by_similarity"):
        curve = ", ".join(f"{s}: {chance:.0%}" for s, chance in near.items())
        half = report["deduplication"]["similarity_at_chance_half"]
        lines.append(
            f"near-duplicates: of two texts of similarity {half:.3f} the later is left out with a "
            f"chance of 50 %; {curve}"
        )
    return "\n".join(lines)


def _counted(report: dict[str, Any], what: str, reasons: Sequence[str]) -> str:
    return ", ".join(
        f"{count:,} {reason.replace('_', ' ')}"
        for reason in reasons
        if (count := report[f"{what}_{reason}_documents"])
    )
