"""What goes wrong on a cluster, said in one line: a collective that does not end, an update that is
not finite.

torch keeps a record of the last collectives of a process (its flight recorder, on from
`join`); the collective at fault is named from it, whoever started it: this code, FSDP inside
of backward, or the exchange of tokens. On a CPU the error of a collective is raised where it is
waited for. On a GPU nothing is raised: the host waits for the device for ever, until torch's
watchdog aborts the process without knowing the step. There `_Watch` looks at the record from time
to time and ends the process first.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from emotrain.batch import SOURCE_BITS
from emotrain.distributed.ranks import CollectiveError, Ranks

log = logging.getLogger("emotrain")

EXIT_BROKE = 1
"""Exit code of a process whose collective did not end, as of every run that broke on the way."""

SHOWN_DOCUMENTS = 20


@contextmanager
def collective_errors(ranks: Ranks, timeout_s: float, step: Callable[[], int]) -> Iterator[None]:
    """Within the block, a collective that fails is a CollectiveError that names rank, step and
    collective.

    Args:
        timeout_s: seconds a collective may take; on a GPU the process ends (EXIT_BROKE) when one
            takes longer.
        step: the step under way, 0 before the first.
    """
    watch = (
        _Watch(ranks, timeout_s, step)
        if ranks.world_size > 1 and ranks.device.type == "cuda"
        else None
    )
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_collective(error):
            raise
        raise CollectiveError(
            describe(ranks, step(), timeout_s, flight_record(), str(error))
        ) from error
    finally:
        if watch is not None:
            watch.stop()


def describe(
    ranks: Ranks,
    step: int,
    timeout_s: float,
    record: Sequence[dict[str, Any]],
    error: str = "Timed out",
) -> str:
    """One line on the collective at fault: the first one under way, or the last one of a backend
    (gloo) that does not say which are."""
    entry = in_flight(record) or (record[-1] if record else None)
    name, when = "a collective", f"step {step}" if step else "before the first step"
    if entry is not None:
        sizes = ", ".join("x".join(map(str, size)) for size in entry["input_sizes"])
        number, label = entry["process_group"][:2]
        name = f"{entry['profiling_name']} of {sizes} in group {label or number}"
    if "Timed out" in error or "timeout" in error.lower():
        return (
            f"rank {ranks.rank}, {when}: {name} did not end within {timeout_s:g} s "
            f"(training.collective_timeout_s); another rank "
            f"is stuck, gone or slow: the ranks that say nothing are the ones to look at"
        )
    return (
        f"rank {ranks.rank}, {when}: {name} broke off, the process of another rank has ended; its "
        f"own error says why"
    )


def flight_record() -> list[dict[str, Any]]:
    """torch's record of this process' last collectives, oldest first; empty where torch keeps
    none."""
    # NCCL writes to a recorder of its own, which builds without CUDA do not have.
    dumps = [
        getattr(torch._C._distributed_c10d, name, lambda: "{}")
        for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    ]
    entries = [entry for dump in dumps for entry in json.loads(dump()).get("entries", [])]
    return sorted(entries, key=lambda entry: entry["time_created_ns"])


def in_flight(record: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first collective that is known not to have ended."""
    return next(
        (entry for entry in record if not entry["retired"] and entry["state"] != "completed"), None
    )


def _is_of_a_collective(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors; they begin with the file of its transport.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


class _Watch:
    """A thread that ends the process when a collective takes longer than it may."""

    def __init__(
        self,
        ranks: Ranks,
        timeout_s: float,
        step: Callable[[], int],
        record: Callable[[], Sequence[dict[str, Any]]] = flight_record,
        end: Callable[[int], Any] = os._exit,
    ):
        self._ranks, self._timeout_s, self._step, self._record, self._end = (
            ranks,
            timeout_s,
            step,
            record,
            end,
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="collective watch", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stopped.wait(min(10.0, self._timeout_s / 10)):
            record = self._record()
            entry = in_flight(record)
            if (
                entry is not None
                and time.time_ns() - entry["time_created_ns"] > self._timeout_s * 1e9
            ):
                print(
                    f"error: {describe(self._ranks, self._step(), self._timeout_s, record)}",
                    file=sys.stderr,
                    flush=True,
                )
                self._end(EXIT_BROKE)
                return

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def report_not_finite(
    step: int,
    loss: float,
    grad_norm: float,
    losses: Sequence[float],
    document_ids: Sequence[Sequence[int]],
    global_batch: int,
    micro_batch: int,
    ranks: Ranks,
) -> None:
    """Say which sequences and documents an update that is not finite came from. Every rank must
    call this; the first one logs.

    Args:
        losses: of each micro-batch of this rank.
        document_ids: of each micro-batch of this rank.
    """
    suspects = [index for index, value in enumerate(losses) if not math.isfinite(value)]
    of_ranks = ranks.gather((suspects, [list(dict.fromkeys(ids)) for ids in document_ids]))
    if not ranks.is_first:
        return
    what = (
        f"step {step}: skipped an update that is not finite "
        f"(loss {loss}, gradient norm {grad_norm})"
    )
    first, per_rank = (step - 1) * global_batch, global_batch // ranks.world_size
    found = [(rank, index) for rank, (indices, _) in enumerate(of_ranks) for index in indices]
    if not found or len(found) == global_batch // micro_batch:
        where = "the loss of every micro-batch is " + (
            "not finite" if found else "finite, the gradient is not"
        )
        documents = list(
            dict.fromkeys(
                document for _, batches in of_ranks for batch in batches for document in batch
            )
        )
        log.warning("%s; %s; %s", what, where, _sequences(first, global_batch, documents))
        return
    for rank, index in found:
        start = first + rank * per_rank + index * micro_batch
        log.warning(
            "%s; rank %d, micro-batch %d; %s",
            what,
            rank,
            index,
            _sequences(start, micro_batch, of_ranks[rank][1][index]),
        )


def _sequences(first: int, count: int, documents: Sequence[int]) -> str:
    shown = ", ".join(map(_document, documents[:SHOWN_DOCUMENTS]))
    if len(documents) > SHOWN_DOCUMENTS:
        shown += f" and {len(documents) - SHOWN_DOCUMENTS} more"
    return f"sequences {first} to {first + count - 1} of the data order, documents {shown}"


def _document(number: int) -> str:
    """A document by its number in its data set; in a mixture with its source, from 0, but for the
    first."""
    source, own = divmod(number, 1 << SOURCE_BITS)
    return f"{own} of source {source}" if source > 0 else str(number)
