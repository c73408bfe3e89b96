"""The parallel plan, applied to the plain model from outside, in one fixed order: expert
parallelism, freezing, compilation, recomputation, FSDP2. Without process groups the first and the
last do not apply."""

from __future__ import annotations

from collections import Counter, deque
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import register_dataclass, tree_map
from torch.utils.checkpoint import checkpoint

from emotrain.config import Config
from emotrain.distributed.dispatch import AllToAllDispatcher
from emotrain.distributed.mesh import (
    Holders,
    Layout,
    Meshes,
    build_meshes,
    limit_collectives,
)
from emotrain.distributed.ranks import Ranks, local_part, offsets_of
from emotrain.kernels.decision import ROUTING_DECISIONS
from emotrain.model.parts import freeze, stored_tensors
from emotrain.model.report import LayerStatistics, ModelOutput, RoutingReport
from emotrain.model.transformer import Transformer

# FSDP2 gathers parameters for backward by hooks on the tensors of what a module returns. In torch
# 2.11 it finds those in containers that are registered alone.
for _output in (ModelOutput, RoutingReport, LayerStatistics):
    register_dataclass(_output)


def build_model(config: Config, ranks: Ranks, fresh: bool = True) -> Transformer:
    """The model of a run, on its device, spread over the processes as configured.

    Args:
        fresh: give it its initial values, the very same on every layout. What a checkpoint will
            overwrite is left as the memory was.

    Raises:
        ValueError: a layout that cannot be; see `Layout.of`.
    """
    layout = Layout.of(config, ranks.world_size)
    with torch.device("meta"):
        model = Transformer(config.model)
    timeout_s = config.training.collective_timeout_s
    meshes = build_meshes(layout, ranks.device.type, timeout_s) if ranks.world_size > 1 else None
    parallelize(model, config, meshes)
    limit_collectives(reduction_groups(model).values(), timeout_s)
    return materialize(model, config.training.seed if fresh else None, ranks.device)


def parallelize(model: Transformer, config: Config, meshes: Meshes | None = None) -> Transformer:
    """Apply the plan in place.

    Args:
        model: on the meta device, where `meshes` are given: `materialize` follows.
        meshes: None for a single process.
    """
    # First, so that FSDP sees the experts that this rank holds, and shards those.
    if meshes is not None and meshes.ep is not None:
        _spread_experts(model, config, meshes)
    # On the parameters that FSDP sees: it neither reduces nor keeps gradients of frozen ones.
    freeze(model, config.finetune.parts)
    # Before recomputation: torch's `checkpoint` turns compilation off for all that it calls.
    if config.training.compile:
        _compile(model)
    # Before FSDP, so that its hooks lie outside: what they gather for backward serves the
    # repetition too.
    if config.parallel.recompute != "none":
        _recompute(model, config.parallel.recompute)
    if meshes is not None:
        _shard(model, config, meshes)
    return model


def materialize(model: Transformer, seed: int | None, device: torch.device) -> Transformer:
    """Allocate this process' part of a model on the meta device and, with a seed, fill it with its
    part of what one process would start from. No process makes more than it holds."""
    model.to_empty(device=device)
    if seed is not None:
        for name, tensor in stored_tensors(model).items():
            part = local_part(tensor.detach())
            model.fill(part, name, seed, offsets_of(tensor), tensor.shape)
    return model


def _spread_experts(model: Transformer, config: Config, meshes: Meshes) -> None:
    """Give this rank its part of every bank of routed experts, and every layer a dispatcher that
    takes tokens to the others'."""
    assert meshes.ep is not None
    for experts in model.expert_banks():
        for name, parameter in experts.named_parameters():
            spread = distribute_tensor(
                parameter.detach(), meshes.ep, [Shard(0)], src_data_rank=None
            )
            setattr(experts, name, nn.Parameter(spread))
        experts.local = local_part
    for index, block in enumerate(model.blocks):
        if block.moe.experts is not None:
            routed = config.model.routed_in_layer(index)
            dispatcher = AllToAllDispatcher(
                meshes.ep.get_group(), routed, config.model.experts.backend
            )
            dispatcher.holders = Holders.of(meshes, routed)
            block.moe.dispatcher = dispatcher


def _compile(model: Transformer) -> None:
    """Run every block through torch.compile."""
    blocks: list[nn.Module] = list(model.blocks)
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def _recompute(model: Transformer, scope: str) -> None:
    """Have backward compute activations again: of the experts, which hold most of them, or of
    whole blocks."""
    parts: list[nn.Module] = list(model.blocks)
    if scope == "selective":
        shared = [block.moe.shared for block in model.blocks if block.moe.shared is not None]
        parts = [*model.expert_banks(), *shared]
    for part in parts:
        # Nothing on the way draws random numbers, so that there is no generator's state to
        # restore.
        part.forward = partial(
            checkpoint,
            part.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_decided_once,
        )


def _decided_once() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of a forward pass and of its repetition, which takes over the routing decisions
    of the first."""
    decisions: deque[Any] = deque()
    return _Decisions(decisions, replay=False), _Decisions(decisions, replay=True)


class _Decisions(TorchDispatchMode):
    """Keeps the results of ROUTING_DECISIONS, or answers with those kept, in order.

    torch's own selective checkpointing would do the same, but it counts every operator, and those
    that FSDP and the profiler add differ between the passes.
    """

    def __init__(self, decisions: deque[Any], replay: bool):
        super().__init__()
        self.decisions, self.replay = decisions, replay

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets compiled blocks run compiled within this mode, which they call for decisions."""
        return True

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if operation not in ROUTING_DECISIONS:
            return operation(*args, **(kwargs or {}))
        if self.replay:
            return self.decisions.popleft()
        result = operation(*args, **(kwargs or {}))
        self.decisions.append(tree_map(torch.Tensor.detach, result))
        return result


def _shard(model: Transformer, config: Config, meshes: Meshes) -> None:
    """FSDP2 over routed experts, blocks and the rest, in fp32 with gathers in bf16 where the run
    computes in bf16 (spec 1.5)."""
    bfloat16 = config.training.uses_bfloat16(meshes.dense.device_type)
    # Without bf16 gradients are summed in the parameters' own precision.
    in_fp32 = torch.float32 if bfloat16 else None
    # Rotary tables, masks and routing weights keep their own precision: inputs are not cast.
    policy = MixedPrecisionPolicy(
        torch.bfloat16 if bfloat16 else None,
        torch.bfloat16 if config.parallel.reduce_dtype == "bf16" else in_fp32,
        cast_forward_inputs=False,
    )
    reshard = config.parallel.reshard_after_forward
    cut = partial(_cut, num_ranks=meshes.dense.size(-1))
    # Spread over ep, experts are cut along their hidden width, which expert_dp divides, where they
    # cannot be shared out whole.
    cut_experts = partial(_cut_spread, layout=meshes.layout) if meshes.ep is not None else cut
    layers = _gathered_by_layer(model)

    def spread(module: nn.Module, mesh: DeviceMesh, reshard: bool, cut: Any = cut) -> None:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=cut,
        )

    # Backward begins with the last layer: it stays gathered.
    for experts in model.expert_banks():
        spread(experts, meshes.experts, reshard and experts not in layers[-1], cut_experts)
    for block in model.blocks:
        spread(block, meshes.dense, reshard and block not in layers[-1])
    # Every micro-batch of a step uses them.
    spread(model.head, meshes.dense, reshard=False)
    spread(model, meshes.dense, reshard=False)
    for module in _spread_modules(model):
        # Losses are divided by counts of the whole global batch, so gradients are summed, not
        # averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The loss forms its gradients in its forward pass, and backward needs no weights of the head.
    head: Any = model.head
    head.set_unshard_in_backward(False)
    _order_gathers(model, head, layers)
    _free_reductions(model)


def _cut(parameter: nn.Parameter, num_ranks: int) -> Shard:
    """Along which axis a parameter is cut. FSDP pads the first axis to a multiple of the ranks, in
    every gather and reduction and in the memory of the first ranks: one shared expert over 128
    ranks would weigh as much as 128. It cuts any other axis without padding."""
    padded = -(-parameter.shape[0] // num_ranks) * num_ranks
    if padded <= 1.05 * parameter.shape[0]:
        return Shard(0)
    return next(
        (
            Shard(axis)
            for axis in range(1, parameter.ndim)
            if parameter.shape[axis] % num_ranks == 0
        ),
        Shard(0),
    )


def _cut_spread(parameter: nn.Parameter, layout: Layout) -> Shard:
    """The same of a bank of routed experts that is spread over ep."""
    return Shard(0 if layout.shares_whole_experts(parameter.shape[0]) else 1)


def _gathered_by_layer(model: Transformer) -> list[list[Any]]:
    """What is gathered for each layer, in the order of its forward pass: the block, and its routed
    experts."""
    uses = Counter(block.moe.experts for block in model.blocks)
    layers = []
    for block in model.blocks:
        experts = block.moe.experts
        # A bank that several layers use has no one place in the order: it is gathered when needed.
        layers.append([block] if experts is None or uses[experts] > 1 else [block, experts])
    return layers


def _order_gathers(model: Any, head: Any, layers: list[list[Any]]) -> None:
    """Which parameters are gathered ahead, and when: at the start of a module's pass those of
    others, unless they still are.

        forward     model       -> block 0, experts 0
                    block i     -> block i+1, experts i+1
                    last block  -> head
        backward    head        -> model, last block, its experts
                    block i     -> block i-1
                    experts i   -> block i-1, experts i-1

    In forward a block asks, not its experts: where backward runs blocks again, those ask a second
    time, and would gather what has been used. In backward the experts ask for the experts before
    them, and the head for the last layer: a block and the model begin their pass again with each
    statistic that has a gradient, when what they asked for may have been used and freed.
    """
    asking = [model, *(block for block, *_ in layers)]
    for this, following in zip(asking, [*layers, [head]], strict=True):
        this.set_modules_to_forward_prefetch(following)
    # The model's own parameters are there from first to last: to ask for them is to ask for
    # nothing, and not for torch's order.
    nothing = [model]
    for (block, *experts), before in zip(layers, [nothing, *layers], strict=False):
        block.set_modules_to_backward_prefetch(before[:1])
        for bank in experts:
            bank.set_modules_to_backward_prefetch(before)
    model.set_modules_to_backward_prefetch(nothing)
    head.set_modules_to_backward_prefetch([model, *layers[-1]])


def _free_reductions(model: Any) -> None:
    """Let reductions of gradients run beside gathers, in process groups of their own, and let
    backward go on while one is under way, where torch can (2.13).

    It costs a second buffer of gradients, and a communicator for each set of ranks.
    """
    if not hasattr(FSDPModule, "set_separate_reduce_scatter_group"):
        return
    model.set_separate_reduce_scatter_group()
    model.set_reduce_scatter_max_input_buffers(2)


def reduction_groups(model: Transformer) -> dict[str, ProcessGroup]:
    """The groups of processes that gradients alone are reduced in, by the axis of the mesh; none
    where gathers and reductions share theirs."""
    groups: dict[str, ProcessGroup] = {}
    if not hasattr(FSDPModule, "set_separate_reduce_scatter_group"):
        return groups
    for module in _spread_modules(model):
        for gathered in module._get_fsdp_state()._fsdp_param_groups:
            info = gathered.mesh_info
            if (group := getattr(info, "reduce_scatter_process_group", None)) is not None:
                groups.setdefault(info.mesh.mesh_dim_names[-1], group)
    return groups


def _spread_modules(model: Transformer) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
