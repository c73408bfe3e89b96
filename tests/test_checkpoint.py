"""Checkpoints of one process: exact, whole or not there, old ones gone only after, and whatever is
wrong with one said in one line.

Layouts of several processes are in test_checkpoint_layouts.py, kill -9 and full disks in
test_checkpoint_kills.py.
"""

from __future__ import annotations

import errno
import json
import os
import pickletools
import shutil
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from emotrain.commands import verify as verify_command
from emotrain.config import config_from_dict
from emotrain.files import sha256_of
from emotrain.model.transformer import Transformer
from emotrain.training import checkpoint, tensor_files
from emotrain.training.checkpoint import CheckpointWriter, TrainingState
from emotrain.training.optimizer import build_optimizer
from tests.conftest import tiny_settings

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = TrainingState(step=3, tokens=384, data_fingerprint="abc", seed=0, global_batch=4, lr=1e-3)


def setup(updates: int = 1, **model):
    settings = tiny_settings("data", "run")
    settings["model"].update(model)
    config = config_from_dict(settings)
    network = Transformer(config.model).initialize(0)
    optimizer = build_optimizer(network, config.optimizer)
    for _ in range(updates):
        sum(p.square().sum() for p in network.parameters()).backward()
        optimizer.step()
    return config, network, optimizer


def at_step(step: int) -> TrainingState:
    return TrainingState(step, 0, "", 0, 4, 0.0)


def names(run_dir) -> list[str]:
    return sorted(os.listdir(run_dir / "checkpoints"))


def assert_same(a, b, optimizer_a, optimizer_b) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert optimizer_a.state[p].keys() == optimizer_b.state[q].keys()
        for key, value in optimizer_a.state[p].items():
            assert torch.equal(value, optimizer_b.state[q][key]), (key, name)


@pytest.mark.parametrize("updates", [0, 1, 3])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_save_and_restore_are_bit_exact(asynchronous, updates, tmp_path):
    config, network, optimizer = setup(updates)
    with CheckpointWriter(tmp_path, asynchronous=asynchronous) as writer:
        writer.save(network, optimizer, config, STATE)
    _, fresh, other = setup()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    assert checkpoint.restore(writer.last.path, fresh, other) == STATE
    assert_same(network, fresh, optimizer, other)
    loaded_config, loaded = checkpoint.load_model(tmp_path)
    assert loaded_config == config
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True)
    )
    assert writer.last.bytes == (3 if updates else 1) * sum(p.nbytes for p in network.parameters())
    assert writer.last.step == 3 and writer.last.write_s > 0 and writer.last.snapshot_s > 0


def test_training_on_after_a_restore_is_bit_exact(tmp_path):
    config, network, optimizer = setup()
    path = checkpoint.save(tmp_path, network, optimizer, config, STATE)
    _, fresh, other = setup(updates=0)
    checkpoint.restore(path, fresh, other)
    for model, own in ((network, optimizer), (fresh, other)):
        model.zero_grad()
        sum(p.square().sum() for p in model.parameters()).backward()
        own.step()
    assert_same(network, fresh, optimizer, other)


def test_what_is_saved_is_what_was_there_when_save_returned(tmp_path, monkeypatch):
    """Training goes on while the files are written, and the next save waits."""
    config, network, optimizer = setup()
    go_on, write_file = threading.Event(), tensor_files._write_file
    monkeypatch.setattr(
        tensor_files, "_write_file", lambda *args: go_on.wait(30) and write_file(*args)
    )
    before = [p.detach().clone() for p in network.parameters()]
    with CheckpointWriter(tmp_path, asynchronous=True) as writer:
        writer.save(network, optimizer, config, at_step(1))
        sum(p.square().sum() for p in network.parameters()).backward()
        optimizer.step()
        assert writer.last is None and not checkpoint.list_checkpoints(tmp_path)
        go_on.set()
        writer.save(network, optimizer, config, at_step(2))
        assert writer.last.step == 1
    first, second = (
        checkpoint.load_model(path)[1] for path in checkpoint.list_checkpoints(tmp_path)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, first.parameters(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), second.parameters(), strict=True)
    )
    assert not torch.equal(first.head.weight, second.head.weight)


def test_files_are_read_by_others_whole_or_in_slices_and_none_is_a_pickle(tmp_path):
    config, network, optimizer = setup()
    path = checkpoint.save(tmp_path, network, optimizer, config, STATE)
    tensors = load_file(path / "model-00000.safetensors")
    assert tensors.keys() == dict(network.named_parameters()).keys()
    with safe_open(path / "model-00000.safetensors", framework="pt") as file:
        assert torch.equal(
            file.get_slice("blocks.1.moe.experts.down_NHD")[2:4],
            network.blocks[1].moe.experts.down_NHD[2:4],
        )
    moments = load_file(path / "optimizer-00000.safetensors")
    assert torch.equal(
        moments["exp_avg.head.weight"], optimizer.state[network.head.weight]["exp_avg"]
    )
    for file in path.iterdir():
        with pytest.raises(ValueError, match="opcode|at position|pickle"):
            list(pickletools.genops(file.read_bytes()))


def test_moments_that_do_not_fit_one_count_of_updates_are_not_saved(tmp_path):
    config, network, optimizer = setup()
    optimizer.state[network.head.weight]["step"] += 1
    with pytest.raises(ValueError, match=r"updated \[1\.0, 2\.0\] times"):
        checkpoint.save(tmp_path, network, optimizer, config, STATE)
    del optimizer.state[network.head.weight]
    with pytest.raises(ValueError, match=r"head\.weight has never been updated"):
        checkpoint.save(tmp_path, network, optimizer, config, STATE)
    assert not checkpoint.list_checkpoints(tmp_path)


# ---- old and new


def fail(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("on_error", ["stop", "warn"])
@pytest.mark.parametrize(
    "place",
    [
        "emotrain.folders.shutil.disk_usage",
        "emotrain.training.tensor_files._write_file",
        "emotrain.training.checkpoint_folders.save_config",
        "emotrain.folders.flush_to_disk",
        "emotrain.folders.os.rename",
    ],
)
def test_old_checkpoints_go_only_after_a_newer_one_is_whole(
    place, on_error, tmp_path, monkeypatch, caplog
):
    config, network, optimizer = setup()
    writer = CheckpointWriter(tmp_path, keep=2, on_error=on_error)
    for step in (1, 2, 3):
        writer.save(network, optimizer, config, at_step(step))
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        expected = (
            f"{tmp_path}/checkpoints/step-00000004: could not be written (No space left on "
            f"device); "
            f"the last whole checkpoint is {tmp_path}/checkpoints/step-00000003"
        )
        if on_error == "stop":
            with pytest.raises(OSError) as error:
                writer.save(network, optimizer, config, at_step(4))
            assert (
                str(error.value)
                == f"{expected}; free space or choose another training.run_dir, and start again"
            )
        else:
            writer.save(network, optimizer, config, at_step(4))
            assert [
                record.getMessage() for record in caplog.records if record.name == "emotrain"
            ] == [f"{expected}; training goes on (training.on_checkpoint_error=warn)"]
    assert names(tmp_path) == ["step-00000002", "step-00000003"] and writer.last.step == 3
    writer.save(network, optimizer, config, at_step(5))
    assert names(tmp_path) == ["step-00000003", "step-00000005"]


def test_a_checkpoint_that_cannot_fit_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    config, network, optimizer = setup()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_345))
    with pytest.raises(
        OSError,
        match=r"\(it needs 0\.\d MB and 0\.0 MB are free\); there is no earlier one; free "
        r"space",
    ):
        checkpoint.save(tmp_path, network, optimizer, config, STATE)
    assert names(tmp_path) == []


def test_an_unwritable_folder_is_said_in_one_line(tmp_path):
    """A file where the folder should be: unlike missing permissions, root cannot write there
    either."""
    config, network, optimizer = setup()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(
        OSError,
        match=r"could not be written \(File exists: .*/checkpoints\); there is no earlier one",
    ) as error:
        checkpoint.save(tmp_path, network, optimizer, config, STATE)
    assert "\n" not in str(error.value)


def test_the_error_of_an_asynchronous_save_comes_once_at_the_next_call(tmp_path, monkeypatch):
    config, network, optimizer = setup()
    writer = CheckpointWriter(tmp_path, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "_write_file", fail)
        writer.save(network, optimizer, config, at_step(1))
        writer._thread.join()
    with pytest.raises(OSError, match="could not be written"):
        writer.save(network, optimizer, config, at_step(2))
    assert writer.wait() is None
    writer.save(network, optimizer, config, at_step(2))
    assert writer.wait().step == 2
    # An error on the way out of a run does not hide the one that ended it.
    monkeypatch.setattr(tensor_files, "_write_file", fail)
    with pytest.raises(KeyError, match="reason"), writer:
        writer.save(network, optimizer, config, at_step(3))
        raise KeyError("reason")
    with pytest.raises(OSError, match="could not be written"), writer:
        writer.save(network, optimizer, config, at_step(3))


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path):
    """Checkpoints of later steps, from before it went back, are not taken for newer ones; the
    same step is replaced."""
    config, network, optimizer = setup()
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (10, 20, 30):
        writer.save(network, optimizer, config, at_step(step))
    writer.save(network, optimizer, config, at_step(25))
    assert names(tmp_path) == ["step-00000020", "step-00000025", "step-00000030"]
    network.head.weight.data.zero_()
    writer.save(network, optimizer, config, at_step(30))
    assert names(tmp_path) == ["step-00000025", "step-00000030"]
    assert not checkpoint.load_model(tmp_path)[1].head.weight.any()


def test_leftovers_are_no_checkpoints_and_go_with_the_next_save(tmp_path):
    config, network, optimizer = setup()
    checkpoint.save(tmp_path, network, optimizer, config, at_step(1))
    for name in (".step-00000002.partial", ".step-00000000.removed"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / ".step-notes").write_text("mine")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]
    checkpoint.save(tmp_path, network, optimizer, config, at_step(3))
    assert names(tmp_path) == [".step-notes", "step-00000001", "step-00000003"]


# ---- damage


FILES = [
    "model-00000.safetensors",
    "optimizer-00000.safetensors",
    "tensors.json",
    "state.json",
    "config.yaml",
    "manifest.json",
]


@pytest.mark.parametrize("file", FILES)
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
    if file == "manifest.json" and damage == "flip":
        (path / file).write_text(contents.decode().replace('"sha256": "', '"sha256": "0', 1))
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(ValueError, match="use another checkpoint") as error:
        checkpoint.restore(path, network, optimizer)
    assert "\n" not in str(error.value) and (file in str(error.value) or damage == "flip")
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    if file == "optimizer-00000.safetensors" and damage == "flip":
        checkpoint.load_model(path)  # reads none of it
    else:
        with pytest.raises(
            (ValueError, FileNotFoundError), match="use another checkpoint|no checkpoint here"
        ):
            checkpoint.load_model(path)


def edit(path, name, change) -> None:
    """Change a JSON file of a checkpoint, and make its manifest agree: as one who means harm
    would."""
    values = json.loads((path / name).read_text())
    changed = change(values)
    (path / name).write_text(json.dumps(values if changed is None else changed))
    if name != "manifest.json":
        entry = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
        edit(path, "manifest.json", lambda manifest: manifest["files"].update({name: entry}))


def head(index) -> dict:
    return index["tensors"]["head.weight"]


HOSTILE = {
    "outside": (
        "manifest.json",
        lambda m: m["files"].update({"../secret": {"bytes": 0, "sha256": ""}}),
        r"'\.\./secret' is not the name",
    ),
    "absolute": (
        "manifest.json",
        lambda m: m["files"].update({"/etc/passwd": {"bytes": 0, "sha256": ""}}),
        "passwd' is not the name",
    ),
    "backslash": (
        "manifest.json",
        lambda m: m["files"].update({"..\\x": {"bytes": 0, "sha256": ""}}),
        "is not the name of a file",
    ),
    "dots": (
        "manifest.json",
        lambda m: m["files"].update({"..": {"bytes": 0, "sha256": ""}}),
        r"'\.\.' is not the name",
    ),
    "a list": ("manifest.json", lambda m: [1, 2], "manifest.json is not readable"),
    "files a list": (
        "manifest.json",
        lambda m: m.update(files=["config.yaml"]),
        "manifest.json is not readable",
    ),
    "size a text": (
        "manifest.json",
        lambda m: m["files"]["config.yaml"].update(bytes="12"),
        "size and checksum of 'config.yaml' are '12'",
    ),
    "size a flag": (
        "manifest.json",
        lambda m: m["files"]["config.yaml"].update(bytes=True),
        "are True and",
    ),
    "checksum none": (
        "manifest.json",
        lambda m: m["files"]["config.yaml"].update(sha256=None),
        "and None",
    ),
    "other format": ("manifest.json", lambda m: m.update(format=1), "format 1 is not 2"),
    "no state": (
        "manifest.json",
        lambda m: m["files"].pop("state.json") and None,
        r"state\.json is not in its manifest",
    ),
    "no files": (
        "manifest.json",
        lambda m: m.update(files={}),
        r"tensors\.json is not in its manifest",
    ),
    "elsewhere": (
        "tensors.json",
        lambda i: head(i)["parts"][0].update(file="../../x.safetensors"),
        "head.weight .*not a file of this",
    ),
    "file a number": (
        "tensors.json",
        lambda i: head(i)["parts"][0].update(file=3),
        "head.weight .*not a file of this",
    ),
    "file a list": (
        "tensors.json",
        lambda i: head(i)["parts"][0].update(file=[]),
        "head.weight cannot be read",
    ),
    "negative": (
        "tensors.json",
        lambda i: head(i)["parts"][0].update(offsets=[-1, 0]),
        "head.weight .*not a list of sizes",
    ),
    "fewer axes": (
        "tensors.json",
        lambda i: head(i)["parts"][0].update(offsets=[0]),
        "head.weight .*do not tile",
    ),
    "gap": (
        "tensors.json",
        lambda i: head(i)["parts"][0].update(shape=[319, 16]),
        "head.weight .*do not tile",
    ),
    "late start": (
        "tensors.json",
        lambda i: head(i)["parts"][0].update(shape=[319, 16], offsets=[1, 0]),
        "head.weight .*do not tile",
    ),
    "no parts": ("tensors.json", lambda i: head(i).update(parts=[]), "head.weight .*do not tile"),
    "twice": (
        "tensors.json",
        lambda i: head(i)["parts"].append(head(i)["parts"][0]),
        "head.weight .*do not tile",
    ),
    "object type": (
        "tensors.json",
        lambda i: head(i).update(dtype="O"),
        "head.weight cannot be read",
    ),
    "index a list": ("tensors.json", lambda i: [], "tensors.json is not readable"),
    "other dtype": (
        "tensors.json",
        lambda i: head(i).update(dtype="F64"),
        r"head\.weight is torch\.float64 in the checkpoint and",
    ),
    "wrong file": (
        "tensors.json",
        lambda i: head(i)["parts"][0].update(file="config.yaml"),
        r"config\.yaml: not readable",
    ),
    "other tensor": (
        "tensors.json",
        lambda i: head(i)["parts"][0].update(file="optimizer-00000.safetensors"),
        "optimizer-.*not readable",
    ),
    "surplus": (
        "tensors.json",
        lambda i: i["tensors"].update(more=head(i)),
        "more is not in the model",
    ),
    "step a text": ("state.json", lambda s: s.update(step="3"), "step='3' is not of type int"),
    "lr none": ("state.json", lambda s: s.update(lr=None), "lr=None is not of type float"),
    "unknown": ("state.json", lambda s: s.update(more=1), "state.json is not readable"),
    "updates none": (
        "state.json",
        lambda s: s.pop("num_updates") and None,
        "state.json is not readable .'num_updates'",
    ),
    "state a list": ("state.json", lambda s: [], "state.json is not readable"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(case, tmp_path):
    """What is checked is not only damage: a checkpoint comes from elsewhere, checksums and all."""
    config, network, optimizer = setup()
    path = checkpoint.save(tmp_path, network, optimizer, config, STATE)
    (path.parent / "secret").write_text("")
    name, change, message = HOSTILE[case]
    edit(path, name, change)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.restore(path, network, optimizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["manifest.json", "tensors.json", "state.json"])
def test_json_that_nests_without_end_is_refused(name, tmp_path):
    config, network, optimizer = setup()
    path = checkpoint.save(tmp_path, network, optimizer, config, STATE)
    deep = "[" * 100_000
    (path / name).write_text(deep)
    if name != "manifest.json":
        entry = {"bytes": len(deep), "sha256": sha256_of(path / name)}
        edit(path, "manifest.json", lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(ValueError, match=f"{name} is not readable"):
        checkpoint.restore(path, network, optimizer)


def test_another_shape_is_named(tmp_path):
    path = checkpoint.save(tmp_path, *setup()[1:], setup()[0], STATE)
    _, wide, optimizer = setup(d_model=32)
    with pytest.raises(
        ValueError,
        match=r"embedding\.weight is \(320, 16\) in the checkpoint and \(320, 32\) in the model; "
        r"use the conf",
    ):
        checkpoint.restore(path, wide, optimizer)
    _, deep, optimizer = setup(num_layers=3)
    with pytest.raises(ValueError, match=r"blocks\.2\..* is not in the checkpoint"):
        checkpoint.restore(path, deep, optimizer)
    _, shallow, optimizer = setup(num_layers=1)
    with pytest.raises(ValueError, match=r"blocks\.1\..* is not in the model"):
        checkpoint.restore(path, shallow, optimizer)


# ---- emotrain verify


def run_verify(capsys, *arguments) -> tuple[int, str]:
    import argparse

    parser = argparse.ArgumentParser()
    verify_command.add_arguments(parser)
    code = verify_command.run(parser.parse_args([str(argument) for argument in arguments]))
    return code, capsys.readouterr().out


def test_verify_says_of_each_checkpoint_whether_it_is_whole(tmp_path, capsys):
    config, network, optimizer = setup()
    paths = [
        checkpoint.save(tmp_path, network, optimizer, config, at_step(step)) for step in (1, 2, 3)
    ]
    assert run_verify(capsys, tmp_path) == (
        0,
        "".join(f"{path}: whole, 0.2 MB\n" for path in paths),
    )
    partial = tmp_path / "checkpoints" / ".step-00000004.partial"
    partial.mkdir()
    contents = (paths[0] / "model-00000.safetensors").read_bytes()
    (paths[0] / "model-00000.safetensors").write_bytes(contents[:-1])
    (paths[1] / "manifest.json").unlink()
    code, text = run_verify(capsys, tmp_path)
    assert code == 1
    first, second, third, left = text.splitlines()
    size = len(contents)
    assert (
        first == f"damaged: {paths[0]}/model-00000.safetensors: {size - 1} bytes where {size} were "
        f"written; use another checkpoint"
    )
    assert (
        second.startswith(f"damaged: {paths[1]}: its manifest.json is not readable")
        and third == f"{paths[2]}: whole, 0.2 MB"
    )
    assert (
        left
        == f"{partial}: left by a process that was killed; the run's next checkpoint removes it"
        and partial.is_dir()
    )
    code, text = run_verify(capsys, paths[2], paths[0], "--json")
    result = json.loads(text)
    assert (
        code == 1
        and not result["whole"]
        and [entry["whole"] for entry in result["checkpoints"]] == [True, False]
    )
    assert result["checkpoints"][0] == {
        "path": str(paths[2]),
        "whole": True,
        "error": None,
        "bytes": sum(file.stat().st_size for file in paths[2].iterdir()),
    }
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        run_verify(capsys, tmp_path / "checkpoints" / "elsewhere")
