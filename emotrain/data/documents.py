"""Text documents in: JSON lines, Parquet and plain text, streamed, with every rejected document
counted by reason.

    data/
        wiki/part-000.jsonl.zst   a line is a document: {"text", "domain", "source", "split"}
        code/part-000.parquet     a row is a document: columns of the same names
        letters/1812-06-01.txt    a file is a document: domain "letters", the name of its folder

Keys and columns may be named with dots to reach inside of objects: `meta.domain`.

Only the text is required. A document without a domain takes the name of its file's folder, one
without a source the name of its file and its line or row, and one without a split is assigned by
`prepare`. Where records are not documents, `boundaries` says what is.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emotrain.data.boundaries import Boundary, regroup
from emotrain.data.document_filters import Condition
from emotrain.data.files import COMPRESSED, EXTENSIONS, extension_of, shown
from emotrain.data.records import (
    BLANK,
    MAX_DOCUMENT_BYTES,
    WHOLE,
    Columns,
    Document,
    Record,
    Seen,
    Span,
    read_lines,
    read_parquet,
    read_text,
)
from emotrain.errors import UserError

log = logging.getLogger("emotrain")

REASONS = (
    "empty",
    "bad_json",
    "invalid_utf8",
    "missing_text",
    "wrong_type",
    "unknown_split",
    "too_long",
)
"""Why a document can be skipped."""

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "test": "valid"}
"""Values of the split field, and the split each stands for."""


@dataclass(frozen=True)
class Fields:
    """Names of the JSON keys or Parquet columns that hold a document."""

    text: str = "text"
    domain: str = "domain"
    source: str = "source"
    split: str = "split"
    license: str = "license"


FIELDS = Fields()
"""The names where nobody says otherwise."""


def _unseen(_: int) -> None:
    """Nobody looks at the progress."""


class DocumentReader:
    """Reads files into documents, counting what it skips in `skipped` (or, if strict, refusing
    it), and what conditions leave out in `filtered`."""

    def __init__(
        self,
        fields: Fields = FIELDS,
        strict: bool = False,
        where: Sequence[Condition] = (),
        boundary: Boundary | None = None,
        join_field: str = "",
        max_bytes: int = MAX_DOCUMENT_BYTES,
    ):
        self.fields = fields
        self.strict = strict
        self.where = where
        self.boundary = boundary or Boundary()
        self.join_field = join_field
        self.max_bytes = max_bytes
        self.skipped: Counter[str] = Counter()
        self.filtered: Counter[str] = Counter()
        """By condition."""
        self.seen: set[str] = set()
        """Names of fields that a record has had."""
        self.lines = 0
        """Number of the last line or row of what was read last."""

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file, in order.

        Raises:
            ValueError: a file that cannot be read to its end (corrupt, truncated, no text column):
                an unknown number of documents would be missing. If strict, also the first document
                that would be skipped, with its line or row.
        """
        skipped, count = self.skipped.total(), 0
        for document in self.read_span(path):
            count += 1
            yield document
        if not count and (lost := self.skipped.total() - skipped):
            warn_of_nothing(path, lost)

    def read_span(self, path: Path, span: Span = WHOLE, seen: Seen = _unseen) -> Iterator[Document]:
        """The documents of a part of a file, as `read`. `seen` is told how far it is."""
        import pyarrow as pa

        try:
            if extension_of(path) in COMPRESSED and not path.stat().st_size:
                raise EOFError("it has no bytes, not even those of an empty compressed file")
            records = self._accepted(path, self._records(path, span, seen))
            rule = self.boundary
            if rule.kind and EXTENSIONS[extension_of(path) or ".txt"] == "text":
                rule = replace(rule, joins=True)  # its records are lines
            yield from regroup(
                records, rule, self.max_bytes, lambda why, first: self._lost(why, first, path)
            )
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

    def check_fields(self) -> None:
        """Refuse a field that was named and that nothing read so far has had.

        Raises:
            UserError: names the field.
        """
        for what, name in vars(self.fields).items():
            # Without any text there is no document, which `prepare` says.
            named = what != "text" and name != getattr(FIELDS, what)
            if named and name not in self.seen:
                raise UserError(
                    f"no document has a field {name!r}; name the one that holds the {what} with "
                    f"--{what}-field, or leave the option out"
                )
        named_by = [("--where", condition.field) for condition in self.where]
        named_by += [("--join-field", self.join_field)] if self.join_field else []
        for option, name in named_by:
            if name not in self.seen:
                raise UserError(
                    f"no document has a field {name!r}; name one that documents have with "
                    f"{option}, or leave the option out"
                )

    def _records(self, path: Path, span: Span, seen: Seen) -> Iterator[Record]:
        """The records of a file, by its kind."""
        kind = EXTENSIONS[extension_of(path) or ".txt"]
        if kind == "parquet":
            others = [condition.field for condition in self.where]
            others += [self.join_field] if self.join_field else []
            named = vars(self.fields) | {"license": ""}
            columns = Columns(
                tuple((what, name) for what, name in named.items() if name),
                (*dict.fromkeys(others), self.fields.license),
            )
            return read_parquet(path, span, self.max_bytes, columns, seen)
        if kind == "text":
            names = self.fields.text, self.fields.source
            return read_text(path, self.max_bytes, bool(self.boundary.kind), names, seen)
        return read_lines(path, span, self.max_bytes, seen)

    def _accepted(self, path: Path, records: Iterator[Record]) -> Iterator[Document]:
        for record in records:
            self.lines = record.number
            if record.reason == BLANK:
                continue
            if record.reason:
                self._skip(record.reason, path, record.where, record.fault)
                continue
            yield from self._accept(record.values, path, record)

    def _accept(self, values_of: dict[str, Any], path: Path, record: Record) -> Iterator[Document]:
        """The record as a document, unless it has to be skipped or a condition leaves it out."""
        fields, where = self.fields, record.where
        for condition in self.where:
            value = _value(values_of, condition.field)
            if value is not None:
                self.seen.add(condition.field)
            if not condition.holds(value):
                self.filtered[condition.text] += 1
                return
        values = {what: _value(values_of, name) for what, name in vars(fields).items()}
        self.seen |= {getattr(fields, what) for what, value in values.items() if value is not None}
        if values["text"] is None:
            return self._skip("missing_text", path, where, f"has no {fields.text!r}")
        for what, value in values.items():
            if what != "text" and type(value) is int:
                values[what] = str(value)  # labels are often numbers
            elif what == "license" and value is not None:
                values[what] = _as_text(value)
            elif not isinstance(value, (str, type(None))):
                fault = f"{getattr(fields, what)!r} is a {type(value).__name__}, not text"
                return self._skip("wrong_type", path, where, fault)
        text, split = values["text"], values["split"] or None
        if not text.strip() and self.boundary.is_plain:
            return self._skip("empty", path, where, "is empty")
        if split is not None and split not in SPLITS:
            fault = f"{fields.split!r} is {split!r}, not one of {', '.join(SPLITS)}"
            return self._skip("unknown_split", path, where, fault)
        domain = values["domain"] or shown(path.absolute().parent.name) or "unknown"
        source = values["source"] or f"{shown(path.name)}:{where}"
        joined_by = ""
        if self.join_field:
            value = _value(values_of, self.join_field)
            self.seen |= {self.join_field} if value is not None else set()
            joined_by = f"record {record.position}" if value is None else f"={_as_text(value)}"
        try:
            size, _, _ = len(text.encode()), domain.encode(), source.encode()
            (values["license"] or "").encode()
        except UnicodeEncodeError as error:
            # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
            fault = f"has half of a surrogate pair ({error.reason})"
            return self._skip("invalid_utf8", path, where, fault)
        yield Document(
            text=text,
            domain=domain,
            source=source,
            split=SPLITS[split] if split else None,
            size=size,
            license=values["license"] or None,
            index=record.position,
            number=None if values["source"] else record.number,
            joined_by=joined_by,
        )

    def skip_all(self, reason: str, documents: Sequence[Document]) -> None:
        """Skip documents that were read and turned out to be of no use."""
        for document in documents:
            self._skip(reason, Path(document.source), "text", "gives no tokens")

    def _lost(self, reason: str, first: Document, path: Path) -> None:
        fault = "is empty"
        if reason == "too_long":
            fault = (
                f"and what follows is a document of more than {self.max_bytes / 1e6:g} MB; allow "
                f"more with --max-document-mb"
            )
        self._skip(reason, path, first.source, fault)

    def _skip(self, reason: str, path: Path, where: str, fault: str) -> None:
        if self.strict:
            raise UserError(
                f"{path}: {where} {fault}; repair it, or have emotrain prepare skip and count such "
                f"documents, which it does without --strict"
            )
        if reason == "too_long":  # rare, and much is lost
            log.warning("%s: %s %s; it is skipped", path, where, fault)
        self.skipped[reason] += 1


def warn_of_nothing(path: Path, lost: int) -> None:
    """Say that a file gives no document."""
    log.warning(
        "%s: gives no document, all %d of its lines or rows are skipped; if it is no data, "
        "leave it out (JSON files hold one object a line)",
        path,
        lost,
    )


def _as_text(value: Any) -> str:
    """A label of any type as text."""
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    return value if isinstance(value, str) else str(value)


def _value(record: dict[str, Any], name: str) -> Any:
    """The value of a key, or of a key inside of objects where the name has dots."""
    if name in record or "." not in name:
        return record.get(name)
    outer, _, inner = name.partition(".")
    value = record.get(outer)
    return _value(value, inner) if isinstance(value, dict) else None
