"""Columns of token ids, or of text that is encoded once: Parquet, Arrow and JSONL, for small jobs.

    input_ids   lists of whole numbers: a row is a document. Of Parquet a row group is read when a
                window needs it, of Arrow a record batch where it lies; JSONL is held in memory.
    text        encoded at the start, with EOS, and held in memory: at most MOST_BYTES of files.
                `emotrain prepare` is for more.

A file is a shard. The permanent id of a document is the number of its row in all files. Compressed
lines are text. A JSONL file whose first line has an `answer` is none of this but a file of prompts
and answers, whose loss is on answers alone (`emotrain.data.answers`).
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emotrain.config import RawTokensConfig
from emotrain.data.answers import first_item
from emotrain.data.documents import DocumentReader, Fields
from emotrain.data.source import Window
from emotrain.data.stores.content import sampled
from emotrain.data.stores.listing import Listed, list_files
from emotrain.data.stores.vocabulary import Vocabulary, check_tokens
from emotrain.data.tokenizer import load_tokenizer
from emotrain.errors import UserError

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (".parquet", ".arrow", *LINES)
NAMES = ("input_ids", "tokens", "text")
"""Columns that are looked for, the first that is there."""
MOST_BYTES = 2**31
"""Of files that are read into memory."""
CACHE_BYTES = 2**28
"""Of decoded row groups that stay in memory."""
ENCODED = 256
"""Texts that are encoded at a time."""


class Rows(NamedTuple):
    """Documents, one after the other."""

    tokens: np.ndarray
    offsets: np.ndarray
    """int64 [documents + 1]; empty documents are among them."""


class Piece(NamedTuple):
    """A row group or record batch: what is known of it, and how to get it."""

    tokens: int
    rows: int
    load: Callable[[], Rows]


class ColumnStore:
    """Columns as `emotrain.data.source.TokenStore`.

    Args:
        path: what was given, for messages.
        shards: for each file its name, what identifies it, and its pieces in order.
        vocabulary: of the tokens.
    """

    split = "train"

    def __init__(
        self,
        path: str,
        shards: Sequence[tuple[Listed, str, list[Piece]]],
        vocabulary: Vocabulary,
        is_text: bool,
    ):
        self.path, self.is_text = path, is_text
        self.vocab_size, self.eos_id = vocabulary.size, vocabulary.eos_id
        self.tokenizer_file, self.eos_token = vocabulary.tokenizer_file, vocabulary.eos_token
        self._names = [file.content.name for file, _, _ in shards]
        self.labels = [file.label for file, _, _ in shards]
        self._digests = [digest for _, digest, _ in shards]
        self._pieces = [pieces for _, _, pieces in shards]
        self._starts = [list(accumulate((p.tokens for p in ps), initial=0)) for ps in self._pieces]
        self.shard_tokens = [starts[-1] for starts in self._starts]
        rows = [piece.rows for pieces in self._pieces for piece in pieces]
        firsts = iter(accumulate(rows, initial=0))
        self._first_ids = [[next(firsts) for _ in pieces] for pieces in self._pieces]
        self._cache: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._lock = threading.Lock()
        if not sum(self.shard_tokens):
            raise UserError(f"{path}: has no tokens; give documents")

    @cached_property
    def fingerprint(self) -> str:
        """Of the files' names, sizes and samples in their order, or of all tokens where they are
        in memory, and of the vocabulary."""
        identity = ["columns", self.vocab_size, self.eos_id, self._digests]
        return hashlib.sha256(json.dumps(identity, allow_nan=False).encode()).hexdigest()[:16]

    def name_of(self, shard: int) -> str:
        """The file of a shard."""
        return self._names[shard]

    def window(self, shard: int, start: int, stop: int) -> Window:
        parts, ids, edges = [], [], [start]
        starts = self._starts[shard]
        # Pieces without a token end where they begin.
        for number in range(bisect_right(starts, start) - 1, len(starts) - 1):
            at = starts[number]
            if at >= stop:
                break
            rows = self._rows(shard, number)
            low, high = max(start - at, 0), min(stop - at, len(rows.tokens))
            if low >= high:
                continue
            parts.append(rows.tokens[low:high])
            first, last = np.searchsorted(rows.offsets, [low, high], "right") - 1
            ends = rows.offsets[first + 1 : last + 1]
            begins = np.concatenate(([low], ends[ends < high]))
            kept = np.append(begins[1:] != begins[:-1], True)
            # Of documents that begin at one token all but the last are empty.
            found = np.searchsorted(rows.offsets, begins[kept], "right") - 1
            ids += (found + self._first_ids[shard][number]).tolist()
            edges += (np.append(begins[kept], high)[1:] + at).tolist()
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        check_tokens(self._names[shard], tokens, start, self.vocab_size)
        return Window(tokens, np.diff(edges), np.array(ids, np.int64))

    def edges(self, shard: int, start: int, stop: int) -> np.ndarray:
        return np.cumsum([start, *self.window(shard, start, stop).lengths.tolist()])

    def _rows(self, shard: int, number: int) -> Rows:
        key, piece = (shard, number), self._pieces[shard][number]
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            rows = piece.load()
            if (len(rows.tokens), len(rows.offsets) - 1) != (piece.tokens, piece.rows):
                raise UserError(
                    f"{self._names[shard]}: part {number} has {len(rows.tokens)} tokens, its index "
                    f"says {piece.tokens}; write the file again"
                )
            self._cache[key] = rows
            while sum(r.tokens.nbytes for r in self._cache.values()) > CACHE_BYTES:
                if len(self._cache) == 1:
                    break
                self._cache.popitem(last=False)
            return rows


def open_columns(
    path: str, raw: RawTokensConfig, vocabulary: Vocabulary, domain: str
) -> ColumnStore:
    """The columns that a path means.

    Raises:
        UserError: no such column, files that are not readable, or more text than memory should
            hold.
    """
    import pyarrow as pa

    files = list_files(path, ENDINGS, raw)
    if far := next((file.content.name for file in files if "://" in file.content.name), ""):
        raise UserError(
            f"{far}: columns are read from this machine; copy the files, or have them as tokens"
        )
    first = files[0].content.name
    try:
        column = _column_of(first, raw)
        if _is_text(first, column) or first.endswith(LINES):
            return _in_memory(path, files, column, vocabulary, domain)
        if domain:
            files = list_files(path, ENDINGS, raw, domain)
        shards = [(file, sampled(file.content), _pieces(file, column)) for file in files]
    except (pa.ArrowException, OSError, UnicodeError, LookupError, MemoryError) as error:
        raise _unreadable(path, error) from None
    return ColumnStore(path, shards, vocabulary, is_text=False)


def _unreadable(name: str, error: Exception) -> UserError:
    said = " ".join(str(error).split())
    return UserError(f"{name}: not readable ({said}); write the file again, or leave it out")


def _column_of(name: str, raw: RawTokensConfig) -> str:
    """The column with documents, by the first file."""
    if name.endswith(LINES[1:]):
        return raw.column or "text"
    lines = name.endswith(LINES)
    known = list(first_item(Path(name))) if lines else list(_schema(name).names)
    for column in [raw.column] if raw.column else NAMES:
        if column in known:
            return column
    raise UserError(
        f"{name}: has no column {raw.column or ' or '.join(NAMES)}; its columns are "
        f"{', '.join(map(str, known)) or 'none'}, name one with data.raw.column"
    )


def _schema(name: str) -> Any:
    import pyarrow.parquet as pq

    return pq.read_schema(name) if name.endswith(".parquet") else _arrow(name)[0]


def _is_text(name: str, column: str) -> bool:
    import pyarrow as pa

    if name.endswith(LINES):
        return isinstance(first_item(Path(name)).get(column), str) or not name.endswith(LINES[0])
    kind = _schema(name).field(column).type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(test(kind) for test in lists):
        if not pa.types.is_integer(kind.value_type):
            raise UserError(f"{name}: column {column!r} holds {kind}, not lists of whole numbers")
        return False
    return True


def _arrow(name: str) -> tuple[Any, list[Any]]:
    """Schema and batches of an Arrow file or stream, where they lie."""
    import pyarrow as pa

    source = pa.memory_map(name)
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
    source.seek(0)
    stream = pa.ipc.open_stream(source)
    return stream.schema, list(stream)


def _pieces(file: Listed, column: str) -> list[Piece]:
    """The parts of a file of token ids that are read as one, with what is known of them."""
    import pyarrow.parquet as pq

    name = file.content.name
    if name.endswith(".arrow"):
        schema, batches = _arrow(name)
        _require(name, column, schema.names)
        loaded = [_rows_of(name, batch.column(column)) for batch in batches]
        return [Piece(len(r.tokens), len(r.offsets) - 1, lambda r=r: r) for r in loaded]  # type: ignore[misc]
    metadata = pq.read_metadata(name)
    _require(name, column, pq.read_schema(name).names)
    found = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = map(group.column, range(group.num_columns))
        # KeyError: a file whose schema says otherwise than its row groups.
        chunk = {chunk.path_in_schema.partition(".")[0]: chunk for chunk in chunks}[column]
        nulls = chunk.statistics.null_count if chunk.statistics else 0
        found.append(
            Piece(
                chunk.num_values - (nulls or 0),
                group.num_rows,
                lambda number=number: _row_group(name, number, column),  # type: ignore[misc]
            )
        )
    return found


def _require(name: str, column: str, names: Sequence[str]) -> None:
    if list(names).count(column) != 1:
        raise UserError(
            f"{name}: has the column {column!r} {list(names).count(column)} times; the first file "
            f"has it once"
        )


def _row_group(name: str, number: int, column: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(name) as file:
            table = file.read_row_group(number, columns=[column])
        return _rows_of(name, table.column(column).combine_chunks())
    except (pa.ArrowException, OSError, UnicodeError, LookupError, MemoryError) as error:
        raise _unreadable(name, error) from None


def _rows_of(name: str, column: Any) -> Rows:
    """An Arrow column of lists, without a copy where that can be."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    column.validate(full=True)
    values = column.flatten()
    if values.null_count or not pa.types.is_integer(values.type):
        raise UserError(f"{name}: has token ids that are null, or no whole numbers; write it again")
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return Rows(values.to_numpy(), np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))))


# ---- in memory


def _in_memory(
    path: str, files: Sequence[Listed], column: str, vocabulary: Vocabulary, domain: str
) -> ColumnStore:
    size = sum(file.content.size for file in files)
    if size > MOST_BYTES:
        raise UserError(
            f"{path}: has {size / 2**30:.1f} GiB of text, which would be encoded at every start "
            f"and held in memory; run `emotrain prepare {path} --out DIR` once, and train on that"
        )
    is_text = _is_text(files[0].content.name, column)
    if is_text and not vocabulary.tokenizer_file.is_file():
        raise UserError(f"{path}: is text, which needs a tokenizer; give data.tokenizer=FILE")
    shards = []
    for file in files:
        read = _encoded(file, column, vocabulary, domain) if is_text else _listed(file, column)
        arrays = list(read)
        tokens = np.concatenate(arrays) if arrays else np.empty(0, np.uint32)
        rows = Rows(tokens, np.cumsum([0, *map(len, arrays)], dtype=np.int64))
        digest = hashlib.sha256(tokens.astype("<i8").tobytes() + rows.offsets.tobytes()).hexdigest()
        shards.append((file, digest, [Piece(len(tokens), len(arrays), lambda r=rows: r)]))  # type: ignore[misc]
    return ColumnStore(path, shards, vocabulary, is_text)


def _encoded(
    file: Listed, column: str, vocabulary: Vocabulary, domain: str
) -> Iterator[np.ndarray]:
    """Token ids of the documents of a file to train on, EOS last."""
    encoder = load_tokenizer(vocabulary.tokenizer_file, vocabulary.eos_token)
    reader, texts = DocumentReader(Fields(text=column)), []
    for document in reader.read(Path(file.content.name)):
        if document.split == "valid" or (domain and domain != (file.label or document.domain)):
            continue
        texts.append(document.text)
        if len(texts) == ENCODED:
            yield from encoder.encode_batch(texts)
            texts = []
    if texts:
        yield from encoder.encode_batch(texts)


def _listed(file: Listed, column: str) -> Iterator[np.ndarray]:
    """Token ids of the lines of a JSONL file."""
    name = file.content.name
    with open(name, encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                ids = json.loads(line)[column]
                if not all(type(item) is int and 0 <= item < 2**32 for item in ids):
                    raise ValueError(f"{column!r} holds something else than token ids")
            except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
                said = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"{name}: line {number} is no document of token ids ({said}); give "
                    f'{{"{column}": [1, 2, 3]}}'
                ) from None
            yield np.array(ids, np.uint32)
