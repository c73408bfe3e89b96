"""Proves what ablations are made of: losses with the experts that a document's beginning chose, as
by loops; and the benchmark, which trains and measures rows alike, goes on, and averages nothing
that is not whole."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import pools_of, tiny_config, tiny_model
from omegaconf import OmegaConf

from emotrain.batch import PackedBatch
from emotrain.cli import main as emotrain
from emotrain.errors import UserError
from emotrain.evaluation.prompted import prompted_losses
from emotrain.modular.counts import experts_kept
from emotrain.modular.select import greedy_select
from tests.conftest import ROOT, tiny_settings
from tests.test_evaluation import ROW, documents_of

# ---- losses of second halves


def second_half_loss(model, document, kept) -> tuple[float, int]:
    """Cross entropy of the tokens of the second half of a document, token by token."""
    tokens = torch.from_numpy(document[:ROW])
    with torch.no_grad():
        batch = PackedBatch.from_rows(tokens[None])
        logits_TV = model.logits(model(batch, pools_of(None, kept)))
    half = len(tokens) // 2
    losses = [
        float(torch.logsumexp(logits_TV[place - 1], 0) - logits_TV[place - 1, tokens[place]])
        for place in range(half, len(tokens))
    ]
    return sum(losses), len(losses)


def test_a_documents_first_half_chooses_and_its_second_is_measured() -> None:
    config, model = tiny_config(data__sequence_length=ROW), tiny_model()
    documents = [ids for ids in documents_of(9, seed=5) if len(ids) >= 4]
    domains = {"code": documents[:3], "law": documents[3:]}
    found = prompted_losses(model, config, domains, (0.5, 0.25), rows_per_batch=3)
    wanted: dict[str, list[float]] = {"full": [], "0.5": [], "0.25": []}
    for of_domain in domains.values():
        sums = {name: np.zeros(2) for name in wanted}
        for ids in of_domain:
            cut = ids[:ROW]
            prompt = PackedBatch.from_rows(torch.from_numpy(cut[: len(cut) // 2])[None])
            for name in wanted:
                kept = None
                if name != "full":
                    counts = experts_kept(model.config, float(name))
                    chosen = greedy_select(model, [prompt], torch.zeros(1).long(), 1, counts)
                    kept = [mask_JN[0] for mask_JN in chosen]
                sums[name] += second_half_loss(model, ids, kept)
        for name, (loss, targets) in sums.items():
            wanted[name].append(loss / targets)
    assert found.loss_nats == pytest.approx(np.mean(wanted["full"]), rel=1e-5)
    for share, increase in found.increase_nats.items():
        assert increase == pytest.approx(
            np.mean(wanted[share]) - np.mean(wanted["full"]), rel=1e-3, abs=1e-6
        )
        assert found.standard_error_nats[share] > 0
    assert abs(found.increase_nats["0.25"]) > 1e-3, "the subset must matter"


def test_a_document_without_halves_is_refused() -> None:
    with pytest.raises(UserError, match="a document of 3 tokens has no halves"):
        prompted_losses(
            tiny_model(), tiny_config(), {"code": [np.array([5, 6, 0])]}, (0.5,), rows_per_batch=1
        )


# ---- the benchmark


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablations", ROOT / "benchmarks/ablations.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["ablations"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "plan, message",
    [
        ("rows: [", "not readable as a plan"),
        ("- 1", "the plan is no mapping"),
        ("base: x\nrows: {a: {}}", "the plan lacks 'standard'"),
        ("base: x\nstandard: b\nrows: {a: {}}", "rows lacks 'b'"),
        ("base: x\nstandard: a\nrows: {a: {}}\nseed: 1", "the plan has 'seed', which is not known"),
        ("base: x\nstandard: a\nrows: {a: {setings: []}}", "row 'a' has 'setings'"),
        ("base: x\nstandard: a\nrows: {a: {from: b}, b: {}}", "is from 'b', which is no row above"),
        ("base: x\nstandard: a\nrows: {a: {settings: lr=1}}", "row 'a' needs a list of key=value"),
        ("base: x\nstandard: a\nrows: {a: {seeds: [x]}}", "row 'a' needs seeds"),
        ("base: x\nstandard: a\nrows: {a: {keep: [2]}}", "row 'a' needs shares to keep"),
    ],
)
def test_a_plan_that_is_none_gets_one_line(
    ablations: ModuleType, plan: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(plan)
    with pytest.raises(UserError, match=message) as caught:
        ablations.read_plan(tmp_path / "plan.yaml")
    assert "\n" not in str(caught.value)


def test_the_committed_plans_are_plans_and_their_settings_are_known(ablations: ModuleType) -> None:
    from emotrain.config import load_config

    plans = [ablations.read_plan(file) for file in (ROOT / "configs/ablations").glob("*.yaml")]
    assert sum(len(row.seeds) for plan in plans for row in plan.rows) <= 60
    for plan in plans:
        for row in plan.rows:
            load_config(ROOT / plan.base, list(row.settings))


def test_seeds_that_the_standard_row_lacks_leave_the_others_their_rows(
    ablations: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("base: x\nstandard: a\nrows: {a: {}, b: {from: a, seeds: [0, 1]}}")
    command = [str(plan), "--table", "--seeds", "1", "--out", str(tmp_path / "out"), "--json"]
    assert ablations.main(command) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows == {"b": {"missing_seeds": [1]}}
    standard, other = ablations.read_plan(plan).rows
    assert other.begins == standard and standard.begins is None


PLAN = """
base: {base}
standard: plain
keep: [0.5]
rows:
  plain: {{seeds: [0, 1], settings: [model.router.pool.kind=none]}}
  pools: {{seeds: [0, 1]}}
  tuned:
    from: plain
    settings: ["anneal.checkpoint={{checkpoint}}", anneal.tokens=512]
    keep: []
"""


def test_rows_are_trained_measured_and_gone_on_with(
    ablations: ModuleType,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = tiny_settings(tiny_data, tmp_path / "unused", steps=2)
    settings["model"]["experts"]["routed"] = 16
    (tmp_path / "base.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    (tmp_path / "plan.yaml").write_text(PLAN.format(base=tmp_path / "base.yaml"))
    trained: list[str] = []

    def train(command: list[str], **_: object) -> SimpleNamespace:
        trained.append(command[-1].split("/")[-2])
        if len(trained) == 4:
            return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=emotrain(command[3:]))

    monkeypatch.setattr(ablations, "subprocess", SimpleNamespace(run=train))
    out = tmp_path / "out"
    command = [str(tmp_path / "plan.yaml"), "--data", str(tiny_data), "--out", str(out)]
    command += ["--documents", "3", "--json"]
    assert ablations.main(command) == 1
    assert "pools, seed 1: training ended with exit code 1" in capsys.readouterr().err
    assert ablations.main([*command, "--table"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows["pools"] == {"missing_seeds": [1]} and rows["tuned"] == {"missing_seeds": [0]}
    assert ablations.main([*command, "--table", "--seeds", "0"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert first["pools"]["seeds"] == [0] and first["tuned"] == {"missing_seeds": [0]}
    assert ablations.main(command) == 0
    # The run that another one begins from is asked for again, and has nothing left to do.
    rest = ["plain-0", "tuned-0"]
    assert trained == ["plain-0", "plain-1", "pools-0", "pools-1", "pools-1", *rest]
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    cells = [json.loads((out / f"pools-{seed}/cell.json").read_text()) for seed in (0, 1)]
    losses = [cell["full_loss_nats"] for cell in cells]
    assert rows["pools"]["mean"]["full_loss_nats"] == pytest.approx(sum(losses) / 2)
    assert rows["pools"]["least"]["full_loss_nats"] == min(losses)
    assert rows["pools"]["most"]["full_loss_nats"] == max(losses)
    assert rows["plain"]["mean"]["full_gap_percent"] == 0
    for arm in ("selected", "random", "cross_domain", "prompted"):
        assert f"increase_nats/0.5/{arm}" in rows["pools"]["mean"]
    assert {"rows_per_token", "lru_hits", "srp", "sch"} <= set(rows["plain"]["mean"])
    assert not any("increase" in name for name in rows["tuned"]["mean"])
    assert "anneal" in str(json.loads((out / "tuned-0/cell.json").read_text())["asked"])
    with open(out / "ablations.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["row"] for line in lines} == {"plain", "pools", "tuned"}
    assert (out / "ablations.png").read_bytes().startswith(b"\x89PNG")
    assert "| pools | 2 |" in (out / "ablations.md").read_text()
    # What is measured needs no run, as where results were copied; what is not, trains it again.
    shutil.rmtree(out / "plain-0/run")
    assert ablations.main(command) == 0
    assert trained[5:] == rest
    shutil.rmtree(out / "tuned-0")
    assert ablations.main(command) == 0
    assert trained[5:] == rest + rest
    assert ablations.main([*command, "optimizer.lr=1e-4"]) == 2
    assert "is of other settings; give another --out" in capsys.readouterr().err
