"""Proves the time of a plan: the simulation of streams against a slow clock and by hand, that the
trace holds what FSDP2 and the dispatcher ask for and wait for, kernels and collectives by hand, and
both published throughputs, predicted within 30 %."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emotrain.config import Config
from emotrain.planning import hardware
from emotrain.planning.cost import VIEWS, StepTime, Work, kernel_seconds, step_time
from emotrain.planning.dry_run import Measured, dry_run
from emotrain.planning.hardware import PROTOCOLS, RATES, Cluster, Rate, find_gpu
from emotrain.planning.meter import Meter
from emotrain.planning.parts import Memory, Part
from emotrain.planning.simulate import Job, simulate
from emotrain.planning.trace import (
    COMPUTE,
    Collective,
    HostWait,
    HostWork,
    Kernel,
    Operation,
    Task,
    rewrite,
)
from emotrain.training.engine import Phase
from tests.conftest import run_command

H100 = find_gpu("h100-80gb")


def config(**overrides) -> Config:
    """A run on 8 processes: 2 layers, 2 micro-batches of one sequence."""
    return tiny_config(
        **{
            "model__num_layers": 2,
            "model__d_model": 32,
            "model__experts__routed": 16,
            "model__router__pool__max": 16,
            "data__sequence_length": 64,
            "training__global_batch": 16,
            "training__micro_batch": 1,
            "training__precision": "bfloat16",
            **overrides,
        }
    )


@cache
def measured(**overrides) -> Measured:
    return dry_run(config(**overrides), 8)


# ---- the simulation


def collective(queue: str, seconds: float, *after: int, **links: float) -> Job:
    return Job(queue, seconds, after, links=links, is_collective=True)


def test_streams_run_side_by_side_and_wait_for_what_they_name() -> None:
    jobs = [
        Job("compute", 2.0),
        collective("gathers", 5.0),
        Job("compute", 1.0),
        Job("compute", 1.0, (1,)),
    ]
    line = simulate(jobs)
    assert line.started == [0, 0, 2, 5] and line.ended == [2, 5, 3, 6] and line.seconds == 6


def test_collectives_slow_kernels_and_share_links() -> None:
    # Each of two collectives takes a tenth of the device.
    line = simulate([Job("compute", 8.0), collective("a", 40.0), collective("b", 40.0)], 0.1)
    assert line.ended[0] == pytest.approx(10) and line.seconds == 40
    # On one link, which each would fill, both take twice as long; the third uses another one.
    jobs = [
        collective("a", 3.0, nvlink=1.0, network=0.1),
        collective("b", 3.0, nvlink=1.0),
        collective("c", 3.0, network=0.9),
    ]
    assert simulate(jobs).ended == pytest.approx([6, 6, 3])


def test_kernels_of_two_streams_share_the_device() -> None:
    assert simulate([Job("compute", 2.0), Job("copies", 1.0)]).ended == pytest.approx([3, 2])


def test_a_device_is_no_faster_than_its_host() -> None:
    jobs = [Job("compute", 1.0, host_s=3.0)] * 4
    assert simulate(jobs).started == [3, 6, 9, 12]


def test_a_host_that_waits_asks_for_nothing() -> None:
    jobs = [
        Job("compute", 5.0, host_s=1.0),
        Job("host", 2.0, (0,), is_host=True),
        Job("compute", 1.0, host_s=1.0),
    ]
    line = simulate(jobs)
    assert line.asked == [1, 8, 9] and line.seconds == 10


@st.composite
def programs(draw: st.DrawFn) -> list[Job]:
    """Jobs of whole seconds on three streams, the second and third of collectives."""
    jobs: list[Job] = []
    for index in range(draw(st.integers(1, 14))):
        after = draw(st.sets(st.integers(0, index - 1), max_size=2)) if index else set()
        seconds = float(draw(st.integers(0, 4)))
        kind = draw(st.sampled_from(("compute", "gathers", "exchange", "host")))
        if kind == "host":
            jobs.append(Job(kind, seconds, tuple(after), is_host=True))
        elif kind == "compute":
            jobs.append(Job(kind, seconds, tuple(after), host_s=float(draw(st.integers(0, 2)))))
        else:
            jobs.append(Job(kind, seconds, tuple(after), is_collective=True))
    return jobs


def by_the_clock(jobs: list[Job]) -> list[int]:
    """When each ends: every second each stream works on its first job that may run, where
    collectives cost kernels nothing and links are wide."""
    ended: list[int | None] = [None] * len(jobs)
    left = [int(job.seconds) for job in jobs]
    asked, asking = 0, int(jobs[0].host_s)
    second = 0

    def free(index: int) -> bool:
        return all(ended[before] is not None for before in jobs[index].after)

    def settle() -> None:
        """All that takes no time."""
        nonlocal asked, asking
        changed = True
        while changed:
            changed = False
            if asked < len(jobs):
                job = jobs[asked]
                done = free(asked) and not left[asked] if job.is_host else not asking
                if done:
                    if job.is_host:
                        ended[asked] = second
                    asked, changed = asked + 1, True
                    asking = int(jobs[asked].host_s) if asked < len(jobs) else 0
            for index in first_of_each():
                if not left[index] and free(index):
                    ended[index], changed = second, True

    def first_of_each() -> list[int]:
        first: dict[str, int] = {}
        for index in range(asked):
            if ended[index] is None:
                first.setdefault(jobs[index].queue, index)
        return list(first.values())

    settle()
    while None in ended:
        works = [index for index in first_of_each() if free(index) and left[index]]
        if asked < len(jobs) and jobs[asked].is_host and free(asked) and left[asked]:
            works.append(asked)
        elif asked < len(jobs) and not jobs[asked].is_host:
            asking -= 1
        for index in works:
            left[index] -= 1
        second += 1
        assert second < 1000
        settle()
    return [end for end in ended if end is not None]


@settings(max_examples=100, deadline=None)
@given(programs())
def test_the_simulation_is_that_of_a_clock(jobs: list[Job]) -> None:
    assert simulate(jobs).ended == pytest.approx(by_the_clock(jobs))


@settings(max_examples=60, deadline=None)
@given(programs(), st.floats(0, 0.3))
def test_between_the_longest_stream_and_all_one_by_one(jobs: list[Job], contention: float) -> None:
    total = simulate(jobs, contention).seconds
    host = sum(job.seconds if job.is_host else job.host_s for job in jobs)
    streams = [
        sum(job.seconds for job in jobs if job.queue == queue)
        for queue in ("compute", "gathers", "exchange")
    ]
    assert total >= max(host, *streams) - 1e-9
    assert total <= host + sum(streams) + 1e-9


# ---- the trace


def before(tasks: list[Task], index: int) -> set[int]:
    """All that has to end before a task starts."""
    last: dict[str, int] = {}
    previous: list[int] = []
    for i, task in enumerate(tasks):
        previous.append(last.get(task.queue, -1))
        last[task.queue] = i
    found, ahead = set(), [index]
    while ahead:
        this = ahead.pop()
        for other in (*tasks[this].after, previous[this]):
            if other >= 0 and other not in found:
                found.add(other)
                ahead.append(other)
    return found


def kinds(tasks: list[Task], kind: str) -> list[int]:
    return [
        index
        for index, task in enumerate(tasks)
        if isinstance(task.operation, Collective) and task.operation.kind == kind
    ]


def test_gathers_and_reductions_run_beside_kernels_that_need_them() -> None:
    tasks = list(measured().tasks)
    gathers, reductions = kinds(tasks, "all_gather"), kinds(tasks, "reduce_scatter")
    assert gathers and reductions
    assert all(tasks[index].queue != COMPUTE for index in (*gathers, *reductions))
    copies = [
        index
        for index, task in enumerate(tasks)
        if isinstance(task.operation, Kernel) and task.operation.name == "split_with_sizes_copy"
    ]
    # Each copies out what one gather brought, and the first copy waits for one gather alone.
    assert len(copies) == len(gathers)
    for number, copy in enumerate(copies):
        assert len(before(tasks, copy) & set(gathers)) >= number + 1
    # The optimizer waits for every reduction.
    update = next(
        index
        for index, task in enumerate(tasks)
        if isinstance(task.operation, Kernel) and "adamw" in task.operation.name
    )
    assert before(tasks, update) >= set(reductions)


def test_a_reduction_waits_for_its_gradients_and_not_for_the_next_block() -> None:
    """Backward goes on while gradients travel: kernels between two reductions are not ahead of the
    first one."""
    tasks = list(measured().tasks)
    first, second = kinds(tasks, "reduce_scatter")[:2]
    kernels = {index for index in range(first, second) if tasks[index].queue == COMPUTE}
    assert kernels and not kernels & before(tasks, first)
    assert kernels & before(tasks, second)


def test_one_communicator_runs_one_collective_at_a_time() -> None:
    tasks = list(measured(parallel__ep=4).tasks)
    exchanges = kinds(tasks, "all_to_all")
    for earlier, later in zip(exchanges, exchanges[1:], strict=False):
        assert earlier in before(tasks, later)
    assert {tasks[index].queue == COMPUTE for index in exchanges} == {True, False}


def test_the_host_waits_for_split_sizes_and_the_shared_expert_runs_while_tokens_travel() -> None:
    tasks = list(measured(parallel__ep=4).tasks)
    exchanges = kinds(tasks, "all_to_all")
    sizes = [index for index in exchanges if tasks[index].queue == COMPUTE]
    waits = [index for index, task in enumerate(tasks) if isinstance(task.operation, HostWait)]
    assert all(
        any(size in tasks[wait].after or size in before(tasks, wait) for wait in waits)
        for size in sizes
    )
    shared = next(
        index
        for index, task in enumerate(tasks)
        if isinstance(task.operation, Kernel) and task.operation.part == Part.SHARED_EXPERTS
    )
    there = [index for index in exchanges if sizes[0] < index < shared]
    assert there and not set(there) & before(tasks, shared)


def test_operations_are_replaced_and_what_waited_waits_for_the_last() -> None:
    def kernel(name: str) -> Kernel:
        return Kernel(name, Part.EXPERTS, Phase.FORWARD, torch.bfloat16, 0, 8)

    tasks = [
        Task(kernel("a"), COMPUTE),
        Task(kernel("gone"), COMPUTE),
        Task(kernel("beside"), "stream 0", (1,)),
        Task(kernel("more"), COMPUTE, (2,)),
        Task(kernel("end"), "stream 0", (3,)),
    ]
    instead: dict[str, list[Operation]] = {
        "gone": [],
        "more": [kernel("b"), HostWork(1.0), kernel("c")],
    }
    found = rewrite(tasks, lambda task: instead.get(getattr(task.operation, "name", "")))
    assert found == [
        Task(kernel("a"), COMPUTE),
        Task(kernel("beside"), "stream 0", (0,)),
        Task(kernel("b"), COMPUTE, (1,)),
        Task(HostWork(1.0), "host", (1, 2)),
        Task(kernel("c"), COMPUTE, (1,)),
        Task(kernel("end"), "stream 0", (4,)),
    ]


def test_gathered_parameters_are_no_activations() -> None:
    kept, again = (
        measured(
            parallel__reshard_after_forward=keep, data__sequence_length=16, model__num_layers=5
        ).at_peak
        for keep in (False, True)
    )
    assert kept[Memory.GATHERED] > 1.5 * again[Memory.GATHERED]
    assert kept[Memory.ACTIVATIONS] == pytest.approx(again[Memory.ACTIVATIONS], rel=0.1)


# ---- kernels and collectives


def bytes_of(name: str, run) -> int:
    with Meter() as meter:
        run()
    (kernel,) = {kernel for kernel in meter.kernels if kernel.name == name}
    return kernel.bytes


def test_what_is_changed_in_place_is_read_and_written() -> None:
    x, y = torch.zeros(100), torch.ones(100)
    assert bytes_of("add_", lambda: x.add_(y)) == 3 * 400
    assert bytes_of("copy_", lambda: x.copy_(y)) == 2 * 400
    assert bytes_of("zero_", lambda: x.zero_()) == 400
    assert bytes_of("_foreach_mul_", lambda: torch._foreach_mul_([x, y], 2.0)) == 2 * 800
    assert bytes_of("_foreach_copy_", lambda: torch._foreach_copy_([x], [y])) == 2 * 400
    assert bytes_of("add", lambda: torch.add(x, y, out=torch.empty(100))) == 3 * 400
    weight = nn.Parameter(torch.zeros(100))
    weight.grad = torch.zeros(100)
    optimizer = torch.optim.AdamW([weight], fused=True)
    # Weight, both moments: read and written; the gradient: read; the step: a number.
    assert bytes_of("_fused_adamw_", optimizer.step) == pytest.approx(7 * 400, abs=32)


def test_a_sort_passes_over_its_keys_as_often_as_they_have_bytes() -> None:
    keys = torch.arange(100)
    assert bytes_of("sort", lambda: keys.sort()) == 800 + 8 * 2 * 1600
    assert bytes_of("sort", lambda: keys.to(torch.uint8).sort()) == 100 + 2 * 900


def test_additions_to_few_addresses_run_one_by_one() -> None:
    ones = torch.ones(1_000_000, dtype=torch.int64)
    with Meter() as meter:
        torch.zeros(10, dtype=torch.int64).scatter_add_(0, ones.remainder(10), ones)
    (kernel,) = (kernel for kernel in meter.kernels if kernel.name == "scatter_add_")
    assert kernel.serial == 100_000
    assert kernel_seconds(kernel, H100, "expected") == pytest.approx(
        RATES["launch_s"].value + 100_000 * RATES["atomic_s"].value
    )


def test_collectives_by_hand() -> None:
    cluster = Cluster(H100, 2, 8)
    nvlink, network = 450e9 * RATES["nvlink"].value, 50e9 * RATES["network"].value
    start, (simple, _) = RATES["start_s"].value, PROTOCOLS["ring"]
    node, both, rail = range(8), range(16), (0, 8)

    def seconds(kind: str, size: float, ranks: range | tuple[int, ...]) -> float:
        return cluster.traffic(kind, size, ranks).seconds

    inside, across = simple.inside_s, simple.across_s
    assert seconds("all_gather", 8e9, node) == pytest.approx(start + 7 * inside + 7e9 / nvlink)
    # What crosses enters each server once, through its eight adapters.
    assert seconds("all_gather", 16e9, both) == pytest.approx(
        start + 14 * inside + across + 15e9 / (8 * network)
    )
    assert seconds("all_reduce", 2e9, rail) == pytest.approx(start + 2 * across + 2e9 / network)
    exchange = 450e9 * RATES["nvlink_exchange"].value
    assert seconds("all_to_all", 8e9, node) == pytest.approx(start + inside + 7e9 / exchange)
    assert seconds("all_gather", 8e9, (3,)) == 0
    assert cluster.traffic("all_gather", 16e9, both).links == pytest.approx(
        {"nvlink": 8 * network / nvlink, "network": 1}, rel=1e-2
    )


def test_small_sums_go_over_a_tree() -> None:
    """In hops up and down, whose number grows with the logarithm of the servers."""
    start, tree = RATES["start_s"].value, PROTOCOLS["tree"][1]
    times = [Cluster(H100, n, 8).traffic("all_reduce", 8, range(8 * n)).seconds for n in (16, 128)]
    for nodes_log, time in zip((4, 7), times, strict=True):
        hops = 2 * (7 * tree.inside_s + nodes_log * tree.across_s)
        assert time == pytest.approx(start + hops, rel=1e-3)
    assert times[1] < 2e-4


def test_kernels_take_the_longer_of_arithmetic_and_memory() -> None:
    gap = RATES["launch_s"].value
    gemm = Kernel("mm", Part.HEAD, Phase.FORWARD, torch.bfloat16, 10**12, 10**6)
    copy = Kernel("clone", Part.NORMS, Phase.FORWARD, torch.bfloat16, 0, 10**9)
    assert kernel_seconds(gemm, H100, "expected") == pytest.approx(
        gap + 1e12 / (989.4e12 * RATES["dense_gemm"].value)
    )
    plain = kernel_seconds(copy, H100, "expected")
    assert plain == pytest.approx(gap + 1e9 / (3.35e12 * RATES["memory"].value))
    assert kernel_seconds(
        replace(gemm, dtype=torch.float32), H100, "expected"
    ) > 10 * kernel_seconds(gemm, H100, "expected")


def test_compilation_reaches_what_it_compiles() -> None:
    copy = Kernel("clone", Part.NORMS, Phase.FORWARD, torch.bfloat16, 0, 10**9)
    alone, spread = (Work.of(measured(parallel__ep=ep), True).compiled for ep in (1, 4))
    assert alone - spread == {Part.SHARED_EXPERTS} and Part.HEAD not in alone

    def seconds(kernel: Kernel) -> float:
        return kernel_seconds(kernel, H100, "expected", alone)

    plain = kernel_seconds(copy, H100, "expected")
    assert seconds(copy) < 0.6 * plain
    # The head is outside of blocks, and our own kernels are not torch's to fuse.
    assert seconds(replace(copy, part=Part.HEAD)) == seconds(replace(copy, ours=True)) == plain


# ---- a step


def timed(step: Measured, cluster: Cluster, view: str = "expected") -> StepTime:
    return step_time(Work.of(step, False), cluster, view)


def test_parts_add_up_and_the_views_enclose_the_estimate() -> None:
    for ep in (1, 4):
        step, cluster = measured(parallel__ep=ep), Cluster(H100, 1, 8)
        times = {view: timed(step, cluster, view) for view in VIEWS}
        assert sum(times["expected"].parts.values()) == pytest.approx(times["expected"].step)
        assert times["optimistic"].step < times["expected"].step < times["pessimistic"].step


def test_a_free_network_and_host_leave_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"start_s": 0.0, "hops": 0.0, "host_s": 0.0, "sync_s": 0.0, "contention": 0.0}
    for name, value in free.items():
        monkeypatch.setitem(hardware.RATES, name, Rate(value, value, value, "assumed", ""))
    fast = replace(H100, nvlink_bytes_s=1e30, network_bytes_s=1e30)
    step = measured(parallel__ep=4)
    kernels = sum(
        kernel_seconds(task.operation, H100, "expected")
        for task in step.tasks
        if isinstance(task.operation, Kernel)
    )
    found = timed(step, Cluster(fast, 1, 8))
    # Copies beside the compute stream share the device with it.
    assert found.step == pytest.approx(RATES["slowdown"].value * kernels, rel=1e-6)


def test_a_slow_network_shows_where_it_is_waited_for() -> None:
    slow = replace(H100, nvlink_bytes_s=1e7, network_bytes_s=1e7)
    found = timed(measured(parallel__ep=4), Cluster(slow, 1, 8)).parts
    for part in ("forward: exchange of tokens", "backward: parameters and gradients"):
        assert found[part] > 0.05 * sum(found.values()), found


@pytest.mark.long
def test_both_published_throughputs_are_predicted() -> None:
    """Of EMO on 128 H100, 17.6 to 18.8 thousand tokens/s a GPU, and of Qwen3-30B-A3B on 8, 12,040,
    with no number fitted to either."""
    done = run_command("benchmarks/calibration.py", "--json", timeout=600)
    points = json.loads(done.stdout.splitlines()[-1])["points"]
    assert [point["measured"] for point in points] == [18_200, 12_040]
    for point in points:
        assert abs(point["error"]) < 0.3, point
        assert point["pessimistic"] < point["measured"] < point["optimistic"], point


@pytest.mark.long
def test_the_shipped_layout_is_planned_at_forty_thousand_tokens_a_second() -> None:
    """With grouped GEMMs at no more than 0.45 of the peak, and every assumption named."""
    assert RATES["grouped_gemm"].value <= 0.45
    done = run_command(
        "-m",
        "emotrain.cli",
        "plan",
        "configs/emo_1b14b_1t_ep.yaml",
        "--nodes",
        "16",
        "--gpus-per-node",
        "8",
        "--json",
        timeout=400,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens_per_second_per_gpu"] >= 40_000 and result["peak_gib"] <= 60
    assert all(any(f" {name} = " in line for line in result["assumptions"]) for name in RATES)
