"""What commands do alike: a configuration, a checkpoint and data, `--json`, and one way to print a
result."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emotrain.errors import ExistingFileError, NotAFolderError, UserError
from emotrain.files import json_text, make_writable


def add_config(parser: argparse.ArgumentParser, example: str = "configs/quickstart.yaml") -> None:
    """CONFIG, which is needed, and settings, which are not."""
    parser.add_argument("config", metavar="CONFIG", help=f"YAML file, for example {example}")
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings that override the file's, for example optimizer.lr=1e-3 (`emotrain "
        "settings` lists them)",
    )


def add_checkpoint(
    parser: argparse.ArgumentParser, which: str = "", optional: bool = False
) -> None:
    """CHECKPOINT; `which` says which one, where not any will do."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?" if optional else None,
        help=f"{which}a run folder (its newest checkpoint) or RUN_DIR/checkpoints/step-…",
    )


def add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--data, of commands that run a model on a data set."""
    parser.add_argument(
        "--data",
        required=required,
        metavar="DIR",
        help="folder written by `emotrain prepare`, with the model's tokenizer",
    )


def add_checkpoint_and_data(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT and --data, of the same commands."""
    add_checkpoint(parser)
    add_data(parser)


def add_micro_batch(parser: argparse.ArgumentParser) -> None:
    """--micro-batch, of commands that run a model forward."""
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=0,
        metavar="ROWS",
        help="rows of one forward pass (default: as in training)",
    )


def add_document_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    """--document-tokens, of commands that read documents."""
    parser.add_argument(
        "--document-tokens",
        type=int,
        default=default,
        metavar="N",
        help="tokens of a document that count, from its start, 0 for all (default: %(default)s)",
    )


def add_documents(
    parser: argparse.ArgumentParser,
    documents: int,
    tokens: int,
    what: str = "most held-out documents of a domain",
) -> None:
    """--documents and --document-tokens, with these defaults."""
    parser.add_argument(
        "--documents",
        type=int,
        default=documents,
        metavar="N",
        help=f"{what} (default: %(default)s)",
    )
    add_document_tokens(parser, tokens)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, of the same commands."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run (default: %(default)s)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object, the last line of stdout",
    )


def output_file(out: str, example: str) -> Path:
    """The file that --out names, in a folder that can be written to: known before the work.

    Raises:
        UserError: a folder has that name, or its folder is none. WriteError: it is not writable.
    """
    path = Path(out)
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder; give the name of a file, for example {path}/{example}"
        )
    try:
        make_writable(path.parent)
    except NotAFolderError:
        raise NotAFolderError(f"{path.parent}: is not a folder; choose another --out") from None
    return path


def new_file(out: str, example: str) -> Path:
    """`output_file` of what is never written over: a subset that others were made of, or extracted
    with, must not change.

    Raises:
        ExistingFileError: a file has that name.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ExistingFileError(f"{path}: exists; remove it or choose another --out")
    return output_file(out, example)


def finish(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Print a command's result: JSON where asked for, else text."""
    print(json_text(result) if args.json else text)
