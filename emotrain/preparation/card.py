"""The dataset card: what a data set was made of and how, as `card` in its manifest and as
README.md.

Everything in it comes from the inputs and the options that decide the result, so that the card of
the same data is the same wherever, whenever and on however many processes it was made. Names and
labels are strangers' text: they are shown, never taken for markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_LISTED = 50
"""Files, domains or licences that the page lists; the manifest has all."""

MAX_LICENSES = 1000
"""Licences that are counted one by one; the others are counted together."""

MARKUP = re.compile(r"([\\`*_\[\]|~$#!@]|:(?=//)|(?<=www)\.)")


def escaped(text: object) -> str:
    """Any text as one line that Markdown shows as it is."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
    line = MARKUP.sub(r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fewer(counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Counts of licences, the largest first; those past MAX_LICENSES as one."""
    order = sorted(counts, key=lambda name: (-counts[name]["documents"], name))
    kept = {name: dict(counts[name]) for name in order[:MAX_LICENSES]}
    if rest := order[MAX_LICENSES:]:
        kept[f"{len(rest)} others"] = {
            key: sum(counts[name][key] for name in rest) for key in ("documents", "tokens")
        }
    return kept


def page(card: Mapping[str, Any]) -> str:
    """README.md."""
    return "\n".join(
        [
            "# Dataset card",
            "",
            f"Made by emotrain {escaped(card['emotrain'])} with `emotrain prepare`. A data set is "
            "read with `emotrain train`; `dataset.json` has all of this page, and the checksum of "
            "every shard, as JSON.",
            "",
            *_counts(card),
            *_sources(card),
            *_licenses(card),
            *_domains(card),
            *_tokenizer(card),
            *_filters(card),
            *_boundaries(card),
            *_settings(card),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], total: int) -> list[str]:
    lines = [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(map(escaped, row))} |" for row in rows),
    ]
    if total > len(rows):
        lines += ["", f"and {total - len(rows):,} more, in dataset.json"]
    return [*lines, ""]


def _counts(card: Mapping[str, Any]) -> list[str]:
    rows = [
        (split, f"{c['documents']:,}", f"{c['tokens']:,}", f"{c['shards']:,}", c["fingerprint"])
        for split, c in card["splits"].items()
    ]
    head = ("split", "documents", "tokens", "shards", "sha256 of its shards' sha256")
    return ["## Contents", "", *_table(head, rows, 0)]


def _sources(card: Mapping[str, Any]) -> list[str]:
    sources = card["sources"]
    rows = [
        (
            file["name"],
            f"{file['bytes']:,}",
            f"{file['documents']:,}",
            file["sha256"]
            if file["ranges"] == 1
            else f"{file['sha256']} of {file['ranges']} ranges",
        )
        for file in sources[:MAX_LISTED]
    ]
    total = sum(file["bytes"] for file in sources)
    return [
        "## Sources",
        "",
        f"{len(sources):,} files of {total:,} bytes. Of a file that was read in ranges, the "
        "checksum is the sha256 of the ranges' sha256, one after the other.",
        "",
        *_table(("file", "bytes", "documents", "sha256"), rows, len(sources)),
    ]


def _licenses(card: Mapping[str, Any]) -> list[str]:
    counts = card["licenses"]
    if not counts:
        return ["## Licences", "", "No document names one.", ""]
    rows = [(n, f"{c['documents']:,}", f"{c['tokens']:,}") for n, c in counts.items()]
    unnamed = card["documents"] - sum(c["documents"] for c in counts.values())
    return [
        "## Licences",
        "",
        f"As the field {escaped(card['settings']['fields']['license'])} names them; "
        f"{unnamed:,} documents name none.",
        "",
        *_table(("licence", "documents", "tokens"), rows[:MAX_LISTED], len(rows)),
    ]


def _domains(card: Mapping[str, Any]) -> list[str]:
    rows = [
        (split, name, f"{c['documents']:,}", f"{c['tokens']:,}")
        for split, domains in card["domains"].items()
        for name, c in domains.items()
    ]
    head = ("split", "domain", "documents", "tokens")
    return ["## Domains", "", *_table(head, rows[:MAX_LISTED], len(rows))]


def _tokenizer(card: Mapping[str, Any]) -> list[str]:
    t = card["tokenizer"]
    return [
        "## Tokenizer",
        "",
        f"{escaped(t['model'])} of {t['vocab_size']:,} tokens ({escaped(t['origin'])}), a document "
        f"ends in {escaped(t['eos_token'])} ({t['eos_id']}), sha256 {t['sha256']}, encoded by "
        f"tokenizers {escaped(t['library'])}.",
        "",
    ]


def _filters(card: Mapping[str, Any]) -> list[str]:
    filters = card["filters"]
    rows = [
        (f["name"], "; ".join(f"{k} {v}" for k, v in f["parameters"].items()), f"{f['removed']:,}")
        for f in filters
    ]
    skipped = [(reason, "", f"{n:,}") for reason, n in card["skipped_documents"].items() if n]
    head = ("filter", "parameters", "documents removed")
    lines = ["## Left out", ""]
    if not rows and not skipped:
        return [*lines, "Nothing.", ""]
    return [*lines, *_table(head, rows + [(f"skipped: {a}", b, c) for a, b, c in skipped], 0)]


def _boundaries(card: Mapping[str, Any]) -> list[str]:
    found = card["boundaries"]
    if not found["documents"]:
        return []
    quantiles = ", ".join(f"{q}: {n:,}" for q, n in found["tokens_quantiles"].items())
    return [
        "## Boundaries of documents",
        "",
        f"Of {found['documents']:,} sampled documents, lengths in tokens by quantile are "
        f"{quantiles}; {found['longer_than_window']:.1%} are longer than a window of "
        f"{found['window']:,} tokens.",
        "",
        *(f"- {escaped(line)}" for line in card["warnings"]),
        *([""] if card["warnings"] else []),
    ]


def _settings(card: Mapping[str, Any]) -> list[str]:
    rows = [(name, value) for name, value in card["settings"].items()]
    return ["## Settings", "", *_table(("option", "value"), rows, 0)]
