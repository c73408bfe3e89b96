"""The processes of a run, and the few collectives that data parallelism needs. One process needs none of them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def join(cls, device: str = "auto") -> Ranks:
        """Join the process group that torchrun's variables describe, if any, and pick this process' device.

        Raises:
            ValueError: device=cuda without a usable GPU.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("training.device=cuda needs a GPU and a CUDA build of torch, none was found; use training.device=cpu")
        use_cuda = device != "cpu" and torch.cuda.is_available()
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(chosen)
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if use_cuda else "gloo", device_id=chosen if use_cuda else None)
        return cls(int(os.environ.get("RANK", 0)), world_size, chosen)

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

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def leave(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
