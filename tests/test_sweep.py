"""`emotrain sweep`: cells are what `emotrain evaluate` finds, a sweep that was killed ends like one
that was not, and what cannot be is one line."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.data.formats import Dataset
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation import plots
from emotrain.evaluation.measure import evaluate
from emotrain.evaluation.perplexity import document_losses, pack
from emotrain.evaluation.reading import documents_of
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.folders import exclusive_lock
from emotrain.modular.counts import experts_kept
from emotrain.modular.scores import collect_scores
from emotrain.modular.select import greedy_select, select_pool
from emotrain.sweeps import figures, measuring, subjects, workers
from emotrain.sweeps.cells import prepared
from emotrain.sweeps.plan import FULL, Cell, Plan, cells_of, read_plan
from emotrain.sweeps.store import Entry
from emotrain.sweeps.summary import Summary
from emotrain.tasks.evaluation import evaluate_tasks
from emotrain.tasks.settings import TaskSettings
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from tests.conftest import ROOT, tiny_settings

PNG = b"\x89PNG\r\n\x1a\n"
PLAN = """
models: {{"EMO <b>": {run}}}
data: {data}
keep: [0.5, 0.25]
methods: [router, random]
calibration_documents: [2, 4]
seeds: [0, 1]
documents: 4
document_tokens: 24
"""
CELLS = 3 * (1 + 2 * (2 * 2 + 2))
"""Domains, times all experts and, at each share, two draws of two sizes and two of experts."""


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    settings = tiny_settings(tiny_data, folder, global_batch=16, micro_batch=16, steps=2)
    # Larger than usual, so that it matters which experts stay.
    settings["model"]["init_std"] = 0.3
    run_module.train(config_from_dict(settings), Ranks())
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    """Drawing takes most of the time of a small sweep: one test draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "png", lambda *_, **__: PNG)
        yield


@pytest.fixture
def plan(run, tiny_data, tmp_path):
    """A plan's file; `write(key=value)` changes keys of it."""
    return write_plan(tmp_path / "plan.yaml", run, tiny_data)


def write_plan(path: Path, run: Path, of: Path, **changes: str) -> Path:
    lines = PLAN.format(run=run, data=of).strip().splitlines()
    kept = [line for line in lines if line.split(":")[0] not in changes]
    path.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in changes.items())]))
    return path


def sweep(plan: Path, out: Path, *more: str) -> int:
    return main(["sweep", str(plan), "--out", str(out), "--device", "cpu", *more])


def results_of(out: Path) -> dict[str, bytes]:
    """Everything that a sweep writes but its cells."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "cells" not in path.parts and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def undisturbed(run, tiny_data, tmp_path_factory):
    """The folder of a sweep that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert sweep(write_plan(folder / "plan.yaml", run, tiny_data), folder / "out") == 0
    return folder / "out"


def lines_of(out: Path, name: str) -> list[dict[str, str]]:
    with open(out / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# ---- what cells and means are


def test_a_cell_is_what_evaluate_finds(undisturbed, run, tiny_data):
    settings = EvaluationSettings(
        keep=(0.5, 0.25), calibration_documents=2, documents=4, document_tokens=24, random_seeds=0
    )
    found = evaluate(run, tiny_data, settings, device="cpu")
    rows = {
        (row["subject"], row["method"], row["keep"], row["calibration_documents"], row["seed"]): row
        for row in lines_of(undisturbed, "cells.csv")
    }
    assert len(rows) == CELLS
    for name, domain in found.domains.items():
        full = rows[name, FULL, "1.0", "0", "0"]
        assert float(full["value"]) == pytest.approx(domain.loss_nats, rel=1e-6)
        for keep in ("0.5", "0.25"):
            row = rows[name, "router", keep, "2", "0"]
            increase, error = domain.increase(keep, "selected")
            assert float(row["change"]) == pytest.approx(increase, abs=1e-6)
            assert float(row["change_standard_error"]) == pytest.approx(error, abs=1e-6)
            assert abs(increase) > 1e-3, "subsets must lose something for the test to say anything"


def test_a_seed_draws_other_documents_and_a_criterion_chooses_by_them(run, tiny_data):
    """By hand, for one cell."""
    model_plan = Plan({"m": str(run)}, str(tiny_data), document_tokens=24, documents=4)
    cell = Cell("m", "domain", "harbour", "reap", 0.5, 3, 2)
    bench = measuring.Bench(model_plan, {"m": find(run)}, "cpu", 0)
    found = bench.measure([cell, Cell("m", "domain", "harbour", FULL, 1.0, 0, 0)])[cell]
    config, model = load_model(find(run))
    dataset = Dataset(tiny_data)
    text = documents_of(dataset, "train", "harbour", 9, 24)[6:]
    batches = pack(text, 32, 16)
    scores = collect_scores(model, batches, torch.zeros(3).long(), 1)
    counts = experts_kept(config.model, 0.5)
    subsets = tuple(
        select_pool(of_layer["reap"], torch.tensor([count - 1]))
        for of_layer, count in zip(scores, counts, strict=True)
    )
    held_out = documents_of(dataset, "valid", "harbour", 4, 24)
    losses = document_losses(model, pack(held_out, 32, 16), torch.zeros(4).long(), subsets)
    assert found.amounts == pytest.approx(losses.loss_U.tolist(), rel=1e-6)
    assert found.sizes == tuple(len(document) - 1 for document in held_out)
    assert found.experts_kept_per_layer == counts


def test_all_documents_choose_in_one_draw(run, tiny_data, tmp_path):
    """By hand; tables, numbers and pictures call it `all`, the largest number."""
    changes = {"calibration_documents": "[1, all]", "domains": "[harbour]", "keep": "[0.5]"}
    out = tmp_path / "out"
    assert sweep(write_plan(tmp_path / "plan.yaml", run, tiny_data, **changes), out) == 0
    [cell] = [c for c in lines_of(out, "cells.csv") if c["calibration_documents"] == "all"]
    config, model = load_model(find(run))
    dataset = Dataset(tiny_data)
    text = documents_of(dataset, "train", "harbour", 10**6, 24)
    assert len(text) == dataset.domains["train"]["harbour"]["documents"]
    zeros, counts = torch.zeros(len(text)).long(), experts_kept(config.model, 0.5)
    subsets = greedy_select(model, pack(text, 32, 16), zeros, 1, counts)
    held_out = pack(documents_of(dataset, "valid", "harbour", 4, 24), 32, 16)
    losses = document_losses(model, held_out, torch.zeros(4).long(), subsets)
    wanted = float(losses.loss_U.sum() / losses.targets_U.sum())
    assert float(cell["value"]) == pytest.approx(wanted, rel=1e-6)
    result = json.loads((out / "sweep.json").read_text())
    assert result["plan"]["calibration_documents"] == [1, "all"]
    [row] = [row for row in result["means"] if row["calibration_documents"] == "all"]
    assert row["seeds"] == 1 and row["change_spread"] is None
    table = (out / "sweep.md").read_text()
    assert "by 1 document;" in table and "| all | 1 |" in table
    rows = lines_of(out, "figures/calibration.csv")
    assert [row["calibration_documents"] for row in rows] == ["1", "all"]
    summary = Summary.of(prepared(read_plan(tmp_path / "plan.yaml"), out, "cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "png", plots.png)
        assert figures.figures(summary)["calibration"][1]().startswith(PNG)


def test_a_task_is_asked_as_evaluate_asks_it(run, tiny_data, tmp_path, capsys):
    """Also beside domains; a mean is over the subjects of one metric."""
    choices = tmp_path / "choices.jsonl"
    with open(choices, "w", encoding="utf-8") as file:
        for i in range(14):
            split = {"split": "train"} if i % 2 else {}
            item = {"question": f"bread {i}?", "choices": ["oven", "tide", "moss"], "answer": i % 3}
            file.write(json.dumps({**item, **split}) + "\n")
    texts = tmp_path / "texts.jsonl"
    lines = [{"text": f"salt {word} rope"} for word in ("oven", "tide", "moss")]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = write_plan(
        *(tmp_path / "plan.yaml", run, tiny_data),
        domains="[kitchen]",
        tasks=f"[{choices}, {texts}]",
        keep="[0.5]",
        calibration_documents="[2]",
        shots="1",
    )
    assert sweep(plan, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.count("failed: ") == 2 and "has 0 examples that are not asked" in said
    settings = TaskSettings(shots=1, keep=(0.5,), calibration_documents=2, random_seeds=0)
    found = evaluate_tasks(run, [choices], settings, device="cpu")
    cells = {
        (cell["subject"], cell["method"], cell["seed"]): cell
        for cell in lines_of(tmp_path / "out", "cells.csv")
    }
    for method, experts in ((FULL, "all experts"), ("router", "keep 0.5, own choice")):
        expected = found.score("choices", experts).metrics["accuracy_raw"].value
        cell = cells[str(choices), method, "0"]
        assert (cell["metric"], float(cell["value"])) == ("accuracy_raw", pytest.approx(expected))
    [of_texts] = evaluate_tasks(run, [texts], TaskSettings(), device="cpu").scores
    assert float(cells[str(texts), FULL, "0"]["value"]) == pytest.approx(
        of_texts.metrics["bits_per_byte"].value
    )
    rows = [row for row in lines_of(tmp_path / "out", "rows.csv") if not row["subject"]]
    assert [row["metric"] for row in rows if row["method"] == FULL] == [
        "loss_nats_per_token",
        "accuracy_raw",
        "bits_per_byte",
    ]
    table = (tmp_path / "out/sweep.md").read_text()
    assert "accuracy raw (share of questions)" in table and "refused: 2 cells missing" in table


def test_means_are_over_domains_and_their_spread_is_over_seeds(undisturbed):
    cells = lines_of(undisturbed, "cells.csv")
    rows = lines_of(undisturbed, "rows.csv")
    means = [row for row in rows if not row["subject"]]
    assert len(means) == 1 + 2 * 3 and len(rows) == 4 * len(means)
    for row in means:
        of_row = [
            cell
            for cell in cells
            if all(cell[k] == row[k] for k in ("method", "keep", "calibration_documents"))
        ]
        seeds = sorted({cell["seed"] for cell in of_row})
        assert int(row["seeds"]) == len(seeds) and row["missing_cells"] == "0"
        by_seed = [
            statistics.fmean(float(cell["change"]) for cell in of_row if cell["seed"] == seed)
            for seed in seeds
        ]
        assert float(row["change"]) == pytest.approx(statistics.fmean(by_seed))
        spread = row["change_spread"]
        assert (spread == "") == (len(seeds) == 1)
        if spread:
            assert float(spread) == pytest.approx(statistics.stdev(by_seed))
        errors = [
            math.hypot(
                *(float(cell["change_standard_error"]) for cell in of_row if cell["seed"] == seed)
            )
            / 3
            for seed in seeds
        ]
        assert float(row["change_standard_error"]) == pytest.approx(statistics.fmean(errors))


def test_every_figure_is_drawn(undisturbed, plan, monkeypatch):
    """Also of rows without numbers."""
    monkeypatch.setattr(figures, "png", plots.png)
    summary = Summary.of(prepared(read_plan(plan), undisturbed, "cpu"))
    empty = [
        dataclasses.replace(
            row,
            experts="",
            missing_cells=1,
            value=None,
            change=None,
            change_spread=None,
        )
        for row in summary.means
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = {name: draw() for name, (_, draw) in figures.figures(summary).items()}
        refused = figures.figures(dataclasses.replace(summary, means=tuple(empty)))
        without = [refused[name][1]() for name in ("subsets", "calibration")]
    assert drawn.keys() == refused.keys() == set(figures.NAMES)
    assert all(picture.startswith(PNG) for picture in (*drawn.values(), *without))
    assert all(len(picture) > 15_000 for picture in drawn.values())


def test_tables_and_figures_say_what_the_rows_say(undisturbed):
    found = results_of(undisturbed)
    names = ("subsets", "subjects", "methods", "calibration")
    assert found.keys() == {
        *("sweep.json", "sweep.md", "rows.csv", "cells.csv"),
        *(f"figures/{name}.{kind}" for name in names for kind in ("png", "csv")),
    }
    assert all(found[f"figures/{name}.png"].startswith(PNG) for name in names)
    rows = lines_of(undisturbed, "rows.csv")
    for name in names:
        assert all(row in rows for row in lines_of(undisturbed, f"figures/{name}.csv"))
    methods = {row["method"] for row in lines_of(undisturbed, "figures/methods.csv")}
    sizes = {
        row["calibration_documents"] for row in lines_of(undisturbed, "figures/calibration.csv")
    }
    assert methods == {"router", "random"} and sizes == {"2", "4"}
    result = json.loads(found["sweep.json"])
    assert result["cells"] == CELLS and result["failed"] == []
    table = found["sweep.md"].decode()
    row = next(r for r in result["means"] if r["method"] == "router" and r["keep"] == 0.25)
    assert f"{row['change']:+.3f} ± {row['change_spread']:.3f}" in table
    assert "2 of 8" in table and "kitchen" in table


# ---- interruptions


def killed(plan: Path, out: Path, after_writes: int) -> None:
    """A sweep in a process of its own, which is killed in the middle of a file, when it has written
    so many."""

    def body() -> None:
        logging.disable()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        write, left = Path.write_bytes, [after_writes]

        def counted(self, content):
            if left[0] == 0:
                write(self, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return write(self, content)

        Path.write_bytes = counted
        sweep(plan, out)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def test_a_sweep_that_was_killed_ends_like_one_that_was_not(
    plan, tmp_path, undisturbed, monkeypatch
):
    """To the bit. What was there is not measured again, but for the domain in the middle of which
    it was killed."""
    out = tmp_path / "out"
    for writes in (0, 1, 2, 3, 17, 30):
        killed(plan, out, writes)
        assert not (out / "sweep.json").exists(), "an aggregate over some of the cells"
    measured = count_cells(monkeypatch)
    there = sum(1 for _ in out.glob("cells/*/result.json"))
    assert sweep(plan, out) == 0
    assert len(measured) == CELLS - there and 10 < there < CELLS
    assert results_of(out) == results_of(undisturbed)
    assert sweep(plan, out) == 0 and len(measured) == CELLS - there, "there was nothing to do"
    assert results_of(out) == results_of(undisturbed)


def count_cells(monkeypatch) -> list[Cell]:
    """The cells that are measured from now on."""
    found: list[Cell] = []
    measure = measuring.Bench.measure

    def noted(self, cells):
        found.extend(cells)
        return measure(self, cells)

    monkeypatch.setattr(measuring.Bench, "measure", noted)
    return found


def test_a_changed_plan_measures_only_what_is_new(run, tiny_data, tmp_path, monkeypatch):
    small = write_plan(
        tmp_path / "small.yaml", run, tiny_data, calibration_documents="[4]", seeds="[0]"
    )
    out, measured = tmp_path / "out", count_cells(monkeypatch)
    assert sweep(small, out) == 0
    assert not (out / "figures/calibration.png").exists()
    first, before = set(measured), lines_of(out, "cells.csv")
    measured.clear()
    grown = write_plan(tmp_path / "grown.yaml", run, tiny_data, models=f"{{other: {run}}}")
    assert sweep(grown, out) == 0
    assert len(measured) == CELLS - len(first), "under another name a model is found again"
    folders = {line["folder"]: line for line in lines_of(out, "cells.csv")}
    for line in before:
        assert folders[line["folder"]] == {**line, "model": "other"}
    assert (out / "figures/calibration.png").is_file()
    assert sweep(small, out) == 0
    assert not (out / "figures/calibration.png").exists(), "a figure of another plan"
    # What a number depends on is in the name of its folder.
    measured.clear()
    shorter = write_plan(
        tmp_path / "shorter.yaml", run, tiny_data, seeds="[0]", document_tokens="16"
    )
    assert sweep(shorter, out) == 0 and len(measured) == 3 * (1 + 2 * 3)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"half', "null", '{"settings": {}}', "[" * 100_000],
)
def test_a_result_that_is_none_is_measured_again(content, plan, tmp_path, undisturbed, caplog):
    entry = prepared(read_plan(plan), undisturbed, "cpu").entries[3]
    own = Entry(entry.cell, entry.settings, tmp_path / "cell")
    own.folder.mkdir()
    whole = json.loads((entry.folder / "result.json").read_text())
    (own.folder / "result.json").write_text(json.dumps(whole))
    assert own.result == entry.result and own.result is not None
    (own.folder / "result.json").write_text(content)
    assert own.result is None and "measured again" in caplog.text
    for key, value in (
        ("value", None),
        ("value", float("nan")),
        ("value", "1"),
        ("item_sizes", []),
        ("item_amounts", ["a"]),
        ("experts_kept_per_layer", [True]),
        ("more", 1),
        ("settings", {**whole["settings"], "seed": 9}),
    ):
        (own.folder / "result.json").write_text(json.dumps({**whole, key: value}))
        assert own.result is None, key


# ---- failures


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(
    run, tiny_data, tmp_path, capsys, monkeypatch
):
    plan = write_plan(tmp_path / "plan.yaml", run, tiny_data, seeds="[0, 40]")
    out, measured = tmp_path / "out", count_cells(monkeypatch)
    assert sweep(plan, out, "--json") == 1
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    lacking = [cell for cell in result["failed"] if cell["seed"] == 40]
    assert len(lacking) == len(result["failed"]) == 3 * 2 * 2, "random needs no documents"
    assert "has 32 train documents; seed 40 takes 4 from document 160 on" in said.err
    assert "12 of 39 cells failed; --retry" in said.err
    for row in result["means"]:
        refused = row["method"] == "router"
        assert (row["change"] is None) == refused
        assert row["missing_cells"] == (3 if refused else 0)
    assert "refused: 3 cells missing" in (out / "sweep.md").read_text()
    drawn = lines_of(out, "figures/calibration.csv")
    assert all(line["change"] == "" for line in drawn)
    measured.clear()
    assert sweep(plan, out) == 1 and not measured
    assert sweep(plan, out, "--retry") == 1 and len(measured) == 12


def test_a_defect_in_one_domain_leaves_the_others(plan, tmp_path, capsys, monkeypatch, undisturbed):
    """And is tried again with --retry alone; the full model is measured with what needs it."""
    measure = subjects.Domain.measure

    def broken(self, cells):
        if self.name == "harbour":
            raise ZeroDivisionError("of\ntwo lines")
        return measure(self, cells)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(subjects.Domain, "measure", broken)
        assert sweep(plan, out) == 1
    assert "harbour" in capsys.readouterr().err
    failures = [json.loads(path.read_text()) for path in out.glob("cells/*/failure.json")]
    assert len(failures) == CELLS // 3
    assert failures[0]["error"] == "ZeroDivisionError: of two lines"
    assert "Traceback" in failures[0]["traceback"]
    assert sweep(plan, out) == 1
    assert sweep(plan, out, "--retry") == 0
    assert not list(out.glob("cells/*/failure.json"))
    assert results_of(out) == results_of(undisturbed)


def test_a_process_that_is_killed_leaves_the_others(
    plan, tmp_path, capsys, monkeypatch, undisturbed
):
    """What it was at is measured again by the same command."""
    monkeypatch.setattr(workers, "context", multiprocessing.get_context("fork"))
    measure, this = subjects.Domain.measure, os.getpid()

    def killed_once(self, cells):
        if self.name == "harbour" and not (tmp_path / "killed").exists():
            assert os.getpid() != this
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(self, cells)

    monkeypatch.setattr(subjects.Domain, "measure", killed_once)
    assert sweep(plan, tmp_path / "out", "--jobs", "2") == 1
    error = capsys.readouterr().err
    assert error.count("its process ended in the middle of it (exit code -9)") == CELLS // 3
    assert sweep(plan, tmp_path / "out", "--jobs", "2") == 0
    assert results_of(tmp_path / "out") == results_of(undisturbed)


def test_losses_that_are_not_finite_are_a_failure(plan, tmp_path, capsys, monkeypatch):
    losses = subjects.losses_of_arms

    def diverged(*args, **options):
        found = losses(*args, **options)
        found[-1].loss_U[0] = math.nan
        return found

    monkeypatch.setattr(subjects, "losses_of_arms", diverged)
    assert sweep(plan, tmp_path / "out") == 1
    assert "its numbers are not finite" in capsys.readouterr().err


def test_one_sweep_at_a_time_writes_to_a_folder(plan, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with exclusive_lock(tmp_path / "out/.lock") as alone:
        assert alone and sweep(plan, tmp_path / "out") == 1
    assert "another sweep writes to this folder" in capsys.readouterr().err
    assert not (tmp_path / "out/cells").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kep": "[0.5]"}, "kep is not a key of a plan; did you mean keep?"),
        ({"keep": "0.5"}, "keep=0.5 must be a list, for example [0.5]"),
        ({"keep": "[]"}, "keep is empty"),
        ({"keep": "[1.0]"}, "keep has shares above 0 and below 1"),
        ({"keep": "[.nan]"}, "keep has shares above 0 and below 1"),
        ({"keep": "[yes]"}, "keep=True must be a number"),
        ({"keep": "[0.5, 0.5]"}, "keep names something twice"),
        ({"methods": "[gready]"}, "methods=gready is not known; choose some of router"),
        ({"seeds": "[-1]"}, "seeds are whole numbers from 0 on"),
        ({"seeds": "[0.5]"}, "seeds=0.5 must be a whole number"),
        ({"calibration_documents": "[0]"}, "calibration_documents are whole numbers from 1 on"),
        ({"calibration_documents": "[-1]"}, "calibration_documents are whole numbers from 1 on"),
        ({"documents": "1"}, "documents must be at least 2"),
        ({"document_tokens": "1"}, "document_tokens must be at least 2"),
        ({"models": "[a]"}, "models=['a'] must be `name: path` lines"),
        ({"models": "{a: 1}"}, "models=1 must be text"),
        ({"models": "{a: /nowhere}"}, "no checkpoint here"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"data": "''"}, "there is nothing to measure on; give data"),
        ({"shots": "1"}, "shots and questions are of tasks"),
        ({"tasks": "[/nowhere.jsonl]"}, "/nowhere.jsonl"),
        ({"domains": "[moon]"}, "domain 'moon' has 0 held-out documents"),
        ({"data": "${nowhere}"}, "nowhere"),
        ({"keep": "[0.5"}, "not readable as YAML"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(changes, message, run, tiny_data, tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.yaml", run, tiny_data, **changes)
    assert sweep(plan, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_lacks(plan, tmp_path, capsys):
    assert main(["sweep", str(plan)]) == 2
    assert "has no out; say where to write: --out DIR" in capsys.readouterr().err
    assert sweep(plan, tmp_path / "out", "--jobs", "0") == 2
    assert "jobs=0" in capsys.readouterr().err
    with pytest.raises(UserError, match="models is missing"):
        (tmp_path / "empty.yaml").write_text("keep: [0.5]")
        read_plan(tmp_path / "empty.yaml")


def test_the_plans_of_the_repository_are_plans():
    plans = [read_plan(file) for file in (ROOT / "configs/sweeps").glob("*.yaml")]
    assert len(plans) >= 2
    assert all(plan.out and len(cells_of(plan, ["a", "b"])) > 2 for plan in plans)


def test_every_command_of_the_page_runs(run, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "png", lambda *_, **__: PNG)
    for name, target in (
        ("runs/quickstart", run),
        ("data/sample", tiny_data),
        ("configs", ROOT / "configs"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```\n(.*?)```", page, re.DOTALL)).splitlines()
    # Those of training and of several processes are in test_while_training.py.
    lines = [line for line in lines if line.startswith(("emotrain evaluate", "emotrain sweep"))]
    assert len(lines) == 2
    for line in lines:
        name, *words = shlex.split(line)
        assert name == "emotrain" and main(words) == 0, capsys.readouterr().err
    written = {path.name for path in (tmp_path / "runs/quickstart-sweep").rglob("*.*")}
    named = re.findall(r"`(?:figures/)?(\w+\.(?:md|csv|json|png))`", page)
    assert {"sweep.md", "rows.csv", "calibration.png"} <= set(named) & written
    keys = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert {field.name for field in dataclasses.fields(Plan)} <= set(keys)


# ---- processes


def test_pieces_go_to_processes_that_had_their_kind(tmp_path, monkeypatch):
    """One that dies takes its piece with it alone."""
    monkeypatch.setattr(workers, "context", multiprocessing.get_context("fork"))

    def prepare():
        def work(piece):
            kind, number = piece
            if number == 3:
                os._exit(7)
            with open(tmp_path / str(os.getpid()), "a") as file:
                file.write(kind)

        return work

    pieces = [(kind, number) for number in range(8) for kind in "ab"]
    ended = dict(workers.run_pieces(pieces, prepare, 2, lambda piece: piece[0]))
    assert ended.keys() == set(pieces)
    assert {p: e for p, e in ended.items() if e} == {(kind, 3): workers.Died(7) for kind in "ab"}
    kinds = [path.read_text() for path in tmp_path.iterdir()]
    changes = sum(a != b for text in kinds for a, b in zip(text, text[1:], strict=False))
    assert sum(map(len, kinds)) == 14 and changes <= 2


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_forty_cells_killed_at_random_ten_times_end_with_the_same_table(run, tiny_data, tmp_path):
    """In two processes, which end with the one that started them."""
    rng = random.Random(0)
    models = f"{{one: {run}, two: {shutil.copytree(run, tmp_path / 'two')}}}"
    state = next((tmp_path / "two").glob("checkpoints/*/manifest.json"))
    state.write_text(state.read_text() + " ")  # another checkpoint by its checksum
    plan = write_plan(tmp_path / "plan.yaml", run, tiny_data, models=models)
    command = [sys.executable, "-m", "emotrain", "sweep", str(plan), "--jobs", "2"]
    out, alone = tmp_path / "out", tmp_path / "alone"

    def start(folder: Path) -> subprocess.Popen:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, "--out", str(folder)], cwd=ROOT, **quiet)

    def there() -> int:
        return sum(1 for _ in out.glob("cells/*/result.json"))

    assert start(alone).wait(400) == 0
    assert len(lines_of(alone, "cells.csv")) == 2 * CELLS
    kills, in_the_middle = 0, 0
    while kills < 10:
        process = start(out)
        # Some die before a cell is done, some while cells are written.
        wanted, delay = there() + rng.randint(0, 5), rng.random() * 0.05
        while process.poll() is None and there() < wanted:
            time.sleep(0.005)
        time.sleep(delay)
        if process.poll() is not None:
            for folder in rng.sample(sorted((out / "cells").iterdir()), 30):
                (folder / "result.json").unlink()
            continue
        workers_of_it = children_of(process.pid)
        process.kill()
        process.wait()
        while any(map(is_alive, workers_of_it)):
            time.sleep(0.01)
        kills += 1
        in_the_middle += 0 < there() < 2 * CELLS
    assert in_the_middle >= 3
    assert start(out).wait(400) == 0
    assert results_of(out) == results_of(alone)
