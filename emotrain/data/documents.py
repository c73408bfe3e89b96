"""Text documents in: JSON lines, Parquet and plain text, streamed, with every rejected document
counted by reason.

    data/
        wiki/part-000.jsonl.zst   a line is a document: {"text", "domain", "source", "split"}
        code/part-000.parquet     a row is a document: columns of the same names
        letters/1812-06-01.txt    a file is a document: domain "letters", the name of its folder

Keys and columns may be named with dots to reach inside of objects: `meta.domain`.

Only the text is required. A document without a domain takes the name of its file's folder, one
without a source the name of its file and its line or row, and one without a split is assigned by
`prepare`.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.data.files import COMPRESSED, EXTENSIONS, extension_of, shown
from emotrain.errors import UserError

log = logging.getLogger("emotrain")

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


FIELDS = Fields()
"""The names where nobody says otherwise."""


class DocumentReader:
    """Reads files into documents, counting what it skips in `skipped` (or, if strict, refusing
    it)."""

    def __init__(self, fields: Fields = FIELDS, strict: bool = False):
        self.fields = fields
        self.strict = strict
        self.skipped: Counter[str] = Counter()
        self._seen: set[str] = set()

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
        skipped, count = self.skipped.total(), 0
        try:
            if extension_of(path) in COMPRESSED and not path.stat().st_size:
                raise EOFError("it has no bytes, not even those of an empty compressed file")
            kind = EXTENSIONS[extension_of(path) or ".txt"]
            for document in readers[kind](path):
                count += 1
                yield document
        except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
            said = " ".join(str(error).split())
            if "requires too much memory" in said:
                raise UserError(
                    f"{path}: is compressed with a window of more than 128 MiB (zstd --long); "
                    f"compress it without: zstd -dc --long=31 FILE | zstd -o NEW"
                ) from None
            raise UserError(
                f"{path}: not readable to its end ({said}); restore the file or leave it out"
            ) from None
        if not count and (lost := self.skipped.total() - skipped):
            log.warning(
                "%s: gives no document, all %d of its lines or rows are skipped; if it is no data, "
                "leave it out (JSON files hold one object a line)",
                path,
                lost,
            )

    def check_fields(self) -> None:
        """Refuse a field that was named and that nothing read so far has had.

        Raises:
            UserError: names the field.
        """
        for what, name in vars(self.fields).items():
            # Without any text there is no document, which `prepare` says.
            named = what != "text" and name != getattr(FIELDS, what)
            if named and name not in self._seen:
                raise UserError(
                    f"no document has a field {name!r}; name the one that holds the {what} with "
                    f"--{what}-field, or leave the option out"
                )

    def _read_lines(self, path: Path) -> Iterator[Document]:
        for number, line in enumerate(_lines(path), start=1):
            where = f"line {number}"
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path}: is UTF-16, documents are read as UTF-8; convert it")
            try:
                # A byte order mark stands at the start of each of several files put together.
                text = line.decode("utf-8-sig")
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
            except (ValueError, RecursionError) as error:  # also a number of 4,301 digits
                self._skip("bad_json", path, where, f"is not JSON ({error})")
                continue
            if not isinstance(record, dict):
                self._skip(
                    "bad_json", path, where, f"holds a JSON {type(record).__name__}, not an object"
                )
                continue
            yield from self._accept(record, path, where)

    def _read_parquet(self, path: Path) -> Iterator[Document]:

        with _open_parquet(path) as file:
            columns_of = _columns(path, file.schema_arrow, self.fields)
            row = 0
            for batch in file.iter_batches(
                batch_size=256, columns=sorted({column for _, _, column in columns_of})
            ):
                columns = {
                    name: _as_binary(_inner(batch, column, name), path, what, name).to_pylist()
                    for what, name, column in columns_of
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
            {self.fields.text: text, self.fields.source: shown(path.name)}, path, "text"
        )

    def _accept(self, record: dict[str, Any], path: Path, where: str) -> Iterator[Document]:
        """The record as a document, unless it has to be skipped."""
        fields = self.fields
        values = {what: _value(record, name) for what, name in vars(fields).items()}
        self._seen |= {getattr(fields, what) for what, value in values.items() if value is not None}
        if values["text"] is None:
            return self._skip("missing_text", path, where, f"has no {fields.text!r}")
        for what, value in values.items():
            if what != "text" and type(value) is int:
                values[what] = str(value)  # labels are often numbers
            elif not isinstance(value, (str, type(None))):
                fault = f"{getattr(fields, what)!r} is a {type(value).__name__}, not text"
                return self._skip("wrong_type", path, where, fault)
        text, split = values["text"], values["split"] or None
        if not text.strip():
            return self._skip("empty", path, where, "is empty")
        if split is not None and split not in SPLITS:
            return self._skip(
                "unknown_split",
                path,
                where,
                f"{fields.split!r} is {split!r}, not one of {', '.join(SPLITS)}",
            )
        domain = values["domain"] or shown(path.absolute().parent.name) or "unknown"
        source = values["source"] or f"{shown(path.name)}:{where}"
        try:
            size, _, _ = len(text.encode()), domain.encode(), source.encode()
        except (
            UnicodeEncodeError
        ) as error:  # JSON can spell half of a surrogate pair, which no UTF-8 text can hold
            return self._skip(
                "invalid_utf8", path, where, f"has half of a surrogate pair ({error.reason})"
            )
        yield Document(text, domain, source, SPLITS[split] if split else None, size)

    def skip_all(self, reason: str, documents: Sequence[Document]) -> None:
        """Skip documents that were read and turned out to be of no use."""
        for document in documents:
            self._skip(reason, Path(document.source), "text", "gives no tokens")

    def _skip(self, reason: str, path: Path, where: str, fault: str) -> None:
        if self.strict:
            raise UserError(
                f"{path}: {where} {fault}; repair it, or have emotrain prepare skip and count such "
                f"documents, which it does without --strict"
            )
        self.skipped[reason] += 1


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed by its extension, without their ends."""
    import pyarrow as pa

    compression = "zstd" if path.suffix.lower() == ".zst" else None
    with ExitStack() as stack:
        # Files are opened by Python, which takes names of any bytes.
        file = stack.enter_context(open(path, "rb"))
        if path.suffix.lower() == ".gz":
            # Python's reader, as gzip itself, takes the zeros that tapes and block devices add.
            stream: Any = stack.enter_context(gzip.open(file))
        else:
            stream = stack.enter_context(pa.input_stream(file, compression=compression))
        pieces: list[bytes] = []
        while chunk := stream.read(READ_BYTES):
            first, *others = chunk.split(b"\n")
            pieces.append(first)
            for other in others:
                yield b"".join(pieces)
                pieces = [other]
        if last := b"".join(pieces):
            yield last


def _as_binary(column: Any, path: Path, what: str, name: str) -> Any:
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
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if any(kind(column.type) for kind in (*kinds, pa.types.is_binary_view)):
        return column.cast(pa.large_binary())
    if pa.types.is_integer(column.type) and what != "text":
        return column.cast(pa.string()).cast(pa.large_binary())
    raise UserError(
        f"{path}: column {name!r} holds {column.type}, not text; name another with --{what}-field"
    )


def _value(record: dict[str, Any], name: str) -> Any:
    """The value of a key, or of a key inside of objects where the name has dots."""
    if name in record or "." not in name:
        return record.get(name)
    outer, _, inner = name.partition(".")
    value = record.get(outer)
    return _value(value, inner) if isinstance(value, dict) else None


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        str(path).encode()
    except UnicodeEncodeError:  # a name that is not UTF-8, which Arrow does not open
        return pq.ParquetFile(open(path, "rb"))
    return pq.ParquetFile(path, memory_map=True)


def _columns(path: Path, schema: Any, fields: Fields) -> list[tuple[str, str, str]]:
    """(what, name, column) of every field that a Parquet file has; a column that is a struct holds
    names with dots."""
    found = []
    for what, name in vars(fields).items():
        column = name if name in schema.names else name.partition(".")[0]
        if schema.names.count(column) > 1:
            raise UserError(f"{path}: has the column {column!r} twice; drop one of them")
        if (
            column == name
            and column in schema.names
            or column in schema.names
            and _has_inner(schema.field(column).type, name)
        ):
            found.append((what, name, column))
    if not any(what == "text" for what, _, _ in found):
        raise UserError(
            f"{path}: has no column {fields.text!r}; its columns are {', '.join(schema.names)}, "
            f"name the right one with --text-field"
        )
    return found


def _has_inner(kind: Any, name: str) -> bool:
    import pyarrow as pa

    for part in name.split(".")[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return True


def _inner(batch: Any, column: str, name: str) -> Any:
    import pyarrow.compute as pc

    values = batch.column(column)
    for part in name.split(".")[1:] if name != column else ():
        values = pc.struct_field(values, part)
    return values
