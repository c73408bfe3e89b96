"""The README is true: its commands run, its links lead somewhere, make knows its targets, and
the quickstart works end to end."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emotrain.commands import COMMANDS as SUBCOMMANDS
from tests.conftest import ROOT, run_command, write_documents
from tests.processes import run_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.strip().splitlines() for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block]

# What makes a command of minutes one of seconds; everything else runs as it is written.
SMALLER = {
    "prepare": ["--workers", "1"],
    "emotrain train": [
        "training.steps=3",
        "training.global_batch=2",
        "training.micro_batch=2",
        "data.sequence_length=64",
        "model.d_model=16",
        "model.num_layers=1",
        "model.experts.hidden=8",
        "training.tensorboard=false",
    ],
    "emotrain plan": ["model.num_layers=2"],
    "evaluate": ["--documents", "2", "--calibration-documents", "1", "--document-tokens", "64"],
}


def run_as_written(line: str, folder: Path) -> subprocess.CompletedProcess:
    words = shlex.split(line)
    extra = next((more for name, more in SMALLER.items() if name in " ".join(words[:2])), [])
    script, *words = words[1:] if words[0] == "python" else words
    return run_script(
        Path(script) if script.endswith(".py") else script,
        *words,
        *extra,
        first=lambda: os.chdir(folder),
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone, with somebody's own documents in it."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-documents").mkdir()
    write_documents(tmp_path / "my-documents" / "all.jsonl", documents_per_domain=30)
    return tmp_path


def test_the_commands_run_as_they_are_written(clone):
    commands = [line for line in COMMANDS if line.split()[0] in ("emotrain", "python")]
    assert len(commands) >= 3, "the README lost its commands, or this test its way of finding them"
    for line in commands:
        done = run_as_written(line, clone)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (clone / "runs/mine/evaluation/evaluation.json").is_file()


@pytest.fixture
def prepared(clone: Path, tiny_data: Path) -> Path:
    """The clone once documents are prepared; a smaller data set stands for the sample."""
    (clone / "data").mkdir()
    (clone / "data/sample").symlink_to(tiny_data)
    return clone


def test_inline_commands_are_known(prepared):
    for line in dict.fromkeys(re.findall(r"`(emotrain [^`]+)`", README)):
        if "..." not in line:
            is_name = line.count(" ") == 1 or line == "emotrain data show"
            done = run_as_written(f"{line} --help" if is_name else line, prepared)
            assert done.returncode == 0, f"{line}\n{done.stderr}"


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_targets_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    make = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    |\n)make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", make, re.MULTILINE), target


def test_the_index_names_every_page():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    targets = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)]+)\)", index)}
    assert targets | {ROOT / "docs/index.md"} == set(PAGES)


def test_every_command_has_its_line_in_the_overview():
    overview = run_command("-m", "emotrain.cli", "--help").stdout
    for name, summary in SUBCOMMANDS.items():
        line = " ".join(overview.split())
        assert f"{name} {summary}" in line


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_teaches(name):
    done = run_command("-m", "emotrain.cli", name, "--help", env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0
    text = done.stdout
    assert "--json" in text, f"{name} reports without --json"
    epilog = text[text.index("example") :]
    assert f"  emotrain {name}" in epilog, f"{name} --help shows no example"
    assert max(map(len, text.splitlines())) <= 100, f"{name} --help is wider than 100 columns"


def examples():
    """The examples of the helps that end in seconds and need nothing that is not here, as arrays of
    tokens."""
    for name in ("inspect", "settings"):
        module = importlib.import_module(f"emotrain.commands.{name}")
        for line in module.EPILOG.splitlines():
            if line.startswith(f"  emotrain {name}") and "tokens/" not in line:
                yield line.strip().split("   ")[0]


@pytest.mark.parametrize("line", list(examples()))
def test_examples_of_the_helps_work(line, prepared):
    done = run_as_written(line, prepared)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    # But for documents, which are shown as they are.
    lines = [text for text in done.stdout.splitlines() if not text.startswith("  |")]
    assert max(map(len, lines)) <= 100, "a terminal has 100 columns"


@pytest.mark.parametrize("name", ["train", "inspect", "plan"])
def test_a_configuration_is_needed_and_settings_are_not(name):
    done = run_command("-m", "emotrain.cli", name)
    assert done.returncode == 2
    needed = "CONFIG|DATA" if name == "inspect" else "CONFIG"
    assert done.stderr.splitlines()[-1].endswith(f"the following arguments are required: {needed}")
    assert f"{needed} [key=value ...]" in done.stderr


def test_the_script_for_launchers_is_the_command():
    done = run_command("launch/pretrain.py", "--help")
    assert done.returncode == 0 and "examples:" in done.stdout
    assert done.stdout == run_command("-m", "emotrain.cli", "train", "--help").stdout


def test_make_quickstart_end_to_end(tmp_path):
    """The Makefile's own recipe, with the environment at hand instead of a new one, and three
    steps of training."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("configs", "launch", "Makefile", "pyproject.toml", "emotrain", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "emotrain").write_text(
        f'#!/bin/sh\n[ "$1" = train ] && set -- "$@" ${{SMALLER}}\n'
        f'exec "{sys.executable}" -m emotrain.cli "$@"\n'
    )
    (environment / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for script in (environment / "bin").iterdir():
        script.chmod(0o755)
    (environment / ".installed").touch()
    done = subprocess.run(
        ["make", "quickstart", f"EVALUATE={' '.join(SMALLER['evaluate'])}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "SMALLER": " ".join(SMALLER["emotrain train"])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: open runs/quickstart/report.html" in done.stdout
    page = (tmp_path / "runs/quickstart/report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    evaluation = json.loads((tmp_path / "runs/quickstart/evaluation/evaluation.json").read_text())
    assert set(evaluation["mean"]["increase_nats"]) == {"1.0", "0.5", "0.25", "0.125"}
    assert len(evaluation["domains"]) >= 8
