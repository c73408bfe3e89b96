"""The pieces that `prepare` does one by one, on any number of processes and machines: files, ranges
of bytes of large plain files, row groups of large Parquet files, or several small files.

Pieces, and the number of shards, are a function of the names and sizes of the files alone, so that
every machine finds the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emotrain.data.files import EXTENSIONS, extension_of
from emotrain.data.records import Span, open_parquet

MIN_PIECE_BYTES, MAX_PIECE_BYTES = 2**20, 2**27
"""Bytes of text of a piece, about."""

PIECES = 256
"""As many pieces as this, where their sizes allow it: enough for a bar that moves and for parts of
equal size, and little is lost with one of them."""

BYTES_PER_TOKEN, COMPRESSION = 3, 4
"""Rough sizes, from which pieces and shards are guessed before anything is read."""


@dataclass(frozen=True)
class Part:
    """A span of one of the files."""

    file: int
    """Its place among the inputs."""
    span: Span
    byte_start: int
    byte_stop: int
    """The bytes that its checksum is of: those of all spans of a file make up the file."""

    @property
    def size(self) -> int:
        return self.byte_stop - self.byte_start


Piece = tuple[Part, ...]


def cut_into_pieces(paths: Sequence[Path], whole_files: bool = False) -> list[Piece]:
    """The pieces of files, in order.

    Args:
        whole_files: whether no file may be cut, as its records are joined.
    """
    sizes = [path.stat().st_size for path in paths]
    expected = [text_bytes(path, size) for path, size in zip(paths, sizes, strict=True)]
    wanted = min(max(sum(expected) // PIECES, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    pieces: list[Piece] = []
    together: list[Part] = []
    together_bytes = 0
    for file, (path, size, text) in enumerate(zip(paths, sizes, expected, strict=True)):
        spans = [Span()] if whole_files or text <= wanted else _spans(path, size, wanted)
        edges = [size * i // len(spans) for i in range(len(spans) + 1)]
        if extension_of(path) in (".jsonl", ".json") and len(spans) > 1:
            edges = [span.start for span in spans] + [size]
        parts = [Part(file, span, edges[i], edges[i + 1]) for i, span in enumerate(spans)]
        if together and (len(parts) > 1 or together_bytes + text > wanted):
            pieces.append(tuple(together))
            together, together_bytes = [], 0
        if len(parts) > 1:
            pieces += [(part,) for part in parts]
        else:
            together, together_bytes = together + parts, together_bytes + text
    return [*pieces, tuple(together)] if together else pieces


def text_bytes(path: Path, size: int) -> int:
    """Bytes of text in a file, about."""
    plain = path.suffix.lower() in (".jsonl", ".json", ".txt")
    return size * (1 if plain else COMPRESSION)


def expected_tokens(paths: Sequence[Path]) -> int:
    return sum(text_bytes(path, path.stat().st_size) for path in paths) // BYTES_PER_TOKEN


def _spans(path: Path, size: int, wanted: int) -> list[Span]:
    """The spans of a file that is larger than a piece."""
    kind = extension_of(path) or ".txt"
    if kind in (".jsonl", ".json"):
        count = -(-size // wanted)
        starts = [size * i // count for i in range(count)]
        return [Span(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    if EXTENSIONS[kind] != "parquet":
        return [Span()]
    with open_parquet(path) as file:
        rows = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    spans, start, held = [], 0, 0
    for group, group_bytes in enumerate(rows):
        if held and held + group_bytes > wanted:
            spans.append(Span(start, group))
            start, held = group, 0
        held += group_bytes
    return [*spans, Span(start)] if len(rows) > 1 else [Span()]
