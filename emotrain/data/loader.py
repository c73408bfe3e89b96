"""The loader: a prepared data set in, PackedBatch out, in an order that is a pure function of
(seed, position).

    data/wiki/train/shard-00000.arrow   tokens  | a a a a E b b E c c c c c c c E d d |   E ends a
                                        offsets   0         5     8               16      document
    sequence_length = 6                 windows | a a a a E b | b E c c c c | c c c E d d |
                                                  0             1             2

1. **Windows.** A shard is one stream of tokens, documents one after the other. Window i of a shard
   is the stream's tokens [i * sequence_length, (i + 1) * sequence_length); what is left at the end
   of a shard is dropped (`StreamWindows`). Windows are numbered through all shards. Nothing is
   stored a window: a number is turned into a shard and a place by a search among the shards.
2. **Order.** Training reads positions 0, 1, 2, … Position p belongs to epoch p // num_sequences,
   and a permutation of the window numbers, keyed by (seed, epoch), says which window it is
   (`permute`). The permutation is computed, not stored: looking up one position costs the
   same among a thousand windows as among 10^12, and every epoch has its own order.
3. **Who reads what.** Step s of G sequences is positions [s * G, (s + 1) * G). Rank r of W takes
   the r-th of W equal blocks of them, and cuts its block into micro-batches. So neither W nor the
   micro-batch size changes what a step trains on, and a run goes on from its step number alone:
   there is no state to save, and none to lose.
4. **Documents.** The offsets say which documents a window touches, and where
   (`TokenStore.window`); EOS tokens are not looked at. In the example, window 1 is the
   last token of b and its EOS, and the first four of c. A document that is cut goes on in another
   window as a document of its own, under the same permanent id.
5. **Targets** are the tokens shifted by one inside a window; its last position has none. With
   `cross_document_targets` the EOS of a document predicts the first token of the next one in the
   window, as the reference does (spec 4.3).
6. **Filter.** A window that repeats itself keeps its tokens and loses all its targets (`filters`,
  spec 4.4).
7. **Ahead of time.** `prefetch` does all of this for the coming steps on a thread, while the
   device computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from emotrain.batch import IGNORE, PackedBatch
from emotrain.config import RepetitionFilterConfig
from emotrain.data.filters import is_repetitive
from emotrain.data.source import Rows, TokenStore, Windows, behind
from emotrain.errors import UserError


class StreamWindows:
    """Windows of shards as they lie, one after the other; see the top of this file.

    Args:
        span: so many windows stay neighbours, in one micro-batch: documents go on through them.
        part: of the store's data set that its streams are, for the fingerprint.
    Raises:
        UserError: no shard holds a whole window.
    """

    def __init__(self, store: TokenStore, sequence_length: int, span: int = 1, part: str = ""):
        if sequence_length < 2:
            raise UserError(f"sequence_length={sequence_length}: a sequence has at least 2 tokens")
        assert span >= 1
        self.store, self.sequence_length = store, sequence_length
        self.span, self.part = span, part
        whole = [size // (sequence_length * span) * span for size in store.shard_tokens]
        self._first_windows = np.cumsum([0, *whole])
        self.num_sequences = int(self._first_windows[-1])
        self.num_tokens = sum(store.shard_tokens)
        if not self.num_sequences:
            raise UserError(
                f"{store.path}: no {store.split} shard holds a whole sequence of "
                f"{sequence_length * span} tokens ({self.num_tokens} in {len(store.shard_tokens)} "
                f"shards); lower sequence_length or prepare more documents"
            )

    @cached_property
    def fingerprint(self) -> str:
        identity = f"{self.store.fingerprint} {self.store.split} {self.sequence_length}"
        identity += f" {self.part}" * bool(self.part) + f" span {self.span}" * (self.span > 1)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def ordered(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        groups, inside = np.divmod(places, self.span)
        return permute(groups, self.num_sequences // self.span, keys) * self.span + inside

    def rows(self, numbers: np.ndarray) -> Rows:
        shards = np.searchsorted(self._first_windows, numbers, side="right") - 1
        starts = (numbers - self._first_windows[shards]) * self.sequence_length
        # Neighbours are read as one: a document that they are cut from has one id in all of them.
        befores = numbers % self.span * self.sequence_length
        tokens_BS = np.empty((len(numbers), self.sequence_length), dtype=np.int64)
        lengths, ids = [], []
        for row, (shard, start, before) in enumerate(
            zip(shards.tolist(), starts.tolist(), befores.tolist(), strict=True)
        ):
            window = self.store.window(shard, start - before, start + self.sequence_length)
            if before:
                window = behind(window, before)
            tokens_BS[row] = window.tokens
            lengths.append(window.lengths)
            ids.append(window.ids)
        return Rows(tokens_BS, np.concatenate(lengths), np.concatenate(ids))


ORDERED_TOGETHER = 256
"""Positions looked up at once and kept: one costs about as much as all of them."""


class Loader:
    """Windows in order, as batches; see the top of this file. All methods may be called from
    several threads.

    Args:
        windows: the sequences.
        seed: of the order.
        cross_document_targets: whether the last token of a document predicts the first of the next
            one.
        repetition_filter: which sequences get no loss; None, or one that is not enabled, for no
            filter.
        domain: of all documents, whose exclusive experts they use; empty for none.
    """

    def __init__(
        self,
        windows: Windows,
        seed: int,
        *,
        cross_document_targets: bool = True,
        repetition_filter: RepetitionFilterConfig | None = None,
        domain: str = "",
    ):
        if seed < 0:
            raise UserError(f"seed={seed}: a seed is not negative")
        self.source = windows
        self.seed = seed
        self.cross_document_targets = cross_document_targets
        self.repetition_filter = (
            repetition_filter if repetition_filter and repetition_filter.enabled else None
        )
        self.domain = domain
        self._run = lru_cache(8)(
            lambda run: self._ordered(run * ORDERED_TOGETHER + np.arange(ORDERED_TOGETHER))
        )

    @property
    def sequence_length(self) -> int:
        return self.source.sequence_length

    @property
    def num_sequences(self) -> int:
        return self.source.num_sequences

    @property
    def num_tokens(self) -> int:
        return self.source.num_tokens

    @property
    def vocab_size(self) -> int:
        return self.source.store.vocab_size

    @property
    def tokenizer_file(self) -> Path:
        return self.source.store.tokenizer_file

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the tokens, their order on disk, and how they are cut. With the
        seed, it fixes what every position means: a run that goes on with another fingerprint is
        another run."""
        return self.source.fingerprint

    def windows(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The window at each position of the order: int64 [B] in [0, num_sequences)."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise UserError(
                f"position {positions.min()} is before the start; positions are at least 0"
            )
        if positions.size >= ORDERED_TOGETHER:
            return self._ordered(positions)
        runs, inside = np.divmod(positions, ORDERED_TOGETHER)
        numbers = np.empty_like(positions)
        for run in set(runs.tolist()):
            which = runs == run
            numbers[which] = self._run(run)[inside[which]]
        return numbers

    def _ordered(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, self.num_sequences)
        return self.source.ordered(places, keyed(self.seed, epochs))

    def rows(self, positions: np.ndarray) -> Rows:
        """The sequences at `positions` of the order."""
        return self.source.rows(self.windows(positions))

    def batch(self, positions: Sequence[int] | np.ndarray) -> PackedBatch:
        """The sequences at `positions` of the order, as rows of one batch of CPU tensors.

        Document ids are permanent in the data, the same whatever else is in the batch.
        """
        rows = self.rows(np.asarray(positions, dtype=np.int64))
        packed = PackedBatch.from_documents(*rows, self.cross_document_targets)
        if self.repetition_filter:
            repetitive_B = is_repetitive(rows.tokens_BS, self.repetition_filter)
            packed.targets_BS.numpy()[repetitive_B] = IGNORE
        return replace(packed, domain=self.domain) if self.domain else packed

    def step(
        self,
        step_index: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[PackedBatch]:
        """The micro-batches of one rank for one optimizer step, in order; see `DataSource.step`."""
        span = self.source.span
        blocks = self.micro_batches(step_index, global_batch, micro_batch, rank, world_size, span)
        return [self.batch(positions) for positions in blocks]

    @staticmethod
    def micro_batches(
        step_index: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        span: int = 1,
    ) -> list[range]:
        """The positions of each micro-batch of a rank; see `step`.

        Args:
            span: so many sequences belong into one micro-batch.
        """
        if micro_batch % span:
            raise UserError(
                f"micro_batch={micro_batch} is not a multiple of {span}, the sequences that belong "
                f"together; make it one"
            )
        if step_index < 0 or micro_batch < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise UserError(
                f"step {step_index}, micro_batch={micro_batch}, rank {rank} of {world_size}: steps "
                f"start at 0, a micro-batch holds a sequence, and ranks are 0 to world size - 1"
            )
        if global_batch < 1 or global_batch % (micro_batch * world_size):
            raise UserError(
                f"global_batch={global_batch} is not a multiple of micro_batch={micro_batch} times "
                f"{world_size} ranks; make it a multiple of {micro_batch * world_size}, or change "
                f"micro_batch"
            )
        share = global_batch // world_size
        first = step_index * global_batch + rank * share
        return [
            range(start, start + micro_batch) for start in range(first, first + share, micro_batch)
        ]


# ---- shuffles that are pure functions of a seed: no state, no stored permutation

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: the increment of splitmix64, which keeps consecutive keys
far apart."""

ROUNDS = 6
"""Feistel rounds. Four with ideal round functions already give a pseudo-random permutation (Luby
and Rackoff, 1988)."""


def mix64(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values, element by element; a bijection. Shape and dtype are kept."""
    x = values.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed(key: int, values: np.ndarray) -> np.ndarray:
    """uint64 hashes of non-negative integers under an integer key; distinct values keep distinct
    hashes."""
    start = mix64(np.array([key % 2**64], dtype=np.uint64) + np.uint64(GOLDEN))
    return mix64(values.astype(np.uint64) * np.uint64(GOLDEN) + start)


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where keyed permutations of [0, size) send `indices`, in O(1) time and memory an index.

    A Feistel network is a bijection of [0, 4^h) for any round function. With the smallest h that
    covers `size`, an output at or above `size` is sent through again ("cycle walking") until it
    falls inside: still a bijection, of [0, size), after fewer than four passes on average.

    Args:
        indices: integers [P] in [0, size).
        size: how many things are permuted, 1 to 2^62.
        keys: uint64 [P]; indices with equal keys are permuted together.
    Returns:
        int64 [P].
    """
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    result = indices.astype(np.uint64)
    outside = np.arange(result.size)
    while outside.size:
        left, right, key = result[outside] >> half, result[outside] & mask, keys[outside]
        for _ in range(ROUNDS):
            left, right = right, left ^ (mix64(right ^ key) & mask)
            key = key + np.uint64(GOLDEN)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64)
