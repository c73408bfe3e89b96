"""What one process asks of its device in a step, in the order it asks: kernels and collectives on
streams, what each has to wait for, and where the host itself waits.

Nothing here says how FSDP2 overlaps: its own code runs (`dry_run.py`), and the streams, events and
works that it makes on a CPU, which do nothing there, are followed instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from emotrain.planning.parts import Part
from emotrain.training.engine import Phase

COMPUTE = "compute"
"""Queue of the stream that model, losses and optimizer run on."""


@dataclass(frozen=True)
class Kernel:
    """One launch: what it computes and moves. Bytes are those of its operands, once for each that
    is read and for each that is written."""

    name: str
    part: Part
    phase: Phase
    dtype: torch.dtype
    flops: int
    bytes: int
    ours: bool = False
    """Whether it is a Triton kernel of `emotrain.kernels`. Those with FLOPs are grouped GEMMs."""
    serial: int = 0
    """Atomic additions to one address, which run one after the other."""


@dataclass(frozen=True)
class Collective:
    """One collective. Bytes are those of the whole result of a gather, the whole input of a
    reduction or exchange."""

    kind: str
    axis: str
    part: Part
    phase: Phase
    group_size: int
    bytes: int


@dataclass(frozen=True)
class HostWait:
    """The host waits for a number from the device."""


@dataclass(frozen=True)
class HostWork:
    """The host computes for itself."""

    seconds: float


Operation = Kernel | Collective | HostWait | HostWork


@dataclass(frozen=True)
class Task:
    """An operation in the order of the host. One of a queue starts after the one before it there,
    and after those that `after` names by their place in the trace."""

    operation: Operation
    queue: str
    after: tuple[int, ...] = ()


def rewrite(
    tasks: Sequence[Task], change: Callable[[Task], Sequence[Operation] | None]
) -> list[Task]:
    """A trace with other operations in the place of some: `change` returns those of a task, or None
    where it stays. What waited for the task waits for the last of them; where there is none, for
    what came before it."""
    result: list[Task] = []
    moved: list[tuple[int, ...]] = []
    last: dict[str, int] = {}
    for task in tasks:
        operations = change(task)
        after = tuple(sorted({new for old in task.after for new in moved[old]}))
        for operation in (task.operation,) if operations is None else operations:
            if isinstance(operation, (HostWait, HostWork)) and task.queue != "host":
                result.append(Task(operation, "host", (*after, *_known(last, task.queue))))
                continue
            result.append(Task(operation, task.queue, after))
            last[task.queue] = len(result) - 1
        kept = operations is None or len(operations) > 0
        moved.append(_known(last, task.queue) if kept else (*after, *_known(last, task.queue)))
        if task.queue == "host":
            moved[-1] = (len(result) - 1,) if kept else ()
    return result


def _known(last: Mapping[str, int], queue: str) -> tuple[int, ...]:
    return (last[queue],) if queue in last else ()


class Trace:
    """Records tasks. A collective runs on the stream that asks for it, or, where the host asked
    not to wait, on the queue of its communicator; one communicator runs one at a time."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self._last: dict[str, int] = {}
        self._pending: defaultdict[str, set[int]] = defaultdict(set)
        self.communicators: dict[str, int] = {}
        """The last task of each."""
        self._streams: dict[int, tuple[str, Any]] = {}
        self._works: dict[int, tuple[Any, int]] = {}

    def kernel(self, kernel: Kernel) -> None:
        self._add(kernel, self._here())

    def collective(self, collective: Collective, communicator: str, is_async: bool) -> None:
        here = self._here()
        before = self.communicators.get(communicator)
        after = set() if before is None else {before}
        queue = here
        if is_async:
            queue = f"communicator {communicator}"
            after |= self._so_far(here)
        self.communicators[communicator] = self._add(collective, queue, after)

    def host_waits(self) -> None:
        """For all that the present stream was asked for."""
        self.tasks.append(Task(HostWait(), "host", tuple(sorted(self._so_far(self._here())))))

    @contextmanager
    def following(self) -> Iterator[None]:
        """Within this context the streams and events of `torch.cpu` and the works of collectives
        are followed."""
        from torch._C._distributed_c10d import FakeWork

        with ExitStack() as stack:

            def replace(owner: Any, name: str, value: Callable) -> None:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)

            def record(event: Any, stream: Any = None) -> None:
                event.tasks = self._so_far(self._here() if stream is None else self._name(stream))

            def record_event(stream: Any, event: Any = None) -> Any:
                event = torch.cpu.Event() if event is None else event
                record(event, stream)
                return event

            def wait_event(stream: Any, event: Any) -> None:
                self._pending[self._name(stream)] |= getattr(event, "tasks", set())

            def wait_stream(stream: Any, other: Any) -> None:
                self._pending[self._name(stream)] |= self._so_far(self._name(other))

            def wait(work: Any, *args: Any) -> Any:
                if id(work) in self._works:
                    self._pending[self._here()].add(self._works[id(work)][1])
                return wait_for(work, *args)

            replace(torch.cpu.Stream, "record_event", record_event)
            replace(torch.cpu.Stream, "wait_event", wait_event)
            replace(torch.cpu.Stream, "wait_stream", wait_stream)
            replace(torch.cpu.Event, "record", record)
            # Where a gather was asked for in vain, FSDP2 asks for the stream there.
            replace(torch.accelerator, "current_stream", torch.cpu.current_stream)
            wait_for = FakeWork.wait
            replace(FakeWork, "wait", wait)
            for name in ASYNCHRONOUS:
                if hasattr(dist, name):
                    replace(dist, name, self._remembering(getattr(dist, name)))
            yield

    def _remembering(self, collective: Callable) -> Callable:
        """The collective, whose work is known by the task that it waits for."""

        def call(*args: Any, **kwargs: Any) -> Any:
            work = collective(*args, **kwargs)
            if work is not None:
                self._works[id(work)] = work, len(self.tasks) - 1
            return work

        return call

    def _add(self, operation: Operation, queue: str, after: set[int] | None = None) -> int:
        after = (after or set()) | self._pending.pop(queue, set())
        after.discard(self._last.get(queue, -1))
        self.tasks.append(Task(operation, queue, tuple(sorted(after))))
        self._last[queue] = len(self.tasks) - 1
        return self._last[queue]

    def _so_far(self, queue: str) -> set[int]:
        """What has to end before a queue has done all that it was asked for."""
        last = self._last.get(queue)
        return self._pending[queue] | (set() if last is None else {last})

    def _here(self) -> str:
        return self._name(torch.cpu.current_stream())

    def _name(self, stream: Any) -> str:
        if stream is torch.cpu._default_cpu_stream:
            return COMPUTE
        # The stream is kept, so that no other one gets its id.
        name, _ = self._streams.setdefault(id(stream), (f"stream {len(self._streams)}", stream))
        return name


ASYNCHRONOUS = (
    "all_to_all_single",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_reduce",
)
"""Collectives of `torch.distributed` that may return a work to wait for."""
