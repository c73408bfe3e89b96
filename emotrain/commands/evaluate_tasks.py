"""What `emotrain evaluate` does with --tasks and with --lm-eval."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emotrain.commands.common import finish
from emotrain.distributed.launcher import Launch
from emotrain.errors import UserError
from emotrain.progress import ProgressBar

OF_DOMAINS = (
    "data",
    "documents",
    "control_documents",
    "document_tokens",
    "domains",
    "cross_domain",
)
OF_CHOICE = ("keep", "calibration_documents", "random_seeds")
OF_TASKS = ("shots_from", "split", "normalisation", "answer_tokens")
OF_BOTH = ("subset", "shots", "limit")
"""Options, by what they are said to."""


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of questions. None stands for one that is not given, so that one that would say
    nothing can be refused."""
    group = parser.add_argument_group("questions instead of documents")
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="FILE",
        help="JSONL files of questions with choices, questions with answers, or texts "
        "(docs/tasks.md); --keep and --random-seeds choose experts for each of them by its own "
        "examples (default: all experts)",
    )
    group.add_argument(
        "--lm-eval",
        nargs="+",
        metavar="TASK",
        help="tasks of EleutherAI's lm-eval, by the names in their YAML files",
    )
    group.add_argument("--include-path", metavar="DIR", help="folder of these YAML files")
    group.add_argument(
        "--subset",
        nargs="+",
        metavar="FILE",
        help="also with the experts of these files of `emotrain select`",
    )
    group.add_argument(
        "--shots",
        type=int,
        metavar="N",
        help="examples with answers before each question (default: 0, or as a lm-eval task says)",
    )
    group.add_argument(
        "--shots-from",
        metavar="FILE",
        help="the examples (default: the items of a task's file that are not asked)",
    )
    group.add_argument(
        "--split", metavar="NAME", help="the items that are asked (default: test, or no split)"
    )
    group.add_argument(
        "--normalisation",
        choices=("raw", "per_char", "unconditional"),
        help="of log probabilities of choices, for the headline; all are recorded (default: raw)",
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="most questions of a task; then there is no mean over tasks",
    )
    group.add_argument(
        "--answer-tokens",
        type=int,
        metavar="N",
        help="most tokens of an answer in words (default: 50)",
    )


def refuse_what_says_nothing(args: argparse.Namespace) -> None:
    """Refuse options of the other ways to evaluate.

    Raises:
        UserError: names the option.
    """
    if (processes := Launch.read().world_size) > 1 and args.lm_eval:
        raise UserError(
            f"--lm-eval asks in one process, this is one of {processes}; start it without a "
            f"launcher, or ask the same questions with --tasks"
        )
    if args.settings and args.lm_eval:
        raise UserError(f"{args.settings[0]} says nothing with --lm-eval; leave it out")
    if args.tasks and args.lm_eval:
        raise UserError("give --tasks or --lm-eval: each writes results of its own")
    others: tuple[str, ...]
    way, others = "--tasks", (*OF_DOMAINS, "include_path")
    if args.lm_eval:
        way, others = "--lm-eval", (*OF_DOMAINS, *OF_CHOICE, *OF_TASKS)
        if not args.include_path:
            raise UserError(
                "--lm-eval needs --include-path DIR, the folder of the YAML files of its tasks"
            )
    elif not args.tasks:
        way, others = "--data", (*OF_TASKS, *OF_BOTH, "include_path")
    elif not args.keep:
        others += ("random_seeds", "calibration_documents")
        way += " without --keep"
    for name in others:
        if getattr(args, name):  # 0 and none at all ask for nothing
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} says nothing with {way}; leave it out")


def run_tasks(args: argparse.Namespace) -> int:
    """`emotrain evaluate CHECKPOINT --tasks FILE…`"""
    from emotrain.distributed.joining import join
    from emotrain.evaluation.measure import choose_device
    from emotrain.tasks.evaluation import evaluate_tasks
    from emotrain.tasks.settings import TaskSettings
    from emotrain.tasks.tables import tables, write_results

    names = (*OF_CHOICE, *OF_TASKS, "shots", "limit", "seed")
    given: dict[str, Any] = {name: getattr(args, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    given["keep"] = tuple(given.get("keep", ()))
    settings = TaskSettings(subsets=tuple(args.subset or ()), **given)
    folder = _folder(args)
    choose_device(args.device)
    with join(args.device) as ranks, ProgressBar("batches", shown=ranks.is_first) as bar:
        result = evaluate_tasks(
            args.checkpoint,
            args.tasks,
            settings,
            micro_batch=args.micro_batch,
            track=bar.track,
            out=folder,
            ranks=ranks,
            layout=args.settings,
        )
    if not ranks.is_first:
        return 0
    finish(args, result.to_json(), "\n\n".join(table.text() for table in tables(result)))
    return _written(args, write_results(result, folder))


def run_lm_eval(args: argparse.Namespace) -> int:
    """`emotrain evaluate CHECKPOINT --lm-eval TASK… --include-path DIR`"""
    from emotrain.tasks.harness import evaluate_harness

    folder = _folder(args)
    with ProgressBar("batches") as bar:
        result = evaluate_harness(
            args.checkpoint,
            args.lm_eval,
            args.include_path,
            args.subset or (),
            args.shots,
            args.limit or 0,
            args.seed or 0,
            device=args.device,
            micro_batch=args.micro_batch,
            track=bar.track,
            out=folder,
        )
    finish(args, result.to_json(), result.table().text())
    return _written(args, result.write(folder))


def _folder(args: argparse.Namespace) -> Path:
    from emotrain.evaluation.measure import default_folder
    from emotrain.training.checkpoint import find

    return Path(args.out) if args.out else default_folder(find(args.checkpoint))


def _written(args: argparse.Namespace, files: list[Path]) -> int:
    if not args.json:
        print(*(f"wrote {path}" for path in files), sep="\n")
    return 0
