"""What a run asks of torch on a GPU before its first operator: sums in a fixed order, and the fast
attention where it is installed."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from emotrain.config import Config
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError

log = logging.getLogger("emotrain")

WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""Variable, and the values with which cuBLAS sums in one order whatever stream it runs on."""
FLASH_ATTENTION_3 = "flash_attn_interface"
"""The module of its package."""


@contextmanager
def kernels_of_torch(config: Config, ranks: Ranks) -> Iterator[None]:
    """`use_flash_attention_3`, and `reproducible` within this context."""
    use_flash_attention_3(ranks)
    with reproducible(config, ranks):
        yield


@contextmanager
def reproducible(config: Config, ranks: Ranks) -> Iterator[None]:
    """Within this context runs on a GPU agree to the bit, where `training.deterministic` asks for
    it: torch takes deterministic algorithms, and refuses an operator that has none. Attention's
    backward adds floats by atomics otherwise. To be entered before the first matrix product of a
    process, at which torch looks for cuBLAS' variable.

    Raises:
        UserError: a setting or a variable that cannot keep the promise.
    """
    if not config.training.deterministic:
        yield
        return
    if config.model.experts.backend == "megablocks" and ranks.device.type == "cuda":
        raise UserError(
            "training.deterministic=true does not cover model.experts.backend=megablocks, which "
            "promises no order of sums; use auto"
        )
    if os.environ.setdefault(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
        raise UserError(
            f"{WORKSPACE}={os.environ[WORKSPACE]} leaves the order of sums open, which "
            f"training.deterministic=true does not; unset it, or set {' or '.join(WORKSPACES)}"
        )
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )
    # Attention's backward stays as it is where torch would only warn.
    torch.use_deterministic_algorithms(True, warn_only=False)
    # It would write all fresh memory once more, in search of faults.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]


def use_flash_attention_3(ranks: Ranks) -> bool:
    """Have torch's attention run FlashAttention 3 in this process, where the package is installed
    and the GPU is the one that it is written for (compute capability 9.0, H100). It computes the
    same; the log says that it does.

    Returns:
        Whether it runs.
    """
    device = ranks.device
    if (
        device.type != "cuda"
        or torch.cuda.get_device_capability(device) != (9, 0)
        or importlib.util.find_spec(FLASH_ATTENTION_3) is None
        or not hasattr(torch.nn.attention, "activate_flash_attention_impl")
    ):
        return False
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        log.warning("FlashAttention 3 does not load, so FlashAttention 2 runs: %s", reason)
        return False
    if ranks.is_first:
        log.info("attention runs FlashAttention 3")
    return True
