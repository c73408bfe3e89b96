"""Pretrain a model: `python launch/pretrain.py CONFIG [key=value ...]`, or the same under torchrun."""

from __future__ import annotations

import argparse
import sys

from emotrain.cli import add_json, finish, guarded

EXIT_INTERRUPTED = 75
"""Exit code after SIGTERM or SIGINT with a checkpoint saved: the same command goes on from there."""

EPILOG = """examples:
  python launch/pretrain.py configs/quickstart.yaml
  python launch/pretrain.py configs/quickstart.yaml training.run_dir=runs/lr1e-3 optimizer.lr=1e-3
  torchrun --nproc-per-node 2 launch/pretrain.py configs/quickstart.yaml

The same command goes on from the newest checkpoint of training.run_dir. `emotrain settings` lists every setting.
Ctrl-C or SIGTERM finishes the step, saves a checkpoint and exits with 75; again, and it stops at once."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pretrain EMO, a standard MoE or a dense model.", epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="YAML file, for example configs/quickstart.yaml")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that override the file's")
    add_json(parser)
    return guarded(run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    from emotrain.config import load_config
    from emotrain.distributed.ranks import Ranks
    from emotrain.training.loop import train

    config = load_config(args.config, args.settings)
    ranks = Ranks.join(config.training.device)
    try:
        summary = train(config, ranks)
    finally:
        ranks.leave()
    if ranks.is_first:
        last = summary["metrics"].get("loss")
        finish(args, summary, f"step {summary['step']} of {summary['last_step']}"
               + (f", loss {last:.4f}" if last is not None else ", nothing left to do")
               + f", {summary['seconds']:.0f} s; checkpoints and metrics in {summary['run_dir']}")
    return EXIT_INTERRUPTED if summary["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
