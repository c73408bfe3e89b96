"""`emotrain serve` as its clients meet it: memory, tokens a second, waiting, and a cold expert.

    python benchmarks/serve.py [--json] [key=value ...]

A random model of the shape of configs/quickstart.yaml, which key=value settings change, is served
by two processes: one has loaded all experts, the other reads those that are needed. Clients in this
process stream random prompts from one and the other, in turn:

    subset_expert_memory_over_full  bytes of routed experts in memory once a subset of --keep has
                                    been served, over all
    tokens_per_second_over_full     of that subset, over the loaded model with all its experts, at 8
                                    clients; lazy_over_loaded: over the same subset there
    tokens_per_second_1, _8, _32    of the subset, at so many clients; mixed_tokens_per_second_ the
                                    same with four subsets, and mixed_over_single at 32 clients
    first_token_p50_ms, _p99_ms     and token_p50_ms, _p99_ms: waiting for the first token, and
                                    for each further one, at 8 clients
    cold_expert_ms                  what an expert adds to a request that has to read it
    speedup_over_hf_1, _8           tokens a second of the loaded model, over `generate` of
                                    transformers on the exported model (where it is installed)
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from _measure import arguments, report, time_in_turn

from emotrain.cli import main as emotrain
from emotrain.config import Config, load_config
from emotrain.data.tokenizer import train_tokenizer
from emotrain.folders import StagedFolder
from emotrain.model.transformer import Transformer
from emotrain.modular.artefact import Calibration, Subset, kept_of
from emotrain.subsets.lazy_model import load_lazy
from emotrain.subsets.selection import tokenizer_fingerprint
from emotrain.training.checkpoint_folders import TrainingState, commit_checkpoint, identity
from emotrain.training.tensor_files import TensorFilesWriter, save_parts
from emotrain.training.tensor_index import TensorPart

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
CLIENTS = (1, 8, 32)
SUBSETS = ("subset0", "subset1", "subset2", "subset3")
FORK = multiprocessing.get_context("fork")
"""This process computes nothing with torch: its children may."""


# ---- what is served


def write_model(folder: Path, config: Config, keep: float) -> dict[str, int]:
    """A checkpoint of a random model with a tokenizer, and subsets of it; what they hold."""
    tokenizer = folder / "tokenizer.json"
    coder = train_tokenizer(["a text for its bytes alone"], config.model.vocab_size)
    tokenizer.write_text(coder.to_json(), encoding="utf-8")
    model = Transformer(config.model).initialize(0)
    staged = StagedFolder(folder / "model")
    state = TrainingState(0, 0, "", 0, config.training.global_batch, 0.0)
    writer = TensorFilesWriter(
        staged.path,
        staged.make,
        lambda files, index: commit_checkpoint(staged, files, index, config, state, 0, tokenizer),
    )
    save_parts({name: TensorPart.of(p) for name, p in model.named_parameters()}, writer)
    layers, shared = config.model.num_layers, config.model.experts.shared
    routed = [config.model.routed_in_layer(layer) for layer in range(layers)]
    for number, name in enumerate(SUBSETS):
        rng = random.Random(number)
        kept = [rng.sample(range(count), max(1, round(keep * count))) for count in routed]
        Subset(
            tuple(kept_of(of, count, shared) for of, count in zip(kept, routed, strict=True)),
            tuple(count + shared for count in routed),
            shared,
            "random",
            "fp32",
            f"{keep}",
            str(staged.target),
            identity(staged.target),
            tokenizer_fingerprint(staged.target),
            Calibration("", "", 0, 0, ""),
        ).save(folder / f"{name}.json")
    lazy = load_lazy(staged.target)
    assert lazy.store is not None
    one = lazy.store.expert_bytes
    num_kept = sum(map(len, kept))
    return {
        "vocab_size": coder.vocab_size,
        "full_expert_bytes": lazy.expert_bytes,
        "memory_of_one_subset": lazy.trunk_bytes + num_kept * one,
        "memory_of_all": lazy.trunk_bytes + lazy.expert_bytes,
    }


def in_child(work: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, of a child process."""
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=lambda: theirs.send(work(*args)))
    child.start()
    found = ours.recv()
    child.join()
    return found


def serve(words: Sequence[str], output: int, threads: int) -> None:
    torch.set_num_threads(threads)
    sys.stdout = os.fdopen(output, "w")
    raise SystemExit(emotrain(["serve", *words, "--port", "0", "--json"]))


@contextmanager
def served(folder: Path, args: argparse.Namespace, *words: str):
    """`emotrain serve` in a process of its own; its address."""
    subsets = [f"--subset={name}={folder / name}.json" for name in SUBSETS]
    context = ["--context", str(args.prompt + args.new)]
    reading, writing = os.pipe()
    command = [str(folder / "model"), *subsets, *context, *words]
    child = FORK.Process(target=serve, args=(command, writing, args.threads))
    child.start()
    os.close(writing)
    try:
        with os.fdopen(reading) as output:
            yield json.loads(output.readline())["address"]
    finally:
        child.terminate()
        child.join()


# ---- clients


class Clients:
    """So many that ask at once, each again when it has its answer."""

    def __init__(self, args: argparse.Namespace, vocab_size: int):
        self.args, self.vocab_size = args, vocab_size
        self.first_ms: list[float] = []
        self.token_ms: list[float] = []

    def arm(self, address: str, models: Sequence[str], clients: int) -> Callable[[], None]:
        """Client i asks for model i of `models`, then for the one after it, --rounds times."""
        host, port = address.removeprefix("http://").split(":")

        async def all_of_them() -> None:
            await asyncio.gather(*(self.ask(host, port, models, i) for i in range(clients)))

        return lambda: asyncio.run(all_of_them())

    async def ask(self, host: str, port: str, models: Sequence[str], number: int) -> None:
        """Over a plain socket: clients share the machine with what they measure, and a library
        for HTTP takes as much of it as the server does."""
        reader, writer = await asyncio.open_connection(host, int(port))
        rng = random.Random(number)
        for turn in range(self.args.rounds):
            body = {
                "model": models[(number + turn) % len(models)],
                "prompt": [rng.randrange(self.vocab_size) for _ in range(self.args.prompt)],
                "max_tokens": self.args.new,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            content = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
            times = [time.perf_counter()]
            writer.write(head.encode() + content)
            status = await reader.readuntil(b"\r\n\r\n")
            assert status.startswith(b"HTTP/1.1 200"), await reader.read(1000)
            while (event := await reader.readuntil(b"\n\n")) and b"data: [DONE]" not in event:
                assert b"data: {" in event and b'"error"' not in event, event
                times.append(time.perf_counter())
            await reader.readuntil(b"\r\n0\r\n\r\n")
            assert len(times) == self.args.new + 1, "each token is an event"
            gaps = [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
            self.first_ms.append(gaps[0])
            self.token_ms += gaps[1:]
        writer.close()


def gauge(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"emotrain_{name} ")).split()[1])


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else []
    return {f"{name}_p50_ms": cuts[49], f"{name}_p99_ms": cuts[98]} if cuts else {}


def cold(folder: Path, args: argparse.Namespace, sizes: dict[str, int]) -> dict[str, float]:
    """Room for one subset, and two that are asked in turn: of two requests for the same the first
    reads experts and the second finds them."""
    extra_ms = []
    memory = f"{-(-sizes['memory_of_one_subset'] // 1000)}KB"
    body = {"prompt": list(range(args.prompt)), "max_tokens": 1, "temperature": 0}
    with (
        served(folder, args, "--memory", memory) as address,
        httpx.Client(base_url=address, timeout=600) as http,
    ):

        def ask(model: str) -> float:
            start = time.perf_counter()
            assert http.post("/v1/completions", json={**body, "model": model}).status_code == 200
            return 1e3 * (time.perf_counter() - start)

        for model in SUBSETS[:2]:
            ask(model)
        before = gauge(address, "expert_misses_total")
        for number in range(2 * args.repeats):
            model = SUBSETS[number % 2]
            extra_ms.append(ask(model) - ask(model))
        misses = (gauge(address, "expert_misses_total") - before) / len(extra_ms)
    return {
        "cold_experts_per_request": misses,
        "cold_expert_ms": statistics.median(extra_ms) / max(misses, 1),
    }


# ---- the peer


def hf_process(folder: Path, args: argparse.Namespace, pipe: Any) -> None:
    """Generates batches of as many sequences as it is told, until it is told 0."""
    torch.set_num_threads(args.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    out = folder / "exported"
    export = ["export", str(folder / "model"), "--out", str(out), "--layout", "clean"]
    assert emotrain(export) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=True, dtype=torch.float32
    ).eval()
    while count := pipe.recv():
        ids = torch.randint(1, args.vocab_size, (count, args.prompt))
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.new,
                min_new_tokens=args.new,
                do_sample=False,
            )
        pipe.send(count)


@contextmanager
def hf(folder: Path, args: argparse.Namespace):
    """An arm of transformers: `count` sequences as one batch, --rounds times."""
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=hf_process, args=(folder, args, theirs))
    child.start()
    theirs.close()

    def arm(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(args.rounds):
                ours.send(count)
                ours.recv()

        return run

    try:
        yield arm
        ours.send(0)
    finally:
        child.terminate()
        child.join()


# ---- all of it


def measure(folder: Path, config: Config, args: argparse.Namespace) -> None:
    sizes = in_child(write_model, folder, config, args.keep)
    args.vocab_size = sizes["vocab_size"]
    clients, results = Clients(args, args.vocab_size), {}
    has_hf = importlib.util.find_spec("transformers") is not None
    with ExitStack() as stack:
        full = stack.enter_context(served(folder, args))
        memory = f"{-(-sizes['memory_of_all'] // 1000)}KB"
        lazy = stack.enter_context(served(folder, args, "--memory", memory))
        one = clients.arm(lazy, SUBSETS[:1], 8)
        one()
        resident = gauge(lazy, "resident_expert_bytes")
        results["subset_expert_memory_over_full"] = resident / sizes["full_expert_bytes"]
        arms = {
            "all experts, 1": clients.arm(full, ["model"], 1),
            "all experts, 8": clients.arm(full, ["model"], 8),
            "subset, loaded, 8": clients.arm(full, SUBSETS[:1], 8),
        }
        for count in CLIENTS:
            arms[f"subset, {count}"] = clients.arm(lazy, SUBSETS[:1], count)
            arms[f"four subsets, {count}"] = clients.arm(lazy, SUBSETS, count)
        if has_hf:
            peer = stack.enter_context(hf(folder, args))
            arms |= {f"hf, {count}": peer(count) for count in (1, 8)}
        times = time_in_turn(arms, args.repeats)
        median = {name: timing.median for name, timing in times.items()}
        clients.first_ms.clear()
        clients.token_ms.clear()
        for _ in range(args.repeats):
            one()
    for count in CLIENTS:
        tokens = 1e3 * count * args.rounds * args.new
        results[f"tokens_per_second_{count}"] = tokens / median[f"subset, {count}"]
        results[f"mixed_tokens_per_second_{count}"] = tokens / median[f"four subsets, {count}"]
    results["tokens_per_second_over_full"] = median["all experts, 8"] / median["subset, 8"]
    results["lazy_over_loaded"] = median["subset, loaded, 8"] / median["subset, 8"]
    results["mixed_over_single"] = median["subset, 32"] / median["four subsets, 32"]
    results |= percentiles("first_token", clients.first_ms)
    results |= percentiles("token", clients.token_ms)
    results |= cold(folder, args, sizes)
    for count in (1, 8) if has_hf else ():
        ratio = median[f"hf, {count}"] / median[f"all experts, {count}"]
        results[f"speedup_over_hf_{count}"] = ratio
    if not has_hf:
        results["hf_skipped"] = "transformers is not installed; pip install -e '.[bench]'"
    shown = {key: getattr(args, key) for key in ("keep", "prompt", "new", "rounds")}
    report("serving", times, {**results, **sizes, **shown}, args.json)


def main() -> None:
    parser = arguments(__doc__ or "", repeats=5)
    for name, default, what in (
        ("prompt", 32, "tokens of a prompt"),
        ("new", 48, "tokens of an answer"),
        ("rounds", 2, "requests of a client, one after the other"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (%(default)s)")
    parser.add_argument("--keep", type=float, default=0.125, help="share of a subset (%(default)s)")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), load_config(QUICKSTART, args.settings), args)


if __name__ == "__main__":
    main()
