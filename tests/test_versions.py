"""Proves the versions that pyproject.toml allows. Every other test runs with those that are
installed; the long test here runs those of what depends on versions with older ones, each stack in
an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import triton
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from emotrain.distributed.faults import flight_record
from tests.conftest import ROOT

STACKS = [("3.12", "2.11.0", "3.6.0"), ("3.13", "2.12.1", "3.7.1")]
"""Python, torch and Triton as they come together on machines with a GPU, oldest first."""

SENSITIVE = [
    *("varlen", "fsdp_versions", "transformer", "training", "parallelize", "layout", "dispatch"),
    *("checkpoint_layouts", "kernels_*", "gathers", "host_waits", "deepspeed*", "plan*"),
    *("evaluation_layouts", "while_training", "placement", "sharing", "gpu_benchmark"),
]
"""Tests of what depends on torch and Triton most, by the name of their files."""


def allowed(package: str) -> SpecifierSet:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["kernels"]]
    return next(r.specifier for r in map(Requirement, lines) if r.name == package)


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_what_is_allowed_begins_with_the_oldest_and_holds_what_is_installed(package: str) -> None:
    specifier = allowed(package)
    oldest = {"torch": STACKS[0][1], "triton": STACKS[0][2]}[package]
    installed = {"torch": torch, "triton": triton}[package].__version__
    assert f">={oldest.removesuffix('.0')}" in map(str, specifier)
    assert specifier.contains(installed) and specifier.contains(oldest)


@pytest.mark.parametrize("recorders", [("nccl",), ("fr",), ("nccl", "fr"), ()])
def test_collectives_are_read_from_every_recorder_that_torch_has(monkeypatch, recorders) -> None:
    """Builds for a CPU have no recorder of NCCL."""
    of_torch = torch._C._distributed_c10d
    for name in ("nccl", "fr"):
        monkeypatch.delattr(of_torch, f"_dump_{name}_trace_json", raising=False)
    for created, name in enumerate(reversed(recorders)):
        dumped = json.dumps({"entries": [{"time_created_ns": created}]})
        monkeypatch.setattr(
            of_torch, f"_dump_{name}_trace_json", lambda dumped=dumped: dumped, raising=False
        )
    assert [entry["time_created_ns"] for entry in flight_record()] == list(range(len(recorders)))


def environment(folder: Path, python: str, torch_version: str, triton_version: str) -> Path:
    """A Python in `folder` with the project and the two versions; this Python's kind where `python`
    is not on the machine. Skips the test where packages cannot be had."""
    environ = {**os.environ, "PYENV_VERSION": python}  # for pyenv, which hides what is not chosen
    try:
        ask = [f"python{python}", "-c", "import sys; print(sys.executable)"]
        found = subprocess.run(ask, env=environ, capture_output=True, text=True, check=True)
        base = found.stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        base = sys.executable
    subprocess.run([base, "-m", "venv", folder], check=True)
    versions = (f"torch=={torch_version}", f"triton=={triton_version}")
    # Most of what comes is never imported: what is compiles itself.
    options = ("--quiet", "--no-cache-dir", "--no-compile")
    pip = [folder / "bin" / "python", "-m", "pip", "install", *options]
    done = subprocess.run(
        [*pip, *versions, "-e", f"{ROOT}[test]"], capture_output=True, text=True, timeout=3600
    )
    if done.returncode and "No matching distribution found for" in done.stderr:
        pytest.skip(f"{' and '.join(versions)}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "bin" / "python"


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("stack", STACKS, ids=" ".join)
def test_other_versions_pass_the_tests_of_what_depends_on_them(stack: tuple[str, str, str]) -> None:
    """A stack takes 6 GB while it runs, most of it torch's CUDA libraries."""
    files = sorted(path for name in SENSITIVE for path in (ROOT / "tests").glob(f"test_{name}.py"))
    with TemporaryDirectory() as folder:
        python = environment(Path(folder), *stack)
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *files],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=2 * 3600,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
