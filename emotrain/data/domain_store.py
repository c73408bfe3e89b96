"""The documents of one domain as a stream.

The domain's documents, one after the other in the order of the data set, are one stream, which is
cut into windows as any shard is. Memory holds where each of them lies, not their tokens.
"""

from __future__ import annotations

import numpy as np

from emotrain.data.formats import SplitStore
from emotrain.data.source import Window
from emotrain.errors import UserError


class DomainStore:
    """As `formats.SplitStore`, of the documents of `domain` alone, in one shard.

    Raises:
        UserError: no such domain, or less of it than `least` tokens, one sequence.
    """

    def __init__(self, store: SplitStore, domain: str, least: int):
        self.dataset, self.split, self.path = store.dataset, store.split, store.path
        self.vocab_size, self.eos_id = store.vocab_size, store.eos_id
        self.tokenizer_file, self.fingerprint = store.tokenizer_file, store.fingerprint
        self.whole, self.domain = store, domain
        known = store.dataset.domains[store.split]
        if domain not in known:
            raise UserError(
                f"{store.path}: has no {store.split} documents of domain {domain!r}; its "
                f"domains are {', '.join(sorted(known))}"
            )
        rows = [self._rows_of(index) for index in range(len(store.shard_tokens))]
        self._shard, self._start, self._id, lengths = (
            np.concatenate(column) for column in zip(*rows, strict=True)
        )
        self._edges = np.concatenate(([0], np.cumsum(lengths)))
        """Where each document starts in the stream of the domain, and where the last one ends."""
        self.shard_tokens = [int(self._edges[-1])]
        if self.shard_tokens[0] < least:
            raise UserError(
                f"{store.path}: domain {domain!r} has {self.shard_tokens[0]} {store.split} "
                f"tokens, no whole sequence of {least}; lower data.sequence_length"
            )

    def _rows_of(self, index: int) -> tuple[np.ndarray, ...]:
        """For each document of the domain in a shard: the shard, where it starts in it, its id and
        its length."""
        shard = self.dataset.shard(self.split, index)
        code = shard.domains.index(self.domain) if self.domain in shard.domains else -1
        rows = np.flatnonzero(shard.domain_of == code)
        starts = shard.offsets[rows]
        ids = self.dataset.first_ids[self.split][index] + rows
        return np.full(len(rows), index), starts, ids, shard.offsets[rows + 1] - starts

    def window(self, shard: int, start: int, stop: int) -> Window:
        first, edges = self._pieces(start, stop)
        some = slice(first, first + len(edges) - 1)
        lengths = np.diff(edges)
        begins = self._start[some] + edges[:-1] - self._edges[some]
        tokens = [
            self.whole.window(index, begin, begin + length).tokens
            for index, begin, length in zip(
                self._shard[some].tolist(), begins.tolist(), lengths.tolist(), strict=True
            )
        ]
        return Window(np.concatenate(tokens), lengths, self._id[some])

    def edges(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._pieces(start, stop)[1]

    def _pieces(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """The first document that has a part in [start, stop) of the stream, and the edges."""
        first, last = (np.searchsorted(self._edges, [start + 1, stop]) - [1, 0]).tolist()
        return first, self._edges[first : last + 1].clip(start, stop)
