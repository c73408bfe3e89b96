"""From a path to what can be trained on."""

from __future__ import annotations

from glob import has_magic, iglob
from pathlib import Path, PurePath
from typing import Any

from emotrain.config import RawTokensConfig, RepetitionFilterConfig
from emotrain.data.best_fit import BestFitWindows
from emotrain.data.domain_store import DomainStore
from emotrain.data.formats import Dataset, SplitStore
from emotrain.data.loader import Loader, StreamWindows
from emotrain.data.manifest import MANIFEST
from emotrain.data.replacement import ReplacingLoader
from emotrain.data.source import TokenStore
from emotrain.data.stores import columns, mds, megatron, plain, prepared, remote
from emotrain.data.stores.listing import LIST, read_list
from emotrain.data.stores.mds_shards import INDEX
from emotrain.data.stores.vocabulary import vocabulary_of
from emotrain.errors import UserError

ENDINGS = {
    ".npy": "dolma",
    ".idx": "megatron",
    ".bin": "megatron",
    INDEX: "mds",
    **dict.fromkeys(columns.ENDINGS, "columns"),
}
"""The format that the name of a file says."""
PACKINGS: dict[str, type[StreamWindows]] = {"concat": StreamWindows, "best_fit": BestFitWindows}
"""By `data.packing`."""
OURS = ".arrow"
"""What shards end in: a folder of them that has no manifest is half a data set."""


def open_loader(
    path: str | Path,
    sequence_length: int,
    seed: int,
    *,
    cross_document_targets: bool = True,
    repetition_filter: RepetitionFilterConfig | None = None,
    verify_checksums: bool = True,
    domain: str = "",
    split: str = "train",
    span: int = 1,
    tokenizer: str = "",
    raw: RawTokensConfig | None = None,
    packing: str = "concat",
    on_bad_data: str = "stop",
) -> Loader:
    """The sequences of a store, in order.

    Args:
        path, split, verify_checksums, tokenizer, raw: see `open_store`.
        sequence_length: tokens of a sequence.
        seed: of the order.
        cross_document_targets, repetition_filter: see `Loader`.
        domain: only its documents, which use its exclusive experts; empty for all documents.
        span: sequences that stay neighbours, for pools across windows; see `StreamWindows`.
        packing: `concat` or `best_fit`; see `DataConfig`.
        on_bad_data: `stop` or `replace`; see `DataConfig`.
    Raises:
        FileNotFoundError: nothing there. UserError: damaged data, data without a whole sequence,
            or a bad argument.
    """
    store = open_store(
        path,
        split,
        tokenizer=tokenizer,
        raw=raw,
        verify_checksums=verify_checksums,
        domain=domain,
    )
    part = ""
    if domain and isinstance(store, SplitStore):
        store, part = DomainStore(store, domain, sequence_length), f"domain {domain}"
    windows = PACKINGS[packing](store, sequence_length, span, part)
    options: dict[str, Any] = {
        "cross_document_targets": cross_document_targets,
        "repetition_filter": repetition_filter,
        "domain": domain,
    }
    replaces = repetition_filter and repetition_filter.action == "replace"
    if replaces or on_bad_data == "replace":
        return ReplacingLoader(windows, seed, bad_data=on_bad_data == "replace", **options)
    return Loader(windows, seed, **options)


def open_store(
    path: str | Path,
    split: str = "train",
    *,
    tokenizer: str = "",
    raw: RawTokensConfig | None = None,
    verify_checksums: bool = True,
    domain: str = "",
) -> TokenStore:
    """Streams of tokens where they lie. A folder with a `dataset.json` is a prepared data set;
    anything else is what `raw.format` says, or by the names of its files (`emotrain.data.stores`).

    Args:
        path: a folder, a file, a pattern or a list of files; see `emotrain.data.stores.listing`.
        split: `train` or `valid`; other formats than ours have `train` alone.
        tokenizer: the tokenizer.json of other formats than ours.
        raw: what such files do not say of themselves.
        verify_checksums: hash what is read, where there are checksums; see `Dataset`.
        domain: of other formats than ours the files with this label alone; empty for all.
    Raises:
        FileNotFoundError: nothing there. UserError: anything that is not as it must be.
    """
    name, raw = str(path), raw or RawTokensConfig()
    if "://" in name:
        remote.files_of(name).forget()
    if raw.format == "auto" and _is_ours(name):
        return Dataset(path, verify_checksums).store(split)
    is_folder = "://" in name and name.endswith("/")
    if raw.format == "auto" and is_folder and remote.exists(name, MANIFEST):
        return prepared.FarDataset(name, verify_checksums).store(split)
    if split != "train":
        raise UserError(
            f"{path}: has no {split} split, only `emotrain prepare` and `emotrain convert` make "
            f"one; give a folder of theirs"
        )
    vocabulary = vocabulary_of(name, tokenizer, raw)
    kind = _format_of(name, raw)
    if kind == "columns":
        return columns.open_columns(name, raw, vocabulary, domain)
    if kind == "megatron":
        return megatron.open_megatron(name, raw, vocabulary, domain)
    if kind == "mds":
        return mds.open_mds(name, raw, vocabulary, domain, verify_checksums)
    return plain.open_plain(name, raw, vocabulary, domain)


def _is_ours(path: str) -> bool:
    """Whether a path is to be read as a prepared data set: it has a manifest, or is a folder or a
    missing file that no other format knows, so that it is said how to make one."""
    if "://" in path:
        return False
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return True
    if folder.is_dir():
        return not any(any(folder.rglob(f"*{ending}")) for ending in ENDINGS if ending != OURS)
    return not (folder.exists() or has_magic(path) or path.endswith(tuple(ENDINGS))) and not (
        Path(megatron.index_of(path)).is_file()
    )


def _format_of(path: str, raw: RawTokensConfig) -> str:
    """What lies at a path: a format that the settings name, or the one that its first file's name
    says."""
    if raw.format != "auto":
        return raw.format
    folder = Path(path)
    if "://" in path:
        if path.endswith(LIST):
            path = next(iter(read_list(path, raw)), (path, ""))[0]
        elif path.endswith("/") or has_magic(path):
            path = next(iter(remote.names_at(path, list(ENDINGS))), path)
    elif folder.is_dir():
        names = (name for ending in ENDINGS for name in folder.rglob(f"*{ending}"))
        path = str(next(names))
    elif folder.is_file() and not path.endswith(tuple(ENDINGS)):
        path = next(iter(read_list(path, raw)), (path, ""))[0]
    elif has_magic(path):
        path = next((name for name in iglob(path, recursive=True)), path)
    known = next((kind for ending, kind in ENDINGS.items() if path.endswith(ending)), "")
    # What has no ending is the prefix of a `.bin` and its `.idx`.
    remote_prefix = "://" in path and not PurePath(path).suffix
    is_prefix = remote_prefix or Path(megatron.index_of(path)).is_file()
    return known or ("megatron" if is_prefix else "dolma")
