"""Which documents are kept: by their fields, length and language. Every filter looks at one
document alone, so that it decides alike in any order and on any number of workers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from emotrain.errors import MissingPackageError, UserError

LANGUAGE_CHARACTERS = 2000
"""Of a document's start, by which its language is told."""

SPLIT_CONDITION = re.compile(r"(.+?)(>=|<=|!=|=)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """What a field must hold: `lang=en,de`, `meta.kind!=spam`, `score>=2.5`."""

    text: str
    """As it was written."""
    field: str
    operator: str
    values: tuple[str, ...]
    number: float = 0.0

    def holds(self, value: Any) -> bool:
        """Of the field's value. A list holds what one of its items does; a missing field
        nothing."""
        if isinstance(value, list):
            found = [self._holds(item) for item in value]
            return all(found) if self.operator == "!=" else any(found)
        return value is not None and self._holds(value)

    def _holds(self, value: Any) -> bool:
        if self.operator in (">=", "<="):
            try:
                number = float(value)
            except (TypeError, ValueError):
                return False
            return number >= self.number if self.operator == ">=" else number <= self.number
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        return (shown in self.values) == (self.operator == "=")


def parse_condition(text: str) -> Condition:
    """A condition as it is written on the command line.

    Raises:
        UserError: it has another form.
    """
    match = SPLIT_CONDITION.fullmatch(text)
    if not match:
        raise UserError(
            f"--where {text!r} is no condition; give FIELD=VALUE[,VALUE], FIELD!=VALUE, "
            f"FIELD>=NUMBER or FIELD<=NUMBER"
        )
    field, operator, value = match.groups()
    if operator in ("=", "!="):
        return Condition(text, field, operator, tuple(value.split(",")))
    try:
        return Condition(text, field, operator, (), float(value))
    except ValueError:
        raise UserError(f"--where {text!r}: {value!r} is not a number; give one") from None


@dataclass(frozen=True)
class Language:
    """A language, and how sure one must be of it."""

    codes: tuple[str, ...]
    confidence: float


def parse_language(text: str) -> Language:
    """`en`, `en,de` or `en:0.8`.

    Raises:
        UserError: a confidence that is none.
    """
    codes, _, value = text.partition(":")
    try:
        confidence = float(value or 0)
    except ValueError:
        confidence = -1.0
    if not codes or not 0 <= confidence <= 1:
        raise UserError(
            f"--language {text!r} is none; give codes of ISO 639 and a confidence from 0 to 1: "
            f"en, en,de or en:0.8"
        )
    return Language(tuple(codes.split(",")), confidence)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_filter(language: Language) -> Callable[[str], bool]:
    """Whether a text is in one of the languages, as py3langid tells it from the first
    LANGUAGE_CHARACTERS.

    Raises:
        MissingPackageError: py3langid is not installed. UserError: a code that it does not know.
    """
    try:
        identifier = _identifier()
    except ImportError:
        raise MissingPackageError(
            "--language needs py3langid; install it with: pip install 'emotrain[language]'"
        ) from None
    unknown = sorted(set(language.codes) - set(identifier.labels))
    if unknown:
        raise UserError(
            f"--language {unknown[0]!r} is not known to py3langid; choose among "
            f"{', '.join(sorted(identifier.labels))}"
        )

    def keep(text: str) -> bool:
        code, confidence = identifier.classify(text[:LANGUAGE_CHARACTERS])
        return code in language.codes and confidence >= language.confidence

    return keep
