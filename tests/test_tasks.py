"""`emotrain evaluate --tasks` on a small trained run: files, numbers, subsets, and what is
refused; and the commands of docs/tasks.md."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import shlex

import numpy as np
import pytest
import torch

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.data.answers import spaced
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.perplexity import pack
from emotrain.generation.loading import load_weights, open_generator
from emotrain.modular.select import greedy_select
from emotrain.tasks import evaluation
from emotrain.tasks.evaluation import evaluate_tasks
from emotrain.tasks.prompts import read_tasks
from emotrain.tasks.scoring import encode_texts
from emotrain.tasks.settings import TaskSettings
from emotrain.training import run as run_module
from tests.conftest import ROOT, WORDS, tiny_settings
from tests.processes import run_ranks
from tests.test_tasks_reading import write_lines


def some(rng, domain, count):
    return " ".join(rng.choice(WORDS[domain]) for _ in range(count))


def choice_lines(domain, count=12, split="test", seed=0):
    """Which words go on a domain's? Those of the same."""
    rng = random.Random(f"{domain} {split} {seed}")
    lines = []
    for _ in range(count):
        domains = rng.sample(sorted(WORDS), 3)
        lines.append(
            {
                "question": some(rng, domain, 4),
                "choices": [some(rng, one, rng.randint(1, 4)) for one in domains],
                "answer": domains.index(domain),
                "split": split,
            }
        )
    return lines


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    """A trained run, a subset, and a task of every kind."""
    folder = tmp_path_factory.mktemp("tasks")
    settings = tiny_settings(tiny_data, folder / "run")
    settings["data"]["sequence_length"] = 192
    settings["model"]["init_std"] = 0.3  # so that experts differ, and texts with them
    settings["training"]["seed"] = 1  # of which tasks choose different ones
    run_module.train(config_from_dict(settings), Ranks())
    options = ["--calibration", str(tiny_data), "--domain", "kitchen", "--keep", "4"]
    assert not main(["select", str(folder / "run"), *options, "--out", str(folder / "half.json")])
    for domain in ("kitchen", "harbour"):
        lines = [*choice_lines(domain), *choice_lines(domain, 6, "train")]
        write_lines(folder / f"{domain}.jsonl", *lines)
    rng = random.Random(1)
    answers = [
        {"question": some(rng, "garden", 3), "answers": [some(rng, "garden", 2), "bee"], "split": s}
        for s in ("train",) * 4 + ("test",) * 6
    ]
    write_lines(folder / "words.jsonl", *answers)
    texts = [
        {"text": some(rng, "garden", n), "split": s}
        for s, n in [("train", 30)] * 4 + [("test", 20), ("test", 90), ("test", 5)]
    ]
    write_lines(folder / "texts.jsonl", *texts)
    return folder


NAMES = ("kitchen", "harbour", "words", "texts")
OPTIONS = ["--shots", "2", "--keep", "0.5", "--calibration-documents", "3", "--random-seeds", "2"]


@pytest.fixture(scope="module")
def result(folder):
    """All kinds, all choices of experts, as written by the command."""
    files = [str(folder / f"{name}.jsonl") for name in NAMES]
    options = ["--subset", str(folder / "half.json"), "--out", str(folder / "out")]
    command = ["evaluate", str(folder / "run"), "--tasks", *files, *OPTIONS, *options]
    assert main([*command, "--answer-tokens", "24"]) == 0
    written = json.loads((folder / "out/tasks.json").read_text())
    written["lines"] = [
        json.loads(line) for line in (folder / "out/questions.jsonl").read_text().splitlines()
    ]
    return written


def score(result, task, experts):
    (found,) = [s for s in result["scores"] if (s["task"], s["experts"]) == (task, experts)]
    return found


def lines_of(result, task, experts="all experts"):
    return [one for one in result["lines"] if (one["task"], one["experts"]) == (task, experts)]


# ---- what is written


def test_everything_that_decides_a_number_is_recorded(result, folder):
    names = {
        *("format", "checkpoint", "checkpoint_fingerprint", "step", "tokenizer_fingerprint"),
        *("sequence_length", "settings", "tasks", "arms", "scores", "mean", "mean_refused"),
    }
    assert result.keys() - {"lines"} == names
    assert [task["name"] for task in result["tasks"]] == list(NAMES)
    kitchen = result["tasks"][0]
    assert (kitchen["questions"], kitchen["available"], kitchen["shots"]) == (12, 12, 2)
    assert (kitchen["examples"], kitchen["split"], kitchen["kind"]) == (6, "test", "choice")
    assert kitchen["headline"] == "accuracy_raw"
    assert kitchen["calibration"]["documents"] == 3 and kitchen["calibration"]["tokens"] > 0
    assert result["settings"]["seed"] == 0 and len(result["tokenizer_fingerprint"]) == 64
    assert [arm["name"] for arm in result["arms"]] == [
        "all experts",
        str(folder / "half.json"),
        "keep 0.5, own choice",
        "keep 0.5, random 0",
        "keep 0.5, random 1",
    ]
    assert [arm["kept"] for arm in result["arms"]] == ["8 of 8"] + ["4 of 8"] * 4


def test_numbers_are_those_of_the_lines(result):
    """Each metric again from what is recorded of each question."""
    for found in result["scores"]:
        lines = lines_of(result, found["task"], found["experts"])
        assert len(lines) == found["questions"] > 0
        for metric, number in found["metrics"].items():
            if metric == "bits_per_byte":
                nats, sizes = (sum(one[k] for one in lines) for k in ("gold_nats", "gold_bytes"))
                expected = nats / math.log(2) / sizes
            else:
                values = [one[metric] for one in lines]
                expected = sum(values) / len(values)
                error = np.std(values, ddof=1) / len(values) ** 0.5
                assert number["standard_error"] == pytest.approx(error)
            assert number["value"] == pytest.approx(expected)
        if found["task"] in ("kitchen", "harbour"):
            for one in lines:
                given = np.array(one["logprobs_nats"])
                alone = np.array(one["unconditional_logprobs_nats"])
                assert one["chosen"]["raw"] == int(given.argmax())
                assert one["chosen"]["unconditional"] == int((given - alone).argmax())
                assert one["gold_nats"] == -given[one["gold"]]
                assert one["accuracy_raw"] == float(one["chosen"]["raw"] == one["gold"])


def test_the_mean_is_over_tasks_each_with_the_same_weight(result):
    assert result["mean_refused"] is None
    of = {(mean["experts"], mean["metric"]): mean for mean in result["mean"]}
    for arm in result["arms"]:
        for metric, tasks in (
            ("accuracy_raw", NAMES[:2]),
            ("f1", NAMES[2:3]),
            ("bits_per_byte", NAMES),
        ):
            numbers = [score(result, task, arm["name"])["metrics"][metric] for task in tasks]
            mean = of[arm["name"], metric]
            assert mean["tasks"] == len(tasks)
            assert mean["value"] == pytest.approx(sum(n["value"] for n in numbers) / len(tasks))
            errors = sum(n["standard_error"] ** 2 for n in numbers) ** 0.5 / len(tasks)
            assert mean["standard_error"] == pytest.approx(errors)


def test_tables_and_csv_say_the_same(result, folder):
    rows = list(csv.DictReader((folder / "out/tasks.csv").open()))
    for row in rows:
        number = score(result, row["task"], row["experts"])["metrics"][row["metric"]]
        assert float(row["value"]) == number["value"]
        assert float(row["standard_error"]) == number["standard_error"]
    assert sum(int(row["is_headline"]) for row in rows) == len(result["scores"])
    assert {row["calibration_documents"] for row in rows} == {"0", "3"}
    page = (folder / "out/tasks.md").read_text()
    assert "headline: raw" in page and "Mean over tasks" in page and "NaN" not in page
    for found in result["scores"]:
        value = found["metrics"]["bits_per_byte"]["value"]
        assert f"{value:.3f} ± " in page


# ---- where the numbers come from


def test_a_task_chooses_its_experts_by_its_own_examples(result, folder):
    """One task at a time, by the function that `select` and `evaluate` use."""
    path, config, tokenizer = open_generator(folder / "run")
    model = load_weights(path, "cpu")
    files = [folder / f"{name}.jsonl" for name in NAMES]
    for task in read_tasks(files, TaskSettings(shots=2)):
        documents = [np.array(ids) for ids in encode_texts(tokenizer, task.calibration(3))]
        batches = pack(documents, config.data.sequence_length, 4)
        masks = greedy_select(model, batches, torch.zeros(3, dtype=torch.int64), 1, [4, 4])
        kept = score(result, task.name, "keep 0.5, own choice")["experts_kept_per_layer"]
        assert kept == [[*mask_JN[0].nonzero()[:, 0].tolist(), 7] for mask_JN in masks]
    chosen = {str(s["experts_kept_per_layer"]) for s in result["scores"] if "own" in s["experts"]}
    assert len(chosen) > 1


def test_a_file_of_select_gives_the_experts_that_it_names(result, folder):
    kept = json.loads((folder / "half.json").read_text())["experts_kept_per_layer"]
    for name in NAMES:
        assert score(result, name, str(folder / "half.json"))["experts_kept_per_layer"] == kept
        assert score(result, name, "all experts")["experts_kept_per_layer"] is None


def test_a_task_alone_gives_the_numbers_that_it_gives_among_others(result, folder):
    alone = evaluate_tasks(
        folder / "run",
        [folder / "harbour.jsonl"],
        TaskSettings(shots=2, keep=(0.5,), calibration_documents=3, random_seeds=0),
        micro_batch=1,
    )
    for name in ("all experts", "keep 0.5, own choice"):
        for metric, number in alone.score("harbour", name).metrics.items():
            expected = score(result, "harbour", name)["metrics"][metric]["value"]
            assert number.value == pytest.approx(expected, abs=1e-6)
    assert not alone.means and not alone.incomplete


def test_generated_answers_are_greedy_and_end_with_the_line(result, folder, capsys):
    """As `emotrain generate` goes on from the same prompt, with the same experts."""
    (task,) = read_tasks([folder / "words.jsonl"], TaskSettings(shots=2))
    prompts = [task.prompt(item) for item in task.questions]
    both = []
    for experts in ("all experts", str(folder / "half.json")):
        words = ["generate", str(folder / "run"), *prompts, "--max-tokens", "24", "--stop", "\n"]
        if experts != "all experts":
            words += ["--subset", experts]
        assert main([*words, "--json"]) == 0
        texts = [one["text"] for one in json.loads(capsys.readouterr().out)["generations"]]
        found = [one["answer"] for one in lines_of(result, "words", experts)]
        assert found == [text.strip() for text in texts]
        both.append(found)
    assert both[0] != both[1]


def test_a_model_that_knows_the_answers_is_always_right(folder, monkeypatch):
    """And one that knows another task's is right by chance alone."""
    (task,) = read_tasks([folder / "kitchen.jsonl"], TaskSettings())
    _, _, tokenizer = open_generator(folder / "run")
    gold = {
        ids
        for item in task.questions
        for ids in encode_texts(tokenizer, [spaced(item.prompt, item.answer)])
    }

    def knows(_model, pairs, *_, **__):
        found = [0.0 if pair.context + pair.continuation in gold else -9.0 for pair in pairs]
        return torch.tensor(found, dtype=torch.float64), torch.zeros(len(found), dtype=torch.bool)

    monkeypatch.setattr(evaluation, "log_probabilities", knows)
    files = [folder / "kitchen.jsonl", folder / "harbour.jsonl"]
    done = evaluate_tasks(folder / "run", files, TaskSettings())
    assert done.score("kitchen", "all experts").metrics["accuracy_raw"].value == 1
    golds = [answer.details["gold"] for answer in done.answers if answer.task == "harbour"]
    expected = golds.count(0) / len(golds)  # equal scores choose the first
    assert done.score("harbour", "all experts").metrics["accuracy_raw"].value == expected


# ---- what is refused


def test_a_mean_over_incomplete_parts_is_refused_by_name(folder, caplog, monkeypatch):
    files = [folder / "kitchen.jsonl", folder / "texts.jsonl"]
    cut = evaluate_tasks(folder / "run", files, TaskSettings(limit=3))
    reason = "kitchen has 3 of 12 questions (--limit)"
    assert cut.means == [] and cut.to_json()["mean_refused"] == reason
    assert f"no mean over tasks: {reason}" in caplog.text

    def broken(_model, pairs, *_, **__):
        found = torch.zeros(len(pairs), dtype=torch.float64)
        found[1] = math.nan  # a choice of the first question
        return found, found == 0

    monkeypatch.setattr(evaluation, "log_probabilities", broken)
    failed = evaluate_tasks(folder / "run", files, TaskSettings())
    assert failed.score("kitchen", "all experts").metrics == {}
    assert failed.score("texts", "all experts").metrics["bits_per_byte"].value == 0
    assert failed.incomplete == ["kitchen with all experts gave numbers that are not finite"]
    assert failed.means == []


def test_questions_that_do_not_fit_are_counted_and_answers_that_do_not_refused(folder, caplog):
    long = {"question": "salt " * 300, "choices": ["salt", "tide"], "answer": 0}
    write_lines(folder / "long.jsonl", long, {**long, "question": "salt"})
    done = evaluate_tasks(folder / "run", [folder / "long.jsonl"], TaskSettings())
    assert done.tasks[0].cut_prompts == 1 and [a.cut for a in done.answers] == [True, False]
    assert "1 of 2 questions are longer than the 192 tokens" in caplog.text
    write_lines(folder / "wide.jsonl", {**long, "choices": ["salt", "tide " * 300]})
    with pytest.raises(UserError, match=r"wide\.jsonl: line 1: an answer has \d+ tokens"):
        evaluate_tasks(folder / "run", [folder / "wide.jsonl"], TaskSettings())
    with pytest.raises(UserError, match="--answer-tokens 192 leaves no room"):
        evaluate_tasks(folder / "run", [folder / "words.jsonl"], TaskSettings(answer_tokens=192))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "give --data DIR, a prepared data set, or --tasks FILE"),
        ("--data D --shots 2", "--shots says nothing with --data"),
        ("--data D --subset half.json", "--subset says nothing with --data"),
        ("--data D --include-path .", "--include-path says nothing with --data"),
        ("--tasks kitchen.jsonl --data D", "--data says nothing with --tasks"),
        ("--tasks kitchen.jsonl --documents 3", "--documents says nothing with --tasks"),
        ("--tasks kitchen.jsonl --cross-domain all", "--cross-domain says nothing with --tasks"),
        ("--tasks kitchen.jsonl --document-tokens 9", "--document-tokens says nothing"),
        ("--tasks kitchen.jsonl --random-seeds 2", "--random-seeds says nothing with --tasks with"),
        ("parallel.ep=2 --tasks kitchen.jsonl", "parallel.ep=2 does not divide shard=1"),
        ("parallel.ep=2 --lm-eval a --include-path b", "parallel.ep=2 says nothing with --lm-eval"),
        ("--tasks kitchen.jsonl --lm-eval a", "give --tasks or --lm-eval"),
        ("--lm-eval a", "--lm-eval needs --include-path DIR"),
        ("--lm-eval a --include-path . --keep 0.5", "--keep says nothing with --lm-eval"),
        ("--lm-eval a --include-path . --split dev", "--split says nothing with --lm-eval"),
        ("--tasks none.jsonl", "none.jsonl: no such file of questions"),
        ("--tasks kitchen.jsonl --keep 0", "keep=0 is not a share of the experts"),
        ("--tasks kitchen.jsonl --subset kitchen.jsonl", "kitchen.jsonl: is not a usable subset"),
        ("--tasks kitchen.jsonl --subset half.json half.json", "half.json is given twice"),
        ("--tasks kitchen.jsonl --keep 0.5", "has 6 examples that are not asked, 8 are needed"),
        ("--tasks kitchen.jsonl --shots 7", "has 6 examples for"),
    ],
)
def test_options_that_cannot_be_are_one_line(folder, monkeypatch, capsys, words, line):
    monkeypatch.chdir(folder)
    assert main(["evaluate", "run", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and line in error and error.count("\n") == 1


def words_and_numbers(result):
    """What was chosen and generated, and every log probability."""
    words, numbers = [], []
    for one in result.answers:
        words.append((one.task, one.experts, one.line, one.details.get("chosen"), one.scores))
        words.append(one.details.get("answer"))
        of_choices = ("logprobs_nats", "unconditional_logprobs_nats")
        numbers += [one.gold_nats, *(n for name in of_choices for n in one.details.get(name, ()))]
    return words, numbers


def kept(result):
    return {(s.task, s.experts): s.experts_kept_per_layer for s in result.scores}


@pytest.mark.parametrize(
    "layouts",
    [
        {2: [["parallel.ep=2"]], 4: [["parallel.ep=2"]]},
        pytest.param({2: [[]], 3: [[]], 4: [[], ["parallel.replicate=4"]]}, marks=pytest.mark.long),
    ],
    ids=["expert parallel", "others"],
)
def test_answers_are_those_of_one_process(folder, layouts):
    """Of all kinds, also generated ones, with experts that tasks choose."""
    files = [folder / f"{name}.jsonl" for name in ("kitchen", "words", "texts")]
    settings = TaskSettings(
        shots=1, limit=3, keep=(0.5,), calibration_documents=3, random_seeds=0, answer_tokens=9
    )
    alone = evaluate_tasks(folder / "run", files, settings)
    words_alone, values_alone = words_and_numbers(alone)
    assert len({one.details["answer"] for one in alone.answers if one.task == "words"}) > 1

    def body(ranks):
        return [
            evaluate_tasks(folder / "run", files, settings, ranks=ranks, layout=layout)
            for layout in layouts[ranks.world_size]
        ]

    for world_size in layouts:
        for of_rank in run_ranks(body, world_size):
            for found in of_rank:
                assert kept(found) == kept(alone)
                words, values = words_and_numbers(found)
                assert words == words_alone
                assert values == pytest.approx(values_alone, rel=1e-6, abs=1e-6)


def test_a_mistake_ends_all_processes_in_one_line(folder):
    def body(ranks):
        with pytest.raises(UserError) as caught:
            evaluate_tasks(folder / "run", ["nothing.jsonl"], TaskSettings(), ranks=ranks)
        return str(caught.value)

    assert {*run_ranks(body, 2)} == {"nothing.jsonl: no such file of questions; give a JSONL file"}


def test_the_harness_on_several_processes_is_refused(folder, monkeypatch, capsys):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert main(["evaluate", str(folder / "run"), "--lm-eval", "a", "--include-path", "b"]) == 2
    assert "asks in one process, this is one of 2" in capsys.readouterr().err


# ---- the page


def test_every_command_of_the_page_runs(folder, tiny_data, tmp_path, monkeypatch, capsys):
    """As they are written, on a small run in place of the quickstart's. Commands in `sh` blocks
    need a package that tests do without."""
    page = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(folder / "run")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(tiny_data)
    for name, text in re.findall(r"`([a-z]+\.jsonl)`:\n\n```json\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(text)
    commands = [
        line
        for block in re.findall(r"^```\n(emotrain .*?)```", page, re.DOTALL | re.MULTILINE)
        for line in block.strip().splitlines()
    ]
    assert len(commands) >= 3
    for line in commands:
        name, *words = shlex.split(line)
        words = ["kitchen" if word == "rust" else word for word in words]
        assert name == "emotrain" and main(words) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (tmp_path / "runs/quickstart/evaluation/tasks.md").is_file()
