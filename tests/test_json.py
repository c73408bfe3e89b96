"""Proves that JSON is JSON: no reader of ours or of another language meets a bare NaN."""

from __future__ import annotations

import ast
import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from emotrain.cli import main
from emotrain.commands.common import finish
from emotrain.config import config_from_dict, save_config
from emotrain.files import json_text
from tests.conftest import ROOT, tiny_settings


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"a": [math.nan, 1.5, (math.inf, {"b": -math.inf})], "c": "NaN", "d": None, "e": True}
    assert strict(json_text(value)) == {
        "a": [None, 1.5, [None, {"b": None}]],
        "c": "NaN",
        "d": None,
        "e": True,
    }


def test_commands_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    finish(Namespace(json=True), {"loss": math.nan, "name": "ü"}, "")
    assert strict(capsys.readouterr().out) == {"loss": None, "name": "ü"}


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_diverged_is_still_json_and_has_a_report(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(tiny_data, tmp_path / "run", max_skipped_steps=100)
    settings["optimizer"] |= {"lr": 1e30, "clip_norm": 0}
    save_config(config_from_dict(settings), tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml"), "--json"]) == 0
    summary = strict(capsys.readouterr().out.splitlines()[-1])
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [strict(line) for line in lines]
    assert records[-1]["loss"] is None and summary["metrics"]["loss"] is None
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "emotrain").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).name
)
def test_every_writer_of_json_refuses_nan_or_makes_it_null(path: Path) -> None:
    """Either `json_text`, or `allow_nan=False` where nothing but whole numbers and text is
    written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
            names = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert names.get("allow_nan") == "False", (
                f"{path}:{node.lineno}: use emotrain.files.json_text"
            )
