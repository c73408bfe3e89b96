"""The processes of a run, what each holds, and the few collectives that data parallelism needs. One
process needs none of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Replicate

from emotrain.distributed.launcher import Launch
from emotrain.errors import RunError, UserError


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

    @classmethod
    def join(cls, device: str = "auto", timeout_s: float = 600.0) -> Ranks:
        """Join the process group that torchrun's variables describe, if any, and pick this process'
        device.

        Args:
            device: `auto`, `cpu` or `cuda`.
            timeout_s: seconds after which a collective that does not end is an error.
        Raises:
            UserError: device=cuda without a usable GPU, or launcher variables that cannot be.
            RunError: the processes did not find each other.
        """
        launch = Launch.read()
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "training.device=cuda needs a GPU and a CUDA build of torch, none was found; use "
                "training.device=cpu"
            )
        use_cuda = device != "cpu" and torch.cuda.is_available()
        chosen = torch.device("cpu")
        if use_cuda:
            chosen = torch.device("cuda", launch.gpu(torch.cuda.device_count()))
            torch.cuda.set_device(chosen)
        if launch.world_size > 1 and not dist.is_initialized():
            try:
                _init_process_group(launch, timeout_s, chosen if use_cuda else None)
            except dist.DistError as error:
                raise RunError(
                    f"rank {launch.rank} of {launch.world_size} did not find the others at "
                    f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout_s:g} "
                    f"s: {error}"
                ) from None
        return cls(launch.rank, launch.world_size, chosen)

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


def limit_of(backend: str, timeout_s: float) -> timedelta:
    """What torch is told for a limit of `timeout_s` on collectives. NCCL's watchdog aborts a
    process with pages of trace: it comes a minute after `faults.py`, which says in a line what
    hangs."""
    return timedelta(seconds=timeout_s + (60 if "nccl" in backend else 0))


def _init_process_group(launch: Launch, timeout_s: float, gpu: torch.device | None) -> None:
    backend = "gloo" if gpu is None else "nccl"
    store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    # torchrun keeps its store when it starts processes again, with the addresses of the dead in it.
    # Its count of starts may differ between nodes; there launch/torchrun.sh has it make a new store
    # each time.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # torch's record of the last collectives: it is what an error names the one at fault by.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    dist.init_process_group(
        backend,
        timeout=limit_of(backend, timeout_s),
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        device_id=gpu,
    )
