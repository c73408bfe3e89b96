"""`emotrain plan`: memory, traffic and speed of a run on a cluster that need not exist."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from emotrain.commands.common import add_config, add_json, finish
from emotrain.errors import UserError
from emotrain.planning.hardware import GPUS, Cluster, find_gpu

if TYPE_CHECKING:
    from emotrain.config import Config
    from emotrain.planning.stand_ins import Routing

EPILOG = """\
examples:
  emotrain plan configs/emo_1b14b_1t_ep.yaml --nodes 16 --gpus-per-node 8
  emotrain plan configs/emo_1b14b_130b.yaml --nodes 1 --gpu a100-80gb --search
  emotrain plan configs/emo_1b14b_1t.yaml --nodes 16 parallel.ep=8 training.micro_batch=8

No GPU is needed: one step of the real plan runs without memory or arithmetic, and a model of the
hardware predicts its time (docs/plan.md)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_config(parser, "configs/emo_1b14b_1t.yaml")
    parser.add_argument("--nodes", type=_positive, default=1, help="servers (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=_positive, default=8, help="GPUs of a server (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu",
        default="h100-80gb",
        metavar="NAME",
        help=f"one of {', '.join(GPUS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try other layouts of the same model, batch and cluster, and rank them",
    )
    parser.add_argument(
        "--reference",
        action="store_true",
        help="predict the published training run instead: its layout and its kernels",
    )
    parser.add_argument(
        "--deepspeed",
        metavar="JSON",
        help="plan a run by DeepSpeed with these options (configs/deepspeed/zero1.json to zero3)",
    )
    parser.add_argument(
        "--ranks-per-token",
        type=_by_ep,
        default={},
        metavar="X",
        help="expert ranks a token goes to, X or, for several numbers of ranks, EP:X,EP:X "
        "(default: as measured by the file that parallel.placement names, else what choices "
        "without preference reach)",
    )
    parser.add_argument(
        "--imbalance",
        type=_by_ep,
        default={},
        metavar="X",
        help="routed slots of the busiest expert rank over the mean, X or EP:X,EP:X (default: 1)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.config import load_config
    from emotrain.distributed.mesh import Layout
    from emotrain.planning import text as plan_text
    from emotrain.planning.plan import make_plan, reference_plan
    from emotrain.planning.search import advice, search
    from emotrain.planning.zero import zero_plan

    alternatives = ("search", "reference", "deepspeed")
    if len([name for name in alternatives if getattr(args, name)]) > 1:
        raise UserError("--search, --reference and --deepspeed are alternatives; give one")
    config = load_config(args.config, args.settings)
    cluster = Cluster(find_gpu(args.gpu), args.nodes, args.gpus_per_node)
    Layout.check(config, cluster.world_size)
    routing = _routing(args, config)
    if args.search:
        found = search(config, cluster, routing)
        best = found[0].plan.as_dict() if found and found[0].plan else {"fits": False}
        finish(
            args,
            best | {"layouts": [entry.as_dict() for entry in found]},
            plan_text.search_table(config, cluster, found),
        )
        return 0 if best["fits"] else 1
    if args.reference:
        plan = reference_plan(config, cluster)
    elif args.deepspeed:
        plan = zero_plan(args.deepspeed, config, cluster, routing)
    else:
        plan = make_plan(config, cluster, routing)
    asked = plan.fits or args.reference
    changes = [] if asked else advice(config, cluster, routing, args.deepspeed)
    finish(
        args,
        plan.as_dict() | {"changes": [change.as_dict() for change in changes]},
        plan_text.describe(plan, changes),
    )
    return 0


def _routing(args: argparse.Namespace, config: Config) -> Routing:
    from emotrain.modular.placement import read_fitting
    from emotrain.planning.stand_ins import Routing

    if config.parallel.placement not in ("contiguous", "auto"):
        if args.ranks_per_token or args.imbalance:
            raise UserError(
                f"parallel.placement={config.parallel.placement} says what --ranks-per-token and "
                f"--imbalance assume; leave them out"
            )
        placement = read_fitting(config)
        return Routing(placement.rows_per_token, placement.exchange_load, placement.ep, True)
    for option, given in (
        ("--ranks-per-token", args.ranks_per_token),
        ("--imbalance", args.imbalance),
    ):
        for ep, value in given.items():
            most = max(ep or config.parallel.ep, 1)
            if not 1 <= value <= most:
                where = f"{ep}:{value:g}" if ep else f"{value:g}"
                raise UserError(
                    f"{option} {where} must be between 1 and {ep or f'parallel.ep={most}'}; "
                    f"change it"
                )
    first, *others = [
        Routing(
            args.ranks_per_token.get(ep, args.ranks_per_token.get(0, 0.0)),
            args.imbalance.get(ep, args.imbalance.get(0, 1.0)),
            ep,
        )
        for ep in sorted({**args.ranks_per_token, **args.imbalance}, reverse=True) or [0]
    ]
    return replace(first, others=tuple(others))


def _by_ep(text: str) -> dict[int, float]:
    """`X` is for any number of ranks (0), `EP:X,EP:X` for those that are named."""
    try:
        if ":" not in text:
            return {0: float(text)}
        pairs = (pair.split(":") for pair in text.split(","))
        return {_positive(ep): float(value) for ep, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be a number, or EP:X,EP:X") from None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number
