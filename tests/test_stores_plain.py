"""Proves of arrays of tokens as Dolma and OLMo have them that every window is the file's tokens
with the documents that EOS ends, found by a loop over tokens; which files a path means; and that
what cannot be right is named in one line."""

from __future__ import annotations

import gzip
import logging
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.cli import main
from emotrain.config import RawTokensConfig
from emotrain.data.opening import open_loader, open_store
from emotrain.data.stores import plain
from emotrain.errors import MissingFileError, UserError
from tests.conftest import tiny_settings

VOCAB, EOS = 1000, 7
RAW = RawTokensConfig(vocab_size=VOCAB, eos_id=EOS)


def documents(count: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    """Random documents, EOS last, one after the other."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(count):
        ids = rng.integers(8, vocab, rng.integers(1, 40))
        pieces += [ids, [EOS]]
    return np.concatenate(pieces)


def write(path, tokens, dtype="<u2"):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(tokens).astype(dtype).tofile(path)
    return path


def slow_window(tokens, start, stop, first=0):
    """(lengths, ids) by a loop over the tokens of a window."""
    lengths, ids, begin = [], [], start
    for at in range(start, stop):
        if tokens[at] == EOS or at == stop - 1:
            lengths.append(at + 1 - begin)
            ids.append(first + begin)
            begin = at + 1
    return lengths, ids


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_windows_are_those_of_a_loop_over_tokens(tmp_path_factory, data):
    tokens = np.array(data.draw(st.lists(st.integers(5, 9), min_size=1, max_size=60)) + [EOS])
    folder = tmp_path_factory.mktemp("plain")
    write(folder / "a.npy", [9, 9, EOS])
    write(folder / "b.npy", tokens)
    store = open_store(folder, raw=RAW)
    start = data.draw(st.integers(0, len(tokens) - 1))
    stop = data.draw(st.integers(start + 1, len(tokens)))
    window = store.window(1, start, stop)
    lengths, ids = slow_window(tokens, start, stop, first=3)
    assert window.tokens.tolist() == tokens[start:stop].tolist()
    assert (window.lengths.tolist(), window.ids.tolist()) == (lengths, ids)
    edges = store.edges(1, start, stop)
    assert edges.tolist() == np.cumsum([start, *lengths]).tolist()


@pytest.mark.parametrize(
    "vocab, dtype", [(200, "<u1"), (VOCAB, "<u2"), (2**16, "<u2"), (2**16 + 1, "<u4")]
)
def test_the_smallest_type_that_holds_the_vocabulary(vocab, dtype, tmp_path):
    tokens = documents(30, vocab=vocab)
    write(tmp_path / "a.npy", tokens, dtype)
    store = open_store(tmp_path, raw=RawTokensConfig(vocab_size=vocab, eos_id=EOS))
    assert store.shard_tokens == [len(tokens)]
    assert store.window(0, 0, len(tokens)).tokens.tolist() == tokens.tolist()


# ---- which files


def names_of(store) -> list[str]:
    return [os.path.basename(store.name_of(shard)) for shard in range(len(store.shard_tokens))]


def test_files_folders_patterns_and_lists(tmp_path, monkeypatch):
    for name in ("b/2.npy", "a/1.npy", "a/0.npy", "a/.hidden.npy", ".git/x.npy"):
        write(tmp_path / "in" / name, documents(3))
    (tmp_path / "in/a/notes.md").write_text("no tokens")
    (tmp_path / "in/linked").symlink_to(tmp_path / "in/b")
    listed = tmp_path / "files.txt"
    listed.write_text(f"# a list\nin/b/2.npy\n\n  {tmp_path}/in/a/1.npy\n")
    assert names_of(open_store(tmp_path / "in/a/1.npy", raw=RAW)) == ["1.npy"]
    assert names_of(open_store(tmp_path / "in", raw=RAW)) == ["0.npy", "1.npy", "2.npy"]
    assert names_of(open_store(f"{tmp_path}/in/*/[01].npy", raw=RAW)) == ["0.npy", "1.npy"]
    assert names_of(open_store(listed, raw=RAW)) == ["2.npy", "1.npy"]
    monkeypatch.chdir(tmp_path)
    assert names_of(open_store("files.txt", raw=RAW)) == ["2.npy", "1.npy"]


def test_a_mix_gives_domains_by_label(tmp_path):
    for name in ("wiki/dolma2/0.npy", "code/dolma2/0.npy", "code/dolma2/1.npy"):
        write(tmp_path / "root" / name, documents(3, seed=len(name)))
    mix = tmp_path / "mix.txt"
    mix.write_text(
        "# label,path\ncode,code/{TOKENIZER}/0.npy\nwiki,wiki/{TOKENIZER}/0.npy\n"
        "code,code/{TOKENIZER}/1.npy\n"
    )
    raw = RawTokensConfig(
        vocab_size=VOCAB, eos_id=EOS, root=f"{tmp_path}/root", tokenizer_name="dolma2"
    )
    assert open_store(mix, raw=raw).labels == ["code", "wiki", "code"]
    assert len(open_store(mix, raw=raw, domain="code").shard_tokens) == 2
    with pytest.raises(UserError, match="no files of domain 'law'; its labels are code, wiki"):
        open_store(mix, raw=raw, domain="law")
    with pytest.raises(UserError, match=r"line 2 names {TOKENIZER}; .*data.raw.tokenizer_name"):
        open_store(mix, raw=RAW)
    mix.write_text("wiki, \n")
    with pytest.raises(UserError, match="line 1 is not `label,path`"):
        open_store(mix, raw=raw)


def test_a_list_names_each_file_once_and_only_files(tmp_path):
    path = write(tmp_path / "a.npy", documents(3))
    listed = tmp_path / "files.txt"
    listed.write_text("a.npy\na.npy\n")
    with pytest.raises(UserError, match="names .*a.npy twice"):
        open_store(listed, raw=RAW)
    listed.write_text("gone.npy\n")
    with pytest.raises(MissingFileError, match="gone.npy: cannot be read"):
        open_store(listed, raw=RAW)
    listed.write_text(f"{tmp_path}\n")
    with pytest.raises(UserError, match="is no file"):
        open_store(listed, raw=RAW)
    listed.write_text("# nothing\n")
    with pytest.raises(UserError, match="there are no paths in this list"):
        open_store(listed, raw=RAW)
    listed.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="is no list of files"):
        open_store(listed, raw=RAW)
    with pytest.raises(UserError, match="there are no files that end in .npy"):
        open_store(f"{tmp_path}/*.nothing", raw=RAW)
    with pytest.raises(MissingFileError, match="no such file"):
        open_store(tmp_path / "other.npy", raw=RAW)


def test_empty_files_are_left_out_and_counted(tmp_path, caplog):
    write(tmp_path / "a.npy", documents(3))
    write(tmp_path / "b.npy", [])
    with caplog.at_level(logging.WARNING, logger="emotrain"):
        assert len(open_store(tmp_path, raw=RAW).shard_tokens) == 1
    assert "1 of 2 files are empty and left out, such as" in caplog.text
    os.truncate(tmp_path / "a.npy", 0)
    with pytest.raises(UserError, match="its 2 files are empty"):
        open_store(tmp_path, raw=RAW)


# ---- what cannot be right


def test_a_numpy_file_is_read_as_what_it_says(tmp_path):
    tokens = documents(30)
    np.save(tmp_path / "a.npy", tokens)  # int64
    write(tmp_path / "b.npy", tokens)
    store = open_store(tmp_path, raw=RAW)
    for shard in range(2):
        window = store.window(shard, 5, 50)
        assert window.tokens.tolist() == tokens[5:50].tolist()
        assert window.lengths.tolist() == slow_window(tokens, 5, 50)[0]


@pytest.mark.parametrize(
    "array, said",
    [
        (np.ones(9), "is a NumPy file of float64 in 1 dimensions"),
        (np.ones((3, 3), np.uint16), "of uint16 in 2 dimensions"),
        (np.array([3, -2, EOS]), "token 1 is -2, the vocabulary has 1000"),
    ],
)
def test_a_numpy_file_of_something_else_is_refused(array, said, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=said):
        open_store(tmp_path, raw=RAW)


def test_a_damaged_numpy_file_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", documents(3))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-8])
    with pytest.raises(UserError, match=f"has {len(whole) - 8} bytes, its NumPy header says"):
        open_store(tmp_path, raw=RAW)
    (tmp_path / "a.npy").write_bytes(whole[:20])
    with pytest.raises(UserError, match="begins as a NumPy file and has none of its headers"):
        open_store(tmp_path, raw=RAW)


def with_dtype(dtype: str, vocab: int = VOCAB, eos: int = EOS) -> RawTokensConfig:
    return RawTokensConfig(vocab_size=vocab, eos_id=eos, dtype=dtype)


@pytest.mark.parametrize(
    "dtype, raw, said",
    [
        ("<u4", RAW, "every second number of uint16 is 0, so it holds uint32 tokens; say so with"),
        ("<u2", with_dtype("uint32"), r"a.npy: token 0 is \d{6,}, the vocabulary has 1000"),
        ("<u2", with_dtype("uint16", vocab=70_000), "uint16 does not hold the ids of a vocab"),
        ("<u2", with_dtype("auto", vocab=500), r"token \d+ is \d+, the vocabulary has 500"),
        ("<u2", with_dtype("auto", eos=3), "none of its .* tokens is 3, which ends documents"),
        ("<u2", with_dtype("auto", eos=2000), "EOS is a token of the vocabulary"),
        ("<u2", RawTokensConfig(), "does not say which tokens it holds; give data.tokenizer=FILE"),
    ],
)
def test_wrong_types_and_vocabularies_are_named(dtype, raw, said, tmp_path):
    write(tmp_path / "a.npy", documents(100)[:1000], dtype)
    with pytest.raises(UserError, match=said):
        open_store(tmp_path / "a.npy", raw=raw)


def test_half_a_token_and_one_outside_of_the_vocabulary(tmp_path):
    tokens = documents(2000)
    path = write(tmp_path / "a.npy", tokens)
    store = open_store(path, raw=RAW)
    at = 4 * plain.SAMPLE_BYTES // 2 + 5
    with open(path, "r+b") as file:
        file.seek(2 * at)
        file.write(b"\xff\xff")
    store.window(0, 0, at)  # no part of it
    with pytest.raises(UserError, match=f"token {at} is 65535"):
        store.window(0, at - 5, at + 5)
    os.truncate(path, 2 * len(tokens) - 1)
    with pytest.raises(UserError, match="no whole number of uint16 tokens"):
        open_store(path, raw=RAW)
    # A file that is opened and shrinks.
    with pytest.raises(UserError, match=rf"ends at byte {2 * len(tokens) - 1}, and had"):
        store.window(0, len(tokens) - 5, len(tokens))


def test_an_end_that_is_far_away_is_found(tmp_path, monkeypatch):
    """Long documents: none of the samples has an EOS."""
    monkeypatch.setattr(plain, "SEARCH_TOKENS", 1000)
    tokens = np.full(20_000, 9)
    tokens[7777] = EOS
    store = open_store(write(tmp_path / "a.npy", tokens), raw=RAW)
    assert store.edges(0, 0, 20_000).tolist() == [0, 7778, 20_000]


# ---- identity


def test_fingerprints_tell_tokens_order_and_vocabulary(tmp_path):
    def fingerprint(**changes):
        raw = RawTokensConfig(**{"vocab_size": VOCAB, "eos_id": EOS, **changes})
        return open_store(tmp_path / "mix.txt", raw=raw).fingerprint

    def listed(*names):
        (tmp_path / "mix.txt").write_text("".join(f"{name}\n" for name in names))

    tokens = documents(3000)
    for folder in ("here", "there"):
        for name in ("a.npy", "b.npy"):
            write(tmp_path / folder / name, tokens)
    listed("here/a.npy", "here/b.npy")
    seen = [fingerprint(), fingerprint(vocab_size=VOCAB + 1)]
    listed("here/b.npy", "here/a.npy")
    seen.append(fingerprint())
    listed("here/a.npy")
    seen.append(fingerprint())
    for at in (3, len(tokens) // 2, len(tokens) - 3):
        changed = tokens.copy()
        changed[at] += 1
        write(tmp_path / "here/b.npy", changed)
        listed("here/a.npy", "here/b.npy")
        seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
    listed("there/a.npy", "there/b.npy")
    assert fingerprint() == seen[0]  # wherever they lie


def test_one_read_and_no_list_of_documents_at_the_start(tmp_path, monkeypatch):
    """Opening looks at the same few bytes of a file, however large it is."""
    read = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: read.append(args[1]) or real(*args))
    small = write(tmp_path / "a.npy", documents(2000))
    large = write(tmp_path / "b.npy", documents(20_000))
    open_store(small, raw=RAW)
    of_small = sum(read)
    read.clear()
    open_store(large, raw=RAW)
    assert sum(read) == of_small <= 4 * plain.SAMPLE_BYTES


# ---- the index beside a file, and training


def test_the_index_beside_a_file_gives_sources(tmp_path):
    write(tmp_path / "a.npy", [9, EOS, 9, 9, EOS])
    with gzip.open(tmp_path / "a.csv.gz", "wt") as stream:
        stream.write("0,2,id-1,s3://in/x.json.gz,1\n2,5,id-2,s3://in/x.json.gz,2\n")
    store = open_store(tmp_path, raw=RAW)
    assert list(store.sources(0)) == [
        (0, 2, "s3://in/x.json.gz:id-1"),
        (2, 5, "s3://in/x.json.gz:id-2"),
    ]
    (tmp_path / "a.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="a.csv.gz: is not readable to its end"):
        list(store.sources(0))
    with gzip.open(tmp_path / "a.csv.gz", "wt") as stream:
        stream.write("0,2,id-1,x,1\nzero,5\n")
    with pytest.raises(UserError, match="a.csv.gz: line 2 is not start,end,id,source,place"):
        list(store.sources(0))


def test_a_loader_reads_every_window_once(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.npy", documents(50, seed=ord(name)))
    store = open_store(tmp_path, raw=RAW)
    loader = open_loader(tmp_path, 16, seed=1, raw=RAW)
    found = [
        loader.batch([position]).tokens_BS[0].tolist() for position in range(loader.num_sequences)
    ]
    expected = [
        store.window(shard, at, at + 16).tokens.tolist()
        for shard, size in enumerate(store.shard_tokens)
        for at in range(0, size - 15, 16)
    ]
    assert sorted(found) == sorted(expected)


def test_training_reads_arrays_of_tokens(tmp_path, tiny_data, caplog):
    """With the tokenizer, whose copy a checkpoint gets, and without one, which is one line."""
    from emotrain.config import config_from_dict, save_config
    from emotrain.data.formats import Dataset
    from emotrain.training.data_source import build_loader

    dataset = Dataset(tiny_data)
    ids = np.concatenate([ids for _, ids, _ in dataset.documents("train")])
    write(tmp_path / "tokens/a.npy", ids)
    chosen = tiny_settings(tmp_path / "tokens", tmp_path / "run", steps=2)
    chosen["data"]["tokenizer"] = str(tiny_data / "tokenizer.json")
    save_config(config_from_dict(chosen), tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    (saved,) = (tmp_path / "run/checkpoints").glob("step-*")
    assert (saved / "tokenizer.json").read_bytes() == (tiny_data / "tokenizer.json").read_bytes()
    assert "nobody knows" not in caplog.text
    chosen["data"]["tokenizer"] = ""
    chosen["data"]["raw"] = {"vocab_size": dataset.vocab_size, "eos_id": dataset.eos_id}
    loader = build_loader(config_from_dict(chosen))
    assert not loader.tokenizer_file.is_file()
    assert caplog.text.count("nobody knows its tokenizer") == 1
