"""The first stage of `prepare`: a piece of the inputs becomes a spill of encoded documents."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from emotrain.data.document_filters import language_filter
from emotrain.data.documents import DocumentReader
from emotrain.data.manifest import TOKENIZER, token_dtype
from emotrain.data.records import READ_BYTES, Document
from emotrain.data.tokenizer import TextTokenizer, load_tokenizer
from emotrain.errors import UserError
from emotrain.preparation.deduplicate import key_maker
from emotrain.preparation.pieces import Part, Piece
from emotrain.preparation.recipe import Recipe
from emotrain.preparation.spill import Buckets, Placed, SpillWriter

log = logging.getLogger("emotrain")

MANY_CHARACTERS = 2**24
"""Of a document that is encoded as one: from here on it is named, with the memory it takes."""
BATCH_BYTES = 2**20
"""Bytes of text that are encoded at a time."""

MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>")
"""What ends documents in texts that were put together, beside the tokenizer's own token."""

Tick = Callable[[int, int], None]
"""Told the bytes of input and the tokens that were done since the last time."""


class PieceEncoder:
    """Encodes pieces, one after the other; a process has one.

    Args:
        folder: of the half-done data set, with its tokenizer.
    """

    def __init__(self, folder: Path, data: Path, files: Sequence[Path], recipe: Recipe):
        self.folder, self.files, self.recipe = folder, files, recipe
        self.encoder = load_tokenizer(data / TOKENIZER, recipe.eos_token, recipe.allow_special)
        self.dtype = token_dtype(self.encoder.vocab_size)
        language, wanted = recipe.parsed_language, recipe.deduplication
        self.speaks = language_filter(language) if language else None
        self.keys = key_maker(wanted) if wanted else None
        self.key_width = wanted.key_width if wanted else 0
        self.markers = tuple(dict.fromkeys((recipe.eos_token, *MARKERS)))

    def encode(self, number: int, piece: Piece, buckets: Buckets, tick: Tick) -> None:
        """Encode a piece and commit it."""
        writer = SpillWriter(self.folder, number, self.dtype, self.key_width)
        skipped: Counter[str] = Counter()
        filtered: Counter[str] = Counter()
        conditions: Counter[str] = Counter()
        seen: set[str] = set()
        spans = []
        for part in piece:
            reader = self.recipe.reader()
            before = writer.documents
            self._encode_part(part, reader, writer, filtered, buckets, tick)
            skipped += reader.skipped
            conditions += reader.filtered
            seen |= reader.seen
            spans.append(
                {
                    "file": part.file,
                    "documents": writer.documents - before,
                    "filtered": reader.filtered.total(),
                    "lost": reader.skipped.total(),
                    "lines": reader.lines,
                    "sha256": _sha256_of_bytes(self.files[part.file], part),
                }
            )
        if conditions:
            filtered["where"] = conditions.total()
        writer.commit(
            {
                "skipped": dict(sorted(skipped.items())),
                "filtered": dict(sorted(filtered.items())),
                "conditions": dict(sorted(conditions.items())),
                "seen": sorted(seen),
                "spans": spans,
            }
        )

    def _encode_part(
        self,
        part: Part,
        reader: DocumentReader,
        writer: SpillWriter,
        filtered: Counter[str],
        buckets: Buckets,
        tick: Tick,
    ) -> None:
        told = at = 0

        def seen(position: int) -> None:
            nonlocal at
            at = min(max(at, position), part.size)

        path = self.files[part.file]
        for batch in _batches(reader.read_span(path, part.span, seen)):
            kept = [d for d in batch if self.speaks is None or self.speaks(d.text)]
            filtered.update({"language": len(batch) - len(kept)} if len(kept) < len(batch) else {})
            tokens = _encode_batch(kept, self.encoder)
            kept, tokens = _with_tokens(kept, tokens, reader)
            count = sum(map(len, tokens))
            kept, tokens = self._of_length(kept, tokens, filtered)
            keys = self.keys([d.text for d in kept]) if self.keys and kept else [()] * len(kept)
            for document, ids, key in zip(kept, tokens, keys, strict=True):
                first, last = _edges(document.text)
                ids = ids.astype(self.dtype, copy=False)
                marked = _marked(document.text, self.markers)
                placed = Placed(document, part.file, ids, first, last, marked, key)
                writer.add(placed, *buckets.place(document, part.file))
            tick(at - told, count)
            told = at
        tick(part.size - told, 0)

    def _of_length(
        self, documents: list[Document], tokens: list[np.ndarray], filtered: Counter[str]
    ) -> tuple[list[Document], list[np.ndarray]]:
        least, most = self.recipe.min_tokens, self.recipe.max_tokens
        kept = []
        for index, ids in enumerate(tokens):
            length = len(ids) - 1  # EOS is not the document's
            if length < least:
                filtered["min_tokens"] += 1
            elif most and length > most:
                filtered["max_tokens"] += 1
            else:
                kept.append(index)
        return [documents[index] for index in kept], [tokens[index] for index in kept]


def _encode_batch(documents: list[Document], encoder: TextTokenizer) -> list[np.ndarray]:
    for document in documents:
        if len(document.text) > MANY_CHARACTERS and not encoder.can_be_cut:
            log.warning(
                "%s: its %.0f million characters are encoded as one, in some %.0f GB of memory: "
                "this tokenizer may give other tokens in pieces; give it boundaries with "
                "--boundary, or skip it with --max-document-mb",
                document.source, len(document.text) / 1e6, 133e-9 * document.size,
            )  # fmt: skip
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


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _edges(text: str) -> tuple[int, int]:
    """Hashes of the first and the last line, 0 where they are the same one."""
    text = text.strip()
    first_end, last_start = text.find("\n"), text.rfind("\n")
    if first_end < 0:
        return 0, 0
    return _hash(text[:first_end]), _hash(text[last_start + 1 :])


def _hash(line: str) -> int:
    digest = hashlib.blake2b(line.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _marked(text: str, markers: Sequence[str]) -> int:
    """1 where a mark of the end of a document is inside of the text, 2 where it ends in one."""
    found = 0
    for marker in markers:
        if marker in text:
            stripped = text.strip()
            found |= 2 if stripped.endswith(marker) else 0
            found |= 1 if marker in stripped.removesuffix(marker) else 0
    return found


def _sha256_of_bytes(path: Path, part: Part) -> str:
    """Of the bytes of a file that are this part's."""
    digest, left = hashlib.sha256(), part.size
    with open(path, "rb") as file:
        file.seek(part.byte_start)
        while left and (chunk := file.read(min(READ_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
