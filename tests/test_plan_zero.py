"""Proves the plan of a run by DeepSpeed: what each ZeRO stage keeps whole and in shares, sends and
waits for, and that what does not fit is told what would."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache

import pytest
from helpers import tiny_config

from emotrain.commands import plan as plan_command
from emotrain.config import Config
from emotrain.model.counts import parameter_counts
from emotrain.planning.hardware import Cluster, Reserve, find_gpu
from emotrain.planning.plan import Plan
from emotrain.planning.search import advice
from emotrain.planning.stand_ins import Routing
from emotrain.planning.zero import zero_plan
from tests.conftest import ROOT

CLUSTER = Cluster(find_gpu("h100-80gb"), 1, 8)


def config(**overrides) -> Config:
    """On 8 processes: 2 micro-batches of one sequence."""
    return tiny_config(
        **{
            "model__num_layers": 2,
            "model__experts__routed": 16,
            "model__router__pool__max": 16,
            "data__sequence_length": 64,
            "training__global_batch": 16,
            "training__micro_batch": 1,
            "training__precision": "bfloat16",
            **overrides,
        }
    )


def options(stage: int) -> str:
    return str(ROOT / f"configs/deepspeed/zero{stage}.json")


@cache
def planned(stage: int, ep: int = 1) -> Plan:
    return zero_plan(options(stage), config(parallel__ep=ep), CLUSTER)


TOTAL = parameter_counts(config().model)["total_parameters"]


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_and_gradients_are_whole_and_the_rest_in_shares(stage: int) -> None:
    state = planned(stage).as_dict()["state_gib"]
    assert state["parameters"] * 2**30 == state["gradients"] * 2**30 == 4 * TOTAL
    assert state["optimizer"] * 2**30 == pytest.approx(12 * TOTAL / 8, abs=1)


def test_stage_1_sends_gradients_once_and_stage_2_after_each_micro_batch() -> None:
    for stage, times in ((1, 1), (2, 2)):
        sent = planned(stage).measured.bytes_by_kind_and_axis()
        assert sent["reduce_scatter"]["world"] == pytest.approx(4 * times * TOTAL, rel=0.01)
        assert sent["all_gather"] == {"world": 4 * TOTAL}
    # Stage 2 sends under backward, and its optimizer waits for the last.
    tasks = planned(2).measured.tasks
    last = max(i for i, task in enumerate(tasks) if task.queue == "communicator of gradients")
    assert any(last in task.after for task in tasks[last + 1 :])


def test_experts_are_summed_over_the_ranks_that_hold_the_same() -> None:
    sent = planned(2, ep=4).measured.bytes_by_kind_and_axis()
    experts = 2 * 16 * 3 * 16 * 8
    assert sent["reduce_scatter"]["expert_dp"] == pytest.approx(2 * 4 * experts // 4, rel=0.01)
    assert sent["all_gather"]["world"] == pytest.approx(4 * (TOTAL - experts), rel=0.01)


def test_stage_3_keeps_shares_and_starts_whole() -> None:
    plan = planned(3)
    assert plan.start_gib * 2**30 == 4 * TOTAL
    # Some parameters have no axis that 8 divides.
    assert plan.measured.state_bytes["parameters"] < 4 * TOTAL / 6
    gathered = plan.measured.bytes_by_kind_and_axis()["all_gather"]["shard"]
    # In fp32, for forward and again for backward, but for what is outside of blocks.
    assert 1.5 * 2 * 4 * TOTAL < gathered < 2 * 2 * 4 * 1.2 * TOTAL


def test_what_does_not_fit_is_told_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that has room for a share of the experts, and not for all."""
    monkeypatch.setattr(Reserve, "usable_gib", lambda _, gpu, groups: gpu.memory_gib)
    settings = config(model__experts__hidden=512)
    whole, spread = (
        zero_plan(
            options(2), replace(settings, parallel=replace(settings.parallel, ep=ep)), CLUSTER
        )
        for ep in (1, 8)
    )
    room = 0.5 * (whole.peak_gib + spread.peak_gib)
    small = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_gib=room))
    assert not zero_plan(options(2), settings, small).fits
    changes = advice(settings, small, Routing(), options(2))
    assert ("parallel.ep", 8) in changes[0].settings and all(change.fits for change in changes)


def test_one_engine_is_planned_at_a_time() -> None:
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    args = parser.parse_args(
        [str(ROOT / "configs/emo_1b14b_1t.yaml"), "--search", "--deepspeed", options(2)]
    )
    with pytest.raises(ValueError, match="are alternatives; give one"):
        plan_command.run(args)
