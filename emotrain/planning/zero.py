"""A run by DeepSpeed (`--deepspeed`): what its ZeRO stages keep and send, added to the dry run of
the same model.

    stage 1, 2   parameters and gradients whole on every GPU, in fp32; a share of the master copy
                 and of the moments. Gradients are reduced in buckets, at stage 1 after the last
                 backward pass, at stage 2 after each, under it where `overlap_comm` says so.
                 Updated parameters are gathered after the step.
    stage 3      everything in shares; blocks are gathered in fp32 as they are needed, which FSDP2
                 without a precision of its own does alike. At its start the model is whole.

Neither the order nor the time of DeepSpeed's own code is followed: this is its record in
`training/deepspeed.py` and docs/deepspeed.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import fully_shard

from emotrain.config import Config
from emotrain.distributed.mesh import Meshes
from emotrain.model.counts import parameter_counts
from emotrain.model.transformer import Transformer
from emotrain.planning.cost import Work
from emotrain.planning.dry_run import Measured, dry_run
from emotrain.planning.hardware import Cluster
from emotrain.planning.parts import Memory, Part
from emotrain.planning.plan import Plan, step_times, usable_gib
from emotrain.planning.reference import cut_rows
from emotrain.planning.stand_ins import Routing
from emotrain.planning.trace import COMPUTE, Collective, Kernel, Task
from emotrain.training.deepspeed_options import read_options
from emotrain.training.engine import Phase

PIECES = 16
"""Pieces in which gradients of a backward pass leave, at most: more of them take as long."""


def zero_plan(
    options: str | Path, config: Config, cluster: Cluster, routing: Routing | None = None
) -> Plan:
    """Plan a configuration under a JSON file of DeepSpeed's options.

    Raises:
        UserError: as `read_options`.
    """
    zero = read_options(options, config, cluster.world_size)["zero_optimization"]
    stage, routing = zero["stage"], routing or Routing()
    spread = _blocks_in_fp32 if stage == 3 else _whole
    measured = dry_run(config, cluster.world_size, cluster.gpu.target, routing, spread)
    if stage < 3:
        measured = _with_zero(measured, config, zero)
    times = step_times(measured, cluster, lambda step, _: Work.of(step, config.training.compile))
    at_start = 4 * parameter_counts(config.model)["total_parameters"] if stage == 3 else 0
    usable = usable_gib(cluster, measured)
    return Plan(config, cluster, measured, times, usable, routing, stage, at_start / 2**30)


def _whole(_model: Transformer, _config: Config, _meshes: Meshes) -> None:
    """Leave parameters whole."""


def _blocks_in_fp32(model: Transformer, _config: Config, meshes: Meshes) -> None:
    for module in (*model.blocks, model):
        fully_shard(
            module,
            mesh=meshes.dense,
            shard_placement_fn=lambda parameter: cut_rows(parameter, meshes.dense.size(-1)),
        )


def _with_zero(measured: Measured, config: Config, zero: dict[str, Any]) -> Measured:
    """Buckets, shares and collectives of stage 1 and 2."""
    layout, local = measured.layout, measured.state_bytes["parameters"]
    every = 4 * parameter_counts(config.model)["total_parameters"]
    share = every / layout.world_size
    experts = (every - local) / (layout.ep - 1) if layout.ep > 1 else 0
    parts = {"world": local - experts, **({"expert_dp": experts} if layout.ep > 1 else {})}
    overlaps = zero.get("overlap_comm", False)
    buckets = 4 * zero["reduce_bucket_size"] * (2 if overlaps else 1)
    at_peak = dict(measured.at_peak) | {
        # Two moments and the master copy.
        Memory.OPTIMIZER_STATE: int(3 * share),
        Memory.REDUCTION: buckets,
    }
    gathered = [
        Collective("all_gather", axis, Part.OTHER, Phase.OPTIMIZER, len(measured.axes[axis]), size)
        for axis, size in _whole_numbers(parts)
    ]
    tasks = _reduced(measured, parts, zero["stage"] == 2, overlaps)
    tasks = [_shared_update(task, share / local) for task in tasks]
    tasks += [Task(collective, COMPUTE) for collective in gathered]
    operations = [task.operation for task in tasks]
    sent = [operation for operation in operations if isinstance(operation, Collective)]
    return replace(
        measured,
        at_peak=at_peak,
        peak_bytes=sum(at_peak.values()),
        state_bytes=measured.state_bytes | {"optimizer": int(3 * share)},
        collectives={collective: sent.count(collective) for collective in sent},
        tasks=tasks,
    )


def _reduced(
    measured: Measured, parts: dict[str, float], each_pass: bool, overlaps: bool
) -> list[Task]:
    """The trace with the reductions of gradients, which the first kernel after them waits for."""
    passes = _backward_passes(measured.tasks)
    leaving: dict[int, list[Task]] = {}
    for number, places in enumerate(passes):
        if not each_pass and number + 1 < len(passes):
            continue
        pieces = min(PIECES, len(places)) if overlaps else 1
        for piece in range(1, pieces + 1):
            place = places[piece * len(places) // pieces - 1]
            leaving[place] = [
                Task(
                    Collective(
                        "reduce_scatter",
                        axis,
                        Part.OTHER,
                        Phase.BACKWARD,
                        len(measured.axes[axis]),
                        size // pieces,
                    ),
                    "communicator of gradients" if overlaps else COMPUTE,
                )
                for axis, size in _whole_numbers(parts)
            ]
    result: list[Task] = []
    moved: list[int] = []
    under_way: list[int] = []
    for index, task in enumerate(measured.tasks):
        after = {moved[before] for before in task.after}
        ends = isinstance(task.operation, Kernel) and task.operation.phase == Phase.CLIPPING
        if ends and under_way:
            after.add(under_way.pop())
        result.append(replace(task, after=tuple(sorted(after))))
        moved.append(len(result) - 1)
        for collective in leaving.get(index, ()):
            result.append(replace(collective, after=(moved[index],)))
            under_way = [len(result) - 1]
    return result


def _backward_passes(tasks: Sequence[Task]) -> list[list[int]]:
    """The kernels of each backward pass, by their places."""
    places = [
        index
        for index, task in enumerate(tasks)
        if isinstance(task.operation, Kernel)
        and task.queue == COMPUTE
        and task.operation.phase in (Phase.BACKWARD, Phase.RECOMPUTE)
    ]
    starts = [0, *(n + 1 for n, (a, b) in enumerate(pairwise(places)) if _between(tasks, a, b))]
    return [places[a:b] for a, b in pairwise([*starts, len(places)])]


def _between(tasks: Sequence[Task], start: int, end: int) -> bool:
    """Whether a loss or a forward pass lies between two kernels of backward passes."""
    other = (Phase.LOSS, Phase.FORWARD)
    return any(
        isinstance(task.operation, Kernel) and task.operation.phase in other
        for task in tasks[start + 1 : end]
    )


def _shared_update(task: Task, share: float) -> Task:
    """Clipping and the optimizer work on this GPU's share of the gradients."""
    operation = task.operation
    phases = (Phase.CLIPPING, Phase.OPTIMIZER)
    if not isinstance(operation, Kernel) or operation.phase not in phases:
        return task
    return replace(task, operation=replace(operation, bytes=int(operation.bytes * share)))


def _whole_numbers(parts: dict[str, float]) -> list[tuple[str, int]]:
    return [(axis, int(size)) for axis, size in parts.items()]


def remedies_of_zero(
    config: Config, cluster: Cluster, options: str | Path
) -> Iterator[list[tuple[str, Any]]]:
    """Settings that make a run need less: experts spread over a server, which stage 3 cannot,
    smaller micro-batches, blocks computed again."""
    stage = read_options(options, config, cluster.world_size)["zero_optimization"]["stage"]
    again: tuple[str, Any] = ("parallel.recompute", "full")
    if stage < 3 and config.parallel.ep == 1:
        spread: tuple[str, Any] = ("parallel.ep", cluster.gpus_per_node)
        yield [spread]
        yield [spread, again]
    yield [("training.micro_batch", 1)]
    yield [again]
