"""Proves of columns of token ids and of text that every window is that of a loop over documents,
across row groups and record batches; that answers stay answers; and that what cannot be read is
named in one line."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stores_megatron import as_lists, slow_window

from emotrain.config import RawTokensConfig, config_from_dict
from emotrain.data.answers import is_answers
from emotrain.data.formats import Dataset
from emotrain.data.opening import open_loader, open_store
from emotrain.data.stores import columns
from emotrain.data.stores.convert import convert
from emotrain.data.tokenizer import load_tokenizer
from emotrain.errors import MissingFileError, UserError
from emotrain.training.data_source import build_loader
from tests.conftest import tiny_settings, write_documents

RAW = RawTokensConfig(vocab_size=1000, eos_id=7)


def write_ids(path, documents, kind=None, rows=3, **options):
    table = pa.table({"n": range(len(documents)), "input_ids": pa.array(documents, kind)})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows, **options)
    elif path.suffix == ".arrow":
        opened = pa.ipc.new_stream if options.get("stream") else pa.ipc.new_file
        with opened(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    else:
        lines = [json.dumps({"input_ids": document or []}) for document in documents]
        path.write_text("\n".join(lines) + "\n")
    return path


def nested(documents):
    """As `slow_window` takes them."""
    return [[document or []] for document in documents]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_windows_are_those_of_a_loop_over_documents(tmp_path_factory, name, data):
    """With empty documents and null ones, at any place of a row group."""
    document = st.none() | st.lists(st.integers(0, 999), max_size=6)
    documents = [*data.draw(st.lists(document, max_size=9)), [1, 2]]
    folder = tmp_path_factory.mktemp("columns")
    write_ids(folder / name, documents, pa.list_(pa.int32()), rows=data.draw(st.integers(1, 4)))
    store = open_store(folder / name, raw=RAW)
    total = sum(len(document or []) for document in documents)
    assert store.shard_tokens == [total]
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    expected = slow_window(nested(documents), start, stop)
    assert as_lists(store.window(0, start, stop)) == expected
    assert store.edges(0, start, stop).tolist() == np.cumsum([start, *expected[1]]).tolist()


@pytest.mark.parametrize(
    "name, kind, options",
    [
        ("a.parquet", pa.large_list(pa.uint16()), {}),
        ("a.parquet", pa.list_(pa.int64()), {"compression": "zstd", "write_statistics": False}),
        ("a.arrow", pa.list_(pa.int64()), {"stream": True}),
        ("a.arrow", pa.list_(pa.int32(), 4), {}),
    ],
)
def test_types_of_lists_and_files(name, kind, options, tmp_path):
    documents = [[9, 8, 7, index] for index in range(10)]
    store = open_store(write_ids(tmp_path / name, documents, kind, **options), raw=RAW)
    assert as_lists(store.window(0, 3, 38)) == slow_window(nested(documents), 3, 38)


def test_several_files_and_a_small_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "CACHE_BYTES", 90)
    documents = [[number] * 5 for number in range(40)]
    write_ids(tmp_path / "a.parquet", documents[:20], pa.list_(pa.int32()))
    write_ids(tmp_path / "b.parquet", documents[20:], pa.list_(pa.int32()))
    store = open_store(tmp_path, raw=RAW)
    for shard in (0, 1):
        for start in range(0, 90, 7):
            found = as_lists(store.window(shard, start, start + 10))
            assert found == slow_window(
                nested(documents[20 * shard :][:20]), start, start + 10, first_id=20 * shard
            )
    assert len(store._cache) == 1
    report = convert(tmp_path, tmp_path / "out", raw=RAW, append_eos=True, valid_fraction=0)
    assert report["documents"] == 40 and report["tokens"] == 239  # one ends in EOS


# ---- text


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.zst"])
def test_text_is_encoded_as_prepare_does(name, tmp_path, tiny_data):
    lines = [
        json.loads(line)
        for line in write_documents(tmp_path / "lines.jsonl").read_text().splitlines()
    ]
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(lines), path)
    else:
        with pa.output_stream(path, compression="zstd" if "zst" in name else None) as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    tokenizer = tiny_data / "tokenizer.json"
    texts = [line["text"] for line in lines if line["split"] == "train"]
    expected = np.concatenate(load_tokenizer(tokenizer).encode_batch(texts))
    store = open_store(path, tokenizer=str(tokenizer))
    window = store.window(0, 0, store.shard_tokens[0])
    assert window.tokens.tolist() == expected.tolist()
    assert len(window.lengths) == len(texts)
    kitchen = open_store(path, tokenizer=str(tokenizer), domain="kitchen")
    assert 0 < kitchen.shard_tokens[0] < store.shard_tokens[0] / 2
    with pytest.raises(UserError, match="is text, not tokens; run `emotrain prepare"):
        convert(path, tmp_path / "out", tokenizer=str(tokenizer))
    with pytest.raises(UserError, match="is text, which needs a tokenizer"):
        open_store(path, raw=RAW)


def test_too_much_text_is_for_prepare(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(columns, "MOST_BYTES", 100)
    path = write_documents(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="GiB of text, .* run `emotrain prepare .* --out DIR` once"):
        open_store(path, tokenizer=str(tiny_data / "tokenizer.json"))


def test_answers_stay_answers(tmp_path, tiny_data):
    """The first line tells them apart."""
    answers, ids = tmp_path / "answers.jsonl", tmp_path / "ids.jsonl"
    answers.write_text('{"prompt": "bread", "answer": "salt", "text": "no document"}\n' * 4)
    write_ids(ids, [[5] * 40] * 8)
    assert is_answers(answers) and not is_answers(ids)
    loaders = {}
    for path in (answers, ids):
        chosen = tiny_settings(path, tmp_path / "run")
        chosen["data"]["tokenizer"] = str(tiny_data / "tokenizer.json")
        loaders[path] = build_loader(config_from_dict(chosen))
    assert loaders[answers].num_sequences == 4
    assert loaders[ids].num_sequences == 10 and loaders[ids].num_tokens == 320


def test_a_loader_reads_a_column(tmp_path):
    write_ids(tmp_path / "a.parquet", [[9] * 20] * 10, pa.list_(pa.int32()))
    loader = open_loader(tmp_path, 16, seed=1, raw=RAW)
    assert loader.num_sequences == 12
    assert loader.batch([0, 1]).tokens_BS.tolist() == [[9] * 16] * 2


# ---- what cannot be read


def test_other_columns_and_types_are_named(tmp_path):
    path = write_ids(tmp_path / "a.parquet", [[1]], pa.list_(pa.float32()))
    with pytest.raises(UserError, match="'input_ids' holds list.*not lists of whole numbers"):
        open_store(path, raw=RAW)
    with pytest.raises(UserError, match="has no column other; its columns are n, input_ids"):
        open_store(path, raw=RawTokensConfig(vocab_size=9, column="other"))
    write_ids(tmp_path / "b.jsonl", [[1], [2]])
    with open(tmp_path / "b.jsonl", "a") as stream:
        stream.write('{"input_ids": [1, "a"]}\n')
    with pytest.raises(UserError, match="b.jsonl: line 3 is no document of token ids"):
        open_store(tmp_path / "b.jsonl", raw=RAW)
    path = write_ids(tmp_path / "c.arrow", [[1, None]], pa.list_(pa.int32()))
    with pytest.raises(UserError, match="has token ids that are null"):
        open_store(path, raw=RAW)
    path = write_ids(tmp_path / "d.parquet", [[1, 5000]], pa.list_(pa.int32()))
    with pytest.raises(UserError, match="token 1 is 5000, the vocabulary has 1000"):
        open_store(path, raw=RAW).window(0, 0, 2)
    (tmp_path / "e.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="e.parquet: not readable"):
        open_store(tmp_path / "e.parquet", raw=RAW)


def test_half_a_data_set_is_still_named(tmp_path, tiny_data):
    """A folder of our shards without its manifest is not read as Arrow."""
    for file in ("train/shard-00000.arrow", "tokenizer.json"):
        (tmp_path / "half" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "half" / file).write_bytes((tiny_data / file).read_bytes())
    with pytest.raises(MissingFileError, match="has no dataset.json, so it is no data set"):
        open_store(tmp_path / "half")
    assert Dataset(tiny_data).num_tokens() > 0
