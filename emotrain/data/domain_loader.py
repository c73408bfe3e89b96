"""The documents of one domain as sequences: `Loader` over a part of a data set.

The domain's documents, one after the other in the order of the data set, are one stream, which is
cut into windows as `loader` cuts a shard. Memory holds where each of them lies, not their tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from emotrain.batch import PackedBatch
from emotrain.data.loader import Loader
from emotrain.errors import UserError


class DomainLoader(Loader):
    """As `Loader`, of the documents of `domain` alone.

    Raises:
        UserError: no such domain, or less of it than one sequence.
    """

    def __init__(self, domain: str, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.domain = domain
        known = self.dataset.domains[self.split]
        if domain not in known:
            raise UserError(
                f"{self.dataset.path}: has no {self.split} documents of domain {domain!r}; its "
                f"domains are {', '.join(sorted(known))}"
            )
        rows = [self._rows_of(index) for index in range(len(self.dataset.shards[self.split]))]
        self._shard, self._start, self._id, lengths = (
            np.concatenate(column) for column in zip(*rows, strict=True)
        )
        self._edges = np.concatenate(([0], np.cumsum(lengths)))
        """Where each document starts in the stream of the domain, and where the last one ends."""
        self.num_tokens = int(self._edges[-1])
        self.num_sequences = self.num_tokens // self.sequence_length
        if not self.num_sequences:
            raise UserError(
                f"{self.dataset.path}: domain {domain!r} has {self.num_tokens} {self.split} "
                f"tokens, no whole sequence of {self.sequence_length}; lower data.sequence_length"
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

    @cached_property
    def fingerprint(self) -> str:
        """As of `Loader`, and of the domain."""
        identity = f"{self.dataset.fingerprint(self.split)} {self.split} {self.sequence_length}"
        return hashlib.sha256(f"{identity} domain {self.domain}".encode()).hexdigest()[:16]

    def batch(self, positions: Sequence[int] | np.ndarray) -> PackedBatch:
        """As of `Loader`; the documents use the exclusive experts of their domain."""
        return replace(super().batch(positions), domain=self.domain)

    def _rows(self, windows: np.ndarray) -> tuple[np.ndarray, list[list[int]], list[Sequence[int]]]:
        tokens_BS = np.empty((len(windows), self.sequence_length), dtype=np.int64)
        lengths: list[list[int]] = []
        ids: list[Sequence[int]] = []
        for row, begin in enumerate((windows * self.sequence_length).tolist()):
            end = begin + self.sequence_length
            first, last = np.searchsorted(self._edges, [begin + 1, end]) - [1, 0]
            edges = self._edges[first : last + 1].clip(begin, end)
            for number, start, stop in zip(
                range(first, last), edges[:-1].tolist(), edges[1:].tolist(), strict=True
            ):
                at = int(self._start[number] - self._edges[number]) + start
                tokens, _, _ = self.dataset.window(
                    self.split, int(self._shard[number]), at, at + stop - start
                )
                tokens_BS[row, start - begin : stop - begin] = tokens
            lengths.append(np.diff(edges).tolist())
            ids.append(self._id[first:last].tolist())
        return tokens_BS, lengths, ids
