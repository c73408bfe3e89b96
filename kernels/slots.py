"""Routed slots in the order of their experts: what dispatchers make and expert kernels take. It
imports nothing of emotrain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SortedSlots:
    """Routed slots in the order of their experts. Empty slots come last and belong to no expert."""

    token_R: Tensor
    """int64: the token of each slot."""
    slot_R: Tensor
    """int64: the position of each sorted slot in the flattened [T, K] choices."""
    ends_N: Tensor
    """int64: one past the last slot of each expert; `ends_N[-1]` slots are in use."""
    in_use: int | None = None
    """`ends_N[-1]` where the host knows it: no memory is taken for empty slots then."""

    @property
    def num_rows(self) -> int:
        """Rows that a tensor of one row a slot needs."""
        return self.token_R.shape[0] if self.in_use is None else self.in_use


def sort_slots(experts_TK: Tensor, counts_N: Tensor, in_use: int | None = None) -> SortedSlots:
    """Sort slots by expert; within an expert, tokens keep their order.

    Args:
        experts_TK: int64 expert of each slot in [0, N], where N marks an empty slot.
        counts_N: int64 slots of each expert.
        in_use: their sum, where the host knows it.
    """
    slot_R = torch.sort(experts_TK.reshape(-1), stable=True).indices
    return SortedSlots(slot_R // experts_TK.shape[1], slot_R, counts_N.cumsum(0), in_use)
