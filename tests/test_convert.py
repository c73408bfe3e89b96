"""Proves that `emotrain convert` writes the documents of a store whole, each once, with domain and
source, whatever the pieces it reads are, and refuses what it would have to make up."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from test_stores_megatron import made
from test_stores_megatron import write as write_megatron
from test_stores_plain import EOS, RAW, VOCAB, documents, write

from emotrain.cli import main
from emotrain.config import RawTokensConfig
from emotrain.data.formats import Dataset
from emotrain.data.opening import open_store
from emotrain.data.stores import convert as convert_module
from emotrain.data.stores.convert import convert, whole_documents
from emotrain.errors import UserError


def split_at_eos(tokens) -> list[list[int]]:
    found, current = [], []
    for token in tokens.tolist():
        current.append(token)
        if token == EOS:
            found.append(current)
            current = []
    return [*found, current] if current else found


def rows_of(folder) -> list[tuple[list[int], str, str]]:
    """(token ids, domain, source) of every document of both splits."""
    dataset, found = Dataset(folder), []
    dataset.verify()
    for split in ("train", "valid"):
        for index in range(len(dataset.shards[split])):
            shard = dataset.shard(split, index)
            sources = shard.sources.to_pylist()
            for row, (a, b) in enumerate(zip(shard.offsets[:-1], shard.offsets[1:], strict=True)):
                domain = shard.domains[shard.domain_of[row]]
                found.append((shard.tokens[a:b].tolist(), domain, sources[row]))
    return found


@pytest.mark.parametrize("piece", [1, 2, 7, 50, 10_000])
def test_documents_are_whole_whatever_the_pieces(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "PIECE", piece)
    tokens = np.concatenate(([EOS], documents(12), [EOS, EOS, 9, 9]))
    store = open_store(write(tmp_path / "a.npy", tokens), raw=RAW)
    found = list(whole_documents(store, 0))
    assert [document.tokens.tolist() for document in found] == split_at_eos(tokens)
    assert [document.start for document in found] == [
        0, *np.flatnonzero(tokens == EOS)[:-1] + 1, len(tokens) - 2,
    ]  # fmt: skip
    indexed = made(12)
    store = open_store(write_megatron(tmp_path / "m", indexed), raw=RAW)
    assert [document.tokens.tolist() for document in whole_documents(store, 0)] == [
        [token for sequence in document for token in sequence] for document in indexed
    ]


def test_a_mix_becomes_a_data_set_with_domains_and_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "PIECE", 100)
    expected = []
    for domain in ("wiki", "code"):
        tokens = documents(200, seed=len(domain))
        write(tmp_path / domain / "0.npy", tokens)
        starts = np.cumsum([0, *map(len, split_at_eos(tokens))]).tolist()
        names = [f"0.npy:{start}" for start in starts]
        if domain == "code":
            with gzip.open(tmp_path / domain / "0.csv.gz", "wt") as stream:
                for number, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
                    stream.write(f"{a},{b},id-{number},in.gz,{number}\n")
                    names[number] = f"in.gz:id-{number}"
        expected += zip(split_at_eos(tokens), [domain] * 200, names, strict=False)
    (tmp_path / "mix.txt").write_text("wiki,wiki/0.npy\ncode,code/0.npy\n")
    options = {"raw": RAW, "shard_tokens": 2000, "valid_fraction": 0.1}
    report = convert(tmp_path / "mix.txt", tmp_path / "out", **options)
    assert sorted(rows_of(tmp_path / "out")) == sorted(expected)
    assert report["documents"] == 400 and report["eos_added"] == 0
    assert report["train_shards"] > 2 and 10 < report["valid_documents"] < 80
    assert {domain: c["documents"] for domain, c in report["domains"]["train"].items()} == {
        domain: sum(row[1] == domain for row in rows_of(tmp_path / "out"))
        - report["domains"]["valid"][domain]["documents"]
        for domain in ("code", "wiki")
    }
    again = convert(tmp_path / "mix.txt", tmp_path / "again", **options)
    assert again["tokens"] == report["tokens"]
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out")


@pytest.mark.parametrize(
    "lines, said",
    [
        ("0,2,a,x,0\n2,4,b,x,1\n", "tokens 2 to 5 are a document, entry 2 of the index .* 2 to 4"),
        ("0,2,a,x,0\n", "has more than the 1 documents of the index beside it"),
        ("0,2,a,x,0\n2,5,b,x,1\n5,7,c,x,2\n", "has fewer documents than the index beside it"),
    ],
)
def test_an_index_that_says_otherwise_is_named(lines, said, tmp_path):
    write(tmp_path / "a.npy", [9, EOS, 9, 9, EOS])
    with gzip.open(tmp_path / "a.csv.gz", "wt") as stream:
        stream.write(lines)
    with pytest.raises(UserError, match=f"a.npy: {said}"):
        convert(tmp_path / "a.npy", tmp_path / "out", raw=RAW)
    assert not (tmp_path / "out").exists()


def test_eos_is_added_only_where_that_is_asked_for(tmp_path, capsys):
    write_megatron(tmp_path / "in/a", [[[9, 9]], [[9, EOS]], [[8], [9]]])
    words = ["convert", str(tmp_path / "in/a"), "--out", str(tmp_path / "out"), "--seed", "1"]
    words += ["--vocab-size", str(VOCAB), "--eos-id", str(EOS), "--valid-fraction", "0"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "tokens 0 to 2 does not end in EOS (7)" in said and "give --append-eos" in said
    assert main([*words, "--append-eos", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eos_added"] == 2
    assert sorted(ids for ids, _, _ in rows_of(tmp_path / "out")) == [
        [8, 9, EOS], [9, EOS], [9, 9, EOS],
    ]  # fmt: skip


def test_bad_arguments_are_one_line(tmp_path):
    write(tmp_path / "a.npy", documents(3))
    with pytest.raises(UserError, match="valid_fraction=1.0, seed=0: .* the share held out is"):
        convert(tmp_path, tmp_path / "out", raw=RAW, valid_fraction=1.0)
    with pytest.raises(UserError, match="uint8 does not hold the ids"):
        convert(tmp_path, tmp_path / "out", raw=RawTokensConfig(vocab_size=VOCAB, dtype="uint8"))
