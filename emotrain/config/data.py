"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass, field

from emotrain.config.kinds import PathText


@dataclass(frozen=True)
class RepetitionFilterConfig:
    """Sequences with long periodic repetitions get no loss (spec 4.4); they still pass through
    the model."""

    enabled: bool = False
    """Whether to filter."""
    min_period: int = 1
    """Shortest period looked for, in tokens."""
    max_period: int = 13
    """Longest period looked for, in tokens."""
    max_count: int = 32
    """A sequence is filtered when a period repeats at least this often."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    path: PathText = ""
    """Folder written by `emotrain prepare`, or a JSONL file of prompts and answers, whose loss is
    on answers alone: `prompt` and `answer`, or `question`, `choices` and `answer`."""
    tokenizer: PathText = ""
    """The tokenizer.json for such a file."""
    domain: str = ""
    """Train on the documents of this domain alone, with its exclusive experts, where the model has
    any; empty means all documents, with the experts that are common to them."""
    sequence_length: int = 4096
    """Tokens of one packed sequence."""
    cross_document_targets: bool = True
    """Whether the last token of a document is trained to predict the first of the next one in its
    sequence, as the reference does (spec 4.3)."""
    verify_checksums: bool = True
    """Whether what is read is hashed: in training the 64 KiB blocks around each sequence; in
    evaluation, and for data sets prepared without checksums of blocks, whole shards (a second or
    two a gigabyte)."""
    allow_change: bool = False
    """Whether a checkpoint may go on with other data, another sequence length, batch or seed than
    it was trained with. The data are then read from their start."""
    repetition_filter: RepetitionFilterConfig = field(default_factory=RepetitionFilterConfig)
    """Filter of periodic sequences."""
