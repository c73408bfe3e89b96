"""The load of every expert over the steps of a run: a heatmap a layer, and the experts that get
little."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from emotrain.evaluation.figures import svg
from emotrain.report.charts import Chart, Curves, Plot, layer_names, short
from emotrain.report.history import Loads
from emotrain.report.runs import Run
from emotrain.tables import csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LITTLE = 0.1
"""An expert with less than this share of its layer's mean load counts as one that gets little."""
MOST_CELLS = 80_000
MOST_SPANS, LEAST_SPANS = 128, 12
"""Columns of a heatmap: as many as keep all heatmaps of a run within `MOST_CELLS`."""
SIZE = (4.3, 2.6)


def little_used(run: Run, loads: Loads) -> tuple[Chart, Curves]:
    """Over the steps, how many experts of each layer get little."""
    chart = Chart(
        "little-used",
        f"Experts under {LITTLE:.0%} of the mean load",
        "experts",
        "An expert that gets few tokens learns little; 0 is best.",
        kind="layers",
        from_zero=True,
    )
    counts = [(loads.relative(i) < LITTLE).sum(axis=1) for i in range(len(loads.slots))]
    values = np.stack(counts, axis=1).astype(np.float64)
    names = layer_names(run.moe_layers, len(counts))
    return chart, Curves(run.label, 0, loads.steps, run.tokens_at(loads.steps), values, names)


def heatmaps(run: Run, loads: Loads, number: int) -> list[Plot]:
    """A heatmap for each layer: expert by number against steps; colour is load over mean load.

    Args:
        number: of the run on the page.
    """
    names = layer_names(run.moe_layers, len(loads.slots))
    cells = sum(slots.shape[1] for slots in loads.slots)
    spans = max(LEAST_SPANS, min(MOST_SPANS, MOST_CELLS // cells))
    return [
        _heatmap(run, loads, layer, name, spans, f"loads-{number}-{layer + 1}")
        for layer, name in enumerate(names)
    ]


def _heatmap(run: Run, loads: Loads, layer: int, name: str, spans: int, key: str) -> Plot:
    edges, counts_S, mean_SN = _spans(loads.steps, loads.relative(layer), spans)
    filled = counts_S > 0

    def draw(figure: Figure) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import LinearSegmentedColormap, LogNorm

        # Without its darkest ends, which would look like black.
        ends = colormaps["PuOr_r"](np.linspace(0.1, 0.9, 64))
        colors = LinearSegmentedColormap.from_list("load", ends)
        axes = figure.subplots()
        # No load at all has a colour of its own, which is not that of a small one.
        shown_SN = np.where(mean_SN > 0, mean_SN.clip(0.25), 0.1)
        image = axes.imshow(
            np.where(filled[:, None], shown_SN, np.nan).T,
            cmap=colors.with_extremes(under="black"),
            norm=LogNorm(0.25, 4),
            extent=(edges[0], edges[-1], mean_SN.shape[1] - 0.5, -0.5),
            aspect="auto",
            interpolation="none",
        )
        axes.grid(False)
        axes.set(xlabel="step", ylabel="expert")
        axes.xaxis.set_major_formatter(short)
        bar = figure.colorbar(image, ax=axes, extend="both")
        bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["¼", "½", "1", "2", "4"])
        bar.minorticks_off()
        bar.set_label("load / mean load")

    last = mean_SN[filled][-1]
    text = (
        f"At step {loads.steps[-1]:,} expert {last.argmax()} gets most, {last.max():.2f} times the "
        f"mean, and expert {last.argmin()} least, {last.min():.2f} times."
    )
    if counts_S.max() > 1:
        text += f" A column is a mean of up to {counts_S.max()} records."
    rows = [
        (number, *(f"{value:.3g}" for value in row))
        for number, row in zip(
            _last_steps(loads.steps, edges), mean_SN[filled].tolist(), strict=True
        )
    ]
    header = ("step", *(f"expert {i}" for i in range(mean_SN.shape[1])))
    title = f"Load, {name}"
    picture = svg(draw, SIZE, key, f"{title} of {run.label}. {text}")
    return Plot(key, title, text, picture, csv_text(header, rows))


def _spans(
    steps: np.ndarray, values: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over equal spans of steps: at most `most`, and no more than there are records.

    Returns:
        edges float64 [S + 1]; records in each span int64 [S]; their means float64 [S, N], 0 where
        there are none.
    """
    count = min(most, len(steps))
    half = (steps[-1] - steps[0]) / max(1, len(steps) - 1) / 2 or 0.5
    edges = np.linspace(steps[0] - half, steps[-1] + half, count + 1)
    span = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, count - 1)
    counts_S = np.bincount(span, minlength=count)
    sums_SN = np.zeros((count, values.shape[1]))
    np.add.at(sums_SN, span, values)
    return edges, counts_S, sums_SN / np.maximum(counts_S, 1)[:, None]


def _last_steps(steps: np.ndarray, edges: np.ndarray) -> list[int]:
    """The last record's step of each span that has one."""
    span = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, len(edges) - 2)
    last = np.append(np.flatnonzero(np.diff(span)), len(steps) - 1)
    return [int(step) for step in steps[last]]
