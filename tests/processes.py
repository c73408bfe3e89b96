"""Ranks on this machine: the way in which tests start the processes of one group. Tests that kill,
stop or hang ranks start their own (test_faults.py, test_checkpoint_kills.py)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
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
        timeout_s: after so long the ranks are killed and the test fails: they wait for each other.
    Raises:
        ProcessRaisedException: a rank raised. The others are ended.
        ProcessExitedException: a rank ended otherwise. The others are ended.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = mp.start_processes(
            _rank,
            (body, world_size, folder, arguments),
            nprocs=world_size,
            join=False,
            start_method="fork",
        )
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"{body.__name__}: a rank was still waiting after {timeout_s:g} s")
        # Any object: only these ranks wrote there.
        return [
            torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)
        ]


def _rank(
    rank: int, body: Callable[..., Any], world_size: int, folder: Path, arguments: tuple
) -> None:
    # Else each of up to four ranks would take all cores.
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
        )
    result = body(Ranks(rank, world_size), *arguments)
    torch.save(result, folder / f"rank{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()
