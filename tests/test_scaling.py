"""Proves of the data index that nothing of what a loader does at its start or for a window grows
with documents or with the size of shards, that it still never hands out a byte that was not
written, and that the scaling benchmark measures what it says. No time is asserted: that takes an
idle machine."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_data_formats import edit, make_dataset

from emotrain.data import checks, formats, shards
from emotrain.data.formats import Dataset
from emotrain.data.opening import open_loader
from emotrain.files import sha256_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SEQUENCE = 16
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def small_blocks(monkeypatch):
    """A block holds 32 tokens or 8 offsets."""
    monkeypatch.setattr(formats, "BLOCK_BYTES", 64)


@pytest.fixture
def folder(tmp_path, small_blocks):
    make_dataset(tmp_path / "data", shards=(60, 40), valid=0)
    return tmp_path / "data"


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _simulated

    return _simulated


def windows(folder, **options):
    """Every window of a data set: its tokens, documents and their lengths, or the error that it
    gives."""
    loader, found = open_loader(folder, SEQUENCE, 0, **options), []
    for position in range(loader.num_sequences):
        try:
            batch = loader.batch([position])
            found.append(
                (
                    batch.tokens_BS.tolist(),
                    batch.document_BS.tolist(),
                    batch.document_ids_G.tolist(),
                )
            )
        except ValueError as error:
            found.append(error)
    return found


# ---- what is read is what was written


def test_no_flipped_byte_reaches_a_batch(folder):
    """Each window is right or refused, wherever the damage is; only windows near it are refused."""
    path, right = folder / "train/shard-00001.arrow", windows(folder)
    whole, refused = path.read_bytes(), []
    for position in range(0, len(whole), 31):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        found = windows(folder)
        refused.append(sum(isinstance(one, ValueError) for one in found))
        assert all(
            isinstance(one, ValueError) or one == expected
            for one, expected in zip(found, right, strict=True)
        ), position
        assert not [
            one
            for one in found
            if isinstance(one, ValueError)
            and ("shard-00001.arrow" not in str(one) or "\n" in str(one))
        ]
    assert 0 in refused and any(0 < count < 5 for count in refused)


def test_without_checksums_damage_points_nowhere_else(folder):
    """Tokens may be wrong then, but documents fill their window, and ids lie in the vocabulary."""
    path = folder / "train/shard-00001.arrow"
    whole = path.read_bytes()
    for position in range(0, len(whole), 29):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x40]) + whole[position + 1 :])
        for one in windows(folder, verify_checksums=False):
            if not isinstance(one, ValueError):
                tokens, document_of, _ = one
                assert max(tokens[0]) < 50 and len(document_of[0]) == SEQUENCE
                assert set(np.diff(document_of[0])) <= {0, 1}


def test_a_shard_of_another_data_set_is_refused(folder, tmp_path):
    """One that is whole in itself, and agrees with the manifest in every size."""
    make_dataset(tmp_path / "other", shards=(60, 40), valid=0, seed=0)
    path = tmp_path / "other/train/shard-00000.arrow"
    batch = pa.ipc.open_file(path).get_batch(0)
    lists = batch.column("tokens")
    offsets, tokens = lists.offsets.to_numpy(), lists.values.to_numpy()
    info = shards.write_shard(
        folder / "train/shard-00000.arrow",
        tokens[::-1].copy(),
        offsets,
        batch.column("domain").to_pylist(),
        batch.column("source").to_pylist(),
    )
    assert info.bytes == Dataset(tmp_path / "other").shards["train"][0].bytes
    found = windows(folder)
    assert any(isinstance(one, ValueError) for one in found) and not all(
        isinstance(one, ValueError) for one in found
    )


def test_shards_without_checksums_of_blocks_are_hashed_as_a_whole_once(folder, monkeypatch):
    right, hashed = windows(folder), []
    edit(
        folder,
        lambda manifest: [shard.pop("sums") for shard in manifest["splits"]["train"]["shards"]],
    )
    monkeypatch.setattr(
        checks, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path)
    )
    assert windows(folder) == right
    assert sorted(hashed) == ["shard-00000.arrow", "shard-00001.arrow"]


@pytest.mark.parametrize("sums", [3, "abc", None])
def test_untrusted_checksums_are_refused(folder, sums):
    edit(folder, lambda manifest: manifest["splits"]["train"]["shards"][0].update(sums=sums))
    with pytest.raises(
        ValueError, match=r"has sums=.* for train/shard-00000.arrow, they must be 64 digits or none"
    ):
        Dataset(folder)


def test_links_inside_are_followed_and_links_out_refused(folder, tmp_path):
    right = windows(folder)
    (folder / "train/shard-00000.arrow").rename(folder / "moved.arrow")
    (folder / "train/shard-00000.arrow").symlink_to(folder / "moved.arrow")
    assert windows(folder) == right
    (folder / "train").rename(tmp_path / "outside")
    (folder / "train").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="leads out of the data set"):
        Dataset(folder)


# ---- what does not grow


def test_a_window_reads_neither_its_shard_nor_its_documents(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("all of a shard was read")

    hashed, block_sums = [], formats.block_sums
    monkeypatch.setattr(formats, "check_checksum", refuse)
    monkeypatch.setattr(formats, "check_contents", refuse)
    monkeypatch.setattr(
        formats, "block_sums", lambda values: hashed.append(values.nbytes) or block_sums(values)
    )
    loader = open_loader(folder, SEQUENCE, 0)
    assert loader.fingerprint and hashed == []
    loader.batch(range(loader.num_sequences))
    # 16 tokens of 2 bytes: a block or two; their offsets: at most 18 of 8 bytes, in up to 4 blocks.
    assert max(hashed) <= 4 * 64 and len(hashed) == 2 * loader.num_sequences


def test_few_shards_stay_open(tmp_path):
    make_dataset(tmp_path / "data", shards=[8] * (formats.MAX_OPEN_SHARDS + 9), valid=0)
    loader = open_loader(tmp_path / "data", SEQUENCE, 0)
    loader.batch(range(loader.num_sequences))
    assert len(loader.source.store.dataset._open) == formats.MAX_OPEN_SHARDS


def test_the_first_missing_shard_of_many_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "STAT_CHUNK", 4)
    make_dataset(tmp_path / "data", shards=[2] * 40, valid=0)
    for number in (37, 21, 22):
        (tmp_path / f"data/train/shard-{number:05d}.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="shard-00021.arrow: shard is missing"):
        Dataset(tmp_path / "data")


def bytes_made(start):
    """The most bytes that Python, NumPy and Arrow held for what `start` makes."""
    pool = pa.default_memory_pool()
    tracemalloc.start()
    try:
        before = pool.bytes_allocated()
        made = start()
        assert made.fingerprint
        return tracemalloc.get_traced_memory()[1] + pool.bytes_allocated() - before
    finally:
        tracemalloc.stop()


@linux
def test_starting_reads_the_manifest_and_no_shard(tmp_path, simulated):
    """A hundred times the documents, or 16 times the tokens, in as many shards: the same start,
    but for digits in the manifest."""
    read = {}
    for name, tokens, document in (
        ("long", 2**16, 400),
        ("short", 2**16, 4),
        ("large", 2**20, 400),
    ):
        infos = simulated.write_shards(tmp_path / name / "distinct", tokens, document, distinct=1)
        size = simulated.link_index(
            tmp_path / name / "distinct", infos, tmp_path / name / "data", num_shards=50
        )
        assert size["shards"] == 50 and size["tokens"] == 50 * tokens
        run = simulated.in_fresh_process(
            "start_loader",
            folder=str(tmp_path / name / "data"),
            sequence_length=64,
            first_step=10**9,
            steps=2,
            global_batch=16,
            sequences=2,
        )
        read[name] = run["start_read_bytes"]
        assert read[name] < size["manifest_bytes"] + 10_000
        # 8 MB would be the least that arrays over all documents of "short" take.
        assert bytes_made(lambda data=tmp_path / name / "data": open_loader(data, 64, 0)) < 4 << 20
    assert max(read.values()) - min(read.values()) < 50 * 20


# ---- the benchmark


def measure(*options):
    done = subprocess.run(
        [
            sys.executable,
            BENCHMARKS / "scaling.py",
            "--json",
            "--threads",
            "1",
            "--repeats",
            "1",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TINY = """
model: {d_model: 16, num_layers: 2, num_heads: 2, vocab_size: 64,
        experts: {routed: 8, shared: 1, top_k: 2, hidden: 16},
        router: {pool: {kind: uniform, min: 2, max: 8}}}
data: {sequence_length: 64}
training: {global_batch: 16, micro_batch: 2, steps: 1, run_dir: runs/tiny}
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "tiny.yaml").write_text(TINY)
    options = {
        "--shards": "3 30",
        "--shard-tokens": "65536",
        "--sequence-length": "64",
        "--global-batch": "16",
        "--sequences": "2",
        "--steps": "2",
        "--ranks": "8",
        "--numbers": "100",
        "--gpus": "2 4",
        "--ep": "1 2",
        "--jobs": "1",
        "--config": str(folder / "tiny.yaml"),
    }
    words = [word for option, values in options.items() for word in (option, *values.split())]
    done = subprocess.run(
        [
            sys.executable,
            BENCHMARKS / "scaling.py",
            "--json",
            "--threads",
            "1",
            "--repeats",
            "1",
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@linux
@pytest.mark.long
def test_benchmark_of_the_index(result):
    assert result["index_tokens"] == 30 * 65536 and result["index_shards"] == 30
    for key in (
        "loader_start_seconds",
        "loader_start_peak_mib",
        "loader_first_batch_seconds",
        "loader_first_batch_peak_mib",
        "loader_total_seconds",
        "loader_total_peak_mib",
        "loader_resume_seconds",
        "loader_start_read_bytes",
    ):
        assert result[key] > 0, key
    assert (
        result["loader_start_seconds"]
        < result["loader_first_batch_seconds"]
        < result["loader_total_seconds"]
    )
    assert set(result["loader_by_shards"]) == {"3", "30"}


@linux
@pytest.mark.long
def test_benchmark_of_the_job(result):
    """The parts of all ranks tile the tensors, or reading their index back would have failed."""
    assert result["manifest_ranks"] == 8 and result["manifest_files"] == 2 * 8 + 4
    assert result["manifest_tensor_bytes"] == 3 * 4 * result["initial_values"]
    assert result["manifest_parts"] > 8 * 3 and result["manifest_bytes"] > 0
    for key in (
        "manifest_plan_seconds",
        "manifest_seconds",
        "manifest_read_seconds",
        "manifest_load_plan_seconds",
        "meshes_seconds",
        "parallelize_seconds",
        "initial_values_per_cpu_second",
        "initial_values_rate_in_that_of_trunc_normal",
        "initial_values_extrapolated_cpu_seconds",
    ):
        assert result[key] > 0, key


@linux
@pytest.mark.long
def test_benchmark_of_the_plan(result):
    rows = {(row["batch"], row["gpus"], row["ep"]): row for row in result["plan"]}
    assert set(rows) == {
        (batch, gpus, ep) for batch in ("global", "per_gpu") for gpus in (2, 4) for ep in (1, 2)
    }
    assert rows["global", 2, 1]["micro_batches"] == 4 and rows["global", 4, 1]["micro_batches"] == 2
    assert rows["per_gpu", 4, 1]["global_batch"] == 8
    for row in rows.values():
        assert (
            row["communication_bytes_by_axis"]
            and row["tokens_per_second_per_gpu"] > 0
            and row["peak_gib"] > 0
        )


@linux
def test_layouts_that_cannot_be_say_why(simulated, tmp_path):
    import scaling

    (tmp_path / "tiny.yaml").write_text(TINY)
    row = scaling._plan_case((str(tmp_path / "tiny.yaml"), "h100-80gb", "global", 2, 3, 16))
    assert "does not divide" in row["impossible"]
    assert row["impossible"] in scaling.plan_tables([row])
