"""Where one document ends and the next begins, for corpora whose records are not documents: a rule
that joins records, or cuts their texts, or both.

    field           every record is a document
    none            a file is one document: its records are no boundaries
    heading[:N]     a heading of level N or above begins a document: `# Title` of Markdown,
                    ` = Title = ` of wikis (N = 1 where it is left out)
    blank:N         N blank lines or more end a document
    fixed:N         every N characters, at a space where one is near
    marker:TEXT     TEXT, which is left out, ends a document
    none+RULE       joins the records of a file, and cuts what is joined by one of the rules above

With a field to join by, neighbouring records of the same value are joined, and then cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from emotrain.data.records import Document
from emotrain.errors import UserError

BLANK_EDGES = re.compile(r"\A(?:[^\S\n]*\n)+|(?:\n[^\S\n]*)+\Z")
"""Blank lines around a document that was cut out, which belong to none."""

Lost = Callable[[str, Document], None]
"""Told why documents are skipped, and the first record of theirs."""

RULES = "field, none, heading[:N], blank:N, fixed:N, marker:TEXT, or none+ and one of the last four"


@dataclass(frozen=True)
class Boundary:
    """A parsed rule."""

    joins: bool = False
    """Whether the records of a file, or of one value of the field to join by, are one text."""
    kind: str = ""
    """`heading`, `blank`, `fixed`, `marker`, or empty for no cuts."""
    number: int = 1
    marker: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether every record is a document."""
        return not (self.joins or self.kind)


def parse_boundary(text: str, join_field: str = "") -> Boundary:
    """A rule as it is written on the command line.

    Raises:
        UserError: no such rule.
    """
    rule = text.removeprefix("none+")
    kind, _, value = rule.partition(":")
    joined = bool(join_field) or text.startswith("none")
    if text in ("field", "none"):
        return Boundary(joined)
    if kind == "marker" and value:
        return Boundary(joined, kind, marker=value)
    if kind == "heading" and not value:
        value = "1"
    if kind in ("heading", "blank", "fixed") and value.isdecimal() and int(value) > 0:
        return Boundary(joined, kind, int(value))
    raise UserError(f"--boundary {text!r} is no rule; give {RULES}")


def regroup(
    records: Iterator[Document], rule: Boundary, limit: int, lost: Lost
) -> Iterator[Document]:
    """The documents of records of one file.

    Args:
        records: in order; `joined_by` says which belong together.
        limit: bytes of a document; of a longer one nothing is kept.
        lost: told of a document that is too long, and of records without one.
    """
    if rule.is_plain:
        yield from records
        return
    if not rule.joins:
        for record in records:
            yield from _documents(iter([record]), rule, limit, lost)
        return
    for _, group in groupby(records, key=lambda record: record.joined_by):
        yield from _documents(group, rule, limit, lost)


def _documents(
    records: Iterator[Document], rule: Boundary, limit: int, lost: Lost
) -> Iterator[Document]:
    """The documents of records that belong together."""
    cutter, before = _Cutter(rule), ""
    first: Document | None = None
    parts: list[str] = []
    size = part = count = 0
    found = False

    def finished() -> Iterator[Document]:
        nonlocal size, part, parts, found
        assert first is not None
        text = "".join(parts)
        if rule.kind:
            text = BLANK_EDGES.sub("", text)
        if size > limit:
            lost("too_long", first)
            found = True
        elif text.strip():
            found = True
            yield replace(first, text=text, size=len(text.encode()), part=part)
            part += 1
        size, parts = 0, []

    def take(text: str) -> None:
        nonlocal size, parts
        size += len(text) if text.isascii() else len(text.encode())
        if size <= limit:
            parts.append(text)
        else:
            parts = []

    for record in records:
        if first is None:
            first = record
        # Every record ends in a line end, its own or one that is added.
        text_of = ("\n" if count and not before.endswith("\n") else "") + record.text
        before, count = record.text, count + 1
        for begins, text in cutter.cut(text_of):
            if begins:
                yield from finished()
            take(text)
    if first is not None:
        take(cutter.held)
        yield from finished()
        if not found:
            lost("empty", first)


class _Cutter:
    """Cuts texts that come one after the other and belong together."""

    def __init__(self, rule: Boundary):
        self.rule = rule
        self.newlines = 0
        """In the white space just before: one more than blank lines."""
        self.held = ""
        """The start of a document of a fixed number of characters, which `cut` holds back."""
        level = f"{{1,{rule.number}}}"
        self.heading = re.compile(
            rf"^(?:\#{level}[ \t]+\S.*| ?(={level}) [^=\n](?:.*[^=\n])? \1[ \t]*)$", re.MULTILINE
        )

    def cut(self, text: str) -> Iterator[tuple[bool, str]]:
        """Pairs: whether a document begins, and text of it."""
        if not self.rule.kind:
            yield False, text
            return
        yield from getattr(self, f"_cut_{self.rule.kind}")(text)

    def _cut_heading(self, text: str) -> Iterator[tuple[bool, str]]:
        at, begins = 0, False
        for match in self.heading.finditer(text):
            yield begins, text[at : match.start()]
            at, begins = match.start(), True
        yield begins, text[at:]

    def _cut_marker(self, text: str) -> Iterator[tuple[bool, str]]:
        for number, piece in enumerate(text.split(self.rule.marker)):
            yield number > 0, piece

    def _cut_blank(self, text: str) -> Iterator[tuple[bool, str]]:
        for number, line in enumerate(text.split("\n")):
            content = line if number == 0 else "\n" + line
            self.newlines += number > 0
            if line.strip():
                yield self.newlines > self.rule.number, content
                self.newlines = 0
            else:
                yield False, content

    def _cut_fixed(self, text: str) -> Iterator[tuple[bool, str]]:
        size = self.rule.number
        self.held += text
        while len(self.held) > size:
            near = range(size, size - max(1, size // 4), -1)
            end = next((at for at in near if self.held[at].isspace()), size)
            yield False, self.held[:end]
            yield True, ""
            self.held = self.held[end:]
