"""What stands out in a run, in plain sentences: from its numbers alone, each with the plot that
shows it and the rule that found it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from emotrain.evaluation.findings import findings as of_evaluation
from emotrain.report.charts import number
from emotrain.report.history import Series, tail
from emotrain.report.loads import LITTLE
from emotrain.report.runs import Run
from emotrain.report.subsets import ARMS_PLOT, CHOICES_PLOT

SPIKE_NATS, SPIKE_WINDOW = 0.5, 9
IMBALANCE = 2.0
SLOWER = 0.9
CLIPPED = 0.5
AT_HOME = 1.25
GROWTH = 1.2
COSTLY_NATS = 0.5
END = 0.1
"""The share of a run's metrics that is its end."""


@dataclass(frozen=True)
class Finding:
    """One sentence."""

    run: str
    kind: str
    """`look`: something to look at. `note`: good to know."""
    text: str
    rule: str
    """When the page says this."""
    plot: str
    """Name of the plot that shows it."""


def findings(runs: Sequence[Run]) -> list[Finding]:
    """All findings, those to look at first."""
    found = [finding for run in runs for finding in _of_run(run)]
    return sorted(found, key=lambda finding: finding.kind != "look")


def _of_run(run: Run) -> Iterator[Finding]:
    for rule in (_loss, _spikes, _skipped, _throughput, _memory, _clipping, _imbalance):
        yield from rule(run)
    for rule in (_little_used, _pools, _subsets, _restarts):
        yield from rule(run)


def _loss(run: Run) -> Iterator[Finding]:
    if (loss := run.history.series.get("cross_entropy")) is None:
        return
    steps, values = _finite(loss)
    if len(values) < 2:
        return
    end = float(tail(values, END).mean())
    yield Finding(
        run.label,
        "note",
        f"The training loss went from {values[0]:.3f} nats/token at step {steps[0]:,} to "
        f"{end:.3f}, the mean of the last tenth.",
        "Always said.",
        "cross_entropy",
    )
    if len(values) < len(loss.steps):
        yield Finding(
            run.label,
            "look",
            f"The training loss was not finite in {len(loss.steps) - len(values):,} of "
            f"{len(loss.steps):,} lines of metrics.",
            "Said of any.",
            "cross_entropy",
        )


def _spikes(run: Run) -> Iterator[Finding]:
    if (loss := run.history.series.get("cross_entropy")) is None:
        return
    steps, values = _finite(loss)
    if len(values) <= SPIKE_WINDOW:
        return
    windows = np.lib.stride_tricks.sliding_window_view(values[:-1], SPIKE_WINDOW)
    rise = values[SPIKE_WINDOW:] - np.median(windows, axis=1)
    count = int((rise > SPIKE_NATS).sum())
    if count:
        worst = int(rise.argmax())
        yield Finding(
            run.label,
            "look",
            f"The loss jumped {_times(count)}; the largest jump, by {rise[worst]:.2f} nats/token, "
            f"is at step {steps[SPIKE_WINDOW + worst]:,}.",
            f"Counted: more than {SPIKE_NATS:g} nats/token above the median of the "
            f"{SPIKE_WINDOW} lines of metrics before.",
            "cross_entropy",
        )


def _skipped(run: Run) -> Iterator[Finding]:
    skipped = run.history.last("skipped_steps")
    if skipped and np.isfinite(skipped):
        yield Finding(
            run.label,
            "look",
            f"Updates skipped because the loss or the gradient was not finite: {skipped:,.0f}.",
            "Said of any.",
            "skipped_steps",
        )


def _throughput(run: Run) -> Iterator[Finding]:
    if (rate := run.history.series.get("tokens_per_second")) is None:
        return
    _, values = _finite(rate)
    if len(values) < 10:
        return
    end, usual = float(np.median(tail(values, END))), float(np.median(values))
    if end < SLOWER * usual:
        yield Finding(
            run.label,
            "look",
            f"Throughput fell: {number(end)} tokens/s in the last tenth, {number(usual)} over the "
            f"whole run.",
            f"Said when the median of the last tenth is under {SLOWER:.0%} of the median of all.",
            "tokens_per_second",
        )


def _memory(run: Run) -> Iterator[Finding]:
    if (memory := run.history.series.get("memory_gib")) is None:
        return
    steps, values = _finite(memory)
    if len(values) < 10:
        return
    early = float(values[len(values) // 2])
    if values[-1] > GROWTH * early > 0:
        yield Finding(
            run.label,
            "look",
            f"Memory grew from {early:.2f} GiB at step {steps[len(values) // 2]:,} to "
            f"{values[-1]:.2f} GiB.",
            f"Said when the end is above {GROWTH:g} times what it was after half of the run.",
            "memory_gib",
        )


def _clipping(run: Run) -> Iterator[Finding]:
    limit = run.config.optimizer.clip_norm
    if (norm := run.history.series.get("grad_norm")) is None or limit <= 0:
        return
    _, values = _finite(norm)
    if not len(values):
        return
    share = float((tail(values, 0.5) > limit).mean())
    if share > CLIPPED:
        yield Finding(
            run.label,
            "look",
            f"{share:.0%} of the updates in the second half were clipped: their gradient norm was "
            f"above optimizer.clip_norm={limit:g}.",
            f"Said when more than {CLIPPED:.0%} of the logged steps are.",
            "grad_norm",
        )


def _imbalance(run: Run) -> Iterator[Finding]:
    if (load := run.history.series.get("load_imbalance")) is None or not load.per_layer:
        return
    end = np.nanmean(np.where(np.isfinite(tail(load.values)), tail(load.values), 0), axis=0)
    worst = int(end.argmax())
    kind = "look" if end[worst] > IMBALANCE else "note"
    yield Finding(
        run.label,
        kind,
        f"In the last tenth the fullest expert of layer {_layer(run, worst)} has "
        f"{end[worst]:.2f} times the mean load of its layer, the most of all layers.",
        f"To be looked at above {IMBALANCE:g}.",
        "load_imbalance",
    )


def _little_used(run: Run) -> Iterator[Finding]:
    if run.loads is None:
        return
    means = [tail(run.loads.relative(i)).mean(axis=0) for i in range(len(run.loads.slots))]
    little = [int((mean_N < LITTLE).sum()) for mean_N in means]
    dead = sum(int((mean_N == 0).sum()) for mean_N in means)
    if total := sum(little):
        worst = int(np.argmax(little))
        yield Finding(
            run.label,
            "look",
            f"{total} of {sum(map(len, means))} experts get little in the last tenth ({dead} of "
            f"them nothing), most of them in layer {_layer(run, worst)}: {little[worst]} of "
            f"{len(means[worst])}.",
            f"Counted: under {LITTLE:.0%} of the mean load of the layer.",
            "little-used",
        )


def _pools(run: Run) -> Iterator[Finding]:
    spread = run.history.series.get("effective_experts")
    if spread is None or not spread.per_layer:
        return
    end = np.nanmin(np.where(np.isfinite(tail(spread.values)), tail(spread.values), np.inf), axis=0)
    least = int(end.argmin())
    chosen = run.config.model.experts.top_k
    if end[least] < AT_HOME * chosen:
        yield Finding(
            run.label,
            "look",
            f"Documents collapse onto few experts: in layer {_layer(run, least)} one uses "
            f"{end[least]:.1f} of them, and a token alone chooses {chosen}.",
            f"Said under {AT_HOME:g} times model.experts.top_k, in the last tenth.",
            "effective_experts",
        )


def _subsets(run: Run) -> Iterator[Finding]:
    result = run.evaluation
    if result is None or result.mean.loss_nats is None:
        return
    for sentence in of_evaluation(result):
        yield Finding(run.label, "note", sentence, "From emotrain evaluate.", ARMS_PLOT)
    keep = min(result.keeps, key=float)
    costs = {
        name: increase[0]
        for name, domain in result.domains.items()
        if (increase := domain.increase(keep, "selected")) is not None
    }
    costly = [name for name, cost in costs.items() if cost > COSTLY_NATS]
    if costly:
        worst = max(costly, key=lambda name: costs[name])
        yield Finding(
            run.label,
            "look",
            f"{len(costly)} of {len(costs)} domains lose much with {result.experts.label(keep)} "
            f"experts, {worst} most: {costs[worst]:+.3f} nats/token.",
            f"Counted: more than {COSTLY_NATS:g} nats/token with the experts of their own choice.",
            CHOICES_PLOT,
        )


def _restarts(run: Run) -> Iterator[Finding]:
    if len(run.starts) > 1:
        steps = ", ".join(str(start.get("step", "?")) for start in run.starts[1:][:8])
        more = " …" if len(run.starts) > 9 else ""
        yield Finding(
            run.label,
            "note",
            f"The run was started {_times(len(run.starts))}; it went on at step {steps}{more}.",
            "Said of more than one start.",
            "environment",
        )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _layer(run: Run, index: int) -> int:
    """Number of a layer, from 1, by its place in a list of metrics."""
    layers = run.moe_layers
    return (layers[index] if index < len(layers) else index) + 1


def _finite(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the first column where it is finite."""
    values = series.values[:, 0]
    finite = np.isfinite(values)
    return series.steps[finite], values[finite]
