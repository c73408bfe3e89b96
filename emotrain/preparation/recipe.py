"""Everything but the inputs that decides what `emotrain prepare` makes. It goes to all processes
and machines, is compared when a half-done data set goes on, and stands in the dataset card."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from emotrain.data.boundaries import Boundary, parse_boundary
from emotrain.data.document_filters import (
    Condition,
    Language,
    parse_condition,
    parse_language,
)
from emotrain.data.documents import DocumentReader, Fields
from emotrain.data.records import MAX_DOCUMENT_BYTES
from emotrain.data.tokenizer import EOS_TOKEN
from emotrain.errors import UserError
from emotrain.preparation.deduplicate import Deduplication, parse_deduplication

SHARD_TOKENS = 2**27
"""Tokens of a shard, about: 256 or 512 MiB, which is held in memory twice while it is shuffled."""

WINDOW = 4096
"""Tokens of a window of training, against which documents' lengths are shown."""


@dataclass(frozen=True)
class Recipe:
    """The options of `prepare`, as they were given."""

    eos_token: str = EOS_TOKEN
    allow_special: bool = False
    shard_tokens: int = SHARD_TOKENS
    valid_fraction: float = 0.01
    seed: int = 0
    strict: bool = False
    fields: Fields = field(default_factory=Fields)
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    boundary: str = "field"
    join_field: str = ""
    where: tuple[str, ...] = ()
    language: str = ""
    min_tokens: int = 0
    max_tokens: int = 0
    """0 for no limit."""
    deduplicate: str = ""
    window: int = WINDOW

    def __post_init__(self) -> None:
        """Raises: UserError, naming the option that cannot be used."""
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens={self.shard_tokens} must be positive")
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid_fraction={self.valid_fraction} must be at least 0 and below 1")
        for name, least in (("seed", 0), ("min_tokens", 0), ("max_tokens", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if 0 < self.max_tokens < self.min_tokens:
            raise UserError(
                f"max_tokens={self.max_tokens} is below min_tokens={self.min_tokens}; no document "
                f"would be kept"
            )
        if self.max_document_bytes < 1:
            raise UserError(
                f"max_document_mb={self.max_document_bytes / 1e6:g} must be positive; 256 is the "
                f"default"
            )
        # Whatever else is wrong is known before anything is read.
        self.parsed_boundary, self.conditions, self.deduplication  # noqa: B018
        if self.language:
            parse_language(self.language)

    @property
    def parsed_boundary(self) -> Boundary:
        return parse_boundary(self.boundary, self.join_field)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(parse_condition(text) for text in self.where)

    @property
    def deduplication(self) -> Deduplication | None:
        return parse_deduplication(self.deduplicate) if self.deduplicate else None

    @property
    def parsed_language(self) -> Language | None:
        return parse_language(self.language) if self.language else None

    def reader(self) -> DocumentReader:
        """A reader of documents, with its counts at zero."""
        return DocumentReader(
            self.fields,
            self.strict,
            self.conditions,
            self.parsed_boundary,
            self.join_field,
            self.max_document_bytes,
        )

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values | {"where": list(self.where)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        return cls(
            **{**values, "fields": Fields(**values["fields"]), "where": tuple(values["where"])}
        )
