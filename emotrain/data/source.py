"""What the parts of the data layer ask of each other.

    TokenStore   streams of tokens where they lie: a data set, published files, other libraries'
    Windows      sequences cut out of a store, by number: as they lie, of one domain, best fit
    DataSource   sequences in an order, by step: `Loader` over windows, a mixture of loaders

A new format is a TokenStore, another way to cut is a Windows, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # it loads torch, and writing data needs none
    from emotrain.batch import PackedBatch


class Window(NamedTuple):
    """A piece of a stream."""

    tokens: np.ndarray
    """Token ids [n], read-only."""
    lengths: np.ndarray
    """int64: lengths of the documents inside, which sum to n; the first and the last may be
    pieces."""
    ids: np.ndarray
    """int64: the permanent id of each document in its store; not negative, below 2^48."""


def behind(window: Window, tokens: int) -> Window:
    """What of a window comes after its first tokens."""
    ends = np.cumsum(window.lengths) - tokens
    left = ends > 0
    return Window(window.tokens[tokens:], np.diff(ends[left], prepend=0), window.ids[left])


class TokenStore(Protocol):
    """Streams of tokens, a shard each, with the documents they consist of. Everything read is
    checked before it is given: ids lie in the vocabulary, lengths are positive. Safe to call from
    several threads."""

    @property
    def path(self) -> Path | str:
        """Where it lies, for messages."""

    @property
    def split(self) -> str:
        """`train` or `valid`."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer of these tokens; no file where nobody knows it."""

    @property
    def shard_tokens(self) -> Sequence[int]:
        """Tokens of each shard; known without reading one."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ for any other tokens, order or vocabulary."""

    def window(self, shard: int, start: int, stop: int) -> Window:
        """The tokens [start, stop) of a shard's stream.

        Raises:
            UserError: what was read is not what was written.
        """

    def edges(self, shard: int, start: int, stop: int) -> np.ndarray:
        """int64, rising: `start`, where documents begin between it and `stop`, and `stop`.

        Raises:
            UserError: as `window`.
        """


class Rows(NamedTuple):
    """Sequences as `PackedBatch.from_documents` takes them."""

    tokens_BS: np.ndarray
    """int64 token ids."""
    lengths_G: np.ndarray
    """int64: lengths of the documents, or pieces of them, that fill the rows one after the other;
    those of a row sum to S."""
    ids_G: np.ndarray
    """int64: the permanent id of each."""


class Windows(Protocol):
    """Sequences of one length by number, and the order of an epoch of them."""

    @property
    def store(self) -> TokenStore: ...

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""

    @property
    def span(self) -> int:
        """Sequences that are neighbours in the data and in every order: places w * span to
        w * span + span - 1 are as many sequences that follow one another in a stream."""

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch; a multiple of `span`."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the data, with those that no sequence holds."""

    @property
    def fingerprint(self) -> str:
        """Of the store, and of how it is cut and put in order."""

    def ordered(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The number of the sequence at each place of an epoch: for each key a permutation of
        [0, num_sequences), without state.

        Args:
            places: int64 [B] in [0, num_sequences).
            keys: uint64 [B], of seed and epoch.
        """

    def rows(self, numbers: np.ndarray) -> Rows:
        """The sequences of these numbers."""


class DataSource(Protocol):
    """Sequences in a fixed order, position after position, without end. `Loader` is the one of a
    prepared data set; whatever else can answer this can be trained on."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the data, with those that no sequence holds."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer of these tokens; a checkpoint takes a copy of it."""

    @property
    def fingerprint(self) -> str:
        """Text that changes when any position holds another sequence: a run goes on with the same
        one. The seed of the order is not part of it."""

    def step(
        self,
        step_index: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[PackedBatch]:
        """This rank's micro-batches of a step, in order. Step s of all ranks is positions
        [s * global_batch, (s + 1) * global_batch): nothing but the number of a step is needed to
        go on, on any number of ranks.

        Raises:
            UserError: sizes that do not divide, or numbers out of range.
        """
