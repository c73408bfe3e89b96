"""The documents of one domain as sequences.

The domain's documents, one after the other in the order of the data set, are one stream, which is
cut into windows as `loader` cuts a shard. Memory holds where each of them lies, not their tokens.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from emotrain.data.formats import SplitStore
from emotrain.data.loader import permute
from emotrain.data.source import Rows
from emotrain.errors import UserError


class DomainWindows:
    """As `loader.StreamWindows`, of the documents of `domain` alone.

    Raises:
        UserError: no such domain, or less of it than one sequence.
    """

    def __init__(self, store: SplitStore, sequence_length: int, domain: str):
        self.store, self.sequence_length, self.domain = store, sequence_length, domain
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
        self.num_tokens = int(self._edges[-1])
        self.num_sequences = self.num_tokens // sequence_length
        if not self.num_sequences:
            raise UserError(
                f"{store.path}: domain {domain!r} has {self.num_tokens} {store.split} "
                f"tokens, no whole sequence of {sequence_length}; lower data.sequence_length"
            )

    def _rows_of(self, index: int) -> tuple[np.ndarray, ...]:
        """For each document of the domain in a shard: the shard, where it starts in it, its id and
        its length."""
        dataset, split = self.store.dataset, self.store.split
        shard = dataset.shard(split, index)
        code = shard.domains.index(self.domain) if self.domain in shard.domains else -1
        rows = np.flatnonzero(shard.domain_of == code)
        starts = shard.offsets[rows]
        ids = dataset.first_ids[split][index] + rows
        return np.full(len(rows), index), starts, ids, shard.offsets[rows + 1] - starts

    @cached_property
    def fingerprint(self) -> str:
        """As of `StreamWindows`, and of the domain."""
        identity = f"{self.store.fingerprint} {self.store.split} {self.sequence_length}"
        return hashlib.sha256(f"{identity} domain {self.domain}".encode()).hexdigest()[:16]

    def ordered(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return permute(places, self.num_sequences, keys)

    def rows(self, numbers: np.ndarray) -> Rows:
        rows = Rows(np.empty((len(numbers), self.sequence_length), dtype=np.int64), [], [])
        for row, begin in enumerate((numbers * self.sequence_length).tolist()):
            end = begin + self.sequence_length
            first, last = np.searchsorted(self._edges, [begin + 1, end]) - [1, 0]
            edges = self._edges[first : last + 1].clip(begin, end)
            for number, start, stop in zip(
                range(first, last), edges[:-1].tolist(), edges[1:].tolist(), strict=True
            ):
                at = int(self._start[number] - self._edges[number]) + start
                found = self.store.window(int(self._shard[number]), at, at + stop - start)
                rows.tokens_BS[row, start - begin : stop - begin] = found.tokens
            rows.lengths.append(np.diff(edges).tolist())
            rows.ids.append(self._id[first:last].tolist())
        return rows
