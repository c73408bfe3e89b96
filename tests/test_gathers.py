"""Proves when parameters are gathered and gradients reduced: a log of two processes that train is
that of the order in `parallelize._order_gathers`. Nothing is gathered twice in a pass, and all but
the first is asked for before the layer in front of it runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from emotrain.config import Config
from emotrain.distributed import parallelize
from emotrain.distributed.parallelize import build_model, reduction_groups
from emotrain.distributed.ranks import Ranks
from emotrain.training.engine import NativeEngine
from emotrain.training.step import train_step
from tests import layouts
from tests.layouts import Case, Step, build, config, micro_batches, one_process
from tests.processes import run_ranks
from tests.test_layout import assert_same

FORWARD = """
gather model                use model
gather block0 experts0      use block0
gather block1 experts1      use experts0    use block1
gather block2 experts2      use experts1    use block2
gather head                 use experts2    use head
"""
"""The layers of three are asked for one ahead."""

FORWARD_AGAIN = """
gather block0 experts0      use block0
gather block1 experts1      use experts0    use block1      use experts1
"""
"""A second micro-batch before any backward: the last layer, the head and the model's own are
still there."""

BACKWARD = """
reduce head
gather block1 experts1      reduce experts2 reduce block2   use block1
gather block0               use experts1
gather experts0             reduce experts1 reduce block1   use block0      use experts0
reduce experts0             reduce block0   reduce model
"""
"""After a forward pass: the last layer is still there."""

BACKWARD_AGAIN = """
gather model block2 experts2                reduce head     use model       use block2
gather block1               use experts2
gather experts1             reduce experts2 reduce block2   use block1
gather block0               use experts1
gather experts0             reduce experts1 reduce block1   use block0      use experts0
reduce experts0             reduce block0   reduce model
"""
"""After another backward pass nothing is."""


def events(*passes: str) -> list[str]:
    """`gather a b` is two events, one after the other."""
    found, kind = [], ""
    for word in " ".join(passes).split():
        if word in ("gather", "use", "reduce"):
            kind = word
        else:
            found.append(f"{kind} {word}")
    return found


def three_layers(**parallel: Any) -> Config:
    settings = config(parallel)
    return replace(settings, model=replace(settings.model, num_layers=3))


def logged(ranks: Ranks, settings: Config, size: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What one step gathers, waits for and reduces, in the order in which it does."""
    log: list[str] = []

    def name(group: Any) -> str:
        words = (group._module_fqn or "model").replace("blocks.", "block").split(".")
        return words[0] if len(words) == 1 else words[0].replace("block", "experts")

    def unshard(group: Any, *args: Any, real=FSDPParamGroup.unshard) -> None:
        before = group._all_gather_result
        real(group, *args)
        if group._all_gather_result is not before:
            log.append(f"gather {name(group)}")

    def wait(group: Any, real=FSDPParamGroup.wait_for_unshard) -> None:
        if group._all_gather_result is not None:
            log.append(f"use {name(group)}")
        real(group)

    def reduce(group: Any, *args: Any, real=FSDPParamGroup.post_backward) -> None:
        log.append(f"reduce {name(group)}")
        real(group, *args)

    model = build(settings, ranks, torch.float32)
    monkeypatch.setattr(FSDPParamGroup, "unshard", unshard)
    monkeypatch.setattr(FSDPParamGroup, "wait_for_unshard", wait)
    monkeypatch.setattr(FSDPParamGroup, "post_backward", reduce)
    batches = micro_batches(1, size, ranks.rank, ranks.world_size)
    train_step(NativeEngine(model), batches, settings, 1, ranks)
    return log


@pytest.mark.parametrize(
    "parallel", [{}, {"ep": 2, "recompute": "full"}, {"replicate": 2, "recompute": "selective"}]
)
def test_what_comes_next_is_gathered_while_a_layer_runs(parallel, monkeypatch) -> None:
    """Also where backward runs blocks again, and with a second micro-batch."""
    for log in run_ranks(logged, 2, three_layers(**parallel), 2, monkeypatch):
        assert log == events(FORWARD, FORWARD_AGAIN, BACKWARD, BACKWARD_AGAIN)


def test_what_stays_gathered_is_gathered_once(monkeypatch) -> None:
    settings = three_layers(reshard_after_forward=False)
    for log in run_ranks(logged, 2, settings, 4, monkeypatch):
        assert [e for e in log if "gather" in e] == [e for e in events(FORWARD) if "gather" in e]


def test_a_bank_of_several_layers_is_gathered_when_it_is_used(monkeypatch) -> None:
    settings = config(model="one bank")
    for log in run_ranks(logged, 2, settings, 4, monkeypatch):
        waited = [log[i + 1] for i, event in enumerate(log) if event == "gather experts0"]
        assert len(waited) >= 3 and set(waited) == {"use experts0"}


# ---- reductions


def _groups(ranks: Ranks, settings: Config) -> tuple[set[str], set[str], dict[str, str]]:
    """Groups that a step gathers in, and those that it reduces in."""
    gathered, reduced = set(), set()

    def noted(real: Any, names: set[str]) -> Any:
        def collective(*args: Any, group: Any, **kwargs: Any) -> Any:
            names.add(group.group_name)
            return real(*args, group=group, **kwargs)

        return collective

    model = build_model(settings, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_single", noted(dist.all_gather_single, gathered))
        patch.setattr(dist, "reduce_scatter_single", noted(dist.reduce_scatter_single, reduced))
        batches = micro_batches(1, 2, ranks.rank, ranks.world_size)
        train_step(NativeEngine(model), batches, settings, 1, ranks)
    return gathered, reduced, {a: g.group_name for a, g in reduction_groups(model).items()}


separate = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_separate_reduce_scatter_group"),
    reason="this torch reduces in the groups that it gathers in",
)


@separate
def test_gathers_and_reductions_have_groups_of_their_own() -> None:
    for parallel, axes in (({}, {"shard"}), ({"ep": 2}, {"shard", "expert_dp"})):
        for gathered, reduced, groups in run_ranks(_groups, 4, config(parallel)):
            assert groups.keys() == axes and reduced == set(groups.values())
            assert gathered and not gathered & reduced


def _reductions(ranks: Ranks, parallel: dict[str, Any]) -> dict[str, tuple[set, Step]]:
    """By `reduce_dtype`, what the gradients of a step are summed in, and the step."""
    summed: set[torch.dtype] = set()

    def reduce(*args: Any, real=_fsdp_param_group.foreach_reduce, **kwargs: Any) -> Any:
        (reduce_dtype,) = {p.reduce_dtype or p.orig_dtype for p in args[0]}
        summed.add(reduce_dtype)
        return real(*args, **kwargs)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fsdp_param_group, "foreach_reduce", reduce)
        for reduce_dtype in ("fp32", "bf16"):
            settings = config({**parallel, "reduce_dtype": reduce_dtype})
            (step,) = layouts.train(settings, 2, ranks, 1, torch.float32)
            found[reduce_dtype] = (set(summed), step)
            summed.clear()
    return found


@pytest.mark.parametrize("parallel", [{}, {"ep": 2}, {"replicate": 2}])
def test_gradients_are_summed_in_bf16_on_request_alone(parallel) -> None:
    """A sum of two rounds each of them, and the result: gradients are off by that and no more."""
    exact = one_process("published", "mixed", 8, 1, torch.float32)[0].gradients
    for found in run_ranks(_reductions, 2, parallel):
        for reduce_dtype, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            summed, step = found[reduce_dtype]
            assert summed == {dtype}
            off = max(
                float((step.gradients[name] - one).norm() / one.norm())
                for name, one in exact.items()
            )
            assert off < 1e-4 if reduce_dtype == "fp32" else 1e-3 < off < 2e-2


@separate
def test_torch_without_them_trains_alike(monkeypatch) -> None:
    for name in ("set_separate_reduce_scatter_group", "set_reduce_scatter_max_input_buffers"):
        monkeypatch.delattr(FSDPModule, name)
    for _, _, groups in run_ranks(_groups, 2, config()):
        assert not groups
    case = Case(2, 1, 2, 2)
    for record in case.train(steps=2):
        assert_same(record, one_process("published", "mixed", case.rows, 2))


def test_where_torch_has_no_such_groups_none_is_looked_for(monkeypatch) -> None:
    """The state of a module has other names in torch 2.11."""
    for name in ("set_separate_reduce_scatter_group", "set_reduce_scatter_max_input_buffers"):
        monkeypatch.delattr(FSDPModule, name, raising=False)
    module = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_group=None))
    monkeypatch.setattr(parallelize, "_spread_modules", lambda model: [module])
    assert reduction_groups(None) == {}
