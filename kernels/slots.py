"""Routed slots in the order of their experts: what dispatchers make and expert kernels take."""

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
    position_R: Tensor | None = None
    """int32: where each slot lies among the sorted ones, -1 for an empty one; None: not known."""

    @property
    def num_rows(self) -> int:
        """Rows that a tensor of one row a slot needs."""
        return self.token_R.shape[0] if self.in_use is None else self.in_use


def sort_slots(
    experts_TK: Tensor, num_experts: int, in_use: int | None = None, backend: str = "torch"
) -> SortedSlots:
    """Sort slots by expert; within an expert, tokens keep their order.

    Args:
        experts_TK: integers, the expert of each slot in [0, N); N or more marks an empty slot.
        in_use: slots that are not empty, where the host knows how many.
        backend: `triton` or `torch`, as `choose_backend` chose.
    """
    if backend == "triton":
        from emotrain.kernels.triton_slots import sort_slots_triton

        token_R, slot_R, ends_N, position_R = sort_slots_triton(experts_TK, num_experts)
        return SortedSlots(token_R, slot_R, ends_N, in_use, position_R)
    # Radix sort takes a pass a byte.
    keys_R = experts_TK.flatten().clamp(max=num_experts)
    keys_R = keys_R.to(torch.uint8 if num_experts < 256 else torch.int32)
    sorted_R, slot_R = torch.sort(keys_R, stable=True)
    each_N = torch.arange(num_experts, dtype=keys_R.dtype, device=keys_R.device)
    ends_N = torch.searchsorted(sorted_R, each_N, right=True)
    return SortedSlots(slot_R // experts_TK.shape[1], slot_R, ends_N, in_use)
