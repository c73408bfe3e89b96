"""`emotrain plan`: what a run will need and how fast it will be on a cluster, from a dry run on any
machine.

The plan that training would use is built on a fake process group and one optimizer step runs
through it on tensors without data (`dry_run.py`); memory, FLOPs and bytes are counted there.
Seconds come from a model of the hardware (`cost.py`), whose assumptions are printed with them.
docs/plan.md says how either was checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from emotrain.config import Config
from emotrain.distributed.mesh import Layout
from emotrain.planning.cost import VIEWS, StepTime, Work, compiled_parts, step_time
from emotrain.planning.dry_run import Measured, dry_run
from emotrain.planning.hardware import RATES, Cluster, Reserve
from emotrain.planning.parts import Memory
from emotrain.planning.stand_ins import MEAN_DOCUMENT, Routing
from emotrain.training.metrics import flops_per_token

KINDS = {
    Memory.PARAMETERS: "parameters",
    Memory.OPTIMIZER_STATE: "optimizer",
    Memory.GRADIENTS: "gradients",
    Memory.GATHERED: "gathered",
    Memory.REDUCTION: "reduction",
    Memory.ACTIVATIONS: "activations",
    Memory.BACKWARD: "backward",
    Memory.RECOMPUTED: "recomputed",
}
"""Kind of memory at the peak, as the meter and as the result call it."""


@dataclass(frozen=True)
class Plan:
    """A configuration on a cluster."""

    config: Config
    cluster: Cluster
    measured: Measured
    times: Mapping[str, StepTime]
    """By view: expected, pessimistic, optimistic."""
    usable_gib: float
    """Memory of a GPU that tensors can have."""
    routing: Routing
    zero_stage: int = 0
    """Of DeepSpeed; 0 is FSDP2."""
    start_gib: float = 0.0
    """Memory that building the model takes, before it is cut."""

    @property
    def peak_gib(self) -> float:
        return max(self.measured.peak_bytes / 2**30, self.start_gib)

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.usable_gib

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.times["expected"].tokens_per_second

    @property
    def mfu(self) -> float:
        """FLOPs of the model, not of what is computed again, over the peak
        (`training.metrics.flops_per_token`)."""
        return self.tokens_per_second * flops_per_token(self.config) / self.cluster.gpu.bf16_flops

    def as_dict(self) -> dict[str, Any]:
        measured, expected = self.measured, self.times["expected"]
        memory = {
            f"{name}_gib": measured.at_peak.get(kind, 0) / 2**30 for kind, name in KINDS.items()
        }
        other = sum(size for kind, size in measured.at_peak.items() if kind not in KINDS)
        layout, model = measured.layout, self.config.model
        routed_layers = sum(model.routed_in_layer(layer) > 0 for layer in range(model.num_layers))
        return {
            "gpu": self.cluster.gpu.name,
            "nodes": self.cluster.nodes,
            "gpus_per_node": self.cluster.gpus_per_node,
            "layout": {
                "replicate": layout.replicate,
                "shard": layout.shard,
                "ep": layout.ep,
                "expert_dp": layout.expert_dp,
            },
            "zero_stage": self.zero_stage,
            "fits": self.fits,
            "peak_gib": self.peak_gib,
            "usable_gib": self.usable_gib,
            "memory_gib": self.cluster.gpu.memory_gib,
            **memory,
            "other_gib": other / 2**30,
            "state_gib": {name: size / 2**30 for name, size in measured.state_bytes.items()},
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "tokens_per_second_per_gpu_range": [
                self.times[view].tokens_per_second for view in ("pessimistic", "optimistic")
            ],
            "mfu": self.mfu,
            "step_seconds": expected.step,
            "step_parts_seconds": expected.parts,
            "compute_seconds": expected.compute,
            "communication_seconds": expected.communication,
            "communication_bytes": measured.bytes_by_kind_and_axis(),
            "communication_counts": measured.counts_by_kind_and_axis(),
            "flops": measured.flops_by_part(),
            "model_flops": flops_per_token(self.config) * measured.tokens,
            "micro_batches": measured.micro_batches,
            "tokens_per_gpu": measured.tokens,
            "documents_per_micro_batch": measured.documents,
            "host_waits_per_step": measured.waits,
            **measured.dispatch_per_layer(routed_layers),
            "dry_run_seconds": measured.seconds,
            "assumptions": assumptions(self),
        }


def make_plan(
    config: Config,
    cluster: Cluster,
    routing: Routing | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Plan a configuration on a cluster, or the step that was measured already.

    Raises:
        ValueError: a layout that cannot be (`Layout.of`).
    """
    routing = routing or Routing()
    measured = measured or dry_run(config, cluster.world_size, cluster.gpu.target, routing)
    times = step_times(measured, cluster, lambda step, _: Work.of(step, config.training.compile))
    return Plan(config, cluster, measured, times, usable_gib(cluster, measured), routing)


def step_times(
    measured: Measured, cluster: Cluster, work: Callable[[Measured, str], Work]
) -> dict[str, StepTime]:
    """Times of a step by view; `work` is what a measured step does in a view."""

    def time(step: Measured, view: str) -> StepTime:
        if step.small:
            small = [(weight, time(part, view)) for weight, part in step.small]
            return StepTime.blend(small, step.tokens)
        return step_time(work(step, view), cluster, view)

    return {view: time(measured, view) for view in VIEWS}


def reference_plan(config: Config, cluster: Cluster) -> Plan:
    """The published run on a cluster. Memory is that of our code on its layout."""
    from emotrain.planning.reference import reference_config, reference_fsdp2, reference_work

    config = reference_config(config)
    Layout.check(config, cluster.world_size)
    measured = dry_run(config, cluster.world_size, cluster.gpu.target, shard=reference_fsdp2)
    times = step_times(measured, cluster, lambda step, view: reference_work(config, step, view))
    return Plan(config, cluster, measured, times, usable_gib(cluster, measured), Routing())


def usable_gib(cluster: Cluster, measured: Measured) -> float:
    return Reserve().usable_gib(cluster.gpu, measured.communicators)


def assumptions(plan: Plan) -> list[str]:
    """Every assumption of a plan, a line each."""
    gpu, reserve, routing = plan.cluster.gpu, Reserve(), plan.routing
    chip = (
        f"fact: {gpu.name}: {gpu.bf16_flops / 1e12:,.0f} TFLOP/s bf16, "
        f"{gpu.memory_bytes_s / 1e12:.2f} TB/s, {gpu.memory_gib:.1f} GiB, "
        f"NVLink {gpu.nvlink_bytes_s / 1e9:.0f} GB/s and one adapter of "
        f"{gpu.network_bytes_s / 1e9:.0f} GB/s a GPU, each way "
        f"({gpu.source})"
    )
    reserved = (
        f"typical: {reserve.context_gib} GiB for the CUDA context, {reserve.group_gib} GiB a "
        f"process group for NCCL, "
        f"{reserve.fragmentation:.0%} of the rest lost to fragmentation"
    )
    documents = (
        f"assumed: documents of {MEAN_DOCUMENT:,} tokens on average (OLMoE mix, arXiv 2409.02060), "
        f"exponentially distributed"
    )
    lines = [chip, reserved, documents]
    lines += [
        f"{rate.kind}: {name} = {rate.value:g} ({rate.pessimistic:g} to {rate.optimistic:g}): "
        f"{rate.meaning}"
        for name, rate in RATES.items()
    ]
    routing = routing.on(plan.config.parallel.ep)
    source = "measured" if routing.is_measured else "assumed"
    lines.append(
        f"{source}: a token goes to {routing.ranks_per_token:.3g} expert ranks"
        if routing.ranks_per_token
        else "assumed: experts are chosen without preference, so that a token's k choices spread "
        "over expert ranks as chance has it"
    )
    lines.append(
        f"{source}: the busiest expert rank computes {routing.imbalance:.3g} times the mean"
    )
    lines.append(
        "assumed: ZeRO sends as docs/deepspeed.md says; its own code is not followed"
        if plan.zero_stage
        else f"fact: order, streams and waits are those of torch {torch.__version__}'s FSDP2 and "
        "of the dispatcher, followed in the dry run; a communicator runs one collective at a time"
    )
    compiled = ", ".join(sorted(compiled_parts(plan.measured.layout.ep)))
    lines.append(
        f"assumed: torch.compile fuses element-wise kernels of {compiled}"
        if plan.config.training.compile
        else "fact: nothing is compiled (training.compile=false)"
    )
    return lines
