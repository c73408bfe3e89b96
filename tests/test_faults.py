"""What goes wrong on a cluster: dead and hung processes, updates that are not finite, stops, and
another number of processes.

Whatever happens, the run goes on from a whole checkpoint with the losses of a run to which nothing
happened, or ends with one line that says where to look. Launchers are the real ones where they are
what is tested; else ranks are forks that meet in a file.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Self

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from emotrain.batch import SOURCE_BITS
from emotrain.config import config_from_dict, save_config
from emotrain.data.opening import open_loader
from emotrain.distributed import faults, joining
from emotrain.distributed.faults import collective_errors, describe, in_flight, report_not_finite
from emotrain.distributed.launcher import Launch
from emotrain.distributed.mesh import limit_collectives
from emotrain.distributed.ranks import CollectiveError, Ranks
from emotrain.training import checkpoint
from emotrain.training import engine as engine_module
from emotrain.training import run as run_module
from tests.conftest import ROOT, tiny_settings


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def fork(function: Callable, world_size: int, *arguments, join: bool = True):
    return mp.start_processes(
        function, arguments, nprocs=world_size, start_method="fork", join=join
    )


def meet(rank: int, world_size: int, folder: Path, timeout_s: float = 60.0) -> Ranks:
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return Ranks(rank, world_size)


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> object:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


# ---- a collective that does not end


class _Late(torch.autograd.Function):
    """The identity, whose backward pass calls something first."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.call()
        return grad, None


def _hang(rank, folder, where):
    """Rank 1 falls asleep before the collective `where`; rank 0 writes down the error it gets."""
    ranks = meet(rank, 2, folder, timeout_s=1.0)
    asleep = time.sleep if rank else (lambda _: None)
    model = torch.nn.Linear(8, 8)
    fully_shard(model)
    x_TD = torch.ones(4, 8, requires_grad=True)
    try:
        with collective_errors(ranks, 1.0, lambda: 7):
            if where == "all_reduce":
                asleep(60)
                ranks.sum(torch.ones(3))
            elif where == "fsdp forward":
                asleep(60)
                model(x_TD)
            elif where == "fsdp backward":
                _Late.apply(model(x_TD), lambda: asleep(60)).sum().backward()
            else:
                y_TD = functional.all_to_all_single_autograd(x_TD, [2, 2], [2, 2], dist.group.WORLD)
                _Late.apply(y_TD.relu(), lambda: asleep(60)).sum().backward()
    except CollectiveError as error:
        (folder / "partial").write_text(str(error))
        (folder / "partial").rename(folder / "error")
    # The other rank is still there, so the group cannot be left in good order.
    os._exit(0)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("all_reduce", "gloo:all_reduce of 3 "),
        ("fsdp forward", "gloo:all_gather of 36 "),
        ("fsdp backward", "gloo:all_reduce of 72 "),
        ("exchange backward", "gloo:all_to_all of 4x8 "),
    ],
)
def test_a_hung_collective_is_named_whoever_started_it(where, name, tmp_path):
    """FSDP and exchanges wait inside of autograd, where no line of ours is near. (gloo reduces
    and scatters by all_reduce.)"""
    context = fork(_hang, 2, tmp_path, where, join=False)
    try:
        wait_for((tmp_path / "error").is_file, 30)
    finally:
        for process in context.processes:
            process.kill()
    error = (tmp_path / "error").read_text()
    assert error.startswith(f"rank 0, step 7: {name}") and len(error.splitlines()) == 1
    assert "did not end within 1 s (training.collective_timeout_s)" in error


def _limits(rank, settings, folder):
    """Train with expert parallelism, and note the limit of every collective of every group."""
    ranks = meet(rank, 4, folder, timeout_s=77.0)
    run_module.train(config_from_dict(settings), ranks)
    limits = {entry["process_group"][1]: entry["timeout_ms"] for entry in faults.flight_record()}
    (folder / f"limits-{rank}").write_text(json.dumps(limits))
    dist.destroy_process_group()


def test_every_group_of_the_layout_has_the_limit(tiny_data, tmp_path):
    """Groups that torch makes for a mesh start with a limit of their own."""
    settings = tiny_settings(
        tiny_data, tmp_path / "run", micro_batch=1, steps=1, collective_timeout_s=77.0
    )
    fork(_limits, 4, {**settings, "parallel": {"ep": 2, "replicate": 2}}, tmp_path)
    limits = json.loads((tmp_path / "limits-0").read_text())
    limits.pop("checkpoints", None)
    assert len(limits) >= 3 and set(limits.values()) == {77_000}, limits


def test_nccl_gives_up_a_minute_after_the_line_is_said(monkeypatch):
    """Its watchdog would abort the process first; gloo raises at the limit itself."""
    asked = {}
    monkeypatch.setattr(joining, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **given: asked.update({backend: given})
    )
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    launch = Launch(0, 2, 0, 2)
    for gpu in (None, torch.device("cuda", 0)):
        joining._init_process_group(launch, 600.0, gpu)
    assert {name: given["timeout"].seconds for name, given in asked.items()} == {
        "gloo": 600,
        "nccl": 660,
    }

    class Group:
        def set_timeout(self, limit):
            self.limit = limit

    for backend, seconds in (("gloo", 600), ("nccl", 660), ("cpu:gloo,cuda:nccl", 660)):
        monkeypatch.setattr(dist, "get_backend", lambda _, backend=backend: backend)
        limit_collectives([group := Group()], 600.0)
        assert group.limit == timedelta(seconds=seconds)


def test_other_errors_pass_as_they_are():
    with (
        pytest.raises(RuntimeError, match="^mat1 and mat2 shapes cannot be multiplied"),
        collective_errors(Ranks(), 1.0, lambda: 1),
    ):
        torch.ones(2, 3) @ torch.ones(2, 3)


def nccl_entry(name: str, state: str, age_s: float = 0.0) -> dict:
    """As NCCL's recorder writes them: an entry is retired once its collective has ended."""
    return {
        "profiling_name": f"nccl:{name}",
        "state": state,
        "retired": state == "completed",
        "input_sizes": [[4, 8]],
        "process_group": ["3", "ep"],
        "time_created_ns": time.time_ns() - int(age_s * 1e9),
    }


def test_the_first_collective_under_way_is_the_one_at_fault():
    """On a GPU the host has already asked for the ones behind it."""
    record = [
        nccl_entry("all_gather", "completed"),
        nccl_entry("all_to_all", "started"),
        nccl_entry("all_reduce", "scheduled"),
    ]
    assert in_flight(record) is record[1]
    line = describe(Ranks(3, 8), 12, 600.0, record)
    assert line.startswith(
        "rank 3, step 12: nccl:all_to_all of 4x8 in group ep did not end within 600 s"
    )
    assert describe(Ranks(3, 8), 12, 600.0, [], "Connection closed by peer").startswith(
        "rank 3, step 12: a collective broke off"
    )


@pytest.mark.parametrize(
    ("state", "age_s", "ends"),
    [
        ("started", 5.0, True),
        ("scheduled", 5.0, True),
        ("started", 0.0, False),
        ("completed", 5.0, False),
    ],
)
def test_the_watch_of_a_gpu_ends_a_process_that_waits_too_long(state, age_s, ends, capsys):
    codes, record = [], [nccl_entry("all_reduce", state, age_s)]
    watch = faults._Watch(Ranks(1, 2), 2.0, lambda: 4, lambda: record, codes.append)
    watch._thread.join(0.6)
    watch.stop()
    assert codes == ([faults.EXIT_BROKE] if ends else [])
    assert (
        "error: rank 1, step 4: nccl:all_reduce of 4x8 in group ep did not end within 2 s"
        in capsys.readouterr().err
    ) == ends


# ---- under torchrun


class Torchrun:
    """A run of the trainer on two processes under the real launcher; `ranks()` are their process
    ids by rank."""

    def __init__(self, folder: Path, data: Path, max_restarts: int = 0, **training):
        save_config(
            config_from_dict(tiny_settings(data, folder / "run", micro_batch=2, **training)),
            folder / "config.yaml",
        )
        self.metrics, self.stderr = folder / "run" / "metrics.jsonl", folder / "stderr"
        with open(self.stderr, "w") as stderr:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    "2",
                    "--max-restarts",
                    str(max_restarts),
                    "launch/pretrain.py",
                    folder / "config.yaml",
                ],
                cwd=ROOT,
                stderr=stderr,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            for pid in self.ranks().values():
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()

    def ranks(self) -> dict[int, int]:
        children = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        environments = {int(pid): Path(f"/proc/{pid}/environ").read_text() for pid in children}
        return {
            int(found[1]): pid
            for pid, text in environments.items()
            if (found := re.search(r"(?:^|\0)RANK=(\d+)", text))
        }

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.stderr.read_text()
            return self.metrics.is_file() and len(self.metrics.read_text().splitlines()) >= step

        wait_for(there)

    def wait(self) -> int:
        return self.process.wait(timeout=120)


def _train(rank, world_size, settings, folder):
    ranks = meet(rank, world_size, folder)
    run_module.train(config_from_dict(settings), ranks)
    dist.destroy_process_group()


def test_a_killed_rank_is_started_again_and_the_losses_stay(tiny_data, tmp_path):
    training = {"steps": 60, "checkpoint_every": 10}
    with Torchrun(tmp_path, tiny_data, max_restarts=1, **training) as run:
        run.wait_for_step(15)
        os.kill(run.ranks()[1], signal.SIGKILL)
        assert run.wait() == 0, run.stderr.read_text()
    assert "going on from" in run.stderr.read_text()
    fork(
        _train,
        2,
        2,
        tiny_settings(tiny_data, tmp_path / "whole", micro_batch=2, **training),
        tmp_path,
    )
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_sigterm_to_torchrun_saves_a_checkpoint(tiny_data, tmp_path):
    with Torchrun(tmp_path, tiny_data, max_restarts=3, steps=100_000) as run:
        run.wait_for_step(3)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 1, (
            "torchrun's own code, whatever its processes ended with; launch/torchrun.sh makes it 75"
        )
    state = checkpoint.load_state(checkpoint.find(tmp_path / "run"))
    assert state.step == losses(tmp_path / "run")[-1][0] >= 3
    assert "going on from" not in run.stderr.read_text(), "stopped, not started again"


def test_a_stuck_rank_ends_the_run_and_the_waiting_one_says_so(tiny_data, tmp_path):
    """A checkpoint is under way all the time: it must not keep the run from ending."""
    with Torchrun(
        tmp_path, tiny_data, steps=100_000, checkpoint_every=1, collective_timeout_s=6.0
    ) as run:
        run.wait_for_step(3)
        stuck = run.ranks()[1]
        os.kill(stuck, signal.SIGSTOP)
        wait_for(lambda: "did not end within" in run.stderr.read_text())
        # It would take torchrun's patience (30 s) until it kills a process that does not hear
        # SIGTERM.
        os.kill(stuck, signal.SIGCONT)
        assert run.wait() == 1
    # The other one may say it too, when it goes on and finds that it has waited too long.
    (line,) = [
        line for line in run.stderr.read_text().splitlines() if line.startswith("error: rank 0")
    ]
    assert re.match(
        r"error: rank 0, step \d+: gloo:\w+ of [\dx, ]+ in group \S+ did not end within 6 s "
        r"\(training\.",
        line,
    )


# ---- stops


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_of_a_scheduler_finishes_the_step_and_saves(
    number, tiny_data, tmp_path, monkeypatch
):
    real, calls = engine_module.language_model_sums, iter(range(100))

    def sums(*arguments):
        if next(calls) == 2:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(engine_module, "language_model_sums", sums)
    before = signal.getsignal(number)
    summary = run_module.train(config_from_dict(tiny_settings(tiny_data, tmp_path)))
    assert summary["interrupted"] and summary["step"] == summary["checkpoint_step"] in (3, 4)
    assert signal.getsignal(number) == before


# ---- updates that are not finite


def _spoil(rank, settings, folder):
    """Rank 1's second micro-batch of step 3 has no finite loss."""
    messages = logging.handlers.MemoryHandler(1000)
    logging.getLogger("emotrain").addHandler(messages)
    ranks = meet(rank, 2, folder)
    real, calls = engine_module.language_model_sums, iter(range(100))

    def sums(*arguments):
        result = real(*arguments)
        spoilt = rank == 1 and next(calls) == 2 * 2 + 1
        return engine_module.LossSums(
            result.lm * (torch.nan if spoilt else 1.0),
            result.cross_entropy,
            result.z,
            result.num_targets,
        )

    engine_module.language_model_sums = sums
    run_module.train(config_from_dict(settings), ranks)
    (folder / f"log-{rank}").write_text(
        "\n".join(
            record.getMessage() for record in messages.buffer if record.levelname == "WARNING"
        )
    )
    dist.destroy_process_group()


def test_the_rank_and_the_documents_of_a_bad_update_are_named(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run", micro_batch=1)
    fork(_spoil, 2, settings, tmp_path)
    position = 2 * 4 + 1 * 2 + 1
    documents = open_loader(tiny_data, 32, 0).batch([position]).document_ids_G.tolist()
    assert (tmp_path / "log-0").read_text() == (
        f"step 3: skipped an update that is not finite (loss nan, gradient norm nan); rank 1, "
        f"micro-batch 1; "
        f"sequences {position} to {position} of the data order, documents "
        f"{', '.join(map(str, documents))}"
    )
    assert (tmp_path / "log-1").read_text() == "", "said once, by the first rank"
    assert checkpoint.load_state(checkpoint.find(tmp_path / "run")).skipped_steps == 1


def test_documents_of_a_mixture_are_named_by_their_source() -> None:
    said = faults._sequences(8, 2, [7, (2 << SOURCE_BITS) + 5, -1])
    assert said == "sequences 8 to 9 of the data order, documents 7, 5 of source 2, -1"


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ([1.0, 1.0], "the loss of every micro-batch is finite, the gradient is not"),
        ([torch.inf, torch.nan], "the loss of every micro-batch is not finite"),
    ],
)
def test_without_a_culprit_the_whole_batch_is_named(values, where, caplog):
    with caplog.at_level("WARNING"):
        report_not_finite(5, 1.0, torch.inf, values, [[7, 8], [8, *range(20, 40)]], 4, 2, Ranks())
    (message,) = caplog.messages
    assert message == (
        f"step 5: skipped an update that is not finite (loss 1.0, gradient norm inf); {where}; "
        f"sequences 16 to 19 of the "
        f"data order, documents 7, 8, {', '.join(map(str, range(20, 38)))} and 2 more"
    )


# ---- another number of processes


def _train_a_while(rank, world_size, settings, folder, stop_after):
    """Train until `stop_after` steps were begun; then the last rank is asked to stop."""
    ranks = meet(rank, world_size, folder)
    real, calls = engine_module.language_model_sums, iter(range(1, 1000))
    per_step = settings["training"]["global_batch"] // world_size

    def sums(*arguments):
        if rank == world_size - 1 and next(calls) == (stop_after - 1) * per_step + 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    engine_module.language_model_sums = sums
    run_module.train(config_from_dict(settings), ranks)
    dist.destroy_process_group()


def test_a_run_goes_on_with_another_number_of_processes(tiny_data, tmp_path):
    """2, then 1, then 4: the same sequences in the same steps, so the same losses."""
    training = {"steps": 9, "micro_batch": 1}
    elastic = tiny_settings(tiny_data, tmp_path / "elastic", **training)
    for world_size, stop_after in ((2, 2), (1, 2), (4, 100)):
        fork(_train_a_while, world_size, world_size, elastic, tmp_path, stop_after)
    run_module.train(config_from_dict(tiny_settings(tiny_data, tmp_path / "whole", **training)))
    got, wanted = losses(tmp_path / "elastic"), losses(tmp_path / "whole")
    assert [step for step, *_ in got] == list(range(1, 10))
    for step, expected in zip(got, wanted, strict=True):
        assert step == pytest.approx(expected, rel=1e-5)
    state = checkpoint.load_state(checkpoint.find(tmp_path / "elastic"))
    assert state.step == 9 and state.tokens == 9 * 4 * 32
