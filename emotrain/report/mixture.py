"""What a mixture reads over a run: tokens, share, passes and repetition of each source, as a table,
a picture and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from emotrain.data.mixture import MANY_PASSES, Mixture
from emotrain.evaluation.figures import COLORS, line_look, png
from emotrain.evaluation.plots import shown
from emotrain.report.charts import short
from emotrain.tables import Table, csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 65
"""Points of a curve over the run."""
HATCHES = ("", "//", "..", "xx")
"""Of areas after each round of colours."""


def run_of(mixture: Mixture, tokens: int) -> dict[str, Any]:
    """What a run of so many tokens reads of each source; counts are exact.

    Returns:
        Plain values for JSON. `weights` are those of each stage, `share` that of the whole run,
        `repeated_tokens` what was read before.
    """
    length = mixture.sequence_length
    end = tokens // length
    counts, epochs = mixture.order.counts(end), mixture.epochs(end)
    sources, warnings = [], []
    for index, source in enumerate(mixture.sources):
        size = source.loader.num_sequences
        most = None if source.max_epochs is None else float(source.max_epochs)
        sources.append(
            {
                "name": source.name,
                **mixture.described()[source.name],
                "run_tokens": counts[index] * length,
                "share": counts[index] / max(1, end),
                "epochs": epochs[index],
                "repeated_tokens": max(0, counts[index] - size) * length,
                "max_epochs": most,
            }
        )
        if most is not None and epochs[index] > most:
            warnings.append(
                f"{source.name}: {epochs[index]:.3g} passes, and max_epochs is {most:g}: such a "
                f"run is refused"
            )
        elif epochs[index] > MANY_PASSES:
            warnings.append(
                f"{source.name}: {epochs[index]:.3g} passes; above about {MANY_PASSES} repeated "
                f"tokens teach less than new ones"
            )
    return {
        "mixture": str(mixture.path),
        "sequence_length": length,
        "tokens": end * length,
        "sources": sources,
        "stages": [stage.start * mixture.order.span * length for stage in mixture.order.stages],
        "warnings": warnings,
    }


def table(run: dict[str, Any]) -> Table:
    """A row for each source."""
    rows = tuple(
        (
            source["name"],
            f"{source['tokens']:,}",
            f"{source['run_tokens']:,}",
            f"{source['share']:.2%}",
            f"{source['epochs']:.3g}",
            f"{source['repeated_tokens'] / max(1, source['run_tokens']):.0%}",
            source["path"] + (f", domain {source['domain']}" if source["domain"] else ""),
        )
        for source in run["sources"]
    )
    stages = len(run["stages"])
    title = f"{run['mixture']} over {run['tokens']:,} tokens" + (
        f", in {stages} stages" if stages > 1 else ""
    )
    header = ("source", "tokens of it", "tokens read", "share", "passes", "repeated", "data")
    return Table(title, header, rows, notes=1)


def curves(mixture: Mixture, tokens: int) -> list[dict[str, Any]]:
    """Weight, share up to here, tokens read and passes of each source at points of a run, those
    where a stage begins among them."""
    span, end = mixture.order.span, tokens // mixture.sequence_length
    starts = [stage.start * span for stage in mixture.order.stages]
    points = {int(p) for p in np.linspace(0, end, POINTS)} | {s for s in starts if s < end}
    rows = []
    for position in sorted(points):
        number_of_stage = sum(start <= position for start in starts) - 1
        weights = mixture.order.stages[number_of_stage].weights
        counts, epochs = mixture.order.counts(position), mixture.epochs(position)
        rows += [
            {
                "tokens": position * mixture.sequence_length,
                "source": name,
                "weight": float(weights[index]),
                "tokens_read": counts[index] * mixture.sequence_length,
                "epochs": epochs[index],
            }
            for index, name in enumerate(mixture.names)
        ]
    return rows


def curves_csv(rows: list[dict[str, Any]]) -> str:
    return csv_text(tuple(rows[0]), (tuple(row.values()) for row in rows))


def figure(rows: list[dict[str, Any]]) -> bytes:
    """Shares of the sources over the run, and passes over each; `rows` are those of `curves`."""
    names = list(dict.fromkeys(row["source"] for row in rows))
    of = {name: [row for row in rows if row["source"] == name] for name in names}
    x = [row["tokens"] for row in of[names[0]]]

    def draw(drawn: Figure) -> None:
        left, right = drawn.subplots(1, 2)
        bottom = np.zeros(len(x))
        for index, name in enumerate(names):
            top = bottom + [row["weight"] for row in of[name]]
            left.fill_between(
                x, bottom, top, step="post", color=COLORS[index % len(COLORS)], alpha=0.75,
                hatch=HATCHES[index // len(COLORS) % len(HATCHES)], edgecolor="white",
                linewidth=0.6, label=shown(name),
            )  # fmt: skip
            bottom = top
            passes = [row["epochs"] for row in of[name]]
            right.plot(x, passes, linewidth=1.6, label=shown(name), **line_look(index))
            right.annotate(f" {passes[-1]:.3g}", (x[-1], passes[-1]), fontsize="small", va="center")
        left.set(title="share of the tokens read", ylim=(0, 1), ylabel="share")
        most = max(row["epochs"] for row in rows)
        if most > MANY_PASSES / 2:
            right.axhline(MANY_PASSES, color="0.4", linewidth=0.8, linestyle=":")
            right.annotate(
                f"{MANY_PASSES} passes", (x[0], MANY_PASSES), fontsize="small", va="bottom"
            )
        right.set(title="passes over each source", ylim=(0, max(1.0, 1.08 * most)), ylabel="passes")
        right.margins(x=0.08)
        for axes in (left, right):
            axes.xaxis.set_major_formatter(short)
            axes.set_xlabel("tokens of the run")
        left.set_xlim(x[0], max(x[-1], 1))
        handles, labels = left.get_legend_handles_labels()
        drawn.legend(
            handles, labels, loc="outside upper left", ncols=min(6, len(names)), frameon=False
        )

    return png(draw, (9.6, 3.8 + 0.22 * ((len(names) - 1) // 6)))
