"""A plan for a person to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from emotrain.tables import Table

if TYPE_CHECKING:
    from emotrain.config import Config
    from emotrain.planning.hardware import Cluster
    from emotrain.planning.plan import Plan
    from emotrain.planning.search import Change

MEMORY = (
    ("parameters", "fp32, this GPU's part"),
    ("gradients", "fp32, this GPU's part"),
    ("optimizer", "two fp32 moments; ZeRO-1 and 2 keep a master copy too"),
    ("gathered", "parameters gathered for use"),
    ("reduction", "gradients on their way to their owners"),
    ("activations", "kept by forward, or alive in it"),
    ("recomputed", "activations computed again"),
    ("backward", "made by backward"),
    ("other", "batches, and what is left of the optimizer's"),
)
"""Parts of the peak, with what they are."""


def describe(plan: Plan, changes: Sequence[Change] = ()) -> str:
    """Memory, traffic, FLOPs, time, verdict and assumptions of one plan."""
    result, cluster = plan.as_dict(), plan.cluster
    layout = result["layout"]
    head = (
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}: "
        f"replicate={layout['replicate']} shard={layout['shard']} "
        f"ep={layout['ep']} expert_dp={layout['expert_dp']}, {result['micro_batches']} "
        f"micro-batches of "
        f"{plan.config.training.micro_batch} sequences a GPU and step"
    )
    lines = [head]
    lines.append(
        _table(
            "memory of a GPU at the peak",
            ("", "GiB", ""),
            [
                *(
                    (name, _number(result[f"{name}_gib"]), note)
                    for name, note in MEMORY
                    if result[f"{name}_gib"] > 0.0005
                ),
                ("peak", _number(plan.peak_gib), ""),
                ("usable", _number(plan.usable_gib), f"of {cluster.gpu.memory_gib:.1f}"),
            ],
            notes=1,
        )
    )
    lines.append(
        _table(
            "traffic of a GPU in a step",
            ("", "GB", "times", "ms", ""),
            [
                (
                    f"{kind} {axis}",
                    _number(size / 1e9),
                    f"{result['communication_counts'][kind][axis]:,}",
                    f"{1e3 * result['communication_seconds'].get(f'{kind} {axis}', 0):,.0f}",
                    _spread(plan, axis),
                )
                for kind, axes in result["communication_bytes"].items()
                for axis, size in axes.items()
            ],
            notes=1,
        )
    )
    compute = plan.times["expected"].compute
    lines.append(
        _table(
            "kernels of a GPU in a step",
            ("", "TFLOP", "ms"),
            [
                (part, _number(result["flops"].get(part, 0) / 1e12), f"{1e3 * seconds:,.0f}")
                for part, seconds in sorted(compute.items(), key=lambda item: -item[1])
                if seconds > 5e-4
            ],
        )
    )
    lines.append(
        _table(
            "time of a step",
            ("", "ms"),
            [
                *(
                    (name, f"{1e3 * seconds:,.0f}")
                    for name, seconds in result["step_parts_seconds"].items()
                    if seconds > 5e-4
                ),
                ("step", f"{1e3 * result['step_seconds']:,.0f}"),
            ],
        )
    )
    low, high = result["tokens_per_second_per_gpu_range"]
    lines.append(
        f"{plan.tokens_per_second:,.0f} tokens/s a GPU ({low:,.0f} to {high:,.0f} over the assumed "
        f"ranges), MFU {plan.mfu:.1%}"
    )
    lines.append(verdict(plan, changes))
    lines.append("Assumptions\n" + "\n".join(f"  {line}" for line in result["assumptions"]))
    return "\n\n".join(lines)


def verdict(plan: Plan, changes: Sequence[Change]) -> str:
    """Whether it fits, and what to change where it does not."""
    if plan.fits:
        return f"Fits: {plan.peak_gib:.1f} of {plan.usable_gib:.1f} GiB."
    text = f"Does not fit: {plan.peak_gib:.1f} GiB needed, {plan.usable_gib:.1f} usable."
    if not changes:
        return (
            text
            + " No change of one or two settings makes it fit; use more GPUs, or ones with more "
            "memory."
        )
    rows = [
        (_settings(change.settings), _number(change.peak_gib), f"{change.tokens_per_second:,.0f}")
        for change in changes[:6]
    ]
    return f"{text} Changes that make it fit, planned one by one, the fastest first:\n" + _table(
        "", ("settings", "GiB", "tokens/s a GPU"), rows
    )


def search_table(config: Config, cluster: Cluster, found: Sequence[Change]) -> str:
    """Layouts that fit, fastest first."""
    gpus = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    if not found:
        return f"No layout of this model and batch fits {gpus}; use more GPUs."
    rows = [
        (
            _settings(change.settings),
            _number(change.peak_gib),
            f"{change.tokens_per_second:,.0f}",
            f"{1e3 * change.step_seconds:,.0f}",
            "whole" if change.plan else "extrapolated",
        )
        for change in found
    ]
    best = found[0].plan
    title = f"layouts on {gpus}, {config.training.global_batch} sequences a step"
    text = _table(title, ("settings", "GiB", "tokens/s a GPU", "ms a step", "measured"), rows, 1)
    return text if best is None else f"{text}\n\nThe best of them:\n{describe(best)}"


def _spread(plan: Plan, axis: str) -> str:
    ranks = plan.measured.axes[axis]
    nodes = len({rank // plan.cluster.gpus_per_node for rank in ranks})
    return f"{len(ranks)} GPUs " + ("of one node" if nodes == 1 else f"of {nodes} nodes")


def _settings(settings: Iterable[tuple[str, Any]]) -> str:
    """Settings as a person would type them, those that say `all there are` left out."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in settings
        if (key, value) != ("parallel.shard", 0)
    )


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:,.3f}"


def _table(
    title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]], notes: int = 0
) -> str:
    return Table(title, header, tuple(rows), notes=notes).text()
