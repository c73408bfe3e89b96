"""What the phases of gpu.py share: items that are measured once and kept, checks, clocks, and the
problems that kernels are tried on."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emotrain.kernels import SortedSlots, sort_slots


class Skipped(Exception):
    """An item that this machine cannot do; the text says why. It is kept, and no failure."""


class PhaseRun:
    """One phase under way. Its file is written after every item, so that a time limit loses the
    item under way alone, and an item that the file already holds is not done again."""

    def __init__(
        self, phase: str, path: Path, settings: dict[str, Any], seconds: float, items: str = "*"
    ):
        """
        Args:
            settings: the file of a run with others is not gone on from.
            seconds: after so long no further item is begun.
            items: pattern of the items to do.
        """
        self.phase, self.path, self.settings = phase, path, settings
        # With its index, which some of torch asks for.
        self.device = (
            torch.device("cuda", 0) if settings["device"] == "cuda" else torch.device("cpu")
        )
        self.tiny: bool = settings["tiny"]
        self.deadline, self.items = time.monotonic() + seconds, items
        kept = read_phase(path)
        same = kept is not None and kept["settings"] == settings
        self.content: dict[str, Any] = (
            kept
            if kept is not None and same
            else {
                "phase": phase,
                "whole": False,
                "settings": settings,
                "items": {},
                "failed": {},
                "skipped": {},
                "left_out": [],
            }
        )
        self.content["left_out"] = []

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def results(self) -> dict[str, Any]:
        return self.content["items"]

    def item(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure()` returns, which JSON must take: kept from an earlier run, or measured now
        and written. None where no time is left, or where it was skipped or failed: any exception
        is a failed check."""
        if name in self.results or not fnmatch.fnmatch(name, self.items):
            return self.results.get(name)
        if time.monotonic() > self.deadline:
            self.content["left_out"].append(name)
            return None
        for earlier in (self.content["failed"], self.content["skipped"]):
            earlier.pop(name, None)
        started = time.monotonic()
        try:
            self.results[name] = measure()
        except Skipped as reason:
            self.content["skipped"][name] = str(reason)
        except Exception as error:
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            self.content["failed"][name] = " ".join(f"{type(error).__name__}: {error}".split())[
                :500
            ]
        self.save()
        self._log(name, time.monotonic() - started)
        return self.results.get(name)

    def _log(self, name: str, seconds: float) -> None:
        if name in self.content["failed"]:
            word, text = "FAILED", self.content["failed"][name]
        elif name in self.content["skipped"]:
            word, text = "skipped", self.content["skipped"][name]
        else:
            word, text = "ok", json.dumps(self.results[name])[:160]
        log(f"  {word:<8}{name} ({seconds:.1f} s): {text}")

    def save(self, whole: bool = False) -> None:
        """Write the file in one step: it is the old one or the new one, never half of one."""
        self.content["whole"] = whole
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Median time of a call, with an emptied L2 cache on a GPU; once on the CPU form."""
        if self.is_cuda:
            from triton.testing import do_bench

            return do_bench(call, warmup=25, rep=100, return_mode="median")
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)

    def step_seconds(self, step: Callable[[], Any], repeats: int = 5) -> float:
        """Median wall time of a whole step, after one that is not counted."""
        taken = []
        for _ in range(1 + (1 if self.tiny else repeats)):
            self.settle()
            started = time.perf_counter()
            step()
            self.settle()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])

    def forget_memory(self) -> None:
        """Give free memory back, and count the peak anew."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def settle(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()


def read_phase(path: Path) -> dict[str, Any] | None:
    """The file of a phase; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN and of the largest integers: what a kernel should have written
    and did not, shows. torch does it, together with its deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


@contextlib.contextmanager
def one_thread_of_autograd() -> Iterator[None]:
    """Backward runs in the thread that calls it, also on a GPU. What `recording` and `tiles` of the
    kernels' launches say belongs to a thread."""
    with torch.autograd.set_multithreading_enabled(False):
        yield


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over that of `theirs`; infinite where `ours` is not finite."""
    ours, theirs = ours.detach(), theirs.detach()
    if not bool(ours.isfinite().all()):
        return float("inf")
    norm = theirs.double().norm().clamp(min=1e-30)
    return float((ours.double() - theirs.double()).norm() / norm)


class Shape(NamedTuple):
    """Routed experts of one layer."""

    tokens: int
    width: int
    hidden: int
    experts: int
    chosen: int

    def describe(self) -> str:
        return f"T{self.tokens} D{self.width} H{self.hidden} N{self.experts} K{self.chosen}"

    @property
    def flops(self) -> int:
        """Forward and backward: three matrices a slot, three times over."""
        return 18 * self.tokens * self.chosen * self.width * self.hidden


class Problem(NamedTuple):
    """What the routed experts of a layer get."""

    leaves: tuple[Tensor, Tensor, Tensor, Tensor]
    """Tokens, routing weights, gate and up, down: each asks for a gradient."""
    slots: SortedSlots
    grad_TD: Tensor

    def solve(self, experts: Callable[..., Tensor]) -> list[Tensor]:
        """Result and the four gradients of `experts`, called as `grouped_mlp` is."""
        x_TD, weights_TK, gate_up_NFD, down_NHD = self.leaves
        y_TD = experts(x_TD, weights_TK, self.slots, gate_up_NFD, down_NHD)
        return [y_TD, *torch.autograd.grad(y_TD, self.leaves, self.grad_TD.to(y_TD.dtype))]

    def wide(self) -> Problem:
        """The same numbers in float32."""
        x_TD, weights_TK, gate_up_NFD, down_NHD = (
            leaf.detach().float().requires_grad_() for leaf in self.leaves
        )
        leaves = (x_TD, weights_TK, gate_up_NFD, down_NHD)
        return Problem(leaves, self.slots, self.grad_TD.float())


def problem(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    empty: float = 0.0,
    skew: float = 0.0,
    seed: int = 0,
) -> Problem:
    """Random routing and values.

    Args:
        empty: share of slots without an expert; their weights are NaN, which must not be read.
        skew: how much the first experts are preferred; 0 is even.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator).mul_(scale)

    tokens, width, hidden, experts, chosen = shape
    liking_TN = torch.rand(tokens, experts, generator=generator)
    liking_TN -= skew * torch.linspace(0, 1, experts)
    experts_TK = liking_TN.topk(chosen, dim=1).indices
    if empty:
        is_empty_TK = torch.rand(tokens, chosen, generator=generator) < empty
        experts_TK = torch.where(is_empty_TK, experts, experts_TK)
    weights_TK = torch.rand(tokens, chosen, generator=generator)
    weights_TK = torch.where(experts_TK < experts, weights_TK, torch.nan)
    x_TD, grad_TD = normal(tokens, width), normal(tokens, width)
    # The banks are large: drawn where they are used.
    on_device = torch.Generator(device).manual_seed(seed)
    gate_up_NFD, down_NHD = (
        torch.randn(size, generator=on_device, device=device).mul_(size[-1] ** -0.5)
        for size in ((experts, 2 * hidden, width), (experts, hidden, width))
    )
    leaves = (
        x_TD.to(device, dtype).requires_grad_(),
        weights_TK.to(device).requires_grad_(),
        gate_up_NFD.to(dtype).requires_grad_(),
        down_NHD.to(dtype).requires_grad_(),
    )
    slots = sort_slots(experts_TK.to(device), experts, int((experts_TK < experts).sum()))
    return Problem(leaves, slots, grad_TD.to(device, dtype))
