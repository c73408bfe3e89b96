"""Names that people gave are text: never mathematics, markup or a reason to fail after the work."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from emotrain.evaluation import plots, tables
from emotrain.evaluation.results import Evaluation
from emotrain.report.page import write_report

NAMES = ["notes $\\LaTeX$", "R$ and US$", "_misc", "<b>bold</b>", "[red]rich[/red]", "中文 🐍"]


def result_of(names: list[str], loss: float | None = 3.0) -> dict:
    arms = {"selected": 0.1, "random": 0.5, "cross_domain": None}
    entry = {
        "loss_nats": loss,
        "subset_loss_nats": {"1.0": dict.fromkeys(arms, loss), "0.5": dict.fromkeys(arms, loss)},
        "increase_nats": {"1.0": dict.fromkeys(arms, 0.0), "0.5": arms},
        "standard_error_nats": {"1.0": dict.fromkeys(arms, 0.0), "0.5": dict.fromkeys(arms, 0.01)},
        "documents": 4,
        "targets": 100,
        "calibration_documents": 2,
    }
    return {
        "format": 1,
        "checkpoint": "runs/x/checkpoints/step-00000001",
        "step": 1,
        "data": "data",
        "sequence_length": 32,
        "settings": {
            "keep": [1.0, 0.5],
            "cross_domain": "next",
            "random_seeds": 1,
            "documents": 4,
            "calibration_documents": 2,
            "seed": 0,
        },
        "experts": {
            "per_layer": [8, 8],
            "shared": 1,
            "per_token": 3,
            "kept_per_layer": {"1.0": [8, 8], "0.5": [4, 4]},
        },
        "domains": {name: entry for name in names},
        "mean": {key: item for key, item in entry.items() if key.endswith("nats")},
        "routing": {
            "domain_cosine_per_layer": [0.1, 0.2],
            "domain_cosine": 0.15,
            "effective_experts_per_layer": [3.0, 4.0],
            "effective_experts": 3.5,
        },
    }


def evaluation_of(names: list[str]) -> Evaluation:
    return Evaluation.from_json(result_of(names), Path("evaluation.json"))


def test_pictures_show_names_as_they_are(monkeypatch):
    legends = []
    real = Figure.savefig

    def savefig(figure, *arguments, **options):
        real(figure, *arguments, **options)
        legends.extend(
            text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()
        )
        assert not matplotlib.rcParams["text.parse_math"]

    monkeypatch.setattr(Figure, "savefig", savefig)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.subset_figure([("", evaluation_of(NAMES))])
    assert {name.lstrip("\u200b") for name in legends} >= set(NAMES)


def test_tables_show_names_as_they_are():
    table = tables.domain_table(evaluation_of(NAMES))
    for name in NAMES:
        assert name in table.text()


@pytest.mark.parametrize("loss", [3.0, None])
def test_a_report_is_written_of_any_result(loss, tmp_path: Path, tiny_data):
    """Also of a model whose losses are not finite, which JSON holds as null."""
    from emotrain.config import config_from_dict, save_config
    from tests.conftest import tiny_settings

    run_dir = tmp_path / "<i>run</i>"
    (run_dir / "evaluation").mkdir(parents=True)
    save_config(config_from_dict(tiny_settings(tiny_data, run_dir)), run_dir / "config.yaml")
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "cross_entropy": loss}) + "\n")
    result = result_of(NAMES, loss)
    if loss is None:
        for entry in (result["mean"], *result["domains"].values()):
            for table in ("increase_nats", "standard_error_nats"):
                entry[table] = {keep: dict.fromkeys(arms) for keep, arms in entry[table].items()}
    (run_dir / "evaluation/evaluation.json").write_text(json.dumps(result))
    page = write_report([run_dir]).path.read_text()
    assert ("are not finite" in page) == (loss is None) and "<b>bold" not in page
    assert "<i>run" not in page and "&lt;i&gt;run&lt;/i&gt;" in page
    assert (loss is None) or "&lt;b&gt;bold&lt;/b&gt;" in page and "[red]rich[/red]" in page
    assert loss is None or "nats a token" in page
