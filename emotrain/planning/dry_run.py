"""One optimizer step of a run on a cluster that is not there: the real plan on a fake process
group, on tensors without data.

Model, meshes, FSDP2, dispatcher, losses and optimizer are those of training; so are their
collectives, allocations and the lives of their tensors. What has no meaning without data is
replaced, and nothing else:

    numbers that reach the host     0
    rows for each expert rank       what routing without preference sends
                                    (`AllToAllDispatcher.split_sizes`)
    Triton kernels                  their own launch code runs and allocates; launches are counted,
                                    not started
    attention                       the operators that CUDA would run, where the plan is for a GPU
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.distributed.dispatch import AllToAllDispatcher
from emotrain.distributed.mesh import Layout, Meshes, build_meshes
from emotrain.distributed.parallelize import materialize, parallelize
from emotrain.distributed.ranks import Ranks, local_part
from emotrain.errors import UserError
from emotrain.model import losses
from emotrain.model.router import DocumentPoolRouter
from emotrain.model.transformer import Transformer
from emotrain.planning.meter import Meter
from emotrain.planning.parts import PARTS, Memory, Part
from emotrain.planning.stand_ins import (
    CUDA_GRANULARITY,
    Routing,
    ZeroOnHost,
    gpu_kernels,
    held_experts,
    replace_attribute,
    synthetic_batch,
)
from emotrain.planning.trace import Collective, HostWait, Kernel, Task
from emotrain.training.engine import NativeEngine, Phase
from emotrain.training.optimizer import build_optimizer
from emotrain.training.step import train_step


@dataclass(frozen=True)
class Measured:
    """What one GPU does in one step. Rank 0 is measured: none holds more."""

    layout: Layout
    axes: dict[str, tuple[int, ...]]
    """Ranks of the group of each axis that rank 0 is in."""
    communicators: int
    """Groups that rank 0 communicates in; gradients may have groups of their own."""
    at_peak: dict[Memory, int]
    """Live bytes by kind when their sum was largest."""
    peak_bytes: int
    state_bytes: dict[str, int]
    """Parameters, gradients and optimizer state between steps."""
    kernels: dict[Kernel, int]
    collectives: dict[Collective, int]
    tasks: Sequence[Task]
    """All that the process asked its device for, in order."""
    micro_batches: int
    tokens: int
    """Of this rank in a step."""
    documents: int
    """Of a micro-batch."""
    waits: int
    """Times a step waits for the device: for split sizes of expert parallelism, and at its end for
    the gradient norm and for what it reports. Steps that are logged also wait for statistics."""
    seconds: float
    """That the dry run took."""
    small: Sequence[tuple[int, Measured]] = ()
    """Smaller steps, of which this one is the weighted sum (`search.extrapolated`); then it has no
    tasks of its own."""

    def bytes_by_kind_and_axis(self) -> dict[str, dict[str, int]]:
        result: dict[str, dict[str, int]] = {}
        for collective, count in self.collectives.items():
            of_kind = result.setdefault(collective.kind, {})
            of_kind[collective.axis] = of_kind.get(collective.axis, 0) + count * collective.bytes
        return result

    def counts_by_kind_and_axis(self) -> dict[str, dict[str, int]]:
        result: dict[str, dict[str, int]] = {}
        for collective, count in self.collectives.items():
            of_kind = result.setdefault(collective.kind, {})
            of_kind[collective.axis] = of_kind.get(collective.axis, 0) + count
        return result

    def dispatch_per_layer(self, layers: int) -> dict[str, float]:
        """What bringing tokens to their experts takes, for each of `layers` and micro-batch:
        launches of the forward pass, exchanges of rows and of sizes in both directions."""
        passes = max(1, layers * self.micro_batches)
        launches = sum(
            count
            for kernel, count in self.kernels.items()
            if kernel.part == Part.DISPATCH and kernel.phase == Phase.FORWARD
        )
        exchanges = Counter[bool]()
        for collective, count in self.collectives.items():
            if collective.kind == "all_to_all":
                # Two int64 for each rank.
                exchanges[collective.bytes == 16 * collective.group_size] += count
        return {
            "dispatch_launches_per_layer": launches / passes,
            "exchanges_per_layer": exchanges[False] / passes,
            "size_exchanges_per_layer": exchanges[True] / passes,
        }

    def flops_by_part(self) -> dict[Part, int]:
        result: dict[Part, int] = {}
        for kernel, count in self.kernels.items():
            if kernel.flops:
                result[kernel.part] = result.get(kernel.part, 0) + count * kernel.flops
        return result


def dry_run(
    config: Config,
    world_size: int,
    target: str = "sm_90",
    routing: Routing | None = None,
    shard: Callable[[Transformer, Config, Meshes], None] | None = None,
) -> Measured:
    """Measure one step of rank 0 of `world_size`.

    Args:
        target: the GPU's architecture, such as sm_90, or `cpu` for what a CPU would run.
        routing: what is assumed of the data.
        shard: how FSDP2 is applied, where not as training does.
    Raises:
        ValueError: a layout that cannot be (`Layout.of`).
    """
    started = time.perf_counter()
    on_gpu, routing = target != "cpu", routing or Routing()
    layout = Layout.of(config, world_size)
    if config.finetune.teacher:
        raise UserError(
            f"finetune.teacher={config.finetune.teacher}: a plan knows no second model; leave it "
            f"out, and add the memory of its parameters and the time of its forward pass"
        )
    # Compiled blocks do the same arithmetic; what fusion saves is part of the time model, not of
    # this measurement.
    precision = (
        "bfloat16" if on_gpu and config.training.precision == "auto" else config.training.precision
    )
    config = replace(config, training=replace(config.training, compile=False, precision=precision))
    with ExitStack() as stack:
        meshes = stack.enter_context(_fake_cluster(layout))
        if shard is not None:
            replace_attribute(stack, sys.modules[parallelize.__module__], "_shard", shard)
        meter = Meter(PARTS, _group_names(meshes), CUDA_GRANULARITY if on_gpu else 1)
        stack.enter_context(meter.trace.following())
        _name_gathered(stack, meter)
        if on_gpu:
            stack.enter_context(gpu_kernels(meter, target, config, layout, routing))
        engine, micro_batches = _prepare(stack, config, meshes, layout, routing)
        follow_state(meter, engine, micro_batches)
        stack.enter_context(meter)
        stack.enter_context(ZeroOnHost(meter.trace.host_waits))
        _step(meter, engine, micro_batches, config, Ranks(0, world_size))
        axes = _group_ranks(meshes)
        at_peak = meter.bytes_at_peak()
        state = _state_bytes(engine)
    return Measured(
        layout,
        axes,
        len(meter.trace.communicators),
        at_peak,
        meter.peak_bytes,
        state,
        dict(meter.kernels),
        dict(meter.collectives),
        tuple(meter.trace.tasks),
        len(micro_batches),
        len(micro_batches) * micro_batches[0].tokens_BS.numel(),
        micro_batches[0].num_documents,
        sum(isinstance(task.operation, HostWait) for task in meter.trace.tasks),
        time.perf_counter() - started,
    )


def _prepare(
    stack: ExitStack,
    config: Config,
    meshes: Meshes | None,
    layout: Layout,
    routing: Routing,
) -> tuple[NativeEngine, list[PackedBatch]]:
    """Engine and micro-batches of training, without data. Fake tensors exist from here to the end
    of `stack`."""
    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, config, meshes)
    batch = synthetic_batch(config)
    for block in model.blocks:
        dispatcher, router = block.moe.dispatcher, block.moe.router
        if isinstance(dispatcher, AllToAllDispatcher) and router is not None:
            tokens = config.training.micro_batch * config.data.sequence_length
            balanced = _balanced(dispatcher, tokens, router.num_chosen, routing)
            setattr(dispatcher, "split_sizes", balanced)  # noqa: B010 - mypy: a method
    fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    materialize(model, None, torch.device("cpu"))
    steps = config.training.global_batch // (config.training.micro_batch * layout.world_size)
    micro_batches = [replace(batch, **_tensors(batch, fake.from_tensor)) for _ in range(steps)]
    optimizer = build_optimizer(model, config.optimizer)
    # The optimizer's state is there before the step, as in every step but the first.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    engine = NativeEngine(model, optimizer, config.training.precision == "bfloat16")
    engine.start_step()
    return engine, micro_batches


def _name_gathered(stack: ExitStack, meter: Meter) -> None:
    """Parameters that FSDP2 has gathered are named so, whatever phase it makes them in."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    make = FSDPParam.init_all_gather_outputs

    def named(parameter: FSDPParam, *args: Any, **kwargs: Any) -> None:
        make(parameter, *args, **kwargs)
        for tensor in parameter.all_gather_outputs:
            meter.follow(tensor, Memory.GATHERED)

    replace_attribute(stack, FSDPParam, "init_all_gather_outputs", named)


def _tensors(
    batch: PackedBatch, change: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, Any]:
    """The tensors of a batch by name, each changed."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}


def _balanced(
    dispatcher: AllToAllDispatcher,
    tokens: int,
    chosen: int,
    routing: Routing,
) -> Callable[[Tensor], tuple[list[int], list[int], int]]:
    """`split_sizes` of a dispatcher under routing without preference: it exchanges and waits as the
    real one does."""
    experts, num_ranks = dispatcher.num_experts, dispatcher.num_ranks
    held = held_experts(experts, num_ranks)
    send = routing.sent(experts, chosen, held, tokens)
    rows, num_slots = routing.received(experts, chosen, held, tokens)

    real = dispatcher.split_sizes

    def split_sizes(send_W2: Tensor) -> tuple[list[int], list[int], int]:
        real(send_W2)
        return send, [rows] * num_ranks, num_slots

    return split_sizes


def follow_state(meter: Meter, engine: NativeEngine, micro_batches: Sequence[PackedBatch]) -> None:
    """Tell a meter of what is there before a step: parameters, optimizer state, batches."""
    assert engine.optimizer is not None
    for parameter in engine.model.parameters():
        meter.follow(local_part(parameter.detach()), Memory.PARAMETERS)
        for tensor in engine.optimizer.state[parameter].values():
            meter.follow(local_part(tensor), Memory.OPTIMIZER_STATE)
    for buffer in engine.model.buffers():
        meter.follow(buffer, Memory.PARAMETERS)
    for batch in micro_batches:
        for tensor in _tensors(batch).values():
            meter.follow(tensor, Memory.BATCHES)


def _step(
    meter: Meter,
    engine: NativeEngine,
    micro_batches: Sequence[PackedBatch],
    config: Config,
    ranks: Ranks,
) -> None:
    """Training's own step. The head and the routing statistics are no modules, so that their part
    is named here."""

    def inside(part: Part, whole: Callable[..., Any]) -> Callable[..., Any]:
        def named(*args: Any) -> Any:
            with meter.inside(part):
                return whole(*args)

        return named

    with ExitStack() as stack:
        for part, owner, name in (
            (Part.HEAD, losses, "linear_cross_entropy"),
            (Part.ROUTER, DocumentPoolRouter, "statistics"),
        ):
            replace_attribute(stack, owner, name, inside(part, getattr(owner, name)))
        train_step(engine, micro_batches, config, 1, ranks)
    for gradient in _gradients(engine):
        meter.follow(gradient, Memory.GRADIENTS)


def _gradients(engine: NativeEngine) -> list[Tensor]:
    """This rank's part of each."""
    return [local_part(p.grad) for p in engine.model.parameters() if p.grad is not None]


def _state_bytes(engine: NativeEngine) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state between steps."""
    assert engine.optimizer is not None
    state, parameters = engine.optimizer.state, list(engine.model.parameters())
    return {
        "parameters": sum(local_part(p.detach()).nbytes for p in parameters)
        + sum(buffer.nbytes for buffer in engine.model.buffers()),
        "gradients": sum(gradient.nbytes for gradient in _gradients(engine)),
        "optimizer": sum(local_part(t).nbytes for p in parameters for t in state[p].values()),
    }


@contextmanager
def _fake_cluster(layout: Layout) -> Iterator[Meshes | None]:
    """Process groups of a layout whose other processes do not exist; None for one process, which
    has no groups."""
    if layout.world_size == 1:
        yield None
        return
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    # The module registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError(
            "a dry run needs a process without a process group; run it in a process of its own"
        )
    dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
    try:
        yield build_meshes(layout, "cpu")
    finally:
        dist.destroy_process_group()
        # It holds what rank 0 had of each tensor, which the processes that this one forks must not
        # take for theirs.
        _clear_sharding_prop_cache()


def _groups(meshes: Meshes | None) -> list[tuple[str, dist.ProcessGroup]]:
    if meshes is None:
        return []
    assert dist.group.WORLD is not None
    found = [("world", dist.group.WORLD)]
    for mesh in (meshes.dense, meshes.experts, *([meshes.ep] if meshes.ep is not None else [])):
        found += [(axis, mesh.get_group(axis)) for axis in mesh.mesh_dim_names or ()]
    return found


def _group_names(meshes: Meshes | None) -> dict[str, str]:
    names: dict[str, str] = {}
    for axis, group in _groups(meshes):
        names.setdefault(group.group_name, axis)
    return names


def _group_ranks(meshes: Meshes | None) -> dict[str, tuple[int, ...]]:
    return {axis: tuple(dist.get_process_group_ranks(group)) for axis, group in _groups(meshes)}
