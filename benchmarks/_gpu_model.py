"""Phases of gpu.py about whole steps: one rank with every mesh, `sync`, `model`, `determinism`,
`train`."""

from __future__ import annotations

import gc
import json
import random
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _gpu_run import PhaseRun, Skipped, one_thread_of_autograd
from _measure import random_documents
from step import HF_IMPLEMENTATIONS, hf_step
from torch.utils._python_dispatch import TorchDispatchMode

from emotrain.batch import PackedBatch
from emotrain.config import Config, config_from_dict
from emotrain.distributed.mesh import Layout, Meshes, build_meshes
from emotrain.distributed.parallelize import materialize, parallelize
from emotrain.distributed.ranks import Ranks
from emotrain.model.transformer import Transformer
from emotrain.planning.cost import Work, step_time
from emotrain.planning.dry_run import dry_run
from emotrain.planning.hardware import GPU, GPUS, Cluster
from emotrain.training.engine import NativeEngine
from emotrain.training.numerics import reproducible
from emotrain.training.optimizer import build_optimizer
from emotrain.training.step import train_step
from emotrain.training.step_result import StepResult

MOST_WAITS = 6
"""Waits of the host for the device in a step without expert parallelism."""


def small_config(losses: dict[str, Any] | None = None, **training: Any) -> Config:
    """A model of every part, that takes a fraction of a second a step."""
    return config_from_dict(
        {
            "model": {
                "vocab_size": 320,
                "d_model": 64,
                "num_layers": 2,
                "num_heads": 2,
                "experts": {"routed": 7, "shared": 1, "top_k": 2, "hidden": 32},
                "router": {"pool": {"min": 2, "max": 7}},
            },
            "data": {"sequence_length": 64},
            "losses": losses or {},
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
            "training": {"steps": 8, "global_batch": 4, "micro_batch": 2, **training},
        }
    )


def engine_of(
    run: PhaseRun, config: Config, meshes: Meshes | None = None, quickly: bool = False
) -> NativeEngine:
    """The engine of training. `quickly`: values are drawn on the device, not those of a run."""
    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, config, meshes)
    materialize(model, None if quickly else config.training.seed, run.device)
    if quickly:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=config.model.init_std)
                else:
                    parameter.fill_(1.0)
    bfloat16 = config.training.uses_bfloat16(run.device.type)
    return NativeEngine(model, build_optimizer(model, config.optimizer), bfloat16)


def batches_of(run: PhaseRun, config: Config, seed: int = 0) -> list[PackedBatch]:
    """The micro-batches of a step on one rank: about three documents a sequence."""
    rows, length = config.training.micro_batch, config.data.sequence_length
    count = config.training.global_batch // rows
    return [
        random_documents(rows, length, 3 * rows, config.model.vocab_size, seed + index).to(
            run.device
        )
        for index in range(count)
    ]


def steps_of(run: PhaseRun, config: Config, engine: NativeEngine, count: int) -> list[StepResult]:
    """Results of as many steps, each on batches of its own."""
    return [
        train_step(
            engine, batches_of(run, config, 100 * step), config, step + 1, Ranks(0, 1, run.device)
        )
        for step in range(count)
    ]


def one_rank(run: PhaseRun) -> None:
    """FSDP2 and the all-to-all dispatcher over one rank, against the plain model: their streams and
    hooks run once, on NCCL where there is a GPU."""
    for schedule in ("joint", "running"):
        run.item(f"one rank with all meshes, {schedule}", lambda s=schedule: _one_rank(run, s))


def _one_rank(run: PhaseRun, schedule: str) -> dict[str, Any]:
    config = small_config(losses={"balance_schedule": schedule})
    plain = steps_of(run, config, engine_of(run, config), 2)
    with one_rank_meshes(run) as meshes:
        engine = engine_of(run, config, meshes)
        dispatchers = {type(block.moe.dispatcher).__name__ for block in engine.model.blocks}
        assert dispatchers == {"AllToAllDispatcher"}, dispatchers
        spread = steps_of(run, config, engine, 2)
        del engine
    bfloat16 = config.training.uses_bfloat16(run.device.type)
    # In bfloat16 sums of another order round differently.
    limit = 2e-2 if bfloat16 else 1e-5
    errors = {
        key: max(
            abs(getattr(a, key) - getattr(b, key)) / abs(getattr(b, key))
            for a, b in zip(spread, plain, strict=True)
        )
        for key in ("loss", "grad_norm")
    }
    assert max(errors.values()) < limit, f"differs from the plain model by {errors}"
    return errors


@contextmanager
def one_rank_meshes(run: PhaseRun) -> Iterator[Meshes]:
    """Every mesh of a layout, of one rank each: also that of expert parallelism, which a run of one
    rank has no use for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    backend = "nccl" if run.is_cuda else "gloo"
    if run.is_cuda:
        torch.cuda.set_device(run.device)
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    try:
        dense = build_meshes(Layout(1, 1, 1, 1), run.device.type).dense
        whole = init_device_mesh(run.device.type, (1, 1), mesh_dim_names=("expert_dp", "ep"))
        yield Meshes(Layout(1, 1, 1, 1), dense, whole["expert_dp"], whole["ep"])
    finally:
        dist.destroy_process_group()
        gc.collect()  # an engine is a cycle, and keeps the groups' threads and buffers
        _clear_sharding_prop_cache()


def sync(run: PhaseRun) -> None:
    """Where a step makes the host wait for the device."""
    run.item("waits of a step", lambda: _waits(run))


def _waits(run: PhaseRun) -> dict[str, Any]:
    config = small_config(micro_batch=4)
    engine = engine_of(run, config)
    steps_of(run, config, engine, 2)
    batches, ranks = batches_of(run, config), Ranks(0, 1, run.device)
    run.settle()
    with one_thread_of_autograd(), _seen_waits(run) as places:
        train_step(engine, batches, config, 3, ranks)
    assert len(places) <= MOST_WAITS, f"{len(places)} waits, at most {MOST_WAITS}: {places}"
    assert places, "no wait was seen, though a step reads its loss"
    return {"waits": len(places), "places": places}


@contextmanager
def _seen_waits(run: PhaseRun) -> Iterator[list[str]]:
    """The places that wait. CUDA says so itself; on a CPU, where nothing waits, they are the reads
    of a tensor's value."""
    places: list[str] = []

    def place() -> str:
        frames = [f for f in traceback.extract_stack() if "emotrain" in Path(f.filename).parts]
        return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                places.append(place())
            return func(*args, **(kwargs or {}))

    if not run.is_cuda:
        with Reads():
            yield places
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield places
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in seen:
        if "synchroniz" in str(warning.message):
            places.append(f"{Path(warning.filename).name}:{warning.lineno}")


def full_width(layers: int, rows: int, tiny: bool) -> Config:
    """Layers of the published 1B-of-14B model; all of them would not fit with their optimizer."""
    if tiny:
        config = small_config(global_batch=rows, micro_batch=rows)
        return replace(config, model=replace(config.model, num_layers=layers))
    return config_from_dict(
        {
            "model": {"num_layers": layers},
            "data": {"sequence_length": 4096},
            "training": {"steps": 100, "global_batch": rows, "micro_batch": rows},
        }
    )


def model(run: PhaseRun) -> None:
    """Time and memory of a layer at full width: one and two layers, and their difference; beside
    them what `emotrain plan` says, and transformers' OLMoE."""
    sizes = (1, 2) if run.tiny else (4, 8)
    for rows in sizes:
        for layers in (1, 2):
            name, config = f"{rows} sequences, {layers} layers", full_width(layers, rows, run.tiny)
            run.item(name, lambda c=config: _step(run, c))
            run.item(f"{name}, planned", lambda c=config: _planned(run, c))
        for end in ("", ", planned"):
            one, two = (run.results.get(f"{rows} sequences, {n} layers{end}") for n in (1, 2))
            if one and two:
                run.item(f"{rows} sequences, a layer{end}", lambda a=one, b=two: _difference(a, b))
    rows = sizes[-1]
    config = full_width(1, rows, run.tiny)
    compiled = replace(config, training=replace(config.training, compile=True))
    run.item(f"{rows} sequences, 1 layers, compiled", lambda: _compiled(run, compiled))
    run.item("operators", lambda: _operators(run, config))
    for implementation in (*HF_IMPLEMENTATIONS, "sonicmoe"):
        name = f"OLMoE {implementation}, {sizes[0]} sequences, 1 layers"
        run.item(name, lambda i=implementation: _olmoe(run, full_width(1, sizes[0], run.tiny), i))


def _step(run: PhaseRun, config: Config) -> dict[str, Any]:
    run.forget_memory()
    engine, batches = engine_of(run, config, quickly=True), batches_of(run, config)
    ranks = Ranks(0, 1, run.device)
    seconds = run.step_seconds(lambda: train_step(engine, batches, config, 1, ranks))
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.is_cuda else 0.0
    tokens_per_second = config.tokens_per_step / seconds
    return {"seconds": seconds, "peak_gib": peak, "tokens_per_second": tokens_per_second}


def _planned(run: PhaseRun, config: Config) -> dict[str, Any]:
    """What `emotrain plan` says of the same step."""
    gpu = gpu_of(run)
    measured = dry_run(config, 1, gpu.target)
    time = step_time(Work.of(measured, config.training.compile), Cluster(gpu, 1, 1))
    return {
        "seconds": time.step,
        "peak_gib": measured.peak_bytes / 2**30,
        "gpu": gpu.name,
        "seconds_by_part": {str(part): value for part, value in time.compute.items()},
    }


def gpu_of(run: PhaseRun) -> GPU:
    """This GPU in the planner's table; an H100 on the CPU form. Raises Skipped."""
    if not run.is_cuda:
        return GPUS["h100-80gb"]
    name = torch.cuda.get_device_name(run.device).lower()
    gib = torch.cuda.get_device_properties(run.device).total_memory / 2**30
    found = [
        g for g in GPUS.values() if g.name.split("-")[0] in name and abs(g.memory_gib - gib) < 8
    ]
    if not found:
        raise Skipped(f"{name} with {gib:.0f} GiB is not in emotrain/planning/hardware.py")
    return found[0]


def _difference(one: dict[str, Any], two: dict[str, Any]) -> dict[str, float]:
    return {key: two[key] - one[key] for key in ("seconds", "peak_gib")}


def _compiled(run: PhaseRun, config: Config) -> dict[str, Any]:
    if not run.is_cuda:
        raise Skipped("compiles for a minute and says nothing of a GPU")
    return _step(run, config)


def _operators(run: PhaseRun, config: Config) -> dict[str, float]:
    """Milliseconds of a step by operator or kernel, the 40 largest."""
    run.forget_memory()
    engine, batches = engine_of(run, config, quickly=True), batches_of(run, config)
    ranks = Ranks(0, 1, run.device)
    train_step(engine, batches, config, 1, ranks)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        train_step(engine, batches, config, 2, ranks)
        run.settle()
    if run.is_cuda:
        profile.export_chrome_trace(str(run.path.with_name("step-trace.json.gz")))

    def ms(event: Any) -> float:
        time = event.self_device_time_total if run.is_cuda else event.self_cpu_time_total
        return time / 1e3

    events = sorted(profile.key_averages(), key=ms, reverse=True)
    return {event.key: ms(event) for event in events[:40]}


def _olmoe(run: PhaseRun, config: Config, implementation: str) -> dict[str, float]:
    try:
        import transformers
    except ImportError:
        raise Skipped("transformers is not installed (benchmarks/gpu_wheels.sh)") from None
    transformers.logging.set_verbosity_error()
    run.forget_memory()
    try:
        step = hf_step(config, batches_of(run, config), implementation, run.device)
        seconds = run.step_seconds(step)
    except (RuntimeError, NotImplementedError, ImportError, ValueError, OSError) as error:
        # Of another package: that it does not run here is what there is to know.
        raise Skipped(" ".join(str(error).split())[:200]) from None
    return {"seconds": seconds, "tokens_per_second": config.tokens_per_step / seconds}


def determinism(run: PhaseRun) -> None:
    """Whether two runs give the same bits, which `training.deterministic` promises."""
    run.item("as configured", lambda: {"same": _same_twice(run, small_config())})
    run.item("training.deterministic", lambda: _must_be_same(run))


def _must_be_same(run: PhaseRun) -> dict[str, bool]:
    config = small_config(deterministic=True)
    with reproducible(config, Ranks(device=run.device)):
        assert _same_twice(run, config), "two runs differ under training.deterministic"
    return {"same": True}


def _same_twice(run: PhaseRun, config: Config) -> bool:
    runs = []
    for engine in (engine_of(run, config) for _ in range(2)):
        steps_of(run, config, engine, 3 if run.tiny else 30)
        runs.append([parameter.detach() for parameter in engine.model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def train(run: PhaseRun) -> None:
    """`emotrain train` to its end: beside the same run on the CPU, resumed in its middle, and its
    checkpoint read on the CPU."""
    steps = 4 if run.tiny else 60
    run.item("data", lambda: _data(run))
    if "data" not in run.results:
        return

    def curve(name: str, **training: Any) -> Callable[[], list[float]]:
        return lambda: _train(run, name, steps, **training)

    run.item("device", curve("device", device=run.device.type))
    run.item("CPU", curve("cpu", device="cpu"))
    run.item("losses beside the CPU's", lambda: _beside(run, ("device", "CPU"), steps))
    run.item("resumed", lambda: _resumed(run, steps))
    run.item("read on the CPU", lambda: _read_back(run, steps))


def _beside(run: PhaseRun, names: Sequence[str], steps: int) -> dict[str, float]:
    ours, theirs = (run.results[name] for name in names)
    assert len(ours) == len(theirs) == steps, f"{len(ours)} and {len(theirs)} losses, not {steps}"
    error = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    limit = 3e-2 if run.is_cuda else 1e-5
    assert error < limit, f"losses differ by {error}, limit {limit}"
    return {"largest relative difference": error}


def _data(run: PhaseRun) -> str:
    """A data set of made-up documents of three domains."""
    from emotrain.preparation.prepare import prepare

    try:
        import pyarrow  # noqa: F401 - prepare reads and writes by it
    except ImportError:
        raise Skipped(
            "pyarrow, which prepares data, is not installed: pip install pyarrow"
        ) from None
    rng = random.Random(0)
    words = {d: [f"{d}{i}" for i in range(12)] for d in ("kitchen", "harbour", "garden")}
    source, folder = run.path.with_name("train-documents.jsonl"), run.path.with_name("train-data")
    with open(source, "w", encoding="utf-8") as file:
        for number in range(60 if run.tiny else 3000):
            domain = rng.choice(list(words))
            text = " ".join(rng.choice(words[domain]) for _ in range(rng.randint(10, 60)))
            split = "valid" if number % 5 == 4 else "train"
            line = {"text": text, "domain": domain, "source": "made up", "split": split}
            file.write(json.dumps(line) + "\n")
    prepare([source], folder, train_tokenizer=True, vocab_size=300, workers=1, overwrite=True)
    return str(folder)


def _train(run: PhaseRun, name: str, steps: int, **training: Any) -> list[float]:
    """The losses of a run from its start, which leaves checkpoints of its middle and its end."""
    from emotrain.training.run import train as train_run

    folder = run.path.with_name(f"train-{name}")
    training = {
        "steps": steps,
        "checkpoint_every": steps // 2,
        "log_every": 1,
        "tensorboard": False,
        "resume": "never",
        "run_dir": str(folder),
        **training,
    }
    shutil.rmtree(folder, ignore_errors=True)
    config = small_config(None, **training)
    config = replace(config, data=replace(config.data, path=run.results["data"]))
    train_run(config)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def _parameters(folder: Path) -> list[torch.Tensor]:
    from emotrain.training.checkpoint import load_model

    return [parameter.detach() for parameter in load_model(folder)[1].parameters()]


def _resumed(run: PhaseRun, steps: int) -> dict[str, bool]:
    """A run that goes on from its middle ends in the bits of one that was not interrupted."""
    train_again = partial(_train, run, steps=steps, device=run.device.type, deterministic=True)
    train_again("whole")
    middle = next(run.path.with_name("train-whole").glob(f"checkpoints/*{steps // 2}"))
    train_again("resumed", resume=str(middle))
    whole, resumed = (_parameters(run.path.with_name(f"train-{n}")) for n in ("whole", "resumed"))
    same = all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert same, "the resumed run ends in other bits"
    return {"same": True}


def _read_back(run: PhaseRun, steps: int) -> dict[str, Any]:
    """The device's last checkpoint, on a CPU: its loss in float32 is that of the run."""
    from emotrain.model.losses import language_model_sums
    from emotrain.training.checkpoint import load_model

    config, model = load_model(run.path.with_name("train-device"))
    batch = random_documents(2, 64, 6, config.model.vocab_size)
    losses = []
    for device in dict.fromkeys(("cpu", run.device.type)):
        placed, moved = model.to(device), batch.to(device)
        with torch.no_grad():
            sums = language_model_sums(placed(moved), placed.head, moved, 0.0)
        losses.append(float(sums.cross_entropy / sums.num_targets))
    assert all(torch.isfinite(p).all() for p in model.parameters()), "a parameter is not finite"
    assert abs(losses[-1] - losses[0]) < 1e-3 * losses[0], f"losses by device {losses}"
    return {"cross_entropy": losses}
