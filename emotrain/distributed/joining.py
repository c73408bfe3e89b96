"""How a process finds its device and the other processes of the run."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from emotrain.distributed.launcher import Launch
from emotrain.distributed.ranks import Ranks
from emotrain.errors import RunError, UserError


def join(device: str = "auto", timeout_s: float = 600.0) -> Ranks:
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
    return Ranks(launch.rank, launch.world_size, chosen)


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
