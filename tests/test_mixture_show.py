"""Proves of `emotrain data show` that its counts are those that a run reads, that what would be
refused or repeats often is said, and that the picture has its numbers beside it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import write
from test_data_formats import make_dataset

from emotrain.cli import main
from emotrain.config import config_from_dict, save_config
from emotrain.data.mixture_file import open_mixture
from emotrain.inspection import run_costs
from emotrain.report.mixture import curves, run_of, table
from tests.conftest import tiny_settings

SEQUENCE = 8
STAGED = """\
sources: {web: {path: web}, code: {path: code}}
stages: [{until_tokens: 1600, weights: {web: 1}}, {weights: {web: 1, code: 1}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("show")
    make_dataset(path / "web", shards=(60, 80), seed=1)
    make_dataset(path / "code", shards=(30,), seed=2)
    write(path / "staged.yaml", STAGED)
    write(
        path / "mix.yaml", "sources: {web: {path: web, epochs: 2}, code: {path: code, epochs: 5}}"
    )
    return path


def show(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["data", "show", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts_are_those_that_a_run_reads(folder: Path, capsys) -> None:
    tokens = 3000 * SEQUENCE
    found = show(capsys, folder / "staged.yaml", "--tokens", tokens, "--sequence-length", SEQUENCE)
    mixture = open_mixture(folder / "staged.yaml", SEQUENCE, 0)
    read = np.bincount(mixture.order.locate(range(3000))[0]).tolist()
    web, code = found["sources"]
    assert [web["run_tokens"], code["run_tokens"]] == [count * SEQUENCE for count in read]
    assert code["share"] == read[1] / 3000 and code["epochs"] > web["epochs"] > 4
    size = mixture.sources[1].loader.num_sequences
    assert code["epochs"] == read[1] / size
    assert code["repeated_tokens"] == (read[1] - size) * SEQUENCE
    assert (found["tokens"], found["stages"]) == (tokens, [0, 1600])
    assert [w.split(":")[0] for w in found["warnings"]] == ["web", "code"]
    again = table(run_of(mixture, tokens)).plain()
    assert "in 2 stages" in again and f"{web['run_tokens']:,}" in again


def test_how_long_the_run_is(folder: Path, tmp_path: Path, capsys) -> None:
    """As the file says, or one pass over all, or a configuration."""
    own = show(capsys, folder / "mix.yaml", "--sequence-length", SEQUENCE)
    assert [source["epochs"] for source in own["sources"]] == pytest.approx([2, 5], abs=0.1)
    once = show(capsys, folder / "staged.yaml", "--sequence-length", SEQUENCE)
    loaders = [source.loader for source in open_mixture(folder / "mix.yaml", SEQUENCE, 0).sources]
    assert once["tokens"] == sum(loader.num_sequences for loader in loaders) * SEQUENCE
    config = config_from_dict(tiny_settings(folder / "mix.yaml", tmp_path, seed=3))
    save_config(config, tmp_path / "run.yaml")
    by_run = show(capsys, folder / "staged.yaml", "--config", tmp_path / "run.yaml")
    assert (by_run["tokens"], by_run["sequence_length"]) == (6 * 4 * 32, 32)
    note = run_costs(config)["data"]["note"]
    assert "on average; `emotrain data show" in note and "training tokens" in note


def test_the_picture_has_its_numbers_beside_it(folder: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    words = ("--tokens", 8000, "--sequence-length", SEQUENCE, "--out", tmp_path / "mix.png")
    assert show(capsys, folder / "staged.yaml", *words)["plot"] == str(tmp_path / "mix.png")
    assert (tmp_path / "mix.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "mix.csv").open()))
    assert rows[-1]["tokens"] == "8000" and rows[-1]["source"] == "code"
    weights = [float(row["weight"]) for row in rows if row["source"] == "code"]
    assert sorted(set(weights)) == [0, 0.5] == [weights[0], weights[-1]]
    begins = next(row for row in rows if row["source"] == "code" and float(row["weight"]))
    assert begins["tokens"] == "1600" and begins["tokens_read"] == "0"
    for point in {row["tokens"] for row in rows}:
        total = sum(int(row["tokens_read"]) for row in rows if row["tokens"] == point)
        assert total == int(point)
    mixture = open_mixture(folder / "staged.yaml", SEQUENCE, 0)
    assert len(curves(mixture, SEQUENCE)) == 2 * 2, "of a run of one sequence"


def test_what_a_run_would_be_refused_for_is_said(folder: Path, capsys) -> None:
    text = "sources: {web: {path: web, weight: 1, max_epochs: 2}, code: {path: code, weight: 1}}"
    path = write(folder / "limited.yaml", text)
    warnings = show(capsys, path, "--tokens", "8e3", "--sequence-length", SEQUENCE)["warnings"]
    assert "max_epochs is 2: such a run is refused" in warnings[0]
    assert "repeated tokens teach less" in warnings[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["web"], "is no mixture, which is a .yaml file; `emotrain inspect DATA`"),
        (["mix.yaml", "--tokens", "many"], "--tokens many: is no positive number"),
        (["mix.yaml", "--tokens", "0"], "--tokens 0: is no positive number"),
        (["mix.yaml", "--out", "mix.csv"], "is the name of the numbers"),
        (["nothing.yaml"], "nothing.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, words: list[str], said: str, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["data", "show", *words, "--sequence-length", "8"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
