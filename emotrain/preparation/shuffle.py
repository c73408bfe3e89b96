"""The second stage of `prepare`: the documents of a bucket, from the spills of all pieces, become a
shard, in the order of their places. A bucket that has become much larger than a shard, because its
files hold more text than their sizes said, becomes several.

    shards/train-00003.json   what the manifest and the card say of a shard: written after it
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.data.files import EXTENSIONS, extension_of, shown
from emotrain.data.manifest import ShardInfo
from emotrain.data.shards import write_shard
from emotrain.files import json_text
from emotrain.preparation.spill import read_committed, segments, write_durably

SHARDS, DUPLICATES = "shards", "duplicates.npy"

ALL_PLACES = (0, 2**64 - 1)


@dataclass(frozen=True)
class Placing:
    """Where the documents of pieces stand among all of them."""

    first: list[int]
    """Number of the first document of each piece."""
    lines: dict[tuple[int, int], int]
    """(piece, file) -> lines of the file before the piece."""

    @classmethod
    def of(cls, known: Sequence[dict[str, Any]]) -> Placing:
        """Args: known: what is known of each piece."""
        first, lines, total = [], {}, 0
        so_far: Counter[int] = Counter()
        for number, piece in enumerate(known):
            first.append(total)
            total += piece["documents"]
            for span in piece["spans"]:
                lines[number, span["file"]] = so_far[span["file"]]
                so_far[span["file"]] += span["lines"]
        return cls(first, lines)


class Shuffler:
    """Writes shards; a process has one.

    Args:
        folder: of the half-done data set. data: where shards go.
    """

    def __init__(self, folder: Path, data: Path, files: Sequence[Path], known: list[dict]):
        self.folder, self.data, self.known = folder, data, known
        self.placing = Placing.of(known)
        self.files = [(shown(path.name), _unit(path)) for path in files]
        duplicates = folder / DUPLICATES
        self.dropped = np.load(duplicates, mmap_mode="r") if duplicates.exists() else None

    def cuts(self, bucket: int, shard_tokens: int) -> list[tuple[int, int]]:
        """The first and the last place of each shard of a bucket; all of it in one, if it has less
        than two shards' tokens. Of each document its place and length are held."""
        size = sum(known.get("bucket_tokens", {}).get(str(bucket), 0) for known in self.known)
        if size < 2 * shard_tokens:
            return [ALL_PLACES]
        places, lengths = [], []
        for _, batch, rows in self._rows(bucket):
            places.append(batch.column("place").to_numpy()[rows])
            lengths.append(np.diff(batch.column("tokens").offsets.to_numpy())[rows])
        found = np.concatenate(places)
        order = np.argsort(found, kind="stable")
        shards = np.cumsum(np.concatenate(lengths)[order]) // shard_tokens
        begins = np.flatnonzero(np.diff(shards, prepend=-1))
        firsts = [0, *found[order[begins[1:]]].tolist()]
        return list(zip(firsts, [*(n - 1 for n in firsts[1:]), ALL_PLACES[1]], strict=True))

    def write(
        self, bucket: int, split: str, number: int, within: tuple[int, int] = ALL_PLACES
    ) -> None:
        """Write a shard of a bucket, the documents from one place to another, and what is known of
        it."""
        tokens: list[np.ndarray] = []
        places, domains, sources, licenses = [], [], [], []
        for piece, batch, rows in self._rows(bucket, within):
            offsets = batch.column("tokens").offsets.to_numpy()
            values = batch.column("tokens").values.to_numpy()
            tokens += [values[offsets[row] : offsets[row + 1]] for row in rows.tolist()]
            chosen = batch.select(
                ["place", "domain", "source", "license", "file", "number", "part"]
            ).take(rows)
            columns = chosen.to_pydict()
            places += columns["place"]
            domains += columns["domain"]
            licenses += columns["license"]
            sources += self._sources(piece, columns)
        order = np.argsort(np.array(places, np.uint64), kind="stable").tolist()
        lengths = np.array([len(tokens[row]) for row in order])
        info = write_shard(
            self.data / split / f"shard-{number:05d}.arrow",
            np.concatenate([tokens[row] for row in order]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            [domains[row] for row in order],
            [sources[row] for row in order],
        )
        counts: dict[str, defaultdict[str, Counter[str]]] = {
            name: defaultdict(Counter) for name in ("domains", "licenses")
        }
        for ids, domain, license in zip(tokens, domains, licenses, strict=True):
            counts["domains"][domain].update(documents=1, tokens=len(ids))
            if license is not None:
                counts["licenses"][license].update(documents=1, tokens=len(ids))
        known = {"bytes": info.bytes, "sha256": info.sha256, "info": asdict(info)} | counts
        write_durably(self.folder / SHARDS / f"{split}-{number:05d}.json", json_text(known))

    def _rows(
        self, bucket: int, within: tuple[int, int] = ALL_PLACES
    ) -> Iterator[tuple[int, Any, np.ndarray]]:
        """The documents of a bucket that stay, at these places: (piece, record batch, rows)."""
        for piece, known in enumerate(self.known):
            if str(bucket) not in known["buckets"]:
                continue
            for batch in segments(self.folder, piece):
                buckets = batch.column("bucket").to_numpy()
                start, stop = np.searchsorted(buckets, [bucket, bucket + 1])
                rows = np.arange(start, stop)
                if self.dropped is not None and len(rows):
                    ordinals = batch.column("ordinal").to_numpy()[start:stop]
                    rows = rows[~self.dropped[self.placing.first[piece] + ordinals.astype(int)]]
                if within != ALL_PLACES:
                    found = batch.column("place").to_numpy()[rows]
                    rows = rows[(found >= np.uint64(within[0])) & (found <= np.uint64(within[1]))]
                if len(rows):
                    yield piece, batch, rows

    def _sources(self, piece: int, columns: dict[str, list[Any]]) -> list[str]:
        found = []
        for source, file, number, part in zip(
            *(columns[name] for name in ("source", "file", "number", "part")), strict=True
        ):
            name, unit = self.files[file]
            if source is None:
                where = number + (self.placing.lines[piece, file] if unit == "line" else 0)
                source = f"{name}:{unit} {where}"
            found.append(f"{source}#{part}" if part else source)
        return found


def read_shard(folder: Path, data: Path, split: str, number: int, hashed: bool) -> dict | None:
    """What is known of a shard; None where it is not whole."""
    path = folder / SHARDS / f"{split}-{number:05d}.json"
    known = read_committed(path, data / split / f"shard-{number:05d}.arrow", hashed)
    if known is None:
        return None
    try:
        return known | {"info": ShardInfo(**known["info"])}
    except (KeyError, TypeError):
        return None


def _unit(path: Path) -> str:
    return "row" if EXTENSIONS[extension_of(path) or ".txt"] == "parquet" else "line"
