"""What a launch of a kernel computes and moves: said once, where the launch is written. The planner
and the roofline read it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class Cost(NamedTuple):
    """What one launch computes and moves between the GPU's memory and its processors.

    Each operand travels once: what several tiles read comes from the L2 cache after the first time.
    How many slots are in use is data; rows of empty slots are neither read nor written. So a cost
    is that of the whole operands and that of each slot in use.
    """

    reads: tuple[Tensor | None, ...]
    """Tensors that are read whole; None for one that is not there."""
    writes: tuple[Tensor | None, ...]
    """Tensors that are written whole."""
    slots: int = 0
    """The most slots that can be in use."""
    slot_reads: tuple[Tensor | None, ...] = ()
    """Tensors of which one row is read for each slot in use: the slot's own, or its token's."""
    slot_writes: tuple[Tensor | None, ...] = ()
    """Tensors of which one row is written for each slot in use."""
    slot_flops: int = 0
    """Floating-point operations of the matrix products for each slot in use."""

    def flops(self, slots: int | None = None) -> int:
        """FLOPs with this many slots in use (None: all)."""
        return self.slot_flops * self._used(slots)

    def bytes_read(self, slots: int | None = None) -> int:
        """Bytes read with this many slots in use (None: all)."""
        return _whole(self.reads) + self._used(slots) * _row(self.slot_reads)

    def bytes_written(self, slots: int | None = None) -> int:
        """Bytes written with this many slots in use (None: all)."""
        return _whole(self.writes) + self._used(slots) * _row(self.slot_writes)

    def _used(self, slots: int | None) -> int:
        return self.slots if slots is None else min(slots, self.slots)


def _whole(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _row(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of one row of each."""
    return sum(
        tensor.nbytes // tensor.shape[0]
        for tensor in tensors
        if tensor is not None and tensor.shape[0]
    )
