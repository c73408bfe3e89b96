"""The plots of evaluations, of locality and of subsets. Needs matplotlib (`pip install
'emotrain[report]'`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from emotrain.evaluation.figures import COLORS, png
from emotrain.evaluation.results import Arm, Measurement, SubsetLosses
from emotrain.evaluation.tables import ARM_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from emotrain.evaluation.locality import LocalityResult

LINES: dict[Arm, str] = {"selected": "-", "random": ":", "cross_domain": "--"}
MAX_NAMED_LINES = 12
"""Of more domains than this only the worst and the best are named; the others are thin grey
lines."""

Evaluations = Sequence[tuple[str, Measurement]]
"""(label, result of `measure`) pairs."""


def subset_figure(evaluations: Evaluations) -> bytes:
    """Loss increase against experts kept, as PNG: `draw_arms` on the left, `draw_choices` on the
    right."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.set_title("by who chose the experts, mean over domains")
        right.set_title("chosen by the domain itself")
        draw_arms(left, evaluations)
        draw_choices(right, evaluations)

    return png(draw, (10, 4))


def draw_arms(axes: Axes, evaluations: Evaluations, colors: Sequence[str] = COLORS) -> None:
    """Mean over domains by who chose the experts.

    Args:
        colors: of each evaluation, where there are several.
    """
    several = len(evaluations) > 1
    for index, (label, result) in enumerate(evaluations):
        for arm_index, (arm, name) in enumerate(ARM_NAMES.items()):
            color = colors[index] if several else COLORS[arm_index]
            of_line = f"{label}: {name}" if several else name
            _increase_line(axes, result.mean, arm, color, LINES[arm], of_line)
    _keep_axis(axes, evaluations)


def draw_choices(axes: Axes, evaluations: Evaluations, colors: Sequence[str] = COLORS) -> None:
    """The experts each domain chose itself, by domain for one evaluation and by model (mean, with a
    band of the domains' range) for several. Arguments as of `draw_arms`."""
    if len(evaluations) == 1:
        _domain_lines(axes, evaluations[0][1])
    else:
        for index, (label, result) in enumerate(evaluations):
            _domain_band(axes, result, colors[index], label)
    _keep_axis(axes, evaluations)


CACHES = (
    ("lru_cold", "LRU, cold", "-"),
    ("lru_mixed", "LRU, domains in turn", "--"),
    ("static_domain", "pinned for the domain", "-."),
    ("static", "pinned for all", ":"),
)
"""Arms of `emotrain locality` that are drawn, their names and lines."""


def locality_figure(models: Sequence[tuple[str, LocalityResult]]) -> bytes:
    """Hit rate against the share of a layer's experts that are at hand, one panel a model."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axes, (label, result) in zip(panels, models, strict=True):
            shares = [point["share"] for point in result.curve]
            for index, (arm, name, line) in enumerate(CACHES):
                rates = [point[f"{arm}_hit_rate"] for point in result.curve]
                axes.plot(shares, rates, line, color=COLORS[index], linewidth=1.6, label=name)
            axes.plot(shares, shares, color="0.6", linewidth=0.8, label="at random")
            axes.set(title=shown(label), xlabel="share of a layer's experts at hand", ylim=(0, 1))
            axes.legend(fontsize="small", frameon=False)
        panels[0].set_ylabel("hit rate (share of routed slots)")

    return png(draw, (5 * len(models) + 0.5, 4))


def overlap_figure(
    names: Sequence[str],
    jaccard: Sequence[Sequence[float]],
    chance: Sequence[Sequence[float]],
) -> bytes:
    """Jaccard indices of subsets as a heatmap; in each field its number and, below it, that of
    random subsets."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(jaccard, vmin=0, vmax=1, cmap="viridis")
        ticks = range(len(names))
        axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, names)
        axes.grid(False)
        axes.set_title("experts in common: Jaccard index,\nmean over layers (and by chance)")
        for row in ticks:
            for column in ticks:
                value = jaccard[row][column]
                axes.text(
                    column,
                    row,
                    f"{value:.2f}" + (f"\n({chance[row][column]:.2f})" if row != column else ""),
                    ha="center",
                    va="center",
                    fontsize="small",
                    color="black" if value > 0.6 else "white",
                )
        figure.colorbar(image, label="Jaccard index")

    side = 3 + 0.7 * len(names)
    return png(draw, (side + 1.5, side))


def _points(losses: SubsetLosses, arm: Arm) -> list[tuple[float, float, float]]:
    """Share kept, increase and standard error, by share; none for an arm without runs."""
    found = ((float(keep), losses.increase(keep, arm)) for keep in losses.increase_nats)
    return sorted((share, *increase) for share, increase in found if increase is not None)


def _increase_line(
    axes: Axes, losses: SubsetLosses, arm: Arm, color: str, style: str, label: str
) -> None:
    """One curve with its standard errors; an arm without runs draws nothing."""
    if points := _points(losses, arm):
        x, y, error = zip(*points, strict=True)
        axes.errorbar(
            x,
            y,
            yerr=error,
            color=color,
            linestyle=style,
            label=shown(label),
            marker="o",
            markersize=3.5,
            linewidth=1.6,
            capsize=2,
        )


def shown(label: str) -> str:
    """A label as it is: a legend leaves out those that begin with an underscore."""
    return f"\u200b{label}" if label.startswith("_") else label


def _domain_lines(axes: Axes, result: Measurement) -> None:
    points = {name: _points(domain, "selected") for name, domain in result.domains.items()}
    # By the increase at the smallest share, from the worst.
    ordered = sorted(
        (name for name in points if points[name]), key=lambda n: points[n][0][1], reverse=True
    )
    named = ordered if len(ordered) <= MAX_NAMED_LINES else [ordered[0], ordered[-1]]
    for name in ordered:
        if name not in named:
            shares, increases, _ = zip(*points[name], strict=True)
            axes.plot(shares, increases, color="0.6", linewidth=0.8)
    for rank, name in enumerate(named):
        # Seven colours in two line styles tell up to twelve domains apart.
        _increase_line(
            axes,
            result.domains[name],
            "selected",
            COLORS[rank % len(COLORS)],
            "--" if rank >= len(COLORS) else "-",
            name,
        )


def _domain_band(axes: Axes, result: Measurement, color: str, label: str) -> None:
    increases: dict[float, list[float]] = {}
    for domain in result.domains.values():
        for share, increase, _ in _points(domain, "selected"):
            increases.setdefault(share, []).append(increase)
    if not increases:
        return
    shares = sorted(increases)
    axes.fill_between(
        shares,
        [min(increases[share]) for share in shares],
        [max(increases[share]) for share in shares],
        color=color,
        alpha=0.15,
        linewidth=0,
    )
    _increase_line(axes, result.mean, "selected", color, "-", f"{label} (band: all domains)")


def _keep_axis(axes: Axes, evaluations: Evaluations) -> None:
    """Shares of experts on a log axis from all to few, named by their counts where all models
    agree."""
    if not axes.has_data():  # no loss is finite: an axis without numbers
        return
    labels: dict[str, set[str]] = {}
    for _, result in evaluations:
        for keep in result.keeps:
            labels.setdefault(keep, set()).add(result.experts.label(keep))
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [float(keep) for keep in labels],
        [
            next(iter(names)) if len(names) == 1 else f"{float(keep):.3g}"
            for keep, names in labels.items()
        ],
    )
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set(
        xlabel="experts kept in each layer, shared included", ylabel="loss increase (nats/token)"
    )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", frameon=False)
