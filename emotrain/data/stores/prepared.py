"""A data set of `emotrain prepare` in an object store or on a web server.

    s3://bucket/mine/dataset.json               read at the start, with the tokenizer
    s3://bucket/mine/train/shard-00000.arrow    of which windows read what they need, by ranges

It is the same data set as on a disk: the same order, ids, checks and fingerprint, so that a run may
begin there and go on here. `formats.Dataset` reads windows of it from arrays that are fetched where
they are asked for. Of a shard only its head and the ends of its arrays are read when it is first
used; blocks have checksums, which the manifest names.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np

from emotrain.data.checks import STAT_THREADS, UNORDERED
from emotrain.data.formats import Dataset, Shard, SplitStore, schema, sha256_of_sums
from emotrain.data.manifest import MANIFEST, TOKENIZER, ShardInfo
from emotrain.data.stores import remote
from emotrain.data.stores.content import Content
from emotrain.errors import UserError

AT_ONCE = 2**13
"""Elements of an array among which a search ends: a block."""
MOST_MESSAGES = 16
"""Before the rows of a shard: a schema, and the names of its domains."""
RECORD_BATCH = 3
"""The type of Arrow's message with rows."""


class FarArray:
    """An array in a file, fetched where it is asked for: `array[start:stop]`."""

    def __init__(self, content: Content, at: int, size: int, dtype: np.dtype):
        self._content, self._at, self._size, self._dtype = content, at, size, dtype
        self.itemsize = dtype.itemsize

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, which: slice) -> np.ndarray:
        start, stop, _ = which.indices(self._size)
        begin, end = (self._at + self.itemsize * index for index in (start, max(start, stop)))
        return self._content.read(begin, end).view(self._dtype)

    def searchsorted(self, values: Sequence[int], side: str = "left", sorter: None = None) -> Any:
        """As `numpy.searchsorted`, which calls it, of numbers that rise."""
        return np.array([self._search(value) for value in values])

    def _search(self, value: int) -> int:
        low, high = 0, self._size
        while high - low > AT_ONCE:
            middle = (low + high) // 2
            if self[middle : middle + 1][0] < value:
                low = middle + 1
            else:
                high = middle
        return low + int(np.searchsorted(self[low:high], value))


class FarDataset(Dataset):
    """A prepared data set at an address, for training on windows of it.

    Args:
        address: of its folder, which ends in `/`.
        verify_checksums: hash the blocks of every window.
    Raises:
        UserError: anything in it that is not as it must be.
    """

    most_open = 1024  # of a shard its checksums are held, some 50 kB

    def __init__(self, address: str, verify_checksums: bool = True):
        self.address = address
        self._folder = TemporaryDirectory(prefix="emotrain-")
        folder = Path(self._folder.name)
        (folder / MANIFEST).write_bytes(remote.text_at(f"{address}{MANIFEST}"))
        if remote.exists(address, TOKENIZER):
            (folder / TOKENIZER).write_bytes(remote.text_at(f"{address}{TOKENIZER}"))
        try:
            super().__init__(folder, verify_checksums)
        except UserError as error:
            raise type(error)(str(error).replace(f"{folder}/", address)) from None

    def name_of(self, info: ShardInfo) -> str:
        return f"{self.address}{info.file}"

    def store(self, split: str = "train") -> SplitStore:
        store = super().store(split)
        store.path = self.address
        return store

    def shard(self, split: str, index: int) -> Shard:
        """Raises: UserError. All of a shard is wanted by those who look for a domain or single
        documents, and where shards have no checksums of blocks."""
        raise UserError(
            f"{self.address}: is read by windows, and all of a shard is wanted (a domain alone, or "
            f"shards without checksums of blocks); copy the data set to this machine"
        )

    def _check_sizes(self, infos: Sequence[ShardInfo]) -> None:
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            contents = list(pool.map(remote.look, map(self.name_of, infos)))
        for info, content in zip(infos, contents, strict=True):
            if content.size != info.bytes:
                raise UserError(
                    f"{content.name}: has {content.size} bytes, {MANIFEST} says {info.bytes}; copy "
                    f"it again or run `emotrain prepare` again"
                )
        self._contents = {content.name: content for content in contents}

    def _map(self, info: ShardInfo) -> Shard:
        content = self._contents[self.name_of(info)]

        def refused(fault: str) -> NoReturn:
            raise UserError(f"{content.name}: {fault}; copy the shard again")

        try:
            metadata, spans = _arrow(content, self.dtype)
        except (struct.error, IndexError, ValueError, binascii.Error) as error:
            refused(f"is not a readable Arrow file ({' '.join(str(error).split())})")
        (at, size), (first, length) = spans
        offsets = FarArray(content, at, size // 8, np.dtype("<i8"))
        tokens = FarArray(content, first, length // self.dtype.itemsize, self.dtype)
        if (len(offsets) - 1, len(tokens)) != (info.documents, info.tokens):
            refused(
                f"holds {len(offsets) - 1} documents and {len(tokens)} tokens, {MANIFEST} says "
                f"{info.documents} and {info.tokens}"
            )
        if offsets[:1][0] != 0 or offsets[len(offsets) - 1 :][0] != len(tokens):
            refused(UNORDERED)
        sums = metadata if sha256_of_sums(metadata) == info.sums else None
        none: Any = None
        return Shard(tokens, offsets, none, [], none, sums, none)  # type: ignore[arg-type]


def _arrow(
    content: Content, dtype: np.dtype
) -> tuple[dict[str, bytes], tuple[tuple[int, int], tuple[int, int]]]:
    """What is said of the arrays of a shard, read from its head.

    Returns:
        The checksums of blocks, and where offsets and tokens lie: (first byte, bytes) of each.
    Raises:
        ValueError, struct.error, IndexError: it is none.
    """
    import pyarrow as pa

    if content.read(0, min(8, content.size)).tobytes() != b"ARROW1\0\0":
        raise ValueError("it does not begin as one")
    at, said = 8, None
    for _ in range(MOST_MESSAGES):
        mark, size = struct.unpack("<II", content.read(at, at + 8).tobytes())
        if mark != 0xFFFFFFFF or not size or at + 8 + size > content.size:
            raise ValueError(f"there is no message at byte {at}")
        message = content.read(at + 8, at + 8 + size).tobytes()
        if said is None:
            whole = content.read(at, at + 8 + size).tobytes()
            try:
                said = pa.ipc.read_schema(pa.py_buffer(whole))
            except (pa.ArrowException, OSError) as error:
                raise ValueError(str(error)) from None
            if not said.equals(schema(dtype)):
                raise ValueError(f"it has other columns than those of {dtype} shards")
        table = _Table(message, struct.unpack_from("<I", message)[0])
        body, length = at + 8 + size, table.number(3, "<q")
        if table.number(1, "<B") == RECORD_BATCH:
            buffers = table.table(2).structs(2, "<qq")
            # Those of the lists: which are missing, offsets; of tokens: which are missing, numbers.
            spans = [(body + start, size) for start, size in (buffers[1], buffers[3])]
            if any(a < body or n < 0 or a + n > content.size for a, n in spans):
                raise ValueError("its rows lie outside of it")
            metadata = said.metadata or {}
            sums = {
                name: base64.b64decode(metadata.get(f"{name}_sums".encode(), b""))
                for name in ("tokens", "offsets")
            }
            return sums, (spans[0], spans[1])
        if length < 0:
            raise ValueError(f"the message at byte {at} has no length")
        at = body + length
    raise ValueError("it has no rows")


class _Table:
    """A table of flatbuffers, in which Arrow writes its messages."""

    def __init__(self, data: bytes, at: int):
        self._data, self._at = data, at

    def _field(self, number: int) -> int:
        """Where a field is; 0 where it is not."""
        names = self._at - self._read("<i", self._at)
        if names < 0 or 4 + 2 * number >= self._read("<H", names):
            return 0
        offset = self._read("<H", names + 4 + 2 * number)
        return self._at + offset if offset else 0

    def _read(self, kind: str, at: int) -> int:
        if at < 0:
            raise ValueError("a message points before its begin")
        return int(struct.unpack_from(kind, self._data, at)[0])

    def number(self, number: int, kind: str) -> int:
        at = self._field(number)
        return self._read(kind, at) if at else 0

    def table(self, number: int) -> _Table:
        at = self._field(number)
        return _Table(self._data, at + self._read("<I", at))

    def structs(self, number: int, kind: str) -> list[tuple[int, ...]]:
        at = self._field(number)
        at += self._read("<I", at)
        count, size = self._read("<I", at), struct.calcsize(kind)
        if count * size > len(self._data):
            raise ValueError("a message lists more than it holds")
        return [struct.unpack_from(kind, self._data, at + 4 + size * i) for i in range(count)]
