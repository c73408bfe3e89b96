"""The launch files start what they say: real processes on one node and on two, Slurm by stand-ins
for its commands. Their Python is that of `python_of_forks`; the long test takes the real one.

Proves that processes find each other and train, that a stop ends with 75 and a checkpoint, that
Slurm's job queues itself again after 75 and after nothing else, and that every variable a script
reads is explained at its top.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Not used, but each process that is started would load them for itself.
import emotrain.commands.train
import emotrain.evaluation.while_training  # noqa: F401
from emotrain.cli import main
from emotrain.config import config_from_dict, save_config
from emotrain.training import checkpoint
from tests.conftest import ROOT, tiny_settings
from tests.python_of_forks import python_of_forks
from tests.test_training import losses, train

LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch"]
SLURM_SETS = {"SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"}

STAND_INS = {
    # One process a task, and the largest exit code of all tasks, as srun.
    "srun": r"""
        while [[ $1 == --* ]]; do shift; done
        pids=() code=0
        for ((task = 0; task < SLURM_NTASKS; task++)); do
            SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do
            wait "$pid" || { ended=$?; code=$((ended > code ? ended : code)); }
        done
        exit $code""",
    "scontrol": r"""if [[ $1 == show ]]; then printf '127.0.0.1\nanother-node\n'; fi""",
    # A trainer that ends with the codes of the file CODES, one an attempt.
    "trainer": r"""
        address="$MASTER_ADDR:$MASTER_PORT"
        echo "$address rank $RANK of $WORLD_SIZE, local $LOCAL_RANK" >> "$CALLS/ranks"
        code=$(sed -n 1p "$CODES"); sed -i 1d "$CODES"; exit "$code" """,
}


@pytest.fixture(scope="module", autouse=True)
def python(tmp_path_factory) -> Iterator[None]:
    """Scripts that are started find it in PYTHON."""
    with python_of_forks(tmp_path_factory.mktemp("python")) as program:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHON", str(program))
            yield


def environment(**variables: str) -> dict[str, str]:
    """This process' environment with nothing of a launcher that runs the tests themselves."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not re.match(r"SLURM_|RANK$|LOCAL_|WORLD_SIZE|MASTER_|TORCHELASTIC", key)
    }
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PROCESSES_PER_NODE": "2",
        **variables,
    }


def start(script: Path, *arguments: object, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", script, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def config_file(folder: Path, data: Path, **training) -> Path:
    save_config(
        config_from_dict(tiny_settings(data, folder / "run", micro_batch=2, **training)),
        folder / "config.yaml",
    )
    return folder / "config.yaml"


def summary(stdout: str) -> dict:
    return json.loads(stdout.strip().splitlines()[-1])


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """Variables of a job of two tasks whose `srun` and `scontrol` note their arguments in files
    under CALLS."""
    commands, calls = tmp_path / "bin", tmp_path / "calls"
    commands.mkdir()
    calls.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f'#!/usr/bin/env bash\necho "$*" >> "$CALLS/{name}"\n{body}\n')
        (commands / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "CODES": str(tmp_path / "codes"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_NTASKS": "2",
        "MASTER_PORT": str(port),
    }


# ---- the scripts as text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_explains_every_variable_it_reads(script):
    subprocess.run(["bash", "-n", script], check=True)
    header, body = script.read_text().split("set -euo pipefail", 1)
    read = (
        set(re.findall(r"\$\{?([A-Z][A-Z_]+)", body))
        - SLURM_SETS
        - {"BASH_SOURCE", "MASTER_ADDR", "OMP_NUM_THREADS"}
    )
    assert read and not [
        name for name in read if not re.search(rf"^#   {name}=", header, re.MULTILINE)
    ]
    assert "PATH_TO" not in body and not re.search(
        r"/(home|scratch|gpfs|lustre|mnt)/", script.read_text()
    )


def test_torchrun_without_a_configuration_prints_its_help():
    code, stdout, _ = finish(start(SCRIPTS[0]))
    assert (
        code == 2
        and stdout.startswith("Train with torchrun")
        and "RENDEZVOUS=" in stdout
        and "set -euo" not in stdout
    )


def test_the_hostfile_is_one_that_deepspeed_reads():
    lines = (LAUNCH / "hostfile.example").read_text().splitlines()
    # The rule of its launcher: a comment, or a host and its slots.
    assert all(line.startswith("#") or re.fullmatch(r"\S+\s+slots=\d+", line) for line in lines)
    assert len([line for line in lines if not line.startswith("#")]) == 2


SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR")
PRINTS = f"print(*(os.environ.get(n, '-') for n in {SETTINGS!r}))"


@pytest.mark.parametrize("script", [*SCRIPTS, LAUNCH / "pretrain.py"], ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True - /disk/triton-{uid}"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, "- a:1 /disk/triton-{uid}"),
        ({"PYTORCH_ALLOC_CONF": "b:1", "TRITON_CACHE_DIR": "/kernels"}, "b:1 - /kernels"),
    ],
)
def test_memory_grows_in_place_and_kernels_compile_on_the_nodes_disk(
    script, given, expected, slurm, tmp_path
):
    """Whatever starts the processes; who says otherwise is heard."""
    expected = expected.format(uid=os.getuid()).replace("/disk", str(tmp_path))
    variables = {
        name: value for name, value in environment(**slurm).items() if name not in SETTINGS
    }
    variables |= {"TMPDIR": str(tmp_path), **given}
    if script.suffix == ".py":
        program = (
            "import os, runpy, sys; sys.argv[1:] = ['--version']\n"
            f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
            f"except SystemExit: {PRINTS}\n"
        )
        command = [sys.executable, "-c", program]
    else:
        # In place of Python, a process that prints what the trainer would get.
        (tmp_path / "bin/prints").write_text(
            f'#!/usr/bin/env bash\nexec {sys.executable} -c "import os; {PRINTS}"\n'
        )
        (tmp_path / "bin/prints").chmod(0o755)
        variables |= {"PYTHON": str(tmp_path / "bin/prints"), "SLURM_NTASKS": "1"}
        command = ["bash", script, "CONFIG"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == expected, done.stderr


@pytest.mark.parametrize("command", ["train", "finetune"])
@pytest.mark.parametrize(("world_size", "compiles"), [("1", None), ("2", "/disk/triton-{uid}")])
def test_commands_set_what_the_launch_files_set(command, world_size, compiles, monkeypatch):
    for name in (*SETTINGS, "WORLD_SIZE"):
        monkeypatch.setenv(name, world_size)
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/disk")
    more = ["--data", "nowhere", "--out", "nowhere"] if command == "finetune" else []
    assert main([command, "nowhere", *more]) == 2
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ.get("TRITON_CACHE_DIR") == (compiles and compiles.format(uid=os.getuid()))


def test_commands_set_it_before_torch_is_there():
    program = "import sys; import emotrain.commands.train, emotrain.commands.finetune as it"
    done = subprocess.run([sys.executable, "-c", f"{program}; sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0


# ---- torchrun


def test_one_node_with_two_processes_trains_as_one(tiny_data, tmp_path):
    code, stdout, stderr = finish(start(SCRIPTS[0], config_file(tmp_path, tiny_data), "--json"))
    assert code == 0, stderr
    assert summary(stdout)["step"] == 6 and not summary(stdout)["interrupted"]
    train(tiny_settings(tiny_data, tmp_path / "one"))
    for (_, *two), (_, *one) in zip(
        losses(tmp_path / "run"), losses(tmp_path / "one"), strict=True
    ):
        assert two == pytest.approx(one, rel=1e-5)


def test_a_stopped_run_on_one_node_saves_and_ends_with_75(tiny_data, tmp_path):
    # One process: tests/test_faults.py stops two under torchrun.
    config = config_file(tmp_path, tiny_data, steps=100_000)
    process = start(SCRIPTS[0], config, "--json", PROCESSES_PER_NODE="1")
    metrics_file, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 90
    while (
        not (metrics_file.is_file() and metrics_file.stat().st_size)
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    code, stdout, stderr = finish(process)
    assert code == 75, stderr
    assert summary(stdout)["interrupted"]
    assert (
        checkpoint.load_state(checkpoint.find(tmp_path / "run")).step == summary(stdout)["step"] > 0
    )


def test_two_nodes_meet_at_the_rendezvous(tiny_data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [
        start(
            SCRIPTS[0],
            config_file(tmp_path, tiny_data),
            "--json",
            NODES="2",
            RENDEZVOUS=endpoint,
            PROCESSES_PER_NODE="1",
        )
        for _ in range(2)
    ]
    ends = [finish(node) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [summary(stdout)["step"] for _, stdout, _ in ends if stdout.strip()] == [6], (
        "the first rank alone reports, and of one run"
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.long
def test_two_nodes_go_on_after_a_process_of_one_of_them_died(tiny_data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    config = config_file(tmp_path, tiny_data, steps=60, checkpoint_every=10)
    variables = {
        "NODES": "2",
        "RENDEZVOUS": endpoint,
        "PROCESSES_PER_NODE": "1",
        "MAX_RESTARTS": "1",
        "PYTHON": sys.executable,
    }
    nodes = [start(SCRIPTS[0], config, "--json", **variables) for _ in range(2)]
    metrics_file, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 90
    while not (metrics_file.is_file() and len(metrics_file.read_text().splitlines()) >= 15):
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes)
        time.sleep(0.05)
    (agent,) = children(nodes[1].pid)
    os.kill(children(agent)[-1], signal.SIGKILL)
    ends = [finish(node) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert all("going on from" in stderr for _, _, stderr in ends), (
        "both nodes' processes were started again"
    )
    steps = [json.loads(line)["step"] for line in metrics_file.read_text().splitlines()]
    assert steps == list(range(1, 61))


def test_several_nodes_without_a_meeting_place_are_refused(tmp_path):
    code, _, stderr = finish(start(SCRIPTS[0], "config.yaml", NODES="2"))
    assert (
        code == 2
        and stderr.startswith("error: NODES=2 needs RENDEZVOUS=HOST:PORT")
        and len(stderr.splitlines()) == 1
    )


# ---- Slurm


def test_slurm_tasks_train_as_one_run(slurm, tiny_data, tmp_path):
    code, stdout, stderr = finish(
        start(SCRIPTS[1], config_file(tmp_path, tiny_data), "--json", **slurm)
    )
    assert code == 0, stderr
    assert summary(stdout)["step"] == 6
    assert "requeue" not in (tmp_path / "calls/scontrol").read_text()


@pytest.mark.parametrize(
    ("codes", "ended", "starts", "requeued"),
    [
        ([0], 0, 1, False),
        ([75], 75, 1, True),
        ([2], 2, 1, False),
        ([137, 1, 0], 0, 3, False),
        ([1, 75], 75, 2, True),
        ([1, 1, 1, 0], 1, 3, False),
    ],
)
def test_slurm_queues_the_job_again_after_75_alone(codes, ended, starts, requeued, slurm, tmp_path):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    trainer = str(tmp_path / "bin/trainer")
    code, _, stderr = finish(
        start(
            SCRIPTS[1],
            "CONFIG",
            "optimizer.lr=1",
            **{**slurm, "PYTHON": trainer, "SLURM_NTASKS": "1"},
        )
    )
    assert code == ended, stderr
    calls = (tmp_path / "calls/srun").read_text().splitlines()
    assert len(calls) == starts and all(
        f"{trainer} launch/pretrain.py CONFIG optimizer.lr=1" in call for call in calls
    )
    assert ("requeue 4711" in (tmp_path / "calls/scontrol").read_text().splitlines()) == requeued
    first = int(slurm["MASTER_PORT"])
    assert (tmp_path / "calls/ranks").read_text().splitlines() == [
        f"127.0.0.1:{first + attempt} rank 0 of 1, local 0" for attempt in range(starts)
    ], "a new port each time: the old one may linger"


def test_slurm_outside_of_a_job_says_how_to_submit(tmp_path):
    code, _, stderr = finish(start(SCRIPTS[1], "CONFIG"))
    assert code == 2 and stderr.startswith("usage: sbatch ")
