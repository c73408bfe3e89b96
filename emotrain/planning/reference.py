"""What the published training run did in a step, for calibration: its layout, its kernels, its
known waits.

The plan of our own code on the reference's layout (plain FSDP2 over all GPUs, no expert
parallelism) gives collectives, GEMMs, attention inside documents and element-wise passes. What the
reference did otherwise is replaced here, item by item, from the record of its code (sections in
brackets):

    experts      rows copied into expert order, one grouped GEMM a matrix, rows copied back (3.2),
                 by MegaBlocks' kernels
    blocks       compiled (5)
    router       a Python loop over documents in every layer, and copies to the host that stop it
                 from running ahead (2.12)
    balance      two all-reduces a layer and micro-batch (2.6)

None of this enters a plan of our own code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch

from emotrain.config import Config
from emotrain.planning.cost import Work
from emotrain.planning.dry_run import Measured
from emotrain.planning.hardware import RATES
from emotrain.planning.meter import Collective, Kernel
from emotrain.planning.parts import Part
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


def reference_work(config: Config, measured: Measured, view: str = "expected") -> Work:
    """A step of the reference on one GPU.

    Args:
        config: of the reference's layout (`reference_config`).
        measured: the dry run of our code with it.
    """
    kernels: Counter[Kernel] = Counter()
    for kernel, count in measured.kernels.items():
        if not kernel.ours:
            kernels[kernel] += count
    passes = config.model.num_layers * measured.micro_batches
    for kernel in _experts(config, measured):
        kernels[kernel] += passes
    collectives = Counter(measured.collectives)
    sums = [
        collective
        for collective in collectives
        if collective.axis == "world" and collective.phase != Phase.CLIPPING
    ]
    for collective in sums:
        del collectives[collective]
    balance = Collective(
        "all_reduce",
        "world",
        Part.ROUTER,
        Phase.FORWARD,
        measured.layout.world_size,
        8 * config.model.experts_in_layer(0),
    )
    collectives[balance] = 2 * passes
    rows = config.training.micro_batch
    waits = passes * (WAITS_A_LAYER + rows)
    loops = passes * measured.documents * OPERATORS_A_DOCUMENT * RATES["host_s"].at(view)
    return Work(
        kernels,
        collectives,
        measured.axes,
        measured.tokens,
        waits,
        fused=True,
        extra_s=loops,
        gathers_overlap=False,
    )


def _experts(config: Config, measured: Measured) -> Iterator[Kernel]:
    """The published design of one layer and micro-batch: copies, three grouped GEMMs, copies;
    and backwards. bfloat16."""
    model, tokens = config.model, measured.tokens // measured.micro_batches
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
