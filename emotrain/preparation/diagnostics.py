"""Whether the boundaries of documents mean anything. A document is what shares a pool of experts,
so that EMO has nothing to learn where texts were cut to one length, lines were taken for documents,
or several documents for one.

All numbers are of the train and valid documents with the smallest places (see `spill`), which is a
uniform sample that does not depend on who encoded them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from emotrain.data.survey import LESSON

SAMPLE = 2**16
"""Documents that are looked at, about."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

MIN_DOCUMENTS = 50
"""With fewer documents nothing is called artificial."""
SAME_LENGTH, SAME_LINE, MARKED, SHORT_TOKENS = 0.5, 0.5, 0.01, 8
"""Shares of documents, and a median length, from which boundaries look artificial."""
LEAST_LENGTH = 64
"""Equal lengths below this say nothing, in tokens or characters."""


@dataclass(frozen=True)
class Sampled:
    """Columns of sampled documents, all [n]."""

    tokens: np.ndarray
    """With EOS."""
    characters: np.ndarray
    first_line: np.ndarray
    last_line: np.ndarray
    """Hashes of lines, 0 where the document has one line."""
    marked: np.ndarray


def threshold(documents: int) -> np.uint64:
    """Places below it are the sample."""
    share = min(1.0, SAMPLE / max(1, documents))
    return np.uint64(min(int(share * 2**64), 2**64 - 1))


def collect(batches: Iterable[Any], least: np.uint64) -> Sampled:
    """The sampled documents of record batches of spills."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Sampled.__annotations__}
    for batch in batches:
        rows = np.flatnonzero(batch.column("place").to_numpy() <= least)
        lengths = np.diff(batch.column("tokens").offsets.to_numpy())
        columns["tokens"].append(lengths[rows])
        for name in columns.keys() - {"tokens"}:
            columns[name].append(batch.column(name).to_numpy()[rows])
    empty = np.zeros(0, np.int64)
    return Sampled(
        **{name: np.concatenate(found) if found else empty for name, found in columns.items()}
    )


def measure(sample: Sampled, window: int) -> dict[str, Any]:
    """What stands in the report and the card."""
    count = len(sample.tokens)
    if not count:
        return {"documents": 0, "window": window}
    longer = sample.tokens > window
    length, same = _commonest(sample.tokens)
    characters, same_characters = _commonest(sample.characters)
    several = sample.first_line != 0
    return {
        "documents": count,
        "window": window,
        "tokens_quantiles": {
            f"{q:g}": int(np.quantile(sample.tokens, q, method="nearest")) for q in QUANTILES
        },
        "tokens_max": int(sample.tokens.max()),
        "longer_than_window": _share(longer),
        "tokens_in_longer": round(float(sample.tokens[longer].sum() / sample.tokens.sum()), 4),
        "commonest_tokens": length,
        "commonest_tokens_share": same,
        "commonest_tokens_multiples": _multiples(sample.tokens - 1, length - 1),
        "commonest_characters": characters,
        "commonest_characters_share": same_characters,
        "commonest_characters_multiples": _multiples(sample.characters, characters),
        "several_lines": _share(several),
        "same_first_line": _commonest(sample.first_line[several])[1] if several.any() else 0.0,
        "same_last_line": _commonest(sample.last_line[several])[1] if several.any() else 0.0,
        "end_mark_inside": _share(sample.marked & 1 > 0),
        "end_mark_twice": _share(sample.marked & 2 > 0),
    }


def warnings(found: dict[str, Any]) -> list[str]:
    """Why boundaries look artificial, a line each, with the numbers and what helps."""
    if found["documents"] < MIN_DOCUMENTS:
        return []
    said = []
    for what, size in (
        ("tokens", found["commonest_tokens"]),
        ("characters", found["commonest_characters"]),
    ):
        share = found[f"commonest_{what}_share"]
        multiples = found[f"commonest_{what}_multiples"]
        if size >= LEAST_LENGTH and max(share, multiples) >= SAME_LENGTH:
            said.append(
                f"{share:.0%} of the documents have the very same length of {size:,} {what}, "
                f"{multiples:.0%} a multiple of it: they look cut; give whole documents, or join "
                f"the pieces with --join-field"
            )
            break
    median = found["tokens_quantiles"]["0.5"]
    if median <= SHORT_TOKENS:
        said.append(
            f"half of the documents have {median} tokens or fewer: lines look taken for documents; "
            f"join them with --join-field, or --boundary none"
        )
    for which in ("first", "last"):
        share = found[f"same_{which}_line"]
        if share >= SAME_LINE and found["several_lines"] >= SAME_LINE:
            said.append(
                f"{share:.0%} of the documents of several lines have the very same {which} line: "
                f"they look like one source, or a frame around the text; remove it"
            )
    if found["end_mark_inside"] >= MARKED:
        said.append(
            f"{found['end_mark_inside']:.1%} of the texts hold a mark of the end of a document: "
            f"several look put together; cut them with --boundary 'marker:<|endoftext|>'"
        )
    if found["end_mark_twice"] >= MARKED:
        said.append(
            f"{found['end_mark_twice']:.1%} of the texts end in a mark of the end of a document, "
            f"and prepare adds its own: it is spelled in characters and learned as text; remove it"
        )
    return [f"boundaries look artificial: {line}. {LESSON}" for line in said]


def _share(found: np.ndarray) -> float:
    return round(float(found.mean()), 4)


def _commonest(values: np.ndarray) -> tuple[int, float]:
    """The commonest value, the smallest of several, and its share."""
    found, counts = np.unique(values, return_counts=True)
    best = int(counts.argmax())
    return int(found[best]), round(float(counts[best] / len(values)), 4)


def _multiples(lengths: np.ndarray, unit: int) -> float:
    """Share of lengths that are a multiple of one that is long enough to say something."""
    return _share(lengths % unit == 0) if unit >= LEAST_LENGTH else 0.0
