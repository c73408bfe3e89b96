"""Proves that a model of the released shapes passes through `emotrain import` and `emotrain export`
in half a gigabyte beside what one layer has, and in 4 GB, and `emotrain extract` in half a gigabyte
beside what the subset has. Its files are sparse: a few elements of
each tensor are numbers, the rest are holes, which the files that are written have too."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from emotrain.config import config_from_dict
from emotrain.interop.config_json import write_config
from emotrain.interop.layouts import links, shape_of, tensors_of
from emotrain.model.counts import parameter_counts
from emotrain.modular.artefact import Calibration, Subset, kept_of
from emotrain.subsets.extraction import config_of
from emotrain.subsets.selection import tokenizer_fingerprint
from emotrain.training.checkpoint_folders import find, identity, read_config
from tests.conftest import ROOT

SHARD_BYTES = 5_000_000_000

CHILD = """
import sys, types
import numpy as np
from emotrain import folders
from emotrain.cli import main
from emotrain.training import safetensors_file

class SparseFile:
    '''A disk that keeps zeros as holes.'''

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.truncate(self.file.tell())
        self.file.close()

    def write(self, content):
        for start in range(0, len(content), 1 << 16):
            block = content[start : start + (1 << 16)]
            if np.frombuffer(block, np.uint8).any():
                self.file.write(block)
            else:
                self.file.seek(len(block), 1)

    def __getattr__(self, name):
        return getattr(self.file, name)

safetensors_file.open = SparseFile
folders.shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 60)
code = main(sys.argv[1:])
# ru_maxrss has the peak of before the exec too, which is that of the process that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(code, int(status["VmHWM"].split()[0]) * 1024)
"""


def marks(name: str) -> np.ndarray:
    """The first elements of a tensor."""
    seed = list(name.encode())
    return np.random.default_rng(seed).standard_normal(16, dtype=np.float32)


def write_sparse(folder: Path, num_layers: int) -> list[str]:
    """A folder of the released shapes, at this depth. Returns the names of its tensors."""
    settings = {
        "vocab_size": 100278,
        "num_layers": num_layers,
        "router": {"pool": {"kind": "none"}},
    }
    config = config_from_dict({"model": settings})
    folder.mkdir()
    published = write_config(config, "published", "float32", {})
    (folder / "config.json").write_text(json.dumps(published))
    tensors = tensors_of(list(links(config.model, "published")))
    shards: list[dict[str, list[int]]] = [{}]
    end = 0
    for name, of_tensor in tensors.items():
        if end and end + 4 * prod(shape_of(of_tensor)) > SHARD_BYTES:
            shards.append({})
            end = 0
        start, end = end, end + 4 * prod(shape_of(of_tensor))
        shards[-1][name] = [start, end]
    weight_map = {}
    for number, shard in enumerate(shards):
        header = json.dumps(
            {
                name: {"dtype": "F32", "shape": shape_of(tensors[name]), "data_offsets": offsets}
                for name, offsets in shard.items()
            }
        ).encode()
        file = folder / f"model-{number:05d}.safetensors"
        with open(file, "wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for name, (start, _) in shard.items():
                stream.seek(8 + len(header) + start)
                stream.write(marks(name).tobytes())
            stream.truncate(8 + len(header) + max(end for _, end in shard.values()))
        weight_map |= dict.fromkeys(shard, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return list(tensors)


def write_subset(checkpoint: Path, file: Path) -> tuple[Path, int]:
    """A file that keeps every eighth expert, and the bytes of the checkpoint with those alone."""
    checkpoint = find(checkpoint)
    config = read_config(checkpoint)
    model = config.model
    kept = kept_of(range(0, model.experts.routed, 8), model.experts.routed, model.experts.shared)
    subset = Subset(
        experts_kept_per_layer=(kept,) * model.num_layers,
        experts_per_layer=(model.experts.routed + model.experts.shared,) * model.num_layers,
        num_shared_experts=model.experts.shared,
        method="random",
        precision="fp32",
        budget=str(len(kept)),
        checkpoint=str(checkpoint),
        checkpoint_fingerprint=identity(checkpoint),
        tokenizer_fingerprint=tokenizer_fingerprint(checkpoint),
        calibration=Calibration("none", "", 0, 0, ""),
    )
    parameters = parameter_counts(config_of(config, subset).model)["total_parameters"]
    return subset.save(file), 4 * parameters


def peak_bytes(*words: str | Path) -> int:
    """Peak resident memory of a command."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, peak = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    return int(peak)


@pytest.mark.long
@pytest.mark.timeout(10800)
@pytest.mark.parametrize("num_layers", [1, 16])
def test_the_released_shapes_pass_through_in_little_memory(tmp_path: Path, num_layers: int) -> None:
    probe = tmp_path / "probe"
    with open(probe, "wb") as file:
        file.truncate(1 << 24)
    if probe.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files; it takes 170 GB without")
    names = write_sparse(tmp_path / "folder", num_layers)
    assert num_layers < 16 or len(names) == 6259
    layer_bytes = 4 * (128 * 3 * 2048 * 1024 + 4 * 2048**2 + 130 * 2048)
    bar = min(4_000_000_000, layer_bytes + 500_000_000)
    imported = peak_bytes("import", tmp_path / "folder", "--out", tmp_path / "in")
    print(f"{num_layers} layers: import {imported / 1e9:.2f} GB", flush=True)
    assert imported <= bar
    subset, subset_bytes = write_subset(tmp_path / "in", tmp_path / "subset.json")
    extracted = peak_bytes("extract", tmp_path / "in", subset, "--out", tmp_path / "small")
    print(f"{num_layers} layers: extract {extracted / 1e9:.2f} GB", flush=True)
    assert extracted <= subset_bytes + 500_000_000
    exported = peak_bytes(
        "export", tmp_path / "in", "--out", tmp_path / "out", "--layout", "published"
    )
    print(f"{num_layers} layers: export {exported / 1e9:.2f} GB", flush=True)
    assert exported <= bar
    found = set()
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no iterator)
                part = tensors.get_slice(name)
                first = part[:16] if len(part.get_shape()) == 1 else part[0, :16]
                assert np.array_equal(first, marks(name)), name
                found.add(name)
    assert found == set(names)
