"""`emotrain inspect`: what a configuration is and costs, before anything is built."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_config, add_json, finish
from emotrain.config import load_config
from emotrain.inspection import describe, run_costs

EPILOG = """\
examples:
  emotrain inspect configs/quickstart.yaml
  emotrain inspect configs/emo_1b14b_1t.yaml model.experts.routed=63 training.tokens=1e11

Nothing is allocated: it takes a second for any model. `emotrain plan` predicts the memory and speed
of one GPU of a cluster."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show a configuration's experts and document pool, parameters, steps, FLOPs, memory, layout"
        "\nand data, without building the model."
    )
    parser.epilog = EPILOG
    add_config(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.settings)
    costs = run_costs(config)
    finish(args, costs, describe(config, costs))
    return 0
