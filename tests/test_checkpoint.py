"""Checkpoints are whole or not there: killed, full disk, truncated, flipped, of another shape."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from emotrain.config import config_from_dict
from emotrain.model.transformer import Transformer
from emotrain.training import checkpoint
from emotrain.training.checkpoint import TrainingState
from emotrain.training.optimizer import build_optimizer
from tests.conftest import ROOT, tiny_settings

STATE = TrainingState(step=3, tokens=384, data_fingerprint="abc", seed=0, global_batch=4, lr=1e-3)


def setup(**model):
    settings = tiny_settings("data", "run")
    settings["model"].update(model)
    config = config_from_dict(settings)
    network = Transformer(config.model).initialize(0)
    optimizer = build_optimizer(network, config.optimizer)
    sum(p.square().sum() for p in network.parameters()).backward()
    optimizer.step()
    return config, network, optimizer


def test_save_and_restore_are_bit_exact(tmp_path):
    config, network, optimizer = setup()
    path = checkpoint.save(tmp_path, network, optimizer, config, STATE)
    _, fresh, other = setup()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    assert checkpoint.restore(path, fresh, other) == STATE
    for (name, a), b in zip(network.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name
        for moment in checkpoint.MOMENTS:
            assert torch.equal(optimizer.state[a][moment], other.state[b][moment]), (name, moment)
    loaded_config, loaded = checkpoint.load_model(tmp_path)
    assert loaded_config == config
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))


def test_old_checkpoints_go_only_after_a_newer_one_is_whole(tmp_path, monkeypatch):
    config, network, optimizer = setup()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, network, optimizer, config, TrainingState(step, 0, "", 0, 4, 0.0), keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, network, optimizer, config, TrainingState(4, 0, "", 0, 4, 0.0), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_named(file, damage, tmp_path):
    config, network, optimizer = setup()
    path = checkpoint.save(tmp_path, network, optimizer, config, STATE)
    contents = (path / file).read_bytes()
    if damage == "truncate":
        (path / file).write_bytes(contents[:-7])
    elif damage == "flip":
        (path / file).write_bytes(contents[:-9] + bytes([contents[-9] ^ 4]) + contents[-8:])
    else:
        (path / file).unlink()
    if file == "manifest.json" and damage == "remove":
        with pytest.raises(FileNotFoundError, match="no checkpoint here"):
            checkpoint.find(tmp_path)
        return
    before = [p.detach().clone() for p in network.parameters()]
    if file == "manifest.json" and damage == "flip":
        text = contents.decode().replace('"sha256": "', '"sha256": "0', 1)
        (path / file).write_text(text)
    with pytest.raises(ValueError, match="use another checkpoint") as error:
        checkpoint.restore(path, network, optimizer)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_another_shape_is_named(tmp_path):
    path = checkpoint.save(tmp_path, *setup()[1:], setup()[0], STATE)
    _, wide, optimizer = setup(d_model=32)
    with pytest.raises(ValueError, match=r"embedding\.weight is \(320, 16\) in the checkpoint and \(320, 32\) in the model"):
        checkpoint.restore(path, wide, optimizer)
    _, deep, optimizer = setup(num_layers=3)
    with pytest.raises(ValueError, match=r"blocks\.2\..* is not in the checkpoint"):
        checkpoint.restore(path, deep, optimizer)


def test_a_manifest_cannot_point_outside(tmp_path):
    config, network, optimizer = setup()
    path = checkpoint.save(tmp_path, network, optimizer, config, STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path.parent / "secret").write_text("")
    with pytest.raises(ValueError, match=r"\.\./secret is missing"):
        checkpoint.verify(path)


SAVER = """
import sys, resource
from tests.test_checkpoint import *
config, network, optimizer = setup()
for step in range(1, 10_000):
    checkpoint.save(Path(sys.argv[1]), network, optimizer, config, TrainingState(step, 0, "", 0, 4, 0.0), keep=2)
    print(step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path):
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", "from pathlib import Path\n" + SAVER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        done = int(process.stdout.readline())
        time.sleep(0.02 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split()
        process.wait()
        done = int(lines[-1]) if lines else done
        newest = checkpoint.find(tmp_path)
        checkpoint.verify(newest)
        assert checkpoint.load_state(newest).step >= done
        _, network, optimizer = setup()
        checkpoint.restore(newest, network, optimizer)


def test_a_disk_that_fills_up_leaves_older_checkpoints_and_says_so_in_one_line(tiny_data, tmp_path):
    """A limit on file size stands in for a full disk: real writes fail in the middle of a file."""
    settings = tiny_settings(tiny_data, tmp_path / "run", steps=2)
    config_file = tmp_path / "config.yaml"
    config_file.write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), str(config_file)]
    subprocess.run(command, check=True, capture_output=True)
    older = checkpoint.find(tmp_path / "run")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run([*command, "training.steps=4"], capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") == [older.name]
    checkpoint.verify(older)
