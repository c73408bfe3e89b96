"""`emotrain plan`: memory, traffic and speed of a run on a cluster that need not exist."""

from __future__ import annotations

import argparse
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
        type=float,
        default=0.0,
        metavar="X",
        help="expert ranks a token goes to (default: as measured by the file that "
        "parallel.placement names, else what choices without preference reach)",
    )
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        metavar="X",
        help="routed slots of the busiest expert rank over the mean (default: %(default)s)",
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
        if args.ranks_per_token or args.imbalance != 1:
            raise UserError(
                f"parallel.placement={config.parallel.placement} says what --ranks-per-token and "
                f"--imbalance assume; leave them out"
            )
        placement = read_fitting(config)
        return Routing(placement.rows_per_token, placement.exchange_load, placement.ep)
    if not 0 <= args.ranks_per_token <= max(config.parallel.ep, 1):
        raise UserError(
            f"--ranks-per-token {args.ranks_per_token:g} must be between 1 and "
            f"parallel.ep={config.parallel.ep}"
        )
    if not 1 <= args.imbalance <= max(config.parallel.ep, 1):
        raise UserError(
            f"--imbalance {args.imbalance:g} must be between 1 (balanced) and "
            f"parallel.ep={config.parallel.ep} (one rank "
            f"gets all)"
        )
    return Routing(args.ranks_per_token, args.imbalance)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number
