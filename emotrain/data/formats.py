"""A prepared data set on disk: what `prepare` writes and everything else reads.

    data/wiki/
        dataset.json             the manifest, written last: a folder without it is not a data set
        tokenizer.json
        train/shard-00000.arrow  one record batch, a row a document
        train/shard-00001.arrow
        valid/shard-00000.arrow

A shard is an Arrow IPC file with the columns

    tokens   large_list<uint16 or uint32>   a document's token ids, EOS last; uint16 if they fit
    domain   dictionary<int32, string>
    source   string                         where the document came from

and, as the schema's metadata, `tokens_sums` and `offsets_sums`: a checksum of every BLOCK_BYTES of
the ids and of the offsets. With one record batch, the ids of all documents lie in one contiguous
buffer and the list offsets (int64) in another: a shard is used in place through a memory map,
whatever its size, and any Arrow library can read it. Document ids are positions in the whole data
set, the train shards first, so that an id names one document for ever.

Everything read here is untrusted until checked: names stay inside the folder, sizes and counts
agree with the manifest, offsets are in order, and with `verify_checksums` no byte is used that has
not been hashed. Who takes a shard (`Dataset.shard`) has all of it checked, once. Training takes
windows from all over the data set, and every rank sooner or later some of every shard; it has only
the blocks checked that hold the window (`Dataset.window`), so that neither starting nor a step
depends on the size of shards.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emotrain.data.checks import (
    UNORDERED,
    check_checksum,
    check_contents,
    check_sizes,
    refuse,
)
from emotrain.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    ShardInfo,
    read_manifest,
    token_dtype,
)
from emotrain.data.source import Window
from emotrain.errors import UserError
from emotrain.files import sha256_of

if TYPE_CHECKING:
    import pyarrow as pa

    from emotrain.data.tokenizer import TextTokenizer


BLOCK_BYTES = 2**16
"""Tokens or offsets under one checksum: a few sequences of tokens, hashed in under 0.1 ms. Part
of the format."""
SUM_BYTES = 8
"""Of a block's sha256 that are kept: they find damage. It is the manifest's sha256 that names
the contents."""

MAX_OPEN_SHARDS = 32
"""Shards mapped at a time. Mapping again takes about a millisecond. The pages of a map that were
touched, some 4 MB, count as memory of the process, and of thousands of shards hardly one is open
when the order comes back to it, however many stay open."""


@dataclass(frozen=True)
class Shard:
    """A mapped shard. The arrays are views of the file, read-only, and stay valid as long as
    something refers to them."""

    tokens: np.ndarray
    """uint16 or uint32 [tokens of the shard]: its documents one after the other."""
    offsets: np.ndarray
    """int64 [documents + 1]: where each document starts in `tokens`."""
    domain_of: np.ndarray
    """int32 [documents]: index into `domains`."""
    domains: list[str]
    sources: pa.StringArray
    sums: dict[str, bytes] | None
    """`tokens` and `offsets`: SUM_BYTES for each of their blocks; None where the file does
    not hold those that the manifest names."""
    batch: pa.RecordBatch
    """What the arrays are views of."""

    def is_intact(self, name: str, start: int, stop: int) -> bool:
        """Whether the elements [start, stop) of `tokens` or `offsets` are those that were
        written, by the blocks they lie in."""
        if self.sums is None:
            return False
        values, sums = getattr(self, name), self.sums[name]
        size = BLOCK_BYTES // values.itemsize
        first, last = start // size, -(-stop // size)
        return (
            block_sums(values[first * size : last * size])
            == sums[first * SUM_BYTES : last * SUM_BYTES]
        )


class Dataset:
    """A prepared data set, opened. Opening reads the manifest and the sizes of the files; shards
    are mapped when used.

    Args:
        path: the folder.
        verify_checksums: hash what is used: of a window the blocks it lies in, and a shard that is
            first taken as a whole (a second or two a gigabyte). Without it, bytes that changed on
            the disk go unnoticed.
    Raises:
        FileNotFoundError: no such folder, or no manifest in it. ValueError: anything in it that is
            not as it must be.
    """

    most_open = MAX_OPEN_SHARDS

    def __init__(self, path: str | Path, verify_checksums: bool = True):
        self.path = Path(path)
        self.verify_checksums = verify_checksums
        manifest = read_manifest(self.path)
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.eos_token: str = manifest["eos_token"]
        self.dtype = token_dtype(self.vocab_size)
        self.skipped_documents: dict[str, int] = manifest["skipped_documents"]
        self.shards = {split: manifest["splits"][split]["shards"] for split in SPLITS}
        """ShardInfo of every shard of each split, in order."""
        self.domains = {split: manifest["splits"][split]["domains"] for split in SPLITS}
        """For each split, `{domain: {"documents": count, "tokens": count}}`."""
        tokenizer = self.path / TOKENIZER
        written = manifest["tokenizer_sha256"]
        if written and tokenizer.is_file() and sha256_of(tokenizer) != written:
            raise UserError(
                f"{tokenizer}: its sha256 is not the one in {MANIFEST}; restore the tokenizer of "
                f"this data set"
            )
        self._check_sizes([info for split in SPLITS for info in self.shards[split]])
        self._open: OrderedDict[tuple[str, int], Shard] = OrderedDict()
        self._checked: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    @cached_property
    def first_ids(self) -> dict[str, list[int]]:
        """For each split, the id of the first document of each shard, and one past the last id
        of the split."""
        first, ids = 0, {}
        for split in SPLITS:
            ids[split] = list(
                accumulate((info.documents for info in self.shards[split]), initial=first)
            )
            first = ids[split][-1]
        return ids

    def name_of(self, info: ShardInfo) -> Path | str:
        """Where a shard lies."""
        return self.path / info.file

    def num_documents(self, split: str = "train") -> int:
        return sum(info.documents for info in self._infos(split))

    def num_tokens(self, split: str = "train") -> int:
        return sum(info.tokens for info in self._infos(split))

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that the documents were encoded with. Raises: ValueError,
        FileNotFoundError if it is another one."""
        from emotrain.data.tokenizer import load_tokenizer

        path = self.path / TOKENIZER
        tokenizer = load_tokenizer(path, self.eos_token)
        if (tokenizer.vocab_size, tokenizer.eos_id) != (self.vocab_size, self.eos_id):
            raise UserError(
                f"{path}: has {tokenizer.vocab_size} tokens and EOS {tokenizer.eos_id}, {MANIFEST} "
                f"says {self.vocab_size} and {self.eos_id}; restore the tokenizer of this data set"
            )
        return tokenizer

    def fingerprint(self, split: str = "train") -> str:
        """16 hexadecimal digits that differ for any other tokens, order of documents or
        vocabulary."""
        identity = [self.vocab_size, self.eos_id, [info.sha256 for info in self._infos(split)]]
        return hashlib.sha256(json.dumps(identity, allow_nan=False).encode()).hexdigest()[:16]

    def verify(self) -> None:
        """Check all of every shard now. Raises: ValueError, for the first one that is not as the
        manifest says."""
        for split in SPLITS:
            for index in range(len(self.shards[split])):
                with self._lock:
                    self._check_whole(split, index, hashed=True)

    def shard(self, split: str, index: int) -> Shard:
        """A shard, mapped; all of it is checked the first time. Safe to call from several
        threads."""
        key = (split, index)
        with self._lock:
            if key not in self._checked:
                self._check_whole(split, index, self.verify_checksums)
                self._checked.add(key)
            return self._mapped(split, index)

    def pieces(
        self, split: str, index: int, start: int, stop: int
    ) -> tuple[Shard, int, np.ndarray]:
        """A shard, the row of the document that its token `start` is of, and int64 edges: `start`,
        the starts of the documents between it and `stop`, and `stop`. Of the shard only what this
        needs is read and checked, each time; all of it, once, where it has no checksums of blocks.
        Safe to call from several threads.

        Raises:
            ValueError: what was read is not what was written.
        """
        info = self._infos(split)[index]
        if self.verify_checksums and not info.sums:
            shard = self.shard(split, index)
        else:
            with self._lock:
                shard = self._mapped(split, index)
        # The first document ends after `start`, the last one at `stop` or after it.
        first, last = (np.searchsorted(shard.offsets, [start + 1, stop]) - [1, 0]).tolist()
        self._check_blocks(info, shard, "offsets", first, last + 1)
        edges = shard.offsets[first : last + 1].copy()
        # The search found edges[0] <= start and stop <= edges[-1], in whatever order the others
        # are.
        if len(edges) < 2 or (np.diff(edges) < 1).any():
            refuse(self.name_of(info), UNORDERED)
        edges[0], edges[-1] = start, stop
        return shard, first, edges

    def window(self, split: str, index: int, start: int, stop: int) -> Window:
        """The tokens [start, stop) of a shard's stream, and their documents; see `pieces`."""
        info = self._infos(split)[index]
        shard, first, edges = self.pieces(split, index, start, stop)
        self._check_blocks(info, shard, "tokens", start, stop)
        tokens = shard.tokens[start:stop]
        self._check_ids(info, tokens)
        first += self.first_ids[split][index]
        return Window(tokens, np.diff(edges), np.arange(first, first + len(edges) - 1))

    def locate(self, document_id: int) -> tuple[str, int, int]:
        """Split, shard and row of a document. Raises: ValueError, for an id that the data set
        does not have."""
        for split in SPLITS:
            firsts = self.first_ids[split]
            if firsts[0] <= document_id < firsts[-1]:
                index = bisect_right(firsts, document_id) - 1
                return split, index, document_id - firsts[index]
        raise UserError(
            f"document {document_id} is not in {self.path}; its ids are 0 to "
            f"{self.first_ids[SPLITS[-1]][-1] - 1}"
        )

    def documents(
        self, split: str = "valid", domain: str | None = None, limit: int | None = None
    ) -> Iterator[tuple[int, np.ndarray, str]]:
        """The documents of a split as (id, token ids, domain), in stored order, which `prepare`
        shuffled.

        Args:
            domain: only documents of this one.
            limit: at most so many.
        Yields:
            The token ids are a read-only view [length] of uint16 or uint32, EOS last.
        Raises:
            ValueError: an unknown split or domain.
        """
        infos = self._infos(split)
        if domain is not None and domain not in self.domains[split]:
            raise UserError(
                f"domain {domain!r} has no {split} documents; choose one of "
                f"{', '.join(self.domains[split])}"
            )
        left = self.num_documents(split) if limit is None else limit
        for index in range(len(infos)):
            shard, first_id = self.shard(split, index), self.first_ids[split][index]
            wanted = np.arange(infos[index].documents)
            if domain is not None:
                code = shard.domains.index(domain) if domain in shard.domains else -1
                wanted = np.flatnonzero(shard.domain_of == code)
            for row in wanted[:left].tolist():
                ids = shard.tokens[shard.offsets[row] : shard.offsets[row + 1]]
                yield first_id + row, ids, shard.domains[shard.domain_of[row]]
            left -= min(left, len(wanted))

    def store(self, split: str = "train") -> SplitStore:
        """One split, to cut windows out of."""
        return SplitStore(self, split)

    def _infos(self, split: str) -> list[ShardInfo]:
        if split not in SPLITS:
            raise UserError(f"split={split!r} is not known; choose one of {', '.join(SPLITS)}")
        return self.shards[split]

    def _mapped(self, split: str, index: int) -> Shard:
        """A shard, mapped; its contents are unchecked."""
        key = (split, index)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        info = self.shards[split][index]
        shard = self._open[key] = self._map(info)
        if len(self._open) > self.most_open:
            self._open.popitem(last=False)
        return shard

    def _check_sizes(self, infos: list[ShardInfo]) -> None:
        check_sizes(self.path, infos)

    def _map(self, info: ShardInfo) -> Shard:
        return _map_shard(self.path / info.file, info, self.dtype)

    def _check_blocks(
        self, info: ShardInfo, shard: Shard, name: str, start: int, stop: int
    ) -> None:
        if self.verify_checksums and info.sums and not shard.is_intact(name, start, stop):
            refuse(
                self.name_of(info),
                f"{name} {start} to {stop} are not those that were written, its bytes have changed",
            )

    def _check_whole(self, split: str, index: int, hashed: bool) -> None:
        """All of a shard; with `hashed` its bytes are those that were written, and its ids lie
        in the vocabulary."""
        info = self._infos(split)[index]
        path = self.path / info.file
        if hashed:
            check_checksum(path, info)
        shard = self._mapped(split, index)
        check_contents(path, shard.batch, shard.offsets)
        if hashed:
            self._check_ids(info, shard.tokens)

    def _check_ids(self, info: ShardInfo, tokens: np.ndarray) -> None:
        if (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise UserError(
                f"{self.name_of(info)}: holds token id {largest}, vocab_size is "
                f"{self.vocab_size}; run `emotrain prepare` again"
            )


class SplitStore:
    """A split of a data set, as `emotrain.data.source.TokenStore`."""

    def __init__(self, dataset: Dataset, split: str):
        self.dataset, self.split = dataset, split
        self.path: Path | str = dataset.path
        self.vocab_size, self.eos_id = dataset.vocab_size, dataset.eos_id
        self.tokenizer_file = dataset.path / TOKENIZER
        self.fingerprint = dataset.fingerprint(split)
        self.shard_tokens = [info.tokens for info in dataset.shards[split]]

    def window(self, shard: int, start: int, stop: int) -> Window:
        return self.dataset.window(self.split, shard, start, stop)

    def edges(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self.dataset.pieces(self.split, shard, start, stop)[2]


def _map_shard(path: Path, info: ShardInfo, dtype: np.dtype) -> Shard:
    """Map a shard and check its form, in time that does not depend on its size but for the
    checksums of its blocks."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            refuse(path, f"has {reader.num_record_batches} record batches, a shard has one")
        if not reader.schema.equals(schema(dtype)):
            refuse(
                path,
                f"has columns ({', '.join(f'{f.name}: {f.type}' for f in reader.schema)}), not "
                f"those of {dtype} shards",
            )
        batch = reader.get_batch(0)
        batch.validate()  # lengths of buffers, first and last offsets
        column, domain = batch.column("tokens"), batch.column("domain")
        domain.dictionary.validate(full=True)  # the names are read below
        if (
            any(batch.column(i).null_count for i in range(batch.num_columns))
            or column.values.null_count
        ):
            refuse(path, "has null values")
        metadata = reader.schema.metadata or {}
        sums = {
            name: base64.b64decode(metadata.get(f"{name}_sums".encode(), b""))
            for name in ("tokens", "offsets")
        }
    except (pa.ArrowException, OSError, UnicodeDecodeError, binascii.Error) as error:
        refuse(path, f"is not a readable Arrow file ({' '.join(str(error).split())})")
    tokens = column.values.to_numpy(zero_copy_only=True)
    offsets = column.offsets.to_numpy(zero_copy_only=True)
    if (batch.num_rows, len(tokens)) != (info.documents, info.tokens):
        refuse(
            path,
            f"holds {batch.num_rows} documents and {len(tokens)} tokens, {MANIFEST} says "
            f"{info.documents} and {info.tokens}",
        )
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        refuse(path, UNORDERED)
    domain_of, domains = domain.indices.to_numpy(zero_copy_only=True), domain.dictionary.to_pylist()
    return Shard(
        tokens,
        offsets,
        domain_of,
        domains,
        batch.column("source"),
        sums if sha256_of_sums(sums) == info.sums else None,
        batch,
    )


def schema(dtype: np.dtype) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("tokens", pa.large_list(pa.from_numpy_dtype(dtype))),
            ("domain", pa.dictionary(pa.int32(), pa.string())),
            ("source", pa.string()),
        ]
    )


def block_sums(values: np.ndarray) -> bytes:
    """The checksums of an array's blocks of BLOCK_BYTES, SUM_BYTES each, one after the other."""
    content = np.ascontiguousarray(values).view(np.uint8).data
    blocks = (content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES))
    return b"".join(hashlib.sha256(block).digest()[:SUM_BYTES] for block in blocks)


def sha256_of_sums(sums: dict[str, bytes]) -> str:
    return hashlib.sha256(sums["tokens"] + sums["offsets"]).hexdigest()
