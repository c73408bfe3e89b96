"""DeepSpeed trains the same model as the native engine: ZeRO 1, 2 and 3, experts in DeepSpeed's
expert groups, experts that layers share, any number of micro-batches, clipped or not.

Proves that gradients of dense parameters and of experts have the right scale and one norm (what
DeepSpeed does by itself is measured beside), that no option of the JSON file that is let through
changes training, that a step which is not finite is skipped on all ranks, that checkpoints go on
under either engine, and that the real launcher starts it.

The oracle is one process without DeepSpeed. AdamW's epsilon is large: an update then shows the
scale of its gradient, which AdamW otherwise divides out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from emotrain.batch import SOURCE_BITS, PackedBatch
from emotrain.config import Config, config_from_dict, config_to_dict, load_config, save_config
from emotrain.distributed.mesh import experts_of_rank
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.model.transformer import Transformer
from emotrain.tasks.while_training import observer
from emotrain.training import checkpoint
from emotrain.training import run as run_module
from emotrain.training.deepspeed import DeepSpeedEngine
from emotrain.training.deepspeed_options import ZERO_OPTIONS, Whole, check_bucket, read_options
from emotrain.training.engine import NativeEngine
from emotrain.training.step import train_step
from tests import test_layout as layout
from tests.conftest import ROOT, tiny_settings
from tests.processes import run_script
from tests.python_of_forks import python_of_forks
from tests.test_while_training import with_more

# Before it is first imported: it would take a GPU that is there.
os.environ["DS_ACCELERATOR"] = "cpu"
pytest.importorskip("deepspeed", reason="pip install 'emotrain[deepspeed]'")
# Not used, but DeepSpeed imports them, and torch's compiler with them, in every process: 3 s each.
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
from deepspeed.utils import safe_get_full_fp32_param

SHIPPED = sorted((ROOT / "configs/deepspeed").glob("*.json"))


def config(
    ep: int = 1,
    micro_batch: int = layout.ROWS,
    precision: str = "float32",
    recompute: str = "none",
    **losses,
) -> Config:
    """Seven routed experts: they divide by no number of ranks."""
    settings = config_to_dict(layout.config({"ep": ep, "recompute": recompute}, **losses))
    settings["optimizer"].update(lr=1.0, eps=1.0, warmup_steps=0, weight_decay=0.01)
    settings["training"].update(micro_batch=micro_batch, precision=precision)
    return config_from_dict(settings)


def options(stage: int, **others) -> dict:
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, **others}}


def extremes(end: str) -> dict:
    """Every number of zero_optimization at one end of its range. (A whole buffer of DeepSpeed is
    allocated, and not used: its largest size is tried as far as a small machine goes.)"""
    numbers = {name: kind for name, kind in ZERO_OPTIONS.items() if isinstance(kind, Whole)}
    del numbers["stage"]
    values = {name: getattr(kind, end) // kind.step * kind.step for name, kind in numbers.items()}
    return {**values, "reduce_bucket_size": min(values["reduce_bucket_size"], 1 << 20)}


def of_two_sources(batch: PackedBatch) -> PackedBatch:
    """As of a mixture: documents from number 100 on are of its second source."""
    ids_G = batch.document_ids_G
    ids_G = torch.where(ids_G >= 100, ids_G + (1 << SOURCE_BITS), ids_G)
    return replace(batch, document_ids_G=ids_G, num_sources=2)


class Recorder:
    """Runs steps of an engine and keeps what they give."""

    def __init__(self, engine, settings: Config, ranks: Ranks):
        self.engine, self.settings, self.ranks = engine, settings, ranks
        self.numbers: list[list[float]] = []

    def step(self, number: int) -> None:
        size = self.settings.training.micro_batch
        batches = layout.micro_batches(number, size, self.ranks.rank, self.ranks.world_size)
        batches = [of_two_sources(batch) for batch in batches]
        result = train_step(self.engine, batches, self.settings, number, self.ranks)
        own = [sums for sums in result.by_source if sums is not None]
        self.numbers.append(
            [
                result.loss,
                result.cross_entropy,
                result.z,
                result.balance,
                result.router_z,
                *self.ranks.sum(torch.stack(own).sum(dim=0)).flatten().tolist(),
                float(result.grad_norm),
            ]
        )

    def record(self) -> dict:
        """Losses and norms by step, and this rank's parameters by name."""
        partitioned = getattr(self.engine, "stage", 0) == 3
        parameters = {
            name: (safe_get_full_fp32_param(parameter) if partitioned else parameter)
            .detach()
            .clone()
            for name, parameter in self.engine.model.named_parameters()
        }
        return {
            "numbers": torch.tensor(self.numbers, dtype=torch.float64),
            "parameters": parameters,
        }


def native(settings: Config) -> Recorder:
    return Recorder(NativeEngine.build(settings, Ranks(), fresh=True), settings, Ranks())


@cache
def expected(steps: int = 3, precision: str = "float32", clip_norm: float = 0.5) -> dict:
    """One process, one micro-batch, without DeepSpeed."""
    recorder = native(with_clipping(config(precision=precision), clip_norm))
    for step in range(1, steps + 1):
        recorder.step(step)
    return recorder.record()


def with_clipping(settings: Config, clip_norm: float) -> Config:
    values = config_to_dict(settings)
    values["optimizer"]["clip_norm"] = clip_norm
    return config_from_dict(values)


def _worker(rank, world_size, folder, settings, json_options, work, arguments):
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    file = Path(folder) / f"options-{rank}.json"
    file.write_text(json.dumps(json_options))
    ranks = Ranks(rank, world_size)
    recorder = Recorder(DeepSpeedEngine(file, settings, ranks, fresh=True), settings, ranks)
    work(recorder, *arguments)
    torch.save(recorder.record(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def run(
    folder: Path, settings: Config, json_options: dict, work, *arguments, world_size: int = 2
) -> list[dict]:
    """What every process records when it does `work(recorder, *arguments)` with a DeepSpeed
    engine."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    mp.start_processes(
        _worker,
        (world_size, str(folder), settings, json_options, work, arguments),
        nprocs=world_size,
        start_method="fork",
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


def train(recorder: Recorder, steps: int = 3) -> None:
    for step in range(1, steps + 1):
        recorder.step(step)


def whole(records: list[dict], ep: int) -> dict[str, torch.Tensor]:
    """Parameters with the experts of all ranks of an exchange."""
    parameters = dict(records[0]["parameters"])
    for name in parameters:
        if ".moe.experts." in name and ep > 1:
            parameters[name] = torch.cat([record["parameters"][name] for record in records[:ep]])
    return parameters


def assert_same_training(records: list[dict], wanted: dict, ep: int, rtol: float = 1e-5) -> None:
    for record in records:
        torch.testing.assert_close(record["numbers"], wanted["numbers"], rtol=rtol, atol=0)
    for name, values in whole(records, ep).items():
        other = wanted["parameters"][name]
        torch.testing.assert_close(
            values,
            other,
            rtol=rtol,
            atol=rtol * other.abs().max().item(),
            msg=lambda text, n=name: f"{n}: {text}",
        )


# ---- the same training


@pytest.mark.parametrize(
    ("stage", "ep", "micro_batch"),
    [(1, 1, 4), (1, 2, 1), (2, 1, 2), (2, 2, 4), (2, 2, 1), (3, 1, 1)],
)
def test_zero_on_two_processes_is_one_process_without_it(stage, ep, micro_batch, tmp_path):
    wanted = expected()
    assert wanted["numbers"][:, -1].min() > 0.5, "clipping is active"
    records = run(tmp_path, config(ep, micro_batch), options(stage), train)
    assert_same_training(records, wanted, ep)


@pytest.mark.parametrize("stage", [1, 2])
def test_experts_on_four_processes_of_which_two_hold_the_same_ones(stage, tmp_path):
    records = run(tmp_path, config(2, 1), options(stage), train, world_size=4)
    assert_same_training(records, expected(), 2)
    torch.testing.assert_close(records[0]["parameters"], records[2]["parameters"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stage", "ep", "recompute"),
    [(2, 2, "selective"), (2, 2, "full"), (3, 1, "selective"), (3, 1, "full")],
)
def test_recomputation(stage, ep, recompute, tmp_path):
    records = run(tmp_path, config(ep, 2, recompute=recompute), options(stage), train, 2)
    assert_same_training(records, expected(2), ep)


@pytest.mark.parametrize(("stage", "ep"), [(1, 2), (2, 2), (3, 1)])
def test_forward_and_backward_passes_in_turn(stage, ep, tmp_path):
    """As the loop runs them unless experts are balanced over the global batch; the joint
    schedule runs all forward passes first."""
    settings = config(ep, 2, balance_scope="micro_batch")
    oracle = native(config(1, 2, balance_scope="micro_batch"))
    train(oracle, 2)
    assert_same_training(run(tmp_path, settings, options(stage), train, 2), oracle.record(), ep)


def train_and_evaluate(recorder: Recorder) -> None:
    observe = observer(recorder.settings, recorder.ranks)
    for step in range(1, 3):
        recorder.step(step)
        found = observe(recorder.engine, step, False)
        del found["evaluation/seconds"]
        assert {name.split("/")[1] for name in found} >= {"increase_nats", "tasks"}
        recorder.numbers[-1] += found.values()


@pytest.mark.parametrize(("stage", "ep"), [(2, 2), pytest.param(1, 1, marks=pytest.mark.long)])
def test_evaluation_while_training_changes_nothing(stage, ep, tiny_data, tmp_path):
    """And finds what one native process finds, on documents and on tasks."""
    values = config_to_dict(config(ep, 4))
    values["model"]["vocab_size"] = 320
    values["data"] |= {"path": str(tiny_data), "sequence_length": 32}
    values["evaluation"] = with_more(tmp_path) | {"every": 1}
    settings = config_from_dict(values)
    oracle = native(replace(settings, parallel=replace(settings.parallel, ep=1)))
    train_and_evaluate(oracle)
    wanted = oracle.record()["numbers"]
    without = run(tmp_path, settings, options(stage), train, 2)
    for record, other in zip(
        run(tmp_path, settings, options(stage), train_and_evaluate), without, strict=True
    ):
        trained, found = record["numbers"].tensor_split([other["numbers"].shape[1]], dim=1)
        torch.testing.assert_close(found, wanted[:, -found.shape[1] :], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(trained, other["numbers"], rtol=0, atol=0)
        torch.testing.assert_close(record["parameters"], other["parameters"], rtol=0, atol=0)


@pytest.mark.parametrize("stage", [2, 3])
def test_without_clipping(stage, tmp_path):
    records = run(tmp_path, with_clipping(config(1, 2), 0.0), options(stage), train)
    assert_same_training(records, expected(clip_norm=0.0), 1)


@pytest.mark.parametrize(
    ("sharing", "stage", "ep", "recompute"),
    [
        ("groups", 1, 2, "none"),
        ("all", 2, 2, "full"),
        ("groups", 3, 1, "selective"),
        ("all", 3, 1, "none"),
    ],
)
def test_banks_of_experts_that_layers_share(sharing, stage, ep, recompute, tmp_path):
    """One parameter has gradients of several layers, and a rank's share of it is one share."""

    def shared(settings: Config) -> Config:
        experts = replace(settings.model.experts, sharing=sharing)
        return replace(settings, model=replace(settings.model, experts=experts, num_layers=4))

    oracle = native(shared(config()))
    train(oracle, 2)
    settings = shared(config(ep, 2, recompute=recompute))
    assert_same_training(run(tmp_path, settings, options(stage), train, 2), oracle.record(), ep)


def test_bfloat16_is_that_of_the_configuration(tmp_path):
    """DeepSpeed turns an autocast that it did not make off on GPUs; here the engine makes its
    own."""
    records = run(tmp_path, config(2, 4, "bfloat16"), options(2), train, 1)
    got, wanted, exact = (
        records[0]["numbers"],
        expected(1, "bfloat16")["numbers"],
        expected(1)["numbers"],
    )
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=0)
    assert not torch.allclose(got, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("stage", "ep", "others"),
    [
        (1, 1, {"reduce_scatter": False}),
        (2, 1, {"reduce_scatter": False}),
        (1, 1, {"contiguous_gradients": False}),
        (1, 2, {"overlap_comm": True}),
        (2, 2, {"overlap_comm": True, "round_robin_gradients": True}),
        (2, 2, {"use_multi_rank_bucket_allreduce": False}),
        (2, 2, {"reduce_bucket_size": 100}),
        (3, 1, {"overlap_comm": False, "stage3_param_persistence_threshold": 0}),
        (3, 1, {"reduce_scatter": False, "sub_group_size": 1000}),
        (2, 2, extremes("least")),
        (2, 2, {"reduce_bucket_size": 383}),
        (1, 2, {"reduce_bucket_size": 383}),
        (2, 1, extremes("most")),
        (3, 1, extremes("least")),
        (3, 1, extremes("most")),
    ],
    ids=str,
)
def test_no_option_that_is_let_through_changes_training(stage, ep, others, tmp_path):
    records = run(tmp_path, config(ep, 2), options(stage, **others), train, 2)
    assert_same_training(records, expected(2), ep)


def test_a_bucket_that_unequal_shares_of_experts_fill_differently_is_refused():
    """Seven experts on two ranks are four and three: the ranks would reduce other gradients
    together. Equal shares fill it alike."""
    shares, totals = [[512, 512], [384, 384]], [5000, 4744]
    for size in (1, 383, 5000, 2**31 - 1):
        check_bucket(size, shares, totals)
    for size in (384, 1000, 4999):
        with pytest.raises(UserError, match=f"={size}: ranks .* need less than 384 or at least 5"):
            check_bucket(size, shares, totals)
        check_bucket(size, [shares[0]] * 2, [5000] * 2)


@pytest.mark.parametrize("file", SHIPPED[:2], ids=lambda path: path.name)
@pytest.mark.parametrize("ep", [2, 4, 8, 16])
def test_the_files_that_come_with_the_project_suit_the_published_model(file, ep):
    """127 experts are unequal shares on any number of ranks."""
    published = load_config(ROOT / "configs/emo_1b14b_130b.yaml", [f"parallel.ep={ep}"])
    with torch.device("meta"):
        experts = Transformer(published.model).blocks[0].moe.experts
    per_expert = [parameter[0].numel() for parameter in experts.parameters()]
    held = [experts_of_rank(127, ep, rank) for rank in range(ep)]
    shares = [[count * size for size in per_expert] for count in held]
    assert len(set(held)) > 1
    bucket = read_options(file, published, ep)["zero_optimization"]["reduce_bucket_size"]
    check_bucket(bucket, shares, [10**10] * ep)


# ---- what DeepSpeed would do by itself


def _averaging(recorder: Recorder) -> None:
    """One step as DeepSpeed would make it: gradients averaged over ranks, losses over
    micro-batches."""
    engine = recorder.engine._engine
    engine.optimizer.gradient_average = True
    backward = engine.backward
    engine.backward = lambda loss, scale_wrt_gas: backward(loss)
    recorder.step(1)


@pytest.mark.parametrize("stage", [1, 2])
def test_by_itself_it_would_divide_gradients_by_processes_and_by_micro_batches(stage, tmp_path):
    micro_batch = 2
    records = run(tmp_path, config(2, micro_batch), options(stage), _averaging)
    factor = layout.ROWS // micro_batch
    torch.testing.assert_close(
        records[0]["numbers"][0, -1] * factor, expected(1)["numbers"][0, -1], rtol=1e-5, atol=0
    )


# ---- steps that are not finite


def _fail_second_step(recorder: Recorder) -> None:
    """The second step's loss is infinite on the second rank alone, with a gradient that would be
    finite."""
    recorder.step(1)
    before = recorder.record()["parameters"]
    backward = recorder.engine.backward
    recorder.engine.backward = lambda loss, is_last: backward(
        loss + (torch.inf if recorder.ranks.rank == 1 else 0), is_last
    )
    recorder.step(2)
    for name, values in recorder.record()["parameters"].items():
        assert torch.equal(values, before[name]), name
    recorder.engine.backward = backward
    recorder.step(3)


@pytest.mark.parametrize(("stage", "ep"), [(1, 1), (2, 2), (3, 1)])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(stage, ep, tmp_path):
    oracle = native(config())
    oracle.step(1)
    oracle.numbers.append([0.0] * len(oracle.numbers[0]))
    oracle.step(3)
    records = run(tmp_path, config(ep, 2), options(stage), _fail_second_step)
    for record in records:
        assert record["numbers"][1, -1] == torch.inf
        record["numbers"][1] = 0
    assert_same_training(records, oracle.record(), ep)


# ---- checkpoints


def _save_after_two(recorder: Recorder, run_dir: Path) -> None:
    train(recorder, 2)
    with checkpoint.CheckpointWriter(run_dir) as writer:
        recorder.engine.save(
            writer,
            recorder.settings,
            checkpoint.TrainingState(2, 0, "data", 0, layout.ROWS, 1.0),
            None,
        )
    recorder.step(3)


def _resume(recorder: Recorder, run_dir: Path) -> None:
    assert recorder.engine.restore(checkpoint.find(run_dir)).step == 2
    recorder.step(3)


@pytest.mark.parametrize(
    ("stage", "ep", "then"),
    [(1, 2, (2, 1)), (2, 2, (2, 2)), (3, 1, (3, 1)), (2, 1, (3, 1))],
    ids=str,
)
def test_a_run_goes_on_from_its_checkpoint_under_the_same_and_another_layout(
    stage, ep, then, tmp_path
):
    run_dir = tmp_path / "run"
    saved = run(tmp_path, config(ep, 2), options(stage), _save_after_two, run_dir)
    resumed = run(tmp_path, config(then[1], 2), options(then[0]), _resume, run_dir)
    assert_same_training(saved, expected(), ep)
    alone = native(config())
    assert alone.engine.restore(checkpoint.find(run_dir)).step == 2
    alone.step(3)
    last = {"numbers": expected()["numbers"][2:], "parameters": expected()["parameters"]}
    assert_same_training(resumed, last, then[1])
    assert_same_training([alone.record()], last, 1)
    if (stage, ep) == then:
        torch.testing.assert_close(resumed[1]["parameters"], saved[1]["parameters"], rtol=0, atol=0)


def test_a_native_checkpoint_goes_on_under_deepspeed(tmp_path):
    alone = native(config())
    train(alone, 2)
    with checkpoint.CheckpointWriter(tmp_path / "run") as writer:
        alone.engine.save(
            writer, config(), checkpoint.TrainingState(2, 0, "data", 0, layout.ROWS, 1.0), None
        )
    resumed = run(tmp_path, config(2, 1), options(2), _resume, tmp_path / "run")
    assert_same_training(
        resumed, {"numbers": expected()["numbers"][2:], "parameters": expected()["parameters"]}, 2
    )


def _begin_with_the_weights(recorder: Recorder, run_dir: Path) -> None:
    recorder.engine.restore(checkpoint.find(run_dir), weights_only=True)
    recorder.step(3)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_begins_with_the_weights_of_a_checkpoint_alone(stage, tmp_path):
    """Its optimizer starts anew, as that of a native run."""
    alone = native(config())
    train(alone, 2)
    with checkpoint.CheckpointWriter(tmp_path / "run") as writer:
        alone.engine.save(
            writer, config(), checkpoint.TrainingState(2, 0, "data", 0, layout.ROWS, 1.0), None
        )
    again = native(config())
    _begin_with_the_weights(again, tmp_path / "run")
    begun = run(tmp_path, config(1, 1), options(stage), _begin_with_the_weights, tmp_path / "run")
    assert_same_training(begun, again.record(), 1)


# ---- what is missing


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(
        ValueError, match="needs a launcher of processes; start with `deepspeed launch/pretrain.py"
    ):
        DeepSpeedEngine(SHIPPED[0], config(), Ranks(), fresh=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"is not installed; pip install 'emotrain\[deepspeed\]'"
    ):
        DeepSpeedEngine(SHIPPED[0], config(), Ranks(), fresh=True)


# ---- the launcher


def free_port() -> int:
    """Below those that the system hands out: the launcher takes seconds until it listens."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free between 20000 and 30000")


def launch(settings: dict, folder: Path, *arguments: object) -> dict:
    """A run of two processes by the real launcher, and its summary. What it starts are forks, in
    which torch and DeepSpeed are loaded."""
    save_config(config_from_dict(settings), folder / "config.yaml")

    def alone() -> None:
        sys.executable = str(python)
        for key in list(os.environ):
            if re.match(r"RANK$|LOCAL_|WORLD_SIZE|MASTER_", key):
                del os.environ[key]
        os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        os.chdir(ROOT)

    (folder / "python").mkdir()
    with python_of_forks(folder / "python") as python:
        done = run_script(
            Path(sys.executable).with_name("deepspeed"),
            *("--num_gpus", 2, "--master_port", free_port(), "launch/pretrain.py"),
            *(folder / "config.yaml", *arguments, "--json"),
            first=alone,
        )
    assert done.returncode == 0, done.stderr
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


def losses(run_dir: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor(
        [[line["loss"], line["grad_norm"], *line["load_imbalance"]] for line in lines]
    )


def test_the_launcher_trains_as_one_native_process(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run", micro_batch=1, device="cpu", steps=4)
    options_file = "configs/deepspeed/zero2.json"
    summary = launch(
        {**settings, "parallel": {"ep": 2}},
        tmp_path,
        "--deepspeed",
        options_file,
        "optimizer.schedule=linear",
    )
    assert summary["step"] == 4
    settings["training"]["run_dir"], settings["optimizer"]["schedule"] = (
        str(tmp_path / "native"),
        "linear",
    )
    run_module.train(config_from_dict(settings), Ranks())
    assert len(losses(tmp_path / "run")) == 4
    torch.testing.assert_close(
        losses(tmp_path / "run"), losses(tmp_path / "native"), rtol=1e-5, atol=0
    )
    (_, model), (_, wanted) = (
        checkpoint.load_model(tmp_path / "run"),
        checkpoint.load_model(tmp_path / "native"),
    )
    for (name, parameter), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(
            parameter, other, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
