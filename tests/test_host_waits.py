"""Proves that a step on a GPU does not wait for numbers from the device between its first launch
and its last: the host would stop feeding the device. The step is the dry run's, with the launches
of a GPU and tensors that have no values, so that whoever asks for one is seen."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import tiny_batch, tiny_config

from emotrain.batch import PackedBatch
from emotrain.model.source_losses import SourceLosses
from emotrain.planning import dry_run
from emotrain.planning.stand_ins import ZeroOnHost


def waits(monkeypatch: pytest.MonkeyPatch, world_size: int, **settings: Any) -> list[str]:
    """The function of emotrain behind each wait in one step of rank 0."""
    seen: list[str] = []

    class Seeing(ZeroOnHost):
        def waited(self) -> None:
            super().waited()
            frames = [f for f in traceback.extract_stack() if "/emotrain/" in f.filename]
            seen.append([f.name for f in frames if "/planning/" not in f.filename][-1])

    monkeypatch.setattr(dry_run, "ZeroOnHost", Seeing)
    config = tiny_config(training__precision="bfloat16", **settings)
    counted = dry_run.dry_run(config, world_size).waits
    assert counted == len(seen)
    return seen


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"training__micro_batch": 1, "losses__balance_schedule": "running"}),
    (1, {"model__router__pool__kind": "fixed", "model__router__pool__size": 2}),
    (2, {"training__micro_batch": 1, "parallel__recompute": "full"}),
    (2, {"training__micro_batch": 1, "parallel__ep": 2}),
]


@pytest.mark.parametrize(("world_size", "settings"), LAYOUTS)
def test_a_step_waits_at_its_end_alone(monkeypatch, world_size, settings) -> None:
    """For the gradient norm, which decides on the update, and for all that it reports in one copy;
    under expert parallelism, once a layer and micro-batch for the sizes of its exchange."""
    layers, micro_batches = 2, 2 if settings.get("parallel__ep") else 0
    sizes = ["split_sizes"] * layers * micro_batches
    assert waits(monkeypatch, world_size, **settings) == [*sizes, "finish_step", "train_step"]


def test_more_micro_batches_and_layers_do_not_wait_more(monkeypatch) -> None:
    one, four = (
        waits(monkeypatch, 1, training__micro_batch=rows, training__global_batch=4)
        for rows in (4, 1)
    )
    assert four == one == waits(monkeypatch, 1, model__num_layers=5)


def test_the_loss_of_each_source_does_not_wait(monkeypatch) -> None:
    """Of a mixture: three sources."""

    def of_sources(*args: Any, whole: Any = dry_run.synthetic_batch) -> PackedBatch:
        return replace(whole(*args), num_sources=3)

    monkeypatch.setattr(dry_run, "synthetic_batch", of_sources)
    asked: list[SourceLosses] = []
    real = SourceLosses.sums
    monkeypatch.setattr(SourceLosses, "sums", lambda self: asked.append(self) or real(self))
    assert waits(monkeypatch, 1) == ["finish_step", "train_step"] and len(asked) == 2


@pytest.mark.parametrize(
    "ask",
    [
        lambda counts_N: counts_N.max().item(),
        lambda counts_N: bool((counts_N > 0).any()),
        lambda counts_N: counts_N.tolist(),
        lambda counts_N: counts_N.new_tensor(len(counts_N)),
        lambda counts_N: torch.tensor([1.0, 2.0], device=counts_N.device),
    ],
    ids=["item", "bool", "list", "new_tensor", "tensor"],
)
def test_a_wait_in_the_router_is_seen(monkeypatch, ask: Callable[[torch.Tensor], Any]) -> None:
    """The tests above can fail: once a layer, for a value that is read and for one that is sent."""
    from emotrain.model import router

    def slow(*args: Any, whole: Any = router.decide) -> Any:
        decision = whole(*args)
        ask(decision.counts_N)
        return decision

    monkeypatch.setattr(router, "decide", slow)
    extra = Counter(waits(monkeypatch, 1)) - Counter(["finish_step", "train_step"])
    micro_batches, layers = 2, 2
    assert extra.total() == micro_batches * layers


def test_a_batch_travels_from_pinned_memory(monkeypatch) -> None:
    """Else each of its copies waits."""
    pinned, sent = [], []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.data_ptr())
        return tensor

    def to(tensor: torch.Tensor, device: str, non_blocking: bool) -> torch.Tensor:
        assert device == "cuda" and non_blocking
        sent.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    tiny_batch().to("cuda")
    assert pinned == sent and len(sent) == 4
