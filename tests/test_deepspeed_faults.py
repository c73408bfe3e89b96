"""What goes wrong in a run under DeepSpeed ends as it does natively: a hung rank in one line within
the limit, a missing last checkpoint with exit code 1.

Ranks are forks that meet in a file; each ends with the exit code that the command would have.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from emotrain.cli import guarded
from emotrain.config import config_from_dict
from emotrain.distributed import faults
from emotrain.training import checkpoint
from emotrain.training import run as run_module
from emotrain.training.deepspeed import DeepSpeedEngine
from tests.conftest import tiny_settings
from tests.test_faults import meet

# Before it is first imported: it would take a GPU that is there.
os.environ["DS_ACCELERATOR"] = "cpu"
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("pip install 'emotrain[deepspeed]'", allow_module_level=True)
# Not used, but DeepSpeed imports them, and torch's compiler with them, in every process: 3 s each.
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def _rank(
    rank: int,
    world_size: int,
    folder: Path,
    settings: dict,
    options: dict,
    before: Callable[[int, Path], object],
    timeout_s: float,
) -> None:
    """Train as the command does; stderr goes to a file."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    sys.stderr = open(folder / f"stderr-{rank}", "w", buffering=1)  # noqa: SIM115 - until the end
    ranks = meet(rank, world_size, folder, timeout_s)
    file = folder / f"options-{rank}.json"
    file.write_text(json.dumps(options))
    before(rank, folder)

    def train() -> int:
        build = partial(DeepSpeedEngine, file)
        run_module.train(config_from_dict(settings), ranks, build)
        limits = {
            entry["process_group"][1]: entry["timeout_ms"] for entry in faults.flight_record()
        }
        (folder / f"limits-{rank}").write_text(json.dumps(limits))
        dist.barrier()
        return 0

    code = guarded(train)
    sys.stderr.flush()
    (folder / f"partial-{rank}").write_text(str(code))
    (folder / f"partial-{rank}").rename(folder / f"code-{rank}")
    # Where another rank hangs, its groups cannot be left in good order.
    os._exit(code)


def nothing(_rank: int, _folder: Path) -> None:
    """What a run without a fault begins with."""


def train(
    folder: Path,
    settings: dict,
    options: dict,
    before: Callable[[int, Path], object] = nothing,
    world_size: int = 2,
    timeout_s: float = 60.0,
    waited_for: tuple[int, ...] = (),
) -> list[str]:
    """What each rank wrote to stderr, once all (or those named) have ended."""
    arguments = (world_size, folder, settings, options, before, timeout_s)
    context = mp.start_processes(
        _rank, arguments, nprocs=world_size, start_method="fork", join=False
    )
    names = [f"code-{rank}" for rank in waited_for or range(world_size)]
    deadline = time.monotonic() + 120
    try:
        while not all((folder / name).is_file() for name in names):
            ended = [process.exitcode for process in context.processes]
            assert not any(code is not None and code < 0 for code in ended), ended
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [(folder / f"stderr-{rank}").read_text() for rank in range(world_size)]


def zero(stage: int, bucket: int = 1000, **others: object) -> dict:
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": bucket}, **others}


@pytest.mark.parametrize(
    ("stage", "ep", "names"),
    [
        (1, 1, {"data_parallel"}),
        (2, 2, {"data_parallel", "expert_exchange", "expert_data_parallel"}),
        (3, 1, set()),  # stage 3 needs none but the one that is there before
    ],
)
def test_every_group_of_deepspeed_has_the_limit_and_a_name(stage, ep, names, tiny_data, tmp_path):
    """Those that it makes itself start with a limit of their own, and without a name."""
    settings = tiny_settings(
        tiny_data, tmp_path / "run", micro_batch=1, steps=2, collective_timeout_s=77.0
    )
    settings["parallel"] = {"ep": ep}
    train(tmp_path, settings, zero(stage, 100), world_size=4, timeout_s=77.0)
    limits = json.loads((tmp_path / "limits-0").read_text())
    assert set(limits.values()) == {77_000}, limits
    # DeepSpeed may have made the group of stages 1 and 2 for stage 3 as well.
    others = {"default_pg", "checkpoints", "data_parallel"}
    assert names <= set(limits) <= names | others, limits


def _hang_in_exchange(rank: int, _folder: Path) -> None:
    from emotrain.distributed.dispatch import AllToAllDispatcher

    if rank == 1:
        AllToAllDispatcher.split_sizes = lambda *_: time.sleep(600)


def _hang_before_reduction(rank: int, _folder: Path) -> None:
    if rank == 1:
        DeepSpeedEngine.backward = lambda *_: time.sleep(600)


@pytest.mark.parametrize(
    ("hang", "stage", "ep", "group"),
    [
        (_hang_in_exchange, 2, 2, "expert_exchange"),
        (_hang_before_reduction, 2, 1, "data_parallel"),
        (_hang_before_reduction, 3, 1, "default_pg"),
    ],
)
def test_a_hung_rank_ends_the_others_in_one_line(hang, stage, ep, group, tiny_data, tmp_path):
    limit = {"collective_timeout_s": 3.0}
    settings = tiny_settings(tiny_data, tmp_path / "run", micro_batch=2, **limit)
    settings["parallel"] = {"ep": ep}
    # Balanced by micro-batch, there is no collective of ours between forward and backward.
    settings["losses"] = {"balance_scope": "micro_batch"}
    said, _ = train(tmp_path, settings, zero(stage, 100), hang, timeout_s=3.0, waited_for=(0,))
    assert (tmp_path / "code-0").read_text() == str(faults.EXIT_BROKE)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 0, step 1: gloo:") and "Traceback" not in said
    assert f"in group {group} did not end within 3 s (training.collective_timeout_s)" in line


def test_unequal_shares_of_experts_need_a_bucket_that_they_fill_alike(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run", micro_batch=2)
    settings["parallel"] = {"ep": 2}
    for said in train(tmp_path, settings, zero(2)):
        (line,) = said.splitlines()
        assert line.startswith("error: zero_optimization.reduce_bucket_size=1000: ranks with uneq")
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


# ---- checkpoints and metrics


def _full_after_two(_rank: int, folder: Path) -> None:
    """The disk of checkpoints is full once the one of step 2 is there."""
    real = shutil.disk_usage

    def usage(path):
        full = (folder / "run/checkpoints/step-00000002").exists()
        return real(path)._replace(free=0) if full else real(path)

    shutil.disk_usage = usage


def test_a_last_checkpoint_that_is_missing_is_no_success(tiny_data, tmp_path):
    settings = tiny_settings(
        tiny_data,
        tmp_path / "run",
        micro_batch=2,
        steps=4,
        checkpoint_every=2,
        on_checkpoint_error="warn",
    )
    said = train(tmp_path, settings, zero(2), _full_after_two)
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert "last checkpoint, of step 4, could not be written; the newest is of step 2" in said[0]
    assert checkpoint.find(tmp_path / "run").name == "step-00000002"
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4]


# ---- what it says of itself


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({"steps_per_print": 1}, "step=2, skipped=0"),
        ({"comms_logger": {"enabled": True, "verbose": True, "prof_all": True}}, "comm op: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_report_that_is_asked_for_is_given(report, said, tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run", micro_batch=2, steps=2)
    outputs = train(tmp_path, settings, zero(2, **report))
    assert said in outputs[0], outputs[0]
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["0", "0"]


def test_without_it_deepspeed_says_nothing(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run", micro_batch=2, steps=2)
    assert "DeepSpeed" not in "".join(train(tmp_path, settings, zero(2)))
