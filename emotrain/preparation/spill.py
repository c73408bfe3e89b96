"""Encoded documents on their way to shards: a file a piece, which holds them by bucket (the shard
they will lie in), and what is known of the piece beside it.

    pieces/000012.arrow   a record batch a segment; rows are documents, sorted by bucket
    pieces/000012.json    size and checksum of that file, and counts: written last, so that a piece
                          is whole or not there

A document's bucket and its place in it are hashes of (seed, file, record, part): nothing depends
on other pieces, or on who encodes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emotrain.data.manifest import SPLITS
from emotrain.data.records import Document
from emotrain.errors import RunError
from emotrain.files import HashingFile, json_text, sha256_of

BUFFER_BYTES = 2**26
"""Bytes of encoded documents that a process holds before it writes a segment."""

PIECES = "pieces"


class Placed(NamedTuple):
    """An encoded document that is kept."""

    document: Document
    file: int
    tokens: np.ndarray
    first_line: int
    last_line: int
    """Hashes; 0 where the text has one line only."""
    marked: int
    """1 where it holds a mark of the end of a document, 2 where it ends in one."""
    key: tuple[int, ...]
    """By which duplicates are found; empty where nobody looks for them."""


class Buckets:
    """How many shards there are of each split, and which documents go to which."""

    def __init__(self, counts: dict[str, int], seed: int, valid_fraction: float):
        self.counts, self.seed, self.valid_fraction = counts, seed, valid_fraction
        self.names = [(split, number) for split in SPLITS for number in range(counts[split])]
        self.first = {"train": 0, "valid": counts["train"]}

    def place(self, document: Document, file: int) -> tuple[int, int]:
        """The bucket of a document, and its place in it."""
        name = f"{self.seed}/{file}/{document.index}/{document.part}"
        digest = hashlib.blake2b(name.encode(), digest_size=24).digest()
        held_out, choice, place = (
            int.from_bytes(digest[start : start + 8], "little") for start in (0, 8, 16)
        )
        drawn = "valid" if held_out < self.valid_fraction * 2**64 else "train"
        split = document.split or drawn
        return self.first[split] + choice % self.counts[split], place


class SpillWriter:
    """Writes the documents of one piece."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype, key_width: int):
        self.stem = folder / PIECES / f"{number:06d}"
        self.dtype, self.key_width = dtype, key_width
        self.rows: list[tuple[int, int, int, Placed]] = []
        self.buffered = self.documents = self.tokens = self.text_bytes = 0
        self.buckets: Counter[int] = Counter()
        self.bucket_tokens: Counter[int] = Counter()
        self.partial = self.stem.with_name(f"{self.stem.name}.{os.getpid()}.partial")
        self.file = HashingFile(self.partial)
        self.writer: Any = None

    def add(self, placed: Placed, bucket: int, place: int) -> None:
        self.rows.append((bucket, place, self.documents, placed))
        self.documents += 1
        self.tokens += len(placed.tokens)
        self.text_bytes += placed.document.size
        self.buckets[bucket] += 1
        self.bucket_tokens[bucket] += len(placed.tokens)
        self.buffered += placed.tokens.nbytes
        if self.buffered >= BUFFER_BYTES:
            self._flush()

    def commit(self, known: dict[str, Any]) -> None:
        """Give the piece its name.

        Args:
            known: what else its JSON says.
        """
        if self.rows or self.writer is None:
            self._flush()
        self.writer.close()
        size, digest = self.file.finish()
        os.replace(self.partial, self.stem.with_suffix(".arrow"))
        counts = {
            "bytes": size,
            "sha256": digest,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "buckets": {str(bucket): count for bucket, count in sorted(self.buckets.items())},
            "bucket_tokens": {str(b): count for b, count in sorted(self.bucket_tokens.items())},
        }
        write_durably(self.stem.with_suffix(".json"), json_text(counts | known))

    def _flush(self) -> None:
        import pyarrow as pa

        rows = sorted(self.rows, key=lambda row: (row[0], row[2]))
        placed = [row[3] for row in rows]
        documents = [item.document for item in placed]
        tokens = [item.tokens for item in placed]
        ends = np.cumsum([0, *map(len, tokens)]).astype(np.int64)
        flat = np.concatenate(tokens) if tokens else np.zeros(0, self.dtype)
        keys = np.array([item.key for item in placed], np.uint64).reshape(-1)
        columns = {
            "bucket": pa.array([row[0] for row in rows], pa.uint32()),
            "place": pa.array([row[1] for row in rows], pa.uint64()),
            "ordinal": pa.array([row[2] for row in rows], pa.uint32()),
            "file": pa.array([item.file for item in placed], pa.uint32()),
            "number": pa.array([document.number for document in documents], pa.int64()),
            "part": pa.array([document.part for document in documents], pa.uint32()),
            "domain": pa.array([document.domain for document in documents], pa.string()),
            "source": pa.array(
                [d.source if d.number is None else None for d in documents], pa.string()
            ),
            "license": pa.array([document.license for document in documents], pa.string()),
            "characters": pa.array([len(document.text) for document in documents], pa.uint32()),
            "first_line": pa.array([item.first_line for item in placed], pa.uint64()),
            "last_line": pa.array([item.last_line for item in placed], pa.uint64()),
            "marked": pa.array([item.marked for item in placed], pa.uint8()),
            "key": pa.FixedSizeListArray.from_arrays(pa.array(keys), max(1, self.key_width))
            if self.key_width
            else pa.nulls(len(rows)),
            "tokens": pa.LargeListArray.from_arrays(
                pa.array(ends), pa.array(flat.astype(self.dtype, copy=False))
            ),
        }
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        if self.writer is None:
            self.writer = pa.ipc.new_file(self.file, batch.schema)
        self.writer.write_batch(batch)
        self.rows, self.buffered = [], 0


def write_durably(path: Path, text: str) -> None:
    """Write a file that is whole or not there, also after a crash of the machine."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_piece(folder: Path, number: int, hashed: bool) -> dict[str, Any] | None:
    """What is known of a piece; None where it is not whole.

    Args:
        hashed: whether its bytes are compared with the checksum, and not only its size.
    """
    path = folder / PIECES / f"{number:06d}.json"
    return read_committed(path, path.with_suffix(".arrow"), hashed)


def read_committed(path: Path, beside: Path, hashed: bool) -> dict[str, Any] | None:
    """A JSON file that says how large another one is, if that is so."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if beside.stat().st_size != known["bytes"]:
            return None
        return known if not hashed or sha256_of(beside) == known["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def segments(folder: Path, number: int) -> Iterator[Any]:
    """The record batches of a piece, mapped."""
    import pyarrow as pa

    path = folder / PIECES / f"{number:06d}.arrow"
    try:
        # Opened by Python, which takes names of any bytes.
        with pa.memory_map(os.fspath(path)) as source:
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
    except pa.ArrowException as error:
        raise RunError(
            f"{path}: not readable ({' '.join(str(error).split())}); remove it, the same command "
            f"makes it again"
        ) from None
