"""Curves over the steps of runs: what is drawn, as SVG and as CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from emotrain.evaluation.figures import COLORS, line_look, svg
from emotrain.evaluation.plots import shown
from emotrain.report.history import thin
from emotrain.tables import csv_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 600
"""Of a curve with more points the page shows about this many: see `thin`."""
SIZE = (4.3, 2.7)
"""Inches of a plot."""
MOST_LETTERS = 48
"""Of a name in a legend."""
OUTLIER = 20.0
"""A curve whose largest value is this many times its 95th percentile gets a log axis, so that both
can be seen."""
SHALLOW, DEEP = COLORS[0], COLORS[4]
"""First and last layer; those between are between in colour."""


@dataclass(frozen=True)
class Plot:
    """A plot of the page: its picture and its numbers."""

    name: str
    """What links and the CSV file are called: letters, digits and dashes."""
    title: str
    caption: str
    svg: str
    csv: str


@dataclass(frozen=True)
class Curves:
    """The curves of one run in a chart."""

    run: str
    number: int
    """Of the run on the page: it decides the colour."""
    steps: np.ndarray
    """int64 [n]."""
    tokens: np.ndarray
    """float64 [n]."""
    values: np.ndarray
    """float64 [n, columns]."""
    names: tuple[str, ...]
    """Of the columns."""

    def thinned(self) -> Curves:
        kept = thin(self.steps, self.values, MOST_POINTS)
        return replace(
            self, steps=self.steps[kept], tokens=self.tokens[kept], values=self.values[kept]
        )


@dataclass(frozen=True)
class Chart:
    """What a plot over steps is of."""

    name: str
    title: str
    unit: str
    about: str
    """How to read it, in a sentence."""
    kind: str = "lines"
    """`lines`: every column is a line. `layers`: columns are layers, in order. `band`: columns are
    mean, smallest and largest."""
    log: bool = False
    from_zero: bool = False


def draw_chart(
    chart: Chart, curves: Sequence[Curves], several: bool, by_tokens: bool = False
) -> Plot:
    """The plot of a chart.

    Args:
        several: whether the page has several runs. Then a colour is a run; of layers their mean is
            drawn, with a band from the smallest to the largest.
        by_tokens: whether the axis counts tokens, for runs whose steps have not the same number.
    """
    whole, curves = curves, [part.thinned() for part in curves]
    names = list(dict.fromkeys(name for part in curves for name in part.names))
    unit = chart.unit + (", log" if is_log(chart, curves) else "")

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import LogFormatter, MaxNLocator

        axes = figure.subplots()
        for part in curves:
            x = part.tokens if by_tokens else part.steps
            _draw_part(axes, chart, part, x, several, names)
        if is_log(chart, curves):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(short)
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        elif chart.from_zero:
            axes.set_ylim(bottom=0, top=None if axes.get_ylim()[1] > 0.1 else 1)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(short)
        axes.set(xlabel="tokens" if by_tokens else "step", ylabel=unit)
        _mark_not_finite(axes, curves, by_tokens)
        if labels := axes.get_legend_handles_labels()[1]:
            columns = legend_columns(labels)
            figure.legend(loc="outside upper left", ncols=columns, frameon=False)

    lines = list(dict.fromkeys(part.run for part in curves)) if several else names
    rows = 1 if chart.kind == "layers" else -(-len(lines) // legend_columns(lines))
    size = (SIZE[0], SIZE[1] + 0.17 * max(0, rows - 2))
    caption = (
        f"{chart.about} {_summary(whole, several, chart.kind)}{_thinning(whole, curves)}".strip()
    )
    alt = f"{chart.title}, {chart.unit}. {_summary(whole, several, chart.kind)}"
    return Plot(
        chart.name, chart.title, caption, svg(draw, size, chart.name, alt), curves_csv(curves)
    )


def is_log(chart: Chart, curves: Sequence[Curves]) -> bool:
    """Whether the values need a log axis: they are all above zero, and the chart says so, where
    they differ by a factor of ten, or its outliers do."""
    parts = [part.values[np.isfinite(part.values)] for part in curves]
    values = np.concatenate([np.zeros(0), *parts])
    if not values.size or values.min() <= 0:
        return False
    wide = values.max() > 10 * values.min()
    return bool(chart.log and wide or values.max() > OUTLIER * np.quantile(values, 0.95))


def legend_columns(labels: Sequence[str]) -> int:
    """Columns of a legend that fit beside each other: a letter takes 5 points, a line 36."""
    return max(1, min(4, int(72 * SIZE[0] / (36 + 5 * min(MOST_LETTERS, max(map(len, labels)))))))


def curves_csv(curves: Sequence[Curves]) -> str:
    """A row for each run and step: `run,step,tokens` and a column for each curve. Seven digits;
    `nan` and `inf` are what the run had."""
    names = tuple(dict.fromkeys(name for part in curves for name in part.names))
    rows = []
    for part in curves:
        places = [part.names.index(name) if name in part.names else None for name in names]
        for step, tokens, values in zip(
            part.steps.tolist(), part.tokens.tolist(), part.values.tolist(), strict=True
        ):
            cells = ("" if place is None else f"{values[place]:.7g}" for place in places)
            rows.append((part.run, step, int(tokens), *cells))
    return csv_text(("run", "step", "tokens", *names), rows)


def layer_names(layers: Sequence[int], columns: int) -> tuple[str, ...]:
    """Names of the columns of a list with an entry a layer with routed experts, counted from 1."""
    known = len(layers) == columns
    return tuple(f"layer {(layers[i] if known else i) + 1}" for i in range(columns))


def _short_name(name: str) -> str:
    """A name as a legend has room for it."""
    return shown(name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…")


def _draw_part(
    axes: Axes, chart: Chart, part: Curves, x: np.ndarray, several: bool, names: Sequence[str]
) -> None:
    """The lines of a part; `names` are those of all lines in the chart."""
    y = np.where(np.isfinite(part.values), part.values, np.nan)
    # A line of one point, or of a few, would not be seen.
    points: dict[str, Any] = {"marker": "o", "markersize": 3} if len(x) <= 30 else {}
    look: dict[str, Any] = line_look(part.number)
    if several or chart.kind == "band":
        middle, low, high = _middle(y, chart.kind)
        if low is not None and high is not None:
            axes.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
        label = _short_name(part.run) if several else None
        axes.plot(x, middle, label=label, linewidth=1.4, **look, **points)
        return
    for column, name in enumerate(part.names):
        index = names.index(name)
        label = _short_name(name) if len(names) > 1 else None
        if chart.kind == "layers":
            look = {"color": layer_color(index, len(names))}
            between = 0 < index < len(names) - 1 and len(names) > 6
            label = None if between else label
        elif len(names) > 1:
            look = line_look(index)
        axes.plot(x, y[:, column], label=label, linewidth=1.3, **look, **points)


def _middle(y: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The line of a run and, of several columns, its band."""
    if y.shape[1] == 1:
        return y[:, 0], None, None
    if kind == "band":
        return y[:, 0], y[:, 1], y[:, 2]
    # A step of which no layer is finite has no mean.
    some = np.isfinite(y).any(axis=1)
    rows = np.where(some[:, None], y, 0.0)
    parts = (np.nanmean(rows, axis=1), np.nanmin(rows, axis=1), np.nanmax(rows, axis=1))
    middle, low, high = (np.where(some, part, np.nan) for part in parts)
    return middle, low, high


def layer_color(index: int, count: int) -> str:
    """From blue to orange with depth."""
    share = index / max(1, count - 1)
    ends = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (SHALLOW, DEEP)]
    mixed = [round(a + share * (b - a)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _mark_not_finite(axes: Axes, curves: Sequence[Curves], by_tokens: bool) -> None:
    """A cross at the top for each value that is not finite."""
    parts = [
        (part.tokens if by_tokens else part.steps)[~np.isfinite(part.values).all(axis=1)]
        for part in curves
    ]
    where = np.concatenate([np.zeros(0), *parts])
    if where.size:
        axes.plot(
            where, np.full(where.shape, 0.97), "x", color=COLORS[1], markersize=5,
            transform=axes.get_xaxis_transform(), label="not finite",
        )  # fmt: skip


def _summary(curves: Sequence[Curves], several: bool, kind: str) -> str:
    """Last, smallest and largest value of each run, in words."""
    sentences = []
    for run in dict.fromkeys(part.run for part in curves):
        parts = [part for part in curves if part.run == run]
        values = np.concatenate([part.values.ravel() for part in parts])
        name = f"{run}: " if several else ""
        finite = values[np.isfinite(values)]
        if not finite.size:
            sentences.append(f"{name}no value is finite.")
            continue
        last = np.concatenate([part.values[-1, : 1 if kind == "band" else None] for part in parts])
        last = last[np.isfinite(last)]
        end = "not finite" if not last.size else number(float(last.mean()))
        of = " over layers" if kind == "layers" else ""
        many = f" on average{of}" if last.size > 1 else ""
        sentences.append(
            f"{name}{end}{many} at step {max(part.steps[-1] for part in parts):,}; between "
            f"{number(float(finite.min()))} and {number(float(finite.max()))} over all steps."
        )
    return " ".join(sentences)


def _thinning(whole: Sequence[Curves], drawn: Sequence[Curves]) -> str:
    had, has = (sum(len(part.steps) for part in parts) for parts in (whole, drawn))
    if had == has:
        return ""
    return (
        f" Drawn, and in the CSV: {has:,} of {had:,} points, the lowest and the highest among them."
    )


def short(value: float, _position: float | None = None) -> str:
    """A number of steps or tokens for an axis: 1.5k, 20M, 3B, 1T."""
    size, unit = next(
        ((size, unit) for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
         if abs(value) >= size),
        (1, ""),
    )  # fmt: skip
    return f"{value / size:g}{unit}"


def number(value: float) -> str:
    """A number for a sentence: four digits, with commas where it is large."""
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.4g}"


def bars(
    name: str, title: str, unit: str, about: str, rows: Sequence[tuple[str, str, int, float]],
    csv: str,
) -> Plot:  # fmt: skip
    """Horizontal bars, each with its number.

    Args:
        rows: (what, run, number of the run, value), from the top.
    """
    whats = list(dict.fromkeys(what for what, *_ in rows))
    runs = list(dict.fromkeys((run, index) for _, run, index, _ in rows))
    height = 0.8 / max(1, len(runs))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for position, (run, index) in enumerate(runs):
            own = {what: value for what, of, _, value in rows if of == run}
            y = [whats.index(what) + (position + 0.5) * height - 0.4 for what in own]
            drawn = axes.barh(
                y, list(own.values()), height, color=COLORS[index % len(COLORS)],
                label=shown(run) if len(runs) > 1 else None,
            )  # fmt: skip
            axes.bar_label(drawn, fmt=number, padding=3, fontsize="small")
        axes.set_yticks(range(len(whats)), whats)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(False, axis="y")
        axes.set_xlabel(unit)
        if len(runs) > 1:
            columns = legend_columns([run for run, _ in runs])
            figure.legend(loc="outside upper left", ncols=columns, frameon=False)

    size = (SIZE[0], max(SIZE[1], 0.6 + 0.24 * len(rows)))
    alt = f"{title}, {unit}. " + "; ".join(
        f"{what} {number(value)}" + (f" ({run})" if len(runs) > 1 else "")
        for what, run, _, value in rows
    )
    return Plot(name, title, about, svg(draw, size, name, alt), csv)


Draw = Callable[["Axes"], None]


def single(name: str, title: str, caption: str, alt: str, csv: str, draw: Draw) -> Plot:
    """A plot of one pair of axes that `draw` fills."""
    figure = svg(lambda figure: draw(figure.subplots()), SIZE, name, alt)
    return Plot(name, title, caption, figure, csv)
