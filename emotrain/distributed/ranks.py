"""The processes of a run, what each holds, and the few collectives that data parallelism needs. One
process needs none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from emotrain.errors import RunError


class CollectiveError(RunError):
    """A collective did not end, or its other side is gone. The process groups are of no use
    afterwards."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. A context manager: leaving it leaves the process
    group."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks, in place; `values` itself with one rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; any that pickle takes. For what is small and rare."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Leaving waits for collectives under way, and after one that failed that may be for ever.
        broken = kind is not None and issubclass(kind, CollectiveError)
        if self.world_size > 1 and dist.is_initialized() and not broken:
            dist.destroy_process_group()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def offsets_of(tensor: torch.Tensor) -> torch.Size:
    """Where what this process holds of a tensor starts in the whole one."""
    if not isinstance(tensor, DTensor):
        return torch.Size([0] * tensor.ndim)
    [chunk] = tensor.__create_chunk_list__()
    return chunk.offsets


def num_copies(tensor: torch.Tensor) -> int:
    """How many processes hold each element of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = (
        tensor.device_mesh.size(axis)
        for axis, placement in enumerate(tensor.placements)
        if isinstance(placement, Replicate)
    )
    return torch.Size(sizes).numel()
