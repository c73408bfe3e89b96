"""`emotrain prepare`: text documents in, a data set of shuffled token shards out, in one pass and
little memory.

1. The files are found and put in order; with `train_tokenizer`, a first pass over them trains a
  tokenizer.
2. Documents are read one after the other and numbered. Threads encode them; results are taken in
   the order of reading, so that the number of threads changes nothing.
3. A hash of (seed, number) decides to which shard a document goes, and where in it. Until a shard
   is finished, its documents lie in a plain file of their own ("bucket"): memory holds some
   buffers, not the corpus.
4. Bucket by bucket, documents are put in the order of their hashes and written as a shard (see
  `formats`).
5. The manifest is written, everything is flushed, and the folder takes its name.

So documents that were neighbours in a file end up far apart, the same inputs, tokenizer and seed
give the same bytes, and a process that is killed leaves no data set rather than half of one.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.data.documents import FIELDS, REASONS, Document, DocumentReader, Fields
from emotrain.data.files import find_files, shown
from emotrain.data.manifest import SPLITS, TOKENIZER, token_dtype, write_manifest
from emotrain.data.spill import Spill
from emotrain.data.staging import stage_dataset
from emotrain.data.tokenizer import (
    EOS_TOKEN,
    TextTokenizer,
    load_tokenizer,
)
from emotrain.data.tokenizer import (
    train_tokenizer as train_bpe,
)
from emotrain.errors import UserError
from emotrain.progress import ProgressBar

log = logging.getLogger("emotrain")

SAMPLE = "sample"
"""The input that names the embedded corpus (a folder of that name is `./sample`)."""

SAMPLE_DIR = Path(__file__).parent / "sample"
"""The embedded corpus: one Parquet file a domain."""

SHARD_TOKENS = 2**27
"""Tokens of a shard, about: 256 or 512 MiB, which is held in memory twice while it is shuffled."""


BATCH_BYTES = 2**20
"""Bytes of text a thread encodes at a time."""

TOKENIZER_BYTES = 2**28
"""Bytes of text a tokenizer is trained on, at most: the start of each file, as much of one as of
another."""

BYTES_PER_TOKEN, COMPRESSION = 3, 4
"""Rough sizes, from which the number of shards is guessed before anything is read."""


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: bool = False,
    vocab_size: int = 4096,
    eos_token: str = EOS_TOKEN,
    shard_tokens: int = SHARD_TOKENS,
    valid_fraction: float = 0.01,
    seed: int = 0,
    workers: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    fields: Fields = FIELDS,
    bar: ProgressBar | None = None,
) -> dict[str, Any]:
    """Make a data set out of documents.

    Args:
        inputs: files and folders (see `documents`), or `sample`.
        out: folder to make.
        tokenizer: a `tokenizer.json`; or else `train_tokenizer`, of at most `vocab_size` tokens.
        eos_token: the token that ends every document.
        shard_tokens: tokens of a shard, about.
        valid_fraction: share of documents held out, among those whose file does not say.
        seed: of the shuffle and of the held-out share.
        workers: threads that encode; all usable cores by default. The result does not depend on it.
        strict: refuse the first bad document instead of skipping and counting it.
        overwrite: replace an older data set at `out`, once the new one is complete.
        fields: names of the keys or columns that hold a document.
        bar: where progress is shown, if anywhere.
    Returns:
        The report that `--json` prints: counts, sizes in bytes and `seconds`.
    Raises:
        ValueError: bad arguments, unreadable inputs, a bad document if strict, no document to train
            on, or `out` exists.
        FileNotFoundError: a missing input or tokenizer. OSError: the disk is full.
    """
    started = time.perf_counter()
    sample = tokenizer is None and [str(item) for item in inputs] == [SAMPLE]
    train_tokenizer = train_tokenizer or sample
    _check_arguments(tokenizer, train_tokenizer, shard_tokens, valid_fraction, seed, workers)
    named = [SAMPLE_DIR if str(item) == SAMPLE else item for item in inputs]
    files, passed_over = find_files(named, out)
    reader = DocumentReader(fields, strict)
    bar = bar or ProgressBar(shown=False)
    with stage_dataset(out, overwrite) as staging:
        if tokenizer is None:
            texts = _training_texts(files, DocumentReader(fields, strict), bar)
            encoder = train_bpe(texts, vocab_size, eos_token)
        else:
            encoder = _load(tokenizer, eos_token)
        (staging.folder / TOKENIZER).write_text(encoder.to_json(), encoding="utf-8")
        buckets = _buckets(files, shard_tokens, valid_fraction)
        spill = Spill(staging.folder, buckets, seed, token_dtype(encoder.vocab_size))
        encoded = _encode(_read(files, reader, bar), encoder, workers or _usable_cores())
        text_bytes = _spill_all(encoded, reader, spill, valid_fraction)
        reader.check_fields()
        splits = spill.finish(bar)
        _check_any(splits, files, reader)
        skipped_documents = {reason: reader.skipped[reason] for reason in REASONS}
        write_manifest(
            staging.folder,
            vocab_size=encoder.vocab_size,
            eos_id=encoder.eos_id,
            eos_token=eos_token,
            splits=splits,
            skipped_documents=skipped_documents,
            settings={
                "seed": seed,
                "valid_fraction": valid_fraction,
                "shard_tokens": shard_tokens,
                "input_files": [shown(path.name) for path in files],
            },
        )
        staging.commit()
    report = _report(Path(out), encoder, splits, skipped_documents, text_bytes, len(files))
    passed = {"passed_over_files": sum(passed_over.values()), "passed_over": passed_over}
    return report | passed | {"seconds": round(time.perf_counter() - started, 3)}


def _load(tokenizer: str | Path, eos_token: str) -> TextTokenizer:
    encoder = load_tokenizer(tokenizer, eos_token)
    if encoder.loses_characters():
        log.warning(
            "%s: has no token for unknown characters and no bytes to spell them: they vanish; take "
            "a byte-level tokenizer if that matters",
            tokenizer,
        )
    return encoder


def _check_any(
    splits: dict[str, dict[str, Any]], files: Sequence[Path], reader: DocumentReader
) -> None:
    """Refuse a data set without a document to train on."""
    if not splits["train"]["shards"]:
        skipped = ", ".join(f"{count} {reason}" for reason, count in reader.skipped.items())
        raise UserError(
            f"no train documents in {len(files)} files (skipped: {skipped or 'none'}); check the "
            f"inputs and the field names"
        )


def _spill_all(
    encoded: Generator[tuple[list[Document], list[np.ndarray]], None, None],
    reader: DocumentReader,
    spill: Spill,
    valid_fraction: float,
) -> int:
    """Number all documents and put them into their buckets. Returns the bytes of their texts."""
    number = text_bytes = 0
    with closing(encoded) as batches:
        for batch, ids in batches:
            documents, tokens = _with_tokens(batch, ids, reader)
            spill.add(number, documents, tokens, valid_fraction)
            number += len(documents)
            text_bytes += sum(document.size for document in documents)
    return text_bytes


def _check_arguments(
    tokenizer: str | Path | None,
    train_tokenizer: bool,
    shard_tokens: int,
    valid_fraction: float,
    seed: int,
    workers: int | None,
) -> None:
    if (tokenizer is None) != train_tokenizer:
        raise UserError(
            f"{'no tokenizer' if tokenizer is None else 'two tokenizers'}; give either --tokenizer "
            f"FILE or "
            f"--train-tokenizer"
        )
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens} must be positive")
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction={valid_fraction} must be at least 0 and below 1")
    if seed < 0:
        raise UserError(f"seed={seed} must be at least 0")
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1; leave it out for one a core")


def _buckets(files: Sequence[Path], shard_tokens: int, valid_fraction: float) -> dict[str, int]:
    """How many shards each split will have, about."""
    expected = sum(map(_expected_tokens, files))
    held_out = int(expected * valid_fraction)
    return {"train": 1 + expected // shard_tokens, "valid": 1 + held_out // shard_tokens}


def _expected_tokens(path: Path) -> int:
    plain = path.suffix.lower() in (".jsonl", ".json", ".txt")
    return path.stat().st_size * (1 if plain else COMPRESSION) // BYTES_PER_TOKEN


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(files: Sequence[Path], reader: DocumentReader, bar: ProgressBar) -> Iterator[Document]:
    bar.start("encoding", sum(path.stat().st_size for path in files))
    for path in files:
        yield from reader.read(path)
        bar.advance(path.stat().st_size)


def _training_texts(
    files: Sequence[Path], reader: DocumentReader, bar: ProgressBar
) -> Iterator[str]:
    """Documents to train a tokenizer on: none that is marked held-out, about as many bytes of
    each file."""
    bar.start("training the tokenizer", len(files))
    for path in files:
        left = TOKENIZER_BYTES // len(files)
        for document in reader.read(path):
            if document.split != "valid":
                yield document.text
                left -= document.size
            if left <= 0:
                break
        bar.advance(1)


def _encode(
    documents: Iterable[Document], encoder: TextTokenizer, workers: int
) -> Generator[tuple[list[Document], list[np.ndarray]], None, None]:
    """Batches of documents with their token ids, in the order of `documents`."""
    pending: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    # The library's own threads would compete with these; with one batch a thread they have nothing
    # to do.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ThreadPoolExecutor(workers)
    try:
        for batch in _batches(documents):
            pending.append((batch, pool.submit(_encode_batch, batch, encoder)))
            if len(pending) > 2 * workers:
                batch, encoded = pending.popleft()
                yield batch, encoded.result()
        for batch, encoded in pending:
            yield batch, encoded.result()
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _encode_batch(documents: list[Document], encoder: TextTokenizer) -> list[np.ndarray]:
    try:
        return encoder.encode_batch([document.text for document in documents])
    except UserError:
        for document in documents:
            try:
                encoder.encode_batch([document.text])
            except UserError as error:
                raise UserError(f"{document.source}: {error}") from None
        raise


def _with_tokens(
    documents: list[Document], tokens: list[np.ndarray], reader: DocumentReader
) -> tuple[list[Document], list[np.ndarray]]:
    """Without the documents that the tokenizer makes nothing of: they are skipped as empty."""
    kept = [index for index, ids in enumerate(tokens) if len(ids) > 1]
    if len(kept) < len(documents):
        reader.skip_all(
            "empty", [d for d, ids in zip(documents, tokens, strict=True) if len(ids) < 2]
        )
    return [documents[index] for index in kept], [tokens[index] for index in kept]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _report(
    out: Path,
    encoder: TextTokenizer,
    splits: dict[str, dict[str, Any]],
    skipped: dict[str, int],
    text_bytes: int,
    files: int,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "out": str(out),
        "vocab_size": encoder.vocab_size,
        "eos_id": encoder.eos_id,
        "files": files,
    }
    for total in ("documents", "tokens"):
        by_split = {
            split: sum(getattr(info, total) for info in splits[split]["shards"]) for split in SPLITS
        }
        report[total] = sum(by_split.values())
        report.update({f"{split}_{total}": count for split, count in by_split.items()})
    report.update({f"{split}_shards": len(splits[split]["shards"]) for split in SPLITS})
    report["skipped_documents"] = sum(skipped.values())
    report.update({f"skipped_{reason}_documents": count for reason, count in skipped.items()})
    report["text_bytes"] = text_bytes
    report["shard_bytes"] = sum(info.bytes for split in SPLITS for info in splits[split]["shards"])
    report["domains"] = {split: splits[split]["domains"] for split in SPLITS}
    return report
