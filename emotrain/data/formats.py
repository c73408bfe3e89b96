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

With one record batch, the ids of all documents lie in one contiguous buffer and the list offsets (int64) in another: a
shard is used in place through a memory map, whatever its size, and any Arrow library can read it. Document ids are
positions in the whole data set, the train shards first, so that an id names one document for ever.

Everything read here is untrusted until checked: names stay inside the folder, sizes and counts agree with the manifest,
offsets are in order, and with `verify_checksums` every byte of a shard is hashed when it is first used.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from emotrain.files import sha256_of

if TYPE_CHECKING:
    import pyarrow as pa

    from emotrain.data.tokenizer import TextTokenizer

MANIFEST, TOKENIZER = "dataset.json", "tokenizer.json"
FORMAT, FORMAT_VERSION = "emotrain-dataset", 1
SPLITS = ("train", "valid")

MAX_OPEN_SHARDS = 256
"""Shards mapped at a time. A map holds a file descriptor, and a process commonly has 1,024; mapping again takes under a
millisecond."""



@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of a shard."""

    file: str
    """Path inside the data set, with `/`."""
    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A mapped shard. The arrays are views of the file, read-only, and stay valid as long as something refers to them."""

    tokens: np.ndarray
    """uint16 or uint32 [tokens of the shard]: its documents one after the other."""
    offsets: np.ndarray
    """int64 [documents + 1]: where each document starts in `tokens`."""
    domain_of: np.ndarray
    """int32 [documents]: index into `domains`."""
    domains: list[str]
    sources: pa.StringArray


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_shard(path: Path, tokens: np.ndarray, offsets: np.ndarray, domains: Sequence[str],
                sources: Sequence[str]) -> ShardInfo:
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
    batch = pa.record_batch(columns, schema=_schema(tokens.dtype))
    with open(path, "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    return ShardInfo(f"{path.parent.name}/{path.name}", len(offsets) - 1, len(tokens), path.stat().st_size, sha256_of(path))


class Dataset:
    """A prepared data set, opened. Opening reads the manifest and the sizes of the files; shards are mapped when used.

    Args:
        path: the folder.
        verify_checksums: hash every shard when it is first used (about a second a gigabyte), and check that its token ids
            lie in the vocabulary. Without it, bytes that changed on the disk go unnoticed.
    Raises:
        FileNotFoundError: no such folder, or no manifest in it. ValueError: anything in it that is not as it must be.
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
        for split in SPLITS:
            for info in self.shards[split]:
                self._check_size(info)
        self._open: OrderedDict[tuple[str, int], Shard] = OrderedDict()
        self._verified: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    @cached_property
    def first_ids(self) -> dict[str, list[int]]:
        """For each split, the id of the first document of each shard, and one past the last id of the split."""
        first, ids = 0, {}
        for split in SPLITS:
            ids[split] = list(accumulate((info.documents for info in self.shards[split]), initial=first))
            first = ids[split][-1]
        return ids

    def num_documents(self, split: str = "train") -> int:
        return sum(info.documents for info in self._infos(split))

    def num_tokens(self, split: str = "train") -> int:
        return sum(info.tokens for info in self._infos(split))

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that the documents were encoded with. Raises: ValueError, FileNotFoundError if it is another one."""
        from emotrain.data.tokenizer import load_tokenizer

        path = self.path / TOKENIZER
        tokenizer = load_tokenizer(path, self.eos_token)
        if (tokenizer.vocab_size, tokenizer.eos_id) != (self.vocab_size, self.eos_id):
            raise ValueError(f"{path}: has {tokenizer.vocab_size} tokens and EOS {tokenizer.eos_id}, {MANIFEST} says "
                             f"{self.vocab_size} and {self.eos_id}; restore the tokenizer that the data set was prepared with")
        return tokenizer

    def fingerprint(self, split: str = "train") -> str:
        """16 hexadecimal digits that differ for any other tokens, order of documents or vocabulary."""
        identity = [self.vocab_size, self.eos_id, [info.sha256 for info in self._infos(split)]]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def verify(self) -> None:
        """Hash every shard now. Raises: ValueError, for the first one that is not as the manifest says."""
        for split in SPLITS:
            for info in self.shards[split]:
                self._check_checksum(info)
                _check_ids(self.path / info.file, _map_shard(self.path / info.file, info, self.dtype), self.vocab_size)

    def shard(self, split: str, index: int) -> Shard:
        """A shard, mapped. Safe to call from several threads."""
        key = (split, index)
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
            info = self._infos(split)[index]
            first_time = self.verify_checksums and key not in self._verified
            if first_time:
                self._check_checksum(info)
            shard = _map_shard(self.path / info.file, info, self.dtype)
            if first_time:
                _check_ids(self.path / info.file, shard, self.vocab_size)
                self._verified.add(key)
            self._open[key] = shard
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return shard

    def locate(self, document_id: int) -> tuple[str, int, int]:
        """Split, shard and row of a document. Raises: ValueError, for an id that the data set does not have."""
        for split in SPLITS:
            firsts = self.first_ids[split]
            if firsts[0] <= document_id < firsts[-1]:
                index = bisect_right(firsts, document_id) - 1
                return split, index, document_id - firsts[index]
        raise ValueError(f"document {document_id} is not in {self.path}; its ids are 0 to {self.first_ids[SPLITS[-1]][-1] - 1}")

    def document_domains(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The domain of each document."""
        domains = []
        for document_id in ids:
            split, index, row = self.locate(int(document_id))
            shard = self.shard(split, index)
            domains.append(shard.domains[shard.domain_of[row]])
        return domains

    def documents(self, split: str = "valid", domain: str | None = None,
                  limit: int | None = None) -> Iterator[tuple[int, np.ndarray, str]]:
        """The documents of a split as (id, token ids, domain), in stored order, which `prepare` shuffled.

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
            raise ValueError(f"domain {domain!r} has no {split} documents; choose one of {', '.join(self.domains[split])}")
        left = self.num_documents(split) if limit is None else limit
        for index in range(len(infos)):
            shard, first_id = self.shard(split, index), self.first_ids[split][index]
            wanted = np.arange(infos[index].documents)
            if domain is not None:
                code = shard.domains.index(domain) if domain in shard.domains else -1
                wanted = np.flatnonzero(shard.domain_of == code)
            for row in wanted[:left].tolist():
                ids = shard.tokens[shard.offsets[row]:shard.offsets[row + 1]]
                yield first_id + row, ids, shard.domains[shard.domain_of[row]]
            left -= min(left, len(wanted))

    def _infos(self, split: str) -> list[ShardInfo]:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not known; choose one of {', '.join(SPLITS)}")
        return self.shards[split]

    def _check_size(self, info: ShardInfo) -> None:
        path = self.path / info.file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: shard is missing; restore it or run `emotrain prepare` again")
        if path.stat().st_size != info.bytes:
            raise ValueError(f"{path}: has {path.stat().st_size} bytes, {MANIFEST} says {info.bytes}; copy it again or run "
                             f"`emotrain prepare` again")

    def _check_checksum(self, info: ShardInfo) -> None:
        path = self.path / info.file
        found = sha256_of(path)
        if found != info.sha256:
            raise ValueError(f"{path}: sha256 is {found[:12]}…, {MANIFEST} says {info.sha256[:12]}…; its bytes have "
                             f"changed, copy it again or run `emotrain prepare` again")


def _schema(dtype: np.dtype) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([
        ("tokens", pa.large_list(pa.from_numpy_dtype(dtype))),
        ("domain", pa.dictionary(pa.int32(), pa.string())),
        ("source", pa.string()),
    ])


def _map_shard(path: Path, info: ShardInfo, dtype: np.dtype) -> Shard:
    """Map a shard and check everything about it but the values of its tokens."""
    import pyarrow as pa

    def refuse(fault: str) -> None:
        raise ValueError(f"{path}: {fault}; copy the shard again or run `emotrain prepare` again")

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            refuse(f"has {reader.num_record_batches} record batches, a shard has one")
        if not reader.schema.equals(_schema(dtype)):
            refuse(f"has columns ({', '.join(f'{f.name}: {f.type}' for f in reader.schema)}), not those of {dtype} shards")
        batch = reader.get_batch(0)
        batch.validate(full=True)  # offsets, UTF-8 and domain codes; linear in documents, it does not read the tokens
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        refuse(f"is not a readable Arrow file ({' '.join(str(error).split())})")
    column, domain = batch.column("tokens"), batch.column("domain")
    if any(batch.column(i).null_count for i in range(batch.num_columns)) or column.values.null_count:
        refuse("has null values")
    tokens = column.values.to_numpy(zero_copy_only=True)
    offsets = column.offsets.to_numpy(zero_copy_only=True)
    if (batch.num_rows, len(tokens)) != (info.documents, info.tokens):
        refuse(f"holds {batch.num_rows} documents and {len(tokens)} tokens, {MANIFEST} says {info.documents} and {info.tokens}")
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 1).any():
        refuse("has document offsets that do not rise from 0 to its number of tokens")
    domain_of, domains = domain.indices.to_numpy(zero_copy_only=True), domain.dictionary.to_pylist()
    return Shard(tokens, offsets, domain_of, domains, batch.column("source"))


def _check_ids(path: Path, shard: Shard, vocab_size: int) -> None:
    largest = int(shard.tokens.max(initial=0))
    if largest >= vocab_size:
        raise ValueError(f"{path}: holds token id {largest}, vocab_size is {vocab_size}; run `emotrain prepare` again")


def write_manifest(folder: Path, *, vocab_size: int, eos_id: int, eos_token: str, splits: dict[str, dict[str, Any]],
                   skipped_documents: dict[str, int], settings: dict[str, Any]) -> None:
    """Write `dataset.json`, which makes the folder a data set.

    Args:
        splits: for each of SPLITS, `shards` (a list of ShardInfo) and `domains` (counts by domain).
        settings: how the data set was made, for people.
    """
    manifest = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "vocab_size": vocab_size, "eos_id": eos_id,
        "eos_token": eos_token, "dtype": token_dtype(vocab_size).name, "tokenizer": TOKENIZER,
        "splits": {split: {"shards": [asdict(info) for info in splits[split]["shards"]], "domains": splits[split]["domains"]}
                   for split in SPLITS},
        "skipped_documents": skipped_documents, "settings": settings,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked contents of `dataset.json`, with a ShardInfo for each shard; see `Dataset` for errors."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; make a data set with `emotrain prepare INPUT --out {folder}`")
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: has no {MANIFEST}, so it is no data set, or half of one; make one with "
                                f"`emotrain prepare INPUT --out DIR`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); restore it or run `emotrain prepare` again") from None
    check = _ManifestCheck(path)
    check.that(isinstance(manifest, dict) and manifest.get("format") == FORMAT, f'has no "format": "{FORMAT}"')
    version = manifest.get("format_version")
    check.that(version == FORMAT_VERSION, f"has format_version {version!r}, this program reads {FORMAT_VERSION}")
    vocab_size = check.count(manifest, "vocab_size", 1)
    check.that(vocab_size <= 2**32, f"has vocab_size {vocab_size}, more than 32-bit ids can name")
    check.that(check.count(manifest, "eos_id", 0) < vocab_size, f"has an eos_id outside its vocabulary of {vocab_size}")
    check.that(isinstance(manifest.get("eos_token"), str), f"has eos_token={manifest.get('eos_token')!r}, it must be text")
    check.that(manifest.get("dtype") == token_dtype(vocab_size).name,
               f"has dtype {manifest.get('dtype')!r}, a vocabulary of {vocab_size} is stored as {token_dtype(vocab_size).name}")
    check.that(manifest.get("tokenizer") == TOKENIZER,
               f"has tokenizer={manifest.get('tokenizer')!r}, it must be {TOKENIZER!r}")
    skipped = check.group(manifest, "skipped_documents")
    for reason in skipped:
        check.count(skipped, reason, 0)
    splits = check.group(manifest, "splits")
    manifest["splits"] = {split: check.split(check.group(splits, split), split) for split in SPLITS}
    return manifest


@dataclass(frozen=True)
class _ManifestCheck:
    """Takes values out of a parsed manifest, refusing those of a wrong type or range."""

    path: Path

    def that(self, holds: bool, fault: str) -> None:
        if not holds:
            raise ValueError(f"{self.path}: {fault}; restore it or run `emotrain prepare` again")

    def count(self, group: dict[str, Any], key: str, least: int) -> int:
        value = group.get(key)
        self.that(type(value) is int and value >= least, f"has {key}={value!r}, it must be a whole number of at least {least}")
        return value

    def group(self, group: dict[str, Any], key: str) -> dict[str, Any]:
        value = group.get(key)
        self.that(isinstance(value, dict), f"has {key}={value!r}, it must be an object")
        return value

    def split(self, group: dict[str, Any], split: str) -> dict[str, Any]:
        shards, domains = group.get("shards"), self.group(group, "domains")
        self.that(isinstance(shards, list), f"has {split} shards {shards!r}, they must be a list")
        infos = [self.shard(item, split) for item in shards]
        for domain in domains:
            counts = self.group(domains, domain)
            self.count(counts, "documents", 0)
            self.count(counts, "tokens", 0)
        for total in ("documents", "tokens"):
            by_domain, by_shard = sum(c[total] for c in domains.values()), sum(getattr(info, total) for info in infos)
            self.that(by_domain == by_shard, f"counts {by_domain} {split} {total} by domain and {by_shard} by shard")
        self.that(len({info.file for info in infos}) == len(infos), f"names a {split} shard twice")
        return {"shards": infos, "domains": domains}

    def shard(self, item: Any, split: str) -> ShardInfo:
        self.that(isinstance(item, dict), f"has {split} shard {item!r}, it must be an object")
        file, sha256 = item.get("file"), item.get("sha256")
        inside = isinstance(file, str) and PurePosixPath(file).parent == PurePosixPath(split) and "\0" not in file
        self.that(inside and PurePosixPath(file).name not in ("", ".."), f"names shard {file!r}, which is no file in {split}/")
        resolved, root = (self.path.parent / file).resolve(), self.path.parent.resolve()
        self.that(resolved.is_relative_to(root), f"names shard {file!r}, which leads out of the data set")
        self.that(isinstance(sha256, str) and len(sha256) == 64, f"has sha256={sha256!r} for {file}, it must be 64 digits")
        documents, tokens, size = (self.count(item, key, 1) for key in ("documents", "tokens", "bytes"))
        return ShardInfo(file, documents, tokens, size, sha256)
