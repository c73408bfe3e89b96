"""Ranks on this machine: the one way in which tests start the processes of a group."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from emotrain.distributed.ranks import Ranks


def run_ranks(
    body: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 240.0
) -> list[Any]:
    """What `body(ranks, *arguments)` returns in each rank, by rank. A single rank has no group.

    Ranks are forked, so that `body` may be a closure, and what a test has patched stays patched.

    Args:
        timeout_s: after so long the ranks are killed, and the test fails: they wait for each other.
    Raises:
        ProcessRaisedException: what a rank raised. The others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_ranks(_keep, world_size, Path(folder), body, arguments)
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"{body.__name__}: a rank was still waiting after {timeout_s:g} s")
        # Only these ranks wrote there.
        return [
            torch.load(_result(Path(folder), rank), weights_only=False)
            for rank in range(world_size)
        ]


def start_ranks(
    body: Callable[..., Any], world_size: int, folder: Path, *arguments: Any
) -> mp.ProcessContext:
    """Fork the ranks of `body(ranks, folder, *arguments)` and do not wait for them."""
    rendezvous = Path(tempfile.mkdtemp(dir=folder)) / "rendezvous"
    return mp.start_processes(
        _enter,
        (body, world_size, rendezvous, (folder, *arguments)),
        nprocs=world_size,
        join=False,
        start_method="fork",
    )


def meet(rank: int, world_size: int, rendezvous: Path, timeout_s: float = 60.0) -> Ranks:
    """Join the group of the processes that name the same file."""
    # Two cores, and up to four ranks that would each take both.
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    return Ranks(rank, world_size)


def _enter(
    rank: int, body: Callable[..., Any], world_size: int, rendezvous: Path, arguments: tuple
) -> None:
    with meet(rank, world_size, rendezvous) as ranks:
        body(ranks, *arguments)


def _keep(ranks: Ranks, folder: Path, body: Callable[..., Any], arguments: tuple) -> None:
    torch.save(body(ranks, *arguments), _result(folder, ranks.rank))


def _result(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pt"
