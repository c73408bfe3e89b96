"""`emotrain inspect`: what a configuration costs, before anything is built."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_json, finish
from emotrain.config import load_config
from emotrain.inspection import describe, run_costs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file, for example configs/emo_1b14b_1t.yaml"
    )
    parser.add_argument(
        "settings", metavar="key=value", nargs="*", help="settings that override the file's"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    costs = run_costs(load_config(args.config, args.settings))
    finish(args, costs, describe(costs))
    return 0
