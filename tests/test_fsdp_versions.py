"""Proves that FSDP2 trains alike whether torch looks for tensors inside of dataclasses (2.13) or in
registered containers alone (2.11): several micro-batches, all forward passes before the first
backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fsdp_state
from torch.utils._pytree import tree_flatten

from tests.layouts import config, train_on


def registered_alone(output: Any) -> tuple[torch.Tensor, ...]:
    """The tensors with a gradient that torch 2.11 finds."""
    return tuple(t for t in tree_flatten(output)[0] if torch.is_tensor(t) and t.requires_grad)


@pytest.mark.parametrize("parallel", [{}, {"ep": 2, "recompute": "selective"}])
def test_passes_wait_for_each_other_with_the_hooks_of_torch_2_11(monkeypatch, parallel) -> None:
    settings = config(parallel)
    assert settings.losses.balance_schedule == "joint"
    # Later torch does not ask by these names, and 2.11 itself not yet.
    for module in (_fsdp_state, _fsdp_param_group):
        monkeypatch.setattr(module, "collect_grad_tensors", registered_alone, raising=False)
    (wanted,) = train_on(1, config(), 8, steps=1)[0]
    for (step,) in train_on(2, settings, 2, steps=1):
        torch.testing.assert_close(vars(step), vars(wanted), rtol=1e-9, atol=1e-12)
