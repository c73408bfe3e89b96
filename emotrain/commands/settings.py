"""`emotrain settings`: every setting with its default and meaning."""

from __future__ import annotations

import argparse
from typing import Any

from emotrain.commands.common import add_json, finish
from emotrain.errors import UserError
from emotrain.settings import sections, settings_reference, settings_text

EPILOG = """\
examples:
  emotrain settings              all of them
  emotrain settings pool         those with the word in their name or meaning
  emotrain settings optimizer.   those of one group"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "word", metavar="WORD", nargs="?", default="", help="show settings that have this word"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the page docs/settings.md instead"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.markdown and args.word:
        raise UserError(f"--markdown prints the whole page; leave out {args.word!r}")
    defaults: dict[str, Any] = {
        setting.key: setting.default
        for section in sections(args.word)
        for setting in section.settings
    }
    text = settings_reference().rstrip("\n") if args.markdown else settings_text(args.word)
    finish(args, defaults, text)
    return 0
