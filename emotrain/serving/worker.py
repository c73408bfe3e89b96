"""The thread that owns the engine: requests go in, what each step adds comes out.

An engine is for one thread. Handlers of requests live in an event loop and must never wait for a
step, so they put what they want into an inbox, and get deltas by way of their loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from emotrain.errors import RunError, UserError
from emotrain.generation.engine import Engine
from emotrain.generation.request import GenerationRequest
from emotrain.generation.sequence import CANCELLED, ERROR, Delta, Generation
from emotrain.serving.metrics import ServerMetrics

log = logging.getLogger("emotrain")


class TooManyRequestsError(UserError):
    """More sequences wait than the server lets wait."""


class EngineEndedError(RunError):
    """The thread of the engine has ended: no request can be answered."""


class Ticket:
    """The sequences of one request, and what they have become. For the loop that made it."""

    def __init__(self, model: str, in_pieces: bool = True) -> None:
        """`in_pieces`: whether its reader wants what each step adds, and not the ends alone."""
        self.model, self.in_pieces = model, in_pieces
        self.generations: list[Generation] = []
        self.started = time.perf_counter()
        self.loop = asyncio.get_running_loop()
        # A reader that is slow lets it grow by what its own request may generate, and no more.
        self._deltas: list[tuple[int, Delta]] = []
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    async def read(self) -> list[tuple[int, Delta]]:
        """What was added since the last call, at least something: the index of the sequence, and
        what was added to it.

        Raises:
            Exception: what `give_up` was told.
        """
        await self._wake.wait()
        self._wake.clear()
        if self._error is not None:
            raise self._error
        found, self._deltas = self._deltas, []
        return found

    def put(self, index: int, delta: Delta) -> None:
        self._deltas.append((index, delta))
        self._wake.set()

    def give_up(self, error: Exception) -> None:
        """Nothing more is wanted: say so to who reads."""
        self._error = error
        self._wake.set()


def deliver(found: Sequence[tuple[Ticket, int, Delta]]) -> None:
    """From the worker's thread: what a step made, in one call to each loop."""

    def put(of_loop: Sequence[tuple[Ticket, int, Delta]]) -> None:
        for ticket, index, delta in of_loop:
            ticket.put(index, delta)

    for loop in {ticket.loop for ticket, _, _ in found}:
        try:
            loop.call_soon_threadsafe(put, [one for one in found if one[0].loop is loop])
        except RuntimeError:  # the loop is closed: nobody reads any more
            log.debug("results came after their loop had ended")


class Worker:
    """Runs an engine in a thread of its own."""

    def __init__(self, engine: Engine, metrics: ServerMetrics, most_waiting: int):
        """`most_waiting`: sequences that may wait or run; further ones are refused."""
        self.engine, self.metrics, self.most_waiting = engine, metrics, most_waiting
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._stopping = self._ended = False
        self._tickets: dict[int, tuple[Ticket, int]] = {}
        """By the generation's id: its ticket, and its place there."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- for the event loop

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; what still runs is cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ended

    async def submit(
        self,
        model: str,
        requests: Sequence[GenerationRequest],
        count: int = 1,
        in_pieces: bool = True,
    ) -> Ticket:
        """Take `count` sequences of each request, one request after the other; all or none.

        Raises:
            TooManyRequestsError: too many wait. UserError: one of them cannot be.
            EngineEndedError: nobody can take them.
        """
        ticket = Ticket(model, in_pieces)

        def enter() -> None:
            engine = self.engine
            there = engine.num_waiting + engine.num_running
            more = count * len(requests)
            if there + more > self.most_waiting:
                raise TooManyRequestsError(
                    f"{there} sequences run or wait and {more} more are above the limit of "
                    f"{self.most_waiting}; try again later"
                )
            try:
                for request in requests:
                    ticket.generations += engine.submit_several(request, count)
            except UserError:
                for generation in ticket.generations:
                    engine.cancel(generation)
                raise
            for index, generation in enumerate(ticket.generations):
                self._tickets[generation.id] = ticket, index

        try:
            await self._do(enter)
        except asyncio.CancelledError:
            # They may be in the engine already.
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End what is left of a request; nobody waits for it."""
        if ticket.generations and all(g.finish_reason for g in ticket.generations):
            return

        def leave() -> None:
            for generation in ticket.generations:
                self._tickets.pop(generation.id, None)
                if self.engine.cancel(generation):
                    self.metrics.ended(ticket.model, CANCELLED)

        self._post(leave)

    def _post(self, action: Callable[[], None]) -> bool:
        """False where the thread has ended: nothing is left that an action could change."""
        with self._wake:
            if self._ended:
                return False
            self._inbox.append(action)
            self._wake.notify()
        return True

    async def _do(self, action: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def act() -> None:
            if not done.set_running_or_notify_cancel():
                return  # who asked has left
            try:
                action()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        if not self._post(act):
            raise EngineEndedError("the server's engine has ended; start the server again")
        await asyncio.wrap_future(done)

    # ---- the thread

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            log.critical("the engine's thread broke; the server answers 503", exc_info=True)
        finally:
            with self._wake:
                self._ended = True
                actions, self._inbox = self._inbox, []
            for action in actions:  # they find out, or leave
                try:
                    action()
                except Exception:
                    log.exception("a request cannot be taken out")
            self._end_all(CANCELLED, None)

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self.engine.busy or self._stopping):
                    self._wake.wait()
                actions, self._inbox = self._inbox, []
                stopping = self._stopping
            for action in actions:
                action()
            if stopping:
                return
            if self.engine.busy:
                self._step()
            engine = self.engine
            self.metrics.queue(engine.num_running, engine.num_waiting, engine.cache.pages_in_use)

    def _step(self) -> None:
        try:
            deltas = self.engine.step()
        except Exception as error:
            # A defect: the step's sequences cannot go on, and the server must.
            log.exception("a step failed; its sequences end with an error")
            self._end_all(ERROR, error)
            return
        delivered: list[tuple[Ticket, int, Delta]] = []
        tokens: Counter[str] = Counter()
        for delta in deltas:
            generation = delta.generation
            if (found := self._tickets.get(generation.id)) is None:
                continue
            ticket, index = found
            if ticket.in_pieces or delta.finish_reason is not None:
                delivered.append((ticket, index, delta))
            tokens[ticket.model] += len(delta.tokens)
            if delta.tokens and len(generation.tokens) == len(delta.tokens):
                self.metrics.first_token(ticket.model, time.perf_counter() - ticket.started)
            if delta.finish_reason is not None:
                del self._tickets[generation.id]
                self.metrics.ended(ticket.model, delta.finish_reason)
        self.metrics.generated(tokens)
        deliver(delivered)

    def _end_all(self, reason: str, error: Exception | None) -> None:
        tickets = list(self._tickets.values())
        self._tickets.clear()
        ended = []
        for ticket, index in tickets:
            generation = ticket.generations[index]
            try:
                self.engine.cancel(generation)
            except Exception:  # a second defect must not keep the others waiting
                log.exception("sequence %d cannot be taken out", generation.id)
            generation.finish_reason, generation.error = reason, error
            self.metrics.ended(ticket.model, reason)
            ended.append((ticket, index, Delta(generation, (), "", reason)))
        deliver(ended)
