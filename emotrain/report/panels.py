"""Which curves the page shows: every number of metrics.jsonl, in sections, with its unit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from emotrain.evaluation.tables import ARM_NAMES
from emotrain.report.charts import Chart, Curves, Plot, bars, draw_chart, layer_names
from emotrain.report.history import Series
from emotrain.report.loads import heatmaps, little_used
from emotrain.report.runs import Run
from emotrain.tables import csv_text

TRAINING = (
    Chart(
        "cross_entropy", "Training loss", "nats/token",
        "Cross entropy of one step's tokens.",
    ),
    Chart(
        "loss", "Loss that is optimised", "nats/token, weighted",
        "Cross entropy, z-losses and balance loss with their weights.",
    ),
    Chart(
        "grad_norm", "Gradient norm", "norm before clipping",
        "Above optimizer.clip_norm the update is scaled down to it.", log=True,
    ),
    Chart("lr", "Learning rate", "rate", "As the schedule says."),
    Chart(
        "balance_loss", "Balance loss", "N · Σ f·P",
        "Mean over layers; 1 means that all experts get the same load.",
    ),
    Chart(
        "z_loss", "Z-loss", "(log Z)²",
        "Square of the output's log-normaliser, without its weight.", log=True,
    ),
    Chart(
        "router_z_loss", "Router z-loss", "(log Z)²",
        "Square of the router's log-normaliser, mean over layers, without its weight.", log=True,
    ),
    Chart(
        "skipped_steps", "Skipped updates", "updates since the start",
        "An update is skipped where the loss or the gradient is not finite.", from_zero=True,
    ),
)  # fmt: skip
SOURCES = (
    Chart(
        "sources-loss_nats", "Training loss of each source", "nats/token",
        "Cross entropy of one step's tokens, where the step has some of the source.",
    ),
    Chart(
        "sources-epochs", "Passes over each source", "passes",
        "Above one its tokens repeat.", from_zero=True,
    ),
)  # fmt: skip
REPLACED = Chart(
    "replaced-sequences", "Replaced sequences", "sequences of the step",
    "Read in the place of those that repeat themselves or cannot be read.", from_zero=True,
)  # fmt: skip
REPLACED_KEY = "data/replaced_sequences"
OF_SOURCE = re.compile("data/([^/]+)/(?:loss_nats|tokens|epochs)")
"""Metrics of the sources of a mixture."""
EXPERTS = (
    Chart(
        "load_imbalance", "Fullest expert", "load / mean load",
        "1 is perfect balance. The fullest expert decides how long a layer takes.", kind="layers",
    ),
    Chart(
        "dead_experts", "Experts without a token", "experts",
        "Experts that no token of the step chose.", kind="layers", from_zero=True,
    ),
    Chart(
        "choice_bias_spread", "Spread of the routers' biases", "probability",
        "The largest bias by which a router chooses less the smallest: what the balance of load "
        "takes.", kind="layers", from_zero=True,
    ),
    Chart(
        "effective_experts", "Experts a document uses", "effective experts",
        "exp of the entropy of a document's mean routing, mean over documents: fewer means that "
        "documents are at home in fewer experts.", kind="layers",
    ),
    Chart(
        "token_entropy_nats", "Entropy of a token's routing", "nats",
        "0 means that a token is sure of one expert.", kind="layers",
    ),
)  # fmt: skip
SPEED = (
    Chart(
        "tokens_per_second", "Throughput", "tokens/s, all devices",
        "Since the line before: checkpoints count, evaluations do not.", from_zero=True,
    ),
    Chart("mfu", "Model FLOPs utilisation", "share of the peak", "", from_zero=True),
    Chart(
        "memory_gib", "Peak memory", "GiB",
        "The most of the first process: of the GPU's allocator, or resident on a CPU.",
        from_zero=True,
    ),
    Chart(
        "placement_rows", "Rows sent", "rows/token",
        "Copies of a token that go to ranks of expert parallelism.", kind="layers",
    ),
    Chart(
        "placement_load", "Fullest rank", "load / mean load", "", kind="layers"
    ),
    Chart(
        "placement_moved_experts", "Experts moved to another rank", "experts", "", kind="layers"
    ),
)  # fmt: skip
POOLS = Chart(
    "pool_size", "Size of document pools", "experts",
    "Mean over documents and layers; the band goes from the smallest pool to the largest.",
    kind="band",
)  # fmt: skip
POOL_KEYS = ("pool_size_mean", "pool_size_min", "pool_size_max")
EVALUATED = "evaluation/"
"""What the names of metrics begin with that are measured on held-out documents."""
OF_DOMAIN = re.compile(
    f"{EVALUATED}domains/(.+)/(loss_nats(?:/pool_[0-9]+)?|increase_nats/.+)", re.DOTALL
)
OF_TASK = re.compile(f"{EVALUATED}tasks/([^/]+)/([^/]+)(?:/(.+))?")
OF_POOL = re.compile("pool_([0-9]+)")
BY_DOMAIN = ", by domain"
QUANTITIES = {
    "loss_nats": ("Held-out loss", "nats/token"),
    "increase_nats": ("Loss increase with fewer experts", "nats/token"),
    "domain_cosine": ("Likeness of the domains' routing", "cosine, mean over pairs"),
    "effective_experts": ("Experts a held-out document uses", "effective experts"),
    "tasks/accuracy_raw": ("Tasks: right choices", "share of the questions"),
    "tasks/accuracy_per_char": (
        "Tasks: right choices, by probability a character",
        "share of the questions",
    ),
    "tasks/accuracy_unconditional": (
        "Tasks: right choices, over their probability alone",
        "share of the questions",
    ),
    "tasks/exact_match": ("Tasks: exact answers", "share of the questions"),
    "tasks/f1": ("Tasks: F1 of the words of answers", "0 to 1"),
    "tasks/bits_per_byte": ("Tasks: bits of the right answer", "bits/byte"),
    "seconds": ("Time of an evaluation", "s"),
}
"""Title and unit of what evaluation during training measures."""
MOST_OTHERS = 24
"""Of more keys that this page does not know, the first by name are drawn."""


class Panels:
    """The plots over steps of these runs, all on the same axis and in the same colours."""

    def __init__(self, runs: Sequence[Run]):
        self.runs, self.several = runs, len(runs) > 1
        # Steps of other sizes are compared by their tokens.
        self.by_tokens = len({run.config.tokens_per_step for run in runs}) > 1
        self.keys = sorted({key for run in runs for key in run.history.series})

    def training(self) -> list[Plot]:
        return [*self._known(TRAINING), *self.sources()]

    def sources(self) -> list[Plot]:
        """Of a mixture a line for each source, with several runs none; and what was replaced."""
        plots = []
        for chart in () if self.several else SOURCES:
            found = [(key, match[1]) for key in self.keys if (match := OF_SOURCE.fullmatch(key))]
            quantity = chart.name.removeprefix("sources-")
            lines = [(key, name) for key, name in found if key.endswith(f"/{quantity}")]
            if lines:
                plots.append(self._joined(chart, lines))
        return [*plots, *self._plot(REPLACED, REPLACED_KEY)]

    def experts(self) -> list[Plot]:
        """Statistics of the routing, and the loads of every expert."""
        plots = self._known(EXPERTS)
        pools = [c for i, run in enumerate(self.runs) if (c := self._pools(i, run)) is not None]
        if pools:
            plots.append(draw_chart(POOLS, pools, self.several, self.by_tokens))
        with_loads = [(i, run, run.loads) for i, run in enumerate(self.runs) if run.loads]
        little = [(i, *little_used(run, loads)) for i, run, loads in with_loads]
        if little:
            curves = [replace(curve, number=i) for i, _, curve in little]
            plots.append(draw_chart(little[0][1], curves, self.several, self.by_tokens))
        return plots

    def loads(self) -> list[tuple[str, list[Plot]]]:
        """The heatmaps of each run that has them, under its label."""
        return [
            (run.label, heatmaps(run, run.loads, i))
            for i, run in enumerate(self.runs)
            if run.loads is not None
        ]

    def speed(self) -> list[Plot]:
        """Throughput, memory and the parts of a step."""
        plots = self._known(SPEED)
        rows = [
            (name, run.label, i, milliseconds)
            for i, run in enumerate(self.runs)
            for name, milliseconds, _ in run.phases
        ]
        if rows:
            csv = csv_text(
                ("run", "part", "milliseconds_per_step", "milliseconds_in_collectives"),
                [(run.label, *phase) for run in self.runs for phase in run.phases],
            )
            about = "Means over the profiled steps of the first process (profile.start)."
            plots.append(bars("phases", "Parts of a step", "ms a step", about, rows, csv))
        return plots

    def evaluated(self) -> list[Plot]:
        """What was measured while training went on: a plot for each quantity, with a line for each
        share of experts or domain. With several runs a plot for each share, and none of domains."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for key in self.keys:
            if key.startswith(EVALUATED) and (place := self._place(key)):
                groups.setdefault(place[0], []).append((key, place[1]))
        known = list(QUANTITIES)
        order = sorted(
            groups,
            key=lambda group: (
                next((i for i, name in enumerate(known) if group.startswith(name)), len(known)),
                group.endswith(BY_DOMAIN),
            ),
        )
        return [
            self._joined(_evaluated_chart(number, group), groups[group])
            for number, group in enumerate(order)
        ]

    def _place(self, key: str) -> tuple[str, str] | None:
        """The plot of a key of `evaluation/`, and the name of its line; None where it has none."""
        domain, name = OF_DOMAIN.fullmatch(key), key.removeprefix(EVALUATED)
        if domain:
            return None if self.several else (f"{domain[2]}{BY_DOMAIN}", domain[1])
        if task := OF_TASK.fullmatch(key):
            line = f"{task[1]}, {task[3]} kept" if task[3] else task[1]
            quantity = f"tasks/{task[2]}"
            return (f"{quantity}, {line}" if self.several else quantity), line
        quantity, _, rest = name.partition("/")
        if self.several or quantity not in QUANTITIES:
            return name, key
        return quantity, _kept(rest) or {"loss_nats": "without pools"}.get(quantity, quantity)

    def others(self) -> tuple[list[Plot], list[str]]:
        """Plots of the keys that no section knows, and the keys that are left out."""
        known = {chart.name for chart in (*TRAINING, *EXPERTS, *SPEED)} | set(POOL_KEYS)
        known |= {REPLACED_KEY, "tokens", "placement_rows_before", "placement_load_before"}
        keys = [
            key
            for key in self.keys
            if key not in known and not key.startswith(EVALUATED) and not OF_SOURCE.fullmatch(key)
        ]
        plots: list[Plot] = []
        for number, key in enumerate(keys[:MOST_OTHERS]):
            chart = Chart(f"other-{number}", key, "as the run gave it", "", kind=self._kind(key))
            plots += self._plot(chart, key)
        return plots, keys[MOST_OTHERS:]

    # ---- a plot

    def _known(self, charts: Sequence[Chart]) -> list[Plot]:
        return [plot for chart in charts for plot in self._plot(chart, chart.name)]

    def _plot(self, chart: Chart, key: str) -> Iterator[Plot]:
        curves = [
            self._curves(i, run, run.history.series[key], key)
            for i, run in enumerate(self.runs)
            if key in run.history
        ]
        if curves:
            yield draw_chart(chart, curves, self.several, self.by_tokens)

    def _kind(self, key: str) -> str:
        series = (run.history.series.get(key) for run in self.runs)
        return "layers" if any(found.per_layer for found in series if found) else "lines"

    def _curves(self, number: int, run: Run, series: Series, key: str) -> Curves:
        columns = series.values.shape[1]
        names = layer_names(run.moe_layers, columns) if series.per_layer else (key,)
        tokens = run.tokens_at(series.steps)
        return Curves(run.label, number, series.steps, tokens, series.values, names)

    def _pools(self, number: int, run: Run) -> Curves | None:
        """Mean, smallest and largest pool over all layers."""
        if not all(key in run.history for key in POOL_KEYS):
            return None
        mean, low, high = (run.history.series[key] for key in POOL_KEYS)
        if not len(mean.steps) == len(low.steps) == len(high.steps):
            return None
        columns = (mean.values.mean(axis=1), low.values.min(axis=1), high.values.max(axis=1))
        tokens = run.tokens_at(mean.steps)
        names = ("mean", "smallest", "largest")
        return Curves(run.label, number, mean.steps, tokens, np.stack(columns, axis=1), names)

    def _joined(self, chart: Chart, lines: Sequence[tuple[str, str]]) -> Plot:
        """One plot of several keys.

        Args:
            lines: (key, name of its line).
        """
        curves = [
            replace(self._curves(i, run, run.history.series[key], key), names=(name,))
            for i, run in enumerate(self.runs)
            for key, name in lines
            if key in run.history and not run.history.series[key].per_layer
        ]
        return draw_chart(chart, curves, self.several, self.by_tokens)


def _kept(name: str) -> str:
    """`0.25/cross_domain` as a reader calls it: 0.25 kept, another domain's; `pool_32`: pools of
    32."""
    if pool := OF_POOL.match(name):
        return f"pools of {pool[1]} experts{name[pool.end() :]}"
    share, _, arm = name.partition("/")
    for key, words in ARM_NAMES.items():
        if arm.removesuffix(BY_DOMAIN) == key:
            return f"{share} kept, {words}{BY_DOMAIN if arm.endswith(BY_DOMAIN) else ''}"
    return name.replace("/", ", ")


def _evaluated_chart(number: int, group: str) -> Chart:
    """How a quantity of `evaluation/` is called, by the first part of its name."""
    quantity, _, rest = group.partition("/")
    if quantity == "tasks":
        quantity, rest = group, ""
    title, unit = QUANTITIES.get(quantity.partition(",")[0], (quantity, "as the run gave it"))
    ending = _kept(rest) if rest else group.removeprefix(quantity.partition(",")[0])
    title += f", {ending.removeprefix(', ')}" if ending else ""
    about = "On held-out documents, while training went on."
    return Chart(f"evaluated-{number}", title, unit, about)
