"""The pictures of `emotrain coverage`, each with its numbers as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from emotrain.analysis.coverage import Coverage
from emotrain.analysis.coverage_steps import RunCoverage
from emotrain.analysis.coverage_tables import groups_of
from emotrain.analysis.together import by_chance, lift
from emotrain.evaluation.figures import COLORS, png
from emotrain.tables import csv_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

LONGEST_NAME = 22
"""Letters of a domain that a label shows."""

SEQUENTIAL = "viridis"
"""Of the same order in every colour vision and in grey."""

MOST_NUMBERS = 16
"""Columns of a heatmap whose fields have their numbers written in them."""

LIFTS = (1.0, 4.0)
"""Times chance that the colours of pairs of experts reach from and to."""


def shown_layers(num_layers: int) -> list[int]:
    """Four places from the first to the last; fewer of fewer layers (spec 9.3)."""
    return sorted(set(np.linspace(0, num_layers - 1, 4).round().astype(int).tolist()))


# ---- experts of documents and domains


def experts_figure(of: Coverage) -> bytes:
    """Domains by layers: experts that carry 90 % of a document's slots, effective experts of a
    document, and those of the whole domain. One scale of colours for all."""
    slots = of.use["slots"]
    panels = (
        ("one document:\nexperts that carry 90 %", slots["document"]["carry_90_experts"]),
        ("one document:\neffective experts", slots["document"]["effective_experts"]),
        ("whole domain:\neffective experts", slots["domain"]["effective_experts"]),
    )
    most = max(of.routed_experts_per_layer)

    def draw(figure: Figure) -> None:
        columns = figure.subplots(1, len(panels), sharey=True)
        for axes, (title, table_JL) in zip(columns, panels, strict=True):
            image = _heatmap(axes, table_JL, 0, most, digits=0 if most > 20 else 1)
            axes.set(title=title, xlabel="layer")
            axes.set_xticks(*_ticks(list(map(str, of.layers))))
        columns[0].set_yticks(range(len(of.names)), _names(of.names))
        _head(figure, of, "how many experts are used")
        figure.colorbar(image, ax=columns, label=f"routed experts, of {most} in a layer")

    width = max(1.7, 0.36 * len(of.layers) + 0.3)
    return png(draw, (3 * width + 3.2, 0.27 * len(of.names) + 1.6))


def experts_csv(of: Coverage) -> str:
    """One line a domain, layer, `slots` or `probability`, and one `document` or `domain`."""
    names = list(of.use["slots"]["domain"])
    rows = [
        (domain, layer, measure, scope, *(float(numbers[name][j, i]) for name in names))
        for j, domain in enumerate(of.names)
        for i, layer in enumerate(of.layers)
        for measure, scopes in of.use.items()
        for scope, numbers in scopes.items()
    ]
    return csv_text(("domain", "layer", "measure", "scope", *names), rows)


# ---- domains against domains


def cosine_figure(of: Coverage) -> bytes:
    """Cosine of the mean routing of every two domains at four layers."""
    shown = shown_layers(len(of.layers))
    lowest = float(of.cosine_LJJ[shown].min())

    def draw(figure: Figure) -> None:
        panels = _panels(figure, len(shown))
        for axes, place in zip(panels, shown, strict=True):
            image = _heatmap(axes, of.cosine_LJJ[place], min(lowest, 0.999), 1, digits=None)
            axes.set_title(f"layer {of.layers[place]}")
        _name_outside(panels, of.names)
        figure.colorbar(image, ax=panels, label="cosine of mean routing (1: the same experts)")
        _head(figure, of, "how alike the routing of two domains is")

    return png(draw, _panel_size(len(shown), len(of.names)))


def cosine_csv(of: Coverage) -> str:
    """One line a layer and pair of domains; all layers."""
    rows = [
        (layer, one, other, float(of.cosine_LJJ[i, a, b]))
        for i, layer in enumerate(of.layers)
        for a, one in enumerate(of.names)
        for b, other in enumerate(of.names)
    ]
    return csv_text(("layer", "domain", "other_domain", "cosine"), rows)


def overlap_figure(of: Coverage) -> bytes:
    """Jaccard index of what halves of two domains choose, a panel for each share kept."""

    def draw(figure: Figure) -> None:
        panels = _panels(figure, len(of.overlap))
        for axes, (keep, overlap) in zip(panels, of.overlap.items(), strict=True):
            image = _heatmap(axes, overlap.jaccard, 0, 1, digits=None)
            within = "–" if overlap.within is None else f"{overlap.within:.2f}"
            between = "–" if overlap.between is None else f"{overlap.between:.2f}"
            axes.set_title(
                f"{float(keep):.3g} of the experts kept\ntwo domains {between}, halves of one "
                f"{within},\nchance {overlap.chance:.2f} ± {overlap.chance_deviation:.2f}"
            )
        _name_outside(panels, of.names)
        figure.colorbar(
            image, ax=panels, label="Jaccard index of chosen experts (diagonal: halves of one)"
        )
        _head(figure, of, "experts that two domains would both choose")

    return png(draw, _panel_size(len(of.overlap), len(of.names)))


def overlap_csv(of: Coverage) -> str:
    """One line a share kept and pair of domains."""
    rows = [
        (
            keep,
            one,
            other,
            float(overlap.jaccard[a, b]) if np.isfinite(overlap.jaccard[a, b]) else "",
            overlap.chance,
            overlap.chance_deviation,
        )
        for keep, overlap in of.overlap.items()
        for a, one in enumerate(of.names)
        for b, other in enumerate(of.names)
    ]
    header = ("keep", "domain", "other_domain", "jaccard", "chance", "chance_standard_deviation")
    return csv_text(header, rows)


# ---- experts against experts


def together_figure(of: Coverage) -> bytes:
    """How often two experts share a pool, times chance, at four layers; experts by group, and each
    group with the domains that use it most."""
    shown = [of.together[place] for place in shown_layers(len(of.together))]

    def draw(figure: Figure) -> None:
        panels = _panels(figure, len(shown))
        for axes, bank in zip(panels, shown, strict=True):
            order = [expert for experts, _ in groups_of(of, bank) for expert in experts]
            lift_NN = lift(bank.counts_NN)[np.ix_(order, order)]
            image = axes.imshow(
                np.log2(np.clip(lift_NN, *LIFTS)), vmin=0, vmax=np.log2(LIFTS[1]), cmap="Blues"
            )
            axes.grid(False)
            start, centres, labels = 0, [], []
            for experts, domains in groups_of(of, bank):
                _box(axes, start, len(experts))
                centres.append(start + (len(experts) - 1) / 2)
                labels.append(", ".join(_names([name for name, _ in domains[:2]])))
                start += len(experts)
            axes.set_yticks(centres, labels, fontsize="small")
            axes.set_xticks(*_ticks(list(map(str, order)), most=32), fontsize=6, rotation=90)
            held_out = bank.held_out_modularity
            told = "" if held_out is None else f", modularity {held_out:.2f} on other documents"
            axes.set_title(f"layer {bank.layers[0]}{told}")
            axes.set_xlabel("expert")
        bar = figure.colorbar(image, ax=panels, label="pools that hold both experts, times chance")
        bar.set_ticks([0, 1, 2], labels=["1 or less", "2", "4 or more"])
        _head(figure, of, "experts in the same pools; groups, and the domains that use them most")

    wide, tall = _grid(len(shown))
    return png(draw, (5.4 * wide + 1, 4.0 * tall))


def together_csv(of: Coverage) -> str:
    """One line a pair of experts, of the layers that are drawn."""
    rows = []
    for place in shown_layers(len(of.together)):
        bank = of.together[place]
        chance_NN, lift_NN = by_chance(bank.counts_NN), lift(bank.counts_NN)
        for a, b in zip(*np.triu_indices(len(lift_NN), 1), strict=True):
            times = float(lift_NN[a, b])
            rows.append(
                (
                    bank.layers[0],
                    int(a),
                    int(b),
                    int(bank.group_N[a]),
                    int(bank.group_N[b]),
                    int(bank.counts_NN[a, b]),
                    float(chance_NN[a, b]),
                    times if np.isfinite(times) else "",
                    float(np.log2(times)) if times > 0 else "",
                )
            )
    header = ("layer", "expert", "other_expert", "group", "other_group", "pools", "pools_by_chance")
    return csv_text((*header, "lift", "pmi_bits"), rows)


# ---- over the steps of a run


def steps_figure(run: RunCoverage) -> bytes:
    """When subsets become those of the last step, domains part ways and documents narrow."""
    steps = [step.step for step in run.steps]
    middle = list(run.last.overlap)[len(run.last.overlap) // 2]

    def draw(figure: Figure) -> None:
        left, centre, right = figure.subplots(1, 3)
        for name in run.last.names:
            values = [step.subset_jaccard[middle][name] for step in run.steps]
            left.plot(steps, values, color="0.75", linewidth=0.8)
        for color, keep in zip(COLORS, run.last.overlap, strict=False):
            values = [step.subset_jaccard_mean[keep] for step in run.steps]
            name = f"{float(keep):.3g} kept"
            left.plot(steps, values, "o-", color=color, markersize=3.5, label=name)
        overlap = run.last.overlap[middle]
        for value, line, name in (
            (overlap.within, "--", "halves of documents"),
            (overlap.chance, ":", "chance"),
        ):
            if value is not None:
                left.axhline(value, color="0.3", linestyle=line, linewidth=1, label=name)
        left.set(title="a domain's experts against\nthose of the last step", ylim=(0, 1.02))
        left.set_ylabel(f"Jaccard index (grey: domains, {float(middle):.3g} kept)")
        for color, name, series in (
            (COLORS[0], "two domains", [step.between[middle] for step in run.steps]),
            (COLORS[1], "halves of one", [step.within[middle] for step in run.steps]),
            (COLORS[2], "cosine of two domains", [step.domain_cosine for step in run.steps]),
        ):
            if any(value is not None for value in series):
                centre.plot(steps, _gaps(series), "o-", color=color, markersize=3.5, label=name)
        centre.axhline(overlap.chance, color="0.3", linestyle=":", linewidth=1, label="chance")
        centre.set(title=f"domains part ways\n({float(middle):.3g} kept)", ylim=(0, 1.02))
        centre.set_ylabel("Jaccard index; cosine of routing")
        for color, name, experts in (
            (COLORS[0], "one document", [s.document_effective_experts for s in run.steps]),
            (COLORS[1], "whole domain", [s.domain_effective_experts for s in run.steps]),
        ):
            right.plot(steps, experts, "o-", color=color, markersize=3.5, label=name)
        right.set(title="effective experts\n(mean over domains and layers)")
        right.set_ylim(0, max(run.last.routed_experts_per_layer))
        right.set_ylabel(f"routed experts, of {max(run.last.routed_experts_per_layer)}")
        for axes in (left, centre, right):
            axes.set_xlabel("step")
            # Below: lines may be anywhere.
            axes.legend(
                fontsize="small",
                frameon=False,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.15),
                ncols=2,
            )

    return png(draw, (12, 4.8))


def steps_csv(run: RunCoverage) -> str:
    """One line a step and number; of all domains, or of the one that is named."""
    rows: list[tuple[object, ...]] = []
    for step in run.steps:
        for keep, by_domain in step.subset_jaccard.items():
            rows += [(step.step, name, keep, "subset_jaccard", v) for name, v in by_domain.items()]
            for number in ("subset_jaccard_mean", "between", "within"):
                rows.append((step.step, "", keep, number, getattr(step, number)[keep]))
        rows += [
            (step.step, name, "", "routing_cosine", v) for name, v in step.routing_cosine.items()
        ]
        for number in (
            "routing_cosine_mean",
            "domain_cosine",
            "document_effective_experts",
            "domain_effective_experts",
            "held_out_modularity",
        ):
            rows.append((step.step, "", "", number, getattr(step, number)))
    return csv_text(("step", "domain", "keep", "number", "value"), rows)


# ---- parts


def _heatmap(
    axes: Axes, table: np.ndarray, low: float, high: float, digits: int | None
) -> AxesImage:
    """A table as colours, with its numbers where there is room for them."""
    image = axes.imshow(table, vmin=low, vmax=high, cmap=SEQUENTIAL, aspect="auto")
    axes.grid(False)
    axes.tick_params(length=0)
    if digits is not None and table.shape[1] <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                light = (value - low) / max(high - low, 1e-30) > 0.6
                axes.text(
                    column,
                    row,
                    f"{value:.{digits}f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="black" if light else "white",
                )
    return image


def _head(figure: Figure, of: Coverage, what: str) -> None:
    figure.suptitle(f"Step {of.step:,}: {what}", fontsize="large")


def _grid(count: int) -> tuple[int, int]:
    """Columns and rows of so many panels."""
    return (2, -(-count // 2)) if count in (2, 4) else (min(count, 3), -(-count // 3))


def _panels(figure: Figure, count: int) -> list[Axes]:
    columns, rows = _grid(count)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return panels[:count]


def _panel_size(count: int, num_names: int) -> tuple[float, float]:
    columns, rows = _grid(count)
    side = max(2.2, 0.19 * num_names + 0.5)
    return columns * side + 3.2, rows * (side + 0.5) + 1.4


def _name_outside(panels: Sequence[Axes], names: Sequence[str]) -> None:
    """Domains as labels of the panels at the left and at the bottom."""
    columns, rows = _grid(len(panels))
    labels = _names(names)
    for place, axes in enumerate(panels):
        axes.set_yticks(range(len(names)), labels if place % columns == 0 else [""] * len(names))
        at_bottom = place // columns == rows - 1 or place + columns >= len(panels)
        axes.set_xticks(range(len(names)), labels if at_bottom else [""] * len(names), rotation=90)
        axes.tick_params(labelsize=8)


def _names(names: Sequence[str]) -> list[str]:
    """Labels that are not longer than there is room for."""
    return [
        name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        for name in (" ".join(name.split()) for name in names)
    ]


def _ticks(labels: Sequence[str], most: int = 16) -> tuple[list[int], list[str]]:
    """Places and labels of an axis, not more than so many."""
    places = list(range(0, len(labels), -(-len(labels) // most)))
    return places, [labels[place] for place in places]


def _box(axes: Axes, start: int, length: int) -> None:
    """A frame around a group of a matrix."""
    from matplotlib.patches import Rectangle

    corner = (start - 0.5, start - 0.5)
    axes.add_patch(Rectangle(corner, length, length, fill=False, edgecolor="black", linewidth=0.9))


def _gaps(values: Sequence[float | None]) -> list[float]:
    """NaN, which a line leaves out, for what is not known."""
    return [float("nan") if value is None else value for value in values]
