"""The records of an input file, or of a part of it, in order and in little memory: JSON lines,
rows of Parquet, plain text.

A part of a file of lines is a range of bytes: the lines that begin in it. A part of a Parquet file
is a range of row groups. Reading all parts in order is reading the file.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from emotrain.data.files import shown
from emotrain.errors import UserError

READ_BYTES = 1 << 20
"""Bytes of (decompressed) text read at a time."""

MAX_DOCUMENT_BYTES = 256 * 10**6
"""Bytes of a line, value or text that is a document, at most, where nobody says otherwise."""

ROWS = 256
"""Rows of Parquet read at a time."""

BLANK = "blank"
"""The reason why a blank line is no record: it is passed over, and only counts as a line."""

Seen = Callable[[int], None]
"""Told how many bytes of the part, as it lies on the disk, have been read."""


class Record(NamedTuple):
    """One line, row or text."""

    values: dict[str, Any]
    position: int
    """Where its line begins, in bytes of (decompressed) text, or the number of its row: names the
    record in its file, however that is cut into parts."""
    number: int
    """Of its line, from 1 where the part begins, or of its row, from 0 where the file begins."""
    where: str
    """That number in words."""
    reason: str = ""
    """Why it cannot be used; empty where it can."""
    fault: str = ""


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
    license: str | None = None
    index: int = 0
    """Of its (first) record, see `Record`."""
    number: int | None = None
    """Of its line or row, where its source is no more than that."""
    part: int = 0
    """Which of the documents of a record it is."""
    joined_by: str = ""
    """Neighbouring records of the same value are one text, where records are joined."""


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes of lines, or row groups of Parquet."""

    start: int = 0
    stop: int | None = None
    """One past the last; None for the end of the file."""


WHOLE = Span()


@dataclass(frozen=True)
class Columns:
    """What is read of a record: (what it is, its name). Text that is not a document's own may be of
    any type."""

    strings: tuple[tuple[str, str], ...]
    others: tuple[str, ...] = ()


def read_lines(path: Path, span: Span, limit: int, seen: Seen) -> Iterator[Record]:
    """The records of JSON lines."""
    for number, (begin, line) in enumerate(_lines(path, span, limit, seen), start=1):
        where = f"line {number}" + (f" after byte {span.start:,}" if span.start else "")
        if line is None:
            yield Record({}, begin, number, where, *_too_long(limit))
            continue
        if begin == 0 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: is UTF-16, documents are read as UTF-8; convert it")
        try:
            # A byte order mark stands at the start of each of several files put together.
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield Record({}, begin, number, where, "invalid_utf8", _not_utf8(error))
            continue
        if not text.strip():
            yield Record({}, begin, number, where, BLANK)
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # also a number of 4,301 digits
            yield Record({}, begin, number, where, "bad_json", f"is not JSON ({error})")
            continue
        if not isinstance(record, dict):
            fault = f"holds a JSON {type(record).__name__}, not an object"
            yield Record({}, begin, number, where, "bad_json", fault)
            continue
        yield Record(record, begin, number, where)


def read_text(
    path: Path, limit: int, by_line: bool, names: tuple[str, str], seen: Seen
) -> Iterator[Record]:
    """A text file as one record, or, for who cuts it into documents, a record a line.

    Args:
        names: keys of the text and of its source.
    """
    source = shown(path.name)
    if by_line:
        for number, (begin, line) in enumerate(_lines(path, WHOLE, limit, seen), start=1):
            fault = ("", "")
            text = ""
            if line is None:
                fault = _too_long(limit)
            else:
                try:
                    text = line.decode("utf-8-sig" if begin == 0 else "utf-8")
                except UnicodeDecodeError as error:
                    fault = ("invalid_utf8", _not_utf8(error))
            yield Record({names[0]: text, names[1]: source}, begin, number, "text", *fault)
        return
    values: dict[str, Any] = {}
    size = path.stat().st_size
    if size > limit:
        yield Record(values, 0, 0, "text", *_too_long(limit))
    else:
        try:
            values = {names[0]: path.read_bytes().decode("utf-8-sig"), names[1]: source}
            yield Record(values, 0, 0, "text")
        except UnicodeDecodeError as error:
            yield Record(values, 0, 0, "text", "invalid_utf8", _not_utf8(error))
    seen(size)


def read_parquet(
    path: Path, span: Span, limit: int, columns: Columns, seen: Seen
) -> Iterator[Record]:
    """The records of rows. Of a page of Parquet all is read, whatever the limit."""
    with open_parquet(path) as file:
        found = _columns(path, file.schema_arrow, columns)
        groups = list(range(file.num_row_groups))[span.start : span.stop]
        row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
        size, read = path.stat().st_size / max(1, file.metadata.num_rows), 0
        wanted = sorted({column for _, _, column in found})
        for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, columns=wanted):
            values = {
                name: _values(_inner(batch, column, name), path, what, name)
                for what, name, column in found
            }
            for items in zip(*values.values(), strict=True):
                yield _row(dict(zip(values, items, strict=True)), row, limit)
                row += 1
            read += batch.num_rows
            seen(int(read * size))


def _row(values: dict[str, Any], row: int, limit: int) -> Record:
    try:
        for name, value in values.items():
            if isinstance(value, bytes):
                if len(value) > limit:
                    return Record({}, row, row, f"row {row}", *_too_long(limit))
                values[name] = value.decode("utf-8")
    except UnicodeDecodeError as error:
        return Record({}, row, row, f"row {row}", "invalid_utf8", _not_utf8(error))
    return Record(values, row, row, f"row {row}")


def _too_long(limit: int) -> tuple[str, str]:
    return "too_long", (
        f"is longer than {limit / 1e6:g} MB; allow more memory for it with --max-document-mb"
    )


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 ({error.reason} at byte {error.start})"


def _lines(path: Path, span: Span, limit: int, seen: Seen) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in a span, decompressed by the file's extension: where each begins, and
    its bytes without the end, None where there are more than `limit`, which are never held."""
    import pyarrow as pa

    compression = "zstd" if path.suffix.lower() == ".zst" else None
    with ExitStack() as stack:
        # Files are opened by Python, which takes names of any bytes.
        file = stack.enter_context(open(path, "rb"))
        stream: Any = file
        if path.suffix.lower() == ".gz":
            # Python's reader, as gzip itself, takes the zeros that tapes and block devices add.
            stream = stack.enter_context(gzip.open(file))
        elif compression:
            stream = stack.enter_context(pa.input_stream(file, compression=compression))
        begin = span.start
        if begin:
            # A line begins here if the byte before ends one.
            file.seek(begin - 1)
            begin += _skip_line(file) - 1
        yield from _split(stream, begin, span.stop, limit, lambda: seen(file.tell() - span.start))


def _skip_line(file: Any) -> int:
    """Read to the end of a line, of any length. Returns the bytes read."""
    count = 0
    while chunk := file.readline(READ_BYTES):
        count += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return count


def _split(
    stream: Any, begin: int, stop: int | None, limit: int, seen: Callable[[], None]
) -> Iterator[tuple[int, bytes | None]]:
    parts: list[bytes] = []
    size = 0
    while (stop is None or begin < stop) and (chunk := stream.read(READ_BYTES)):
        at = 0
        while (end := chunk.find(b"\n", at)) >= 0:
            size += end - at
            if size <= limit:
                parts.append(chunk[at:end])
            yield begin, b"".join(parts) if size <= limit else None
            begin, at, size, parts = begin + size + 1, end + 1, 0, []
            if stop is not None and begin >= stop:
                return
        size += len(chunk) - at
        if size <= limit:
            parts.append(chunk[at:])
        else:
            parts = []
        seen()
    if size:
        yield begin, b"".join(parts) if size <= limit else None


# ---- Parquet


def open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        str(path).encode()
    except UnicodeEncodeError:  # a name that is not UTF-8, which Arrow does not open
        return pq.ParquetFile(open(path, "rb"))
    # Without its own reading ahead, which would hold whole row groups.
    return pq.ParquetFile(path, memory_map=True, pre_buffer=False)


def _columns(path: Path, schema: Any, columns: Columns) -> list[tuple[str, str, str]]:
    """(what, name, column) of everything that a Parquet file has; a column that is a struct holds
    names with dots."""
    found = []
    names: Sequence[tuple[str, str]] = [*columns.strings, *(("", name) for name in columns.others)]
    known = set()
    for what, name in names:
        column = name if name in schema.names else name.partition(".")[0]
        if schema.names.count(column) > 1:
            raise UserError(f"{path}: has the column {column!r} twice; drop one of them")
        here = column in schema.names and (
            column == name or _has_inner(schema.field(column).type, name)
        )
        if here and name not in known:
            known.add(name)
            found.append((what, name, column))
    if not any(what == "text" for what, _, _ in found):
        text = dict(columns.strings)["text"]
        raise UserError(
            f"{path}: has no column {text!r}; its columns are {', '.join(schema.names)}, "
            f"name the right one with --text-field"
        )
    return found


def _values(column: Any, path: Path, what: str, name: str) -> list[Any]:
    """The values of a column: text as bytes, so that invalid UTF-8 is found value by value."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_null(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column.to_pylist()
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if any(is_kind(kind) for is_kind in (*kinds, pa.types.is_binary_view)):
        return column.cast(pa.large_binary()).to_pylist()
    if not what:
        return column.to_pylist()
    if pa.types.is_integer(kind) and what != "text":
        return column.cast(pa.string()).cast(pa.large_binary()).to_pylist()
    raise UserError(
        f"{path}: column {name!r} holds {kind}, not text; name another with --{what}-field"
    )


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
