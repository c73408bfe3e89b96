"""The commands of docs/modules.md run as they are written, on a small run in place of the
quickstart's."""

from __future__ import annotations

import re
import shlex

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.training import run as run_module
from tests.conftest import ROOT, tiny_settings


def test_every_command_of_the_page_runs(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = tiny_settings(tiny_data, tmp_path / "runs/quickstart")
    run_module.train(config_from_dict(settings), Ranks())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(tiny_data)
    page = (ROOT / "docs/modules.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    assert len(commands) >= 4
    for line in commands:
        name, *words = shlex.split(line)
        # The small data set has other subjects.
        for subject, other in (("rust", "kitchen"), ("python", "harbour")):
            words = [re.sub(rf"(^|[=:]){subject}$", rf"\1{other}", word) for word in words]
        # A small run learns what it needs to in fewer steps.
        words = ["4" if word == "100" else word for word in words]
        assert name == "emotrain" and main(words) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (tmp_path / "runs/rust-evaluation/evaluation.json").is_file()
