"""The JSON file of DeepSpeed's options: what may stand in it, and what the run's settings add."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from emotrain.config import Config
from emotrain.errors import MissingFileError, UserError

PASSED_ON = {
    "zero_optimization",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
}
"""Sections of the JSON file that reach DeepSpeed as they are."""


ZERO_OPTIONS = {
    "stage",
    "reduce_scatter",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "round_robin_gradients",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
}
"""Options of zero_optimization under which training is known to be the same."""


SET_HERE = {
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.*",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
    "gradient_allreduce_op": "the losses, which need sums",
    "prescale_gradients": "the losses, which need sums",
    "gradient_predivide_factor": "the losses, which need sums",
}
"""Sections that the configuration has no room for, and what decides instead."""


def read_options(path: str | Path, config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run: the options of a JSON file, and what the run's
    configuration says.

    Raises:
        ValueError: not JSON; an option that contradicts the configuration, or that is not known to
            leave training the same.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such file; `ls configs/deepspeed` shows those that come with the project"
        )
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        _require(
            isinstance(options, dict) and isinstance(options.get("zero_optimization"), dict),
            "it needs a section zero_optimization",
        )
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a DeepSpeed configuration ({error}); see configs/deepspeed/zero2.json"
        ) from None
    setup = config.training
    ours = {
        "train_batch_size": ("training.global_batch", setup.global_batch),
        "train_micro_batch_size_per_gpu": ("training.micro_batch", setup.micro_batch),
        "gradient_accumulation_steps": (
            "training.global_batch / training.micro_batch / processes",
            setup.global_batch // setup.micro_batch // world_size,
        ),
        "gradient_clipping": ("optimizer.clip_norm", config.optimizer.clip_norm),
    }
    for key, value in options.items():
        if key in ours:
            setting, wanted = ours[key]
            _require(
                value in (wanted, "auto"),
                f"{path}: {key}={value} contradicts {setting}={wanted:g}, which decides; remove "
                f"{key}",
            )
        elif key in SET_HERE:
            is_off = isinstance(value, dict) and value.get("enabled") is False
            _require(
                is_off, f"{path}: {key} is decided by {SET_HERE[key]}; remove it from the file"
            )
        else:
            _require(
                key in PASSED_ON,
                f"{path}: {key} is not passed on to DeepSpeed; remove it, known are "
                f"{', '.join(sorted(PASSED_ON))}",
            )
    zero = options["zero_optimization"]
    for key in zero:
        _require(
            key in ZERO_OPTIONS,
            f"{path}: zero_optimization.{key} is not known to leave training the same; remove it, "
            f"known are "
            f"{', '.join(sorted(ZERO_OPTIONS))}",
        )
    _check_stage(path, zero, config, world_size)
    passed_on = {key: value for key, value in options.items() if key in PASSED_ON}
    averaged = {} if zero["stage"] == 3 else {"gradient_allreduce_op": "sum"}
    return {
        "steps_per_print": sys.maxsize,
        **passed_on,
        **{key: value for key, (_, value) in ours.items()},
        **averaged,
        "zero_allow_untested_optimizer": True,
    }


def _check_stage(path: Path, zero: dict[str, Any], config: Config, world_size: int) -> None:
    parallel, stage = config.parallel, zero.get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(
            f"{path}: zero_optimization.stage={stage!r} must be the number 1, 2 or 3; without "
            f"ZeRO, start without --deepspeed"
        )
    _require(
        parallel.replicate == 1 and parallel.shard in (0, world_size),
        f"parallel.replicate={parallel.replicate}, parallel.shard="
        f"{parallel.shard}: ZeRO spreads one copy over all {world_size} processes; remove both "
        f"settings",
    )
    if parallel.ep > 1:
        _require(
            stage < 3,
            f"{path}: zero_optimization.stage=3 cuts every parameter over all processes, which "
            f"parallel.ep={parallel.ep} "
            f"does not; use stage 2 or parallel.ep=1",
        )
        for key in ("reduce_scatter", "contiguous_gradients"):
            _require(
                zero.get(key, True) is True,
                f"{path}: zero_optimization.{key}={zero.get(key)} sums experts over the wrong "
                f"ranks with "
                f"parallel.ep={parallel.ep}; remove it",
            )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
