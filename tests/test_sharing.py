"""Banks of experts that layers share, on every kind of layout: the pool loss over layers, ranks and
accumulation is that of one process, and so is everything else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from emotrain.config import Config
from emotrain.distributed.ranks import Ranks
from tests import layouts

STEPS = 3


def shared(sharing: str, parallel: dict | None = None, schedule: str = "joint") -> Config:
    config = layouts.config(parallel, balance_schedule=schedule)
    experts = replace(config.model.experts, sharing=sharing)
    model = replace(config.model, experts=experts, num_layers=4)
    return replace(config, model=model)


@cache
def expected(sharing: str) -> list[layouts.Step]:
    """One process, one micro-batch."""
    return layouts.train(shared(sharing), layouts.ROWS, Ranks(), steps=STEPS)


@pytest.mark.layout
@pytest.mark.parametrize(
    ("sharing", "world_size", "parallel", "micro_batches"),
    [
        ("all", 1, {"recompute": "selective"}, 2),
        ("groups", 1, {"recompute": "full"}, 4),
        ("all", 2, {}, 2),
        ("groups", 2, {"ep": 2, "recompute": "full"}, 2),
        ("all", 2, {"ep": 2, "reshard_after_forward": False}, 1),
        ("groups", 4, {"replicate": 2, "ep": 2, "recompute": "selective"}, 2),
    ],
)
def test_no_layout_changes_the_training_of_shared_banks(
    sharing: str, world_size: int, parallel: dict, micro_batches: int
) -> None:
    size = layouts.ROWS // world_size // micro_batches
    settings = shared(sharing, parallel)
    for record in layouts.train_on(world_size, settings, size, steps=STEPS):
        for got, wanted in zip(record, expected(sharing), strict=True):
            torch.testing.assert_close(vars(got), vars(wanted), rtol=1e-9, atol=1e-12)


def test_sharing_is_another_model() -> None:
    """The test above could not fail if sharing did nothing."""
    losses = {
        sharing: expected(sharing)[0].numbers[0].item() for sharing in ("none", "groups", "all")
    }
    assert len(set(losses.values())) == 3
