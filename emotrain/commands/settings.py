"""`emotrain settings`: every setting with its default and meaning."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_json, finish
from emotrain.config import Config, config_to_dict
from emotrain.settings import settings_reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    finish(args, config_to_dict(Config()), settings_reference().rstrip())
    return 0
