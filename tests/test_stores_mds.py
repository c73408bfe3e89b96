"""Proves of MosaicML's MDS that every window is the samples' tokens with their documents, by a loop
over them, for each way to write a column; that what is written here is what `streaming.MDSWriter`
writes, to the byte; and that a damaged or foreign shard is named in one line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emotrain.config import RawTokensConfig
from emotrain.data.opening import open_loader, open_store
from emotrain.data.stores.convert import whole_documents
from emotrain.errors import MissingFileError, UserError

VOCAB, EOS = 1000, 7
RAW = RawTokensConfig(vocab_size=VOCAB, eos_id=EOS)
FIXED = {"int": 8, "ndarray:uint16:6": 12, "ndarray:int32:6": 24}
CODES = {"uint8": 8, "uint16": 16, "uint32": 32, "int32": 33, "int64": 65}


def encoded(kind: str, value) -> bytes:
    """A value in a column, by the documentation of the format."""
    if kind == "str":
        return value.encode()
    if kind == "int":
        return np.int64(value).tobytes()
    if kind == "bytes":
        return value
    dtype, shape = [*kind.split(":")[1:], "", ""][:2]
    code = b"" if dtype else bytes([CODES[value.dtype.name]])
    width = 0 if max(value.shape) < 2**8 else 1 if max(value.shape) < 2**16 else 2
    sizes = np.array(value.shape, f"<u{2**width}").tobytes()
    said = b"" if shape else bytes([4 * value.ndim + width]) + sizes
    return code + said + value.tobytes()


def write(folder: Path, columns: dict, samples: list[dict], a_shard: int = 10, hashes=()) -> Path:
    """Samples as `MDSWriter` writes them, so many a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(columns)
    config = {
        "version": 2, "format": "mds", "compression": None, "hashes": list(hashes),
        "size_limit": None, "column_names": names,
        "column_encodings": [columns[name] for name in names],
        "column_sizes": [FIXED.get(columns[name]) for name in names],
    }  # fmt: skip
    said, shards = json.dumps(config, sort_keys=True).encode(), []
    for first in range(0, len(samples), a_shard):
        found = []
        for sample in samples[first : first + a_shard]:
            values = [encoded(columns[name], sample[name]) for name in names]
            free = [len(v) for v, n in zip(values, names, strict=True) if columns[n] not in FIXED]
            found.append(np.array(free, "<u4").tobytes() + b"".join(values))
        begin = 4 * (len(found) + 2) + len(said)
        offsets = np.cumsum([begin, *map(len, found)]).astype("<u4").tobytes()
        content = np.uint32(len(found)).tobytes() + offsets + said + b"".join(found)
        name = f"shard.{len(shards):05d}.mds"
        (folder / name).write_bytes(content)
        digests = {hash: hashlib.new(hash, content).hexdigest() for hash in hashes}
        raw = {"basename": name, "bytes": len(content), "hashes": digests}
        shards.append({"samples": len(found), "raw_data": raw, "zip_data": None, **config})
    index = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
    (folder / "index.json").write_text(index)
    return folder


def arrays(count: int, dtype="int32", longest: int = 30, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(8, VOCAB, rng.integers(1, longest)).astype(dtype) for _ in range(count)]


def even(count: int, dtype="int32", length: int = 6) -> list[np.ndarray]:
    """A stream of documents with EOS, cut into samples of one length."""
    rng = np.random.default_rng(count)
    stream = np.where(rng.random(count * length) < 0.1, EOS, rng.integers(8, VOCAB, count * length))
    return list(stream.astype(dtype).reshape(count, length))


def simple(folder: Path, documents: list[np.ndarray], **options) -> Path:
    return write(folder, {"tokens": "ndarray:int32"}, [{"tokens": d} for d in documents], **options)


WAYS = {
    "ndarray": (arrays(35), {}),
    "ndarray:int32": (arrays(35), {}),
    "ndarray:uint16": (arrays(35, "uint16", longest=400), {}),
    "bytes": ([*arrays(30, "int64"), np.zeros(0, np.int64), *arrays(5, "int64", seed=1)], {}),
    "bytes uint16": (arrays(35, "uint16"), {"dtype": "uint16"}),
    "ndarray:int32:6": (even(35), {"documents": "rows"}),
}
MORE = {
    "none": {},
    "before and after": {"id": "str", "number": "int", "url": "str", "zero": "int"},
    "fixed": {"number": "int"},
}


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("way", WAYS)
def test_windows_are_those_of_a_loop_over_samples(way, more, tmp_path):
    documents, options = WAYS[way]
    kind = way.split()[0]
    columns = {"tokens": kind, **MORE[more]}
    samples = [
        {
            "tokens": ids.tobytes() if kind == "bytes" else ids,
            "id": "é" * (i % 5), "number": i, "url": f"https://{i}", "zero": 0,
        }
        for i, ids in enumerate(documents)
    ]  # fmt: skip
    write(tmp_path, columns, samples)
    raw = RawTokensConfig(vocab_size=VOCAB, eos_id=EOS, **options)
    store, first = open_store(tmp_path, raw=raw), 0
    for shard, total in enumerate(store.shard_tokens):
        here = documents[10 * shard : 10 * shard + 10]
        tokens = np.concatenate(here)
        numbers = np.concatenate([np.full(len(ids), first + i) for i, ids in enumerate(here)])
        assert total == len(tokens)
        for start in range(0, total, 7):
            for stop in {min(start + 1, total), min(start + 40, total), total}:
                window = store.window(shard, start, stop)
                ids, lengths = np.unique(numbers[start:stop], return_counts=True)
                assert np.array_equal(window.tokens, tokens[start:stop])
                assert window.ids.tolist() == ids.tolist()
                assert window.lengths.tolist() == lengths.tolist()
                edges = store.edges(shard, start, stop)
                assert edges.tolist() == [start, *(start + np.cumsum(lengths)).tolist()]
        first += len(here)


def test_samples_of_one_length_are_a_stream_that_eos_cuts(tmp_path):
    """As llm-foundry writes it; `rows` says otherwise, and other data."""
    samples = even(35)
    store = open_store(simple(tmp_path, samples), raw=RAW)
    for shard in range(len(store.shard_tokens)):
        stream = np.concatenate(samples[10 * shard : 10 * shard + 10])
        ends = np.flatnonzero(stream == EOS) + 1
        expected = [len(piece) for piece in np.split(stream, ends) if len(piece)]
        assert [len(d.tokens) for d in whole_documents(store, shard)] == expected
        window = store.window(shard, 3, 50)
        assert window.ids[0] == 60 * shard + 3 and (np.diff(window.ids) > 0).all()
    rows = open_store(tmp_path, raw=RawTokensConfig(vocab_size=VOCAB, eos_id=EOS, documents="rows"))
    assert rows.window(0, 0, 60).lengths.tolist() == [6] * 10
    assert rows.fingerprint != store.fingerprint
    assert open_loader(tmp_path, 16, seed=1, raw=RAW).batch(range(8)).tokens_BS.shape == (8, 16)
    without = simple(tmp_path / "none", [np.full(6, 9, np.int32)] * 5)
    with pytest.raises(UserError, match="mds: none of its tokens is 7, .*documents=rows"):
        open_store(without, raw=RAW)


def test_what_a_path_means(tmp_path):
    a, b = arrays(12), arrays(12, seed=1)
    simple(tmp_path / "in/a", a)
    simple(tmp_path / "in/b", b)
    whole = [*a, *b]
    for path in (tmp_path / "in/*/index.json", tmp_path / "mix.txt"):
        (tmp_path / "mix.txt").write_text("wiki,in/a/index.json\ncode,in/b/index.json\n")
        store = open_store(path, raw=RAW)
        found = [
            d.tokens for i in range(len(store.shard_tokens)) for d in whole_documents(store, i)
        ]
        assert len(found) == len(whole) and all(map(np.array_equal, found, whole))
    assert store.labels == ["wiki", "wiki", "code", "code"]
    assert sum(open_store(tmp_path / "in/a/index.json", raw=RAW).shard_tokens) == sum(map(len, a))
    code = open_store(tmp_path / "mix.txt", raw=RAW, domain="code")
    assert sum(code.shard_tokens) == sum(map(len, b))
    with pytest.raises(MissingFileError, match=r"in: has no index.json; .*'.*in/\*/index.json'"):
        open_store(tmp_path / "in", raw=RAW)


def test_bytes_that_changed_are_found_by_the_hash(tmp_path):
    simple(tmp_path, arrays(20), hashes=("sha1",))
    path = tmp_path / "shard.00001.mds"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    store = open_store(tmp_path, raw=RAW)
    store.window(0, 0, 9)
    with pytest.raises(UserError, match=r"shard.00001.mds: its bytes have changed \(sha1 "):
        store.window(1, 0, 9)
    open_store(tmp_path, raw=RAW, verify_checksums=False).window(1, 0, 9)
    first = open_store(tmp_path, raw=RAW).fingerprint
    assert open_store(simple(tmp_path / "b", arrays(20)), raw=RAW).fingerprint != first


def changed(folder: Path, **shard) -> None:
    known = json.loads((folder / "index.json").read_text())
    known["shards"][1].update(shard)
    (folder / "index.json").write_text(json.dumps(known))


RAW_DATA = {"basename": "shard.00001.mds", "bytes": 1, "hashes": {}}


@pytest.mark.parametrize(
    "shard, said",
    [
        ({"version": 1}, "index.json: shard 1 is 'mds', version 1, not mds, 2"),
        ({"format": "json"}, "index.json: shard 1 is 'json', version 2"),
        ({"samples": 9}, "shard.00001.mds: has 10 samples, index.json says 9"),
        ({"samples": True}, "index.json: shard 1 has .*True.* for its bytes"),
        ({"raw_data": RAW_DATA}, r"shard.00001.mds: has \d+ bytes, .*index.json says 1;"),
        (
            {"raw_data": RAW_DATA | {"basename": "../../shard"}},
            "index.json: shard 1 names the file '../../shard', which is not below its folder",
        ),
        ({"raw_data": RAW_DATA | {"basename": "/etc/passwd"}}, "which is not below its folder"),
        ({"raw_data": RAW_DATA | {"basename": "gone"}}, "/gone: cannot be read"),
        (
            {
                "raw_data": RAW_DATA | {"basename": "gone"}, "compression": "zstd:7",
                "zip_data": RAW_DATA | {"basename": "gone.zstd"},
            },
            "/gone: lies there compressed alone, as gone.zstd; decompress it .* zstd:7",
        ),
        ({"column_encodings": ["ndarray:float32"]}, "column 'tokens' is 'ndarray:float32' of any"),
        ({"column_encodings": ["str"]}, "no column of token ids .*; its columns are tokens: str"),
        ({"column_names": ["x"]}, "no column of token ids .* name one with data.raw.column"),
        ({"column_sizes": [24]}, "column 'tokens' is 'ndarray:int32' of 24 bytes"),
        ({"column_encodings": ["ndarray:int64"]}, r"sample \d+ has no whole number of int64 tok"),
        # Of the same width: two tokens in one.
        ({"column_encodings": ["ndarray:uint16"]}, r"sample \d+ has \d+ .*; copy the shard"),
    ],
)  # fmt: skip
def test_an_index_that_says_something_else(shard, said, tmp_path):
    changed(simple(tmp_path, arrays(20)), **shard)
    with pytest.raises(UserError, match=said) as error:
        store = open_store(tmp_path, raw=RAW)
        store.window(1, 0, store.shard_tokens[1])
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_damaged_shards_and_foreign_tokens(tmp_path):
    simple(tmp_path, arrays(20))
    path = tmp_path / "shard.00000.mds"
    whole = path.read_bytes()
    store = open_store(tmp_path, raw=RAW)
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"has \d+ bytes, .*index.json says \d+; copy both again"):
        open_store(tmp_path, raw=RAW)
    with pytest.raises(UserError, match=r"shard.00000.mds: ends at byte \d+"):
        store.window(0, 0, store.shard_tokens[0])
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"mds: token \d+ is \d+, the vocabulary has 10"):
        open_store(tmp_path, raw=RawTokensConfig(vocab_size=10)).window(0, 0, 40)
    two = write(tmp_path / "two", {"tokens": "ndarray:int32"}, [{"tokens": np.ones((2, 3), "i4")}])
    with pytest.raises(UserError, match="mds: sample 0 has "):
        open_store(two, raw=RAW).window(0, 0, 1)


WRITER = """
import sys, types, json
import numpy as np
sys.path.append(sys.argv[1])
# Only the writer is wanted: what `streaming` imports beside it is not installed.
for name in ("streaming", "streaming.base"):
    sys.modules[name] = module = types.ModuleType(name)
    module.__path__ = [f"{sys.argv[1]}/{name.replace('.', '/')}"]
from streaming.base.format.mds.writer import MDSWriter

given = np.load(sys.argv[2], allow_pickle=True).item()
for folder, columns, samples in given["sets"]:
    hashes = ["sha1", "sha256"]
    with MDSWriter(columns=columns, out=folder, hashes=hashes, size_limit=None) as writer:
        for sample in samples:
            writer.write(sample)
"""
PACKAGES = ("mosaicml-streaming==0.13.0", "brotli", "python-snappy", "cramjam", "zstd", "xxhash")


@pytest.mark.long
def test_files_are_those_of_mosaicml(tmp_path):
    """All ways above, by the writer itself in a folder of its own, byte by byte."""
    target = Path(os.environ.get("EMOTRAIN_MDS_PACKAGES") or tmp_path / "packages")
    if not target.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
        if subprocess.run([*pip, *PACKAGES], capture_output=True).returncode:
            pytest.skip("the packages of mosaicml-streaming cannot be installed here")
    sets = []
    for way, (documents, _) in WAYS.items():
        kind = way.split()[0]
        for more, columns in MORE.items():
            samples = [
                {"tokens": ids.tobytes() if kind == "bytes" else ids}
                | {n: "é" * (i % 5) if k == "str" else i for n, k in columns.items()}
                for i, ids in enumerate(documents)
            ]
            sets.append((str(tmp_path / f"{way}-{more}"), {"tokens": kind, **columns}, samples))
    np.save(tmp_path / "sets.npy", {"sets": sets}, allow_pickle=True)
    done = subprocess.run(
        [sys.executable, "-c", WRITER, target, tmp_path / "sets.npy"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for folder, columns, samples in sets:
        ours = write(Path(f"{folder}-ours"), columns, samples, 10**6, ("sha1", "sha256"))
        for name in ("shard.00000.mds", "index.json"):
            assert (Path(folder) / name).read_bytes() == (ours / name).read_bytes(), (folder, name)
