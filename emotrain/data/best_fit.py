"""Best-fit packing: sequences that hold documents whole where they fit, and are always full.

A shard's stream is cut into blocks of BLOCK_SEQUENCES sequences, and the documents inside of a
block are placed into them (`pack`):

    block   | a a a a b | b c c c c | c c c c c | d d d e e |   4 sequences of 5 tokens; e goes on
    packed  | c c c c c | a a a a e | b b d d d | c c c c e |   c is too long, and e is cut anyway

No token is left out and none is added, so that a block gives as many sequences as its tokens make,
whatever its documents are. The number of a sequence is therefore its block and its place in there
by arithmetic: there is no index of packed sequences to build, to store or to load, and a run goes
on from its position alone.

What is cut: documents longer than a sequence, at its length; pieces of documents that the end of a
block cuts anyway; and what fits nowhere. The last two fill the gaps that whole documents leave, the
longest first, in the order of the gaps' sizes.

**Order.** A block is read and packed as a whole, so that all its sequences should come before it is
forgotten. An epoch permutes the blocks, takes GROUP_BLOCKS of them at a time, and permutes the
sequences of each such group. The last block of a shard may be smaller; sequences of these blocks
are permuted for themselves and put in at even distances.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from functools import cached_property
from typing import NamedTuple

import numpy as np

from emotrain.data.loader import GOLDEN, StreamWindows, mix64, permute
from emotrain.data.source import Rows, TokenStore

BLOCK_SEQUENCES = 32
"""Sequences of a block. With more of them fewer documents are cut (of those that fit into 4,096
tokens, 1.1 % with 16, 0.6 % with 32, 0.2 % with 64 for lengths as on the web), and a rank among
thousands, which gets few sequences of a block, reads more than it uses."""
GROUP_BLOCKS = 256
"""Blocks that are shuffled together: 8,192 sequences."""
CACHE_BYTES = 2**28
"""Most bytes of packed blocks that are kept. A group of sequences of 4,096 tokens takes 64 MiB
with ids of 2 bytes, and 128 MiB with 4."""
LEAST_PIECE = 256
"""A document is not put where it leaves a gap below one 256th of a sequence, if it fits anywhere
else: such gaps cut documents into pieces of a few tokens."""
METHOD = 1
"""Part of the fingerprint: raised by a change that puts tokens elsewhere."""


def pack(
    edges: np.ndarray, num: int, size: int, begun: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Place the documents of a stream into sequences of one size, which become full.

    Documents go, the longest first, where they leave the least room: those that are whole, then
    what is cut already. What fits nowhere is cut into the gaps.

    Args:
        edges: int64 [G + 1], rising from 0 to num * size: where documents begin, and the end.
        num, size: so many sequences of so many tokens.
        begun: whether the first document may be the rest of one. The last one may always be cut.
    Returns:
        int64 starts and lengths of pieces in the stream, in the order in which they fill the
        sequences one after the other.
    """
    lengths = np.diff(edges)
    whole, rests = np.divmod(lengths, size)
    is_cut = whole > 0
    is_cut[0] |= begun
    is_cut[-1] = True
    filled = np.repeat(edges[:-1], whole)
    first = np.repeat(np.cumsum(whole) - whole, whole)
    filled += (np.arange(len(filled)) - first) * size
    contents = [[(start, size)] for start in filled.tolist()]
    used = len(contents)
    contents += [[] for _ in range(num - used)]
    # Room and sequence in one number, so that equal rooms are in the order of sequences.
    rooms = [size * num + index for index in range(used, num)]
    starts = edges[:-1] + whole * size
    order = np.lexsort((starts, -rests, is_cut))
    order = order[rests[order] > 0]
    least, left = size // LEAST_PIECE * num, []
    for start, length in zip(starts[order].tolist(), rests[order].tolist(), strict=True):
        at = bisect_left(rooms, length * num)
        if at == len(rooms):
            left.append((length, start))
            continue
        if rooms[at] // num != length:
            roomy = bisect_left(rooms, length * num + least, at)
            at = roomy if roomy < len(rooms) else at
        room, index = divmod(rooms.pop(at), num)
        contents[index].append((start, length))
        if room > length:
            insort(rooms, (room - length) * num + index)
    left.sort()
    length, start = 0, 0
    for code in reversed(rooms):
        room, index = divmod(code, num)
        while room:
            if not length:
                length, start = left.pop()
            part = min(room, length)
            contents[index].append((start, part))
            start, length, room = start + part, length - part, room - part
    pieces = np.array([piece for sequence in contents for piece in sorted(sequence)])
    return pieces[:, 0], pieces[:, 1]


class _Block(NamedTuple):
    """A block, packed: R rows of S tokens."""

    tokens_RS: np.ndarray
    """As the store gives them."""
    lengths: np.ndarray
    """int64: of the pieces, row after row."""
    ids: np.ndarray
    """int64: of their documents."""
    ends_R: np.ndarray
    """int64 [R + 1]: pieces before each row, and all of them."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self)


class BestFitWindows(StreamWindows):
    """As `loader.StreamWindows`, packed; see the top of this file. The sequences of a span are
    packed as one. Safe to call from several threads."""

    def __init__(self, store: TokenStore, sequence_length: int, span: int = 1, part: str = ""):
        super().__init__(store, sequence_length, span, part)
        self._size = sequence_length * span
        """Tokens of what is packed as one."""
        packed = np.array(store.shard_tokens, dtype=np.int64) // self._size
        full, rest = np.divmod(packed, BLOCK_SEQUENCES)
        self._first_blocks = np.concatenate(([0], np.cumsum(full)))
        self._first_rests = np.concatenate(([0], np.cumsum(rest)))
        self._blocks, self._rests = int(self._first_blocks[-1]), int(self._first_rests[-1])
        self._cache: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    @cached_property
    def fingerprint(self) -> str:
        sizes = (METHOD, BLOCK_SEQUENCES, GROUP_BLOCKS, LEAST_PIECE)
        return hashlib.sha256(f"{super().fingerprint} best_fit {sizes}".encode()).hexdigest()[:16]

    # ---- order

    def ordered(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        packed, inside = np.divmod(places, self.span)
        in_blocks = self._blocks * BLOCK_SEQUENCES
        if not self._rests:
            return self._in_groups(packed, keys) * self.span + inside
        # The last of every `distance` places is one of a smaller block.
        distance = (in_blocks + self._rests) // self._rests
        before = np.minimum(packed // distance, self._rests)
        is_rest = (packed % distance == distance - 1) & (before < self._rests)
        numbers = np.empty_like(packed)
        numbers[is_rest] = in_blocks + permute(before[is_rest], self._rests, keys[is_rest])
        numbers[~is_rest] = self._in_groups((packed - before)[~is_rest], keys[~is_rest])
        return numbers * self.span + inside

    def _in_groups(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """A permutation of the sequences of full blocks."""
        if not places.size:
            return places
        size = GROUP_BLOCKS * BLOCK_SEQUENCES
        groups, inside = np.divmod(places, size)
        group_keys = mix64(keys + (groups + 1).astype(np.uint64) * np.uint64(GOLDEN))
        num_whole, last = divmod(self._blocks * BLOCK_SEQUENCES, size)
        for which, count in ((groups < num_whole, size), (groups == num_whole, last)):
            if which.any():
                inside[which] = permute(inside[which], count, group_keys[which])
        blocks, slots = np.divmod(inside, BLOCK_SEQUENCES)
        blocks = permute(groups * GROUP_BLOCKS + blocks, self._blocks, keys)
        return blocks * BLOCK_SEQUENCES + slots

    # ---- sequences

    def rows(self, numbers: np.ndarray) -> Rows:
        packed, inside = np.divmod(np.asarray(numbers, dtype=np.int64), self.span)
        is_rest = packed >= self._blocks * BLOCK_SEQUENCES
        blocks, slots = np.divmod(packed, BLOCK_SEQUENCES)
        shards = np.searchsorted(self._first_blocks, blocks, side="right") - 1
        blocks -= self._first_blocks[shards]
        if is_rest.any():
            rests = packed[is_rest] - self._blocks * BLOCK_SEQUENCES
            shards[is_rest] = np.searchsorted(self._first_rests, rests, side="right") - 1
            slots[is_rest] = rests - self._first_rests[shards[is_rest]]
            blocks[is_rest] = np.diff(self._first_blocks)[shards[is_rest]]
        tokens_BS = np.empty((len(numbers), self.sequence_length), dtype=np.int64)
        lengths, ids = [], []
        rows = (slots * self.span + inside).tolist()
        for at, (shard, index, row) in enumerate(
            zip(shards.tolist(), blocks.tolist(), rows, strict=True)
        ):
            block = self._block(shard, index)
            pieces = slice(*block.ends_R[row : row + 2].tolist())
            tokens_BS[at] = block.tokens_RS[row]
            lengths.append(block.lengths[pieces])
            ids.append(block.ids[pieces])
        return Rows(tokens_BS, np.concatenate(lengths), np.concatenate(ids))

    def _block(self, shard: int, index: int) -> _Block:
        """A block of a shard; the last one may be smaller. Two threads may both make one."""
        key = (shard, index)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        made = self._packed(shard, index)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = made
                self._cached_bytes += made.nbytes
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return made

    def _packed(self, shard: int, index: int) -> _Block:
        first = index * BLOCK_SEQUENCES
        num = min(self.store.shard_tokens[shard] // self._size - first, BLOCK_SEQUENCES)
        begin = first * self._size
        window = self.store.window(shard, begin, begin + num * self._size)
        edges = np.concatenate(([0], np.cumsum(window.lengths)))
        starts, lengths = pack(edges, num, self._size, begun=begin > 0)
        tokens = np.concatenate(
            [
                window.tokens[start:stop]
                for start, stop in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
            ]
        )
        ids = window.ids[np.searchsorted(edges, starts, side="right") - 1]
        row_ends = np.arange(num * self.span + 1) * self.sequence_length
        ends = np.cumsum(lengths)
        if self.span > 1:  # pieces go on from row to row
            cut = np.union1d(ends, row_ends[1:])
            ids = ids[np.searchsorted(ends, cut)]
            ends = cut
        return _Block(
            tokens.reshape(-1, self.sequence_length),
            np.diff(ends, prepend=0),
            ids,
            np.searchsorted(ends, row_ends, side="right"),
        )
