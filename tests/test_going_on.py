"""What a run goes on from, whoever stops it and however often: its own newest checkpoint, never one
of another branch, never step 0 over a run that is there; and that nobody else writes to its folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.distributed.joining import join
from emotrain.distributed.ranks import Ranks
from emotrain.errors import DivergedError, RunError, UserError
from emotrain.training import checkpoint, start
from emotrain.training import run as run_module
from emotrain.training.metrics import MetricsWriter
from tests.conftest import tiny_settings


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="emotrain")
    return caplog


def train(settings: dict) -> dict:
    return run_module.train(config_from_dict(settings))


def stopped_after(settings: dict, step: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Train until the run is asked to stop in this step."""
    asked = iter([False] * (step - 1 - settings_step(settings)) + [True])

    class Requests:
        def __enter__(self):
            return lambda: next(asked)

        def __exit__(self, *_):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_stop_requests", Requests)
        return train(settings)


def settings_step(settings: dict) -> int:
    """The step that a run with these settings goes on from."""
    source = start._find_source(config_from_dict(settings))
    return 0 if source is None else checkpoint.load_state(source.path).step


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def steps_of(run_dir: Path) -> list[int]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


# ---- a start checkpoint


def test_the_run_s_own_checkpoints_win_over_the_one_it_began_from(
    tiny_data, tmp_path, monkeypatch, said
):
    """The same command goes on, however often it is stopped, and ends where one run would."""
    train(tiny_settings(tiny_data, tmp_path / "base", steps=4))
    begin = str(tmp_path / "base/checkpoints/step-00000004")
    command = tiny_settings(tiny_data, tmp_path / "tuned", steps=9, resume=begin)
    assert stopped_after(command, 6, monkeypatch)["step"] == 6
    assert stopped_after(command, 8, monkeypatch)["step"] == 8
    assert f"tuned/checkpoints/step-00000006 has gone on from {begin} since" in said.text
    assert train(command)["step"] == 9
    assert steps_of(tmp_path / "tuned") == [5, 6, 7, 8, 9]
    train(tiny_settings(tiny_data, tmp_path / "once", steps=9, resume=begin))
    assert steps_of(tmp_path / "once") == [5, 6, 7, 8, 9]
    ours, once = (
        checkpoint.load_model(tmp_path / name)[1].state_dict() for name in ("tuned", "once")
    )
    assert all(torch.equal(ours[name], once[name]) for name in ours)


def test_another_start_begins_again(tiny_data, tmp_path):
    """Checkpoints that began elsewhere are not this branch's."""
    for name in ("one", "two"):
        seeded = tiny_settings(tiny_data, tmp_path / name, steps=2)
        seeded["optimizer"]["lr"] = 1e-2 if name == "one" else 2e-2
        train(seeded)
    begin = {name: str(tmp_path / name / "checkpoints/step-00000002") for name in ("one", "two")}
    train(tiny_settings(tiny_data, tmp_path / "run", steps=4, resume=begin["one"]))
    assert settings_step(tiny_settings(tiny_data, tmp_path / "run", resume=begin["one"])) == 4
    assert settings_step(tiny_settings(tiny_data, tmp_path / "run", resume=begin["two"])) == 2


def test_going_back_sets_later_checkpoints_aside(tiny_data, tmp_path, monkeypatch, said):
    run_dir = tmp_path / "run"
    train(tiny_settings(tiny_data, run_dir, steps=6, checkpoint_every=2, keep_checkpoints=0))
    back = str(run_dir / "checkpoints/step-00000002")
    command = tiny_settings(tiny_data, run_dir, steps=6, resume=back, keep_checkpoints=0)
    command["optimizer"]["lr"] = 1e-3
    assert stopped_after(command, 3, monkeypatch)["step"] == 3
    assert names(run_dir) == [
        "step-00000002",
        "step-00000003",
        "step-00000004.set-aside-1",
        "step-00000006.set-aside-1",
    ]
    assert "goes back to step 2" in said.text and "step-00000006.set-aside-1 is kept" in said.text
    assert checkpoint.find(run_dir).name == "step-00000003", "what `evaluate RUN` takes"
    auto = tiny_settings(tiny_data, run_dir, steps=6, keep_checkpoints=0)
    auto["optimizer"]["lr"] = 1e-3
    assert train(auto)["step"] == 6
    assert steps_of(run_dir) == [1, 2, 3, 4, 5, 6]
    train({**command})
    assert names(run_dir)[-1] == "step-00000006.set-aside-1", "nothing of the branch is set aside"


def test_an_anneal_goes_on_from_its_own_checkpoints(tiny_data, tmp_path, monkeypatch):
    train(tiny_settings(tiny_data, tmp_path / "base", steps=4))
    command = tiny_settings(tiny_data, tmp_path / "anneal", steps=0)
    command["anneal"] = {"checkpoint": str(tmp_path / "base"), "tokens": 6 * 4 * 32}
    assert stopped_after(command, 7, monkeypatch)["step"] == 7
    assert train(command)["step"] == 10
    assert steps_of(tmp_path / "anneal") == [5, 6, 7, 8, 9, 10]


# ---- checkpoints that are not whole


@pytest.mark.parametrize("damage", ["no manifest", "empty folder"])
def test_a_run_without_a_whole_checkpoint_does_not_start_at_zero(damage, tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    train(tiny_settings(tiny_data, run_dir, steps=2))
    folder = run_dir / "checkpoints/step-00000002"
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="step-00000002: not a whole checkpoint .*move it away"):
        train(tiny_settings(tiny_data, run_dir, steps=4))
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_an_older_whole_checkpoint_is_taken_and_said(tiny_data, tmp_path, said):
    run_dir = tmp_path / "run"
    train(tiny_settings(tiny_data, run_dir, steps=4, checkpoint_every=2))
    (run_dir / "checkpoints/step-00000004/manifest.json").unlink()
    assert train(tiny_settings(tiny_data, run_dir, steps=4))["step"] == 4
    assert "step-00000004: not a whole checkpoint" in said.text
    assert "the newest whole one is" in said.text and steps_of(run_dir) == [1, 2, 3, 4]


def test_a_damaged_newest_checkpoint_names_the_one_before(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    train(tiny_settings(tiny_data, run_dir, steps=4, checkpoint_every=2))
    file = run_dir / "checkpoints/step-00000004/model-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(
        UserError, match=r"training.resume=.*step-00000002 goes back to the one bef"
    ):
        train(tiny_settings(tiny_data, run_dir, steps=6))
    older = str(run_dir / "checkpoints/step-00000002")
    assert train(tiny_settings(tiny_data, run_dir, steps=6, resume=older))["step"] == 6


def test_a_folder_with_the_name_of_another_step_is_refused(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    train(tiny_settings(tiny_data, run_dir, steps=2))
    os.rename(run_dir / "checkpoints/step-00000002", run_dir / "checkpoints/step-00000001")
    with pytest.raises(UserError, match="is the checkpoint of step 2 by its state.json"):
        train(tiny_settings(tiny_data, run_dir, steps=4))
    assert main(["verify", str(run_dir)]) == 1


# ---- what cannot be removed


def test_links_among_checkpoints_are_removed_and_not_followed(tiny_data, tmp_path):
    run_dir, archive = tmp_path / "run", tmp_path / "archive"
    train(tiny_settings(tiny_data, run_dir, steps=4, checkpoint_every=2))
    shutil.move(run_dir / "checkpoints/step-00000002", archive)
    (run_dir / "checkpoints/step-00000002").symlink_to(archive)
    summary = train(
        tiny_settings(tiny_data, run_dir, steps=10, checkpoint_every=2, keep_checkpoints=1)
    )
    assert summary["step"] == 10 and names(run_dir) == ["step-00000010"]
    assert len(list(archive.iterdir())) > 4, "what the link pointed to is untouched"


def test_leftovers_that_cannot_be_removed_stop_nothing(tiny_data, tmp_path, monkeypatch, said):
    run_dir = tmp_path / "run"
    train(tiny_settings(tiny_data, run_dir, steps=2))
    stuck = run_dir / "checkpoints/.step-00000004.partial"
    stuck.mkdir()
    (stuck / ".nfs000").write_text("open elsewhere")
    real = shutil.rmtree

    def busy(path, *arguments, **options):
        if Path(path).name.startswith(".step-00000004.partial") and "-" not in Path(path).name[15:]:
            raise OSError(16, "Device or resource busy", str(stuck / ".nfs000"))
        return real(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    train(tiny_settings(tiny_data, run_dir, steps=6, checkpoint_every=2, keep_checkpoints=0))
    assert names(run_dir)[1:] == ["step-00000002", "step-00000004", "step-00000006"]
    assert ".nfs000: could not be removed (Device or resource busy)" in said.text


# ---- skipped updates, permanent checkpoints


def test_good_checkpoints_survive_a_run_that_diverges(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    train(tiny_settings(tiny_data, run_dir, steps=4, checkpoint_every=2))
    ruined = tiny_settings(tiny_data, run_dir, steps=40, checkpoint_every=2, max_skipped_steps=6)
    ruined["losses"] = {"z": 1e38}
    with pytest.raises(DivergedError, match=r"go on from .*step-00000004, from before that"):
        train(ruined)
    assert names(run_dir) == ["step-00000002", "step-00000004"]
    assert main(["train", str(write(tmp_path, ruined))]) == 2, "the same command ends alike"
    assert train(tiny_settings(tiny_data, run_dir, steps=6))["step"] == 6


def test_a_run_that_ends_while_updates_are_skipped_does_not_end_well(tiny_data, tmp_path):
    """Fewer than training.max_skipped_steps, but its last checkpoint is missing."""
    run_dir = tmp_path / "run"
    train(tiny_settings(tiny_data, run_dir, steps=2))
    ruined = tiny_settings(tiny_data, run_dir, steps=4) | {"losses": {"z": 1e38}}
    with pytest.raises(DivergedError, match=r"2 updates in a row.* at its end.*step-00000002"):
        train(ruined)
    assert names(run_dir) == ["step-00000002"]


def write(folder: Path, settings: dict) -> Path:
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))
    return path


def test_permanent_checkpoints_are_never_removed(tiny_data, tmp_path):
    train(
        tiny_settings(
            tiny_data, tmp_path, steps=8, checkpoint_every=1, keep_checkpoints=2, permanent_every=3
        )
    )
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]


# ---- one run a folder


def test_a_second_run_in_the_folder_is_refused(tiny_data, tmp_path, capsys):
    settings = tiny_settings(tiny_data, tmp_path / "run")
    with start.locked(tmp_path / "run", Ranks()):
        assert main(["train", str(write(tmp_path, settings))]) == 2
    error = capsys.readouterr().err
    assert "another process trains in this folder" in error and "Traceback" not in error
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert train(settings)["step"] == 6, "the lock ends with its holder"


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
    ],
)
def test_tasks_that_do_not_know_of_each_other_are_told_how_to_start(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=r"this is one of \d tasks.*torchrun"):
        join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join("cpu").world_size == 1


def test_a_world_size_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(UserError, match="WORLD_SIZE='abc' must be a whole number"):
        join("cpu")


# ---- other steps, other data


def test_fewer_steps_than_done_are_refused(tiny_data, tmp_path):
    train(tiny_settings(tiny_data, tmp_path, steps=4))
    config = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(
        UserError, match=r"step-00000004 has 4 steps, training.steps=3: nothing is l"
    ):
        train(tiny_settings(tiny_data, tmp_path, steps=3))
    assert (tmp_path / "config.yaml").read_bytes() == config


def test_a_schedule_that_jumps_is_said(tiny_data, tmp_path, said):
    train(tiny_settings(tiny_data, tmp_path, steps=6))
    train(tiny_settings(tiny_data, tmp_path, steps=40))
    assert "the learning rate was 0.001 at step 6" in said.text


def test_data_change_on_purpose(tiny_data, tmp_path, said, monkeypatch):
    """Another sequence length and batch: the data are read from their start, once."""
    begin = str(tmp_path / "base/checkpoints/step-00000002")
    train(tiny_settings(tiny_data, tmp_path / "base", steps=2))
    command = tiny_settings(
        tiny_data, tmp_path / "longer", steps=6, global_batch=2, micro_batch=2, resume=begin
    )
    command["data"]["sequence_length"] = 64
    with pytest.raises(
        UserError, match="was trained with training.global_batch=4.*allow_change=tr"
    ):
        train(command)
    command["data"]["allow_change"] = True
    positions, real = [], run_module.prefetch

    def prefetch(loader, first_step, *arguments):
        positions.append(first_step)
        return real(loader, first_step, *arguments)

    monkeypatch.setattr(run_module, "prefetch", prefetch)
    assert stopped_after(command, 4, monkeypatch)["step"] == 4
    assert "the data are read from their start, at step 2" in said.text
    assert train(command)["step"] == 6
    assert positions == [0, 2] and said.text.count("read from their start") == 1
    assert checkpoint.load_state(checkpoint.find(tmp_path / "longer")).data_start_step == 2


# ---- metrics


def test_lines_of_metrics_that_are_not_text_are_dropped(tiny_data, tmp_path, said):
    train(tiny_settings(tiny_data, tmp_path, steps=2))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\377\376{\n\x00\x00\x00")
    assert train(tiny_settings(tiny_data, tmp_path, steps=4))["step"] == 4
    assert steps_of(tmp_path) == [1, 2, 3, 4] and "metrics.jsonl: dropped a line" in said.text


def test_a_gap_in_the_metrics_is_said(tiny_data, tmp_path, said):
    train(tiny_settings(tiny_data, tmp_path, steps=4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:1]))
    train(tiny_settings(tiny_data, tmp_path, steps=6))
    assert "metrics.jsonl: nothing of steps 2 to 4" in said.text


class FullDisk:
    """A file whose disk is full."""

    def write(self, _text):
        raise OSError(28, "No space left on device")

    def flush(self):
        pass

    close = flush


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_metrics_that_cannot_be_written(on_error, tmp_path, said):
    writer = MetricsWriter(tmp_path, 0, on_error=on_error)
    writer._file.close()
    writer._file = FullDisk()
    if on_error == "stop":
        with pytest.raises(OSError, match=r"metrics.jsonl: could not be written \(No space left"):
            writer.write({"step": 1})
    else:
        writer.write({"step": 1})
        assert "metrics.jsonl: could not be written (No space left on device); trai" in said.text
    writer.close()


def test_a_run_goes_on_without_its_metrics(tiny_data, tmp_path, monkeypatch, said):
    """Under `warn`: every step is done, and the last checkpoint is there."""
    real = MetricsWriter.__init__

    def on_a_full_disk(writer, *arguments, **options):
        real(writer, *arguments, **options)
        if writer._file is not None:
            writer._file.close()
            writer._file = FullDisk()

    monkeypatch.setattr(MetricsWriter, "__init__", on_a_full_disk)
    settings = tiny_settings(tiny_data, tmp_path, steps=3, on_checkpoint_error="warn")
    assert main(["train", str(write(tmp_path, settings))]) == 0
    assert checkpoint.find(tmp_path).name == "step-00000003"
    assert "metrics.jsonl: could not be written (No space left on device)" in said.text
    settings["training"] |= {"on_checkpoint_error": "stop", "steps": 5}
    assert main(["train", str(write(tmp_path, settings))]) == 1


def test_a_last_checkpoint_that_is_missing_is_no_success(tiny_data, tmp_path, monkeypatch):
    settings = tiny_settings(
        tiny_data, tmp_path, steps=4, checkpoint_every=2, on_checkpoint_error="warn"
    )
    real = shutil.disk_usage

    def full_after_two(path):
        full = (tmp_path / "checkpoints/step-00000002").exists()
        return real(path)._replace(free=0) if full else real(path)

    monkeypatch.setattr(shutil, "disk_usage", full_after_two)
    with pytest.raises(
        RunError, match="last checkpoint, of step 4, could not be written; the newe"
    ):
        train(settings)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
