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

import json
import logging
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.data.documents import FIELDS, REASONS, Document, DocumentReader, Fields
from emotrain.data.files import find_files, shown
from emotrain.data.manifest import SPLITS, TOKENIZER, ShardInfo, token_dtype, write_manifest
from emotrain.data.order import keyed
from emotrain.data.shards import write_shard
from emotrain.data.staging import Staging
from emotrain.data.tokenizer import (
    EOS_TOKEN,
    TextTokenizer,
    load_tokenizer,
)
from emotrain.data.tokenizer import (
    train_tokenizer as train_bpe,
)
from emotrain.errors import UserError
from emotrain.files import json_text
from emotrain.progress import ProgressBar

log = logging.getLogger("emotrain")

SAMPLE = "sample"
"""The input that names the embedded corpus (a folder of that name is `./sample`)."""

SAMPLE_DIR = Path(__file__).parent / "sample"
"""The embedded corpus: one Parquet file a domain."""

SHARD_TOKENS = 2**27
"""Tokens of a shard, about: 256 or 512 MiB, which is held in memory twice while it is shuffled."""

BUFFER_BYTES = 2**28
"""Bytes of encoded documents held before they are appended to their buckets."""

BATCH_BYTES = 2**20
"""Bytes of text a thread encodes at a time."""

TOKENIZER_BYTES = 2**28
"""Bytes of text a tokenizer is trained on, at most: the start of each file, as much of one as of
another."""

BYTES_PER_TOKEN, COMPRESSION = 3, 4
"""Rough sizes, from which the number of shards is guessed before anything is read."""

HELD_OUT, BUCKET, PLACE = range(3)
"""What a hash of a document's number decides; each has a key of its own, so that the three are
unrelated."""


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
    train_tokenizer = train_tokenizer or (
        tokenizer is None and [str(item) for item in inputs] == [SAMPLE]
    )
    _check_arguments(tokenizer, train_tokenizer, shard_tokens, valid_fraction, seed, workers)
    files, passed_over = find_files(
        [SAMPLE_DIR if str(item) == SAMPLE else item for item in inputs], out
    )
    reader = DocumentReader(fields, strict)
    bar = bar or ProgressBar(shown=False)
    with Staging(out, overwrite) as staging:
        if train_tokenizer:
            encoder = train_bpe(
                _training_texts(files, DocumentReader(fields, strict), bar), vocab_size, eos_token
            )
        else:
            encoder = load_tokenizer(tokenizer, eos_token)
        if encoder.loses_characters():
            log.warning(
                "the tokenizer has no token for unknown characters and no bytes to spell them: they "
                "vanish; take a byte-level tokenizer if that matters"
            )
        (staging.folder / TOKENIZER).write_text(encoder.to_json(), encoding="utf-8")
        expected = sum(map(_expected_tokens, files))
        buckets = {
            "train": 1 + expected // shard_tokens,
            "valid": 1 + int(expected * valid_fraction) // shard_tokens,
        }
        spill = _Spill(staging.folder, buckets, seed, token_dtype(encoder.vocab_size))
        number = text_bytes = 0
        with closing(
            _encode(_read(files, reader, bar), encoder, workers or _usable_cores())
        ) as batches:
            for documents, tokens in batches:
                documents, tokens = _with_tokens(documents, tokens, reader)
                spill.add(number, documents, tokens, valid_fraction)
                number += len(documents)
                text_bytes += sum(document.size for document in documents)
        reader.check_fields()
        splits = spill.finish(bar)
        if not splits["train"]["shards"]:
            skipped = ", ".join(f"{count} {reason}" for reason, count in reader.skipped.items())
            raise UserError(
                f"no train documents in {len(files)} files (skipped: {skipped or 'none'}); check "
                f"the inputs and "
                f"the field names"
            )
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
    return _report(
        Path(out),
        encoder,
        splits,
        skipped_documents,
        text_bytes,
        len(files),
        passed_over,
        time.perf_counter() - started,
    )


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
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
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


class _Spill:
    """Encoded documents on their way to shards: one bucket a shard, in order of arrival until the
    shard is finished.

    A bucket is two files, to which buffers are appended: the token ids, and a JSON line [place,
    length, domain, source] a document. Documents of a shard are ordered by `place`.
    """

    def __init__(self, folder: Path, buckets: dict[str, int], seed: int, dtype: np.dtype):
        self.folder, self.buckets, self.seed, self.dtype = folder, buckets, seed, dtype
        self.tokens: defaultdict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        self.lines: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
        self.buffered = 0
        for split in SPLITS:
            (folder / split).mkdir()

    def add(
        self,
        first_number: int,
        documents: list[Document],
        tokens: list[np.ndarray],
        valid_fraction: float,
    ) -> None:
        """Take documents numbered from `first_number`."""
        numbers = np.arange(first_number, first_number + len(documents))
        hashes = {what: keyed(3 * self.seed + what, numbers) for what in (HELD_OUT, BUCKET, PLACE)}
        held_out, choices, places = (
            hashes[HELD_OUT] < np.uint64(valid_fraction * 2**64),
            hashes[BUCKET],
            hashes[PLACE].tolist(),
        )
        for index, (document, ids) in enumerate(zip(documents, tokens, strict=True)):
            split = document.split or ("valid" if held_out[index] else "train")
            bucket = split, int(choices[index]) % self.buckets[split]
            self.tokens[bucket].append(ids.astype(self.dtype))
            self.lines[bucket].append(
                json_text([places[index], len(ids), document.domain, document.source])
            )
            self.buffered += self.tokens[bucket][-1].nbytes
        if self.buffered >= BUFFER_BYTES:
            self._flush()

    def finish(self, bar: ProgressBar) -> dict[str, dict[str, Any]]:
        """Write the shards, removing each bucket after it; for each split, ShardInfos and counts
        by domain."""
        self._flush()
        bar.start("writing shards", sum(self.buckets.values()))
        splits: dict[str, dict[str, Any]] = {}
        for split in SPLITS:
            shards: list[ShardInfo] = []
            counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
            for number in range(self.buckets[split]):
                if self._paths((split, number))[0].exists():
                    shards.append(self._finish_bucket((split, number), len(shards), counts))
                bar.advance(1)
            splits[split] = {
                "shards": shards,
                "domains": {domain: dict(counts[domain]) for domain in sorted(counts)},
            }
        return splits

    def _finish_bucket(
        self, bucket: tuple[str, int], shard: int, counts: defaultdict[str, Counter[str]]
    ) -> ShardInfo:
        tokens_path, lines_path = self._paths(bucket)
        tokens = np.fromfile(tokens_path, dtype=self.dtype)
        lines = lines_path.read_text(encoding="utf-8").splitlines()
        places, lengths, domains, sources = zip(*map(json.loads, lines), strict=True)
        ends = np.cumsum(lengths)
        order = np.argsort(np.array(places, dtype=np.uint64)).tolist()
        shuffled = np.concatenate([tokens[ends[row] - lengths[row] : ends[row]] for row in order])
        offsets = np.concatenate([[0], np.cumsum([lengths[row] for row in order])]).astype(np.int64)
        for domain, length in zip(domains, lengths, strict=True):
            counts[domain].update(documents=1, tokens=length)
        info = write_shard(
            self.folder / bucket[0] / f"shard-{shard:05d}.arrow",
            shuffled,
            offsets,
            [domains[row] for row in order],
            [sources[row] for row in order],
        )
        tokens_path.unlink()
        lines_path.unlink()
        return info

    def _flush(self) -> None:
        for bucket, arrays in self.tokens.items():
            tokens_path, lines_path = self._paths(bucket)
            with open(tokens_path, "ab") as file:
                file.write(np.concatenate(arrays).tobytes())
            with open(lines_path, "a", encoding="utf-8") as file:
                file.write("\n".join(self.lines[bucket]) + "\n")
        self.tokens.clear()
        self.lines.clear()
        self.buffered = 0

    def _paths(self, bucket: tuple[str, int]) -> tuple[Path, Path]:
        stem = f"{bucket[0]}-{bucket[1]:05d}"
        return self.folder / f"{stem}.tokens", self.folder / f"{stem}.lines"


def _report(
    out: Path,
    encoder: TextTokenizer,
    splits: dict[str, dict[str, Any]],
    skipped: dict[str, int],
    text_bytes: int,
    files: int,
    passed_over: dict[str, int],
    seconds: float,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "out": str(out),
        "vocab_size": encoder.vocab_size,
        "eos_id": encoder.eos_id,
        "files": files,
        "passed_over_files": sum(passed_over.values()),
        "passed_over": passed_over,
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
    return report | {"seconds": round(seconds, 3)}
