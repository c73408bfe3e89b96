"""The folder that `emotrain coverage` writes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from emotrain.analysis.coverage_figures import (
    cosine_csv,
    cosine_figure,
    experts_csv,
    experts_figure,
    overlap_csv,
    overlap_figure,
    steps_csv,
    steps_figure,
    together_csv,
    together_figure,
)
from emotrain.analysis.coverage_steps import RunCoverage
from emotrain.analysis.coverage_tables import coverage_json, coverage_tables, group_table
from emotrain.errors import MissingPackageError
from emotrain.files import json_text, write_whole

log = logging.getLogger("emotrain")


def write_coverage(run: RunCoverage, folder: Path) -> list[Path]:
    """Write coverage.json and .md, the numbers of every picture (.csv) and, where matplotlib is
    installed, the picture (.png); returns their paths. Pictures of several domains, or of several
    steps, that an older result had and this one has not are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    of = run.last
    tables = [*coverage_tables(run), group_table(of)]
    json = json_text(coverage_json(run), indent=1, ensure_ascii=False) + "\n"
    markdown = "\n".join(table.markdown() for table in tables)
    written = [
        write_whole(folder / "coverage.json", json.encode()),
        write_whole(folder / "coverage.md", markdown.encode()),
    ]
    several, steps = len(of.names) > 1, len(run.steps) > 1
    pictures: dict[str, tuple[Callable[[], str], Callable[[], bytes]] | None] = {
        "experts": (lambda: experts_csv(of), lambda: experts_figure(of)),
        "cosine": (lambda: cosine_csv(of), lambda: cosine_figure(of)) if several else None,
        "overlap": (lambda: overlap_csv(of), lambda: overlap_figure(of)) if several else None,
        "together": (lambda: together_csv(of), lambda: together_figure(of)),
        "steps": (lambda: steps_csv(run), lambda: steps_figure(run)) if steps else None,
    }
    missing = None
    for name, parts in pictures.items():
        csv_file, png_file = folder / f"{name}.csv", folder / f"{name}.png"
        # A picture from before must not stand beside other numbers.
        png_file.unlink(missing_ok=True)
        if parts is None:
            csv_file.unlink(missing_ok=True)
            continue
        numbers, picture = parts
        written.append(write_whole(csv_file, numbers().encode()))
        try:
            written.append(write_whole(png_file, picture()))
        except MissingPackageError as error:
            missing = error
    if missing is not None:
        log.warning("pictures were not drawn: %s", missing)
    return written
