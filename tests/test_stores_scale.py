"""Proves that opening data takes as long as there are files, and not as long as they are: a few
looks at each, and for a trillion tokens seconds and little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_stores_plain import RAW, documents, write

from emotrain.config import RawTokensConfig
from emotrain.data.opening import open_store
from tests.conftest import ROOT

PROGRAM = """
import json, resource, sys, time
from emotrain.config import RawTokensConfig
from emotrain.data.loader import Loader, StreamWindows
from emotrain.data.opening import open_store

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

raw = RawTokensConfig(vocab_size=100_278, eos_id=0)
before, started = resident(), time.perf_counter()
store = open_store(sys.argv[1], raw=raw)
loader = Loader(StreamWindows(store, 4096), seed=0)
identity = loader.fingerprint
seconds = time.perf_counter() - started
found = {"seconds": seconds, "megabytes": resident() - before, "tokens": loader.num_tokens}
print(json.dumps(found))
"""


def opened(path: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


def test_a_few_looks_at_every_file(tmp_path, monkeypatch):
    counts = {"stat": 0, "pread": 0}

    def counting(name):
        real = getattr(os, name)

        def counted(*args, **options):
            counts[name] += str(args[0]).endswith(".npy") or name == "pread"
            return real(*args, **options)

        return counted

    tokens = documents(400)
    for number in range(40):
        write(tmp_path / f"{number:02d}.npy", tokens)
    for name in counts:
        monkeypatch.setattr(os, name, counting(name))
    open_store(tmp_path, raw=RAW)
    assert counts["stat"] == 40 and counts["pread"] <= 4 * 40


@pytest.mark.long
def test_a_trillion_tokens_open_in_seconds(tmp_path):
    """2,500 files of 400 million tokens, which are zeros that the disk does not hold."""
    for number in range(2500):
        with open(tmp_path / f"part-{number:04d}.npy", "wb") as file:
            file.truncate(4 * 400_000_000)
    opened(tmp_path)  # the cache of the file system
    found = opened(tmp_path)
    assert found["tokens"] == 10**12
    assert found["seconds"] < 2 and found["megabytes"] < 200


@pytest.mark.long
def test_eight_thousand_shards_open_in_seconds(tmp_path):
    """Of a prepared data set; opening reads no shard."""
    shards = [
        {
            "file": f"train/shard-{number:05d}.arrow", "documents": 200_000, "tokens": 2**27,
            "bytes": 2**29 + 2**24, "sha256": f"{number:064d}", "sums": f"{number:064d}",
        }
        for number in range(8000)
    ]  # fmt: skip
    total = {"documents": 200_000 * 8000, "tokens": 2**27 * 8000}
    splits = {
        "train": {"shards": shards, "domains": {"web": total}},
        "valid": {"shards": [], "domains": {}},
    }
    manifest = {
        "format": "emotrain-dataset", "format_version": 1, "vocab_size": 100_278, "eos_id": 0,
        "eos_token": "E", "dtype": "uint32", "tokenizer": "tokenizer.json", "tokenizer_sha256": "",
        "splits": splits, "skipped_documents": {}, "settings": {},
    }  # fmt: skip
    (tmp_path / "train").mkdir()
    for shard in shards:
        with open(tmp_path / shard["file"], "wb") as file:
            file.truncate(shard["bytes"])
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    opened(tmp_path)
    found = opened(tmp_path)
    assert found["tokens"] == 2**27 * 8000 > 10**12
    assert found["seconds"] < 2 and found["megabytes"] < 200


def test_a_window_of_a_huge_file(tmp_path):
    """Far beyond what 32-bit places could name."""
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        file.write(np.array([7], "<u4").tobytes())
        file.truncate(4 * 6 * 10**9)
        file.seek(4 * 5 * 10**9)
        file.write(np.array([7, 9, 9, 7, 9], "<u4").tobytes())
    store = open_store(path, raw=RawTokensConfig(vocab_size=100_278, eos_id=7))
    window = store.window(0, 5 * 10**9 - 1, 5 * 10**9 + 5)
    assert window.tokens.tolist() == [0, 7, 9, 9, 7, 9]
    assert window.lengths.tolist() == [2, 3, 1]
    assert window.ids.tolist() == [5 * 10**9 - 1, 5 * 10**9 + 1, 5 * 10**9 + 4]
