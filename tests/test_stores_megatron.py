"""Proves of Megatron's indexed data that every window is the `.bin`'s tokens with the documents of
the index, by a loop over it; that a window reads little of the index; and that a damaged one is
named in one line."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.config import RawTokensConfig
from emotrain.data.opening import open_loader, open_store
from emotrain.data.stores import megatron
from emotrain.errors import MissingFileError, UserError

VOCAB, EOS = 1000, 7
RAW = RawTokensConfig(vocab_size=VOCAB, eos_id=EOS)
CODES = {"<u2": 8, "<i4": 4, "<u1": 1, "<i8": 5}


def write(prefix, documents, dtype="<u2", modes=False):
    """Documents, each a list of sequences of token ids, as Megatron's builder writes them."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    sequences = [sequence for document in documents for sequence in document]
    sizes = np.array([len(sequence) for sequence in sequences], "<i4")
    width = np.dtype(dtype).itemsize
    pointers = np.concatenate(([0], np.cumsum(sizes[:-1], dtype=np.int64))) * width
    indices = np.cumsum([0, *(len(document) for document in documents)])
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype]))
        file.write(struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(indices)))
        file.write(sizes.tobytes() + pointers.astype("<i8").tobytes())
        file.write(indices.astype("<i8").tobytes() + (b"\0" * len(sizes) if modes else b""))
    np.array([t for s in sequences for t in s]).astype(dtype).tofile(f"{prefix}.bin")
    return prefix


def made(count: int, seed: int = 0, longest: int = 30) -> list[list[list[int]]]:
    """Documents of one to three sequences."""
    rng = np.random.default_rng(seed)
    return [
        [
            rng.integers(8, VOCAB, rng.integers(1, longest)).tolist()
            for _ in range(rng.integers(1, 4))
        ]
        for _ in range(count)
    ]


def slow_window(documents, start, stop, first_id=0):
    """(tokens, lengths, ids) by a loop over all tokens."""
    tokens, lengths, ids = [], [], []
    at = 0
    for number, document in enumerate(documents):
        inside = 0
        for token in (token for sequence in document for token in sequence):
            if start <= at < stop:
                tokens.append(token)
                inside += 1
            at += 1
        if inside:
            lengths.append(inside)
            ids.append(first_id + number)
    return tokens, lengths, ids


def as_lists(window):
    return window.tokens.tolist(), window.lengths.tolist(), window.ids.tolist()


sequences_of = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=5), max_size=3)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_windows_are_those_of_a_loop_over_documents(tmp_path_factory, data):
    """Documents of several sequences, empty ones, and both together."""
    documents = data.draw(st.lists(sequences_of, min_size=1, max_size=8))
    documents.append([[1]])
    folder = tmp_path_factory.mktemp("megatron")
    write(folder / "a", [[[1, 2]], [[3]]])
    write(folder / "b", documents)
    store = open_store(folder, raw=RAW)
    total = store.shard_tokens[1]
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    window = store.window(1, start, stop)
    expected = slow_window(documents, start, stop, first_id=2)
    assert as_lists(window) == expected
    assert store.edges(1, start, stop).tolist() == np.cumsum([start, *expected[1]]).tolist()


@pytest.mark.parametrize("at_once", [2, 7])
@pytest.mark.parametrize("dtype", CODES)
def test_searches_through_long_indices(dtype, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "AT_ONCE", at_once)
    documents = [[[t % 200 for t in s] for s in d] for d in made(60)]
    write(tmp_path / "a", documents, dtype, modes=dtype == "<i4")
    store = open_store(tmp_path / "a", raw=RAW)
    for start in range(0, store.shard_tokens[0] - 50, 37):
        found = as_lists(store.window(0, start, start + 50))
        assert found == slow_window(documents, start, start + 50)


def test_a_window_reads_little_of_a_long_index(tmp_path, monkeypatch):
    def bytes_of_a_window(name, count):
        write(tmp_path / name, [[[9, 9]]] * count)
        store = open_store(tmp_path / name, raw=RAW)
        read = []
        real = store._parts[0].index_file.read
        monkeypatch.setattr(
            store._parts[0].index_file, "read", lambda a, b: read.append(b - a) or real(a, b)
        )
        store.window(0, count, count + 4)
        return sum(read)

    few, many = bytes_of_a_window("few", 2000), bytes_of_a_window("many", 128_000)
    assert many - few <= 7 * 16  # six more steps of the search


def test_names_that_mean_the_same_data(tmp_path):
    documents = made(20)
    for name in ("a", "deep/b"):
        write(tmp_path / name, documents)
    (tmp_path / "mix.txt").write_text("code,deep/b\nwiki,a.bin\n")
    for name in ("a", "a.bin", "a.idx"):
        assert len(open_store(tmp_path / name, raw=RAW).shard_tokens) == 1
    assert len(open_store(tmp_path, raw=RAW).shard_tokens) == 2
    assert len(open_store(f"{tmp_path}/*/*.idx", raw=RAW).shard_tokens) == 1
    store = open_store(tmp_path / "mix.txt", raw=RAW)
    assert store.labels == ["code", "wiki"]
    assert store.window(1, 0, 4).ids[0] == len(documents)
    assert len(open_store(tmp_path / "mix.txt", raw=RAW, domain="wiki").shard_tokens) == 1


def test_a_loader_reads_every_window_once(tmp_path):
    write(tmp_path / "a", made(50))
    store, loader = open_store(tmp_path, raw=RAW), open_loader(tmp_path, 16, seed=1, raw=RAW)
    found = [loader.batch([at]).tokens_BS[0].tolist() for at in range(loader.num_sequences)]
    total = store.shard_tokens[0]
    assert sorted(found) == sorted(
        store.window(0, at, at + 16).tokens.tolist() for at in range(0, total - 15, 16)
    )


def test_fingerprints_tell_tokens_and_boundaries(tmp_path):
    one, other = [[[9, 9], [9, 9]]], [[[9, 9]], [[9, 9]]]
    seen = set()
    for documents in (one, other, [[[9, 9], [9, 8]]]):
        write(tmp_path / "a", documents)
        seen.add(open_store(tmp_path, raw=RAW).fingerprint)
    assert len(seen) == 3


# ---- what cannot be right


def change(path, at, bytes_):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes_)


@pytest.mark.parametrize(
    "at, value, said",
    [
        (0, b"TNTIDX", "is no index of Megatron, version 1"),
        (9, struct.pack("<Q", 2), "is no index of Megatron, version 1"),
        (17, b"\x07", r"tokens have type 7 \(<f4\), not whole numbers"),
        (17, b"\x63", r"tokens have type 99 \(unknown\)"),
        (18, struct.pack("<Q", 41), "has .* bytes, with 41 sequences and 40 documents it has"),
        (26, struct.pack("<Q", 2**63), "has .* bytes, with 40 sequences"),
        (34 + 4 * 39, struct.pack("<i", 9), r"its sequences end at byte \d+, the .bin has"),
        (34 + 12 * 40 + 8 * 40, struct.pack("<q", 39), "its documents end with sequence 39 of 40"),
    ],
)
def test_damaged_indices_are_refused_at_the_start(at, value, said, tmp_path):
    write(tmp_path / "a", [[[9] * 8]] * 40)
    change(tmp_path / "a.idx", at, value)
    with pytest.raises(UserError, match=rf"a.idx: .*{said}"):
        open_store(tmp_path / "a", raw=RAW)


@pytest.mark.parametrize(
    "at, value, said",
    [
        (34 + 4 * 20, struct.pack("<i", 9), "do not follow one another"),
        (34 + 4 * 20, struct.pack("<i", -8), "do not follow one another"),
        (34 + 160 + 8 * 20, struct.pack("<q", 0), "do not follow one another|in none of its"),
        (34 + 480 + 8 * 21, struct.pack("<q", 4), "do not rise"),
        (34 + 480 + 8 * 20, struct.pack("<q", 39), "do not rise"),
    ],
)
def test_damage_inside_of_an_index_is_found_by_the_window_that_needs_it(at, value, said, tmp_path):
    write(tmp_path / "a", [[[9] * 8]] * 40)
    change(tmp_path / "a.idx", at, value)
    store = open_store(tmp_path / "a", raw=RAW)
    with pytest.raises(UserError, match=f"a.idx: .*({said})"):
        store.window(0, 20 * 8 + 2, 22 * 8 + 2)


def test_tokens_outside_of_the_vocabulary_and_missing_files(tmp_path):
    write(tmp_path / "a", [[[9, 9, 9, 9]]], "<i4")
    change(tmp_path / "a.bin", 8, struct.pack("<i", -1))
    store = open_store(tmp_path / "a", raw=RAW)
    assert store.window(0, 0, 2).tokens.tolist() == [9, 9]
    with pytest.raises(UserError, match="a.bin: token 2 is -1, the vocabulary has 1000"):
        store.window(0, 1, 4)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(MissingFileError, match="a.bin: cannot be read .*a.idx names it"):
        open_store(tmp_path / "a", raw=RAW)
