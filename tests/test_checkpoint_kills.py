"""Law 6 by force: kill -9 at random moments of a save, disks that really fill up. What is there
afterwards is whole, training goes on from it, and ends with the losses of a run that nobody
disturbed.

Processes are forked and slowed down at every step of a save, so that kills land in each; `-m long`
kills many more times.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from emotrain.config import config_from_dict
from emotrain.distributed.parallelize import build_model
from emotrain.distributed.ranks import Ranks
from emotrain.errors import RunError
from emotrain.training import checkpoint, tensor_files
from emotrain.training import run as run_module
from emotrain.training.checkpoint import CheckpointWriter, TrainingState
from emotrain.training.optimizer import build_optimizer
from tests.conftest import ROOT, tiny_settings
from tests.processes import run_script

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
forked = multiprocessing.get_context("fork")
FEW_OR_MANY = pytest.mark.parametrize(
    "kills", [4, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(2400)])]
)
PROCESSES = pytest.mark.parametrize("processes", [1, 2])


def slow_down(seed: int) -> None:
    """Sleep up to 4 ms, in this process only, before every flush, rename and removal of a save,
    and inside each tensor file."""
    rng = random.Random(seed)

    def slowed(function, seconds=0.004):
        return lambda *args, **options: (
            time.sleep(rng.random() * seconds),
            function(*args, **options),
        )[1]

    os.fsync, os.rename, os.unlink = slowed(os.fsync), slowed(os.rename), slowed(os.unlink)
    write_file = tensor_files._write_file
    tensor_files._write_file = lambda path, items, resolve: write_file(
        path, items, slowed(resolve, 0.002)
    )


def start(function, processes: int, folder: Path, *args) -> list[multiprocessing.Process]:
    """Fork the ranks of `function(Ranks, seed, *args)`."""
    seed = time.monotonic_ns()

    def main(rank: int) -> None:
        sys.stderr = open(folder / "stderr", "a", buffering=1)  # noqa: SIM115 - both live as long as the process
        faulthandler.register(signal.SIGUSR1, open(folder / "stacks", "a"), all_threads=True)  # noqa: SIM115
        torch.set_num_threads(1)
        if processes > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous-{seed}",
                rank=rank,
                world_size=processes,
            )
        function(Ranks(rank, processes), seed + rank, *args)

    ranks = [forked.Process(target=main, args=(rank,)) for rank in range(processes)]
    for process in ranks:
        process.start()
    return ranks


def kill_one(
    ranks: list[multiprocessing.Process], rng: random.Random, run_dir: Path, started: bool = True
) -> bool:
    """Kill -9 one rank; the others must end by themselves, as nobody may wait for the dead. Returns
    whether a save was under way.

    Ranks that have not `started`, where one may still wait for the first word of another, are all
    killed, as torchrun does.
    """
    saving = bool(checkpoint.list_leftovers(run_dir))
    for process in [rng.choice(ranks)] if started else ranks:
        process.kill()
    for process in ranks:
        process.join(30)
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            process.join(1)
            process.kill()
            pytest.fail(
                f"a rank still waits, 30 s after another one was "
                f"killed:\n{(run_dir.parent / 'stacks').read_text()}"
            )
    return saving


def into_a_save(ranks: list[multiprocessing.Process], rng: random.Random, run_dir: Path) -> None:
    """Wait until a save has got as far as a random number of files, or some rank has ended."""
    files = rng.randrange(7)
    while all(process.is_alive() for process in ranks):
        try:
            if any(
                len(os.listdir(folder)) >= files for folder in checkpoint.list_leftovers(run_dir)
            ):
                return
        except FileNotFoundError:
            pass  # it has just been given its name
        time.sleep(0.0005)


def assert_all_whole(run_dir: Path) -> Path | None:
    """Every checkpoint that is listed is whole. Returns the newest."""
    found = checkpoint.list_checkpoints(run_dir)
    for path in found:
        checkpoint.verify(path)
    return found[-1] if found else None


def save_for_ever(ranks: Ranks, seed: int, run_dir: Path, asynchronous: bool) -> None:
    """Checkpoints one after the other, whose every value is their step, from where the last
    process was killed."""
    slow_down(seed)
    settings = tiny_settings("data", "run", micro_batch=1)
    config = config_from_dict(settings)
    model = build_model(config, ranks)
    optimizer = build_optimizer(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = checkpoint.list_checkpoints(run_dir)
    first = checkpoint.restore(found[-1], model, optimizer).step + 1 if found else 1
    with CheckpointWriter(run_dir, keep=2, asynchronous=asynchronous) as writer, torch.no_grad():
        for step in itertools.count(first):
            for parameter in model.parameters():
                parameter.fill_(step)
                optimizer.state[parameter]["exp_avg"].fill_(step)
            writer.save(model, optimizer, config, TrainingState(step, 0, "", 0, 4, 0.0))
            if ranks.is_first and writer.last is not None:
                with open(run_dir / "done", "a") as file:
                    file.write(f"{writer.last.step}\n")


def last_done(folder: Path) -> int:
    """The last step that `save_for_ever` knew to be whole; only complete lines count."""
    file = folder / "done"
    return (
        int(file.read_text().rpartition("\n")[0].rpartition("\n")[2] or 0) if file.is_file() else 0
    )


@FEW_OR_MANY
@PROCESSES
def test_kill_9_at_any_moment_of_a_save_leaves_whole_checkpoints_and_the_newest_finished_one(
    processes, kills, tmp_path
):
    rng, inside_a_save, steps, run_dir = random.Random(kills + processes), 0, [0], tmp_path / "run"
    for attempt in range(kills):
        finished = steps[-1]
        ranks = start(save_for_ever, processes, tmp_path, run_dir, attempt % 3 > 0)
        while last_done(run_dir) <= finished:
            assert all(process.is_alive() for process in ranks), (tmp_path / "stderr").read_text()
            time.sleep(0.001)
        if attempt % 2:
            into_a_save(ranks, rng, run_dir)
        else:
            time.sleep(rng.random() * 0.2)
        inside_a_save += kill_one(ranks, rng, run_dir)
        newest = assert_all_whole(run_dir)
        steps.append(checkpoint.load_state(newest).step)
        # Done at the kill, or done by then and not yet written down.
        assert steps[-1] >= last_done(run_dir) > finished
        assert min(2, steps[-1]) <= len(checkpoint.list_checkpoints(run_dir)) <= 3
        _, model = checkpoint.load_model(newest)
        assert all((parameter == steps[-1]).all() for parameter in model.parameters())
    assert inside_a_save >= kills // 4


def newest_step(run_dir: Path) -> int:
    found = checkpoint.list_checkpoints(run_dir)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def trained(ranks: Ranks, seed: int | None, settings: dict) -> None:
    if seed is not None:
        slow_down(seed)
    run_module.train(config_from_dict(settings), ranks)
    if ranks.world_size > 1:
        dist.destroy_process_group()


def losses(run_dir: Path) -> list[tuple]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@FEW_OR_MANY
@PROCESSES
def test_training_killed_again_and_again_ends_with_the_losses_of_an_undisturbed_run(
    processes, kills, tiny_data, tmp_path
):
    def settings(run_dir):
        return tiny_settings(tiny_data, run_dir, steps=8, micro_batch=2, checkpoint_every=1)

    for process in start(
        lambda ranks, _, own: trained(ranks, None, own),
        processes,
        tmp_path,
        settings(tmp_path / "whole"),
    ):
        process.join()
    expected = losses(tmp_path / "whole")
    assert [step for step, *_ in expected] == list(range(1, 9))
    rng, done, inside_a_save = random.Random(kills + processes), 0, 0
    for run in itertools.count():
        run_dir = tmp_path / f"run{run}"
        while True:
            before = newest_step(run_dir)
            ranks = start(trained, processes, tmp_path, settings(run_dir))
            # Mostly after some progress, so that the run gets on; at times before there is any.
            while (
                all(process.is_alive() for process in ranks)
                and newest_step(run_dir) <= before
                and rng.random() > 0.001
            ):
                time.sleep(0.005)
            if done % 2:
                into_a_save(ranks, rng, run_dir)
            else:
                ranks[0].join(rng.random() * 0.3)
            if not all(process.is_alive() for process in ranks):
                break
            inside_a_save += kill_one(ranks, rng, run_dir, started=newest_step(run_dir) > before)
            done += 1
            assert_all_whole(run_dir)
        for process in ranks:
            process.join()
            assert process.exitcode == 0, (
                f"exit code {process.exitcode}: {(tmp_path / 'stderr').read_text()}"
            )
        assert losses(run_dir) == expected
        assert checkpoint.load_state(assert_all_whole(run_dir)).step == 8
        if done >= kills:
            break
    assert inside_a_save >= done // 4


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_launcher_killed_again_and_again_ends_with_the_losses_of_an_undisturbed_run(
    tiny_data, tmp_path
):
    def command(run_dir):
        config_file = tmp_path / f"{run_dir.name}.yaml"
        config_file.write_text(
            json.dumps(tiny_settings(tiny_data, run_dir, steps=200, checkpoint_every=1))
        )
        return [sys.executable, str(ROOT / "launch/pretrain.py"), str(config_file)]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    rng, kills = random.Random(0), 0
    while (
        process := subprocess.Popen(command(tmp_path / "cut"), stderr=subprocess.PIPE)
    ).poll() is None:
        before = newest_step(tmp_path / "cut")
        while process.poll() is None and newest_step(tmp_path / "cut") <= before:
            time.sleep(0.005)
        time.sleep(rng.random())
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        assert_all_whole(tmp_path / "cut")
    assert process.wait() == 0 and kills >= 3
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


# ---- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a few checkpoints of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip(
            "a file system can only be mounted by root; the test with a limit on file size stands "
            "in"
        )
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("known_before", [True, False])
@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_disk_that_is_full_stops_the_run_or_not_as_configured(
    on_error, known_before, small_disk, tiny_data, monkeypatch, caplog
):
    """A real file system; the space is checked before the files are begun, or, as under a quota,
    found out in the middle of one."""
    if known_before:
        # What is left after a few checkpoints is then clearly less than one, not a page less.
        (small_disk / "ballast").write_bytes(bytes(150_000))
    else:
        usage = shutil.disk_usage(small_disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    caplog.set_level(logging.INFO, "emotrain")
    settings = tiny_settings(
        tiny_data,
        small_disk / "run",
        steps=8,
        checkpoint_every=1,
        keep_checkpoints=0,
        on_checkpoint_error=on_error,
    )
    if on_error == "stop":
        with pytest.raises(
            OSError, match=r"; free space or choose another training\.run_dir"
        ) as error:
            run_module.train(config_from_dict(settings))
        said = [str(error.value)]
    else:
        # Each checkpoint that fails is a warning. The last one has no next one: without it the run
        # has not done what it was asked for.
        with pytest.raises(RunError, match=r"last checkpoint, of step 8, could not be written"):
            run_module.train(config_from_dict(settings))
        said = [
            record.getMessage()
            for record in caplog.records
            if record.levelno == logging.WARNING
            and record.name == "emotrain"
            # Checkpoints are written while training goes on: a line of metrics that comes while one
            # of them fills the disk is kept, and written with the next.
            and not record.getMessage().startswith(f"{small_disk}/run/metrics.jsonl: ")
        ]
    last = checkpoint.load_state(assert_all_whole(small_disk / "run")).step
    assert 1 <= last < 8
    assert sorted(os.listdir(small_disk / "run" / "checkpoints")) == [
        f"step-{step:08d}" for step in range(1, last + 1)
    ]
    if on_error == "warn":
        assert len(said) == 8 - last
        metrics = (small_disk / "run/metrics.jsonl").read_text().splitlines()
        assert json.loads(metrics[-1])["step"] == 8
    reason = r"it needs 0\.2 MB and 0\.1 MB are free" if known_before else "No space left on device"
    for step, line in enumerate(said, start=last + 1):
        assert re.search(
            rf"step-{step:08d}: could not be written \({reason}\); the last whole .* is "
            rf"\S*/step-{last:08d}; ",
            line,
        )


def test_a_limit_on_file_size_leaves_older_checkpoints_and_says_so_in_one_line(tiny_data, tmp_path):
    """Needs no rights: real writes fail in the middle of a file, in the program that users run."""
    settings = tiny_settings(tiny_data, tmp_path / "run", steps=2)
    config_file = tmp_path / "config.yaml"
    config_file.write_text(json.dumps(settings))
    run_module.train(config_from_dict(settings))
    older = checkpoint.find(tmp_path / "run")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    # The file that the output goes to is below the limit.
    done = run_script(ROOT / "launch/pretrain.py", config_file, "training.steps=4", first=limit)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert (
        f"step-00000004: could not be written (File too large); the last whole checkpoint is "
        f"{older}" in errors[0]
    )
    assert os.listdir(tmp_path / "run" / "checkpoints") == [older.name]
    checkpoint.verify(older)
