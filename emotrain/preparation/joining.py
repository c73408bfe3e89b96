"""The second half of `prepare`: encoded pieces become shards, a card and a manifest."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

import emotrain
from emotrain.data.document_filters import LANGUAGE_CHARACTERS
from emotrain.data.documents import REASONS, warn_of_nothing
from emotrain.data.manifest import CARD, SPLITS, TOKENIZER, write_manifest
from emotrain.errors import UserError
from emotrain.files import sha256_of
from emotrain.preparation import diagnostics
from emotrain.preparation.card import fewer, page
from emotrain.preparation.deduplicate import find_duplicates
from emotrain.preparation.shuffle import DUPLICATES, Placing, Shuffler, read_shard
from emotrain.preparation.spill import Buckets, segments
from emotrain.preparation.work import Work
from emotrain.preparation.workers import Job, do_all

log = logging.getLogger("emotrain")

FILTERS = ("where", "language", "min_tokens", "max_tokens", "duplicate")
"""Why documents are left out that nothing is wrong with."""

SMALL_TOKENS = 2**24
"""Tokens up to which shards are written without workers."""

MAX_WRITERS = 8
"""Shards that are written at a time; each is held in memory twice."""


def join_pieces(work: Work) -> dict[str, Any]:
    """Make the data set, but for its name. Returns the report."""
    pieces = _all_pieces(work)
    skipped, filtered, conditions = (
        Counter[str](),
        Counter[str](),
        Counter[str](),
    )
    for piece in pieces:
        skipped.update(piece["skipped"])
        filtered.update(piece["filtered"])
        conditions.update(piece["conditions"])
    _check_fields(work, pieces)
    kept = _without_duplicates(work, pieces, filtered)
    shards = _write_shards(work, pieces, kept, sum(piece["tokens"] for piece in pieces))
    splits = _splits(shards)
    if not splits["train"]["shards"]:
        lost = ", ".join(f"{n} {reason}" for reason, n in (skipped + filtered).items())
        raise UserError(
            f"no train documents in {len(work.files)} files (skipped: {lost or 'none'}); check the "
            f"inputs and the field names"
        )
    found, warnings = _boundaries(work, pieces)
    counted = {reason: skipped[reason] for reason in REASONS}
    removed = {reason: filtered[reason] for reason in FILTERS}
    card = _card(work, pieces, splits, counted, removed, conditions)
    card |= {"boundaries": found, "warnings": warnings, "licenses": _licenses(shards)}
    data, recipe = work.staging.data, work.recipe
    work.staging.remove_partial()
    (data / CARD).write_text(page(card), encoding="utf-8")
    write_manifest(
        data,
        vocab_size=work.encoder.vocab_size,
        eos_id=work.encoder.eos_id,
        eos_token=recipe.eos_token,
        splits=splits,
        skipped_documents=counted,
        settings={
            "seed": recipe.seed,
            "valid_fraction": recipe.valid_fraction,
            "shard_tokens": recipe.shard_tokens,
            "input_files": work.names,
        },
        card=card,
    )
    report = _report(work, splits, counted, removed)
    report["text_bytes"] = sum(piece["text_bytes"] for piece in pieces)
    deduplication = recipe.deduplication
    if deduplication:
        report["deduplication"] = deduplication.described()
    return report | {"boundaries": found, "warnings": warnings}


def _all_pieces(work: Work) -> list[dict[str, Any]]:
    """What is known of each piece. Raises: UserError, naming parts that are missing."""
    known = work.known(range(len(work.pieces)))
    missing = [number for number, piece in known.items() if piece is None]
    if missing:
        count = work.staging.parts() or 1
        parts = [
            f"{which}/{count}"
            for which in range(1, count + 1)
            if not set(missing).isdisjoint(work.numbers((which, count)))
        ]
        raise UserError(
            f"{work.staging.out}: {len(missing)} of {len(known)} pieces are missing, of the parts "
            f"{', '.join(parts)}; make them with --part, then join"
        )
    return [piece for piece in known.values() if piece is not None]


def _check_fields(work: Work, pieces: list[dict[str, Any]]) -> None:
    """Refuse a named field that no record had; name files that gave nothing."""
    reader = work.recipe.reader()
    documents, lost = Counter[int](), Counter[int]()
    for piece in pieces:
        reader.seen |= set(piece["seen"])
        for span in piece["spans"]:
            documents[span["file"]] += span["documents"] + span["filtered"]
            lost[span["file"]] += span["lost"]
    for file, count in sorted(lost.items()):
        if count and not documents[file]:
            warn_of_nothing(work.files[file], count)
    reader.check_fields()


def _without_duplicates(
    work: Work, pieces: list[dict[str, Any]], filtered: Counter[str]
) -> Counter[int]:
    """Documents of each bucket that stay. Writes down which do not."""
    folder, wanted = work.staging.folder, work.recipe.deduplication
    kept = Counter[int]()
    for piece in pieces:
        kept.update({int(bucket): count for bucket, count in piece["buckets"].items()})
    if wanted is None:
        return kept
    first, width = Placing.of(pieces).first, wanted.key_width
    work.bar.start("finding duplicates", 1)

    def read() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in range(len(pieces)):
            for batch in segments(folder, number):
                places = first[number] + batch.column("ordinal").to_numpy().astype(np.int64)
                keys = batch.column("key").flatten().to_numpy().reshape(-1, width)
                yield places, keys

    total = sum(piece["documents"] for piece in pieces)
    dropped = find_duplicates(wanted, total, read)
    for number in range(len(pieces)):
        for batch in segments(folder, number):
            places = first[number] + batch.column("ordinal").to_numpy().astype(np.int64)
            gone = batch.column("bucket").to_numpy()[dropped[places]]
            kept.subtract(
                dict(zip(*(v.tolist() for v in np.unique(gone, return_counts=True)), strict=True))
            )
    filtered["duplicate"] = int(dropped.sum())
    partial = folder / f"{DUPLICATES}.partial"
    with open(partial, "wb") as file:
        np.save(file, dropped)
    partial.replace(folder / DUPLICATES)
    return kept


def _write_shards(
    work: Work, pieces: list[dict[str, Any]], kept: Counter[int], tokens: int
) -> dict[str, list[dict[str, Any]]]:
    """Write the shards that are not there. Returns what is known of them, by split."""
    staging, recipe = work.staging, work.recipe
    buckets = Buckets(work.buckets, recipe.seed, recipe.valid_fraction)
    shuffler = Shuffler(staging.folder, staging.data, work.files, pieces)
    jobs: list[Job] = []
    counts = Counter[str]()
    for bucket, (split, _) in enumerate(buckets.names):
        for places in shuffler.cuts(bucket, recipe.shard_tokens) if kept[bucket] > 0 else ():
            number = counts[split]
            jobs.append({"bucket": bucket, "split": split, "shard": number, "places": places})
            counts[split] += 1

    def known(job: Job, hashed: bool) -> dict[str, Any] | None:
        return read_shard(staging.folder, staging.data, job["split"], job["shard"], hashed)

    missing = [job for job in jobs if known(job, hashed=work.resumed) is None]
    work.bar.start("writing shards", len(jobs), len(jobs) - len(missing))
    workers = 1 if tokens <= SMALL_TOKENS else min(work.workers, MAX_WRITERS)
    do_all(work.orders(), missing, workers, after=work.bar.advance)
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for job in jobs:
        found = known(job, hashed=False)
        assert found is not None, f"{job} is not there"
        shards[job["split"]].append(found)
    return shards


def _splits(shards: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each split, ShardInfos and counts by domain."""
    return {
        split: {
            "shards": [shard["info"] for shard in shards[split]],
            "domains": _summed([shard["domains"] for shard in shards[split]]),
        }
        for split in SPLITS
    }


def _licenses(shards: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, int]]:
    return fewer(_summed([shard["licenses"] for split in SPLITS for shard in shards[split]]))


def _summed(counts: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for names in counts:
        for name, count in names.items():
            so_far = total.setdefault(name, {"documents": 0, "tokens": 0})
            for key in so_far:
                so_far[key] += count[key]
    return {name: total[name] for name in sorted(total)}


def _boundaries(work: Work, pieces: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Numbers of the boundaries of documents, and what is odd about them, which is also logged."""
    least = diagnostics.threshold(sum(piece["documents"] for piece in pieces))
    batches = (
        batch for number in range(len(pieces)) for batch in segments(work.staging.folder, number)
    )
    found = diagnostics.measure(diagnostics.collect(batches, least), work.recipe.window)
    warnings = diagnostics.warnings(found)
    for line in warnings:
        log.warning("%s", line)
    return found, warnings


def _card(
    work: Work,
    pieces: list[dict[str, Any]],
    splits: dict[str, dict[str, Any]],
    skipped: dict[str, int],
    removed: dict[str, int],
    conditions: Counter[str],
) -> dict[str, Any]:
    import tokenizers

    encoder, recipe = work.encoder, work.recipe
    counts = {
        split: {
            "documents": sum(info.documents for info in splits[split]["shards"]),
            "tokens": sum(info.tokens for info in splits[split]["shards"]),
            "shards": len(splits[split]["shards"]),
            "fingerprint": _sha256([info.sha256 for info in splits[split]["shards"]]),
        }
        for split in SPLITS
    }
    return {
        "emotrain": emotrain.__version__,
        "documents": sum(split["documents"] for split in counts.values()),
        "splits": counts,
        "sources": _sources(work, pieces),
        "domains": {split: splits[split]["domains"] for split in SPLITS},
        "tokenizer": {
            "origin": work.choice.origin,
            "model": type(encoder.backend.model).__name__,
            "vocab_size": encoder.vocab_size,
            "eos_token": encoder.eos_token,
            "eos_id": encoder.eos_id,
            "sha256": sha256_of(work.staging.data / TOKENIZER),
            "library": tokenizers.__version__,
        },
        "skipped_documents": skipped,
        "filters": _filters(work, removed, conditions),
        "settings": recipe.to_json(),
    }


def _filters(work: Work, removed: dict[str, int], conditions: Counter[str]) -> list[dict[str, Any]]:
    """What was asked for, with its parameters, and what it removed."""
    recipe, found = work.recipe, []

    def add(name: str, parameters: dict[str, Any], count: int) -> None:
        found.append({"name": name, "parameters": parameters, "removed": count})

    for condition in recipe.where:
        add("where", {"condition": condition}, conditions[condition])
    if recipe.language:
        from importlib.metadata import version

        library = f"py3langid {version('py3langid')}"
        seen = {"language": recipe.language, "library": library, "characters": LANGUAGE_CHARACTERS}
        add("language", seen, removed["language"])
    for name in ("min_tokens", "max_tokens"):
        if getattr(recipe, name):
            add(name, {"tokens": getattr(recipe, name)}, removed[name])
    if recipe.deduplication:
        add("deduplicate", recipe.deduplication.described(), removed["duplicate"])
    return found


def _sources(work: Work, pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sums: dict[int, list[str]] = {}
    documents = Counter[int]()
    for piece in pieces:
        for span in piece["spans"]:
            sums.setdefault(span["file"], []).append(span["sha256"])
            documents[span["file"]] += span["documents"]
    return [
        {
            "name": name,
            "bytes": path.stat().st_size,
            "documents": documents[file],
            "ranges": len(sums[file]),
            "sha256": sums[file][0] if len(sums[file]) == 1 else _sha256(sums[file]),
        }
        for file, (name, path) in enumerate(zip(work.names, work.files, strict=True))
    ]


def _sha256(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _report(
    work: Work,
    splits: dict[str, dict[str, Any]],
    skipped: dict[str, int],
    removed: dict[str, int],
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "out": str(work.staging.out),
        "vocab_size": work.encoder.vocab_size,
        "eos_id": work.encoder.eos_id,
        "files": len(work.files),
    }
    for total in ("documents", "tokens"):
        by_split = {
            split: sum(getattr(info, total) for info in splits[split]["shards"]) for split in SPLITS
        }
        report[total] = sum(by_split.values())
        report.update({f"{split}_{total}": count for split, count in by_split.items()})
    report.update({f"{split}_shards": len(splits[split]["shards"]) for split in SPLITS})
    report["skipped_documents"] = sum(skipped.values())
    report.update({f"skipped_{reason}_documents": count for reason, count in skipped.items()})
    report["filtered_documents"] = sum(removed.values())
    report.update({f"filtered_{reason}_documents": count for reason, count in removed.items()})
    report["shard_bytes"] = sum(info.bytes for split in SPLITS for info in splits[split]["shards"])
    report["domains"] = {split: splits[split]["domains"] for split in SPLITS}
    return report
