"""Evaluation inside a training run: the run computes the same bits with it as without, on one
process and on two, interrupted or not; its numbers are those of `emotrain evaluate` on the
checkpoint of the same step; it takes no memory beside a step; what it cannot read ends the run
before it starts."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_training import _Always

from emotrain.cli import main
from emotrain.config import Config, config_from_dict, load_config, save_config
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.measure import evaluate
from emotrain.evaluation.perplexity import pack, token_losses
from emotrain.evaluation.reading import read_domains
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.evaluation.while_training import TrainingEvaluation
from emotrain.model.router import training_request
from emotrain.planning.dry_run import follow_state
from emotrain.planning.meter import Meter
from emotrain.planning.parts import PARTS
from emotrain.tasks.evaluation import evaluate_tasks
from emotrain.tasks.settings import TaskSettings
from emotrain.tasks.while_training import observer
from emotrain.training import checkpoint
from emotrain.training import metrics as metrics_module
from emotrain.training import run as run_module
from emotrain.training.data_source import build_loader
from emotrain.training.engine import NativeEngine
from emotrain.training.step import train_step
from tests.conftest import ROOT, WORDS, tiny_settings
from tests.processes import run_ranks
from tests.test_tasks_reading import write_lines

EVERY_TWO = {
    "every": 2,
    "keep": [0.5],
    "domains": ["kitchen", "garden"],
    "documents": 2,
    "calibration_documents": 2,
}
AS_EVERY_TWO = EvaluationSettings(
    keep=(0.5,),
    domains=("kitchen", "garden"),
    documents=2,
    calibration_documents=2,
    random_seeds=0,
)
POOL = 4
"""Of seven routed experts; a token uses two."""
TIMES = ("tokens_per_second", "memory_gib", "evaluation/seconds")


def with_more(folder: Path) -> dict[str, Any]:
    """Evaluations that measure everything: also pools of one size, and a task of each kind."""
    rng = random.Random(0)
    splits = ("test",) * 3 + ("train",) * 2

    def some(domain: str, count: int) -> str:
        return " ".join(rng.choice(WORDS[domain]) for _ in range(count))

    kinds = {
        "choices": lambda split: {
            "question": some("kitchen", 2),
            "choices": [some("kitchen", 1), some("garden", 2)],
            "answer": 0,
            "split": split,
        },
        "words": lambda split: {
            "question": some("garden", 2), "answers": [some("garden", 1)], "split": split
        },
        "texts": lambda split: {"text": some("garden", 4), "split": split},
    }  # fmt: skip
    for kind, line in kinds.items():
        write_lines(folder / f"{kind}.jsonl", *(line(split) for split in splits))
    files = [str(folder / f"{kind}.jsonl") for kind in kinds]
    return EVERY_TWO | {"pool_size": POOL, "tasks": files, "task_keep": [0.5], "answer_tokens": 5}


def settings(data: Path, run_dir: Path, evaluation: dict | None = None, **training: Any) -> dict:
    """Evaluations after steps 2, 4 and 5, and a checkpoint of the first two of them and at the
    end."""
    own = tiny_settings(data, run_dir, checkpoint_every=2, keep_checkpoints=0, **training)
    own["training"]["steps"] = 5
    return own | {"evaluation": EVERY_TWO if evaluation is None else evaluation}


def train(values: dict, ranks: Ranks | None = None) -> dict[str, Any]:
    """As `emotrain train`."""
    config = config_from_dict(values)
    ranks = ranks or Ranks()
    options = {"observe": observer(config, ranks)} if config.evaluation.every else {}
    return run_module.train(config, ranks, **options)


def train_until(step: int, values: dict, ranks: Ranks | None = None) -> None:
    """As `train`, asked to stop during a step."""
    stops = iter([False] * (step - 1) + [True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_stop_requests", lambda: _Always(lambda: next(stops)))
        assert train(values, ranks)["step"] == step


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock says."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def of_training(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if not key.startswith("evaluation/")}
        for line in lines(run_dir)
    ]


def of_evaluation(run_dir: Path) -> dict[int, dict[str, float]]:
    """By step."""
    every = {
        line["step"]: {key: value for key, value in line.items() if key.startswith("evaluation/")}
        for line in lines(run_dir)
    }
    return {step: values for step, values in every.items() if values}


def assert_same_run(one: Path, other: Path) -> None:
    assert of_training(one) == of_training(other)
    pairs = [checkpoint.load_model(run_dir)[1].state_dict() for run_dir in (one, other)]
    for (name, a), b in zip(pairs[0].items(), pairs[1].values(), strict=True):
        assert torch.equal(a, b), name


def assert_as_evaluated(run_dir: Path, data: Path, rel: float, steps: Sequence[int]) -> None:
    """A run evaluated after these steps, each time as its checkpoint."""
    found = of_evaluation(run_dir)
    assert list(found) == list(steps)
    for step, values in found.items():
        wanted = evaluate(run_dir / f"checkpoints/step-{step:08d}", data, AS_EVERY_TWO)
        named = {
            "evaluation/domain_cosine": wanted.routing.domain_cosine,
            "evaluation/effective_experts": wanted.routing.effective_experts,
        }
        of = {"": wanted.mean} | {f"domains/{n}/": d for n, d in wanted.domains.items()}
        assert len(of) == 3
        for place, losses in of.items():
            named[f"evaluation/{place}loss_nats"] = losses.loss_nats
            for arm in ("selected", "cross_domain"):
                increase = getattr(losses.increase_nats["0.5"], arm)
                named[f"evaluation/{place}increase_nats/0.5/{arm}"] = increase
        named |= of_tasks(run_dir, step) | of_pools(run_dir, step, data)
        assert values == pytest.approx(named, rel=rel, abs=rel)


def of_tasks(run_dir: Path, step: int) -> dict[str, float]:
    """As `emotrain evaluate --tasks` finds it."""
    setup = load_config(run_dir / "config.yaml").evaluation
    if not setup.tasks:
        return {}
    asked = TaskSettings(
        keep=setup.task_keep, calibration_documents=2, random_seeds=0, answer_tokens=5
    )
    found = evaluate_tasks(run_dir / f"checkpoints/step-{step:08d}", setup.tasks, asked)
    ends = {"all experts": "", "keep 0.5, own choice": "/0.5"}
    return {
        f"evaluation/tasks/{score.task}/{metric}{ends[score.experts]}": number.value
        for score in found.scores
        for metric, number in score.metrics.items()
    }


@torch.no_grad()
def of_pools(run_dir: Path, step: int, data: Path) -> dict[str, float]:
    """By the model's own forward pass, a document at a time."""
    if not load_config(run_dir / "config.yaml").evaluation.pool_size:
        return {}
    folder = run_dir / f"checkpoints/step-{step:08d}"
    config, model = checkpoint.load_model(folder)
    pool = replace(config.model.router.pool, kind="fixed", size=POOL)
    fixed = replace(config.model, router=replace(config.model.router, pool=pool))
    losses = {}
    for name, documents in read_domains(data, config, folder, AS_EVERY_TWO).items():
        batches = [b for d in documents.held_out for b in pack([d], config.data.sequence_length, 1)]
        outputs = [(b, model(b, training_request(fixed, b, 5, 7))) for b in batches]
        loss = [
            token_losses(output.hidden_TD, model.head.weight, batch.targets_BS.flatten()).sum()
            for batch, output in outputs
        ]
        targets = sum(int((batch.targets_BS >= 0).sum()) for batch in batches)
        losses[f"domains/{name}/"] = float(sum(loss)) / targets
    losses[""] = sum(losses.values()) / len(losses)
    return {f"evaluation/{place}loss_nats/pool_{POOL}": loss for place, loss in losses.items()}


def states_of_generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]


def test_training_is_the_same_to_the_bit(tiny_data: Path, tmp_path: Path) -> None:
    """The run that evaluates is stopped in a step that it does so after."""
    states = []
    for name, evaluation in (("off", {}), ("on", with_more(tmp_path))):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        values = settings(tiny_data, tmp_path / name, evaluation)
        if evaluation:
            train_until(4, values)
        train(values)
        states.append(states_of_generators())
    assert states[0] == states[1]
    assert_same_run(tmp_path / "on", tmp_path / "off")
    assert_as_evaluated(tmp_path / "on", tiny_data, 1e-6, steps=[2, 4, 5])
    assert not of_evaluation(tmp_path / "off")


@pytest.mark.long
@pytest.mark.parametrize("stop", [3, 4])
def test_a_run_that_is_stopped_neither_skips_nor_doubles_an_evaluation(
    stop: int, tiny_data: Path, tmp_path: Path
) -> None:
    """Stopped between two, or at one; and killed after one whose checkpoint was not whole."""
    train(settings(tiny_data, tmp_path / "whole"))
    train_until(stop, settings(tiny_data, tmp_path / "cut"))
    train(settings(tiny_data, tmp_path / "cut"))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    (tmp_path / "cut/checkpoints/step-00000005").rename(tmp_path / "away")
    train(settings(tiny_data, tmp_path / "cut"))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("parallel", "stop"),
    [
        ({"ep": 2}, 0),
        pytest.param({"ep": 2}, 3, marks=pytest.mark.long),
        pytest.param({"recompute": "full"}, 4, marks=pytest.mark.long),
        pytest.param({"replicate": 2, "recompute": "selective"}, 3, marks=pytest.mark.long),
        pytest.param({"reshard_after_forward": False}, 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_two_processes_train_the_same_and_evaluate_as_one(
    parallel: dict, stop: int, tiny_data: Path, tmp_path: Path
) -> None:
    """With two micro-batches each; `stop` is the step in which the run that evaluates is
    interrupted."""

    everything = with_more(tmp_path)

    def body(ranks: Ranks) -> None:
        for name, evaluation in (("off", {}), ("on", everything)):
            values = settings(tiny_data, tmp_path / name, evaluation, micro_batch=1)
            values["parallel"] = parallel
            values["training"]["steps"] = steps[-1]
            if evaluation and stop:
                train_until(stop, values, ranks)
            train(values, ranks)

    steps = [2, 4, 5] if stop else [2, 3]
    run_ranks(body, 2)
    assert_same_run(tmp_path / "on", tmp_path / "off")
    assert_as_evaluated(tmp_path / "on", tiny_data, 1e-6, steps)


@pytest.mark.long
def test_nothing_is_compiled_for_it(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks that training runs compiled."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs[-1] += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for name, evaluation in (("off", {}), ("on", EVERY_TWO)):
        graphs.append(0)
        torch._dynamo.reset()
        train(settings(tiny_data, tmp_path / name, evaluation, compile=True))
    assert graphs[0] == graphs[1] > 0
    assert_same_run(tmp_path / "on", tmp_path / "off")
    assert list(of_evaluation(tmp_path / "on")) == [2, 4, 5]


# ---- what it leaves as it was


def peaks(ranks: Ranks, config: Config) -> tuple[int, int]:
    """Bytes of tensors at the peak of a step, and of a step, an evaluation and another step."""
    observe = observer(config, ranks)
    engine = NativeEngine.build(config, ranks, fresh=True)
    setup, where = config.training, (ranks.rank, ranks.world_size)
    batches = build_loader(config).step(0, setup.global_batch, setup.micro_batch, *where)

    def step(number: int) -> None:
        train_step(engine, batches, config, number, ranks)

    step(1)
    found = []
    for evaluates in (False, True):
        engine.start_step()
        meter = Meter(PARTS)
        follow_state(meter, engine, batches)
        with meter:
            step(2)
            if evaluates:
                assert observe(engine, 2, False)["evaluation/loss_nats"] > 0
                assert_as_before_a_step(engine)
            step(3)
        found.append(meter.peak_bytes)
    return found[0], found[1]


def assert_as_before_a_step(engine: NativeEngine) -> None:
    model = engine.model
    assert model.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for module in model.modules():
        if hasattr(module, "unshard"):
            state = module._get_fsdp_state()
            # Torch 2.11 knows of one.
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                assert group.is_sharded and group._all_gather_result is None


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_memory_is_that_of_a_step(world_size: int, tiny_data: Path, tmp_path: Path) -> None:
    values = settings(tiny_data, tmp_path, with_more(tmp_path), micro_batch=2)
    values["data"]["sequence_length"] = 64
    values["parallel"] = {"ep": world_size}
    config = config_from_dict(values)
    for step, with_evaluation in run_ranks(peaks, world_size, config):
        assert with_evaluation <= 1.05 * step


def test_its_time_is_no_time_of_training(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second a step and a thousand an evaluation, by a clock that only they move."""
    now = [0.0]
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    real = run_module.train_step

    def step(*arguments: Any) -> Any:
        now[0] += 1
        return real(*arguments)

    def observe(engine: Any, step: int, is_last: bool) -> dict[str, Any]:
        now[0] += 1000
        return {}

    monkeypatch.setattr(run_module, "train_step", step)
    config = config_from_dict(tiny_settings(tiny_data, tmp_path))
    summary = run_module.train(config, Ranks(), observe=observe)
    text = (tmp_path / "metrics.jsonl").read_text()
    rates = [json.loads(line)["tokens_per_second"] for line in text.splitlines()]
    assert rates == [config.tokens_per_step] * 6
    assert summary["mean_tokens_per_second"] == config.tokens_per_step
    assert summary["seconds"] == 6006


def test_a_model_beyond_repair_is_told_and_ends_nothing(tiny_data: Path, tmp_path: Path) -> None:
    config = config_from_dict(settings(tiny_data, tmp_path))
    engine = NativeEngine.build(config, Ranks(), fresh=True)
    with torch.no_grad():
        engine.model.head.weight.fill_(torch.nan)
    found = TrainingEvaluation(config, Ranks())(engine, 2, False)
    assert found["evaluation/loss_nats"] is None


# ---- what is refused


REFUSED = {
    "evaluation.data=NOTHING": "NOTHING",
    "evaluation.data=ANSWERS": "holds prompts and answers; name a folder",
    "evaluation.domains=[desert]": "no held-out documents of domain 'desert'",
    "evaluation.calibration_documents=1000": "train documents, 1000 are needed",
    "evaluation.pool_size=1": "cannot be a pool; give 2 (model.experts.top_k) to 7",
    "evaluation.pool_size=9": "cannot be a pool; give 2 (model.experts.top_k) to 7",
    "evaluation.tasks=[nothing.jsonl]": "evaluation.tasks: nothing.jsonl: no such file",
    "evaluation.tasks=[TASK]": "evaluation.tasks: evaluation.answer_tokens 50 leaves no room",
    "evaluation.shots=2": "evaluation.shots=2 says how tasks are asked, and none is given",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_mistake_is_found_before_training(
    override: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "ANSWERS").write_text('{"prompt": "a", "answer": "b"}\n')
    write_lines(tmp_path / "TASK", {"question": "a", "answers": ["b"]})
    values = settings(tiny_data, tmp_path / "run", {"every": 2})
    save_config(config_from_dict(values), tmp_path / "config.yaml")
    said = REFUSED[override]
    for name in ("NOTHING", "ANSWERS", "TASK"):
        override = override.replace(name, str(tmp_path / name))
    assert main(["train", str(tmp_path / "config.yaml"), override]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "run").exists()


def test_a_dense_model_is_measured_without_subsets(tiny_data: Path, tmp_path: Path) -> None:
    values = settings(tiny_data, tmp_path, EVERY_TWO | {"keep": []})
    values["model"] |= {"experts": {"routed": 0, "top_k": 0, "shared": 1, "hidden": 8}}
    train(values)
    for found in of_evaluation(tmp_path).values():
        assert not [key for key in found if "increase" in key]
        assert found["evaluation/loss_nats"] > 0
    values["evaluation"] = EVERY_TWO
    with pytest.raises(UserError, match="the model is dense"):
        TrainingEvaluation(config_from_dict(values), Ranks())


def test_what_the_page_says(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its command of training runs, on a configuration of another size, and writes the names of its
    table. That of two processes is one that the parser takes."""
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    values = settings(tiny_data, tmp_path / "elsewhere", {})
    Path("configs").mkdir()
    save_config(config_from_dict(values), "configs/quickstart.yaml")
    [line] = re.findall(r"^emotrain (train .*)$", page, re.MULTILINE)
    assert main(shlex.split(line)) == 0, capsys.readouterr().err
    [found] = of_evaluation(tmp_path / "runs/watched").values()
    named = set(re.findall(r"^\| `(evaluation/[^`…]+)` \|", page, re.MULTILINE))
    assert named - {"evaluation/seconds", "evaluation/domains/NAME/"} <= set(found)
    known = {re.sub("domains/[^/]+/", "", key) for key in found} | {"evaluation/seconds"}
    assert known == {name for name in named if "NAME" not in name}
    [line] = re.findall(
        r"^torchrun --nproc-per-node 2 -m emotrain (evaluate .*)$", page, re.MULTILINE
    )
    assert main(shlex.split(line)) == 2
    assert "runs/quickstart" in capsys.readouterr().err.splitlines()[-1]
