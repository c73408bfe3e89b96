"""How far the `running` balance schedule is from the exact `joint` one.

    python benchmarks/balance_schedule.py --data data/sample [--config configs/quickstart.yaml]
    [--steps 60] [--json] [key=value ...]

`running` balances each micro-batch against the expert counts of the step so far, so that no
micro-batch's activations need to be kept. For several numbers of micro-batches a step, and for the
model at its start and after training:

    gradient_deviation   norm of the difference of the two schedules' gradients over the norm of the
                         exact one, all parameters
    router_deviation     the same, over the routers' parameters alone

and, for the largest number of micro-batches, what two trainings of `--steps` steps end with: cross
entropy, balance loss and the largest expert's load over the mean one.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any, Literal

import torch
from _measure import arguments, report

from emotrain.config import Config, load_config
from emotrain.data.loader import Loader
from emotrain.data.opening import open_loader
from emotrain.distributed.ranks import Ranks
from emotrain.model.transformer import Transformer
from emotrain.training.engine import NativeEngine
from emotrain.training.metrics import mean, routing_metrics
from emotrain.training.optimizer import build_optimizer, learning_rate
from emotrain.training.step import train_step


def with_schedule(config: Config, schedule: Literal["joint", "running"]) -> Config:
    # Without clipping, which would hide a difference in length.
    return dataclasses.replace(
        config,
        losses=dataclasses.replace(config.losses, balance_schedule=schedule),
        optimizer=dataclasses.replace(config.optimizer, clip_norm=0.0),
    )


def gradients(
    model: Transformer, config: Config, loader: Loader, step: int, micro_batches: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a step, of all parameters and of the routers."""
    batches = loader.step(
        step - 1, config.training.global_batch, config.training.global_batch // micro_batches
    )
    train_step(NativeEngine(model), batches, config, step, Ranks())
    gradients = {
        name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None
    }
    of_routers = [grad for name, grad in gradients.items() if ".router." in name]
    return torch.cat(list(gradients.values())), torch.cat(of_routers)


def deviations(
    model: Transformer, config: Config, loader: Loader, step: int, micro_batches: int
) -> dict[str, float]:
    exact, near = (
        gradients(model, with_schedule(config, schedule), loader, step, micro_batches)
        for schedule in ("joint", "running")
    )
    return {
        key: ((b - a).norm() / a.norm()).item()
        for key, a, b in zip(("gradient_deviation", "router_deviation"), exact, near, strict=True)
    }


def train(
    model: Transformer, config: Config, loader: Loader, steps: int, micro_batches: int
) -> dict[str, float]:
    """Train in place; what the last step says."""
    optimizer = build_optimizer(model, config.optimizer)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, steps)
        batches = loader.step(
            step - 1, config.training.global_batch, config.training.global_batch // micro_batches
        )
        result = train_step(NativeEngine(model), batches, config, step, Ranks())
        optimizer.step()
        print(
            f"step {step}/{steps}  {config.losses.balance_schedule}  loss "
            f"{result.cross_entropy:.3f}",
            file=sys.stderr,
        )
    routing = routing_metrics(result.reports, Ranks())
    return {
        "cross_entropy": result.cross_entropy,
        "balance_loss": result.balance,
        "load_imbalance": mean(routing["load_imbalance"]),
    }


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", help="configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        default="data/sample",
        help="folder written by `emotrain prepare` (default: %(default)s)",
    )
    parser.add_argument(
        "--micro-batches",
        type=int,
        nargs="+",
        default=[2, 4, 8],
        help="micro-batches a step (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="steps of training (default: %(default)s)"
    )
    parser.add_argument(
        "settings", metavar="key=value", nargs="*", help="settings that override the file's"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(
        args.config, [*args.settings, f"data.path={args.data}", "training.micro_batch=1"]
    )
    loader = open_loader(
        args.data,
        config.data.sequence_length,
        config.training.seed,
        cross_document_targets=config.data.cross_document_targets,
    )

    model = Transformer(config.model).initialize(config.training.seed)
    most = max(args.micro_batches)
    results: dict[str, Any] = {
        "at_start": {n: deviations(model, config, loader, 1, n) for n in args.micro_batches}
    }
    for schedule in ("joint", "running"):
        trained = copy.deepcopy(model)
        results[f"trained_{schedule}"] = train(
            trained, with_schedule(config, schedule), loader, args.steps, most
        )
        if schedule == "joint":
            results["after_training"] = {
                n: deviations(trained, config, loader, args.steps + 1, n)
                for n in args.micro_batches
            }
    report(
        "Running against joint balance",
        {},
        results | {"steps": args.steps, "micro_batches": most},
        args.json,
    )


if __name__ == "__main__":
    main()
