"""`emotrain convert`: a token store of any format in, a prepared data set out.

Documents are those of the store and stay whole; no token is changed, and none made up. As in
`prepare`, a hash of (seed, number) decides to which shard a document goes, where in it, and
whether it is held out, so that the first documents of a shard are a sample of all; see `shuffle`.
Memory holds a piece of one file and a shard, the disk twice the tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from emotrain.config import RawTokensConfig
from emotrain.data.files import shown
from emotrain.data.manifest import SPLITS, TOKENIZER, token_dtype, write_manifest
from emotrain.data.staging import stage_dataset
from emotrain.errors import UserError
from emotrain.progress import ProgressBar

if TYPE_CHECKING:
    from emotrain.data.source import TokenStore

SHARD_TOKENS = 2**27
"""Tokens of a shard, about, as of `prepare`."""
PIECE = 2**22
"""Tokens that are read at a time."""


class Whole(NamedTuple):
    """A document of a store."""

    start: int
    """Where it begins in its shard."""
    tokens: np.ndarray


def convert(
    path: str | Path,
    out: str | Path,
    *,
    tokenizer: str = "",
    raw: RawTokensConfig | None = None,
    append_eos: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    valid_fraction: float = 0.01,
    seed: int = 0,
    overwrite: bool = False,
    bar: ProgressBar | None = None,
) -> dict[str, Any]:
    """Make a data set out of a store.

    Args:
        path, tokenizer, raw: see `open_store`.
        out: folder to make.
        append_eos: give EOS to documents that do not end in it, instead of refusing them.
        shard_tokens: tokens of a shard, about.
        valid_fraction: share of documents held out.
        seed: of the shuffle and of the held-out share.
        overwrite: replace an older data set at `out`, once the new one is complete.
        bar: where progress is shown, if anywhere.
    Returns:
        The report that `--json` prints.
    Raises:
        UserError: bad arguments, data that cannot be read, or `out` exists.
    """
    from emotrain.data.opening import open_store  # here: they load torch, and --help need not
    from emotrain.data.stores.shuffle import Shuffle

    started = time.perf_counter()
    if shard_tokens < 1 or not 0 <= valid_fraction < 1 or seed < 0:
        raise UserError(
            f"shard_tokens={shard_tokens}, valid_fraction={valid_fraction}, seed={seed}: shards "
            f"have tokens, the share held out is below 1, and neither it nor a seed is negative"
        )
    store, bar = open_store(path, tokenizer=tokenizer, raw=raw), bar or ProgressBar(shown=False)
    if getattr(store, "is_text", False):
        raise UserError(f"{path}: is text, not tokens; run `emotrain prepare {path} --out {out}`")
    total = sum(store.shard_tokens)
    buckets = {
        "train": 1 + total // shard_tokens,
        "valid": 1 + int(total * valid_fraction) // shard_tokens,
    }
    with stage_dataset(out, overwrite) as staging:
        if store.tokenizer_file.is_file():
            (staging.folder / TOKENIZER).write_bytes(store.tokenizer_file.read_bytes())
        shuffle = Shuffle(staging.folder, buckets, seed, token_dtype(store.vocab_size))
        number, added = 0, 0
        bar.start("reading", total)
        for shard in range(len(store.shard_tokens)):
            for documents, ids in _batches(store, shard, append_eos, bar):
                added += sum(map(len, ids))
                shuffle.add(number, documents, ids, valid_fraction)
                number += len(documents)
        splits = shuffle.finish(bar)
        if not splits["train"]["shards"]:
            raise UserError(
                f"{path}: all of its {number} documents are held out; lower --valid-fraction"
            )
        write_manifest(
            staging.folder,
            vocab_size=store.vocab_size,
            eos_id=store.eos_id,
            eos_token=getattr(store, "eos_token", ""),
            splits=splits,
            skipped_documents={},
            settings={
                "converted_from": shown(str(path)), "fingerprint": store.fingerprint, "seed": seed,
                "valid_fraction": valid_fraction, "shard_tokens": shard_tokens,
            },
        )  # fmt: skip
        staging.commit()
    counts = {"documents": number, "tokens": added, "eos_added": added - total}
    seconds = {"seconds": round(time.perf_counter() - started, 3)}
    return {"out": str(out), **counts, **_report(splits), **seconds}


def _report(splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for split in SPLITS:
        infos = splits[split]["shards"]
        report[f"{split}_documents"] = sum(info.documents for info in infos)
        report[f"{split}_tokens"] = sum(info.tokens for info in infos)
        report[f"{split}_shards"] = len(infos)
    return report | {"domains": {split: splits[split]["domains"] for split in SPLITS}}


def whole_documents(
    store: TokenStore, shard: int, bar: ProgressBar | None = None
) -> Iterator[Whole]:
    """The documents of a shard of any store, one after the other, each whole."""
    total, begin = store.shard_tokens[shard], 0
    pieces: list[np.ndarray] = []
    for at in range(0, total, PIECE):
        stop = min(at + PIECE, total)
        # With the token before it, which is a piece alone if a document begins at `at`.
        window = store.window(shard, max(at - 1, 0), stop)
        edges = np.cumsum(window.lengths[:-1]) + max(at - 1, 0)
        tokens = window.tokens[min(at, 1) :]
        for edge in edges.tolist():
            pieces.append(tokens[max(begin, at) - at : edge - at])
            yield Whole(begin, np.concatenate(pieces))
            pieces, begin = [], edge
        pieces.append(tokens[max(begin, at) - at :])
        if bar:
            bar.advance(stop - at)
    if total:
        yield Whole(begin, np.concatenate(pieces))


def _batches(
    store: TokenStore, shard: int, append_eos: bool, bar: ProgressBar
) -> Iterator[tuple[list[tuple[str, str]], list[np.ndarray]]]:
    """Documents of a shard with their token ids, some at a time."""
    name = str(store.name_of(shard) if hasattr(store, "name_of") else store.path)
    labels = getattr(store, "labels", ())
    folder = os.path.basename(os.path.dirname(name if "://" in name else os.path.abspath(name)))
    domain = (labels[shard] if labels else "") or shown(folder) or "unknown"
    base = shown(os.path.basename(name))
    sources = store.sources(shard) if hasattr(store, "sources") else iter(())
    eos = np.array([store.eos_id])
    documents: list[tuple[str, str]] = []
    ids: list[np.ndarray] = []
    held, indexed = 0, False
    for number, (start, tokens) in enumerate(whole_documents(store, shard, bar)):
        source = next(sources, None)
        if source is not None and source[:2] != (start, start + len(tokens)):
            raise UserError(
                f"{name}: tokens {start} to {start + len(tokens)} are a document, entry "
                f"{number + 1} of the index beside it says {source[0]} to {source[1]}; move the "
                f"index away, or restore it"
            )
        if source is None and indexed:
            raise UserError(
                f"{name}: has more than the {number} documents of the index beside it; move the "
                f"index away, or restore it"
            )
        indexed = source is not None
        if tokens[-1] != store.eos_id:
            if not append_eos:
                raise UserError(
                    f"{name}: the document of tokens {start} to {start + len(tokens)} does not end "
                    f"in EOS ({store.eos_id}), as all of a data set do; give --append-eos"
                )
            tokens = np.concatenate((tokens, eos)).astype(np.int64)
        documents.append((domain, source[2] if source else f"{base}:{start}"))
        ids.append(tokens)
        held += len(tokens)
        if held >= PIECE:
            yield documents, ids
            documents, ids, held = [], [], 0
    if next(sources, None) is not None:
        raise UserError(
            f"{name}: has fewer documents than the index beside it; move the index away, or "
            f"restore it"
        )
    if documents:
        yield documents, ids
