"""Proves of a run on a mixture that its layout changes neither the order of its data nor losses,
that it goes on from its position alone on another number of processes, that changed weights are
refused where they would change what has been read, and that the loss of each source is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.while_training import TrainingEvaluation
from emotrain.files import sha256_of
from emotrain.report.facts import data_tables
from emotrain.report.panels import Panels
from emotrain.report.runs import read_runs
from emotrain.report.subsets import subset_commands
from emotrain.training import run as run_module
from emotrain.training.data_source import build_loader
from tests.conftest import tiny_settings
from tests.processes import run_ranks

STEPS = 6
SOURCES = ("kitchen", "harbour", "garden")


def mix_file(folder: Path, data: Path, tail: str) -> Path:
    """A mixture of the data set's domains."""
    weights = dict(zip(SOURCES, (2, 1, 1), strict=True))
    sources = ", ".join(
        f"{name}: {{path: {data}, domain: {name}" + (f", weight: {weight}}}" if not tail else "}")
        for name, weight in weights.items()
    )
    folder.mkdir(exist_ok=True)
    path = folder / "mix.yaml"
    path.write_text(f"sources: {{{sources}}}\n{tail}")
    return path


def staged(*stages: str) -> str:
    return f"stages: [{', '.join(f'{{{stage}}}' for stage in stages)}]"


def settings_of(data: Path, run_dir: Path, tail: str = "", **training: Any) -> dict[str, Any]:
    settings = tiny_settings(mix_file(run_dir, data, tail), run_dir)
    settings["data"]["on_bad_data"] = "replace"
    settings["training"] |= {"steps": STEPS, "global_batch": 8, **training}
    return settings


def train(settings: dict[str, Any], ranks: Ranks | None = None) -> None:
    run_module.train(config_from_dict(settings), ranks)


def train_until(settings: dict[str, Any], step: int, ranks: Ranks | None = None) -> None:
    """As `train`, and ask to stop in this step, as SIGTERM does."""
    real = run_module.train_step

    def asked(engine, batches, config, number, ranks, stop):
        return real(engine, batches, config, number, ranks, number == step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "train_step", asked)
        train(settings, ranks)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train(settings_of(tiny_data, run_dir))
    return run_dir


def test_the_loss_of_each_source_adds_up_to_that_of_the_step(
    one_process: Path, tiny_data: Path
) -> None:
    mixture = build_loader(config_from_dict(settings_of(tiny_data, one_process)))
    for line in lines_of(one_process):
        read = 8 * line["step"]
        batch = mixture.batch(range(read - 8, read))
        targets = [0] * len(SOURCES)
        for row, source in enumerate(mixture.order.locate(range(read - 8, read))[0].tolist()):
            targets[source] += int((batch.targets_BS[row] >= 0).sum())
        losses = [line.get(f"data/{name}/loss_nats", 0.0) for name in SOURCES]
        total = sum(a * b for a, b in zip(losses, targets, strict=True))
        assert total / sum(targets) == pytest.approx(line["cross_entropy"], rel=1e-6)
        assert [line[f"data/{name}/tokens"] for name in SOURCES] == [
            count * 32 for count in mixture.order.counts(read)
        ]
    last = lines_of(one_process)[-1]
    assert last["data/replaced_sequences"] == 0
    assert sum(last[f"data/{name}/tokens"] for name in SOURCES) == last["tokens"] == 8 * 32 * STEPS
    start = json.loads((one_process / "environment.json").read_text())["starts"][0]
    assert start["data"]["sources"]["garden"]["weights"] == [0.25]


def test_the_report_has_the_sources(one_process: Path) -> None:
    (run,) = read_runs([one_process])
    titles = {plot.title: plot for plot in Panels([run]).sources()}
    for title in ("Training loss of each source", "Passes over each source"):
        header = titles[title].csv.splitlines()[0]
        assert header == "run,step,tokens,garden,harbour,kitchen"
    assert "Replaced sequences" in titles
    assert Panels([run]).others() == ([], [])
    tables, _ = data_tables(run)
    assert [row[0] for row in tables[-1].rows] == list(SOURCES)
    assert not any("mixture" in cell for row in tables[0].rows for cell in row)
    words = " ".join(subset_commands(run.folder, run.config, None))
    assert "--data DATA" in words and "mix.yaml" not in words


def test_evaluation_while_training_needs_a_data_set(tiny_data: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_data, tmp_path)
    settings["evaluation"] = {"every": 3, "keep": []}
    with pytest.raises(UserError, match="mix.yaml is a mixture; name a folder .* evaluation.data"):
        TrainingEvaluation(config_from_dict(settings), Ranks())
    settings["evaluation"]["data"] = str(tiny_data)
    assert TrainingEvaluation(config_from_dict(settings), Ranks()).domains.keys() == set(SOURCES)


def test_two_processes_and_a_resume_on_another_number_train_the_same(
    one_process: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Two processes with expert parallelism and small micro-batches are stopped in step 4; one
    goes on."""
    command = settings_of(tiny_data, tmp_path, micro_batch=2) | {"parallel": {"ep": 2}}
    run_ranks(lambda ranks: train_until(command, 4, ranks), 2)
    assert lines_of(tmp_path)[-1]["step"] == 4
    alone = {"training": command["training"] | {"micro_batch": 8}, "parallel": {"ep": 1}}
    train(command | alone)
    wanted = lines_of(one_process)
    for got, line in zip(lines_of(tmp_path), wanted, strict=True):
        for key, value in line.items():
            if key.startswith("data/") or key in ("loss", "cross_entropy"):
                assert got[key] == pytest.approx(value, rel=2e-5), key


def test_a_model_is_tuned_on_a_mixture(one_process: Path, tiny_data: Path, tmp_path: Path) -> None:
    mix = mix_file(tmp_path, tiny_data, "")
    words = ["finetune", one_process, "--data", mix, "--out", tmp_path / "tuned", "--steps", 2]
    assert main(list(map(str, words))) == 0
    assert lines_of(tmp_path / "tuned")[-1]["data/kitchen/tokens"] > 0
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    manifest = json.loads((other / "dataset.json").read_text())
    manifest["tokenizer_sha256"] = sha256_of(other / "tokenizer.json")
    (other / "dataset.json").write_text(json.dumps(manifest))
    words[3], words[5] = mix_file(other, other, ""), tmp_path / "again"
    assert main(list(map(str, words))) == 2, "its tokenizer is another one"
    assert not (tmp_path / "again/metrics.jsonl").exists()


def test_later_weights_may_change_and_earlier_ones_are_refused(
    tiny_data: Path, tmp_path: Path
) -> None:
    """A stage ends after step 3; the run is stopped after step 4."""
    first = f"until_tokens: {3 * 8 * 32}, weights: {{kitchen: 2, harbour: 1, garden: 1}}"
    second = "weights: {kitchen: 0, harbour: 1, garden: 1}"
    train_until(settings_of(tiny_data, tmp_path, staged(first, second)), 4)
    read = {name: lines_of(tmp_path)[-1][f"data/{name}/tokens"] for name in SOURCES}
    assert read["kitchen"] == lines_of(tmp_path)[2]["data/kitchen/tokens"]
    with pytest.raises(UserError) as caught:
        changed = staged(first, "weights: {kitchen: 0, harbour: 3, garden: 1}")
        train(settings_of(tiny_data, tmp_path, changed))
    assert "harbour had weight 0.5, here 0.75, garden had weight 0.5, here 0.25" in str(
        caught.value
    )
    assert "data.allow_change=true" in str(caught.value)
    third = f"until_tokens: {4 * 8 * 32}, {second}"
    later = settings_of(tiny_data, tmp_path, staged(first, third, "weights: {kitchen: 1}"))
    train(later)
    last = lines_of(tmp_path)[-1]
    assert last["data/kitchen/tokens"] == read["kitchen"] + 2 * 8 * 32, "it reads on where it stood"
    assert last["data/garden/tokens"] == read["garden"] and "data/garden/loss_nats" not in last
    train(later | {"training": later["training"] | {"steps": STEPS + 1}})
    assert lines_of(tmp_path)[-1]["step"] == STEPS + 1


def test_what_a_run_cannot_begin_with(tiny_data: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_data, tmp_path)
    path = Path(settings["data"]["path"])
    path.write_text(path.read_text().replace("weight: 2", "weight: 2, max_epochs: 0.1"))
    with pytest.raises(UserError, match="kitchen of .* passes .* max_epochs is 0.1; lower its"):
        train(settings)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()
    settings["data"]["domain"] = "kitchen"
    with pytest.raises(UserError, match="data.domain=kitchen: .* is a mixture"):
        train(settings)
    del settings["data"]["domain"]
    model = settings["model"]
    model["experts"]["exclusive"], model["router"]["pool"]["max"] = {"garden": 1}, 6
    with pytest.raises(UserError, match="exclusive experts for garden"):
        build_loader(config_from_dict(settings))
    model["experts"]["exclusive"], model["vocab_size"] = {}, 20
    with pytest.raises(UserError, match="model.vocab_size=20 is smaller than the"):
        build_loader(config_from_dict(settings))
