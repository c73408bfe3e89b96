"""Megatron's indexed data: tokens in a `.bin`, and in the `.idx` beside it where they belong.

    .idx   MMIDIDX\\0\\0, version 1 (u64), type (u8), S sequences (u64), D + 1 (u64)
           sizes       int32 [S]       tokens of each sequence
           pointers    int64 [S]       its first byte in the .bin
           documents   int64 [D + 1]   the first sequence of each document, and S
           modes       int8 [S]        of multimodal data, if at all; not read
    .bin   the sequences, one after the other

All numbers are little-endian. Documents are those of the index, with or without EOS inside: no
token is looked at for it, and none is made up. Of the index only what a window needs is read, and
checked each time, by a search for its first sequence: starting does not depend on its length. A
document has one permanent id, its number in all files.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from emotrain.config import RawTokensConfig
from emotrain.data.checks import STAT_THREADS
from emotrain.data.source import Window
from emotrain.data.stores.content import Content, OpenFiles, sampled
from emotrain.data.stores.listing import Listed, beside, list_files
from emotrain.data.stores.vocabulary import Vocabulary, check_tokens
from emotrain.errors import UserError

ENDINGS = (".idx",)
MAGIC, HEADER = b"MMIDIDX\0\0", struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
AT_ONCE = 512
"""Entries of the index that are read at a time: a search ends among so many."""


def index_of(name: str) -> str:
    """The `.idx` that a name means: itself, that of a `.bin`, or that of a prefix."""
    return name if name.endswith(".idx") else name.removesuffix(".bin") + ".idx"


class _Part(NamedTuple):
    """A `.bin` with its index."""

    index_file: Content
    tokens: Content
    label: str
    dtype: np.dtype
    sequences: int
    documents: int

    def read(self, what: str, start: int, stop: int) -> np.ndarray:
        """Entries of `sizes`, `pointers` or `documents`, as int64."""
        S = self.sequences
        at, kind = {
            "sizes": (HEADER.size, "<i4"),
            "pointers": (HEADER.size + 4 * S, "<i8"),
            "documents": (HEADER.size + 12 * S, "<i8"),
        }[what]
        width = np.dtype(kind).itemsize
        content = self.index_file.read(at + width * start, at + width * stop)
        return content.view(kind).astype(np.int64)

    def search(self, what: str, size: int, value: int) -> int:
        """The last entry of `size` that is at most `value`, of numbers that rise from 0."""
        low, high = 0, size
        while high - low > AT_ONCE:
            middle = (low + high) // 2
            if self.read(what, middle, middle + 1)[0] <= value:
                low = middle
            else:
                high = middle
        return low + max(int(np.searchsorted(self.read(what, low, high), value, "right")) - 1, 0)

    def refuse(self, fault: str) -> UserError:
        return UserError(f"{self.index_file.name}: {fault}; copy the .idx and the .bin again")


class MegatronStore:
    """Indexed data as `emotrain.data.source.TokenStore`; a `.bin` is a shard.

    Args:
        path: what was given, for messages.
        files: the `.idx` files with the `.bin` of each.
        vocabulary: of their tokens.
    Raises:
        UserError: a file that is not as it must be.
    """

    split = "train"

    def __init__(self, path: str, files: Sequence[tuple[Listed, Content]], vocabulary: Vocabulary):
        self.path = path
        self.vocab_size, self.eos_id = vocabulary.size, vocabulary.eos_id
        self.tokenizer_file, self.eos_token = vocabulary.tokenizer_file, vocabulary.eos_token
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            self._parts = list(pool.map(_open_part, files))
            self._digests = list(pool.map(_digest, self._parts))
        self.shard_tokens = [part.tokens.size // part.dtype.itemsize for part in self._parts]
        self.labels = [part.label for part in self._parts]
        self._first_ids = list(accumulate((p.documents for p in self._parts), initial=0))

    @cached_property
    def fingerprint(self) -> str:
        """Of names, sizes and samples of both files in their order, and of the vocabulary."""
        identity = ["megatron", self.vocab_size, self.eos_id, self._digests]
        return hashlib.sha256(json.dumps(identity, allow_nan=False).encode()).hexdigest()[:16]

    def name_of(self, shard: int) -> str:
        """The `.bin` of a shard."""
        return self._parts[shard].tokens.name

    def window(self, shard: int, start: int, stop: int) -> Window:
        part = self._parts[shard]
        edges, ids = self._documents(shard, start, stop)
        width = part.dtype.itemsize
        tokens = part.tokens.read(width * start, width * stop).view(part.dtype)
        check_tokens(part.tokens.name, tokens, start, self.vocab_size)
        return Window(tokens, np.diff(edges), ids)

    def edges(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._documents(shard, start, stop)[0]

    def _documents(self, shard: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges as `edges` gives them, and the ids of the documents between them."""
        part = self._parts[shard]
        first, begins = self._sequences(part, start, stop)
        number = part.search("documents", part.documents, first)
        found, size = np.empty(0, np.int64), AT_ONCE
        # The sequence after the last of the window, or S, ends the documents of the window.
        while not found.size or (
            found[-1] < first + len(begins) and number + len(found) <= part.documents
        ):
            found = part.read("documents", number, min(number + size, part.documents + 1))
            size *= 4
        before = part.read("documents", max(number - 1, 0), number + 1)
        if (
            found[0] > first
            or before[0] > found[0]
            or (np.diff(found) < 0).any()
            or found[1] <= first
        ):
            raise part.refuse(f"the sequences of document {number} and on do not rise")
        inside = found < first + len(begins)
        # Of documents that begin at one token all but the last are empty.
        at = begins[np.maximum(found[inside] - first, 0)].clip(start)
        last = np.append(at[1:] != at[:-1], True)
        ids = number + np.flatnonzero(inside)[last]
        return np.append(at[last], stop), ids + self._first_ids[shard]

    def _sequences(self, part: _Part, start: int, stop: int) -> tuple[int, np.ndarray]:
        """The first sequence of a window, and where each sequence that begins before `stop` does,
        in tokens."""
        width = part.dtype.itemsize
        first = part.search("pointers", part.sequences, width * start)
        size = AT_ONCE
        while True:
            last = min(first + size, part.sequences)
            begins = part.read("pointers", first, last)
            sizes = part.read("sizes", first, last)
            ends = begins + sizes * width
            if (
                (sizes < 0).any()
                or (begins[1:] != ends[:-1]).any()
                or not 0 <= begins[0] <= width * start
            ):
                raise part.refuse(f"sequences {first} to {last - 1} do not follow one another")
            if ends[-1] >= width * stop:
                break
            if last == part.sequences:
                raise part.refuse(f"its sequences end at byte {ends[-1]}, the .bin does not")
            size *= 4
        if ends[0] <= width * start or (begins % width).any():
            raise part.refuse(f"token {start} is in none of its sequences")
        return first, begins[begins < width * stop] // width


def open_megatron(
    path: str, raw: RawTokensConfig, vocabulary: Vocabulary, domain: str
) -> MegatronStore:
    """The indexed data that a path means: a `.bin`, its `.idx`, their prefix, or several of them;
    of one domain if it is not empty."""
    listed, files = list_files(path, ENDINGS, raw, domain, index_of), OpenFiles()

    def with_tokens(index: Listed) -> tuple[Listed, Content]:
        name = index.content.name.removesuffix(".idx") + ".bin"
        return index, beside(index.content, name, files)

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return MegatronStore(path, list(pool.map(with_tokens, listed)), vocabulary)


def _open_part(file: tuple[Listed, Content]) -> _Part:
    (index, label), tokens = file

    def refuse(fault: str) -> UserError:
        return UserError(f"{index.name}: {fault}; copy the .idx and the .bin again")

    if index.size < HEADER.size:
        raise refuse(f"has {index.size} bytes, the header alone has {HEADER.size}")
    magic, version, code, sequences, documents = HEADER.unpack(index.read(0, HEADER.size).tobytes())
    if magic != MAGIC or version != 1:
        raise refuse(f"is no index of Megatron, version 1 (it begins with {magic!r}, {version})")
    kind = DTYPES.get(code, "")
    if "f" in kind or not kind:
        raise refuse(f"says that tokens have type {code} ({kind or 'unknown'}), not whole numbers")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if index.size not in (expected, expected + sequences) or not sequences or documents < 2:
        raise refuse(
            f"has {index.size} bytes, with {sequences} sequences and {documents - 1} documents it "
            f"has {expected}"
        )
    part = _Part(index, tokens, label, np.dtype(kind), sequences, documents - 1)
    last_document, last = part.read("documents", documents - 1, documents)[0], sequences - 1
    ends = part.read("pointers", last, sequences) + part.dtype.itemsize * part.read(
        "sizes", last, sequences
    )
    if last_document != sequences:
        raise refuse(f"its documents end with sequence {last_document} of {sequences}")
    if ends[0] != tokens.size:
        raise refuse(f"its sequences end at byte {ends[0]}, the .bin has {tokens.size}")
    return part


def _digest(part: _Part) -> str:
    return f"{part.dtype.str} {sampled(part.index_file)} {sampled(part.tokens)}"
