"""What the loader costs: tokens a second of processor time, its part of a step, memory, start.

    python benchmarks/loader.py [--json] [--peers FOLDER] [--repeats 5]

Arms take turns in one process, on random tokens of log-normal documents (816 tokens in the mean) in
files that lie in memory; a rate is of the best round, by processor time, so that a busy neighbour
counts little. `tokens_per_second_per_core` is that of the slowest of our arms with checksums:
concat and best fit, ids of two and of four bytes.

    rates                      of all arms; best fit with its part of reading and packing blocks
    of_memmap                  that over a loop that reads random windows of a mapped file, without
                               documents, checks or an order
    loader_over_step           loader over the whole step of `configs/quickstart.yaml`, on the
                               sample that it trains on
    one_pool_...               documents that lie whole in one sequence: `packing_shares`
    peak_mib_...               memory above the imports after thousands of sequences of data sets
                               of 1, 10 and 100 times as many shards
    start_...                  of a data set of --index-tokens, to the first batch
    peers                      OLMo-core's and Grain's loaders on the same tokens, in environments
                               of their own, which are made in the folder; without one, the reason
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _loader_data import PEERS, memmap_batches, write_data
from _measure import Timing, arguments, report
from _simulated import in_fresh_process, link_index, write_shards

from emotrain.config import load_config
from emotrain.data.best_fit import BLOCK_SEQUENCES, BestFitWindows
from emotrain.data.formats import Dataset
from emotrain.data.loader import Loader
from emotrain.data.opening import PACKINGS, open_loader
from emotrain.data.packing_shares import packing_shares

ROOT = Path(__file__).resolve().parent.parent
LENGTH, BATCH = 4096, 4
VOCABULARIES = {"uint16": 50_000, "uint32": 100_000}
PACKAGES = {
    "olmo_core": {
        "ai2-olmo-core==3.0.0": "--no-deps",  # torch and NumPy are those of this environment
        "cached-path dataclass-extensions bettermap importlib_resources pandas": "",
    },
    "grain": {"grain==0.2.18": ""},
}


def read_batch(loader: Loader, position: int) -> None:
    loader.batch(range(position, position + BATCH))


def next_of(batches: Iterator[Any], _position: int) -> None:
    next(batches)


def _milliseconds_a_block(windows: BestFitWindows) -> float:
    """Processor time of reading and packing one block, the best of some."""
    taken = []
    blocks = windows.store.shard_tokens[0] // windows.sequence_length // BLOCK_SEQUENCES
    for index in range(min(blocks, 20)):
        started = time.process_time()
        windows._packed(0, index)
        taken.append((time.process_time() - started) * 1e3)
    return min(taken)


def measure_rates(
    folder: Path, batches: int, repeats: int, timings: dict[str, Timing]
) -> dict[str, Any]:
    """Tokens a second of processor time of every arm."""
    arms: dict[str, Callable[[int], Any]] = {}
    packed: dict[str, BestFitWindows] = {}
    for dtype in VOCABULARIES:
        for packing in PACKINGS:
            for verify in (True, False):
                loader = open_loader(
                    folder / dtype, LENGTH, 0, packing=packing, verify_checksums=verify
                )
                name = f"{packing}_{dtype}{'' if verify else '_without_checksums'}"
                arms[name] = partial(read_batch, loader)
                if isinstance(loader.source, BestFitWindows):
                    packed[name] = loader.source
        plain = memmap_batches(folder / dtype / "tokens.npy", dtype, LENGTH, BATCH)
        arms[f"memmap_{dtype}"] = partial(next_of, plain)
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(repeats + 1):
        names = list(arms) if round_ % 2 else list(reversed(arms))
        for name in names:
            arm, first = arms[name], round_ * batches * BATCH
            started = time.process_time()
            for at in range(first, first + batches * BATCH, BATCH):
                arm(at)
            if round_:
                taken[name].append((time.process_time() - started) * 1e3)
    timings |= {name: Timing(tuple(ms)) for name, ms in taken.items()}
    tokens = batches * BATCH * LENGTH
    best_ms = {name: min(ms) for name, ms in taken.items()}
    blocks_ms = {}
    for name, windows in packed.items():
        # The best round has found its blocks packed; each sequence bears its part of a block.
        blocks_ms[name] = _milliseconds_a_block(windows)
        best_ms[name] += blocks_ms[name] / BLOCK_SEQUENCES * batches * BATCH
    rates = {name: tokens / ms * 1e3 for name, ms in best_ms.items()}
    ours = {name: rate for name, rate in rates.items() if not name.startswith("memmap")}
    slowest = min((name for name in ours if "without" not in name), key=lambda name: ours[name])
    return {
        "tokens_per_second_per_core": ours[slowest],
        "tokens_per_second_per_core_without_checksums": min(
            rate for name, rate in ours.items() if "without" in name
        ),
        "of_memmap": ours[slowest] / rates[f"memmap_{slowest.rpartition('_')[2]}"],
        "rates": rates,
        "milliseconds_a_block": blocks_ms,
    }


def measure_step(folder: Path) -> dict[str, float]:
    """Seconds of the loader and of a step of the quickstart, one after the other."""
    from emotrain.distributed.ranks import Ranks
    from emotrain.model.transformer import Transformer
    from emotrain.preparation.prepare import prepare
    from emotrain.training.data_source import build_loader
    from emotrain.training.engine import NativeEngine
    from emotrain.training.optimizer import build_optimizer
    from emotrain.training.step import train_step

    data = folder / "sample"
    prepare(["sample"], data, train_tokenizer=True, vocab_size=4096)
    config = load_config(str(ROOT / "configs/quickstart.yaml"), [f"data.path={data}"])
    setup, loader = config.training, build_loader(config)
    model = Transformer(config.model)
    engine = NativeEngine(model, build_optimizer(model, config.optimizer))
    reading, steps = [], []
    for step in range(12):
        started = time.perf_counter()
        batches = loader.step(step, setup.global_batch, setup.micro_batch)
        read = time.perf_counter()
        train_step(engine, batches, config, step + 1, Ranks())
        if step >= 2:
            reading.append(read - started)
            steps.append(time.perf_counter() - started)
    return {
        "loader_over_step": min(reading) / min(steps),
        "loader_seconds": min(reading),
        "step_seconds": min(steps),
    }


def measure_sizes(folder: Path, shard_tokens: int, index_tokens: int) -> dict[str, Any]:
    """Peak memory at three sizes, and the start of a large index."""
    infos = write_shards(folder / "distinct", shard_tokens, 800, 1)
    result: dict[str, Any] = {}
    big = -(-index_tokens // shard_tokens)
    for name, shards in (("1x", 4), ("10x", 40), ("100x", 400), ("start", big)):
        data = folder / f"index-{name}"
        size = link_index(folder / "distinct", infos, data, shards)
        for packing in PACKINGS if name != "start" else ("concat",):
            run = in_fresh_process(
                "start_loader",
                folder=str(data),
                sequence_length=LENGTH,
                first_step=0,
                steps=256 if name != "start" else 4,
                global_batch=16,
                sequences=16,
                packing=packing,
            )
            if name != "start":
                result[f"peak_mib_{packing}_{name}"] = run["steps_peak_mib"]
                continue
            result |= {
                "start_tokens": size["tokens"],
                "start_seconds": run["first_batch_seconds"],
                "start_peak_mib": run["first_batch_peak_mib"],
            }
    for packing in PACKINGS:
        one, most = (result[f"peak_mib_{packing}_{name}"] for name in ("1x", "100x"))
        result[f"peak_100x_over_1x_{packing}"] = most / one
    return result


def measure_peer(name: str, peers: Path, data: Path, batches: int) -> dict[str, Any]:
    """Rates of a peer for each width of ids, or why there are none."""
    python = peers / name / "bin/python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", peers / name], check=True)
            if name == "olmo_core":  # torch is large; that of this environment is taken
                (site,) = (peers / name).glob("lib/python*/site-packages")
                (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
            for packages, option in PACKAGES[name].items():
                words = ["-m", "pip", "install", "-q", *option.split(), *packages.split()]
                subprocess.run([str(python), *words], check=True, stdout=subprocess.DEVNULL)
        rates = {}
        for dtype in VOCABULARIES:
            script = str(Path(__file__).with_name("_loader_data.py"))
            file = str(data / dtype / "tokens.npy")
            numbers = [str(LENGTH), str(BATCH), str(batches)]
            done = subprocess.run(
                [str(python), "-W", "ignore", script, name, file, dtype, *numbers],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                timeout=600,
            )
            rates[dtype] = done.stdout.splitlines()[-1]
    except (subprocess.SubprocessError, OSError, IndexError) as error:
        return {"skipped": " ".join(str(error).split())[:300]}
    return {dtype: json.loads(line) for dtype, line in rates.items()}


def main() -> int:
    parser = arguments(__doc__ or "", repeats=5)
    parser.add_argument("--peers", type=Path, help="folder for the peers' environments")
    parser.add_argument(
        "--batches", type=int, default=256, help=f"of {BATCH} sequences in a round (%(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=2**25, help="tokens that rates are of (%(default)s)"
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=2**27,
        help="tokens of a shard of the large data sets (%(default)s)",
    )
    parser.add_argument(
        "--index-tokens",
        type=int,
        default=10**12,
        help="tokens of the data set that is started (%(default)s)",
    )
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    timings: dict[str, Timing] = {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for dtype, vocab_size in VOCABULARIES.items():
            write_data(Path(folder) / dtype, vocab_size, 4, args.tokens // 4)
        results |= measure_rates(Path(folder), args.batches, args.repeats, timings)
        store = Dataset(Path(folder) / "uint16").store()
        for packing in PACKINGS:
            shares = packing_shares(store, LENGTH, packing)
            results |= {
                f"one_pool_{packing}": shares["one_pool"],
                f"one_pool_of_fitting_{packing}": shares["one_pool_of_fitting"],
                f"cut_{packing}": shares["cut"],
                f"utilisation_{packing}": shares["utilisation"],
            }
        results |= measure_step(Path(folder))
        results |= measure_sizes(Path(folder), args.shard_tokens, args.index_tokens)
        results["peers"] = {
            name: measure_peer(name, args.peers, Path(folder), args.batches)
            if args.peers
            else {"skipped": "no --peers"}
            for name in PEERS
        }
    report("loader: processor time of a round", timings, results, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
