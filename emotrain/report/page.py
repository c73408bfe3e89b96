"""The page of a run or several: `emotrain report RUN`. It is one file, loads nothing, and needs no
script. What it says is put together here; how it looks is `report.html.j2`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from emotrain.config import Config, config_to_dict
from emotrain.errors import MissingPackageError
from emotrain.files import json_text, write_whole
from emotrain.report.charts import Plot
from emotrain.report.facts import (
    data_tables,
    end_table,
    environment_table,
    headline,
    settings_table,
    starts_table,
)
from emotrain.report.findings import Finding, findings
from emotrain.report.panels import Panels
from emotrain.report.runs import Run, read_runs
from emotrain.report.subsets import subset_commands, subset_plots, subset_tables

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Report:
    """A page that was written."""

    path: Path
    runs: list[str]
    """Labels of the runs on it."""
    findings: list[Finding]


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    base: tuple[str, Config] | None = None,
) -> Report:
    """Write the page of the runs in these folders, from what lies there. A run without metrics or
    evaluation yet gets a page without that part.

    Args:
        out: the file; None: report.html of the first run, or comparison.html for several.
        base: name and settings that the runs' are compared with; None: the defaults.
    Raises:
        FileNotFoundError: not a run folder. ValueError: a file of a run is not readable.
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    template = page_template(TEMPLATE)
    runs = read_runs(folders)
    found = findings(runs)
    page = template.render(_contents(runs, found, base))
    name = "report.html" if len(runs) == 1 else "comparison.html"
    path = Path(out) if out else runs[0].folder / name
    # A name may hold half of a surrogate pair, which is no text.
    return Report(
        write_whole(path, page.encode("utf-8", "replace")), [run.label for run in runs], found
    )


def _contents(
    runs: list[Run], found: list[Finding], base: tuple[str, Config] | None
) -> dict[str, Any]:
    panels, alone = Panels(runs), len(runs) == 1
    others, left_out = panels.others()
    evaluated = subset_plots(runs)
    sections = [
        ("training", "Training", panels.training()),
        ("experts", "Experts and load", panels.experts()),
        ("subset-curves", "Expert subsets", evaluated),
        ("during", "Held-out losses over steps", panels.evaluated()),
        ("speed", "Speed and memory", panels.speed()),
        ("others", "Other metrics", others),
    ]
    loads = panels.loads()
    known = {plot.name: plot.title for _, _, plots in sections for plot in plots}
    tables = [settings_table(runs)]
    if base is not None:
        tables.append(settings_table(runs, base[1], base[0]))
    elif not alone:
        tables.append(settings_table(runs, Config(), "the defaults"))
    return {
        "title": " · ".join(run.label for run in runs),
        "alone": alone,
        "headlines": [
            (run.label, headline(run.config, run.history.last("tokens"))) for run in runs
        ],
        "findings": found,
        "known": known,
        "sections": {name: (title, plots) for name, title, plots in sections},
        "loads": loads,
        "left_out": left_out,
        "by_tokens": panels.by_tokens,
        "end": end_table(runs),
        "subset_tables": subset_tables(runs),
        "not_finite": [
            r.label for r in runs if r.evaluation and r.evaluation.mean.loss_nats is None
        ],
        "commands": subset_commands(runs[0].folder, runs[0].config, runs[0].evaluation)
        if alone
        else [],
        "notes": [note for run in runs for note in _notes(run, alone)],
        "settings": tables,
        "all_settings": [(r.label, json_text(config_to_dict(r.config), indent=2)) for r in runs],
        "data": [(run.label, *data_tables(run)) for run in runs],
        "environment": environment_table(runs),
        "starts": [starts_table(run) for run in runs if run.starts],
        "no_environment": [run.label for run in runs if not run.starts],
        "has_metrics": any(run.history.series for run in runs),
        "data_uri": data_uri,
    }


def _notes(run: Run, alone: bool) -> list[str]:
    """What of the metrics was not taken as it stands."""
    history, notes = run.history, []
    of_run = "" if alone else f" of {run.label}"
    if history.dropped_lines:
        notes.append(
            f"{history.dropped_lines} unreadable lines of metrics.jsonl{of_run} are left out."
        )
    if history.repeated_steps:
        notes.append(
            f"{history.repeated_steps} steps stand more than once in metrics.jsonl{of_run}: the "
            f"run went back and did them again. The last record of a step counts."
        )
    if history.series and run.loads is None and run.moe_layers:
        notes.append(
            f"No expert_loads.jsonl{of_run or ' in the run'}: it is from before the load of every "
            f"expert was written, and has no heatmaps."
        )
    return notes


def data_uri(plot: Plot) -> str:
    """The numbers of a plot as an address that a link can save."""
    return "data:text/csv;charset=utf-8," + quote(plot.csv, safe=",-._~:;()/")


def page_template(name: str) -> Any:
    """A template of this folder; its values are text and never markup.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingPackageError(
            "the report needs jinja2, which is not installed; pip install 'emotrain[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)
