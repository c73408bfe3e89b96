"""Kernels of our own for CPUs: C++ that is compiled once for a machine, and loaded by ctypes. They
know nothing of torch but the addresses of tensors."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from emotrain.errors import MissingFileError

log = logging.getLogger("emotrain")

HEADER = Path(__file__).with_name("cpu_vectors.h")
"""What every source may include."""
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)


def load(source: Path, otherwise: str) -> ctypes.CDLL | None:
    """The compiled kernel; None, and one line in the log, where it cannot be compiled or loaded.

    Args:
        otherwise: what happens without it, in words.
    """
    try:
        return ctypes.CDLL(str(compiled(source)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("%s: no kernel for this CPU (%s)", otherwise, " ".join(reason.split())[:300])
        return None


def compiled(source: Path) -> Path:
    """The shared library for this source, compiler and CPU, compiled unless it is in the cache.

    Processes that start at once each compile under a name of their own and rename: whoever is last
    replaces equal by equal.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise MissingFileError("g++ is not installed")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    key = hashlib.sha256(
        "\0".join(
            [
                source.read_text(encoding="utf-8"),
                HEADER.read_text(encoding="utf-8"),
                *FLAGS,
                version,
                _cpu(),
            ]
        ).encode()
    ).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emotrain"
    target = folder / f"{source.stem}-{key}.so"
    if not target.exists():
        log.info("compiling %s for this CPU (once)", source.name)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / target.name
            subprocess.run(
                [compiler, *FLAGS, str(source), "-o", str(made)],
                capture_output=True,
                text=True,
                check=True,
                timeout=300,
            )
            made.replace(target)
    return target


def _cpu() -> str:
    """What `-march=native` depends on: a cache may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return "\n".join(
        [
            platform.machine(),
            *dict.fromkeys(
                line for line in lines if line.startswith(("model name", "flags", "Features"))
            ),
        ]
    )
