"""Kernels compiled side by side, before `tune` times them one by one.

Workers compile and launch nothing: what they leave is Triton's cache on disk, where the process
that times finds it. They end before the first clock starts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from _gpu_run import Shape, log

from emotrain.kernels.launches import recorded_launches
from emotrain.kernels.triton_launch import tiles
from emotrain.kernels.tuning import TileConfig


class Attempt(NamedTuple):
    """A kernel with a tile, and the tiles of the kernels beside it."""

    kernel: str
    tile: TileConfig
    others: dict[str, TileConfig]


def compile_ahead(
    target: str,
    dtype: torch.dtype,
    shape: Shape,
    attempts: Sequence[Attempt],
    seconds: float,
    device_is_there: bool = True,
) -> dict[str, Any]:
    """Compile attempts on all cores, until time is up; what is left compiles when it is timed.

    Args:
        device_is_there: else it is compiled for, as `emotrain kernels` does.

    Returns:
        the number of processes, of attempts that are compiled and that are not, and the seconds.
    """
    started, compiled, refused = time.monotonic(), 0, 0
    processes = max(1, min(len(attempts), os.cpu_count() or 1))
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    pending = [
        pool.submit(_compile, target, dtype, shape, attempt, device_is_there)
        for attempt in attempts
    ]
    try:
        for done in as_completed(pending, timeout=max(seconds, 0)):
            # The same error comes when it is timed, and is recorded there.
            compiled, refused = compiled + (not done.exception()), refused + bool(done.exception())
    except OutOfTime:
        log(f"  {compiled} of {len(attempts)} tiles are compiled, time is up for more")
    pool.shutdown(cancel_futures=True)
    return {
        "processes": processes,
        "compiled": compiled,
        "refused": refused,
        "left": len(attempts) - compiled - refused,
        "seconds": time.monotonic() - started,
    }


def _compile(
    target: str, dtype: torch.dtype, shape: Shape, attempt: Attempt, device_is_there: bool
) -> None:
    if not device_is_there:
        from emotrain.kernels.compile_check import activate

        activate(target)
    sizes = {
        "tokens": shape.tokens,
        "width": shape.width,
        "hidden": shape.hidden,
        "num_experts": shape.experts,
        "num_chosen": shape.chosen,
        "ranks": 1,
    }
    with tiles({**attempt.others, attempt.kernel: attempt.tile}):
        for launch in recorded_launches(target, dtype, sizes):
            if launch.name == attempt.kernel:
                launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
