"""What the published training run did in a step, for calibration: its layout, its kernels, its
known waits.

The plan of our own code on the reference's layout (plain FSDP2 over all GPUs, no expert
parallelism) gives collectives, GEMMs, attention inside documents and element-wise passes. What the
reference did otherwise is replaced here, item by item, from the record of its code (sections in
brackets):

    FSDP2        blocks whole, without lists of what to gather ahead (5)
    experts      rows copied into expert order, one grouped GEMM a matrix, rows copied back (3.2),
                 by MegaBlocks' kernels
    blocks       compiled (5)
    router       a Python loop over documents in every layer, and copies to the host that stop it
                 from running ahead (2.12); all wait for the rank with most documents
    head         torch's cross entropy on fp32 logits (5)
    balance      two all-reduces a layer and micro-batch (2.6)

None of this enters a plan of our own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import NormalDist

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from emotrain.config import Config
from emotrain.distributed.mesh import Meshes
from emotrain.model.attention import Attention
from emotrain.model.moe import SharedExperts
from emotrain.model.transformer import RMSNorm, Transformer
from emotrain.planning.cost import Work
from emotrain.planning.dry_run import Measured
from emotrain.planning.hardware import RATES
from emotrain.planning.parts import Part
from emotrain.planning.trace import (
    COMPUTE,
    Collective,
    HostWait,
    HostWork,
    Kernel,
    Operation,
    Task,
    rewrite,
)
from emotrain.training.engine import Phase

PUBLISHED_TOKENS_PER_SECOND = (17.6e3, 18.8e3)
"""Of one of 128 H100, over a whole run of 130 billion tokens in 15 to 16 hours (arXiv
2605.06663)."""
OPERATORS_A_DOCUMENT = 20
"""Operators that the loop issues for one document in one layer: counted in the record of the
code (2.3 a to g)."""
WAITS_A_LAYER = 3
"""Copies of single numbers to the host in one layer, besides one a sequence (2.12)."""


def reference_config(config: Config) -> Config:
    """The reference's layout for a configuration: FSDP2 over everything, balance over each
    micro-batch (2.6, 5)."""
    return replace(
        config,
        parallel=replace(
            config.parallel,
            replicate=1,
            shard=0,
            ep=1,
            recompute="none",
            reshard_after_forward=True,
        ),
        losses=replace(config.losses, balance_scope="data_parallel"),
        training=replace(config.training, micro_batch=4),
    )


def plain_fsdp2(model: Transformer, config: Config, meshes: Meshes) -> None:
    """FSDP2 over blocks and the rest, as it prefetches by itself (5); over experts that are spread
    by themselves."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    cut = partial(cut_rows, ranks=meshes.dense.size(-1))
    for experts in model.expert_banks() if meshes.ep is not None else ():
        fully_shard(
            experts, mesh=meshes.experts, mp_policy=policy, shard_placement_fn=lambda _: Shard(1)
        )
    for module in (*model.blocks, model):
        fully_shard(module, mesh=meshes.dense, mp_policy=policy, shard_placement_fn=cut)


def reference_fsdp2(model: Transformer, config: Config, meshes: Meshes) -> None:
    """`plain_fsdp2`; norms, rotary positions and SwiGLU are torch's, for its compiler to fuse."""
    for module in model.modules():
        if isinstance(module, (RMSNorm, Attention, SharedExperts)):
            module.backend = "torch"
    plain_fsdp2(model, config, meshes)


def cut_rows(parameter: nn.Parameter, ranks: int) -> Shard:
    """Along its rows, where padding them costs nothing: the reference keeps a layer's experts in
    matrices whose rows the ranks divide."""
    if parameter.shape[0] >= ranks - 1:
        return Shard(0)
    return Shard(next((axis for axis, n in enumerate(parameter.shape) if n % ranks == 0), 0))


def reference_work(config: Config, measured: Measured, view: str = "expected") -> Work:
    """A step of the reference on one GPU.

    Args:
        config: of the reference's layout (`reference_config`).
        measured: the dry run of our code with it, under `reference_fsdp2`.
    """
    tokens, world = measured.tokens // measured.micro_batches, measured.axes["world"]
    experts = list(grouped_experts(config, tokens))
    head = list(cross_entropy(config, tokens))
    documents = _most_documents(measured.documents, config.training.micro_batch, len(world))
    loops = documents * OPERATORS_A_DOCUMENT * RATES["host_s"].at(view)
    waits = [HostWait()] * (WAITS_A_LAYER + config.training.micro_batch)
    balance = Collective(
        "all_reduce",
        "world",
        Part.ROUTER,
        Phase.FORWARD,
        len(world),
        8 * config.model.experts_in_layer(0),
    )
    instead = replace_parts(experts, head)

    def change(task: Task) -> Sequence[Operation] | None:
        operation = task.operation
        if isinstance(operation, Collective) and operation.axis == "world":
            return None if operation.phase == Phase.CLIPPING else []
        if isinstance(operation, Kernel) and operation.ours and operation.part == Part.ROUTER:
            return [HostWork(loops), *waits, balance, balance] if operation.name == "route" else []
        return instead(task)

    parts = frozenset({Part.ATTENTION, Part.NORMS, Part.SHARED_EXPERTS, Part.ROUTER})
    return Work(rewrite(measured.tasks, change), measured.axes, measured.tokens, parts)


def _most_documents(mean: float, rows: int, ranks: int) -> float:
    """Of the rank that has most of them in a micro-batch, for which all others wait in each layer's
    sum. All but the first of each of the `rows` sequences begin by chance, as in a Poisson
    process."""
    return mean + NormalDist().inv_cdf(1 - 1 / (ranks + 1)) * (mean - rows) ** 0.5


def replace_parts(
    experts: Sequence[Kernel], head: Sequence[Kernel]
) -> Callable[[Task], Sequence[Operation] | None]:
    """For `rewrite`: these kernels in place of our routed experts, and of our head and loss, which
    each come at the first of ours in either direction."""
    before: list[tuple[str, Phase] | None] = [None]
    named = {Part.EXPERTS: experts, Part.HEAD: head}

    def change(task: Task) -> Sequence[Operation] | None:
        operation = task.operation
        if not isinstance(operation, Kernel) or task.queue != COMPUTE:
            return None
        place = (operation.part, operation.phase)
        replaced = operation.part == Part.HEAD or (
            operation.part == Part.EXPERTS and operation.ours
        )
        if not replaced:
            # The sums of other layers and losses lie between.
            before[0] = None if operation.part != Part.EXPERTS else before[0]
            return None
        if before[0] == place:
            return []
        before[0] = place
        forward = operation.phase in (Phase.FORWARD, Phase.LOSS, Phase.RECOMPUTE)
        return [
            replace(kernel, phase=operation.phase)
            for kernel in named[Part(operation.part)]
            if (kernel.phase == Phase.FORWARD) == forward
        ]

    return change


def cross_entropy(config: Config, tokens: int) -> Iterator[Kernel]:
    """Output head and torch's cross entropy with a z-loss on fp32 logits (5), and backwards."""
    vocabulary, width = config.model.vocab_size, config.model.d_model
    logits, flops = tokens * vocabulary, 2 * tokens * vocabulary * width
    operands = 2 * (tokens * width + vocabulary * width + logits)

    def kernel(name: str, phase: Phase, size: int, computed: int = 0) -> Kernel:
        return Kernel(name, Part.HEAD, phase, torch.bfloat16, computed, size)

    yield kernel("mm", Phase.FORWARD, operands, flops)
    for name, bytes_a_logit in (("float", 6), ("logsumexp", 4), ("log_softmax", 8)):
        yield kernel(name, Phase.FORWARD, bytes_a_logit * logits)
    for name, bytes_a_logit in (
        ("nll backward", 4),
        ("log_softmax backward", 12),
        ("logsumexp backward", 8),
        ("add", 12),
        ("to bfloat16", 6),
    ):
        yield kernel(name, Phase.BACKWARD, bytes_a_logit * logits)
    yield kernel("mm", Phase.BACKWARD, operands, flops)
    yield kernel("mm", Phase.BACKWARD, operands, flops)


def grouped_experts(config: Config, tokens: int) -> Iterator[Kernel]:
    """The published design of one layer and micro-batch: copies, three grouped GEMMs, copies;
    and backwards. bfloat16."""
    model = config.model
    # The shared expert is one of the bank there: it is counted with its own GEMMs, by the plan of
    # our code.
    slots = tokens * model.chosen_in_layer(0)
    rows, inner = 2 * slots * model.d_model, 2 * slots * model.experts.hidden
    bank = 2 * model.routed_in_layer(0) * model.d_model * model.experts.hidden
    flops, whole = 2 * slots * model.d_model * model.experts.hidden, 2 * tokens * model.d_model

    def kernel(name: str, phase: Phase, size: int, computed: int = 0) -> Kernel:
        return Kernel(name, Part.EXPERTS, phase, torch.bfloat16, computed, size)

    for _ in ("gate", "up", "down"):
        yield kernel("cutlass grouped gemm", Phase.FORWARD, rows + inner + bank, flops)
    for name, size in (
        ("gather", 2 * rows),
        ("swiglu", 3 * inner),
        ("scatter", 2 * rows),
        ("sum of choices", rows + whole),
    ):
        yield kernel(name, Phase.FORWARD, size)
    for _ in range(6):
        yield kernel("cutlass grouped gemm", Phase.BACKWARD, rows + inner + bank, flops)
    for name, size in (
        ("scatter, dx", 2 * rows),
        ("scatter, dweights", 2 * rows),
        ("swiglu, dx", 5 * inner),
        ("gate dx + up dx", 3 * rows),
        ("gather, dx", 2 * rows),
        ("sum of choices, dx", rows + whole),
    ):
        yield kernel(name, Phase.BACKWARD, size)
