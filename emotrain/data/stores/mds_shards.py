"""Shards of MosaicML's MDS.

    index.json       for each shard: name, bytes, samples, hashes, columns with type and size
    shard.00000.mds  samples (u32), where each begins and the last ends (u32 [samples + 1]), the
                     columns as JSON, and the samples
    a sample         the sizes of its columns that have no fixed one (u32 each), and the columns
    a column         `bytes`: numbers alone; `ndarray[:type[:shape]]`: before them the code of the
                     type and the shape, where the column does not say them

All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from emotrain.config import RawTokensConfig
from emotrain.data.checks import STAT_THREADS
from emotrain.data.stores import remote
from emotrain.data.stores.content import Content, OpenFiles
from emotrain.data.stores.listing import Listed, beside
from emotrain.errors import UserError

INDEX = "index.json"
NAMES = ("tokens", "input_ids")
"""Columns that are looked for, the first that is there."""
CODES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
"""The types of `ndarray` that are whole numbers."""
TYPES = {np.dtype(code).name: np.dtype(code) for code in CODES.values()}
BYTES_TYPE = "<i8"
"""Of a column of `bytes`, as llm-foundry wrote and reads it."""
PIECE = 2**23
"""Bytes that are read at a time where all of a shard is."""


class Layout(NamedTuple):
    """Where the tokens of a sample are."""

    sizes: tuple[int, ...]
    """Bytes of each column; 0 where a sample says them."""
    column: int
    """The one with the tokens."""
    is_array: bool
    """`ndarray`, not `bytes`."""
    dtype: np.dtype | None
    """None where a sample says it."""
    length: int
    """Tokens of a sample; 0 where it says them."""

    @property
    def heads(self) -> int:
        """Bytes at the start of a sample, the sizes of its columns."""
        return 4 * self.sizes.count(0)

    def value(self, sample: np.ndarray) -> np.ndarray:
        """The bytes of the tokens' column. Raises: ValueError, the sample has other columns."""
        heads = iter(sample[: self.heads].view("<u4").tolist())
        sizes = [size or next(heads) for size in self.sizes]
        if self.heads + sum(sizes) != len(sample):
            raise ValueError(f"has {len(sample)} bytes, its columns {self.heads + sum(sizes)}")
        begin = self.heads + sum(sizes[: self.column])
        return sample[begin : begin + sizes[self.column]]

    def tokens(self, sample: np.ndarray) -> np.ndarray:
        """The tokens of a sample. Raises: ValueError, it has none, or none of whole numbers."""
        value, dtype, length = self.value(sample), self.dtype, self.length
        if dtype is None:
            if not len(value) or int(value[0]) not in CODES:
                raise ValueError(f"has type {value[:1]}, not whole numbers")
            dtype, value = np.dtype(CODES[int(value[0])]), value[1:]
        if self.is_array and not length:
            axes, width = divmod(int(value[0]) if len(value) else 0, 4)
            if axes != 1 or len(value) < 1 + 2**width:
                raise ValueError(f"has {axes} axes, tokens have one")
            length = int(value[1 : 1 + 2**width].view(f"<u{2**width}")[0])
            value = value[1 + 2**width :]
        if len(value) % dtype.itemsize or (length and len(value) != length * dtype.itemsize):
            raise ValueError(f"has {len(value)} bytes for {length or 'its'} tokens of {dtype.name}")
        return value.view(dtype)

    def counts(self, sizes: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Tokens of samples by the bytes of their column; -1 where no number fits."""
        # (bytes of type and shape before the numbers, the least and the most of them)
        kinds = [(0, self.length, self.length or 2**32)]
        if self.is_array and not self.length:
            more = 1 + (self.dtype is None)
            kinds = [(more + 1, 0, 2**8 - 1), (more + 2, 2**8, 2**16 - 1), (more + 4, 2**16, 2**32)]
        result = np.full(len(sizes), -1)
        for before, least, most in kinds:
            found, rest = np.divmod(sizes - before, dtype.itemsize)
            fits = (rest == 0) & (found >= least) & (found <= most)
            result[fits] = found[fits]
        return result


class Places(NamedTuple):
    """Where the samples of a shard are."""

    bytes: np.ndarray
    """int64 [samples + 1]: where each begins in the file, and the last ends."""
    tokens: np.ndarray
    """int64 [samples + 1]: the same in tokens."""


class Part(NamedTuple):
    """A shard."""

    content: Content
    label: str
    samples: int
    layout: Layout
    hashes: dict[str, str]

    def refuse(self, fault: str) -> UserError:
        return UserError(f"{self.content.name}: {fault}; copy the shard and its {INDEX} again")

    def places(self) -> Places:
        """Read where the samples are."""
        begin = 4 * (self.samples + 2)
        if self.content.size < begin:
            raise self.refuse(f"has {self.content.size} bytes, {self.samples} samples have more")
        table = self.content.read(0, begin).view("<u4").astype(np.int64)
        offsets = table[1:]
        if table[0] != self.samples:
            raise self.refuse(f"has {table[0]} samples, {INDEX} says {self.samples}")
        sizes = np.diff(offsets)
        if offsets[0] < begin or offsets[-1] != self.content.size or (sizes < 0).any():
            raise self.refuse(
                f"its samples lie at bytes {offsets[0]} to {offsets[-1]} of {self.content.size}, "
                f"or not one after the other"
            )
        layout = self.layout
        if layout.sizes[layout.column]:
            sizes = np.full(self.samples, layout.sizes[layout.column])
        elif layout.heads == 4:
            sizes = sizes - 4 - sum(layout.sizes)
        else:
            sizes = self._sizes(offsets)
        dtype = layout.dtype
        if dtype is None:  # that of the first sample; others with another one are refused when read
            dtype = self.tokens(offsets[:2], [None], 0)[0].dtype
        if (sizes == sizes[0]).all():  # as llm-foundry writes them
            counts = np.repeat(layout.counts(sizes[:1], dtype), self.samples)
        else:
            counts = layout.counts(sizes, dtype)
        if (wrong := np.flatnonzero(counts < 0)).size:
            raise self.refuse(f"sample {wrong[0]} has no whole number of {dtype.name} tokens")
        return Places(offsets, np.concatenate(([0], np.cumsum(counts))))

    def _sizes(self, offsets: np.ndarray) -> np.ndarray:
        """Bytes of the tokens' column of each sample, by the starts of all samples."""
        layout, found = self.layout, []
        which = layout.sizes[: layout.column].count(0)
        if (np.diff(offsets) < layout.heads).any():
            raise self.refuse("has samples that are shorter than the sizes of their columns")
        first = 0
        while first < self.samples:
            last = int(np.searchsorted(offsets, offsets[first] + PIECE, "right")) - 1
            last = max(last, first + 1)
            piece = self.content.read(int(offsets[first]), int(offsets[last]))
            at = (offsets[first:last] - offsets[first] + 4 * which)[:, None] + np.arange(4)
            found.append(piece[at].view("<u4")[:, 0].astype(np.int64))
            first = last
        return np.concatenate(found)

    def tokens(
        self, ends: np.ndarray, counts: Sequence[int | None], first: int
    ) -> list[np.ndarray]:
        """The tokens of samples that follow one another.

        Args:
            ends: where each begins in the file, and the last ends.
            counts: tokens of each, where that is known.
            first: number of the first, for messages.
        """
        piece = self.content.read(int(ends[0]), int(ends[-1]))
        found: list[np.ndarray] = []
        edges = (ends - ends[0]).tolist()
        for number, count in enumerate(counts):
            try:
                tokens = self.layout.tokens(piece[edges[number] : edges[number + 1]])
                if count is not None and len(tokens) != count:
                    raise ValueError(f"has {len(tokens)} tokens, its bytes are those of {count}")
                if found and tokens.dtype != found[0].dtype:
                    raise ValueError(f"has {tokens.dtype}, the one before {found[0].dtype}")
            except (ValueError, StopIteration) as error:
                said = " ".join(str(error).split()) or "is shorter than the sizes of its columns"
                raise self.refuse(f"sample {first + number} {said}") from None
            found.append(tokens)
        return found

    def check(self) -> None:
        """Its bytes have the hash of the index, where there is one that Python knows."""
        for name, expected in self.hashes.items():
            if name not in hashlib.algorithms_available or name.startswith("shake"):
                continue
            digest = hashlib.new(name)
            for start in range(0, self.content.size, PIECE):
                digest.update(self.content.read(start, min(start + PIECE, self.content.size)).data)
            if digest.hexdigest() != expected:
                raise self.refuse(f"its bytes have changed ({name} {digest.hexdigest()[:12]}…)")
            return


def parts_of(listed: Listed, raw: RawTokensConfig, files: OpenFiles) -> list[Part]:
    """The shards of an index.

    Raises:
        UserError: an index, or a file of it, that is not as it must be.
    """
    shards = _shards(listed.content)
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return list(pool.map(lambda i: _part(listed, i, shards[i], raw, files), range(len(shards))))


def _shards(index: Content) -> list[Any]:
    """What an index says of its shards."""
    if index.size > remote.LARGEST_LIST:
        raise UserError(f"{index.name}: has {index.size} bytes, too many for an index")
    try:
        known = json.loads(index.read(0, index.size).tobytes())
        shards = known["shards"]
        if known["version"] != 2 or not isinstance(shards, list) or not shards:
            raise ValueError("version 2 with shards is wanted")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{index.name}: is no index of MDS ({said}); copy it again, or say what the data are "
            f"with data.raw.format"
        ) from None
    return shards


def _part(listed: Listed, number: int, shard: Any, raw: RawTokensConfig, files: OpenFiles) -> Part:
    """A shard of an index, with what is checked of it."""
    index = listed.content

    def refuse(fault: str) -> UserError:
        return UserError(f"{index.name}: shard {number} {fault}; copy the index again")

    try:
        if (shard["version"], shard["format"]) != (2, "mds"):
            raise refuse(f"is {shard['format']!r}, version {shard['version']!r}, not mds, 2")
        known, packed, samples = shard["raw_data"], shard["zip_data"], shard["samples"]
        zipped = packed["basename"] if packed else ""
        name, size, hashes = known["basename"], known["bytes"], known["hashes"]
        names, kinds, sizes = (shard[f"column_{what}"] for what in ("names", "encodings", "sizes"))
        numbers = [size, samples, *(size for size in sizes if size is not None)]
        if any(type(item) is not int or not 0 < item < 2**32 for item in numbers):
            raise refuse(f"has {numbers} for its bytes, samples and columns")
        if not len(names) == len(kinds) == len(sizes):
            raise refuse(f"has columns {names}, types {kinds} and sizes {sizes}")
        texts = [name, *names, *kinds, *hashes, *hashes.values()]
        if not all(isinstance(text, str) for text in texts):
            raise refuse(f"names its file, columns or hashes {texts}")
    except (KeyError, TypeError, AttributeError) as error:
        raise refuse(f"does not say what it must ({' '.join(str(error).split())})") from None
    way = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or way.is_absolute() or ".." in way.parts:
        raise refuse(f"names the file {name!r}, which is not below its folder")
    layout = _layout(index.name, names, kinds, sizes, raw)
    file = f"{index.name.removesuffix(INDEX)}{way}"
    if zipped and ("://" in file or not os.path.lexists(file)):
        raise UserError(
            f"{file}: lies there compressed alone, as {zipped}; decompress it beside that, as "
            f"{shard.get('compression')} wants it"
        )
    content = beside(index, file, files)
    if content.size != size:
        raise UserError(
            f"{file}: has {content.size} bytes, {index.name} says {size}; copy both again"
        )
    return Part(content, listed.label, samples, layout, hashes)


def _layout(
    index: str, names: list[str], kinds: list[str], sizes: list[int | None], raw: RawTokensConfig
) -> Layout:
    """Where the tokens of a shard's samples are, by its columns."""
    wanted = [raw.column] if raw.column else NAMES
    column = next((names.index(name) for name in wanted if name in names), None)
    columns = ", ".join(f"{n}: {k}" for n, k in zip(names, kinds, strict=True)) or "none"
    if column is None or kinds[column] in ("str", "pkl"):
        raise UserError(
            f"{index}: has no column of token ids ({' or '.join(wanted)}); its columns are "
            f"{columns}, name one with data.raw.column"
        )
    kind, *rest = kinds[column].split(":")
    static, length = sizes[column] or 0, 0
    dtype = TYPES.get(rest[0]) if rest else None
    if kind == "bytes":
        dtype = np.dtype(BYTES_TYPE if raw.dtype == "auto" else raw.dtype).newbyteorder("<")
    shape = rest[1] if len(rest) == 2 else ""
    if shape.isascii() and shape.isdecimal():
        length = int(shape[:10])
    fits = static == (length * dtype.itemsize if dtype and length else 0)
    if kind not in ("bytes", "ndarray") or (rest and not dtype) or (shape and not length):
        fits = False
    if not fits or len(rest) > 2 or (kind == "bytes" and rest):
        raise UserError(
            f"{index}: its column {names[column]!r} is {kinds[column]!r} of {static or 'any'} "
            f"bytes; tokens are bytes, or ndarray of whole numbers in one dimension; its columns "
            f"are {columns}, name one with data.raw.column"
        )
    every = tuple(size or 0 for size in sizes)
    return Layout(every, column, kind == "ndarray", dtype, length)
