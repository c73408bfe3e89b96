"""The commands of docs/analysis.md run as they are written, on a small run in place of the
quickstart's."""

from __future__ import annotations

import re
import shlex

import pytest

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.training.run import train
from tests.conftest import ROOT, tiny_settings


def test_every_command_of_the_page_runs(tiny_data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    train(config_from_dict(tiny_settings(tiny_data, tmp_path / "runs/quickstart")))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(tiny_data)
    page = (ROOT / "docs/analysis.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    assert len(commands) >= 2
    for line in commands:
        name, *words = shlex.split(line)
        assert name == "emotrain" and main(words) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (tmp_path / "cluster7.json").is_file()
