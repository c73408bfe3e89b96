"""Arrays of tokens without a header, as Dolma and OLMo have them (spec 4.1).

    part-0-00000.npy      little-endian uint16 or uint32: a a a a E b b E c c c c E
    part-0-00000.csv.gz   beside it, if at all: start, end, id, source, place of each document

EOS ends documents, and belongs to the one that it ends. Nothing else says where they are: they are
looked for in every window that is read. So starting depends on the number of files, not on that of
documents, and the index beside a file is no truth: it gives sources alone.

The permanent id of a document is the position of its first token among the tokens of all files, and
that of the window, where the document began before it. What is known without a search for its begin
stays the same for ever, and costs nothing. So the pieces of a document that was cut have different
ids; those of a prepared data set have one.

A `.npy` with NumPy's header, whole numbers in one dimension, is read as what it says it is.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emotrain.config import RawTokensConfig
from emotrain.data.checks import STAT_THREADS
from emotrain.data.manifest import token_dtype
from emotrain.data.source import Window
from emotrain.data.stores.content import SAMPLE_BYTES, Content, named
from emotrain.data.stores.listing import Listed, list_files
from emotrain.data.stores.vocabulary import Vocabulary, check_tokens
from emotrain.errors import UserError

ENDINGS = (".npy",)
SEARCH_TOKENS = 2**20
"""Tokens looked through at a time for the first EOS of a file."""
NUMPY = b"\x93NUMPY"
LARGEST_ID = 2**48
"""Ids of documents are below."""


class _File(NamedTuple):
    """What is known of a file after a look at it."""

    content: Content
    label: str
    dtype: np.dtype
    header: int
    """Bytes before the first token."""
    tokens: int
    digest: str
    """Of its name, size and sample."""


class PlainStore:
    """Arrays of tokens, as `emotrain.data.source.TokenStore`; a file is a shard.

    Args:
        path: what was given, for messages.
        files: the arrays.
        vocabulary: of their tokens.
        dtype: `auto` for the smallest that holds the vocabulary.
    Raises:
        UserError: a file that cannot be what it should be.
    """

    split = "train"

    def __init__(self, path: str, files: Sequence[Listed], vocabulary: Vocabulary, dtype: str):
        self.path = path
        self.vocab_size, self.eos_id = vocabulary.size, vocabulary.eos_id
        self.tokenizer_file, self.eos_token = vocabulary.tokenizer_file, vocabulary.eos_token
        self.dtype = _dtype_of(vocabulary.size, dtype)
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            self._files = list(pool.map(self._look, files))
        self.shard_tokens = [file.tokens for file in self._files]
        self.labels = [file.label for file in self._files]
        self._firsts = list(accumulate(self.shard_tokens, initial=0))
        if self._firsts[-1] >= LARGEST_ID:
            raise UserError(
                f"{path}: holds {self._firsts[-1]} tokens, one store has fewer than 2^48; split it"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of the files' names, sizes and samples in their order, of types and vocabulary. Where
        files lie is no part of it."""
        identity = [
            "plain", self.vocab_size, self.eos_id, [file.digest for file in self._files],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(identity, allow_nan=False).encode()).hexdigest()[:16]

    def window(self, shard: int, start: int, stop: int) -> Window:
        tokens = self._tokens(shard, start, stop)
        edges = eos_edges(tokens, self.eos_id)
        return Window(tokens, np.diff(edges), edges[:-1] + (self._firsts[shard] + start))

    def edges(self, shard: int, start: int, stop: int) -> np.ndarray:
        return eos_edges(self._tokens(shard, start, stop), self.eos_id) + start

    def sources(self, shard: int) -> Iterator[tuple[int, int, str]]:
        """(start, stop, source) of every document by the index beside a file; nothing where there
        is none.

        Raises:
            UserError: a line that is not of such an index.
        """
        index = Path(self._files[shard].content.name).with_suffix(".csv.gz")
        if "://" in str(self.path) or not index.is_file():
            return
        try:
            with gzip.open(index, "rt", encoding="utf-8", newline="") as stream:
                for number, row in enumerate(csv.reader(stream), 1):
                    if number == 1 and row[:2] == ["start", "end"]:
                        continue
                    try:
                        start, stop, name = int(row[0]), int(row[1]), row[2]
                    except (IndexError, ValueError):
                        raise UserError(
                            f"{index}: line {number} is not start,end,id,source,place of a "
                            f"document; move the index away, or restore it"
                        ) from None
                    yield start, stop, ":".join([*row[3:4], name])
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"{index}: is not readable to its end ({' '.join(str(error).split())}); move the "
                f"index away, or restore it"
            ) from None

    def name_of(self, shard: int) -> str:
        """The file of a shard."""
        return self._files[shard].content.name

    def _tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        file = self._files[shard]
        return self._read(file.content, file.dtype, file.header, start, stop)

    def _read(
        self, content: Content, dtype: np.dtype, header: int, start: int, stop: int
    ) -> np.ndarray:
        size = dtype.itemsize
        tokens = content.read(header + start * size, header + stop * size).view(dtype)
        check_tokens(content.name, tokens, start, self.vocab_size)
        return tokens

    def _look(self, listed: Listed) -> _File:
        """Find out what can be known of a file without reading all of it, and refuse what cannot
        be tokens of this vocabulary."""
        content = listed.content
        head = content.read(0, min(SAMPLE_BYTES, content.size))
        is_numpy = head[: len(NUMPY)].tobytes() == NUMPY
        dtype, header = _numpy_header(content, head) if is_numpy else (self.dtype, 0)
        tokens, rest = divmod(content.size - header, dtype.itemsize)
        if rest or not tokens:
            raise UserError(
                f"{content.name}: has {content.size} bytes, no whole number of {dtype.name} "
                f"tokens; give the data.raw.dtype that it was written with, or copy it again"
            )
        digest = hashlib.sha256(named(content) + dtype.str.encode())
        some, ended = SAMPLE_BYTES // dtype.itemsize, False
        starts = {0, max(tokens // 2 - some // 2, 0), max(tokens - some, 0)}
        # A store that signs a file is asked for its start alone.
        for start in [0] if content.sign else sorted(starts):
            sample = self._read(content, dtype, header, start, min(start + some, tokens))
            digest.update(sample.tobytes())
            ended = ended or bool((sample == self.eos_id).any())
            if not is_numpy:
                _check_width(content.name, sample, start)
        if not ended:
            self._check_ended(content, dtype, header, tokens)
        return _File(content, listed.label, dtype, header, tokens, digest.hexdigest())

    def _check_ended(self, content: Content, dtype: np.dtype, header: int, tokens: int) -> None:
        """A file without any EOS has another one. Nearly always the first of it is found at
        once."""
        for start in range(0, tokens, SEARCH_TOKENS):
            stop = min(start + SEARCH_TOKENS, tokens)
            if (self._read(content, dtype, header, start, stop) == self.eos_id).any():
                return
        raise UserError(
            f"{content.name}: none of its {tokens} tokens is {self.eos_id}, which ends documents; "
            f"give the tokenizer or the data.raw.eos_id that it was written with"
        )


def eos_edges(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """int64, rising: 0, what comes after each EOS, and the number of tokens."""
    ends = np.flatnonzero(tokens[:-1] == eos_id) + 1
    return np.concatenate(([0], ends, [len(tokens)]))


def open_plain(path: str, raw: RawTokensConfig, vocabulary: Vocabulary, domain: str) -> PlainStore:
    """The arrays that a path means, of one domain if it is not empty."""
    return PlainStore(path, list_files(path, ENDINGS, raw, domain), vocabulary, raw.dtype)


def _dtype_of(vocab_size: int, dtype: str) -> np.dtype:
    if dtype == "auto":
        smallest = np.dtype(np.uint8) if vocab_size <= 2**8 else token_dtype(vocab_size)
        return smallest.newbyteorder("<")
    chosen = np.dtype(dtype).newbyteorder("<")
    if vocab_size > np.iinfo(chosen).max + 1:
        raise UserError(
            f"data.raw.dtype={dtype} does not hold the ids of a vocabulary of {vocab_size}; give "
            f"the tokenizer that the files were written with, or data.raw.dtype=auto"
        )
    return chosen


def _numpy_header(content: Content, head: np.ndarray) -> tuple[np.dtype, int]:
    """The type of the tokens in a file with NumPy's header, and the header's bytes."""
    stream = BytesIO(head.tobytes())
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(stream)
    except Exception:  # NumPy reads it as Python, which breaks in many ways
        raise UserError(
            f"{content.name}: begins as a NumPy file and has none of its headers; copy it again"
        ) from None
    header = stream.tell()
    if dtype.kind not in "iu" or len(shape) != 1:
        raise UserError(
            f"{content.name}: is a NumPy file of {dtype} in {len(shape)} dimensions; tokens are "
            f"whole numbers in one dimension"
        )
    if content.size != header + shape[0] * dtype.itemsize:
        raise UserError(
            f"{content.name}: has {content.size} bytes, its NumPy header says "
            f"{header + shape[0] * dtype.itemsize}; copy it again"
        )
    return dtype, header


def _check_width(name: str, sample: np.ndarray, start: int) -> None:
    """Refuse tokens of twice the width: read as two each, the upper halves are all alike, which
    no text is."""
    if len(sample) < 16 or sample.dtype.itemsize > 2:
        return
    upper = sample[(1 - start) % 2 :: 2]
    lower = sample[start % 2 :: 2]
    if not upper.any() and lower.any():
        raise UserError(
            f"{name}: every second number of {sample.dtype.name} is 0, so it holds "
            f"uint{16 * sample.dtype.itemsize} tokens; say so with data.raw.dtype="
            f"uint{16 * sample.dtype.itemsize}"
        )
