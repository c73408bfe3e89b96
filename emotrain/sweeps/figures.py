"""The figures of a sweep, as PNG bytes and their data as CSV. They follow those of the paper (arXiv
2605.06663): what a share of the experts loses, by model (Figure 1) and by domain or task (Figure
3), by who chose them (Figure 4), and by how much text chose them (the ablation of the calibration
size).

Each is drawn from rows of its own, which are written beside it. A number that is refused is left
out of the picture, and empty in the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from emotrain.evaluation.figures import COLORS, png
from emotrain.evaluation.plots import shown
from emotrain.sweeps.plan import ALL, FULL, by_amount, in_words
from emotrain.sweeps.summary import ROW_NAMES, Row, Summary, as_csv, most_documents, words_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("subsets", "subjects", "methods", "calibration")
"""Of all figures; a sweep has those that its plan gives something to show."""
STYLES = ("-", "--", ":", "-.")
Draw = Callable[["Figure", Sequence[Row]], None]


def figures(summary: Summary) -> dict[str, tuple[bytes, Callable[[], bytes]]]:
    """By file name without its ending: the data as CSV, and what draws the PNG (it needs
    matplotlib)."""
    plan, first = summary.plan, summary.plan.methods[0]

    def of_one_size(rows: Iterable[Row], methods: Sequence[str]) -> list[Row]:
        """Rows of all experts and of some methods, where the most text chose."""
        return [
            row
            for row in rows
            if row.method in methods
            and row.calibration_documents in (0, most_documents(plan, row.method))
        ]

    metrics = len({row.metric for row in summary.means})
    by_panel = 0.7 + 4.8 * len(plan.models), 0.4 + 3.8 * metrics
    found: dict[str, tuple[list[Row], Draw, tuple[float, float]]] = {}
    subsets = of_one_size(summary.means, (FULL, first, "random"))
    found["subsets"] = subsets, _by_model, (6.5, 0.4 + 4.0 * metrics)
    names = _names(row.subject for row in summary.subjects)
    if len(names) > 1:
        columns = min(4, len(names))
        size = 3.2 * columns, 0.9 + 2.6 * math.ceil(len(names) / columns)
        found["subjects"] = of_one_size(summary.subjects, (FULL, first)), _by_subject, size
    if len(plan.methods) > 1:
        found["methods"] = of_one_size(summary.means, plan.methods), _by_method, by_panel
    by_size = [r for r in summary.means if r.method == first and r.calibration_documents]
    if len({row.calibration_documents for row in by_size}) > 1:
        found["calibration"] = by_size, _by_size, by_panel
    return {
        name: (as_csv(map(asdict, rows), ROW_NAMES), partial(_drawn, draw, rows, size))
        for name, (rows, draw, size) in found.items()
    }


def _drawn(draw: Draw, rows: Sequence[Row], size: tuple[float, float]) -> bytes:
    def with_note(figure: Figure) -> None:
        draw(figure, rows)
        if any(row.change_spread is not None for row in rows):
            figure.suptitle(
                "bars: standard deviation over seeds", x=0.99, ha="right", fontsize="small"
            )

    return png(with_note, size)


def _by_model(figure: Figure, rows: Sequence[Row]) -> None:
    metrics = _names(row.metric for row in rows)
    panels = figure.subplots(len(metrics), squeeze=False)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        of_metric = [row for row in rows if row.metric == metric]
        for index, model in enumerate(_names(row.model for row in rows)):
            own = [row for row in of_metric if row.model == model]
            full = [row for row in own if row.method == FULL]
            methods = _names(row.method for row in own if row.method != FULL)
            for style, method in zip(STYLES, methods, strict=False):
                points = full + [row for row in own if row.method == method]
                _line(axes, points, index, style, f"{model}: {method}", change=False)
        _share_axis(axes, of_metric, f"mean {words_of(metric)}")
        _legend(axes)


def _by_subject(figure: Figure, rows: Sequence[Row]) -> None:
    names, models = _names(row.subject for row in rows), _names(row.model for row in rows)
    columns = min(4, len(names))
    panels = figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False)
    every = list(panels.flat)
    for axes, name in zip(every, names, strict=False):
        of_subject = [row for row in rows if row.subject == name]
        for index, model in enumerate(models):
            own = [row for row in of_subject if row.model == model]
            _line(axes, own, index, STYLES[index % len(STYLES)], model, change=False)
        axes.set_title(shown(name.rpartition("/")[2]))
        _share_axis(axes, of_subject, words_of(of_subject[0].metric))
    for axes in every[len(names) :]:
        axes.set_visible(False)
    _legend(every[0])


def _by_method(figure: Figure, rows: Sequence[Row]) -> None:
    methods = _names(row.method for row in rows)
    for axes, own in _panels(figure, rows):
        for index, method in enumerate(methods):
            of_method = [row for row in own if row.method == method]
            _line(axes, of_method, index, STYLES[index % len(STYLES)], method, change=True)
        axes.axhline(0, color="0.5", linewidth=0.8)
        _share_axis(axes, own, f"change of {words_of(own[0].metric)}")
        _legend(axes)


def _by_size(figure: Figure, rows: Sequence[Row]) -> None:
    sizes = sorted({row.calibration_documents for row in rows}, key=by_amount)
    # "All" is another number in each domain, and stands apart.
    place = {size: 3.0 * max(sizes) if size == ALL else float(size) for size in sizes}
    for axes, own in _panels(figure, rows):
        for index, keep in enumerate(sorted({row.keep for row in own}, reverse=True)):
            of_keep = [row for row in own if row.keep == keep]
            label = next((row.experts for row in of_keep if row.experts), f"{keep:.3g}")
            points = _points(of_keep, lambda row: place[row.calibration_documents], change=True)
            _draw(axes, points, index, STYLES[index % len(STYLES)], label)
        axes.set_xscale("log")
        axes.set_xticks(list(place.values()), list(map(in_words, place)))
        axes.minorticks_off()
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.set(
            xlabel="documents that choose the experts",
            ylabel=f"change of {words_of(own[0].metric)}",
        )
        _legend(axes, "experts kept")


def _panels(figure: Figure, rows: Sequence[Row]) -> list[tuple[Axes, list[Row]]]:
    """A column a model and a row a metric, of equal axes."""
    models, metrics = _names(row.model for row in rows), _names(row.metric for row in rows)
    every = figure.subplots(len(metrics), len(models), squeeze=False, sharey="row")
    found = []
    for metric, of_metric in zip(metrics, every, strict=True):
        for model, axes in zip(models, of_metric, strict=True):
            axes.set_title(shown(model))
            found.append((axes, [r for r in rows if (r.model, r.metric) == (model, metric)]))
    return found


def _names(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


Point = tuple[float, float, float]
"""x, y, spread over seeds."""


def _points(rows: Iterable[Row], x: Callable[[Row], float], change: bool) -> list[Point]:
    found = []
    for row in rows:
        y = row.change if change else row.value
        if y is not None:
            found.append((x(row), y, row.change_spread or 0.0))
    return sorted(found)


def _line(
    axes: Axes, rows: Sequence[Row], index: int, style: str, label: str, change: bool
) -> None:
    _draw(axes, _points(rows, lambda row: row.keep, change), index, style, label)


def _draw(axes: Axes, points: Sequence[Point], index: int, style: str, label: str) -> None:
    if not points:
        return
    x, y, spread = zip(*points, strict=True)
    axes.errorbar(
        x,
        y,
        yerr=spread,
        color=COLORS[index % len(COLORS)],
        linestyle=style,
        label=shown(label),
        marker="o",
        markersize=3.5,
        linewidth=1.6,
        capsize=2,
    )


def _legend(axes: Axes, title: str | None = None) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(title=title, fontsize="small", frameon=False)


def _share_axis(axes: Axes, rows: Sequence[Row], ylabel: str) -> None:
    """Shares on a log axis from all to few, named by their counts where all models agree."""
    labels: dict[float, set[str]] = {}
    for row in rows:
        if row.experts:
            labels.setdefault(row.keep, set()).add(row.experts)
    shares = sorted({row.keep for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        shares,
        [
            next(iter(labels[share])) if len(labels.get(share, ())) == 1 else f"{share:.3g}"
            for share in shares
        ],
        fontsize="small",
    )
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set(xlabel="experts kept in each layer", ylabel=ylabel)
