"""RUN_DIR/environment.json: what a run ran on. Each start of the run adds an entry, so that the
file also says how often it was stopped and went on, and what had changed by then."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import emotrain
from emotrain.config import Config
from emotrain.data.manifest import MANIFEST
from emotrain.data.mixture import Mixture
from emotrain.data.source import DataSource
from emotrain.distributed.ranks import Ranks
from emotrain.files import json_text, sha256_of, write_whole

FILE, FORMAT = "environment.json", 1
PACKAGES = ("emotrain", "torch", "triton", "numpy", "tokenizers", "deepspeed")
MOST_HASHED = 2**28
"""Bytes of a file of data that are hashed at a start, in some tenths of a second."""
MOST_STARTS = 1000
"""Of more starts the first and the newest are kept."""


def note_start(config: Config, step: int, ranks: Ranks, loader: DataSource) -> Path:
    """Add this start of a run to its environment.json; returns its path.

    Args:
        step: the step that the run goes on from; 0 for a fresh start.
    """
    run_dir = Path(config.training.run_dir)
    data = data_of(loader, Path(config.data.path))
    starts = [*read_starts(run_dir), {"step": step, **environment(ranks), "data": data}]
    starts = [*starts[:1], *starts[1:][1 - MOST_STARTS :]]
    text = json_text({"format": FORMAT, "starts": starts}, indent=1, ensure_ascii=False)
    return write_whole(run_dir / FILE, (text + "\n").encode("utf-8", "replace"))


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts that a run has noted, the oldest first; none of a file that is not readable as
    one: what a run ran on is no reason to stop it."""
    try:
        value = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        starts = value["starts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [s for s in starts if isinstance(s, dict)] if isinstance(starts, list) else []


def environment(ranks: Ranks) -> dict[str, Any]:
    """Time, command, code, versions and hardware of this process."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_of(Path(emotrain.__file__).parent),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": _device(ranks),
        "processes": ranks.world_size,
        "cpu": {"model": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "system": platform.platform(),
    }


def data_of(loader: DataSource, path: Path) -> dict[str, Any]:
    """What identifies the data of a run, and how much of it an epoch has.

    Args:
        path: a data set's folder, of which the manifest is hashed, or a file, which is hashed
            unless it is large: of token files the fingerprint says enough.
    """
    file = path / MANIFEST if path.is_dir() else path
    hashed = file.is_file() and file.stat().st_size <= MOST_HASHED
    of_sources = {"sources": loader.described()} if isinstance(loader, Mixture) else {}
    return {
        "fingerprint": loader.fingerprint,
        "sequences": loader.num_sequences,
        "tokens": loader.num_tokens,
        "sha256": sha256_of(file) if hashed else "",
        **of_sources,
    }


def git_of(folder: Path) -> Mapping[str, Any] | None:
    """Commit of the code in a folder, and whether files of it differ from that; None where it is
    no part of a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True, text=True, errors="replace", check=True, timeout=10,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        # An installed package may lie in an environment inside of somebody's repository.
        git("ls-files", "--error-unmatch", "__init__.py")
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(dirty)}
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build: +cpu, +cu130
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _device(ranks: Ranks) -> dict[str, Any]:
    if ranks.device.type != "cuda":
        return {"type": ranks.device.type}
    properties = torch.cuda.get_device_properties(ranks.device)
    return {
        "type": "cuda",
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
    }


def _cpu() -> str:
    """Name of the processor, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = (line.partition(":")[2].strip() for line in file if "model name" in line)
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()
