"""A task as a file: one question, or one plain text, a line of JSON.

    {"question": "2 + 2 = ?", "choices": ["3", "4"], "answer": 1}
    {"question": "Who wrote Faust?", "answers": ["Goethe", "Johann Wolfgang von Goethe"]}
    {"text": "Once upon a time …"}

All lines of a file are of one kind. docs/tasks.md describes the fields. Nothing in a file is
trusted: what cannot be used is refused with its line.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emotrain.errors import MissingFileError, UserError
from emotrain.files import sha256_of

log = logging.getLogger("emotrain")

Kind = Literal["choice", "generation", "text"]
"""What is asked: which of the choices; an answer in words; how well a text is predicted."""

LONGEST_LINE = 1 << 24
"""Bytes of the longest line that is read."""
SHOWN = 8
"""Lines that a warning names."""

NO_SPLIT = "test"
"""The split of an item that names none."""

READ = ("question", "prompt", "choices", "answer", "answers", "text", "split", "subject")
LABELS = ("id", "source", "domain")
"""Fields that files often have and that have no part in a score."""


@dataclass(frozen=True)
class Item:
    """One line."""

    line: int
    """Its number in the file, from 1."""
    kind: Kind
    prompt: str
    """What comes before the answer, without examples; of a plain text empty."""
    answers: tuple[str, ...]
    """The choices; or the answers that are accepted; or the text alone."""
    gold: int
    """Which of `answers` an example shows and bits per byte are measured on; 0 but for choices."""
    split: str
    subject: str

    @property
    def answer(self) -> str:
        return self.answers[self.gold]

    @property
    def asks(self) -> str:
        """What tells it from others: the question, or the plain text."""
        return self.prompt or self.answer


@dataclass(frozen=True)
class TaskFile:
    """A file, as read."""

    name: str
    path: Path
    fingerprint: str
    """sha256 of the file."""
    items: tuple[Item, ...]

    @property
    def kind(self) -> Kind:
        return self.items[0].kind


def read_file(path: str | Path) -> TaskFile:
    """Read a file of questions or texts.

    Raises:
        UserError: no such file, nothing in it, or a line that cannot be used, with its number.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file of questions; give a JSONL file")
    items: list[Item] = []
    unread: set[str] = set()
    for number, record in _records(path):
        try:
            item = _item(record, number)
            if items and item.kind != items[0].kind:
                raise UserError(
                    f"is of kind {item.kind}, line {items[0].line} of kind {items[0].kind}; make "
                    f"a file of each kind"
                )
        except UserError as error:
            raise UserError(f"{path}: line {number} {error}") from None
        unread |= record.keys() - {*READ, *LABELS}
        items.append(item)
    if not items:
        raise UserError(f"{path}: has no questions and no texts; give at least one line")
    if unread:
        log.warning("%s: has fields that are not read: %s", path, ", ".join(sorted(unread)[:SHOWN]))
    twice = [item.line for item in items if len(set(item.answers)) < len(item.answers)]
    if twice and items[0].kind == "choice":
        more = f" and {len(twice) - SHOWN} more" if len(twice) > SHOWN else ""
        log.warning(
            "%s: the same choice stands twice in line %s%s; of equals the first counts as chosen",
            path,
            ", ".join(map(str, twice[:SHOWN])),
            more,
        )
    return TaskFile(path.stem, path, sha256_of(path), tuple(items))


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not empty."""
    with open(path, "rb") as stream:
        number = 0
        # Not more of a line than is kept is ever in memory.
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(
                    f"{path}: line {number} has more than {LONGEST_LINE >> 20} MiB; put each "
                    f"question on a line of its own"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{path}: line {number} is not JSON in UTF-8 ({reason}); repair it"
                ) from None
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}: line {number} holds a JSON {type(record).__name__}; give an object a "
                    f"line"
                )
            yield number, record


def _no_number(text: str) -> None:
    raise UserError(f"{text} is no JSON number")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"{max(names, key=names.count)!r} stands twice")
    return record


def _item(record: dict[str, Any], line: int) -> Item:
    asked = [name for name in ("question", "prompt", "text") if name in record]
    if len(asked) != 1:
        raise UserError(f"has {' and '.join(asked) or 'none'} of question, prompt, text; give one")
    text = _text(record, asked[0])
    labels = (_text(record, "split", "") or NO_SPLIT, _text(record, "subject", ""))
    if asked[0] == "text":
        if more := [name for name in ("choices", "answer", "answers") if name in record]:
            raise UserError(f"has a text and {more[0]}; a question with an answer is a `question`")
        return Item(line, "text", "", (text,), 0, *labels)
    prompt = f"Question: {text}\nAnswer:" if asked[0] == "question" else text
    if "choices" in record:
        if "answers" in record:
            raise UserError("has choices and answers; give the right choice as `answer`")
        choices = _texts(record, "choices")
        if len(choices) < 2:
            raise UserError("has one choice; give two or more")
        return Item(line, "choice", prompt, choices, _gold(record, choices), *labels)
    if ("answer" in record) == ("answers" in record):
        raise UserError("needs an answer, once; give `answer`, or `answers` where several will do")
    answers = _texts(record, "answers") if "answers" in record else (_text(record, "answer"),)
    return Item(line, "generation", prompt, answers, 0, *labels)


def _gold(record: dict[str, Any], choices: Sequence[str]) -> int:
    """Number of the right choice, which a file gives as number, letter or text."""
    answer = record.get("answer")
    if type(answer) is int:
        if not 0 <= answer < len(choices):
            raise UserError(
                f"has answer {str(answer)[:20]} of {len(choices)} choices; number them from 0"
            )
        found = answer
    elif isinstance(answer, str):
        texts = [i for i, choice in enumerate(choices) if choice == answer]
        letter = "ABCDEFGHIJKLMNOPQRSTUVWXYZ".find(answer) if len(answer) == 1 else -1
        readings = {*texts[:1], *([letter] if 0 <= letter < len(choices) else [])}
        if len(readings) != 1:
            what = "two of its choices, as a text and as a letter" if readings else "none of them"
            raise UserError(f"has choices, and answer {answer[:80]!r} is {what}; give its number")
        found = readings.pop()
    else:
        raise UserError("needs the right choice as `answer`: its number from 0, its letter or text")
    first = choices.index(choices[found])
    if first != found:
        raise UserError(
            f"has answer {found}, the same text as choice {first}, which would count as wrong; "
            f"give {first}"
        )
    return found


def _texts(record: dict[str, Any], name: str) -> tuple[str, ...]:
    values = record[name]
    if not isinstance(values, list) or not values:
        raise UserError(f"has {name} that are no list of texts; give at least one text")
    return tuple(_text({name: value}, name) for value in values)


def _text(record: dict[str, Any], name: str, default: str | None = None) -> str:
    value = record.get(name, default)
    if isinstance(value, str) and (value.strip() or value == default):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"has half a character (a lone surrogate) in {name}") from None
        return value
    what = "is empty" if isinstance(value, str) else f"is a JSON {type(value).__name__}, no text"
    raise UserError(f"has a {name} that {what}")


def in_order(items: Sequence[Item], seed: int) -> tuple[Item, ...]:
    """Items in an order that depends on the seed and on what they ask, and on nothing else: not on
    where they stand in a file."""

    def key(item: Item) -> bytes:
        return hashlib.sha256(f"{seed}\0{item.asks}".encode()).digest()

    return tuple(sorted(items, key=key))
