"""Proves the oldest torch and Triton that pyproject.toml allows, each in a folder of its own before
the installed one."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from tests.conftest import ROOT

OLDEST = {"torch": "2.11.0", "triton": "3.6.0"}


def requirement(name: str) -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["kernels"]]
    return next(r for r in map(Requirement, lines) if r.name == name)


def test_the_range_says_what_is_tested() -> None:
    installed = torch.__version__.split("+")[0]
    for name, version in OLDEST.items():
        allowed = requirement(name).specifier
        oldest = next(part.version for part in allowed if part.operator == ">=")
        assert version.startswith(oldest) and version in allowed
    assert installed in requirement("torch").specifier


def run_with(folder: Path, package: str, *tests: str) -> None:
    """Run tests with another version of a package, without what it depends on."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:"]
    got = subprocess.run(
        [*pip, "--target", str(folder), package], capture_output=True, text=True, timeout=1200
    )
    if got.returncode:
        pytest.skip(f"pip found no {package}: {got.stderr.strip().splitlines()[-1]}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", *tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.long
@pytest.mark.timeout(2500)
def test_kernels_with_the_oldest_triton(tmp_path: Path) -> None:
    package = f"triton=={OLDEST['triton']}"
    names = ("routing", "permute", "grouped_mlp", "cost")
    run_with(tmp_path, package, *(f"tests/test_kernels_{name}.py" for name in names))


@pytest.mark.long
@pytest.mark.timeout(2500)
def test_layouts_with_the_oldest_torch(tmp_path: Path) -> None:
    """Its build for a CPU, from where PIP_EXTRA_INDEX_URL says: the other one needs gigabytes."""
    names = ("varlen", "fsdp_versions", "transformer", "dispatch", "host_waits", "layout")
    package = f"torch=={OLDEST['torch']}+cpu"
    run_with(tmp_path, package, *(f"tests/test_{name}.py" for name in names))
