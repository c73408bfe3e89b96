"""Proves that a file read in parts gives what the whole gives, and that a line longer than allowed
is named or counted, and never held."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotrain.data import records
from emotrain.data.documents import DocumentReader
from emotrain.data.records import Span
from emotrain.data.tokenizer import train_tokenizer
from emotrain.errors import UserError
from emotrain.preparation import pieces
from emotrain.preparation.pieces import cut_into_pieces
from emotrain.preparation.prepare import prepare


def read(reader: DocumentReader, path: Path, *spans: Span) -> list[tuple[str, int]]:
    return [(d.text, d.index) for span in spans for d in reader.read_span(path, span)]


@given(
    st.lists(st.sampled_from(["", "a", "bb" * 9, "c" * 60, "é"]), max_size=12),
    st.booleans(),
    st.lists(st.integers(1, 400), max_size=4),
    st.integers(1, 40),
)
def test_ranges_of_a_file_of_lines_make_up_the_file(texts, ended, cuts, chunk):
    lines = [json.dumps({"text": t}, ensure_ascii=False) if t else "" for t in texts]
    content = ("\n".join(lines) + ("\n" if ended else "")).encode()
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as folder:
        patched.setattr(records, "READ_BYTES", chunk)
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        edges = sorted({0, *(cut for cut in cuts if cut < len(content))})
        spans = [Span(a, b) for a, b in zip(edges, [*edges[1:], None], strict=True)]
        whole, parts = DocumentReader(max_bytes=50), DocumentReader(max_bytes=50)
        assert read(parts, path, *spans) == read(whole, path, Span())
        assert parts.skipped == whole.skipped
        found = [(t, i) for t, i in read(whole, path, Span())]
        assert all(content[i:].startswith(b'{"text": "' + t.encode()) for t, i in found)
        assert [t for t, _ in found] == [t for t in texts if t and len(json.dumps(t)) < 40]


def test_pieces_are_a_function_of_sizes_and_make_up_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 1000)
    for name, count in (("a.jsonl", 200), ("b.txt", 1), ("c.txt", 2), ("d.jsonl.gz", 100)):
        text = "".join(json.dumps({"text": f"text {i} of some words"}) + "\n" for i in range(count))
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    table = pa.table({"text": [f"row {i} " + "words " * (i % 90) for i in range(3000)]})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=100)
    files = sorted(tmp_path.iterdir())
    found = cut_into_pieces(files)
    for file, path in enumerate(files):
        mine = [part for piece in found for part in piece if part.file == file]
        assert sum(part.size for part in mine) == path.stat().st_size
        assert [a.byte_stop for a in mine[:-1]] == [b.byte_start for b in mine[1:]]
        spans = [part.span for part in mine]
        assert read(DocumentReader(), path, *spans) == read(DocumentReader(), path, Span())
        assert (len(spans) > 1) == (path.name in ("a.jsonl", "e.parquet"))
    assert [part.file for piece in found for part in piece] == sorted(
        part.file for piece in found for part in piece
    )
    assert len(found) < sum(len(piece) for piece in found), "small files are done together"
    (piece,) = cut_into_pieces(files[:1], whole_files=True)
    assert len(piece) == 1


LONG = 10_000_000


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "parquet"])
def test_a_line_that_is_too_long_is_counted_or_refused_by_name_and_never_held(
    kind, tmp_path, caplog
):
    path = tmp_path / f"a.{kind}"
    good, bad = json.dumps({"text": "good"}), json.dumps({"text": "x" * LONG})
    content = "\n".join([good, bad, good, ""]).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["good", "x" * LONG, "good"]}), path)
    elif kind == "txt":
        path.write_bytes(b"x" * LONG)
    elif kind == "jsonl.zst":
        path.write_bytes(pa.compress(content, "zstd", asbytes=True))
    else:
        path.write_bytes(gzip.compress(content) if kind == "jsonl.gz" else content)
    reader = DocumentReader(max_bytes=100_000)
    del content, bad
    list(DocumentReader(max_bytes=100_000).read(path))  # what is loaded once
    tracemalloc.start()
    documents = list(reader.read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(documents) == (0 if kind == "txt" else 2) and reader.skipped == {"too_long": 1}
    where = {"txt": "text", "parquet": "row 1"}.get(kind, "line 2")
    assert f"a.{kind}: {where} is longer than 0.1 MB" in caplog.text
    assert kind == "parquet" or peak < 0.8 * LONG, "of Parquet a page is read"
    with pytest.raises(UserError, match=rf"a\.{kind}: {where} is longer than 0.1 MB; allow more"):
        list(DocumentReader(strict=True, max_bytes=100_000).read(path))


PROGRAM = """
import resource, sys
from pathlib import Path
from emotrain.preparation.prepare import prepare
prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], workers=1, shard_tokens=2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst"])
def test_memory_does_not_grow_with_the_file(ending, tmp_path):
    """30 MB and 150 MB of text, through all of prepare: MiB of the process."""
    tokenizer, peaks = tmp_path / "tokenizer.json", []
    tokenizer.write_text(train_tokenizer(["the experts of a pool route tokens"] * 9, 300).to_json())
    line = (json.dumps({"text": "the experts of a pool route tokens " * 60}) + "\n").encode()
    for megabytes in (30, 150):
        path = tmp_path / f"{megabytes}.{ending}"
        compression = "zstd" if ending.endswith("zst") else None
        with pa.output_stream(str(path), compression=compression) as stream:
            for _ in range(megabytes * 10**6 // len(line)):
                stream.write(line)
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            str(path),
            str(tmp_path / f"{megabytes}"),
            str(tokenizer),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 120, peaks


def test_prepare_says_what_was_too_long(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(train_tokenizer(["some words"] * 9, 270).to_json())
    lines = [json.dumps({"text": "some words " * n}) for n in (1, 500, 2)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "out",
        tokenizer=tokenizer,
        max_document_bytes=1000,
        valid_fraction=0,
    )
    assert report["documents"] == 2 and report["skipped_too_long_documents"] == 1
