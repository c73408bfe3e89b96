"""From what a step computes, moves and sends (`dry_run.Measured`) to seconds: a model, not a
measurement.

    a kernel          the longer of FLOPs / reached peak and bytes / reached memory bandwidth, and
                      the gap before it
    a collective      `Cluster.collective_seconds`
    forward           kernels, under which gathers of parameters run; the first gather has nothing
                      to run under
    backward          the same with gathers and reductions of gradients; the last reduction has
                      nothing to run under
    exchanges         tokens travel to their experts under the shared expert, and home under nothing
    the rest          optimizer, clipping and small sums: under nothing
    waits             the host waits for split sizes, the device idles
A step cannot be faster than the host issues its kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from emotrain.planning.dry_run import Measured
from emotrain.planning.hardware import GPU, RATES, Cluster
from emotrain.planning.meter import Collective, Kernel
from emotrain.planning.parts import Part
from emotrain.training.engine import Phase

VIEWS = ("expected", "pessimistic", "optimistic")


@dataclass(frozen=True)
class Work:
    """A step of one GPU, as far as its time goes."""

    kernels: Mapping[Kernel, int]
    collectives: Mapping[Collective, int]
    axes: Mapping[str, tuple[int, ...]]
    tokens: int
    """Of this GPU in a step."""
    waits: int
    """Times the host waits for the device inside of a forward pass."""
    fused: bool = False
    """Whether blocks are compiled."""
    extra_s: float = 0.0
    """Seconds in which the device waits for the host's Python (the reference's loops over
    documents)."""
    gathers_overlap: bool = True
    """Whether the host runs ahead far enough to gather parameters while earlier layers compute."""

    @classmethod
    def of(cls, measured: Measured, compiled: bool) -> Work:
        return cls(
            measured.kernels,
            measured.collectives,
            measured.axes,
            measured.tokens,
            measured.waits,
            compiled,
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and of what it is made of."""

    step: float
    parts: dict[str, float]
    """Adds up to `step`."""
    compute: dict[str, float]
    """Kernels by part of the model."""
    communication: dict[str, float]
    """Collectives by kind and axis, hidden or not."""
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


def kernel_seconds(kernel: Kernel, gpu: GPU, view: str, fused: bool = False) -> float:
    """Seconds of one kernel and the gap before it."""

    def rate(name: str) -> float:
        return RATES[name].at(view)

    moving = kernel.bytes / (gpu.memory_bytes_s * rate("memory"))
    if not kernel.flops:
        return rate("launch_s") + moving * (
            rate("fusion") if fused and kernel.part in COMPILED else 1
        )
    if kernel.dtype == torch.float32:
        peak = gpu.fp32_flops * rate("dense_gemm")
    else:
        peak = gpu.bf16_flops * rate(_family(kernel))
    return rate("launch_s") + max(moving, kernel.flops / peak)


COMPILED = (
    Part.ATTENTION,
    Part.NORMS,
    Part.ROUTER,
    Part.SHARED_EXPERTS,
    Part.OTHER,
    Part.HEAD,
)
"""Parts of the model whose element-wise kernels torch.compile fuses."""


def _family(kernel: Kernel) -> str:
    """Rate of the arithmetic of a kernel with FLOPs."""
    name = kernel.name
    if kernel.ours:
        return "grouped_gemm"
    if "attention" in name or "attn" in name:
        return "masked_attention" if "efficient" in name else "flash_attention"
    return "cutlass_grouped_gemm" if name.startswith("cutlass") else "dense_gemm"


def step_time(work: Work, cluster: Cluster, view: str = "expected") -> StepTime:
    """Seconds of one step, `expected` or at either end of the assumed ranges."""
    rate = {name: entry.at(view) for name, entry in RATES.items()}
    compute: defaultdict[str, float] = defaultdict(float)
    by_phase: defaultdict[tuple[Phase, bool], float] = defaultdict(float)
    for kernel, count in work.kernels.items():
        seconds = count * kernel_seconds(kernel, cluster.gpu, view, work.fused)
        compute[kernel.part] += seconds
        by_phase[_side(kernel.phase), kernel.part == Part.SHARED_EXPERTS] += seconds
    sent: defaultdict[str, float] = defaultdict(float)
    by_side: defaultdict[tuple[Phase, str], float] = defaultdict(float)
    once: defaultdict[tuple[Phase, str], float] = defaultdict(float)
    for collective, count in work.collectives.items():
        one = cluster.collective_seconds(
            collective.kind, collective.bytes, work.axes[collective.axis], view
        )
        side, kind = _side(collective.phase), _purpose(collective)
        sent[f"{collective.kind} {collective.axis}"] += count * one
        by_side[side, kind] += count * one
        once[side, kind] = max(once[side, kind], one)

    parts: dict[str, float] = {}
    for side, edge in ((Phase.FORWARD, "gathers"), (Phase.BACKWARD, "reductions")):
        kernels = by_phase[side, False] + by_phase[side, True]
        exchange = by_side[side, "exchange"]
        exposed_exchange = max(0.0, exchange / 2 - by_phase[side, True]) + exchange / 2
        parts[side] = kernels
        parts[f"{side}: exchange of tokens"] = exposed_exchange
        hidden_under = (
            kernels + exposed_exchange if side == Phase.FORWARD or work.gathers_overlap else kernels
        )
        moved = by_side[side, "gathers"] + by_side[side, "reductions"]
        if side == Phase.FORWARD and not work.gathers_overlap:
            hidden_under = 0.0
        parts[f"{side}: parameters and gradients"] = exposed = max(
            once[side, edge], moved - hidden_under
        )
        parts[f"{side}: contention"] = rate["contention"] * (moved - exposed)
        parts[f"{side}: small sums"] = by_side[side, "sums"]
    parts[Phase.OPTIMIZER] = by_phase[Phase.OPTIMIZER, False] + sum(
        seconds for (side, _), seconds in by_side.items() if side == Phase.OPTIMIZER
    )
    parts["waits of the host"] = work.waits * rate["sync_s"] + work.extra_s
    device = sum(parts.values())
    host = rate["host_s"] * sum(work.kernels.values()) * (rate["fusion"] if work.fused else 1)
    parts["launches of the host"] = max(0.0, host - device)
    parts["stragglers and the rest"] = (rate["slowdown"] - 1) * sum(parts.values())
    return StepTime(sum(parts.values()), parts, dict(compute), dict(sent), work.tokens)


def _side(phase: Phase) -> Phase:
    """What the time of a phase is added to: forward, backward or the optimizer."""
    if phase in (Phase.BACKWARD, Phase.RECOMPUTE):
        return Phase.BACKWARD
    return Phase.OPTIMIZER if phase in (Phase.CLIPPING, Phase.OPTIMIZER) else Phase.FORWARD


def _purpose(collective: Collective) -> str:
    if collective.kind == "all_to_all":
        return "exchange"
    if collective.axis == "world":
        return "sums"
    return "gathers" if collective.kind == "all_gather" else "reductions"
