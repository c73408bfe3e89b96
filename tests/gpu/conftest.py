"""Tests that need a GPU: `pytest tests/gpu`, by themselves, since the other tests hide GPUs and
interpret kernels."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def reason_to_skip() -> str | None:
    """Why these tests cannot run in this process."""
    if "triton_interpreter" in sys.modules or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "needs a GPU and a process of its own: pytest tests/gpu"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install 'emotrain[kernels]'"
    if not torch.cuda.is_available():
        return "needs a GPU, none was found"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := reason_to_skip():
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason=reason))
