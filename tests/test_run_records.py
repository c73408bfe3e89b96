"""What a run writes beside its metrics: the load of every expert, its environment, and what it
hands to TensorBoard and trackers. None of them may change or stop the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.config import config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.report.findings import Finding, findings
from emotrain.report.history import read_history, read_loads, thin
from emotrain.report.runs import read_runs
from emotrain.tables import short_names
from emotrain.training import environment, expert_loads
from emotrain.training.expert_loads import MOST_RECORDS, ExpertLoads
from emotrain.training.run import train
from emotrain.training.sinks import numbers_of
from tests.conftest import tiny_settings
from tests.test_report import bare_run


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- the load of every expert


def written(folder: Path, steps: int, log_every: int, restarts: tuple[tuple[int, int], ...] = ()):
    """Steps in the file of a run of this many steps that stops at some of them and goes back."""
    folder.mkdir()
    start = 0
    for stop, back_to in (*restarts, (steps, 0)):
        loads = ExpertLoads(folder, start, log_every)
        for step in range(start + 1, stop + 1):
            if step % log_every == 0 or step == stop:
                loads.write(step, [[step, 1]])
        loads.close()
        start = back_to
    return [record["step"] for record in lines_of(folder / expert_loads.FILE)]


def test_a_long_run_keeps_few_records_all_the_way(tmp_path):
    kept = written(tmp_path / "run", 5 * MOST_RECORDS + 7, 1)
    # The oracle: every step, halved until few enough are left.
    expected, every = list(range(1, 5 * MOST_RECORDS + 8)), 1
    while len(expected) > MOST_RECORDS:
        every *= 2
        expected = [step for step in expected if step % every == 0]
    assert kept == expected


def test_a_run_that_goes_on_keeps_the_same_records(tmp_path):
    steps = 2 * MOST_RECORDS + 100
    whole = written(tmp_path / "whole", steps, 1)
    restarts = ((MOST_RECORDS - 3, MOST_RECORDS - 10), (MOST_RECORDS + 9, MOST_RECORDS + 9))
    assert written(tmp_path / "stopped", steps, 1, restarts) == whole
    # One that goes far back has lost what was too fine for where it was.
    assert written(tmp_path / "back", 40, 1, ((MOST_RECORDS + 2, 20),)) == [
        *range(2, 21, 2), *range(21, 41),
    ]  # fmt: skip


def test_every_slot_of_a_step_is_counted_once(tiny_data, tmp_path):
    train(config_from_dict(tiny_settings(tiny_data, tmp_path, steps=4, log_every=2)))
    records = lines_of(tmp_path / expert_loads.FILE)
    metrics = lines_of(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4]
    for record, line in zip(records, metrics, strict=True):
        for layer, slots in enumerate(record["slots"]):
            # 4 sequences of 32 tokens, 2 experts each; pools hold at least two experts.
            assert len(slots) == 7 and sum(slots) == 4 * 32 * 2
            imbalance = max(slots) / np.mean(slots)
            assert line["load_imbalance"][layer] == pytest.approx(imbalance)
            assert line["dead_experts"][layer] == slots.count(0)
    assert "expert_slots" not in metrics[0]


def test_a_damaged_file_of_loads_is_read_as_far_as_it_can_be(tmp_path):
    file = tmp_path / expert_loads.FILE
    file.write_text(
        '{"step":1,"slots":[[1,2],[3,4]]}\n{"step":2,"slots":[[1,2]]}\nx\n{"step":3}\n'
        '{"step":4,"slots":[[1,-2],[3,4]]}\n{"step":4,"slots":[["a"],[]]}\n{"step":5,"slots":3}\n'
        '{"step":6,"slots":[[2,2],[3,NaN]]}\n{"step":7,"slots":[[0,0],[3,5]]}\n{"step":8,"slo'
    )
    loads = read_loads(file)
    assert loads is not None and loads.steps.tolist() == [1, 7]
    assert loads.relative(1)[1].tolist() == [0.75, 1.25] and not loads.relative(0)[1].any()
    ExpertLoads(tmp_path, 5, 1).close()
    assert all(record["step"] <= 5 for record in lines_of(file))


# ---- the environment


def test_each_start_is_noted_once(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/emotrain", "train", "ünï", "\ud800"])
    train(config_from_dict(tiny_settings(tiny_data, tmp_path, steps=2)))
    train(config_from_dict(tiny_settings(tiny_data, tmp_path, steps=3)))
    starts = environment.read_starts(tmp_path)
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[0]["command"][:3] == ["emotrain", "train", "ünï"]
    assert starts[0]["processes"] == 1 and starts[0]["device"] == {"type": "cpu"}
    assert starts[0]["data"] == starts[1]["data"] and len(starts[0]["data"]["sha256"]) == 64


def test_many_starts_stay_few(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "MOST_STARTS", 4)
    monkeypatch.setattr(environment, "environment", lambda ranks: {})
    config = config_from_dict(tiny_settings(tmp_path, tmp_path))
    loader = SimpleNamespace(fingerprint="f", num_sequences=1, num_tokens=2)
    for step in range(9):
        environment.note_start(config, step, Ranks(), loader)
    assert [start["step"] for start in environment.read_starts(tmp_path)] == [0, 6, 7, 8]


def test_only_a_repository_that_holds_the_code_is_its_commit(tmp_path):
    def git(*words: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True,
                       capture_output=True)  # fmt: skip

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert environment.git_of(package) is None or not (tmp_path / ".git").exists()
    git("init", "-q")
    # As of a package in an environment inside of somebody's repository.
    assert environment.git_of(package) is None
    git("add", "."), git("commit", "-q", "-m", "first")
    found = environment.git_of(package)
    assert found is not None and len(found["commit"]) == 40 and not found["dirty"]
    (package / "__init__.py").write_text("changed")
    assert environment.git_of(package) == {**found, "dirty": True}


# ---- sinks


class FakeTracker:
    """A module with wandb's interface that keeps what it gets."""

    def __init__(self, fails: str = ""):
        self.calls: list[tuple[str, Any, Any]] = []
        self.fails = fails

    def init(self, **options):
        self._note("init", None, options)

    def log(self, values, step):
        self._note("log", values, step)

    def finish(self):
        self._note("finish", None, None)

    def _note(self, *call):
        self.calls.append(call)
        if call[0] != "log":
            print("words of the tracker's own")
        if self.fails == call[0]:
            raise RuntimeError("no\nnetwork")


@pytest.mark.parametrize("module", ["trackio", "wandb"])
def test_a_tracker_gets_the_names_of_the_metrics(module, tiny_data, tmp_path, monkeypatch, capsys):
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, module, tracker)
    folder = tmp_path / "project" / "first"
    train(config_from_dict(tiny_settings(tiny_data, folder, steps=2, tracker=module)))
    (name, _, options), *logs, (last, _, _) = tracker.calls
    assert (name, last) == ("init", "finish")
    assert "words of the tracker" not in capsys.readouterr().out
    assert (options["project"], options["name"]) == ("project", "first")
    assert options["config"]["training"]["steps"] == 2
    lines = lines_of(folder / "metrics.jsonl")
    assert [step for _, _, step in logs] == [1, 2]
    for (_, values, _), line in zip(logs, lines, strict=True):
        assert values["cross_entropy"] == line["cross_entropy"]
        assert values["load_imbalance/layer_01"] == line["load_imbalance"][1]
        assert set(values) == set(numbers_of(line)) and "step" not in values


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_stops_nothing(
    fails, tiny_data, tmp_path, monkeypatch, caplog
):
    tracker = FakeTracker(fails)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    plain = tmp_path / "plain"
    train(config_from_dict(tiny_settings(tiny_data, plain, steps=3)))
    folder = tmp_path / "run"
    assert train(config_from_dict(tiny_settings(tiny_data, folder, steps=3, tracker="trackio")))
    said = [line for line in caplog.messages if "trackio" in line]
    assert said == ["trackio gets no metrics from here on, metrics.jsonl does (no network)"]
    assert [name for name, *_ in tracker.calls].count(fails) == 1
    for key in ("cross_entropy", "grad_norm"):
        of_both = [[line[key] for line in lines_of(f / "metrics.jsonl")] for f in (plain, folder)]
        assert of_both[0] == of_both[1] and len(of_both[0]) == 3


def test_a_tracker_that_is_missing_is_one_line(tiny_data, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "trackio", None)
    train(config_from_dict(tiny_settings(tiny_data, tmp_path, steps=1, tracker="trackio")))
    [said] = [line for line in caplog.messages if "trackio" in line]
    assert "trackio is not installed; pip install trackio" in said and "\n" not in said


def test_tensorboard_gets_the_same_names(tiny_data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(config_from_dict(tiny_settings(tiny_data, tmp_path, steps=2, tensorboard=True)))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    line = lines_of(tmp_path / "metrics.jsonl")[-1]
    assert set(events.Tags()["scalars"]) == set(numbers_of(line))
    [*_, last] = events.Scalars("load_imbalance/layer_01")
    assert last.step == 2 and last.value == pytest.approx(line["load_imbalance"][1], rel=1e-6)


# ---- metrics as arrays

NUMBERS = st.one_of(st.floats(width=32), st.integers(-5, 5), st.none(), st.booleans(), st.text())
RECORDS = st.lists(
    st.builds(
        lambda step, values: {**step, **values},
        st.one_of(
            st.fixed_dictionaries({"step": st.integers(0, 3)}),
            st.fixed_dictionaries({}, optional={"step": NUMBERS}),
        ),
        st.dictionaries(
            st.sampled_from(["a", "b"]),
            st.one_of(st.floats(width=32), NUMBERS, st.lists(NUMBERS, max_size=2)),
        ),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(records=RECORDS)
def test_the_last_number_of_a_step_wins_whatever_the_lines_hold(records, tmp_path_factory):
    file = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    history = read_history(file)
    good = [r for r in records if type(r.get("step")) is int and r["step"] >= 0]
    assert history.dropped_lines == len(records) - len(good)
    assert history.repeated_steps == len(good) - len({r["step"] for r in good})
    for key in ("a", "b"):
        plain = [r for r in good if key in r]
        if all(r[key] is None or type(r[key]) in (int, float) for r in plain):
            expected = {r["step"]: np.nan if r[key] is None else float(r[key]) for r in plain}
            if not expected:
                assert key not in history
                continue
            series = history.series[key]
            assert series.steps.tolist() == sorted(expected)
            np.testing.assert_array_equal(
                series.values[:, 0], [expected[step] for step in sorted(expected)]
            )


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=400), most=st.sampled_from([4, 20])
)
def test_a_thinned_curve_keeps_what_can_be_seen(values, most):
    x, y = np.cumsum(np.arange(len(values)) % 7 + 1), np.array(values)[:, None]
    kept = thin(x, y, most)
    assert (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == len(values) - 1
    assert len(kept) <= max(most, 5 * (most // 4))
    finite, left = y[np.isfinite(y)], y[kept][np.isfinite(y[kept])]
    if finite.size:
        assert left.min() == finite.min() and left.max() == finite.max()
    assert np.isfinite(y[kept]).all() == np.isfinite(y).all()


def test_runs_are_called_by_what_tells_them_apart():
    paths = [Path(p) for p in ("/a/x/run", "/a/y/run", "/a/y/other")]
    assert short_names(paths) == ["x/run", "y/run", "other"]


# ---- findings


def history_of(steps: int = 100, **series) -> list[dict]:
    calm = {
        "cross_entropy": lambda p: 5 - 2 * p,
        "tokens_per_second": lambda p: 1000.0,
        "memory_gib": lambda p: 2.0,
        "grad_norm": lambda p: 0.5,
        "skipped_steps": lambda p: 0,
        "load_imbalance": lambda p: [1.2, 1.3],
        "effective_experts": lambda p: [6.0, 6.0],
    }
    return [
        {"step": i + 1, **{k: f(i / steps) for k, f in (calm | series).items()}}
        for i in range(steps)
    ]


def looked_at(folder: Path, lines: list[dict], slots=((100,) * 8, (100,) * 8)) -> list[Finding]:
    bare_run(folder, *lines)
    records = [{"step": line["step"], "slots": slots} for line in lines]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / expert_loads.FILE).write_text(text)
    return [finding for finding in findings(read_runs([folder])) if finding.kind == "look"]


def test_a_calm_run_has_nothing_to_look_at(tmp_path):
    assert looked_at(tmp_path / "run", history_of()) == []


@pytest.mark.parametrize(
    ("series", "slots", "plot", "words"),
    [
        ({"cross_entropy": lambda p: 9.0 if p == 0.5 else 3.0}, None, "cross_entropy",
         "jumped once; the largest jump, by 6.00 nats/token, is at step 51"),
        ({"cross_entropy": lambda p: None if p == 0.5 else 3.0}, None, "cross_entropy",
         "not finite in 1 of 100 lines"),
        ({"tokens_per_second": lambda p: 400.0 if p >= 0.9 else 1000.0}, None, "tokens_per_second",
         "Throughput fell: 400 tokens/s in the last tenth, 1,000"),
        ({"memory_gib": lambda p: 2 + 2 * p}, None, "memory_gib", "from 3.00 GiB at step 51"),
        ({"grad_norm": lambda p: 3.0}, None, "grad_norm", "100% of the updates"),
        ({"skipped_steps": lambda p: 4}, None, "skipped_steps", "was not finite: 4."),
        ({"load_imbalance": lambda p: [1.2, 4.0]}, None, "load_imbalance",
         "fullest expert of layer 2 has 4.00 times"),
        ({"effective_experts": lambda p: [6.0, 3.1]}, None, "effective_experts",
         "in layer 2 one uses 3.1 of them, and a token alone chooses 3"),
        ({}, ((100,) * 8, (0, 1, *(100,) * 6)), "little-used",
         "2 of 16 experts get little in the last tenth (1 of them nothing), most of them in layer "
         "2: 2 of 8"),
    ],
)  # fmt: skip
def test_what_stands_out_is_said_with_its_number_and_plot(series, slots, plot, words, tmp_path):
    lines = history_of(**series)
    [finding] = looked_at(tmp_path / "run", lines, *([slots] if slots else []))
    assert words in finding.text and finding.plot == plot and finding.rule
