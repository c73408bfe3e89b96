"""The commands of docs/report.md run as they are written, on a small run in place of the
quickstart's; what it says of thresholds and files is what the code does."""

from __future__ import annotations

import json
import re
import shlex
import sys

import yaml

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.evaluation.figures import MOST_LINES
from emotrain.report import charts, findings, loads, panels
from emotrain.training.expert_loads import MOST_RECORDS
from emotrain.training.run import train
from tests.conftest import ROOT, tiny_settings
from tests.test_run_records import FakeTracker

PAGE = (ROOT / "docs/report.md").read_text(encoding="utf-8")


def test_every_command_of_the_page_runs(tiny_data, tmp_path, monkeypatch, capsys):
    # tests/test_report.py looks at plots; drawing these would take most of the time.
    for module in ("charts", "loads"):
        monkeypatch.setattr(f"emotrain.report.{module}.svg", lambda *_: "<svg></svg>")
    monkeypatch.chdir(tmp_path)
    settings = tiny_settings(tiny_data, "runs/quickstart", steps=2)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.yaml").write_text(yaml.safe_dump(settings))
    train(config_from_dict(settings))
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    blocks = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    assert len(commands) == 5
    for line in commands:
        name, *words = shlex.split(line)
        assert name == "emotrain" and main(words) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (tmp_path / "runs/quickstart/report.html").is_file() and tracker.calls
    assert all((tmp_path / f"{page}.html").is_file() for page in ("quickstart", "comparison"))


def test_the_page_names_the_thresholds(tmp_path):
    for words in (
        f"more than {charts.MOST_POINTS} points is cut into {charts.MOST_POINTS // 4} equal pieces",
        f"{charts.OUTLIER:g} times the 95th percentile",
        f"{findings.SPIKE_NATS:g} nats/token above the median of the {findings.SPIKE_WINDOW} lines",
        f"under {100 * findings.SLOWER:g} % of the median of the whole run",
        f"above {findings.GROWTH:g} times what it was after half of the run",
        f"under {100 * loads.LITTLE:g} % of its layer's mean load",
        f"under {findings.AT_HOME:g} times `model.experts.top_k`",
        f"more than {findings.COSTLY_NATS:g} nats/token with the fewest experts",
        f"At most {MOST_LINES} runs",
        f"At most {MOST_RECORDS} steps are kept",
    ):
        assert words in " ".join(PAGE.split()), words
    assert findings.IMBALANCE == 2 and "more than twice its layer's mean load" in PAGE
    assert findings.CLIPPED == 0.5 and "more than half of those in the second half" in PAGE


def test_the_page_names_every_metric(tiny_data, tmp_path):
    train(config_from_dict(tiny_settings(tiny_data, tmp_path, steps=1, peak_tflops=1.0)))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    names = set(re.findall("`([a-z_]+)`", PAGE)) | {"pool_size_min", "pool_size_max"}
    assert set(line) - {"step", "tokens"} <= names
    charted = {chart.name for chart in (*panels.TRAINING, *panels.EXPERTS, *panels.SPEED)}
    assert set(line) - {"step", "tokens"} <= charted | set(panels.POOL_KEYS)
