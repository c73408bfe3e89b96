"""A model whose experts come when they are needed, against the same model loaded as a whole.

    python benchmarks/lazy_experts.py [--json]

A checkpoint of a random model is written to a temporary folder (--folder: on the disk that you
mean) and loaded both ways in this process. Both run the same subset of the experts (--share): steps
of one token for each of several documents, and a prompt. Then two subsets take turns in memory that
holds one of them, so that every expert of every step is read from the disk: the system was told to
forget its pages when it was read before.

    resident_expert_memory_over_full   experts in memory after the subset has run, over all
    *_tokens_per_second_over_full      once they are there
    cold_expert_ms                     what a step takes longer for each expert that it reads
    cold_expert_over_warm_step         that, over a whole decode step with its experts in memory
    cold_expert_read_gb_per_second     of the reads alone
    page_cache_over_resident           what the system still holds of the experts' files, over what
                                       is in memory: a second copy would be 1
    equal_logits                       whether both gave the same bits at every measured shape
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import arguments, report, time_in_turn

from emotrain.batch import PackedBatch
from emotrain.config import Config, config_from_dict
from emotrain.folders import StagedFolder
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Transformer
from emotrain.subsets.lazy_model import LazyModel, load_lazy
from emotrain.training.checkpoint import load_model
from emotrain.training.checkpoint_folders import TrainingState, commit_checkpoint
from emotrain.training.tensor_files import TensorFilesWriter, save_parts
from emotrain.training.tensor_index import TensorPart


def configuration(args: argparse.Namespace) -> Config:
    return config_from_dict(
        {
            "model": {
                "vocab_size": 512,
                "d_model": args.width,
                "num_layers": args.layers,
                "num_heads": max(1, args.width // 64),
                "experts": {
                    "routed": args.experts,
                    "shared": 1,
                    "top_k": args.chosen,
                    "hidden": args.hidden,
                },
                "router": {"pool": {"kind": "none"}},
                # Wide enough that tokens choose different experts.
                "init_std": 0.1,
            }
        }
    )


def write_checkpoint(folder: Path, config: Config) -> Path:
    """A checkpoint of a random model, without an optimizer."""
    model = Transformer(config.model).initialize(0)
    staged = StagedFolder(folder / "checkpoint")
    state = TrainingState(0, 0, "", 0, config.training.global_batch, 0.0)
    writer = TensorFilesWriter(
        staged.path,
        staged.make,
        lambda files, index: commit_checkpoint(staged, files, index, config, state, 0, None),
    )
    save_parts({name: TensorPart.of(p) for name, p in model.named_parameters()}, writer)
    return staged.target


def subset_of(config: Config, kept: int, which: int) -> RoutingRequest:
    """The `which`-th `kept` experts of every layer."""
    experts = torch.arange(which * kept, (which + 1) * kept)
    return RoutingRequest(subset=[experts] * config.model.num_layers)


def cached_bytes(files: list[Path]) -> int:
    """Bytes of files that the system holds in its page cache."""
    libc, total = ctypes.CDLL(None, use_errno=True), 0
    for file in files:
        with (
            open(file, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE) as of,
        ):
            pages = -(-len(of) // mmap.PAGESIZE)
            held = (ctypes.c_ubyte * pages)()
            start = ctypes.c_char.from_buffer(of)
            code = libc.mincore(
                ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(of)), held
            )
            del start
            assert code == 0, ctypes.get_errno()
            total += mmap.PAGESIZE * sum(page & 1 for page in held)
    return total


def forget(files: list[Path]) -> None:
    """Let the system give back what it holds of files."""
    for file in files:
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.inference_mode()
def measure(args: argparse.Namespace, checkpoint: Path, config: Config) -> None:
    kept = round(args.share * args.experts)
    shapes = {"decode": (args.documents, 1), "prompt": (1, args.prompt)}
    batches = {
        name: PackedBatch.from_rows(torch.randint(512, shape)) for name, shape in shapes.items()
    }
    _, full = load_model(checkpoint)
    lazy = load_lazy(checkpoint)
    assert lazy.store is not None
    subset = subset_of(config, kept, 0)
    equal = all(
        torch.equal(full.logits(full(batch, subset)), lazy.model.logits(lazy.model(batch, subset)))
        for batch in batches.values()
    )
    results: dict[str, float] = {
        "full_expert_bytes": lazy.expert_bytes,
        "expert_bytes": lazy.store.expert_bytes,
        "resident_expert_memory_over_full": lazy.store.resident_bytes / lazy.expert_bytes,
    }
    arms = {}
    for name, batch in batches.items():
        arms[f"full_{name}"] = lambda batch=batch: full.logits(full(batch, subset))
        arms[f"lazy_{name}"] = lambda batch=batch: lazy.model.logits(lazy.model(batch, subset))
    timings = time_in_turn(arms, args.repeats)
    for name, (rows, length) in shapes.items():
        full_ms, lazy_ms = timings[f"full_{name}"].median, timings[f"lazy_{name}"].median
        results[f"{name}_tokens_per_second"] = rows * length / lazy_ms * 1e3
        results[f"{name}_tokens_per_second_over_full"] = full_ms / lazy_ms
    results |= cold(args, checkpoint, config, kept, batches["prompt"])
    step_ms = timings["lazy_decode"].median
    results["cold_expert_over_warm_step"] = results["cold_expert_ms"] / step_ms
    shown: dict[str, Any] = {**results, "equal_logits": equal}
    shown |= {key: value for key, value in vars(args).items() if key not in ("json", "folder")}
    report("A subset, loaded as it is used", timings, shown, args.json)


def cold(
    args: argparse.Namespace, checkpoint: Path, config: Config, kept: int, batch: PackedBatch
) -> dict[str, float]:
    """Steps that read all of their experts, each followed by the same step with them in memory."""
    small = small_model(checkpoint, kept * config.model.num_layers)
    assert small.store is not None
    subsets, files = [subset_of(config, kept, i) for i in (0, 1)], weight_files(checkpoint)
    small.model(batch, subsets[1])
    forget(files)
    counters, extra_ms = small.store.counters, []
    misses, num_bytes, seconds = counters.misses, counters.bytes_read, counters.read_seconds
    for number in range(args.repeats):
        times = [time.perf_counter()]
        for _ in ("cold", "warm"):
            small.model(batch, subsets[number % 2])
            times.append(time.perf_counter())
        extra_ms.append(1e3 * (times[1] - times[0] - (times[2] - times[1])))
    misses, num_bytes = counters.misses - misses, counters.bytes_read - num_bytes
    return {
        "cold_expert_ms": statistics.median(extra_ms) * args.repeats / misses,
        "cold_expert_read_gb_per_second": num_bytes / 1e9 / (counters.read_seconds - seconds),
        "cold_experts_per_step": misses / args.repeats,
        "page_cache_over_resident": cached_bytes(files) / small.store.resident_bytes,
    }


def weight_files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("model-*.safetensors"))


def small_model(checkpoint: Path, experts: int) -> LazyModel:
    whole = load_lazy(checkpoint)
    assert whole.store is not None
    return load_lazy(checkpoint, whole.trunk_bytes + experts * whole.store.expert_bytes)


def main() -> None:
    parser = arguments(__doc__, repeats=20)
    parser.add_argument("--folder", help="where the checkpoint is written (default: temporary)")
    for name, default, what in (
        ("layers", 4, "layers"),
        ("experts", 64, "routed experts of a layer"),
        ("chosen", 4, "experts that a token chooses"),
        ("width", 256, "width of the model"),
        ("hidden", 256, "hidden width of an expert"),
        ("documents", 8, "documents of a decode step"),
        ("prompt", 512, "tokens of the prompt"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (%(default)s)")
    parser.add_argument("--share", type=float, default=0.125, help="of the experts (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = configuration(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, write_checkpoint(Path(folder), config), config)


if __name__ == "__main__":
    main()
