"""From a path to what can be trained on."""

from __future__ import annotations

from glob import has_magic
from pathlib import Path

from emotrain.config import RawTokensConfig, RepetitionFilterConfig
from emotrain.data.domain_store import DomainStore
from emotrain.data.formats import Dataset, SplitStore
from emotrain.data.loader import Loader, StreamWindows
from emotrain.data.manifest import MANIFEST
from emotrain.data.source import TokenStore
from emotrain.data.stores import plain
from emotrain.data.stores.listing import list_files
from emotrain.data.stores.vocabulary import vocabulary_of
from emotrain.errors import UserError


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
) -> Loader:
    """The sequences of a store, in order.

    Args:
        path, split, verify_checksums, tokenizer, raw: see `open_store`.
        sequence_length: tokens of a sequence.
        seed: of the order.
        cross_document_targets, repetition_filter: see `Loader`.
        domain: only its documents, which use its exclusive experts; empty for all documents.
        span: sequences that stay neighbours, for pools across windows; see `StreamWindows`.
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
    windows = StreamWindows(store, sequence_length, span, part)
    return Loader(
        windows,
        seed,
        cross_document_targets=cross_document_targets,
        repetition_filter=repetition_filter,
        domain=domain,
    )


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
    if raw.format == "auto" and _is_ours(name):
        return Dataset(path, verify_checksums).store(split)
    if split != "train":
        raise UserError(
            f"{path}: has no {split} split, only `emotrain prepare` and `emotrain convert` make "
            f"one; give a folder of theirs"
        )
    vocabulary = vocabulary_of(name, tokenizer, raw)
    files = list_files(name, plain.ENDINGS, raw, domain)
    return plain.PlainStore(name, files, vocabulary, raw.dtype)


def _is_ours(path: str) -> bool:
    """Whether a path is to be read as a prepared data set: it has a manifest, or is a folder or a
    missing file that no other format knows, so that it is said how to make one."""
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return True
    if folder.is_dir():
        return not any(any(folder.rglob(f"*{ending}")) for ending in plain.ENDINGS)
    return not (folder.exists() or has_magic(path) or path.endswith(plain.ENDINGS))
