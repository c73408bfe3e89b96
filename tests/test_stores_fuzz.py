"""Proves of every reader of the data layer that a damaged file ends in the tokens that are in it,
or in one UserError line, never in another exception; and of the format with checksums that it never
ends in other tokens than those that were written."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_stores_columns import write_ids
from test_stores_mds import arrays, simple
from test_stores_megatron import made
from test_stores_megatron import write as write_megatron
from test_stores_plain import EOS, RAW, VOCAB, documents, write

from emotrain.config import RawTokensConfig
from emotrain.data.opening import open_store
from emotrain.data.stores.convert import whole_documents
from emotrain.errors import UserError

FEW, MANY = 40, 5000


def npy(folder: Path) -> None:
    write(folder / "a.npy", documents(150))


def numpy_file(folder: Path) -> None:
    np.save(folder / "a.npy", documents(60))


def megatron(folder: Path) -> None:
    write_megatron(folder / "a", made(40), "<i4")


def parquet(folder: Path) -> None:
    write_ids(folder / "a.parquet", ids_of(made(40)), pa.list_(pa.int32()), rows=11)


def arrow(folder: Path) -> None:
    write_ids(folder / "a.arrow", ids_of(made(40)), pa.list_(pa.int32()), rows=11)


def stream(folder: Path) -> None:
    kind = pa.list_(pa.int32())
    write_ids(folder / "a.arrow", ids_of(made(40)), kind, rows=11, stream=True)


def jsonl(folder: Path) -> None:
    write_ids(folder / "a.jsonl", ids_of(made(40)))


def mds(folder: Path) -> None:
    simple(folder, arrays(40), a_shard=100)


def mds_index(folder: Path) -> None:
    simple(folder, arrays(40))


def mix(folder: Path) -> None:
    npy(folder)
    (folder / "mix.txt").write_text("# a mix\nwiki,a.npy\ncode,./a.npy\n")


def index(folder: Path) -> None:
    tokens = documents(60)
    write(folder / "a.npy", tokens)
    edges = np.flatnonzero(tokens == EOS) + 1
    with gzip.open(folder / "a.csv.gz", "wt") as file:
        for number, (a, b) in enumerate(zip([0, *edges], edges, strict=False)):
            file.write(f"{a},{b},id-{number},in,{number}\n")


def ids_of(documents) -> list[list[int]]:
    return [[token for sequence in document for token in sequence] for document in documents]


FORMATS: dict[Callable[[Path], None], str] = {
    npy: "a.npy", numpy_file: "a.npy", megatron: "a.idx", parquet: "a.parquet",
    arrow: "a.arrow", stream: "a.arrow", jsonl: "a.jsonl", mix: "mix.txt", index: "a.csv.gz",
    mds: "shard.00000.mds", mds_index: "index.json",
}  # fmt: skip
"""How files are made, and which of them is damaged."""


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file after one to three accidents."""
    found = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, len(found) + 1)) if len(found) else 0
        # As often near the ends, where headers and footers are.
        if rng.random() < 0.5:
            at = min(at % 100, len(found)) if rng.random() < 0.5 else len(found) - at % 100
            at = max(at, 0)
        size = int(rng.integers(1, 9))
        match rng.integers(0, 6):
            case 0 if at < len(found):
                found[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                found[at : at + size] = rng.bytes(size)
            case 2:
                found[at:at] = rng.bytes(size)
            case 3:
                del found[at : at + size]
            case 4:
                del found[at:]
            case _:
                found[at : at + size] = bytes(size)
    return bytes(found)


def read_all(path: Path) -> list[tuple[Any, np.ndarray]]:
    """Every document of a store and, of each of its shards, all windows."""
    store = open_store(path, raw=RAW)
    found = []
    for shard, total in enumerate(store.shard_tokens):
        for start in range(0, total - 15, 16):
            window = store.window(shard, start, start + 16)
            assert window.lengths.sum() == len(window.tokens) == 16
            assert (window.lengths > 0).all() and len(window.ids) == len(window.lengths)
            assert window.tokens.max() < VOCAB and window.tokens.min() >= 0
            assert (window.ids >= 0).all() and (np.diff(window.ids) > 0).all()
            edges = store.edges(shard, start, start + 16)
            assert np.array_equal(np.diff(edges), window.lengths)
        found += [(shard, whole.tokens) for whole in whole_documents(store, shard)]
        if hasattr(store, "sources"):
            list(store.sources(shard))
    return found


def attempt(make: Callable[[Path], None], whole: Path, folder: Path, seed: int) -> bool:
    """Damage a file and read it. Returns whether it could be read."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    name = FORMATS[make]
    path = folder / name
    content = damaged((whole / name).read_bytes(), np.random.default_rng(seed))
    path.write_bytes(content)
    opened = folder / {index: "a.npy", mds: "index.json"}.get(make, name)
    try:
        found = read_all(opened)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error), error
        return False
    tokens = np.concatenate([tokens for _, tokens in found])
    if make is npy and content[:6] != b"\x93NUMPY":
        assert np.array_equal(tokens, np.frombuffer(content, "<u2"))
    if make is megatron:
        assert np.array_equal(tokens, np.fromfile(folder / "a.bin", "<i4"))
    return True


@pytest.mark.parametrize(
    "tries", [FEW, pytest.param(MANY, marks=[pytest.mark.long, pytest.mark.timeout(3000)])]
)
@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_damaged_files_are_read_as_they_are_or_named(make, tries, tmp_path):
    (tmp_path / "whole").mkdir()
    make(tmp_path / "whole")
    read = [attempt(make, tmp_path / "whole", tmp_path / "in", seed) for seed in range(tries)]
    assert not all(read)


@pytest.mark.parametrize(
    "tries", [FEW, pytest.param(MANY, marks=[pytest.mark.long, pytest.mark.timeout(3000)])]
)
@pytest.mark.parametrize("where", ["{}", "file://{}/"], ids=["here", "far away"])
@pytest.mark.parametrize("name", ["train/shard-00000.arrow", "dataset.json"])
def test_a_damaged_data_set_never_gives_other_tokens(name, where, tries, tmp_path, tiny_data):
    folder = tmp_path / "data"
    if "://" in where:
        pytest.importorskip("fsspec")
    shutil.copytree(tiny_data, folder)
    expected = open_store(tiny_data)
    total = expected.shard_tokens[0]
    windows = [expected.window(0, at, at + 64) for at in range(0, total - 63, 64)]
    refused = 0
    for seed in range(tries):
        content = damaged((tiny_data / name).read_bytes(), np.random.default_rng(seed))
        (folder / name).write_bytes(content)
        try:
            store = open_store(where.format(folder), raw=RawTokensConfig())
            found = [store.window(0, at, at + 64) for at in range(0, total - 63, 64)]
        except UserError as error:
            assert "\n" not in str(error) and where.format(folder) in str(error)
            refused += 1
            continue
        for one, other in zip(found, windows, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)), seed
    assert refused > tries / 4
