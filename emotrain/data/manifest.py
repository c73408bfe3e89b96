"""`dataset.json`: what a data set holds. Written last; nothing in it is trusted."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from emotrain.errors import MissingFileError, UserError
from emotrain.files import json_text, sha256_of

MANIFEST, TOKENIZER, CARD = "dataset.json", "tokenizer.json", "README.md"
FORMAT, FORMAT_VERSION = "emotrain-dataset", 1
SPLITS = ("train", "valid")


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


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_manifest(
    folder: Path,
    *,
    vocab_size: int,
    eos_id: int,
    eos_token: str,
    splits: dict[str, dict[str, Any]],
    skipped_documents: dict[str, int],
    settings: dict[str, Any],
    card: dict[str, Any] | None = None,
) -> None:
    """Write `dataset.json`, which makes the folder a data set.

    Args:
        splits: for each of SPLITS, `shards` (a list of ShardInfo) and `domains` (counts by domain).
        settings: how the data set was made, for people.
        card: what is known of its contents, see `card`.
    """
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "eos_token": eos_token,
        "dtype": token_dtype(vocab_size).name,
        "tokenizer": TOKENIZER,
        "tokenizer_sha256": sha256_of(tokenizer)
        if (tokenizer := folder / TOKENIZER).is_file()
        else "",
        "splits": {
            split: {
                "shards": [asdict(info) for info in splits[split]["shards"]],
                "domains": splits[split]["domains"],
            }
            for split in SPLITS
        },
        "skipped_documents": skipped_documents,
        "settings": settings,
    } | ({"card": card} if card else {})
    (folder / MANIFEST).write_text(
        json_text(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked contents of `dataset.json`, with a ShardInfo for each shard; see `Dataset` for
    errors."""
    path = folder / MANIFEST
    if ":/" in str(folder) and not folder.exists():
        raise UserError(
            f"{folder}: is no folder of this machine; in object stores and on web servers data are "
            f"read by windows, to train on: copy the data set here"
        )
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
    # Data sets of before its checksum have none.
    check.that(
        isinstance(manifest.setdefault("tokenizer_sha256", ""), str),
        f"has tokenizer_sha256={manifest['tokenizer_sha256']!r}, it must be text",
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
        if not isinstance(file, str):
            self.refuse(f"names shard {file!r}, which is no file in {split}/")
        folder, _, name = file.partition("/")
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
