"""A prepared data set on disk: what `prepare` writes and everything else reads.

    data/wiki/
        dataset.json             the manifest, written last: a folder without it is not a data set
        tokenizer.json
        train/shard-00000.arrow  one record batch, a row a document
        train/shard-00001.arrow
        valid/shard-00000.arrow

A shard is an Arrow IPC file with the columns

    tokens   large_list<uint16 or uint32>   a document's token ids, EOS last; the smallest type that holds the vocabulary
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
import os
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from emotrain.errors import MissingFileError, UserError
from emotrain.files import json_text, sha256_of

if TYPE_CHECKING:
    import pyarrow as pa

    from emotrain.data.tokenizer import TextTokenizer

MANIFEST, TOKENIZER = "dataset.json", "tokenizer.json"
FORMAT, FORMAT_VERSION = "emotrain-dataset", 1
SPLITS = ("train", "valid")

MAX_OPEN_SHARDS = 32
"""Shards mapped at a time. Mapping again takes about a millisecond. The pages of a map that were
touched, some 4 MB, count as memory of the process, and of thousands of shards hardly one is open
when the order comes back to it, however many stay open."""

BLOCK_BYTES = 2**16
"""Tokens or offsets under one checksum: a few sequences of tokens, hashed in under 0.1 ms. Part
of the format."""
SUM_BYTES = 8
"""Of a block's sha256 that are kept: they find damage. It is the manifest's sha256 that names
the contents."""

STAT_THREADS, STAT_CHUNK = 16, 256
"""Sizes of files are asked for by so many threads, so many files at a time: on a network file
system each is a round trip."""


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of a shard."""

    file: str
    """Path inside the data set, with `/`."""
    documents: int
    tokens: int
    bytes: int
    sha256: str
    sums: str = field(default="", compare=False)
    """sha256 of the checksums of its blocks; empty for a shard that has none."""


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
    """`tokens` and `offsets`: SUM_BYTES for each of their blocks; None where the file does not
    hold those that the manifest names."""
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
            _block_sums(values[first * size : last * size])
            == sums[first * SUM_BYTES : last * SUM_BYTES]
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_shard(
    path: Path,
    tokens: np.ndarray,
    offsets: np.ndarray,
    domains: Sequence[str],
    sources: Sequence[str],
) -> ShardInfo:
    """Write documents as one shard, flushed to the disk.

    Args:
        path: the file; the name of its folder is the split.
        tokens: uint16 or uint32, the documents one after the other.
        offsets: int64 [documents + 1].
        domains, sources: one string a document.
    """
    import pyarrow as pa

    columns = [
        pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(tokens)),
        pa.array(domains, pa.string()).dictionary_encode(),
        pa.array(sources, pa.string()),
    ]
    sums = {"tokens": _block_sums(tokens), "offsets": _block_sums(offsets.astype(np.int64))}
    metadata = {f"{name}_sums": base64.b64encode(value) for name, value in sums.items()}
    batch = pa.record_batch(columns, schema=_schema(tokens.dtype).with_metadata(metadata))
    with open(path, "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    return ShardInfo(
        f"{path.parent.name}/{path.name}",
        len(offsets) - 1,
        len(tokens),
        path.stat().st_size,
        sha256_of(path),
        _sha256_of_sums(sums),
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
                f"says "
                f"{self.vocab_size} and {self.eos_id}; restore the tokenizer that the data set was "
                f"prepared with"
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

    def window(
        self, split: str, index: int, start: int, stop: int
    ) -> tuple[np.ndarray, int, np.ndarray]:
        """The tokens [start, stop) of a shard's stream, and where the documents that they belong to
        start. Of the shard only what this needs is read and checked, each time; all of it, once,
        where it has no checksums of blocks. Safe to call from several threads.

        Returns:
            Token ids [stop - start]; the row of the first document; int64 offsets [documents + 1]
            of these documents. Views, read-only.
        Raises:
            ValueError: what was read is not what was written.
        """
        info = self._infos(split)[index]
        path = self.path / info.file
        if self.verify_checksums and not info.sums:
            shard = self.shard(split, index)
        else:
            with self._lock:
                shard = self._mapped(split, index)
        first = int(np.searchsorted(shard.offsets, start, side="right")) - 1
        last = int(np.searchsorted(shard.offsets, stop, side="left"))
        intact = not (self.verify_checksums and info.sums) or (
            shard.is_intact("tokens", start, stop) and shard.is_intact("offsets", first, last + 1)
        )
        if not intact:
            _refuse(
                path,
                f"tokens {start} to {stop} are not those that were written, its bytes have changed",
            )
        tokens, offsets = shard.tokens[start:stop], shard.offsets[first : last + 1]
        _check_ids(path, tokens, self.vocab_size)
        # The search found offsets[0] <= start and stop <= offsets[-1], in whatever order the others
        # are.
        if len(offsets) < 2 or (np.diff(offsets) < 1).any():
            _refuse(path, UNORDERED)
        return tokens, first, offsets

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

    def document_domains(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The domain of each document."""
        domains = []
        for document_id in ids:
            split, index, row = self.locate(int(document_id))
            shard = self.shard(split, index)
            domains.append(shard.domains[shard.domain_of[row]])
        return domains

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
        shard = self._open[key] = _map_shard(self.path / info.file, info, self.dtype)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def _check_sizes(self, infos: list[ShardInfo]) -> None:
        """Every shard is there and has its size."""

        def check(chunk: list[ShardInfo]) -> None:
            for info in chunk:
                path = f"{self.path}/{info.file}"
                try:
                    found = os.stat(path)
                except (FileNotFoundError, NotADirectoryError):
                    found = None
                if found is None or not stat.S_ISREG(found.st_mode):
                    raise MissingFileError(
                        f"{path}: shard is missing; restore it or run `emotrain prepare` again"
                    )
                if found.st_size != info.bytes:
                    raise UserError(
                        f"{path}: has {found.st_size} bytes, {MANIFEST} says {info.bytes}; copy it "
                        f"again or run "
                        f"`emotrain prepare` again"
                    )

        with ThreadPoolExecutor(STAT_THREADS) as pool:
            list(
                pool.map(
                    check,
                    (
                        infos[start : start + STAT_CHUNK]
                        for start in range(0, len(infos), STAT_CHUNK)
                    ),
                )
            )

    def _check_whole(self, split: str, index: int, hashed: bool) -> None:
        """All of a shard; with `hashed` its bytes are those that were written, and its ids lie
        in the vocabulary."""
        info = self._infos(split)[index]
        if hashed:
            self._check_checksum(info)
        shard = self._mapped(split, index)
        _check_contents(self.path / info.file, shard)
        if hashed:
            _check_ids(self.path / info.file, shard.tokens, self.vocab_size)

    def _check_checksum(self, info: ShardInfo) -> None:
        path = self.path / info.file
        found = sha256_of(path)
        if found != info.sha256:
            raise UserError(
                f"{path}: sha256 is {found[:12]}…, {MANIFEST} says {info.sha256[:12]}…; its bytes "
                f"have "
                f"changed, copy it again or run `emotrain prepare` again"
            )


def _schema(dtype: np.dtype) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("tokens", pa.large_list(pa.from_numpy_dtype(dtype))),
            ("domain", pa.dictionary(pa.int32(), pa.string())),
            ("source", pa.string()),
        ]
    )


UNORDERED = "has document offsets that do not rise from 0 to its number of tokens"


def _refuse(path: Path, fault: str) -> NoReturn:
    raise UserError(f"{path}: {fault}; copy the shard again or run `emotrain prepare` again")


def _map_shard(path: Path, info: ShardInfo, dtype: np.dtype) -> Shard:
    """Map a shard and check its form, in time that does not depend on its size but for the
    checksums of its blocks."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            _refuse(path, f"has {reader.num_record_batches} record batches, a shard has one")
        if not reader.schema.equals(_schema(dtype)):
            _refuse(
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
            _refuse(path, "has null values")
        metadata = reader.schema.metadata or {}
        sums = {
            name: base64.b64decode(metadata.get(f"{name}_sums".encode(), b""))
            for name in ("tokens", "offsets")
        }
    except (pa.ArrowException, OSError, UnicodeDecodeError, binascii.Error) as error:
        _refuse(path, f"is not a readable Arrow file ({' '.join(str(error).split())})")
    tokens = column.values.to_numpy(zero_copy_only=True)
    offsets = column.offsets.to_numpy(zero_copy_only=True)
    if (batch.num_rows, len(tokens)) != (info.documents, info.tokens):
        _refuse(
            path,
            f"holds {batch.num_rows} documents and {len(tokens)} tokens, {MANIFEST} says "
            f"{info.documents} and {info.tokens}",
        )
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        _refuse(path, UNORDERED)
    domain_of, domains = domain.indices.to_numpy(zero_copy_only=True), domain.dictionary.to_pylist()
    return Shard(
        tokens,
        offsets,
        domain_of,
        domains,
        batch.column("source"),
        sums if _sha256_of_sums(sums) == info.sums else None,
        batch,
    )


def _check_contents(path: Path, shard: Shard) -> None:
    """Check everything about a shard but the values of its tokens; linear in documents."""
    import pyarrow as pa

    try:
        shard.batch.validate(full=True)  # offsets, UTF-8 and domain codes
    except (pa.ArrowException, UnicodeDecodeError) as error:
        _refuse(path, f"is not a readable Arrow file ({' '.join(str(error).split())})")
    if (np.diff(shard.offsets) < 1).any():
        _refuse(path, UNORDERED)


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise UserError(
            f"{path}: holds token id {largest}, vocab_size is {vocab_size}; run `emotrain prepare` "
            f"again"
        )


def _block_sums(values: np.ndarray) -> bytes:
    """The checksums of an array's blocks of BLOCK_BYTES, SUM_BYTES each, one after the other."""
    content = memoryview(np.ascontiguousarray(values)).cast("B")
    blocks = (content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES))
    return b"".join(hashlib.sha256(block).digest()[:SUM_BYTES] for block in blocks)


def _sha256_of_sums(sums: dict[str, bytes]) -> str:
    return hashlib.sha256(sums["tokens"] + sums["offsets"]).hexdigest()


def write_manifest(
    folder: Path,
    *,
    vocab_size: int,
    eos_id: int,
    eos_token: str,
    splits: dict[str, dict[str, Any]],
    skipped_documents: dict[str, int],
    settings: dict[str, Any],
) -> None:
    """Write `dataset.json`, which makes the folder a data set.

    Args:
        splits: for each of SPLITS, `shards` (a list of ShardInfo) and `domains` (counts by domain).
        settings: how the data set was made, for people.
    """
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "eos_token": eos_token,
        "dtype": token_dtype(vocab_size).name,
        "tokenizer": TOKENIZER,
        "splits": {
            split: {
                "shards": [asdict(info) for info in splits[split]["shards"]],
                "domains": splits[split]["domains"],
            }
            for split in SPLITS
        },
        "skipped_documents": skipped_documents,
        "settings": settings,
    }
    (folder / MANIFEST).write_text(
        json_text(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked contents of `dataset.json`, with a ShardInfo for each shard; see `Dataset` for
    errors."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise MissingFileError(
            f"{folder}: no such folder; make a data set with `emotrain prepare INPUT --out "
            f"{folder}`"
        )
    if not path.is_file():
        raise MissingFileError(
            f"{folder}: has no {MANIFEST}, so it is no data set, or half of one; make one with "
            f"`emotrain prepare INPUT --out DIR`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: is not JSON ({error}); restore it or run `emotrain prepare` again"
        ) from None
    check = _ManifestCheck(path)
    check.that(
        isinstance(manifest, dict) and manifest.get("format") == FORMAT,
        f'has no "format": "{FORMAT}"',
    )
    version = manifest.get("format_version")
    check.that(
        version == FORMAT_VERSION,
        f"has format_version {version!r}, this program reads {FORMAT_VERSION}",
    )
    vocab_size = check.count(manifest, "vocab_size", 1)
    check.that(vocab_size <= 2**32, f"has vocab_size {vocab_size}, more than 32-bit ids can name")
    check.that(
        check.count(manifest, "eos_id", 0) < vocab_size,
        f"has an eos_id outside its vocabulary of {vocab_size}",
    )
    check.that(
        isinstance(manifest.get("eos_token"), str),
        f"has eos_token={manifest.get('eos_token')!r}, it must be text",
    )
    check.that(
        manifest.get("dtype") == token_dtype(vocab_size).name,
        f"has dtype {manifest.get('dtype')!r}, a vocabulary of {vocab_size} is stored as "
        f"{token_dtype(vocab_size).name}",
    )
    check.that(
        manifest.get("tokenizer") == TOKENIZER,
        f"has tokenizer={manifest.get('tokenizer')!r}, it must be {TOKENIZER!r}",
    )
    skipped = check.group(manifest, "skipped_documents")
    for reason in skipped:
        check.count(skipped, reason, 0)
    splits = check.group(manifest, "splits")
    manifest["splits"] = {split: check.split(check.group(splits, split), split) for split in SPLITS}
    return manifest


def _links(folder: Path) -> set[str]:
    """Names of the symbolic links in a folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


@dataclass(frozen=True)
class _ManifestCheck:
    """Takes values out of a parsed manifest, refusing those of a wrong type or range."""

    path: Path

    def that(self, holds: bool, fault: str) -> None:
        if not holds:
            self.refuse(fault)

    def refuse(self, fault: str) -> NoReturn:
        raise UserError(f"{self.path}: {fault}; restore it or run `emotrain prepare` again")

    def count(self, group: dict[str, Any], key: str, least: int) -> int:
        value = group.get(key)
        if type(value) is not int or value < least:
            self.refuse(f"has {key}={value!r}, it must be a whole number of at least {least}")
        return value

    def group(self, group: dict[str, Any], key: str) -> dict[str, Any]:
        value = group.get(key)
        if not isinstance(value, dict):
            self.refuse(f"has {key}={value!r}, it must be an object")
        return value

    def split(self, group: dict[str, Any], split: str) -> dict[str, Any]:
        shards, domains = group.get("shards"), self.group(group, "domains")
        if not isinstance(shards, list):
            self.refuse(f"has {split} shards {shards!r}, they must be a list")
        # Listing a folder tells links from files without a look at each.
        links = _links(self.path.parent) | _links(self.path.parent / split)
        infos = [self.shard(item, split, links) for item in shards]
        for domain in domains:
            counts = self.group(domains, domain)
            self.count(counts, "documents", 0)
            self.count(counts, "tokens", 0)
        for total in ("documents", "tokens"):
            by_domain, by_shard = (
                sum(c[total] for c in domains.values()),
                sum(getattr(info, total) for info in infos),
            )
            self.that(
                by_domain == by_shard,
                f"counts {by_domain} {split} {total} by domain and {by_shard} by shard",
            )
        self.that(len({info.file for info in infos}) == len(infos), f"names a {split} shard twice")
        return {"shards": infos, "domains": domains}

    def shard(self, item: Any, split: str, links: set[str]) -> ShardInfo:
        """There may be ten thousand: no message is made before it is needed."""
        if not isinstance(item, dict):
            self.refuse(f"has {split} shard {item!r}, it must be an object")
        file, sha256, sums = item.get("file"), item.get("sha256"), item.get("sums", "")
        folder, _, name = file.partition("/") if isinstance(file, str) else ("", "", "")
        if folder != split or name in ("", ".", "..") or "/" in name or "\0" in name:
            self.refuse(f"names shard {file!r}, which is no file in {split}/")
        root = self.path.parent
        if (split in links or name in links) and not (root / file).resolve().is_relative_to(
            root.resolve()
        ):
            self.refuse(f"names shard {file!r}, which leads out of the data set")
        if not isinstance(sha256, str) or len(sha256) != 64:
            self.refuse(f"has sha256={sha256!r} for {file}, it must be 64 digits")
        if not isinstance(sums, str) or len(sums) not in (0, 64):
            self.refuse(f"has sums={sums!r} for {file}, they must be 64 digits or none")
        documents, tokens, size = (
            self.count(item, key, 1) for key in ("documents", "tokens", "bytes")
        )
        return ShardInfo(file, documents, tokens, size, sha256, sums)
