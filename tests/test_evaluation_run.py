"""`emotrain evaluate` on a run on disk: files, tables, pictures, and one line for every mistake."""

import builtins
import csv
import json
import re

import numpy as np
import pytest
from helpers import tiny_config, tiny_model

from emotrain.cli import main
from emotrain.config import save_config
from emotrain.data.manifest import SPLITS, write_manifest
from emotrain.data.shards import write_shard
from emotrain.evaluation import plots
from emotrain.evaluation.findings import findings
from emotrain.evaluation.measure import measure
from emotrain.evaluation.plots import subset_figure
from emotrain.evaluation.reading import DomainDocuments
from emotrain.evaluation.results import (
    ByArm,
    DomainLosses,
    ExpertCounts,
    Measurement,
    RoutingSummary,
    SubsetLosses,
)
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.evaluation.tables import mean_table
from emotrain.model.transformer import Transformer
from emotrain.modular.counts import experts_kept
from emotrain.training import checkpoint
from emotrain.training.optimizer import build_optimizer

PNG = b"\x89PNG\r\n\x1a\n"
DOMAINS = ("law", "code <b>&", "prose")
"""One name is hostile to HTML, Markdown and terminals."""


def write_data(folder, per_domain=6, vocab_size=64, domains=DOMAINS):
    """A prepared data set of random documents, written with the data room's own functions."""
    random = np.random.default_rng(0)
    splits = {}
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        documents = [
            (j, np.append(random.integers(1 + 10 * j, 20 + 10 * j, random.integers(3, 40)), 0))
            for j in range(len(domains))
            for _ in range(per_domain)
        ]
        tokens = np.concatenate([tokens for _, tokens in documents]).astype(np.uint16)
        offsets = np.cumsum([0, *(len(tokens) for _, tokens in documents)])
        info = write_shard(
            folder / split / "shard-00000.arrow",
            tokens,
            offsets,
            [domains[j] for j, _ in documents],
            ["test"] * len(documents),
        )
        counts = {
            name: {"documents": per_domain, "tokens": sum(len(t) for k, t in documents if k == j)}
            for j, name in enumerate(domains)
        }
        splits[split] = {"shards": [info], "domains": counts}
    write_manifest(
        folder,
        vocab_size=vocab_size,
        eos_id=0,
        eos_token="<eos>",
        splits=splits,
        skipped_documents={},
        settings={},
    )
    return folder


def write_run(run_dir, **overrides):
    """A run with one checkpoint, a configuration and metrics."""
    config = tiny_config(model__init_std=0.3, **overrides)
    model = Transformer(config.model).initialize(0)
    optimizer = build_optimizer(model, config.optimizer)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    checkpoint.save(
        run_dir, model, optimizer, config, checkpoint.TrainingState(7, 448, "data", 0, 4, 1e-3)
    )
    save_config(config, run_dir / "config.yaml")
    lines = [
        json.dumps(
            {
                "step": step,
                "tokens": 64 * step,
                "cross_entropy": 3.9 - step / 10,
                "load_imbalance": [2.0, 1.5],
                "tokens_per_second": 1e4,
            }
        )
        for step in range(1, 8)
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo', encoding="utf-8")
    return run_dir


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run")


def evaluate_arguments(run_dir, data, *more):
    return [
        "evaluate",
        str(run_dir),
        "--data",
        str(data),
        "--calibration-documents",
        "3",
        "--keep",
        "1.0",
        "0.5",
        *more,
    ]


def test_evaluate_writes_its_files_and_prints_tables(run_dir, data, capsys):
    assert main(evaluate_arguments(run_dir, data)) == 0
    printed = capsys.readouterr().out
    folder = run_dir / "evaluation"
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["step"] == 7 and result["format"] == 1 and set(result["domains"]) == set(DOMAINS)
    assert (
        result["domains"]["law"]["documents"] == 6
        and result["domains"]["law"]["calibration_documents"] == 3
    )
    assert (folder / "subsets.png").read_bytes().startswith(PNG)
    markdown = (folder / "evaluation.md").read_text()
    increase = f"{result['mean']['increase_nats']['0.5']['selected']:+.3f}"
    assert increase in printed and increase in markdown and "4 of 9" in markdown
    assert sorted(path.name for path in folder.iterdir()) == [
        "evaluation.json",
        "evaluation.md",
        "subsets.csv",
        "subsets.png",
    ]
    rows = list(csv.DictReader((folder / "subsets.csv").open(newline="", encoding="utf-8")))
    assert {row["domain"] for row in rows} == {"", *DOMAINS}
    [half] = [
        row
        for row in rows
        if (row["domain"], row["share_kept"], row["arm"]) == ("law", "0.5", "random")
    ]
    losses = result["domains"]["law"]
    for column in ("loss_nats", "increase_nats", "standard_error_nats"):
        values = losses["subset_loss_nats" if column == "loss_nats" else column]["0.5"]
        assert float(half[column]) == values["random"]


def test_json_is_the_whole_of_stdout_and_the_same_as_the_file(run_dir, data, tmp_path, capsys):
    assert (
        main(
            evaluate_arguments(
                run_dir / "checkpoints/step-00000007",
                data,
                "--json",
                "--out",
                str(tmp_path / "out"),
            )
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out) == json.loads(
        (tmp_path / "out" / "evaluation.json").read_text()
    )
    assert not (run_dir / "evaluation").exists()


def test_evaluation_is_deterministic_and_does_not_depend_on_the_batch(run_dir, data, capsys):
    results = []
    for rows in ("1", "5", "5"):
        assert main(evaluate_arguments(run_dir, data, "--json", "--micro-batch", rows)) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[1] == results[2]
    for name in DOMAINS:
        assert results[0]["domains"][name]["loss_nats"] == pytest.approx(
            results[1]["domains"][name]["loss_nats"], rel=1e-6
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", "1.5"), "keep=1.5 is not a share"),
        (("--keep", "0"), "keep=0 is not a share"),
        (
            ("--calibration-documents", "7"),
            "domain 'code <b>&' has 6 train documents, 7 are needed; lower calibration_documents",
        ),
        (("--documents", "1"), "documents=1 gives no standard error"),
        (("--micro-batch", "-1"), "micro_batch=-1"),
    ],
)
def test_settings_that_cannot_be_are_one_line(run_dir, data, capsys, arguments, message):
    assert_refused(evaluate_arguments(run_dir, data, *arguments), message, capsys)
    assert not (run_dir / "evaluation").exists()


def test_missing_or_foreign_inputs_are_one_line(run_dir, data, tmp_path, capsys):
    assert_refused(evaluate_arguments(tmp_path, data), "no checkpoint here", capsys)
    assert_refused(evaluate_arguments(run_dir, tmp_path / "nothing"), "nothing", capsys)
    larger = write_data(tmp_path / "larger", vocab_size=65)
    assert_refused(
        evaluate_arguments(run_dir, larger),
        "has a vocabulary of 65 tokens, the model has model.vocab_size=64",
        capsys,
    )
    dense = write_run(tmp_path / "dense", model__experts__routed=0, model__experts__top_k=0)
    assert_refused(evaluate_arguments(dense, data), "the model is dense", capsys)


def test_data_of_another_tokenizer_is_refused(run_dir, tmp_path, capsys):
    """A vocabulary of the same size with other meanings would give numbers, wrong ones."""
    data = write_data(tmp_path / "set")
    (run_dir / "checkpoints/step-00000007/tokenizer.json").write_text(
        '{"model": {"vocab": {"a": 0}}}'
    )
    (data / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    assert_refused(
        evaluate_arguments(run_dir, data),
        "is not the tokenizer that the model was trained with",
        capsys,
    )
    (data / "tokenizer.json").write_text('{"model":{"vocab":{"a":0}},"version":"2"}')
    assert main(evaluate_arguments(run_dir, data)) == 0


def assert_refused(arguments, message, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert (
        message in printed.err
        and printed.err.startswith("error: ")
        and printed.err.count("\n") == 1
        and not printed.out
    )


def result_with(selected, random, cross_domain, error=0.01):
    """A result of one domain with these mean increases at half of the experts."""
    increase = {"0.5": ByArm(selected, random, cross_domain)}
    losses = {
        "loss_nats": 3.0,
        "subset_loss_nats": increase,
        "increase_nats": increase,
        "standard_error_nats": {"0.5": ByArm(error, error, error)},
    }
    return Measurement(
        settings=EvaluationSettings(keep=(0.5,)),
        experts=ExpertCounts(per_layer=(8,), shared=0, per_token=2, kept_per_layer={"0.5": (4,)}),
        domains={"law": DomainLosses(**losses, documents=9, targets=99, calibration_documents=8)},
        mean=SubsetLosses(**losses),
        routing=RoutingSummary((), None, (3.0,), 3.0),
    )


@pytest.mark.parametrize(
    ("increases", "said"),
    [
        (
            (0.01, 1.0, 1.0),
            ("stays what it was", "so it matters which experts stay", "special to their domains"),
        ),
        (
            (0.5, 0.51, 0.51),
            (
                "rises by 0.500 nats/token on average",
                "does not matter which experts stay",
                "not special to their domains",
            ),
        ),
        (
            (0.5, 0.1, 0.5),
            ("rises by 0.500", "the selection does harm here", "not modular by this measure"),
        ),
        ((-0.2, 0.0, 0.0), ("falls by 0.200", "so it matters", "special to their domains")),
    ],
)
def test_findings_follow_the_numbers_whichever_way_they_point(increases, said):
    sentences = findings(result_with(*increases))
    assert len(sentences) == 3
    for sentence, words in zip(sentences, said, strict=True):
        assert words in sentence


def test_an_increase_that_has_no_perplexity_is_still_told():
    assert "more than 100 million times" in findings(result_with(2000.0, 2001.0, None))[0]


def test_a_share_whose_losses_are_not_finite_is_a_dash_and_no_finding():
    result = result_with(None, None, None)
    assert findings(result) == []
    assert mean_table([("", result)]).rows[0] == ("4 of 8", "–", "–", "–", "–")
    assert subset_figure([("", result)]).startswith(PNG)
    assert subset_figure([("a", result), ("b", result)]).startswith(PNG)


def small_result(seed):
    random = np.random.default_rng(seed)
    documents = [np.append(random.integers(1, 60, 12), 0) for _ in range(8)]
    domains = {
        name: DomainDocuments(documents[:2], documents[i : i + 4])
        for i, name in enumerate(("a", "b"))
    }
    return measure(tiny_model(seed), domains, EvaluationSettings(keep=(1.0, 0.5, 0.25)), 16, 2)


def test_evaluations_are_compared_in_one_table_and_one_plot():
    evaluations = [("EMO", small_result(0)), ("standard", small_result(1))]
    table = mean_table(evaluations)
    assert subset_figure(evaluations).startswith(PNG)
    assert [row[:2] for row in table.rows] == [
        (label, f"{kept} of 9") for label in ("EMO", "standard") for kept in (9, 4, 2)
    ]
    assert table.rows[1][3].startswith(
        f"{evaluations[0][1].mean.increase_nats['0.5'].selected:+.3f}"
    )


def test_one_evaluation_needs_no_label():
    assert mean_table([("", small_result(0))]).header[0] == "experts kept"


def test_without_matplotlib_the_numbers_are_written_and_one_line_says_what_is_missing(
    run_dir, data, monkeypatch, caplog, capsys
):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation/subsets.png").write_bytes(b"the picture of other numbers")
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with caplog.at_level("WARNING"):
        assert main(evaluate_arguments(run_dir, data)) == 0
    assert "pip install 'emotrain[report]'" in caplog.text
    assert sorted(path.name for path in (run_dir / "evaluation").iterdir()) == [
        "evaluation.json",
        "evaluation.md",
        "subsets.csv",
    ]


def test_many_domains_fit_one_plot():
    documents = [np.arange(1, 14) for _ in range(4)]
    domains = {
        f"domain {i}": DomainDocuments(documents[:1], documents[1:])
        for i in range(plots.MAX_NAMED_LINES + 2)
    }
    result = measure(tiny_model(), domains, EvaluationSettings(keep=(0.5,), random_seeds=0), 16, 4)
    assert plots.subset_figure([("", result)]).startswith(PNG)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "examples: emotrain evaluate" in text and "as many experts at random" in text
    example = re.search(
        r"with (\d+) routed experts and (\d+) shared one, (\d+) in all, `--keep ([\d.]+)` "
        r"keeps (\d+) .*the shared one and the (\d+) routed",
        text,
    )
    assert example is not None, text
    routed, shared, everything, keep, kept, kept_routed = map(float, example.groups())
    config = tiny_config(model__experts__routed=int(routed), model__experts__shared=int(shared))
    assert experts_kept(config.model, keep) == (kept,) * config.model.num_layers
    assert everything == routed + shared and kept_routed == kept - shared
