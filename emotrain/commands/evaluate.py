"""`emotrain evaluate`: the loss of each domain with all experts and with its best subsets."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from emotrain.commands.common import (
    add_checkpoint,
    add_data,
    add_device,
    add_document_tokens,
    add_json,
    add_micro_batch,
    finish,
)
from emotrain.commands.evaluate_tasks import (
    add_task_arguments,
    refuse_what_says_nothing,
    run_lm_eval,
    run_tasks,
)
from emotrain.errors import UserError
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.progress import ProgressBar

DESCRIPTION = """\
Measure what each domain loses when it keeps only some of the experts. A few training documents of a
domain choose its experts; the loss is taken on held-out documents, for every domain with its own
subset. Two controls say whether the choice matters: as many experts at random, and those that
another domain chose. Training is not needed, nor is a GPU."""
EPILOG = """\
examples:
  emotrain evaluate runs/quickstart --data data/sample --keep 1.0 0.5 0.25 0.125
  torchrun --nproc-per-node 8 -m emotrain evaluate runs/large parallel.ep=8 --data data/mine

--keep counts shared experts, which always stay: of a layer with 32 routed experts and 1 shared one,
33 in all, `--keep 0.25` keeps 8 (0.25 * 33 = 8.25, rounded), the shared one and the 7 routed ones
that the domain gives the most routing probability. At least one routed expert stays.

Several processes divide the documents among them and share the model, by default in equal parts
(FSDP2). The numbers are those of one process, which a large model need not fit into.

Reading it: a modular model loses little with the experts a domain chose itself, and much with the
other two.

With --tasks the questions of files are asked instead, with --lm-eval those of EleutherAI's harness:
  emotrain evaluate runs/quickstart --tasks questions.jsonl --shots 5 --keep 0.25 --subset rust.json
  emotrain evaluate runs/quickstart --lm-eval my_task --include-path tasks"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = EvaluationSettings()
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint(parser)
    add_data(parser, required=False)
    parser.add_argument(
        "settings",
        metavar="parallel.*=N",
        nargs="*",
        default=[],
        help="how several processes share the model: parallel.replicate, parallel.shard, "
        "parallel.ep (default: all of them one copy)",
    )
    parser.add_argument(
        "--keep",
        type=float,
        nargs="+",
        metavar="SHARE",
        help=f"shares of each layer's experts to keep, shared ones counted, as in the example "
        f"below (default: {' '.join(map(str, default.keep))})",
    )
    _add_settings(parser, default)
    add_micro_batch(parser)
    add_device(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for evaluation.json, evaluation.md, subsets.png and its numbers as "
        "subsets.csv, or for tasks.json and others (default: RUN_DIR/evaluation)",
    )
    add_json(parser)
    add_task_arguments(parser)


def _add_settings(parser: argparse.ArgumentParser, default: EvaluationSettings) -> None:
    """What is measured, and how surely."""
    parser.add_argument(
        "--calibration-documents",
        type=int,
        metavar="N",
        help=f"training documents of a domain, or examples of a task, that choose its experts "
        f"(default: {default.calibration_documents})",
    )
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help=f"most held-out documents of a domain (default: {default.documents}); more of them, "
        f"smaller errors",
    )
    parser.add_argument(
        "--control-documents",
        type=int,
        metavar="N",
        help="of them, those that the random and the other domain's experts are measured on: "
        "half of them save a quarter of the time (default: all)",
    )
    add_document_tokens(parser, default.document_tokens)
    parser.add_argument(
        "--domains",
        nargs="+",
        metavar="NAME",
        help="domains to measure (default: all that have enough documents)",
    )
    parser.add_argument(
        "--random-seeds",
        type=int,
        metavar="N",
        help=f"random subsets at each share, 0 for none (default: {default.random_seeds})",
    )
    parser.add_argument(
        "--cross-domain",
        choices=("next", "all"),
        help=f"whose experts the control uses: the next domain's by name, or every other's in turn "
        f"(default: {default.cross_domain})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help=f"seed of the first random subset (default: {default.seed})",
    )


def run(args: argparse.Namespace) -> int:
    refuse_what_says_nothing(args)
    if args.tasks:
        return run_tasks(args)
    if args.lm_eval:
        return run_lm_eval(args)
    if not args.data:
        raise UserError("give --data DIR, a prepared data set, or --tasks FILE, questions")
    from emotrain.distributed.joining import join
    from emotrain.evaluation.measure import choose_device, default_folder, evaluate, write_results
    from emotrain.evaluation.tables import tables
    from emotrain.training.checkpoint import find

    given = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(EvaluationSettings)
    }
    given = {name: value for name, value in given.items() if value is not None}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    settings = EvaluationSettings(**{**given, **lists})
    folder = Path(args.out) if args.out else default_folder(find(args.checkpoint))
    choose_device(args.device)
    with join(args.device) as ranks, ProgressBar("batches", shown=ranks.is_first) as bar:
        result = evaluate(
            args.checkpoint,
            args.data,
            settings,
            micro_batch=args.micro_batch,
            track=bar.track,
            folder=folder,
            ranks=ranks,
            layout=args.settings,
        )
    if not ranks.is_first:
        return 0
    finish(args, result.to_json(), "\n\n".join(table.text() for table in tables(result)))
    # What was printed is not lost when this fails.
    written = write_results(result, folder)
    if not args.json:
        print(*(f"wrote {path}" for path in written), sep="\n")
    return 0
