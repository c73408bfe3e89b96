"""From the trace of a step (`dry_run.Measured`) to seconds: a model, not a measurement.

    a kernel          the longest of FLOPs / reached peak, bytes / reached memory bandwidth and
                      additions to one address, and the gap before it
    a collective      `Cluster.traffic`
    the host          time for each launch, and for what it waits for

The order, the streams and what waits for what are those of the code that ran, FSDP2's and the
dispatcher's; `simulate` plays them. What the device idles for, and what slows its kernels, is then
told by its cause.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from emotrain.planning.dry_run import Measured
from emotrain.planning.hardware import GPU, RATES, Cluster
from emotrain.planning.parts import Part
from emotrain.planning.simulate import Job, Timeline, simulate
from emotrain.planning.trace import COMPUTE, Collective, HostWait, HostWork, Kernel, Task
from emotrain.training.engine import Phase

VIEWS = ("expected", "pessimistic", "optimistic")


@dataclass(frozen=True)
class Work:
    """A step of one GPU, as far as its time goes."""

    tasks: Sequence[Task]
    axes: Mapping[str, tuple[int, ...]]
    tokens: int
    """Of this GPU in a step."""
    compiled: frozenset[str] = frozenset()
    """Parts of the model whose element-wise kernels torch.compile fuses."""

    @classmethod
    def of(cls, measured: Measured, compiled: bool) -> Work:
        parts = compiled_parts(measured.layout.ep) if compiled else frozenset()
        return cls(measured.tasks, measured.axes, measured.tokens, parts)


def compiled_parts(ep: int) -> frozenset[str]:
    """What `training.compile` reaches: blocks, in which the Triton kernels of routing and of routed
    experts break graphs, and the dispatcher of expert parallelism one around all that it runs. The
    head is outside."""
    return frozenset({Part.ATTENTION, Part.NORMS, *([Part.SHARED_EXPERTS] if ep == 1 else [])})


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and of what it is made of."""

    step: float
    parts: dict[str, float]
    """Adds up to `step`."""
    compute: dict[str, float]
    """Kernels by part of the model, each alone."""
    communication: dict[str, float]
    """Collectives by kind and axis, each alone, hidden or not."""
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @classmethod
    def blend(cls, times: Iterable[tuple[float, StepTime]], tokens: int) -> StepTime:
        """The weighted sum of times, of a step with `tokens`."""
        times = list(times)

        def total(name: str) -> dict[str, float]:
            result: defaultdict[str, float] = defaultdict(float)
            for weight, time in times:
                for key, seconds in getattr(time, name).items():
                    result[key] += weight * seconds
            return dict(result)

        step = sum(weight * time.step for weight, time in times)
        return cls(step, total("parts"), total("compute"), total("communication"), tokens)


def kernel_seconds(
    kernel: Kernel, gpu: GPU, view: str, compiled: frozenset[str] = frozenset()
) -> float:
    """Seconds of one kernel and the gap before it."""

    def rate(name: str) -> float:
        return RATES[name].at(view)

    moving = kernel.bytes / (gpu.memory_bytes_s * rate("memory"))
    if not kernel.flops:
        if kernel.part in compiled and not kernel.ours:
            moving *= rate("fusion")
        return rate("launch_s") + max(moving, kernel.serial * rate("atomic_s"))
    if kernel.dtype == torch.float32:
        peak = gpu.fp32_flops * rate("dense_gemm")
    else:
        peak = gpu.bf16_flops * rate(_family(kernel))
    return rate("launch_s") + max(moving, kernel.flops / peak)


def _family(kernel: Kernel) -> str:
    """Rate of the arithmetic of a kernel with FLOPs."""
    name = kernel.name
    if kernel.ours:
        return "grouped_gemm"
    if "attention" in name or "attn" in name:
        if "cudnn" in name:
            return "cudnn_attention"
        return "masked_attention" if "efficient" in name else "flash_attention"
    return "cutlass_grouped_gemm" if name.startswith("cutlass") else "dense_gemm"


def step_time(work: Work, cluster: Cluster, view: str = "expected") -> StepTime:
    """Seconds of one step, `expected` or at either end of the assumed ranges."""
    jobs = _jobs(work, cluster, view)
    line = simulate(jobs, RATES["contention"].at(view))
    parts = _Causes(work.tasks, jobs, line).parts()
    compute: defaultdict[str, float] = defaultdict(float)
    sent: defaultdict[str, float] = defaultdict(float)
    for task, job in zip(work.tasks, jobs, strict=True):
        operation = task.operation
        if isinstance(operation, Kernel):
            compute[operation.part] += job.seconds
        elif isinstance(operation, Collective):
            sent[f"{operation.kind} {operation.axis}"] += job.seconds
    parts["stragglers and the rest"] = (RATES["slowdown"].at(view) - 1) * line.seconds
    return StepTime(sum(parts.values()), parts, dict(compute), dict(sent), work.tokens)


def _jobs(work: Work, cluster: Cluster, view: str) -> list[Job]:
    rate = {name: entry.at(view) for name, entry in RATES.items()}

    def job(task: Task) -> Job:
        operation = task.operation
        if isinstance(operation, HostWait):
            return Job(task.queue, rate["sync_s"], task.after, is_host=True)
        if isinstance(operation, HostWork):
            return Job(task.queue, operation.seconds, task.after, is_host=True)
        if isinstance(operation, Kernel):
            seconds = kernel_seconds(operation, cluster.gpu, view, work.compiled)
            fused = operation.part in work.compiled and not operation.ours
            asking = rate["host_s"] * (rate["fusion"] if fused else 1)
            return Job(task.queue, seconds, task.after, asking)
        ranks = work.axes[operation.axis]
        traffic = cluster.traffic(operation.kind, operation.bytes, ranks, view)
        return Job(
            task.queue,
            traffic.seconds,
            task.after,
            rate["host_s"],
            traffic.links if traffic.seconds else {},
            is_collective=True,
        )

    return [job(task) for task in work.tasks]


class _Causes:
    """What the compute queue spends the seconds of a timeline on: its jobs, what slows them, and
    what it idles for."""

    def __init__(self, tasks: Sequence[Task], jobs: Sequence[Job], line: Timeline):
        self.tasks, self.jobs, self.line = tasks, jobs, line
        self.spent: defaultdict[str, float] = defaultdict(float)

    def parts(self) -> dict[str, float]:
        now, side, host = 0.0, Phase.FORWARD, -1
        for index, task in enumerate(self.tasks):
            if isinstance(task.operation, (HostWait, HostWork)):
                host = index
            if task.queue != COMPUTE:
                continue
            assert isinstance(task.operation, (Kernel, Collective))
            side = _side(task.operation.phase)
            asked, started = self.line.asked[index], self.line.started[index]
            if started > now:
                self._wait_of_host(host, side, now, min(asked, started))
                self._wait_of_device(index, side, max(now, asked), started)
            alone, took = self.jobs[index].seconds, self.line.ended[index] - started
            if isinstance(task.operation, Kernel):
                self.spent[side] += alone
            else:
                self.spent[_waiting_for(side, task.operation)] += alone
            self.spent[f"{side}: contention"] += took - alone
            now = self.line.ended[index]
        last = max(range(len(self.tasks)), key=self.line.ended.__getitem__, default=None)
        if last is not None:
            self._wait_for(last, side, now, self.line.ended[last])
        order = sorted(self.spent, key=lambda name: (_ORDER.index(name.split(":")[0]), name))
        return {name: self.spent[name] for name in order if self.spent[name] > 1e-9}

    def _wait_of_host(self, host: int, side: Phase, since: float, until: float) -> None:
        """The device has nothing to do since the host did not ask: its last wait ended late, or it
        is not fast enough."""
        if until <= since:
            return
        resumed = min(max(self.line.ended[host], since), until) if host >= 0 else since
        if resumed > since:
            ready = max((self.line.ended[job] for job in self.jobs[host].after), default=since)
            ready = min(max(ready, since), resumed)
            late = self._latest(host)
            self._wait_for(late if late is not None else host, side, since, ready)
            self.spent["waits of the host"] += resumed - ready
        self.spent["launches of the host"] += until - resumed

    def _wait_of_device(self, index: int, side: Phase, since: float, until: float) -> None:
        late = self._latest(index)
        if until > since and late is not None:
            self._wait_for(late, side, since, until)

    def _latest(self, index: int) -> int | None:
        return max(self.jobs[index].after, key=self.line.ended.__getitem__, default=None)

    def _wait_for(self, index: int, side: Phase, since: float, until: float) -> None:
        if until <= since:
            return
        operation = self.tasks[index].operation
        if isinstance(operation, (HostWait, HostWork)):
            self.spent["waits of the host"] += until - since
        else:
            self.spent[_waiting_for(side, operation)] += until - since


_ORDER = (
    Phase.FORWARD,
    Phase.BACKWARD,
    Phase.OPTIMIZER,
    "waits of the host",
    "launches of the host",
)


def _waiting_for(side: Phase, operation: Kernel | Collective) -> str:
    """Name of time without a kernel, by what it waits for. Kernels beside the compute queue are
    copies of parameters and gradients."""
    if isinstance(operation, Kernel):
        return f"{side}: parameters and gradients"
    if operation.kind in ("all_to_all", "deepep"):
        return f"{side}: exchange of tokens"
    sums = operation.kind == "all_reduce" and operation.axis == "world"
    return f"{side}: {'small sums' if sums else 'parameters and gradients'}"


def _side(phase: Phase) -> Phase:
    """What the time of a phase is added to: forward, backward or the optimizer."""
    if phase in (Phase.BACKWARD, Phase.RECOMPUTE):
        return Phase.BACKWARD
    return Phase.OPTIMIZER if phase in (Phase.CLIPPING, Phase.OPTIMIZER) else Phase.FORWARD
