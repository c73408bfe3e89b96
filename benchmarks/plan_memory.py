"""The plan's memory against what real training takes: peak of tensor memory and of resident memory,
on this machine's CPU.

    python benchmarks/plan_memory.py [--small] [--json]

Each case trains two steps in 1, 2 or 4 processes over gloo, and is planned by a dry run for the
same device (`dry_run(..., "cpu")`: what a CPU keeps and allocates is not what a GPU does, so that
the plan is for the one it is checked on). Measured in the second step of rank 0:

    tensors    peak of what tensors hold, every storage followed from its allocation to its end on
               real tensors (`Meter`)
    resident   peak resident memory of the process less that before the model was built. It has the
               buffers of kernels and of gloo on top, and leaves out memory that was allocated and
               never written
    planned    peak of the dry run

    worst_tensor_error, worst_resident_error    largest |planned / measured - 1| of all cases
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _measure import machine, random_documents

from emotrain.batch import PackedBatch
from emotrain.config import Config, config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.planning.dry_run import dry_run, follow_state
from emotrain.planning.meter import Meter
from emotrain.planning.parts import PARTS
from emotrain.training.engine import NativeEngine
from emotrain.training.step import train_step

MIB = 1 << 20
# (processes, ep, recompute, balance_schedule, hidden width of an expert)
CASES = [
    (1, 1, "none", "joint", 256),
    (1, 1, "full", "joint", 256),
    (2, 1, "none", "joint", 256),
    (2, 2, "none", "running", 256),
    (2, 1, "full", "running", 512),
    (4, 1, "none", "running", 512),
    (4, 2, "none", "joint", 512),
    (4, 4, "full", "joint", 512),
    (4, 4, "none", "running", 512),
]
SMALL = [(1, 1, "none", "joint", 128), (2, 1, "none", "running", 128), (2, 2, "full", "joint", 128)]


def case_config(
    processes: int, ep: int, recompute: str, schedule: str, hidden: int, small: bool
) -> Config:
    """State of 100 to 700 MB over all processes, two micro-batches a step."""
    return config_from_dict(
        {
            "model": {
                "vocab_size": 4096,
                "d_model": 128 if small else 256,
                "num_layers": 3 if small else 4,
                "num_heads": 4,
                "experts": {
                    "routed": 32,
                    "shared": 1,
                    "top_k": 4,
                    "hidden": hidden,
                    "backend": "torch",
                },
                "router": {"pool": {"min": 8, "max": 32}},
            },
            "data": {"sequence_length": 256 if small else 512},
            "losses": {"balance_schedule": schedule},
            "training": {"global_batch": 4 * processes, "micro_batch": 2, "precision": "float32"},
            "parallel": {"ep": ep, "recompute": recompute},
        }
    )


def train(rank: int, processes: int, config: Config, folder: str) -> None:
    """Two steps in one of the processes; rank 0 writes what the second one took."""
    torch.set_num_threads(1)
    _return_memory_at_once()
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
        )
    ranks = Ranks(rank, processes)
    _warm_up(config, ranks)
    batches = _batches(config)
    before = _resident()
    engine = NativeEngine.build(config, ranks, fresh=True)
    meter = Meter(PARTS)
    train_step(engine, batches, config, 1, ranks)
    engine.start_step()
    follow_state(meter, engine, batches)
    with meter:
        train_step(engine, batches, config, 2, ranks)
    engine.start_step()
    # The meter's own work must not be in the resident memory: a step of its own.
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # start a new peak
    train_step(engine, batches, config, 3, ranks)
    if rank == 0:
        Path(folder, "measured.json").write_text(
            json.dumps(
                {
                    "tensors": meter.peak_bytes,
                    "resident": _peak_resident() - before,
                    "kinds": meter.bytes_at_peak(),
                }
            )
        )
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def _warm_up(config: Config, ranks: Ranks) -> None:
    """A step of a tiny model of the same layout: what torch loads and keeps when it is first
    used is no memory of the run."""
    tiny = replace(
        config,
        model=replace(
            config.model,
            d_model=32,
            vocab_size=128,
            experts=replace(config.model.experts, hidden=16),
        ),
        data=replace(config.data, sequence_length=32),
    )
    train_step(NativeEngine.build(tiny, ranks, fresh=True), _batches(tiny), tiny, 1, ranks)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _batches(config: Config) -> list[PackedBatch]:
    rows = config.training.micro_batch
    return [
        random_documents(rows, config.data.sequence_length, 3 * rows, config.model.vocab_size, seed)
        for seed in range(2)
    ]


Case = tuple[int, int, str, str, int]


def measure(case: Case, small: bool) -> dict[str, Any]:
    """What `train` writes of one case."""
    processes, config = case[0], case_config(*case, small)
    with tempfile.TemporaryDirectory() as folder:
        # Forked, so that nothing is imported again; a process with one thread and no open groups
        # may be.
        mp.start_processes(
            train, (processes, config, folder), nprocs=processes, start_method="fork"
        )
        return json.loads(Path(folder, "measured.json").read_text())


def compare(case: Case, small: bool, measured: dict[str, Any]) -> dict[str, Any]:
    """One case, planned and measured."""
    processes, ep, recompute, schedule, hidden = case
    planned = dry_run(case_config(*case, small), processes, "cpu")
    return {
        "processes": processes,
        "ep": ep,
        "recompute": recompute,
        "schedule": schedule,
        "hidden": hidden,
        "planned_mib": planned.peak_bytes / MIB,
        "tensors_mib": measured["tensors"] / MIB,
        "resident_mib": measured["resident"] / MIB,
        "tensor_error": planned.peak_bytes / measured["tensors"] - 1,
        "resident_error": planned.peak_bytes / measured["resident"] - 1,
        "planned_kinds_mib": {kind: size / MIB for kind, size in planned.at_peak.items()},
        "measured_kinds_mib": {kind: size / MIB for kind, size in measured["kinds"].items()},
    }


def _return_memory_at_once() -> None:
    """Have the allocator map every tensor by itself, so that resident memory falls when one is
    freed (glibc)."""
    m_mmap_threshold, m_trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 16)
    libc.mallopt(m_trim_threshold, 1 << 16)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="three cases of a few seconds together"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object as the last line of standard output",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = SMALL if args.small else CASES
    # First: builds for CUDA start threads of autograd in a dry run, after which no process forks.
    measured = [measure(case, args.small) for case in cases]
    rows = [
        compare(case, args.small, of_case) for case, of_case in zip(cases, measured, strict=True)
    ]
    result = {
        "worst_tensor_error": max(abs(row["tensor_error"]) for row in rows),
        "worst_resident_error": max(abs(row["resident_error"]) for row in rows),
        "cases": rows,
        "machine": machine(),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{'processes':>9}{'ep':>4}{'recompute':>11}{'schedule':>10}"
        f"{'planned MiB':>13}{'tensors MiB':>13}{'resident MiB':>14}{'errors':>18}"
    )
    for row in rows:
        print(
            f"{row['processes']:>9}{row['ep']:>4}{row['recompute']:>11}{row['schedule']:>10}{row['planned_mib']:>13.1f}"
            f"{row['tensors_mib']:>13.1f}{row['resident_mib']:>14.1f}{row['tensor_error']:>+9.1%}{row['resident_error']:>+9.1%}"
        )


if __name__ == "__main__":
    main()
