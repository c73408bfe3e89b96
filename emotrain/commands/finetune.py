"""`emotrain finetune`: tune a model, or some of it, on documents, on answers, or to a teacher."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_checkpoint, add_json, finish
from emotrain.errors import EXIT_INTERRUPTED
from emotrain.gpu_settings import set_up

DESCRIPTION = """\
Tune a checkpoint: an extracted subset or a whole model, all of it or the parts that --train names.
What is not trained stays as it is, to the last bit. The result is a run like any other, with
metrics, checkpoints and a report; the same command goes on where it was stopped."""
EPILOG = """\
examples:
  emotrain finetune runs/rust --data data/sample --domain rust --out runs/rust-tuned
  emotrain finetune runs/rust --data answers.jsonl --epochs 3 --out runs/rust-answers
  emotrain finetune runs/rust --data data/sample --domain rust --train router --steps 50 \\
      --teacher runs/quickstart --out runs/rust-repaired
  emotrain finetune runs/quickstart --data data/sample --domain rust --experts rust.json \\
      --out runs/with-rust

--data is a folder of `emotrain prepare`, a mixture (.yaml), a file of documents, or JSONL of
prompts and answers, of which answers alone have a loss: {"prompt": "2 + 2 =", "answer": "4"}, or
`question`, `choices` and the number of the right one as `answer`.

--train takes names with commas: routed, shared (experts), router, trunk (the rest), attention,
norms, embedding, head, all.

Settings are those of the published recipe (configs/finetune.yaml), made for large models: small
ones want a larger optimizer.lr. key=value changes any of them. On several processes:
  torchrun --nproc-per-node 2 -m emotrain finetune runs/rust --data data/sample --out runs/tuned
Documents that are not prepared yet are prepared by one: with --only-config, before."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint(parser, "where to begin: ")
    parser.add_argument(
        "settings", metavar="key=value", nargs="*", default=[], help="settings, as of training"
    )
    parser.add_argument("--data", required=True, metavar="DATA", help="what to learn, as below")
    parser.add_argument("--domain", default="", metavar="NAME", help="documents of this one alone")
    parser.add_argument(
        "--train",
        default="",
        metavar="PARTS",
        help="what is trained (default: all; with --experts: routed; with exclusive ones: "
        "routed,router)",
    )
    parser.add_argument(
        "--experts",
        default="",
        metavar="SUBSET",
        help="of routed experts train these alone: a file of `emotrain select`, numbers like 3,7, "
        "last:2, or exclusive:NAME (see emotrain experts)",
    )
    parser.add_argument(
        "--teacher", default="", metavar="CHECKPOINT", help="model whose predictions are learned"
    )
    parser.add_argument(
        "--teacher-weight",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of them in the loss, labels have the rest (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="divides the logits of both models (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=0, metavar="N", help="optimizer steps (default: --epochs)"
    )
    parser.add_argument(
        "--epochs", type=float, default=1.0, metavar="N", help="of the data (default: %(default)s)"
    )
    parser.add_argument(
        "--config", default="", metavar="FILE", help="settings in place of the published recipe's"
    )
    parser.add_argument("--out", required=True, metavar="RUN_DIR", help="folder of the run")
    parser.add_argument(
        "--only-config", action="store_true", help="write RUN_DIR/finetune.yaml and train nothing"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    set_up()  # before torch is imported
    from pathlib import Path

    from emotrain.config import save_config
    from emotrain.distributed.joining import join
    from emotrain.distributed.launcher import Launch
    from emotrain.files import make_writable
    from emotrain.subsets.tuning import TuneSettings, tuning_config
    from emotrain.tasks.while_training import observer
    from emotrain.training.run import train

    settings = TuneSettings(
        data=args.data,
        domain=args.domain,
        train=args.train,
        experts=args.experts,
        teacher=args.teacher,
        teacher_weight=args.teacher_weight,
        temperature=args.temperature,
        steps=args.steps,
        epochs=args.epochs,
        recipe=args.config,
    )
    alone = Launch.read().world_size == 1
    config = tuning_config(args.checkpoint, args.out, settings, args.settings, prepares=alone)
    if args.only_config:
        make_writable(Path(args.out))
        file = Path(args.out) / "finetune.yaml"
        save_config(config, file)
        finish(args, {"config": str(file), "steps": config.num_steps}, f"wrote {file}")
        return 0
    with join(config.training.device, config.training.collective_timeout_s) as ranks:
        summary = train(config, ranks, observe=observer(config, ranks))
    if ranks.is_first:
        last = summary["metrics"].get("loss")
        finish(
            args,
            {**summary, "start": config.finetune.start, "train": config.finetune.train},
            f"step {summary['step']} of {summary['last_step']}, trained {config.finetune.train}"
            + (f", loss {last:.4f}" if last is not None else ", nothing left to do")
            + f"; checkpoints and metrics in {summary['run_dir']}",
        )
    return EXIT_INTERRUPTED if summary["interrupted"] else 0
