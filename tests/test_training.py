"""The training loop: exact resume, signals, annealing, the guard against updates that are not
finite, metrics, errors in one line."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from emotrain.config import OptimizerConfig, config_from_dict, load_config, save_config
from emotrain.data.source import DataSource
from emotrain.training import checkpoint
from emotrain.training import engine as engine_module
from emotrain.training import run as run_module
from emotrain.training.optimizer import anneal_learning_rate, build_optimizer, learning_rate
from tests.conftest import ROOT, tiny_settings
from tests.processes import started


def train(settings: dict) -> dict:
    return run_module.train(config_from_dict(settings))


def metrics(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run_dir)]


def test_an_interrupted_run_goes_on_bit_for_bit(tiny_data, tmp_path, monkeypatch):
    train(tiny_settings(tiny_data, tmp_path / "whole"))
    stop_at = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_stop_requests", lambda: _Always(lambda: next(stop_at)))
        summary = train(tiny_settings(tiny_data, tmp_path / "cut"))
    assert summary["interrupted"] and summary["step"] == 3
    summary = train(tiny_settings(tiny_data, tmp_path / "cut"))
    assert not summary["interrupted"] and summary["step"] == 6
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    _, whole = checkpoint.load_model(tmp_path / "whole")
    _, cut = checkpoint.load_model(tmp_path / "cut")
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_whatever_answers_as_a_data_source_can_be_trained_on(tiny_data, tmp_path, monkeypatch):
    """Training asks nothing that `DataSource` does not name."""
    train(tiny_settings(tiny_data, tmp_path / "loader"))
    build = run_module.build_loader
    names = [name for name in vars(DataSource) if not name.startswith("_")]

    def narrow(config):
        loader = build(config)
        return SimpleNamespace(**{name: getattr(loader, name) for name in names})

    monkeypatch.setattr(run_module, "build_loader", narrow)
    train(tiny_settings(tiny_data, tmp_path / "narrow"))
    assert losses(tmp_path / "narrow") == losses(tmp_path / "loader")


class _Always:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return None


def test_a_checkpoint_in_the_middle_drops_later_metrics_and_goes_on(tiny_data, tmp_path):
    """As after kill -9: metrics lines beyond the last checkpoint are there, and must not stand
    twice."""
    run_dir = tmp_path / "run"
    train(tiny_settings(tiny_data, run_dir, checkpoint_every=4, keep_checkpoints=0))
    wanted = losses(run_dir)
    (run_dir / "checkpoints" / "step-00000006").rename(tmp_path / "away")
    train(tiny_settings(tiny_data, run_dir, checkpoint_every=4, keep_checkpoints=0))
    assert losses(run_dir) == wanted
    assert [step for step, *_ in wanted] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_has_nothing_left_to_do(tiny_data, tmp_path):
    train(tiny_settings(tiny_data, tmp_path))
    assert train(tiny_settings(tiny_data, tmp_path))["step"] == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_ends_with_75(number, tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run", steps=100_000)
    save_config(config_from_dict(settings), tmp_path / "config.yaml")
    metrics_file = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    with started(ROOT / "launch/pretrain.py", tmp_path / "config.yaml", "--json") as run:
        while (
            not (metrics_file.is_file() and metrics_file.stat().st_size)
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        os.kill(run.process.pid, number)
        run.process.join(60)
        assert run.process.exitcode == 75, run.err.read_text()
        stdout = run.out.read_text()
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["interrupted"] and summary["checkpoint_step"] == summary["step"] < 100_000
    assert checkpoint.load_state(checkpoint.find(tmp_path / "run")).step == summary["step"]


def test_annealing_goes_on_from_a_checkpoint_and_ends_at_zero(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "base")
    train(settings)
    start_lr = metrics(tmp_path / "base")[-1]["lr"]
    annealed = tiny_settings(tiny_data, tmp_path / "anneal", steps=0)
    annealed["anneal"] = {"checkpoint": str(tmp_path / "base"), "tokens": 4 * 4 * 32 + 100}
    train(annealed)
    lines = metrics(tmp_path / "anneal")
    assert [line["step"] for line in lines] == [7, 8, 9, 10]
    assert [line["lr"] for line in lines] == pytest.approx(
        [start_lr * share for share in (0.75, 0.5, 0.25, 0.0)]
    )
    assert lines[-1]["tokens"] == 10 * 4 * 32
    assert train(annealed)["step"] == 10


def test_learning_rate_follows_the_published_schedule():
    """Spec 5: warm-up 2,000 steps to 4e-3, cosine to a tenth at step 238,419."""
    config, last = OptimizerConfig(), 238_419
    assert learning_rate(config, 1, last) == pytest.approx(2e-6)
    assert learning_rate(config, 1000, last) == pytest.approx(2e-3)
    assert learning_rate(config, 2000, last) == pytest.approx(4e-3)
    middle = 2000 + (last - 2000) // 3
    assert learning_rate(config, middle, last) == pytest.approx(
        4e-4 + 3.6e-3 * (1 + math.cos(math.pi * (middle - 2000) / (last - 2000))) / 2
    )
    assert learning_rate(config, last, last) == pytest.approx(4e-4)
    assert anneal_learning_rate(4e-4, last, last + 11_920, 11_920) == 0.0


def test_only_the_embedding_is_exempt_from_decay():
    from emotrain.model.transformer import Transformer

    config = config_from_dict(tiny_settings("d", "r"))
    model = Transformer(config.model).initialize(0)
    optimizer = build_optimizer(model, config.optimizer)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {name for name, p in model.named_parameters() if decay[id(p)] == 0} == {
        "embedding.weight"
    }
    assert len(decay) == len(list(model.parameters()))


def test_an_update_that_is_not_finite_is_skipped_and_said(tiny_data, tmp_path, monkeypatch, caplog):
    real = engine_module.language_model_sums
    calls = iter(range(100))

    def sums(*arguments):
        result = real(*arguments)
        bad = next(calls) == 2
        return engine_module.LossSums(
            result.lm * (torch.nan if bad else 1.0),
            result.cross_entropy,
            result.z,
            result.num_targets,
        )

    after, real_step = [], run_module.train_step

    def step(engine, *arguments):
        result = real_step(engine, *arguments)
        after.append([p.detach().clone() for p in engine.model.parameters()])
        return result

    monkeypatch.setattr(engine_module, "language_model_sums", sums)
    monkeypatch.setattr(run_module, "train_step", step)
    with caplog.at_level("WARNING"):
        train(tiny_settings(tiny_data, tmp_path, checkpoint_every=1, keep_checkpoints=0))
    assert "step 3: skipped an update" in caplog.text and "sequences 8 to 11" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(after[1], after[2], strict=True)), (
        "step 3 must change nothing"
    )
    assert not all(torch.equal(a, b) for a, b in zip(after[2], after[3], strict=True))
    saved = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert saved == [f"step-{number:08d}" for number in (1, 2, 4, 5, 6)]
    assert checkpoint.load_state(checkpoint.find(tmp_path)).skipped_steps == 1


def test_too_many_skipped_updates_end_the_run(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path, max_skipped_steps=3)
    settings["losses"] = {"z": 1e38}
    with pytest.raises(
        RuntimeError, match=r"step 3: 3 updates in a row were not finite .*lower optimizer\.lr"
    ):
        train(settings)


def test_metrics_hold_what_they_promise(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path, log_every=3, tensorboard=True, peak_tflops=0.1)
    train(settings)
    line = metrics(tmp_path)[-1]
    assert set(line) == {
        "step",
        "tokens",
        "loss",
        "cross_entropy",
        "z_loss",
        "balance_loss",
        "router_z_loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "memory_gib",
        "skipped_steps",
        "load_imbalance",
        "dead_experts",
        "token_entropy_nats",
        "effective_experts",
        "pool_size_mean",
        "pool_size_min",
        "pool_size_max",
        "mfu",
    }
    assert [entry["step"] for entry in metrics(tmp_path)] == [3, 6]
    assert all(
        len(line[key]) == 2
        for key in ("load_imbalance", "dead_experts", "effective_experts", "pool_size_mean")
    )
    assert all(1 <= value <= 7 for value in (*line["effective_experts"], *line["load_imbalance"]))
    assert 2 <= min(line["pool_size_min"]) <= max(line["pool_size_max"]) <= 7
    assert line["loss"] == pytest.approx(
        line["cross_entropy"]
        + 1e-5 * line["z_loss"]
        + 0.1 * line["balance_loss"]
        + 1e-3 * line["router_z_loss"],
        rel=1e-6,
    )
    assert list((tmp_path / "tensorboard").iterdir())
    assert load_config(tmp_path / "config.yaml") == config_from_dict(settings)


def test_training_learns_the_words_of_the_domains(tiny_data, tmp_path):
    train(tiny_settings(tiny_data, tmp_path, steps=60))
    lines = metrics(tmp_path)
    assert lines[0]["cross_entropy"] == pytest.approx(math.log(320), abs=0.1)
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"] - 1


@pytest.mark.long
def test_compiled_blocks_train_as_eager_ones(tiny_data, tmp_path):
    train(tiny_settings(tiny_data, tmp_path / "eager"))
    train(tiny_settings(tiny_data, tmp_path / "compiled", compile=True))
    for (_, *eager), (_, *compiled) in zip(
        losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True
    ):
        assert eager == pytest.approx(compiled, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"steps": 0}}, "neither training.steps nor training.tokens is set"),
        ({"training": {"run_dir": ""}}, "training.run_dir is not set"),
        ({"data": {"path": "no/such/folder"}}, "no/such/folder"),
        ({"model": {"vocab_size": 64}}, "model.vocab_size=64 is smaller than the"),
        ({"training": {"resume": "nowhere"}}, "nowhere: no checkpoint here"),
        ({"anneal": {"checkpoint": "nowhere", "tokens": 1000}}, "nowhere: no checkpoint here"),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate is not a setting"),
        ({"training": {"device": "cuda"}}, "training.device=cuda needs a GPU"),
    ],
)
def test_mistakes_get_one_line(change, message, tiny_data, tmp_path, capsys):
    from emotrain.cli import main

    if "device" in change.get("training", {}) and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    settings = tiny_settings(tiny_data, tmp_path / "run")
    for section, values in change.items():
        settings.setdefault(section, {}).update(values)
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert not checkpoint.list_checkpoints(tmp_path / "run")


def test_resuming_with_other_data_seed_or_batch_is_refused(tiny_data, tmp_path):
    train(tiny_settings(tiny_data, tmp_path, steps=2))
    longer = tiny_settings(tiny_data, tmp_path, steps=4)
    longer["data"]["sequence_length"] = 16
    for settings, message in (
        (longer, "was trained on other data"),
        (tiny_settings(tiny_data, tmp_path, seed=1), "training.seed=0, here it is 1"),
        (
            tiny_settings(tiny_data, tmp_path, global_batch=8),
            "training.global_batch=4, here it is 8",
        ),
        (tiny_settings(tiny_data, tmp_path, resume="never"), "already holds checkpoints"),
    ):
        with pytest.raises(ValueError, match=message):
            train(settings)
