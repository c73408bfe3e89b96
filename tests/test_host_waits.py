"""Proves that a step on a GPU does not wait for numbers from the device between its first launch
and its last: the host would stop feeding the device. The step is the dry run's, with the launches
of a GPU and tensors that have no values, so that whoever asks for one is seen."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from helpers import tiny_config

from emotrain.planning import dry_run
from emotrain.planning.stand_ins import ZeroOnHost


def waits(monkeypatch: pytest.MonkeyPatch, world_size: int, **settings: Any) -> list[str]:
    """The function of emotrain behind each request for a value in one step of rank 0."""
    seen: list[str] = []

    class Seeing(ZeroOnHost):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                frames = [f for f in traceback.extract_stack() if "/emotrain/" in f.filename]
                names = [f.name for f in frames if "/planning/" not in f.filename]
                seen.append(names[-1])
            return super().__torch_dispatch__(func, types, args, kwargs)

    monkeypatch.setattr(dry_run, "ZeroOnHost", Seeing)
    config = tiny_config(training__precision="bfloat16", **settings)
    dry_run.dry_run(config, world_size)
    return seen


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"training__micro_batch": 1, "losses__balance_schedule": "running"}),
    (1, {"model__router__pool__kind": "fixed", "model__router__pool__size": 2}),
    (2, {"training__micro_batch": 1, "parallel__recompute": "full"}),
    (2, {"training__micro_batch": 1, "parallel__ep": 2}),
]


@pytest.mark.parametrize(("world_size", "settings"), LAYOUTS)
def test_a_step_asks_for_values_at_its_end_alone(monkeypatch, world_size, settings) -> None:
    """`split_sizes` of expert parallelism waits too; the dry run stands in for it and counts."""
    assert set(waits(monkeypatch, world_size, **settings)) == {"finish_step", "train_step"}


def test_more_micro_batches_do_not_wait_more(monkeypatch) -> None:
    one, four = (
        waits(monkeypatch, 1, training__micro_batch=rows, training__global_batch=4)
        for rows in (4, 1)
    )
    assert four == one


def test_a_wait_in_the_router_is_seen(monkeypatch) -> None:
    """The test above can fail."""
    from emotrain.model import router

    def slow(*args: Any, whole: Any = router.decide) -> Any:
        decision = whole(*args)
        decision.counts_N.max().item()
        return decision

    monkeypatch.setattr(router, "decide", slow)
    assert not set(waits(monkeypatch, 1)) <= {"finish_step", "train_step"}
