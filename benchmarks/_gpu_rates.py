"""Phases of gpu.py about the machine: `env`, and `rates`, which gives the entries of
emotrain/planning/hardware.py as measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from typing import Any

import torch
from _gpu_kernels import kernels
from _gpu_model import gpu_of
from _gpu_run import PhaseRun, Skipped, read_phase
from torch import Tensor

from emotrain.planning.hardware import RATES

PACKAGES = (
    "torch", "triton", "numpy", "omegaconf", "pyarrow", "rich", "tokenizers", "safetensors",
    "transformers", "sonic-moe", "pytest",
)  # fmt: skip


def env(run: PhaseRun) -> None:
    """What the machine is and what its simplest operations reach."""
    run.item("versions", lambda: _versions(run))
    run.item("copy TB/s", lambda: _copy(run)[-1])
    run.item("bf16 matmul TFLOP/s", lambda: max(_matmuls(run)))
    run.item("eager operator us", lambda: 1e6 * _host_seconds(run))
    run.item("fp32 router products ms", lambda: _router_products(run))
    run.item("sort and count ms", lambda: _sorts(run))


def _versions(run: PhaseRun) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if run.is_cuda:
        properties = torch.cuda.get_device_properties(run.device)
        found["device"] = properties.name
        found["memory_gib"] = properties.total_memory / 2**30
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if shutil.which("nvidia-smi"):
            query = [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.max.sm",
                "--format=csv,noheader",
            ]
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
            found["driver, largest clock"] = done.stdout.strip()
    return found


def _normal(run: PhaseRun, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device=run.device).to(dtype)


def _copy(run: PhaseRun) -> list[float]:
    """TB/s of copies of a quarter, a half and a whole of the largest size, read and write."""
    largest = 1 << 31 if run.is_cuda and not run.tiny else 1 << 20
    rates = []
    for size in (largest // 4, largest // 2, largest):
        source = torch.zeros(size, dtype=torch.uint8, device=run.device)
        target = torch.empty_like(source)
        rates.append(2 * size / run.milliseconds(lambda s=source, t=target: t.copy_(s)) / 1e9)
    return rates


def _matmuls(run: PhaseRun) -> list[float]:
    """TFLOP/s of bfloat16 products of the published model: qkv, output head, shared expert, and a
    square."""
    shapes = [(64, 64, 64), (64, 32, 16)]
    if run.is_cuda and not run.tiny:
        shapes = [
            (32768, 6144, 2048),
            (2048, 100352, 2048),
            (32768, 2048, 2048),
            (8192, 8192, 8192),
        ]
    rates = []
    for m, n, k in shapes:
        a_MK = _normal(run, m, k, dtype=torch.bfloat16)
        b_KN = _normal(run, k, n, dtype=torch.bfloat16)
        rates.append(2 * m * n * k / run.milliseconds(lambda a=a_MK, b=b_KN: a @ b) / 1e9)
    return rates


def _host_seconds(run: PhaseRun) -> float:
    """Seconds an operator of eager torch, autograd included: the host's, as its kernels are
    shorter."""
    count = 2000 if run.is_cuda else 20
    value = torch.ones(8, device=run.device, requires_grad=True)
    run.settle()
    started = time.perf_counter()
    total = value
    for _ in range(count // 2):
        total = total * 1.0
    total.sum().backward()
    run.settle()
    return (time.perf_counter() - started) / count


def _router_products(run: PhaseRun) -> dict[str, float]:
    """The router's float32 products; that of its gradient sums over all tokens into a small
    matrix."""
    tokens, width, experts = (32768, 2048, 128) if run.is_cuda and not run.tiny else (64, 32, 8)
    x_TD, weight_ED, grad_TE = (
        _normal(run, *size) for size in ((tokens, width), (experts, width), (tokens, experts))
    )
    return {
        "forward": run.milliseconds(lambda: x_TD @ weight_ED.t()),
        "grad x": run.milliseconds(lambda: grad_TE @ weight_ED),
        "grad weight": run.milliseconds(lambda: grad_TE.t() @ x_TD),
    }


def _sorts(run: PhaseRun) -> dict[str, float]:
    slots = 458752 if run.is_cuda and not run.tiny else 256
    keys = torch.randint(0, 128, (slots,), device=run.device)
    short, ones = keys.to(torch.uint8), torch.ones_like(keys)
    counters = torch.zeros(66, dtype=torch.int64, device=run.device)
    index = keys % 66
    return {
        "sort int64": run.milliseconds(lambda: torch.sort(keys, stable=True)),
        "sort uint8": run.milliseconds(lambda: torch.sort(short, stable=True)),
        "scatter_add into 66": run.milliseconds(lambda: counters.scatter_add_(0, index, ones)),
    }


def rates(run: PhaseRun) -> None:
    """The numbers that the time model assumes, as measured: worst, median and best of several.
    Those of links between GPUs stay assumed."""
    gpu = run.item("gpu", lambda: gpu_of(run).name)
    if gpu is None:
        return
    peak = gpu_of(run)
    run.item("dense_gemm", lambda: [r * 1e12 / peak.bf16_flops for r in _matmuls(run)])
    run.item("grouped_gemm", lambda: _grouped_gemms(run, peak.bf16_flops))
    run.item("flash_attention", lambda: _attention(run, peak.bf16_flops))
    run.item("memory", lambda: [r * 1e12 / peak.memory_bytes_s for r in _copy(run)])
    run.item("launch_s", lambda: [_launch_seconds(run) for _ in range(3)])
    run.item("host_s", lambda: [_host_seconds(run) for _ in range(3)])
    run.item("sync_s", lambda: [_sync_seconds(run) for _ in range(3)])
    run.results.pop("hardware.py", None)
    run.item("hardware.py", lambda: rates_text(run.results, "a rehearsal" if run.tiny else gpu))


def _grouped_gemms(run: PhaseRun, peak: float) -> list[float]:
    """From the file of the phase `kernels`, which is run first where it is not there."""
    path = run.path.with_name("kernels.json")
    content = read_phase(path)
    if content is None or content["settings"] != run.settings:
        kernels(PhaseRun("kernels", path, run.settings, 60))
        content = read_phase(path)
    assert content is not None
    launches = [
        launch
        for name, rows in content["items"].items()
        if name.startswith("launches ")
        for launch in rows
    ]
    shares = [row["tflop_s"] * 1e12 / peak for row in launches if row["tflop_s"] > 0]
    if not shares:
        raise Skipped("the phase kernels has timed no grouped GEMM")
    return shares


def _attention(run: PhaseRun, peak: float) -> list[float]:
    """Share of the peak of causal attention, forward and backward, at the published heads."""
    lengths = (1024, 2048, 4096) if run.is_cuda and not run.tiny else (16, 32)
    shares = []
    for length in lengths:
        rows = 2 * lengths[-1] // length
        q, k, v = (
            _normal(run, rows, 16, length, 128, dtype=torch.bfloat16).requires_grad_()
            for _ in range(3)
        )
        grad = torch.ones_like(q)

        def call(q=q, k=k, v=v, grad=grad) -> None:
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), grad)

        # Two products forward, five in backward; half of the scores.
        flops = 7 * rows * 16 * length * length * 128
        shares.append(flops / run.milliseconds(call) * 1e3 / peak)
    return shares


def _launch_seconds(run: PhaseRun) -> float:
    """Seconds between two kernels of a CUDA graph, where no host is in the way."""
    value, count = torch.zeros(1, device=run.device), 1000 if run.is_cuda else 20
    if not run.is_cuda:
        return _host_seconds(run)
    graph = torch.cuda.CUDAGraph()
    value.add_(1)
    run.settle()
    with torch.cuda.graph(graph):
        for _ in range(count):
            value.add_(1)
    graph.replay()
    run.settle()
    started = time.perf_counter()
    graph.replay()
    run.settle()
    return (time.perf_counter() - started) / count


def _sync_seconds(run: PhaseRun) -> float:
    """Seconds of a read of a value and of the operator after it."""
    value, count = torch.zeros(1, device=run.device), 200 if run.is_cuda else 20
    run.settle()
    started = time.perf_counter()
    for _ in range(count):
        value.add_(1)
        value.item()
    return (time.perf_counter() - started) / count


def rates_text(measured: dict[str, Any], where: str) -> str:
    """Entries of `RATES` in emotrain/planning/hardware.py, to be pasted there."""
    lines = []
    for name, values in measured.items():
        if name not in RATES or not values:
            continue
        old, ordered = RATES[name], sorted(values)
        # Of seconds the smallest is the best, of shares the largest.
        if old.optimistic < old.pessimistic:
            ordered.reverse()
        middle, worst, best = ordered[len(ordered) // 2], ordered[0], ordered[-1]
        numbers = ", ".join(f"{value:.3g}" for value in (middle, worst, best))
        meaning = old.meaning.replace("; not timed on a GPU yet", "")
        meaning = json.dumps(f"{meaning} ({where})")
        lines.append(f'"{name}": Rate({numbers}, "measured", {meaning}),')
    return "\n".join(lines)
