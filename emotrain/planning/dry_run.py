"""One optimizer step of a run on a cluster that is not there: the real plan on a fake process
group, on tensors without data.

Model, meshes, FSDP2, dispatcher, losses and optimizer are those of training; so are their
collectives, allocations and the lives of their tensors. What has no meaning without data is
replaced, and nothing else:

    numbers that reach the host     0
    rows for each expert rank       what routing without preference sends (`AllToAllDispatcher.split_sizes`)
    Triton kernels                  their own launch code runs and allocates; launches are counted, not started
    attention, RMSNorm              the operators that CUDA would run, where the plan is for a GPU
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.distributed.mesh import Layout, Meshes, build_meshes
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.planning.meter import Collective, Kernel, Meter

PARTS = {
    "Attention": "attention",
    "RMSNorm": "norms",
    "DocumentPoolRouter": "router",
    "MoELayer": "dispatch",
    "RoutedExperts": "experts",
    "SharedExperts": "shared experts",
    "Embedding": "embedding",
}
"""Part of the model by class of the module."""
CUDA_GRANULARITY = 512
"""Bytes that the CUDA allocator rounds a request up to."""
MEAN_DOCUMENT = 1318
"""Tokens: 4,060 billion in 3,080 million documents (OLMoE, arXiv 2409.02060, table 2; its
tokenizer)."""


@dataclass(frozen=True)
class Routing:
    """What the dry run assumes of the data: how many ranks a token's experts are on, and how
    unequal ranks are."""

    ranks_per_token: float = 0.0
    """Expert ranks that a token goes to; 0 means as many as k choices without preference reach.
    Documents whose pools lie together need fewer."""
    imbalance: float = 1.0
    """Rows that this rank receives over the mean."""

    def sent(self, num_experts: int, chosen: int, held: Sequence[int], tokens: int) -> list[int]:
        """Rows to each rank that holds `held` of the experts: a token goes wherever one of its k
        different experts is."""
        share_R = [
            1 - math.comb(num_experts - h, chosen) / math.comb(num_experts, chosen) for h in held
        ]
        scale = self.ranks_per_token / sum(share_R) if self.ranks_per_token else 1.0
        return [min(tokens, round(tokens * share * scale)) for share in share_R]


@dataclass(frozen=True)
class Measured:
    """What one GPU does in one step. Rank 0 is measured: none holds more."""

    layout: Layout
    axes: dict[str, tuple[int, ...]]
    """Ranks of the group of each axis that rank 0 is in."""
    at_peak: dict[str, int]
    """Live bytes by kind when their sum was largest."""
    peak_bytes: int
    state_bytes: dict[str, int]
    """Parameters, gradients and optimizer state between steps."""
    kernels: dict[Kernel, int]
    collectives: dict[Collective, int]
    micro_batches: int
    tokens: int
    """Of this rank in a step."""
    documents: int
    """Of a micro-batch."""
    waits: int
    """Times a step waits for numbers from the device: for split sizes, and once at its end."""
    seconds: float
    """That the dry run took."""

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

    def flops_by_part(self) -> dict[str, int]:
        result: dict[str, int] = {}
        for kernel, count in self.kernels.items():
            if kernel.flops:
                result[kernel.part] = result.get(kernel.part, 0) + count * kernel.flops
        return result


def dry_run(
    config: Config, world_size: int, target: str = "sm_90", routing: Routing | None = None
) -> Measured:
    """Measure one step of rank 0 of `world_size`.

    Args:
        target: the GPU's architecture, such as sm_90, or `cpu` for what a CPU would run.
        routing: what is assumed of the data.
    Raises:
        ValueError: a layout that cannot be (`Layout.of`).
    """
    started = time.perf_counter()
    on_gpu, routing = target != "cpu", routing or Routing()
    layout = Layout.of(config, world_size)
    # Compiled blocks do the same arithmetic; what fusion saves is part of the time model, not of
    # this measurement.
    precision = (
        "bfloat16" if on_gpu and config.training.precision == "auto" else config.training.precision
    )
    config = replace(config, training=replace(config.training, compile=False, precision=precision))
    with ExitStack() as stack:
        meshes = stack.enter_context(_fake_cluster(layout))
        meter = Meter(PARTS, _group_names(meshes), CUDA_GRANULARITY if on_gpu else 1)
        if on_gpu:
            stack.enter_context(_gpu_kernels(meter, target, config, layout, routing))
        model, optimizer, micro_batches = _prepare(stack, config, meshes, layout, routing)
        follow_state(meter, model, optimizer, micro_batches)
        stack.enter_context(meter)
        stack.enter_context(_ZeroOnHost())
        _step(meter, model, optimizer, micro_batches, config, Ranks(0, world_size))
        axes = _group_ranks(meshes)
        at_peak = meter.bytes_at_peak()
        state = _state_bytes(model, optimizer)
    return Measured(
        layout,
        axes,
        at_peak,
        meter.peak_bytes,
        state,
        dict(meter.kernels),
        dict(meter.collectives),
        len(micro_batches),
        len(micro_batches) * micro_batches[0].tokens_BS.numel(),
        micro_batches[0].num_documents,
        1 + _exchanges(meter),
        time.perf_counter() - started,
    )


def synthetic_batch(config: Config, mean_document: int = MEAN_DOCUMENT) -> PackedBatch:
    """A micro-batch of documents whose lengths are exponentially distributed, cut by the
    sequences as packing cuts them."""
    length, rows = config.data.sequence_length, config.training.micro_batch
    total = rows * length
    # Multiples of the golden ratio fill [0, 1) evenly from the first on: a small batch has typical
    # lengths too.
    uniform = (np.arange(2 * total // mean_document + 8) * 0.6180339887 + 0.5) % 1
    ends = np.cumsum(np.maximum(1, -mean_document * np.log1p(-uniform)).astype(np.int64))
    edges = np.unique(np.concatenate([ends[ends < total], np.arange(0, total + 1, length)]))
    lengths, rows_of = np.diff(edges), edges[:-1] // length
    per_row = [lengths[rows_of == row].tolist() for row in range(rows)]
    ids = [np.flatnonzero(rows_of == row).tolist() for row in range(rows)]
    return PackedBatch.from_segments(np.zeros((rows, length), dtype=np.int64), per_row, ids, True)


def _prepare(
    stack: ExitStack, config: Config, meshes: Meshes | None, layout: Layout, routing: Routing
) -> tuple[Any, Any, list[PackedBatch]]:
    """Model, optimizer and micro-batches of training, without data. Fake tensors exist from here
    to the end of `stack`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from emotrain.distributed.dispatch import AllToAllDispatcher
    from emotrain.distributed.parallelize import parallelize
    from emotrain.model.transformer import Transformer
    from emotrain.training.optimizer import build_optimizer

    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, config, meshes)
    batch = synthetic_batch(config)
    for block in model.blocks:
        if isinstance(block.moe.dispatcher, AllToAllDispatcher):
            tokens = config.training.micro_batch * config.data.sequence_length
            block.moe.dispatcher.split_sizes = _balanced(
                block.moe.dispatcher, tokens, block.moe.router.num_chosen, routing
            )
    fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    model.to_empty(device="cpu")
    tensors = (batch.tokens_BS, batch.targets_BS, batch.document_BS, batch.document_ids_G)
    micro_batches = [
        PackedBatch(*(fake.from_tensor(tensor) for tensor in tensors))
        for _ in range(
            config.training.global_batch // (config.training.micro_batch * layout.world_size)
        )
    ]
    optimizer = build_optimizer(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer, micro_batches


def _balanced(dispatcher: Any, tokens: int, chosen: int, routing: Routing):
    """`split_sizes` of a dispatcher under routing without preference."""
    send = routing.sent(
        dispatcher.num_experts, chosen, _held(dispatcher.num_experts, dispatcher.num_ranks), tokens
    )
    received = [min(tokens, round(send[0] * routing.imbalance))] * dispatcher.num_ranks
    # As many slots a row as on average.
    num_slots = tokens * chosen * dispatcher.num_ranks / sum(send) * received[0]

    def split_sizes(send_R2: Tensor) -> tuple[list[int], list[int], int]:
        dist.all_to_all_single(torch.empty_like(send_R2), send_R2, group=dispatcher.group)
        return send, received, round(num_slots)

    return split_sizes


def _held(num_experts: int, num_ranks: int) -> list[int]:
    """Experts of each rank: ceil(N / R), and fewer on the last."""
    per_rank = -(-num_experts // num_ranks)
    return [max(0, min(per_rank, num_experts - rank * per_rank)) for rank in range(num_ranks)]


def follow_state(
    meter: Meter, model: Any, optimizer: torch.optim.Optimizer, micro_batches: Sequence[PackedBatch]
) -> None:
    """Tell a meter of what is there before a step: parameters, optimizer state, batches."""
    from emotrain.distributed.ranks import local_part

    for parameter in model.parameters():
        meter.follow(local_part(parameter.detach()), "parameters")
        for tensor in optimizer.state[parameter].values():
            meter.follow(local_part(tensor), "optimizer state")
    for batch in micro_batches:
        for tensor in (batch.tokens_BS, batch.targets_BS, batch.document_BS, batch.document_ids_G):
            meter.follow(tensor, "batches")


def _step(
    meter: Meter,
    model: Any,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[PackedBatch],
    config: Config,
    ranks: Ranks,
) -> None:
    """The loop's own step: forward and backward of every micro-batch, clipping, AdamW."""
    from emotrain.distributed.ranks import local_part
    from emotrain.model import losses
    from emotrain.training.engine import NativeEngine
    from emotrain.training.step import train_step

    def head(*args: Any, whole=losses.linear_cross_entropy) -> Any:
        with meter.inside("head"):
            return whole(*args)

    with ExitStack() as stack:
        _replace(stack, losses, "linear_cross_entropy", head)
        bfloat16 = config.training.precision == "bfloat16"
        engine = NativeEngine(model, bfloat16=bfloat16)
        train_step(engine, micro_batches, config, 1, ranks)
    for parameter in model.parameters():
        meter.follow(local_part(parameter.grad), "gradients")
    with meter.during("optimizer"):
        optimizer.step()


def _state_bytes(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    from emotrain.distributed.ranks import local_part

    parameters = list(model.parameters())
    return {
        "parameters": sum(local_part(p.detach()).nbytes for p in parameters),
        "gradients": sum(local_part(p.grad).nbytes for p in parameters),
        "optimizer": sum(
            local_part(t).nbytes for p in parameters for t in optimizer.state[p].values()
        ),
    }


def _exchanges(meter: Meter) -> int:
    """Times that split sizes reach the host: once for each exchange of the rows to each rank, a
    vector of int64."""
    return sum(
        count
        for collective, count in meter.collectives.items()
        if collective.kind == "all_to_all" and collective.bytes == 8 * collective.group_size
    )


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
    found = [("world", dist.group.WORLD)]
    for mesh in (meshes.dense, meshes.experts, *([meshes.ep] if meshes.ep is not None else [])):
        found += [(axis, mesh.get_group(axis)) for axis in mesh.mesh_dim_names]
    return found


def _group_names(meshes: Meshes | None) -> dict[str, str]:
    names: dict[str, str] = {}
    for axis, group in _groups(meshes):
        names.setdefault(group.group_name, axis)
    return names


def _group_ranks(meshes: Meshes | None) -> dict[str, tuple[int, ...]]:
    return {axis: tuple(dist.get_process_group_ranks(group)) for axis, group in _groups(meshes)}


class _ZeroOnHost(TorchDispatchMode):
    """Answers 0 where a tensor's value is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


class _FusedRMSNorm(torch.autograd.Function):
    """CUDA's RMSNorm: one kernel in either direction, which keeps its input and a number a row.
    On a CPU torch takes it apart."""

    @staticmethod
    def forward(ctx, x, weight, meter):
        ctx.meter = meter
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        meter.record("rms_norm", x.dtype, 0, 2 * x.nbytes + weight.nbytes)
        return torch.empty_like(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        ctx.meter.record("rms_norm backward", x.dtype, 0, 3 * x.nbytes + 2 * weight.nbytes)
        return torch.empty_like(grad), torch.empty_like(weight), None


def _attention(
    q_BASC: Tensor,
    k_BASC: Tensor,
    v_BASC: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """The operators of scaled_dot_product_attention on CUDA: the flash kernel takes no mask; the
    other one takes one of the dtype of the queries, and keeps it."""
    if enable_gqa:
        copies = q_BASC.shape[1] // k_BASC.shape[1]
        k_BASC, v_BASC = k_BASC.repeat_interleave(copies, 1), v_BASC.repeat_interleave(copies, 1)
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            q_BASC, k_BASC, v_BASC, 0.0, is_causal
        )[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q_BASC.dtype).masked_fill_(
            attn_mask.logical_not(), -torch.inf
        )
    bias = attn_mask.expand(*q_BASC.shape[:2], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q_BASC, k_BASC, v_BASC, bias, q_BASC.requires_grad
    )[0]


GEMM_FLOPS = {
    "gate_up": lambda o: 4 * o["D"] * o["H"],
    "rows": lambda o: 2 * o["J"] * o["D"],
    "grad_hidden": lambda o: 2 * o["D"] * o["H"],
    "weight_grad": lambda o: 2 * o["J"] * o["D"],
}
"""FLOPs a slot of the Triton kernels, by their compile-time constants."""
GATHERED = {"gate_up": 0, "grad_hidden": 0, "weight_grad": 1, "gather": 0}
"""The argument whose rows a kernel reads once a slot."""


@contextmanager
def _gpu_kernels(
    meter: Meter, target: str, config: Config, layout: Layout, routing: Routing
) -> Iterator[None]:
    """Within this context the Triton kernels are chosen where a GPU would, and their launches
    counted instead of started."""
    if config.model.experts.backend == "megablocks":
        raise UserError(
            "experts.backend=megablocks cannot be planned: its memory is its own; plan with "
            "model.experts.backend=auto"
        )
    _import_launch_code()
    from emotrain.kernels.triton_launch import recording

    tokens, lengths_G = (
        config.training.micro_batch * config.data.sequence_length,
        synthetic_batch(config).document_T.bincount(),
    )

    chosen, routed, ep = config.model.chosen_in_layer(0), config.model.routed_in_layer(0), layout.ep
    slots_in_use = round(tokens * chosen * routing.imbalance)
    rows_sent = sum(routing.sent(routed, chosen, _held(routed, ep), tokens)) if ep > 1 else 0

    def count(launch: Any) -> None:
        name = launch.kernel.__name__.removesuffix("_kernel")
        tensors = [argument for argument in launch.arguments if isinstance(argument, Tensor)]
        slots, used = 0, 0
        if name in (*GATHERED, "rows", "combine"):
            # Indices of the slots, or (combine) the place of each; slots that stay empty are
            # neither read nor written.
            slots = next(
                t for t in tensors if t.ndim == 1 and t.dtype in (torch.int64, torch.int32)
            ).shape[0]
            used = min(slots, rows_sent if meter.part == "dispatch" else slots_in_use)
        size = 0
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            share = used / slots if slots and tensor.shape[0] == slots else 1.0
            if name in GATHERED and tensor is launch.arguments[GATHERED[name]]:
                share = used / tensor.shape[0]
            size += int(tensor.nbytes * share)
        flops = GEMM_FLOPS[name](launch.options) * used if name in GEMM_FLOPS else 0
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.int64)
        meter.record(name, dtype, flops, size)

    capability = tuple(divmod(int(target.removeprefix("sm_")), 10))
    with ExitStack() as stack:
        _replace(stack, torch.cuda, "get_device_capability", lambda *_: capability)
        _replace(stack, sys.modules["emotrain.kernels.backends"], "HAS_TRITON", True)
        # Attention inside documents computes the scores of each token with the earlier ones of its
        # document.
        pair_flops = (
            4
            * int((lengths_G * (lengths_G + 1) // 2).sum())
            * config.model.num_heads
            * config.model.head_dim
        )
        meter.formulas |= {
            "_varlen_attn": lambda *_, **__: pair_flops,
            "_varlen_attn_backward": lambda *_, **__: 5 * pair_flops // 2,
        }
        if config.training.uses_bfloat16("cuda"):
            stack.callback(torch.set_autocast_enabled, "cuda", torch.is_autocast_enabled("cuda"))
            stack.callback(torch.set_autocast_dtype, "cuda", torch.get_autocast_dtype("cuda"))
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
        stack.enter_context(recording(target, count))
        _replace(stack, F, "scaled_dot_product_attention", _attention)
        _replace(
            stack,
            F,
            "rms_norm",
            lambda x, _shape, weight, eps: _FusedRMSNorm.apply(x, weight, meter),
        )
        # Code that asks a tensor whether it is on a GPU takes the way it would take there.
        stack.callback(delattr, torch.Tensor, "is_cuda")
        torch.Tensor.is_cuda = property(lambda _: True)
        yield


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack closes."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _import_launch_code() -> None:
    """Import the Triton wrappers, also where Triton is not installed: a dry run calls what
    launches kernels, never a kernel."""
    if importlib.util.find_spec("triton") is not None:
        return
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.jit = lambda function: function
    triton.cdiv = lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    triton.language, language.constexpr = language, None
    sys.modules.update({"triton": triton, "triton.language": language})
    try:
        from emotrain.kernels import triton_grouped_mlp, triton_permute, triton_routing  # noqa: F401
    finally:
        for name in ("triton", "triton.language"):
            del sys.modules[name]
