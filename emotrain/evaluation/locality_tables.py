"""What `emotrain locality` says of one model, or of two side by side: tables, a picture and the
numbers of the picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emotrain.evaluation.locality import LocalityResult
from emotrain.evaluation.plots import locality_figure
from emotrain.evaluation.tables import plain
from emotrain.files import json_text, write_whole
from emotrain.tables import Table, csv_text

log = logging.getLogger("emotrain")

Models = Sequence[tuple[str, LocalityResult]]
"""(label, result); two models were measured with the same settings on the same documents."""

ARMS = {
    "static": "pinned",
    "static_domain": "pinned, own domain",
    "lru_cold": "LRU, cold",
    "lru_warm": "LRU, warm",
    "lru_mixed": "LRU, mixed",
}
"""What a reader calls the arms of a cache."""


def locality_json(models: Models) -> dict[str, Any]:
    """The first model's result, with the other's as `compared_with`."""
    (_, first), *others = models
    other = others[0][1].to_json() if others else None
    return {**first.to_json(), "compared_with": other}


def locality_tables(models: Models) -> list[Table]:
    """All that is shown; what sums it up comes last."""
    settings = models[0][1].settings
    smallest = str(min(settings.cache))
    by_layer = _rows_table(
        models,
        f"By layer, caches of {float(smallest):.3g} of the experts",
        ("layer",),
        lambda result: [((str(of["layer"]),), of) for of in result.layers],
        smallest,
    )
    by_domain = _rows_table(
        models,
        f"By domain, caches of {float(smallest):.3g} of the experts",
        ("domain", "documents", "tokens"),
        lambda result: [
            ((name, f"{result.documents[name]}", f"{result.tokens[name]:,}"), of)
            for name, of in result.domains.items()
        ],
        smallest,
    )
    return [by_layer, by_domain, _cache_table(models)]


def _cache_table(models: Models) -> Table:
    """Hit rates by size of cache, one line a model and size."""
    settings = models[0][1].settings
    arms = {**ARMS, **{f"sch_{length}": f"SCH {length}" for length in settings.segments}}
    rows = tuple(
        (
            *_label(models, label),
            f"{numbers['experts']:.3g}",
            f"{100 * numbers['share']:.3g} %",
            *(percent(numbers[f"{arm}_hit_rate"]) for arm in arms),
        )
        for label, result in models
        for numbers in result.overall["cache"].values()
    )
    return Table(
        "Hit rate in % by experts of a layer that are at hand, mean over layers: pinned ones, or "
        "an LRU cache (cold: empty before each document; warm: after documents of the same domain; "
        "mixed: of all domains in turn); SCH is the best of a segment of so many tokens",
        (*_label(models, "model"), "experts", "share", *arms.values()),
        rows,
        names=_names(models),
    )


def _rows_table(
    models: Models, title: str, header: tuple[str, ...], rows_of: Any, share: str
) -> Table:
    """Switch rate, SRP and the hit rates of one size of cache, for what `rows_of` lists."""
    segments = models[0][1].settings.segments
    rows = []
    for label, result in models:
        mean = (("mean", *([""] * (len(header) - 1))), result.overall)
        for first, numbers in [*rows_of(result), mean]:
            cache = numbers["cache"][share]
            rows.append(
                (
                    *_label(models, label),
                    *first,
                    percent(numbers["switch_rate"]),
                    *(plain(numbers["srp"][str(length)], 3) for length in segments),
                    *(percent(cache[f"{arm}_hit_rate"]) for arm in ARMS),
                )
            )
    return Table(
        f"{title}: experts that the token before did not use in %, SRP of segments of so many "
        f"tokens, hit rates in %",
        (
            *_label(models, "model"),
            *header,
            "new experts",
            *(f"SRP {length}" for length in segments),
            *ARMS.values(),
        ),
        tuple(rows),
        names=1 + _names(models),
    )


def _label(models: Models, label: str) -> tuple[str, ...]:
    return (label,) if len(models) > 1 else ()


def _names(models: Models) -> int:
    return int(len(models) > 1)


def percent(value: float | None) -> str:
    """A share as per cent, without the sign."""
    return plain(None if value is None else 100 * value, 1)


def curve_csv(models: Models) -> str:
    """The numbers of the picture: one line a model, arm and size of cache."""
    rows = (
        (label, point["experts"], point["share"], name.removesuffix("_hit_rate"), value)
        for label, result in models
        for point in result.curve
        for name, value in point.items()
        if name.endswith("_hit_rate")
    )
    return csv_text(("model", "experts", "share_of_experts", "arm", "hit_rate"), rows)


def write_locality(models: Models, folder: Path) -> list[Path]:
    """Write locality.json, .md, .csv and, where matplotlib is installed, .png; returns their
    paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json_text(locality_json(models), indent=1, ensure_ascii=False) + "\n",
        "md": "\n".join(table.markdown() for table in locality_tables(models)),
        "csv": curve_csv(models),
    }
    written = [
        write_whole(folder / f"locality.{ending}", text.encode()) for ending, text in texts.items()
    ]
    picture = folder / "locality.png"
    try:
        written.append(write_whole(picture, locality_figure(models)))
    except ModuleNotFoundError as error:
        # A picture from before would now stand beside other numbers.
        picture.unlink(missing_ok=True)
        log.warning("locality.png was not drawn: %s", error)
    return written
