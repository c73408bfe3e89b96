"""Text documents in: JSON lines, Parquet and plain text, streamed, with every rejected document
counted by reason.

    data/
        wiki/part-000.jsonl.zst     one document a line      {"text": ..., "domain": ..., "source": ..., "split": ...}
        code/part-000.parquet       one document a row       columns of the same names
        letters/1812-06-01.txt      one document a file      domain "letters", the name of its folder

Only the text is required. A document without a domain takes the name of its file's folder, one
without a source the name of its file and its line or row, and one without a split is assigned by
`prepare`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.errors import MissingFileError, UserError

EXTENSIONS = {
    ".jsonl": "lines",
    ".json": "lines",
    ".jsonl.gz": "lines",
    ".json.gz": "lines",
    ".jsonl.zst": "lines",
    ".json.zst": "lines",
    ".parquet": "parquet",
    ".txt": "text",
}
"""How each kind of file is read."""

REASONS = ("empty", "bad_json", "invalid_utf8", "missing_text", "wrong_type", "unknown_split")
"""Why a document can be skipped."""

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "test": "valid"}
"""Values of the split field, and the split each stands for."""

READ_BYTES = 1 << 20
"""Bytes of (decompressed) text read at a time."""


@dataclass(frozen=True)
class Document:
    """One document, as read."""

    text: str
    domain: str
    source: str
    split: str | None
    """`train`, `valid`, or None where the file does not say."""
    size: int
    """Bytes of the text in UTF-8."""


@dataclass(frozen=True)
class Fields:
    """Names of the JSON keys or Parquet columns that hold a document."""

    text: str = "text"
    domain: str = "domain"
    source: str = "source"
    split: str = "split"


class DocumentReader:
    """Reads files into documents, counting what it skips in `skipped` (or, if strict, refusing
    it)."""

    def __init__(self, fields: Fields = Fields(), strict: bool = False):
        self.fields = fields
        self.strict = strict
        self.skipped: Counter[str] = Counter()

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file, in order.

        Raises:
            ValueError: a file that cannot be read to its end (corrupt, truncated, no text column):
                an unknown number of documents would be missing. If strict, also the first document
                that would be skipped, with its line or row.
        """
        import pyarrow as pa

        readers = {
            "lines": self._read_lines,
            "parquet": self._read_parquet,
            "text": self._read_text,
        }
        try:
            yield from readers[EXTENSIONS[extension_of(path)]](path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: not readable to its end ({' '.join(str(error).split())}); restore the "
                f"file or leave it "
                f"out"
            ) from None

    def _read_lines(self, path: Path) -> Iterator[Document]:
        for number, line in enumerate(_lines(path), start=1):
            where = f"line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                self._skip(
                    "invalid_utf8",
                    path,
                    where,
                    f"is not UTF-8 ({error.reason} at byte {error.start})",
                )
                continue
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                self._skip("bad_json", path, where, f"is not JSON ({error})")
                continue
            if not isinstance(record, dict):
                self._skip(
                    "bad_json", path, where, f"holds a JSON {type(record).__name__}, not an object"
                )
                continue
            yield from self._accept(record, path, where)

    def _read_parquet(self, path: Path) -> Iterator[Document]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, memory_map=True) as file:
            names = [name for name in vars(self.fields).values() if name in file.schema_arrow.names]
            if self.fields.text not in names:
                raise UserError(
                    f"{path}: has no column {self.fields.text!r}; its columns are "
                    f"{', '.join(file.schema_arrow.names)}, name the right one with --text-field"
                )
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=names):
                columns = {
                    name: _as_binary(batch.column(name), path, name).to_pylist() for name in names
                }
                for values in zip(*columns.values(), strict=True):
                    where = f"row {row}"
                    row += 1
                    try:
                        record = {
                            name: None if value is None else value.decode("utf-8")
                            for name, value in zip(columns, values, strict=True)
                        }
                    except UnicodeDecodeError as error:
                        self._skip(
                            "invalid_utf8",
                            path,
                            where,
                            f"is not UTF-8 ({error.reason} at byte {error.start})",
                        )
                        continue
                    yield from self._accept(record, path, where)

    def _read_text(self, path: Path) -> Iterator[Document]:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self._skip(
                "invalid_utf8", path, "text", f"is not UTF-8 ({error.reason} at byte {error.start})"
            )
            return
        yield from self._accept(
            {self.fields.text: text, self.fields.source: path.name}, path, "text"
        )

    def _accept(self, record: dict[str, Any], path: Path, where: str) -> Iterator[Document]:
        """The record as a document, unless it has to be skipped."""
        fields = self.fields
        if record.get(fields.text) is None:
            return self._skip("missing_text", path, where, f"has no {fields.text!r}")
        for name in vars(fields).values():
            if not isinstance(record.get(name), (str, type(None))):
                return self._skip(
                    "wrong_type",
                    path,
                    where,
                    f"{name!r} is a {type(record[name]).__name__}, not text",
                )
        text, split = record[fields.text], record.get(fields.split) or None
        if not text.strip():
            return self._skip("empty", path, where, "is empty")
        if split is not None and split not in SPLITS:
            return self._skip(
                "unknown_split",
                path,
                where,
                f"{fields.split!r} is {split!r}, not one of {', '.join(SPLITS)}",
            )
        domain = record.get(fields.domain) or path.absolute().parent.name or "unknown"
        source = record.get(fields.source) or f"{path.name}:{where}"
        try:
            size, _, _ = len(text.encode()), domain.encode(), source.encode()
        except (
            UnicodeEncodeError
        ) as error:  # JSON can spell half of a surrogate pair, which no UTF-8 text can hold
            return self._skip(
                "invalid_utf8", path, where, f"has half of a surrogate pair ({error.reason})"
            )
        yield Document(text, domain, source, SPLITS[split] if split else None, size)

    def _skip(self, reason: str, path: Path, where: str, fault: str) -> None:
        if self.strict:
            raise UserError(
                f"{path}: {where} {fault}; repair it, or run without --strict to skip and count "
                f"such documents"
            )
        self.skipped[reason] += 1


def extension_of(path: Path) -> str | None:
    """The extension of a file that can be read, such as `.jsonl.zst`; None for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next(
        (
            ending
            for ending in ("".join(suffixes[-2:]), "".join(suffixes[-1:]))
            if ending in EXTENSIONS
        ),
        None,
    )


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The document files among `inputs`: files as given, folders searched to any depth, in sorted
    order.

    Files of other kinds inside a folder (a README beside the data) and hidden files are passed
    over.

    Raises:
        FileNotFoundError: an input that does not exist. ValueError: a file of an unknown kind, a
            folder without a document file, or a file that is named twice.
    """
    known = ", ".join(EXTENSIONS)
    files: dict[Path, Path] = {}
    for item in map(Path, inputs):
        if item.is_dir():
            found = sorted(
                path
                for path in item.rglob("*")
                if path.is_file()
                and extension_of(path)
                and not any(part.startswith(".") for part in path.relative_to(item).parts)
            )
            if not found:
                raise UserError(f"{item}: no document files in this folder; they end in {known}")
        elif not item.exists():
            raise MissingFileError(
                f"{item}: no such file or folder; `sample` names the embedded corpus"
            )
        elif extension_of(item) is None:
            raise UserError(f"{item}: unknown kind of file; documents are read from {known}")
        else:
            found = [item]
        for path in found:
            if path.resolve() in files:
                raise UserError(
                    f"{path}: named twice, its documents would count double; give each file once"
                )
            files[path.resolve()] = path
    return list(files.values())


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed by its extension, without their ends."""
    import pyarrow as pa

    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    with pa.input_stream(str(path), compression=compression) as stream:
        pieces: list[bytes] = []
        while chunk := stream.read(READ_BYTES):
            first, *others = chunk.split(b"\n")
            pieces.append(first)
            for other in others:
                yield b"".join(pieces)
                pieces = [other]
        if last := b"".join(pieces):
            yield last


def _as_binary(column: Any, path: Path, name: str) -> Any:
    """A text column as bytes, so that invalid UTF-8 is found value by value."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if (
        pa.types.is_null(column.type)
        or pa.types.is_binary(column.type)
        or pa.types.is_large_binary(column.type)
    ):
        return column
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary())
    raise UserError(
        f"{path}: column {name!r} holds {column.type}, not text; name another with --{name}-field"
    )
