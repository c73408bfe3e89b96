"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from emotrain.config.kinds import NonNegativeInt, PathText


@dataclass(frozen=True)
class RepetitionFilterConfig:
    """Sequences with long periodic repetitions get no loss (spec 4.4); they still pass through
    the model, or others take their places."""

    enabled: bool = False
    """Whether to filter."""
    min_period: int = 1
    """Shortest period looked for, in tokens."""
    max_period: int = 13
    """Longest period looked for, in tokens."""
    max_count: int = 32
    """A sequence is filtered when a period repeats at least this often."""
    action: Literal["mask", "replace"] = "mask"
    """`mask`: no loss on it, as published; `replace`: another sequence of the data is read in its
    place, the same on every layout."""


@dataclass(frozen=True)
class RawTokensConfig:
    """Files of tokens or text that `emotrain prepare` did not write: what they do not say of
    themselves. Vocabulary and EOS are those of `data.tokenizer`, or else `vocab_size` and
    `eos_id`."""

    format: Literal["auto", "dolma", "megatron", "mds", "columns"] = "auto"
    """`dolma`: plain arrays of tokens (Dolma, OLMo); `megatron`: `.bin` with `.idx`; `mds`:
    MosaicML's shards with `index.json`; `columns`: token ids or text in Parquet, Arrow or JSONL;
    `auto`: by the names of the files."""
    dtype: Literal["auto", "uint8", "uint16", "uint32", "int32", "int64"] = "auto"
    """Type of the tokens in plain arrays; `auto`: the smallest that holds the vocabulary, as the
    reference writes them (spec 4.1). Of MDS in columns of `bytes`; `auto`: int64."""
    documents: Literal["auto", "rows", "eos"] = "auto"
    """What a document of MDS is. `rows`: a sample; `eos`: what EOS ends, wherever samples end;
    `auto`: `eos` where all samples have as many tokens, as llm-foundry's do, else `rows`."""
    vocab_size: NonNegativeInt = 0
    """One more than the largest token id; 0 means that of `data.tokenizer`."""
    eos_id: NonNegativeInt = 0
    """The token that ends every document, where `vocab_size` is given."""
    eos_token: str = ""
    """Its text, where `data.tokenizer` is given; empty means that of `emotrain prepare`."""
    root: str = ""
    """Folder or address that the paths of a list or a mix of files are relative to; empty means
    the folder of the list."""
    tokenizer_name: str = ""
    """What stands for `{TOKENIZER}` in the paths of a mix, such as `allenai/dolma2-tokenizer`."""
    column: str = ""
    """Column with the token ids or the text; empty means `input_ids`, `tokens` or `text`, the first
    that is there."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    path: PathText = ""
    """Folder written by `emotrain prepare`; files of tokens or text as others write them, see
    `data.raw` (docs/data.md); a mixture of these, a .yaml file (docs/mixtures.md); or a JSONL file
    of prompts and answers, whose loss is on answers alone: `prompt` and `answer`, or `question`,
    `choices` and `answer`."""
    tokenizer: PathText = ""
    """The tokenizer.json for files that `emotrain prepare` did not write."""
    domain: str = ""
    """Train on the documents of this domain alone, with its exclusive experts, where the model has
    any; empty means all documents, with the experts that are common to them."""
    sequence_length: int = 4096
    """Tokens of one packed sequence."""
    packing: Literal["concat", "best_fit"] = "concat"
    """`concat`: sequences are cut out of the stream of documents as it lies, as published;
    `best_fit`: documents are placed where they fit, so that few are cut. A document that is cut
    gets a pool in each of its sequences."""
    cross_document_targets: bool = True
    """Whether the last token of a document is trained to predict the first of the next one in its
    sequence, as the reference does (spec 4.3)."""
    verify_checksums: bool = True
    """Whether what is read is hashed: in training the 64 KiB blocks around each sequence; in
    evaluation, and for data sets prepared without checksums of blocks, whole shards (a second or
    two a gigabyte)."""
    on_bad_data: Literal["stop", "replace"] = "stop"
    """What a sequence does that cannot be read, or whose checksums are wrong: it stops the run, or
    another sequence is read in its place, and its position is logged."""
    allow_change: bool = False
    """Whether a checkpoint may go on with other data, another sequence length, batch or seed than
    it was trained with. The data are then read from their start."""
    repetition_filter: RepetitionFilterConfig = field(default_factory=RepetitionFilterConfig)
    """Filter of periodic sequences."""
    raw: RawTokensConfig = field(default_factory=RawTokensConfig)
    """Files of tokens or text as others write them."""
