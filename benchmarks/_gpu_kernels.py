"""Phases of gpu.py about single kernels: `correct`, `kernels`, `tune`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _gpu_compile import Attempt, compile_ahead
from _gpu_run import (
    PhaseRun,
    Problem,
    Shape,
    Skipped,
    one_thread_of_autograd,
    poisoned_memory,
    problem,
    relative_error,
)
from _measure import random_documents, time_in_turn
from experts import through_grouped_mm, through_loop

from emotrain.config import PoolConfig, RouterConfig
from emotrain.kernels import grouped_mlp, linear_cross_entropy, permute, sort_slots, unpermute
from emotrain.kernels.triton_launch import Launch, recording, tiles
from emotrain.kernels.tuning import GEMM_KERNELS, SPACE, WALKERS, TileConfig, default_tiles
from emotrain.model.router import LayerRequest, decide

LIMITS = {torch.float32: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest relative error of a kernel against its twin in float32."""

PUBLISHED = Shape(32768, 2048, 1024, 127, 7)
TINY = Shape(40, 40, 24, 5, 3)


SANITIZER_S = 60.0
"""Seconds that compute-sanitizer may take over the phase's share of time."""

triton_experts = partial(grouped_mlp, backend="triton")
twin_experts = partial(grouped_mlp, backend="torch")


def correct(run: PhaseRun) -> None:
    """Every kernel, compiled, against its twin in float32: idle and skewed experts, empty slots
    whose weights are NaN, fresh memory full of NaN; and each twice for equal bits."""
    shapes = [TINY]
    if run.is_cuda and not run.tiny:
        shapes = [Shape(*sizes) for sizes in _CORRECT_SHAPES]
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    dtypes = (torch.bfloat16, torch.float32) if run.is_cuda else (torch.float32,)
    for shape in shapes:
        for dtype in dtypes:
            if dtype == torch.float32 and shape.tokens > 20000:
                continue
            for kind in ({}, {"empty": 0.4}, {"skew": 3.0}):
                name = f"experts {shape.describe()} {_short(dtype)} {_kind(kind)}"
                run.item(name, lambda s=shape, d=dtype, k=kind: _experts_agree(run, s, d, k))
    routings = [(50, 9, 3, 4)]
    if run.is_cuda and not run.tiny:
        routings = [
            (16384, 127, 7, 24),
            (65536, 127, 7, 2000),
            (32768, 256, 8, 40),
            (4096, 31, 3, 4096),
        ]
    for tokens, experts, chosen, documents in routings:
        for pool in ("none", "fixed"):
            name = f"routing T{tokens} N{experts} K{chosen} G{documents} pool {pool}"
            sizes = (tokens, experts, chosen, documents)
            run.item(name, lambda s=sizes, p=pool: _routing_agrees(run, s, p))
    run.item("permute and unpermute", lambda: _permute_agrees(run))
    run.item("linear cross entropy", lambda: _cross_entropy_agrees(run))
    for tool in ("memcheck", "racecheck"):
        run.item(f"compute-sanitizer {tool}", lambda t=tool: _sanitized(run, t))


_CORRECT_SHAPES = (
    (1, 2048, 1024, 127, 7),
    (4097, 200, 72, 5, 2),
    (3000, 512, 256, 256, 8),
    (16383, 2048, 1024, 127, 7),
    (16384, 2048, 1024, 127, 7),
    (65536, 2048, 1024, 64, 7),
)


def _experts_agree(
    run: PhaseRun, shape: Shape, dtype: torch.dtype, kind: dict[str, float]
) -> dict[str, float]:
    task = problem(shape, dtype, run.device, **kind)
    return check_experts(task, triton_experts, LIMITS[dtype])


def check_experts(
    task: Problem, experts: Callable[..., torch.Tensor], limit: float
) -> dict[str, float]:
    """Relative error of the result and of each gradient. Raises AssertionError."""
    with poisoned_memory():
        ours, again = task.solve(experts), task.solve(experts)
    theirs = task.wide().solve(twin_experts)
    names = ("y", "grad x", "grad weights", "grad gate_up", "grad down")
    errors = {name: relative_error(a, b) for name, a, b in zip(names, ours, theirs, strict=True)}
    assert max(errors.values()) < limit, f"relative errors {errors}, limit {limit}"
    same = {n: torch.equal(a, b) for n, a, b in zip(names, ours, again, strict=True)}
    assert all(same.values()), f"the second call gave other bits: {same}"
    return errors


def _routing_agrees(run: PhaseRun, sizes: tuple[int, int, int, int], kind: str) -> dict[str, float]:
    """Choices may differ where two logits nearly tie, and nowhere else. `sizes`: tokens, experts,
    experts a token, documents."""
    tokens, experts, chosen, documents = sizes
    batch = random_documents(1, tokens, documents, 8).to(run.device)
    generator = torch.Generator().manual_seed(1)
    logits_TN = torch.randn(tokens, experts, generator=generator).to(run.device)
    sizes_G = torch.randint(1, experts + 1, (documents,), generator=generator).to(run.device)
    pool = None if kind == "none" else PoolConfig(kind="fixed", size=experts)
    request = LayerRequest(pool, None if pool is None else sizes_G)
    outcomes = []
    for backend in ("triton", "torch"):
        leaf_TN = logits_TN.clone().requires_grad_()
        with poisoned_memory():
            decision = decide(leaf_TN, batch, chosen, RouterConfig(), request, backend)
            used_TK = decision.experts_TK < experts
            slope_K = torch.linspace(0.5, 1, chosen, device=run.device)
            total = (torch.where(used_TK, decision.weights_TK, 0) * slope_K).sum()
            total = total + decision.probabilities_TN.square().sum() + decision.lse_T.square().sum()
            outcomes.append((decision, torch.autograd.grad(total, leaf_TN)[0]))
    (ours, our_grad), (theirs, their_grad) = outcomes
    same = float((ours.experts_TK == theirs.experts_TK).float().mean())
    result = {
        "same choices": same,
        "scores": relative_error(ours.scores_GN, theirs.scores_GN) if pool is not None else 0.0,
        "grad logits": relative_error(our_grad, their_grad),
    }
    assert same > 0.9999 and result["scores"] < 1e-4 and result["grad logits"] < 1e-3, result
    counted = ours.counts_N.sum(), (ours.experts_TK < experts).sum()
    assert counted[0] == counted[1], f"counts say {counted[0]} slots, {counted[1]} are in use"
    return result


def _permute_agrees(run: PhaseRun) -> dict[str, float]:
    tokens, width, ranks = (20, 40, 4) if run.tiny or not run.is_cuda else (32768, 2048, 8)
    dtype = torch.bfloat16 if run.is_cuda else torch.float32
    generator = torch.Generator().manual_seed(2)
    goes_TR = torch.rand(tokens, ranks, generator=generator) < 0.6
    to_TR = torch.where(goes_TR, torch.arange(ranks), ranks).to(run.device)
    slots = sort_slots(to_TR, ranks, int(goes_TR.sum()))
    x_TD = torch.randn(tokens, width, generator=generator).to(run.device, dtype)
    with poisoned_memory():
        rows_RD = permute(x_TD, slots, "triton")
        sums_TD = unpermute(rows_RD, slots, tokens, backend="triton")
    assert torch.equal(rows_RD, permute(x_TD, slots, "torch")), "permuted rows differ"
    error = relative_error(sums_TD, unpermute(rows_RD.float(), slots, tokens, backend="torch"))
    assert error < 5e-3, f"relative error of unpermute {error}"
    return {"unpermute": error}


def _head_problem(run: PhaseRun, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and targets, a seventh of them ignored."""
    width, vocab = (16, 50) if tokens < 100 else (PUBLISHED.width, 100352)
    generator = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(tokens, width, generator=generator).to(run.device, _dtype(run))
    head_VD = torch.randn(vocab, width, generator=generator).mul_(width**-0.5)
    head_VD = head_VD.to(run.device, _dtype(run))
    targets_T = torch.randint(vocab, (tokens,), generator=generator).to(run.device)
    targets_T[::7] = -100
    return hidden_TD.requires_grad_(), head_VD.requires_grad_(), targets_T


def _solve_head(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, backend: str
) -> list[torch.Tensor]:
    """Loss and gradients."""
    loss, *_ = linear_cross_entropy(hidden_TD, head_VD, targets_T, 1e-5, backend)
    return [loss, *torch.autograd.grad(loss, (hidden_TD, head_VD))]


def _cross_entropy_agrees(run: PhaseRun) -> dict[str, float]:
    hidden_TD, head_VD, targets_T = _head_problem(run, 5000 if run.is_cuda and not run.tiny else 30)
    with poisoned_memory():
        ours, again = (_solve_head(hidden_TD, head_VD, targets_T, "triton") for _ in range(2))
    wide_TD, wide_VD = (t.detach().float().requires_grad_() for t in (hidden_TD, head_VD))
    theirs = _solve_head(wide_TD, wide_VD, targets_T, "torch")
    names = ("loss", "grad hidden", "grad head")
    errors = {name: relative_error(a, b) for name, a, b in zip(names, ours, theirs, strict=True)}
    assert max(errors.values()) < 2e-2, errors
    assert all(map(torch.equal, ours, again)), "the second call gave other bits"
    return errors


def _sanitized(run: PhaseRun, tool: str) -> str:
    """NVIDIA's checker over the kernels of this phase, at tiny sizes on the GPU."""
    program = shutil.which("compute-sanitizer")
    if not run.is_cuda or program is None:
        raise Skipped("needs a GPU and compute-sanitizer, which comes with the CUDA toolkit")
    out = run.path.parent / tool
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable]
    command += [str(Path(__file__).with_name("gpu.py")), "--tiny", "--out", str(out)]
    command += ["--phases", "correct", "--items", "[elpr]*", "--redo", "correct", "--here"]
    # Ends before the process of this phase is ended, which would count as a failure.
    limit_s = min(300, max(run.deadline - time.monotonic(), 0) + SANITIZER_S)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise Skipped(f"not done within {limit_s:.0f} s") from None
    assert done.returncode == 0, (done.stdout + done.stderr)[-400:]
    return "nothing found"


def launches_of(task: Problem, target: str, chosen: dict[str, TileConfig]) -> list[Launch]:
    """The launches of forward and backward in their order, started once, so that what later ones
    read is there."""
    launches: list[Launch] = []
    with one_thread_of_autograd(), recording(target, launches.append), tiles(chosen):
        task.solve(triton_experts)
    for launch in launches:
        start(launch)
    return launches


def start(launch: Launch) -> None:
    launch.kernel[launch.grid](*launch.arguments, **launch.options)


def target_of(run: PhaseRun) -> str:
    """Architecture, as the tuning tables name it."""
    if not run.is_cuda:
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(run.device)
    return f"sm_{major}{minor}"


def kernels(run: PhaseRun) -> None:
    """Each launch of a published layer, and the whole layer beside torch's grouped GEMM and a loop
    over experts, in turn; and the head with its loss beside its twin."""
    shapes = [TINY]
    if run.is_cuda and not run.tiny:
        shapes = [
            PUBLISHED._replace(tokens=16384),
            PUBLISHED,
            PUBLISHED._replace(tokens=65536, experts=64),
        ]
    for shape in shapes:
        run.item(f"launches {shape.describe()}", lambda s=shape: _time_launches(run, s))
        run.item(f"layer {shape.describe()}", lambda s=shape: _time_layer(run, s))
    for tokens in (16384, 32768) if run.is_cuda and not run.tiny else (30,):
        run.item(f"head T{tokens}", lambda t=tokens: _time_head(run, t))


def _dtype(run: PhaseRun) -> torch.dtype:
    return torch.bfloat16 if run.is_cuda else torch.float32


def _time_launches(run: PhaseRun, shape: Shape) -> list[dict[str, Any]]:
    task = problem(shape, _dtype(run), run.device)
    rows = []
    for launch in launches_of(task, target_of(run), {}):
        ms = run.milliseconds(lambda launch=launch: start(launch))
        moved = launch.cost.bytes_read() + launch.cost.bytes_written()
        rows.append(
            {
                "kernel": launch.name,
                "tile": launch.config.describe() if launch.config else None,
                "ms": ms,
                "tflop_s": launch.cost.flops() / ms / 1e9,
                "tb_s": moved / ms / 1e9,
            }
        )
    return rows


def _time_layer(run: PhaseRun, shape: Shape) -> dict[str, Any]:
    task = problem(shape, _dtype(run), run.device)
    arms: dict[str, Callable[[], Any]] = {
        "triton": lambda: task.solve(triton_experts),
        "grouped_mm": lambda: task.solve(through_grouped_mm),
        "loop": lambda: task.solve(through_loop),
    }
    repeats = 1 if run.tiny else 10
    timings = time_in_turn(arms, repeats, settle=run.settle)
    ms = {name: timing.median for name, timing in timings.items()}
    return {
        "ms": ms,
        "tflop_s": {name: shape.flops / value / 1e9 for name, value in ms.items()},
        "speedup_over_grouped_mm": ms["grouped_mm"] / ms["triton"],
        "speedup_over_loop": ms["loop"] / ms["triton"],
    }


def _time_head(run: PhaseRun, tokens: int) -> dict[str, Any]:
    """Forward and backward of head and loss, and the kernel alone on its first block."""
    task = _head_problem(run, tokens)
    arms = {name: partial(_solve_head, *task, name) for name in ("triton", "torch")}
    timings = time_in_turn(arms, 1 if run.tiny else 10, settle=run.settle)
    ms = {name: timing.median for name, timing in timings.items()}
    launches: list[Launch] = []
    with one_thread_of_autograd(), recording(target_of(run), launches.append):
        _solve_head(*task, "triton")
    kernel_ms = run.milliseconds(lambda: start(launches[0]))
    moved = launches[0].cost.bytes_read() + launches[0].cost.bytes_written()
    flops = 6 * task[0].numel() * task[1].shape[0]
    return {
        "ms": ms,
        "tflop_s": {name: flops / value / 1e9 for name, value in ms.items()},
        "speedup_over_torch": ms["torch"] / ms["triton"],
        "kernel": {"ms": kernel_ms, "tb_s": moved / kernel_ms / 1e9},
    }


def candidates(kernel: str, rows: int | None, tiny: bool) -> list[TileConfig]:
    """Tiles to time: those of SPACE with other groups and one more stage; `rows` keeps those that
    walk tiles of so many slots."""
    base = [tile for tile in SPACE[kernel] if rows in (None, tile.rows)]
    if tiny:
        return base[:1]
    varied = [replace(tile, group=group) for tile in base for group in (1, 4, 16)]
    return [*base, *varied, *(replace(tile, stages=tile.stages + 1) for tile in base)]


def tune(run: PhaseRun) -> None:
    """Time every tile of SPACE and its neighbours on the published layer. Three of the kernels walk
    the same tiles of slots: their rows are chosen together."""
    shape = PUBLISHED if run.is_cuda and not run.tiny else TINY
    task = problem(shape, _dtype(run), run.device)
    attempts = _attempts(default_tiles(target_of(run), torch.bfloat16), run.tiny)
    if run.is_cuda:
        left = run.deadline - time.monotonic()
        every = [attempt for of_rows in attempts.values() for attempt in of_rows]
        of_layer = (target_of(run), _dtype(run), shape)
        run.item("compiled ahead", lambda: compile_ahead(*of_layer, every, left / 3))
    best: dict[int, dict[str, tuple[float, TileConfig]]] = {rows: {} for rows in attempts}
    for rows, of_rows in attempts.items():
        for attempt in of_rows:
            _try(run, task, attempt, best[rows])
    alone = best.pop(0)
    whole = [found for found in best.values() if len(found) == len(WALKERS)]
    if not whole or not alone:
        return
    fastest = min(whole, key=lambda found: sum(ms for ms, _ in found.values())) | alone
    chosen = {name: fastest[name][1] for name in GEMM_KERNELS}

    def confirm() -> dict[str, Any]:
        with one_thread_of_autograd(), tiles(chosen):
            check_experts(task, triton_experts, LIMITS[_dtype(run)])
        return {
            "table": table_of(chosen),
            "ms": {name: fastest[name][0] for name in GEMM_KERNELS},
        }

    run.results.pop("chosen", None)
    run.item("chosen", confirm)


def _attempts(base: dict[str, TileConfig], tiny: bool) -> dict[int, list[Attempt]]:
    """What is timed: by the rows of the tiles that kernels walk together, and under 0 what walks
    none."""
    attempts = {}
    for rows in sorted({tile.rows for tile in SPACE["gate_up"]}, reverse=True):
        start_from = {
            name: base[name] if base[name].rows == rows else candidates(name, rows, True)[0]
            for name in WALKERS
        }
        attempts[rows] = [
            Attempt(name, tile, start_from)
            for name in WALKERS
            for tile in dict.fromkeys([start_from[name], *candidates(name, rows, tiny)])
        ]
    others = dict.fromkeys([base["weight_grad"], *candidates("weight_grad", None, tiny)])
    return attempts | {0: [Attempt("weight_grad", tile, base) for tile in others]}


def _try(
    run: PhaseRun, task: Problem, attempt: Attempt, best: dict[str, tuple[float, TileConfig]]
) -> None:
    """Time a kernel with a tile; it becomes the best one where it is."""
    name, tile, others = attempt

    def measure() -> float:
        mine = [
            launch
            for launch in launches_of(task, target_of(run), others | {name: tile})
            if launch.name == name
        ]
        return sum(run.milliseconds(lambda launch=launch: start(launch)) for launch in mine)

    def refused() -> float:
        try:
            return measure()
        except Exception as error:
            # More shared memory or registers than there are is an answer too.
            if "out of resource" not in str(error).lower():
                raise
            raise Skipped(" ".join(str(error).split())[:200]) from None

    ms = run.item(f"{name} {tile.describe()} g{tile.group}", refused)
    if ms is not None and (name not in best or ms < best[name][0]):
        best[name] = (ms, tile)


def table_of(chosen: dict[str, TileConfig]) -> str:
    """An entry of `DEFAULTS` in kernels/tuning.py."""
    lines = [
        f'    "{name}": TileConfig({t.rows}, {t.columns}, {t.depth}, {t.warps}, {t.stages}, '
        f"group={t.group}),"
        for name, t in chosen.items()
    ]
    return "\n".join(["torch.bfloat16: {", *lines, "},"])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(kind: dict[str, float]) -> str:
    return " ".join(f"{name} {value:g}" for name, value in kind.items()) or "even"
