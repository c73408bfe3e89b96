"""Proves that the commands which a run's report names run as they stand there: on its own run, data
and domain, whatever their names are."""

from __future__ import annotations

import argparse
import html
import json
import re
import shlex
from pathlib import Path

import pytest

from emotrain.cli import main
from emotrain.config import config_from_dict, save_config
from emotrain.evaluation.results import read_evaluation
from emotrain.report.page import write_report
from emotrain.report.subsets import subset_commands
from emotrain.training.run import train
from tests.conftest import tiny_settings
from tests.test_labels import result_of


def commands_of(page: str) -> list[list[str]]:
    block = re.search(r"<h3[^>]*>Use a subset</h3>.*?<pre>(.*?)</pre>", page, re.DOTALL)
    return [shlex.split(line) for line in html.unescape(block[1]).splitlines()] if block else []


def test_the_commands_of_a_report_run(tiny_data, tmp_path, capsys, monkeypatch):
    # A server runs until it is stopped; its words are read, and its subset is there.
    served = []
    monkeypatch.setattr("emotrain.commands.serve.run", lambda args: served.append(args) or 0)
    run_dir = tmp_path / "my runs" / "a & b"
    train(config_from_dict(tiny_settings(tiny_data, run_dir)))
    before = commands_of(write_report([run_dir]).path.read_text(encoding="utf-8"))
    assert str(tiny_data) in before[0] and not any("--domain" in words for words in before)
    words = ["evaluate", str(run_dir), "--data", str(tiny_data), "--keep", "0.25", "0.5"]
    assert main([*words, "--random-seeds", "0", "--documents", "2"]) == 0
    result = read_evaluation(run_dir / "evaluation/evaluation.json")
    least = min(
        result.domains, key=lambda name: result.domains[name].increase("0.25", "selected")[0]
    )
    commands = commands_of(write_report([run_dir]).path.read_text(encoding="utf-8"))
    assert [words[1] for words in commands] == [
        "select", "extract", "evaluate", "finetune", "generate", "reinsert", "serve",
    ]  # fmt: skip
    for name, *words in commands:
        capsys.readouterr()
        few = {"finetune": ["--steps", "1"], "evaluate": ["--documents", "2"]}
        more = few.get(words[0], [])
        assert name == "emotrain" and main([*words, *more]) == 0, capsys.readouterr().err
        if words[0] in ("select", "finetune"):
            assert words[words.index("--domain") + 1] == least
    out = f"{run_dir}-{least}"
    assert served[0].subset == [f"{least}={out}.json"] and served[0].checkpoint == str(run_dir)
    assert Path(f"{out}.json").is_file() and Path(f"{out}-back").is_dir()


@pytest.mark.parametrize("domain", ["notes $\\LaTeX$", "../up", "<b>bold</b>", "中文 🐍", "-x"])
def test_a_domain_of_any_name_is_one_word_and_no_path(domain, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints/step-00000001").mkdir(parents=True)
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(result_of([domain])))
    config = config_from_dict(tiny_settings(tmp_path / "data", run_dir))
    commands = [
        shlex.split(line) for line in subset_commands(run_dir, config, read_evaluation(file))
    ]
    select = commands[0]
    parser = argparse.ArgumentParser()
    parser.add_argument("--domain")
    assert parser.parse_known_args(select)[0].domain == domain
    assert Path(select[select.index("--out") + 1]).parent == tmp_path


def test_a_run_without_subsets_or_checkpoints_names_no_commands(tmp_path):
    settings = tiny_settings(tmp_path / "data", tmp_path / "run")
    (tmp_path / "run").mkdir()
    save_config(config_from_dict(settings), tmp_path / "run/config.yaml")
    assert not commands_of(write_report([tmp_path / "run"]).path.read_text(encoding="utf-8"))
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    assert commands_of(write_report([tmp_path / "run"]).path.read_text(encoding="utf-8"))
    for change in ({"routed": 0, "top_k": 0}, {"sharing": "all"}):
        experts = {**settings["model"]["experts"], **change}
        pool = {"kind": "none"} if "routed" in change else {"min": 2, "max": 7}
        model = {**settings["model"], "experts": experts, "router": {"pool": pool}}
        config = config_from_dict({**settings, "model": model})
        assert not subset_commands(tmp_path / "run", config, None)
