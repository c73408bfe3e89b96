"""Proves the suite itself: it never touches a visible GPU, and the tests of tests/gpu never touch
the interpreter and say why they are skipped."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import torch

from tests.conftest import ROOT
from tests.processes import run_ranks


def gpu_tests(*paths: str) -> tuple[str, bool, bool]:
    """What pytest prints about tests/gpu, and whether kernels were interpreted and GPUs hidden."""
    program = (
        "import os, sys, pytest; code = pytest.main(sys.argv[1:]); "
        "print(code == 0, 'triton_interpreter' in sys.modules, "
        "os.environ.get('CUDA_VISIBLE_DEVICES') == '')"
    )
    environ = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", program, "-q", "-rs", *paths],
        cwd=ROOT, env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    passed, interpreted, hidden = done.stdout.split()[-3:]
    assert passed == "True", done.stdout
    return done.stdout, interpreted == "True", hidden == "True"


def test_no_gpu_is_visible_here_and_in_what_tests_start() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_tests_of_a_gpu_run_by_themselves_with_compiled_kernels() -> None:
    printed, interpreted, hidden = gpu_tests("tests/gpu")
    assert not interpreted and not hidden
    assert torch.version.cuda or "needs a GPU, none was found" in printed


def test_beside_other_tests_they_are_skipped_with_the_command() -> None:
    printed, interpreted, hidden = gpu_tests(
        "tests/gpu", "tests/test_suite.py::test_no_gpu_is_visible_here_and_in_what_tests_start"
    )
    assert interpreted and hidden and "1 passed" in printed
    assert "needs a GPU and a process of its own: pytest tests/gpu" in printed


class Garbage:
    """What waits for the collector, as a process group does that an exception held."""

    collected_by: list[int] = []

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        Garbage.collected_by.append(os.getpid())


def test_a_forked_rank_leaves_the_garbage_of_its_parent_alone() -> None:
    gc.collect()
    gc.disable()
    try:
        Garbage()
        (collected,) = run_ranks(lambda _ranks: (gc.collect(), Garbage.collected_by)[1], 1)
    finally:
        gc.enable()
    assert collected == [], "the rank collected what its parent left"
    gc.collect()
    assert Garbage.collected_by == [os.getpid()], "there was nothing to collect"
