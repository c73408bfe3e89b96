"""When each job of a device ends, where streams run side by side: an event simulation.

queue       runs its jobs in order, one at a time; a job also waits for those that it names
host        asks for the jobs in their order; a job cannot start before it was asked for, and
            where the host waits it asks for nothing
device      kernels of several queues share it alike, and each collective under way takes
            `contention` of it
links       collectives that want more of a link than there is get it by their shares
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LEAST = 0.25
"""Share of the device that kernels keep under however many collectives."""


@dataclass(frozen=True)
class Job:
    """A kernel (no `links`), a collective, or with `is_host` something that the host does once
    all that it names has ended."""

    queue: str
    seconds: float
    """That it takes alone."""
    after: tuple[int, ...] = ()
    host_s: float = 0.0
    """That the host takes to ask for it."""
    links: Mapping[str, float] = field(default_factory=dict)
    """Share of each link that it uses while it runs alone."""
    is_collective: bool = False
    is_host: bool = False


@dataclass(frozen=True)
class Timeline:
    """Seconds at which each job was asked for, started and ended."""

    asked: list[float]
    started: list[float]
    ended: list[float]

    @property
    def seconds(self) -> float:
        return max(self.ended, default=0.0)


def simulate(jobs: Sequence[Job], contention: float = 0.0) -> Timeline:
    """Run jobs, which the host asks for in this order, to the end of the last."""
    return _Simulation(jobs, contention).run()


class _Simulation:
    def __init__(self, jobs: Sequence[Job], contention: float):
        self.jobs, self.contention = jobs, contention
        nan = [math.nan] * len(jobs)
        self.line = Timeline(nan.copy(), nan.copy(), nan.copy())
        self.now = 0.0
        self.missing = [len(job.after) for job in jobs]
        self.followers: defaultdict[int, list[int]] = defaultdict(list)
        for index, job in enumerate(jobs):
            for before in job.after:
                assert before < index, "a job waits for one that comes later"
                self.followers[before].append(index)
        self.waiting: defaultdict[str, deque[int]] = defaultdict(deque)
        self.left: dict[int, float] = {}
        """Seconds alone that are left of each job under way."""
        self.busy: set[str] = set()
        self.next = 0
        """The job that the host asks for next, or does."""
        self.host_until = 0.0
        """When it will have asked for it; infinite where it has to wait first."""

    def run(self) -> Timeline:
        self._host_turns_to(0)
        while self.left or self.next < len(self.jobs):
            rates = self._rates()
            ends = {job: self.now + left / rates[job] for job, left in self.left.items()}
            then = min(min(ends.values(), default=math.inf), self.host_until)
            assert then < math.inf, "jobs wait for each other"
            for job in self.left:
                self.left[job] -= (then - self.now) * rates[job]
            self.now = then
            for job in [job for job, end in ends.items() if end <= then]:
                del self.left[job]
                self.busy.discard(self.jobs[job].queue)
                self._ended(job)
            if self.host_until <= then and self.next < len(self.jobs):
                self._asked()
        return self.line

    def _rates(self) -> dict[int, float]:
        """Seconds alone that each job under way gets done in a second."""
        wanted: Counter[str] = Counter()
        collectives = 0
        for job in self.left:
            if self.jobs[job].is_collective:
                collectives += 1
                wanted.update(self.jobs[job].links)
        kernels = len(self.left) - collectives
        free = max(LEAST, 1 - self.contention * collectives)
        return {
            job: 1 / max([1.0, *(wanted[link] for link in self.jobs[job].links)])
            if self.jobs[job].is_collective
            else free / kernels
            for job in self.left
        }

    def _host_turns_to(self, index: int) -> None:
        self.next = index
        if index == len(self.jobs):
            self.host_until = math.inf
            return
        job = self.jobs[index]
        if job.is_host and self.missing[index]:
            self.host_until = math.inf
        else:
            self.host_until = self.now + (job.seconds if job.is_host else job.host_s)

    def _asked(self) -> None:
        index, job = self.next, self.jobs[self.next]
        self.line.asked[index] = self.now
        if job.is_host:
            self.line.started[index] = self.now - job.seconds
            self._ended(index)
        else:
            self.waiting[job.queue].append(index)
            self._start(job.queue)
        self._host_turns_to(index + 1)

    def _ended(self, index: int) -> None:
        self.line.ended[index] = self.now
        for follower in self.followers[index]:
            self.missing[follower] -= 1
            if not self.missing[follower]:
                if follower == self.next and self.jobs[follower].is_host:
                    self._host_turns_to(follower)
                elif not self.jobs[follower].is_host:
                    self._start(self.jobs[follower].queue)
        if not self.jobs[index].is_host:
            self._start(self.jobs[index].queue)

    def _start(self, queue: str) -> None:
        """The first job of a queue, where nothing keeps it."""
        waiting = self.waiting[queue]
        if queue not in self.busy and waiting and not self.missing[waiting[0]]:
            index = waiting.popleft()
            self.busy.add(queue)
            self.left[index] = self.jobs[index].seconds
            self.line.started[index] = self.now
