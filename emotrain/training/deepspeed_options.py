"""The JSON file of DeepSpeed's options: what may stand in it, and what the run's settings add."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any, TypeAlias

import torch

from emotrain.config import Config
from emotrain.config.finetune import PARTS
from emotrain.distributed.mesh import experts_of_rank
from emotrain.errors import MissingFileError, UserError
from emotrain.model.transformer import Transformer


@dataclass(frozen=True)
class Whole:
    """A whole number of a range, and a multiple of something."""

    least: int
    most: int = sys.maxsize
    step: int = 1

    def __str__(self) -> str:
        multiple = f" and a multiple of {self.step}" if self.step > 1 else ""
        return f"a whole number from {self.least} to {self.most}{multiple}"


Kind: TypeAlias = "type[bool] | Whole | Texts | Mapping[str, Kind]"
"""What a value of the file may be; a mapping is a section, by the names in it."""


class Texts:
    """A list of texts."""

    def __str__(self) -> str:
        return "a list of texts"


BUFFER = Whole(1, 2**31 - 1)
"""Elements of a buffer that DeepSpeed allocates, whatever the size of the model."""

BUCKET = 500_000_000
"""reduce_bucket_size where the file says nothing, as DeepSpeed has it."""

ZERO_OPTIONS: dict[str, Kind] = {
    "stage": Whole(1, 3),
    "reduce_scatter": bool,
    "overlap_comm": bool,
    "contiguous_gradients": bool,
    "reduce_bucket_size": BUFFER,
    "allgather_bucket_size": Whole(2, step=2),
    "use_multi_rank_bucket_allreduce": bool,
    "round_robin_gradients": bool,
    "sub_group_size": Whole(1),
    "stage3_prefetch_bucket_size": Whole(0),
    "stage3_param_persistence_threshold": Whole(0),
    "stage3_max_live_parameters": Whole(0),
    "stage3_max_reuse_distance": Whole(0),
}
"""Options of zero_optimization under which training is known to be the same."""

REPORTS: dict[str, Kind] = {
    "steps_per_print": Whole(1),
    "comms_logger": {
        "enabled": bool,
        "verbose": bool,
        "prof_all": bool,
        "debug": bool,
        "prof_ops": Texts(),
    },
}
"""Options by which DeepSpeed says more on stderr."""

PASSED_ON: dict[str, Kind] = {"zero_optimization": ZERO_OPTIONS, **REPORTS}
"""What of the file reaches DeepSpeed, as it is."""

SET_HERE = {
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.*",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
    "wall_clock_breakdown": "profile.*",
    "memory_breakdown": "profile.*",
    "gradient_allreduce_op": "the losses, which need sums",
    "prescale_gradients": "the losses, which need sums",
    "gradient_predivide_factor": "the losses, which need sums",
}
"""Sections that the configuration has no room for, and what decides instead."""


def read_options(path: str | Path, config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run: the options of a JSON file, and what the run's
    configuration says.

    Raises:
        UserError: not JSON; a value that DeepSpeed would not take; an option that contradicts the
            configuration, or that is not known to leave training the same; a setting of the
            configuration that DeepSpeed has no use for.
        MissingFileError: no such file.
    """
    path = Path(path)
    _require(
        not config.model.router.choice_bias,
        "model.router.choice_bias=true (losses.balance_method=bias): DeepSpeed rounds buffers and "
        "does not save them; train without --deepspeed",
    )
    options = _read(path)
    setup = config.training
    ours: dict[str, tuple[str, float]] = {
        "train_batch_size": ("training.global_batch", setup.global_batch),
        "train_micro_batch_size_per_gpu": ("training.micro_batch", setup.micro_batch),
        "gradient_accumulation_steps": (
            "training.global_batch / training.micro_batch / processes",
            setup.global_batch // setup.micro_batch // world_size,
        ),
        "gradient_clipping": ("optimizer.clip_norm", config.optimizer.clip_norm),
    }
    passed_on = {}
    for key, value in options.items():
        if key in ours:
            setting, wanted = ours[key]
            _require(
                value == "auto" or (type(value) in (int, float) and value == wanted),
                f"{path}: {key}={shown(value)} contradicts {setting}={wanted}, which decides; "
                f"remove {key}",
            )
        elif key in SET_HERE:
            is_off = (value.get("enabled") if isinstance(value, dict) else value) is False
            _require(
                is_off, f"{path}: {key} is decided by {SET_HERE[key]}; remove it from the file"
            )
        else:
            _require(
                key in PASSED_ON,
                f"{path}: {_plain(key)} is not passed on to DeepSpeed; remove it, known are "
                f"{', '.join(sorted(PASSED_ON))}",
            )
            passed_on[key] = _checked(path, key, value, PASSED_ON[key])
    zero = passed_on.get("zero_optimization", {})
    _check_stage(path, zero, config, world_size)
    zero.setdefault("reduce_bucket_size", BUCKET)
    averaged = {} if zero["stage"] == 3 else {"gradient_allreduce_op": "sum"}
    return {
        "steps_per_print": sys.maxsize,
        **passed_on,
        **{key: value for key, (_, value) in ours.items()},
        **averaged,
        "zero_allow_untested_optimizer": True,
    }


def check_bucket(size: int, shares: Sequence[Sequence[int]], totals: Sequence[int]) -> None:
    """Refuse a bucket that ranks with unequal shares of the experts would fill at different
    gradients: DeepSpeed reduces dense gradients and those of experts in one sequence of buckets,
    and ranks would reduce other gradients together. A bucket that no share fits into is flushed
    before and after each; one that everything fits into is flushed once.

    Args:
        shares: elements of each parameter of routed experts, by rank.
        totals: elements of all parameters, by rank.
    """
    least, most = min(map(min, shares)), max(totals)
    _require(
        len(set(map(tuple, shares))) == 1 or size < least or size >= most,
        f"zero_optimization.reduce_bucket_size={size}: ranks with unequal shares of the routed "
        f"experts need less than {least} or at least {most}; write such a number, or choose a "
        f"parallel.ep that divides the experts of every layer",
    )


def check_memory(config: Config, stage: int, gpu_bytes: int) -> None:
    """Refuse a model that cannot be on a GPU of so many bytes in all: before it is built. At stage
    1 and 2 a GPU holds dense parameters, its experts and the gradients of both, in fp32; at stage 3
    the model is whole at the start."""
    with torch.device("meta"):
        model = Transformer(config.model)
    total = held = sum(parameter.numel() for parameter in model.parameters())
    for bank in model.expert_banks():
        for parameter in bank.parameters():
            experts = parameter.shape[0]
            elsewhere = experts - experts_of_rank(experts, config.parallel.ep, 0)
            held -= elsewhere * (parameter.numel() // experts)
    what, needed = (
        ("all parameters", 4 * total)
        if stage == 3
        else ("parameters and their gradients", 8 * held)
    )
    _require(
        needed <= gpu_bytes,
        f"{needed / 2**30:.1f} GiB of {what} in fp32 at ZeRO stage {stage}, "
        f"parallel.ep={config.parallel.ep}: a GPU has {gpu_bytes / 2**30:.1f} GiB in all; "
        + (
            "start without --deepspeed, where FSDP2 builds a model in shares"
            if stage == 3
            else "raise parallel.ep, or start without --deepspeed, where FSDP2 holds shares alone"
        ),
    )


def asks_for_reports(options: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed shall say more than its warnings."""
    return any(options.get(key) not in (None, False, sys.maxsize) for key in REPORTS)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = "is not a file" if path.exists() else "no such file"
        raise MissingFileError(
            f"{path}: {what}; `ls configs/deepspeed` shows those that come with the project"
        )
    try:
        options = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_without_doubles,
            parse_constant=_refuse_constant,
        )
        _require(
            isinstance(options, dict) and isinstance(options.get("zero_optimization"), dict),
            "it needs a section zero_optimization",
        )
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a DeepSpeed configuration ({error}); see configs/deepspeed/zero2.json"
        ) from None
    assert isinstance(options, dict)
    return options


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    if len(section) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_plain(double)} stands in it twice")
    return section


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _checked(path: Path, name: str, value: Any, kind: Kind) -> Any:
    """A value as DeepSpeed takes it, if it is of its kind."""
    if isinstance(kind, Mapping):
        _require(
            isinstance(value, dict),
            f"{path}: {name}={shown(value)} must be a section {{...}}; remove it or write it so",
        )
        for key in value:
            _require(
                key in kind,
                f"{path}: {name}.{_plain(key)} is not known to leave training the same; remove "
                f"it, known are {', '.join(sorted(kind))}",
            )
        return {key: _checked(path, f"{name}.{key}", value[key], kind[key]) for key in value}
    if isinstance(kind, Whole):
        # DeepSpeed's own examples write 5e8.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fits = type(value) is int and kind.least <= value <= kind.most and not value % kind.step
    elif isinstance(kind, Texts):
        fits = isinstance(value, list) and all(isinstance(text, str) for text in value)
    else:
        fits = isinstance(value, bool)
    rule = "true or false" if kind is bool else str(kind)
    without = "without ZeRO, start without --deepspeed" if name.endswith(".stage") else "remove it"
    _require(fits, f"{path}: {name}={shown(value)} must be {rule}; {without} or write it so")
    return value


def _check_stage(path: Path, zero: dict[str, Any], config: Config, world_size: int) -> None:
    """Refuse what ZeRO in general, or this stage of it, does not do."""
    parallel, stage = config.parallel, zero.get("stage")
    _require(
        stage is not None,
        f"{path}: zero_optimization.stage is not there; write the number 1, 2 or 3, or start "
        f"without --deepspeed",
    )
    _require(
        parallel.replicate == 1 and parallel.shard in (0, world_size),
        f"parallel.replicate={parallel.replicate}, parallel.shard="
        f"{parallel.shard}: ZeRO spreads one copy over all {world_size} processes; remove both "
        f"settings",
    )
    _require(
        parallel.reshard_after_forward,
        "parallel.reshard_after_forward=false does nothing under DeepSpeed, whose stage decides "
        "what stays gathered; remove it",
    )
    _require(
        parallel.reduce_dtype == "fp32",
        f"parallel.reduce_dtype={parallel.reduce_dtype}: under DeepSpeed gradients are summed in "
        f"fp32; remove it, or start without --deepspeed",
    )
    _require(
        not config.evaluation.every or stage != 3,
        f"evaluation.every={config.evaluation.every}: at ZeRO stage 3 no part of a model runs by "
        f"itself, as the choice of experts asks; set it to 0, take stage 1 or 2, or start without "
        f"--deepspeed",
    )
    setup = config.finetune
    for key, is_used in (
        (f"finetune.train={setup.train}", setup.parts != frozenset(PARTS)),
        (f"finetune.experts={setup.experts}", bool(setup.experts)),
        (f"finetune.teacher={setup.teacher}", bool(setup.teacher)),
    ):
        _require(
            not is_used,
            f"{key}: under DeepSpeed all parameters learn from labels; start without --deepspeed",
        )
    _require(
        parallel.placement == "contiguous",
        f"parallel.placement={parallel.placement}: under DeepSpeed experts stay where they are; "
        f"remove it, or start without --deepspeed",
    )
    if parallel.ep > 1:
        _require(
            stage != 3,
            f"{path}: zero_optimization.stage=3 cuts every parameter over all processes, which "
            f"parallel.ep={parallel.ep} does not; use stage 2 or parallel.ep=1",
        )
        for key in ("reduce_scatter", "contiguous_gradients"):
            _require(
                zero.get(key, True),
                f"{path}: zero_optimization.{key}=false sums experts over the wrong ranks with "
                f"parallel.ep={parallel.ep}; remove it",
            )


def _plain(name: str) -> str:
    """A name of the file as an error shows it: one line, and not long."""
    return name if name.isidentifier() and len(name) < 60 else shown(name)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
