"""`emotrain train`: pretrain a model. launch/pretrain.py is the same for torchrun and deepspeed."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from typing import Any

from emotrain.commands.common import add_config, add_json, finish
from emotrain.errors import EXIT_INTERRUPTED
from emotrain.gpu_settings import set_up

EPILOG = """examples:
  emotrain train configs/quickstart.yaml
  emotrain train configs/quickstart.yaml training.run_dir=runs/lr1e-3 optimizer.lr=1e-3
  torchrun --nproc-per-node 2 launch/pretrain.py configs/quickstart.yaml training.micro_batch=8
  deepspeed launch/pretrain.py CONFIG --deepspeed configs/deepspeed/zero2.json parallel.ep=8

The same command goes on from the newest checkpoint of training.run_dir. Ctrl-C, SIGTERM or SIGUSR1
finishes the step, saves a checkpoint and exits with 75; a second one stops at once. `emotrain
settings` lists every setting, `emotrain --help` the exit codes. EMOTRAIN_TRACEBACK=1 shows where a
one-line error was raised."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_config(parser)
    parser.add_argument(
        "--deepspeed",
        metavar="JSON",
        help="train by DeepSpeed, with options like configs/deepspeed/zero2.json",
    )
    # The deepspeed launcher says it, also in LOCAL_RANK.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    set_up()  # before torch is imported
    from emotrain.config import load_config, warnings_of
    from emotrain.distributed.joining import join
    from emotrain.tasks.while_training import observer
    from emotrain.training.run import train

    options: dict[str, Any] = {}
    if args.deepspeed:
        from emotrain.training.deepspeed import DeepSpeedEngine

        options["build_engine"] = partial(DeepSpeedEngine, args.deepspeed)
    config = load_config(args.config, args.settings)
    with join(config.training.device, config.training.collective_timeout_s) as ranks:
        for line in warnings_of(config) if ranks.is_first else ():
            logging.getLogger(__name__).warning("warning: %s", line)
        summary = train(config, ranks, observe=observer(config, ranks), **options)
    if ranks.is_first:
        last = summary["metrics"].get("loss")
        finish(
            args,
            summary,
            f"step {summary['step']} of {summary['last_step']}"
            + (f", loss {last:.4f}" if last is not None else ", nothing left to do")
            + f", {summary['seconds']:.0f} s; checkpoints and metrics in {summary['run_dir']}",
        )
    return EXIT_INTERRUPTED if summary["interrupted"] else 0
