"""lm-eval on a checkpoint. By default with a stand-in for its package, which has what is used of
it; the long test makes an environment with the real one, and compares question by question."""

from __future__ import annotations

import abc
import csv
import json
import os
import random
import site
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.generation.sampling import Sampling
from emotrain.tasks.arms import fixed_arms
from emotrain.tasks.evaluation import evaluate_tasks
from emotrain.tasks.harness import harness_model, sampling_of
from emotrain.tasks.prompts import read_tasks
from emotrain.tasks.scoring import encode_pairs, log_probabilities
from emotrain.tasks.session import open_session
from emotrain.tasks.settings import TaskSettings
from emotrain.training import run as run_module
from tests.conftest import ROOT, WORDS, tiny_settings
from tests.test_tasks_reading import write_lines

VERSION = "0.4.13"


class TemplateLM(abc.ABC):
    """What `lm_eval.api.model.TemplateLM` asks of a model; the long test compares the names."""

    tokenizer = None

    @property
    @abc.abstractmethod
    def eot_token_id(self): ...

    @abc.abstractmethod
    def tok_encode(self, string, add_special_tokens=None, **kwargs): ...

    @abc.abstractmethod
    def _loglikelihood_tokens(self, requests, **kwargs): ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests, disable_tqdm=False): ...

    @abc.abstractmethod
    def generate_until(self, requests, disable_tqdm=False): ...

    def loglikelihood(self, requests, disable_tqdm=False):
        """Encodes each pair, one with an empty context after the end-of-document token."""
        found = []
        for context, continuation in (request.args for request in requests):
            ids = self.tok_encode(context + continuation)
            before = self.tok_encode(context.rstrip())
            after = ids[len(before) :]
            found.append(((context, continuation), before or [self.eot_token_id], after))
        return self._loglikelihood_tokens(found, disable_tqdm=disable_tqdm)


def harness_standin() -> ModuleType:
    """The package: one task, whose questions are asked of the model that it gets."""
    package, api, model, tasks = map(
        ModuleType, ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")
    )
    model.TemplateLM = TemplateLM
    tasks.TaskManager = lambda **options: SimpleNamespace(
        all_tasks=sorted(path.stem for path in Path(options["include_path"]).glob("*.yaml"))
    )

    def simple_evaluate(model, tasks, limit, **_):
        pairs = [asked("the bread", " and salt"), asked("the tide", " and sail")][:limit]
        values = [logprob for logprob, _ in model.loglikelihood(pairs)]
        numbers = {"alias": tasks[0], "acc,none": sum(values), "acc_stderr,none": "N/A"}
        samples = [{"doc_id": i, "resps": [[v, {1}]]} for i, v in enumerate(values)]
        return {
            "results": {tasks[0]: numbers},
            "n-samples": {tasks[0]: {"original": 2, "effective": len(pairs)}},
            "samples": {tasks[0]: samples},
        }

    package.simple_evaluate = simple_evaluate
    package.__version__ = VERSION
    return {one.__name__: one for one in (package, api, model, tasks)}


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def some(rng, domain, count):
    return " ".join(rng.choice(WORDS[domain]) for _ in range(count))


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    settings = tiny_settings(tiny_data, folder / "run")
    settings["data"]["sequence_length"] = 128
    settings["model"]["init_std"] = 0.3  # so that experts differ, and texts with them
    run_module.train(config_from_dict(settings), Ranks())
    options = ["--calibration", str(tiny_data), "--domain", "kitchen", "--keep", "0.5"]
    assert not main(["select", str(folder / "run"), *options, "--out", str(folder / "half.json")])
    rng = random.Random(0)
    texts = [{"text": some(rng, "garden", count)} for count in (70, 3, 20)]
    write_lines(folder / "texts.jsonl", *texts)
    return folder


@pytest.fixture(scope="module")
def session(folder):
    return open_session(folder / "run", "cpu")


@pytest.fixture
def models(folder, session, monkeypatch):
    """As the harness gets them, with all experts and with a subset; and their arms."""
    for name, module in harness_standin().items():
        monkeypatch.setitem(sys.modules, name, module)
    path, running = session
    arms = fixed_arms([str(folder / "half.json")], path, running.config)
    return [(harness_model(running, arm, "print"), arm) for arm in arms]


def test_log_probabilities_are_those_of_our_own_reader(session, models):
    _, running = session
    texts = [("the bread", " and salt"), ("the  ", "tide"), ("sail", " " + "drift " * 40)]
    for model, arm in models:
        expected_U, greedy_U = log_probabilities(
            running.model, encode_pairs(running.tokenizer, texts), 128, 4, arm.masks
        )
        found = model.loglikelihood([asked(*pair) for pair in texts])
        assert found == list(zip(expected_U.tolist(), greedy_U.tolist(), strict=True))
        ((empty, _),) = model.loglikelihood([asked("", "salt")])
        ((eos, _),) = model._loglikelihood_tokens(
            [(("", ""), [running.tokenizer.eos_id], model.tok_encode("salt"))]
        )
        assert empty == eos < 0
    assert models[0][0].loglikelihood([asked("a", " b")]) != models[1][0].loglikelihood(
        [asked("a", " b")]
    )
    assert (model.max_length, model.tokenizer_name) == (128, "print")


def test_texts_have_the_bits_of_our_own_reader(folder, models):
    settings = TaskSettings(subsets=(str(folder / "half.json"),))
    ours = evaluate_tasks(folder / "run", [folder / "texts.jsonl"], settings)
    (task,) = read_tasks([folder / "texts.jsonl"], settings)
    for model, arm in models:
        found = model.loglikelihood_rolling([asked(item.answer) for item in task.questions])
        expected = [-a.gold_nats for a in ours.answers if a.experts == arm.name]
        assert found == pytest.approx(expected, abs=1e-4)


def test_texts_go_on_as_those_of_generate(folder, models, capsys):
    prompts = ["Question: root soil hedge\nAnswer:", "the bread and", "the tide and the", "seed"]
    options = [{"until": ["s"], "max_gen_toks": 6}, {"until": "z", "max_gen_toks": 24}]
    texts = []
    for model, arm in models:
        subset = [] if arm.masks is None else ["--subset", arm.file]
        for option in options:
            found = model.generate_until([asked(prompt, option) for prompt in prompts])
            stop = ["--stop", *option["until"], "--max-tokens", str(option["max_gen_toks"])]
            words = ["generate", str(folder / "run"), *prompts, *stop, *subset, "--json"]
            assert main(words) == 0
            answers = json.loads(capsys.readouterr().out)["generations"]
            assert found == [answer["text"] for answer in answers]
        texts.append(found)
    assert texts[0] != texts[1]
    assert len(model.generate_until([asked("", {"max_gen_toks": 4})])) == 1
    # Of a prompt that is too long the start has no part in the answer, and the end has.
    long = [
        " ".join(words) for words in (["salt"] * 200, ["tide"] + ["salt"] * 200, ["tide"] * 200)
    ]
    first, same, other = model.generate_until([asked(one, {"max_gen_toks": 24}) for one in long])
    assert first == same != other
    with pytest.raises(UserError, match="an answer of 128 tokens leaves no room"):
        model.generate_until([asked("a", {"max_gen_toks": 128})])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Sampling(max_tokens=256)),
        ({"until": "\n", "do_sample": False, "temperature": 0.7}, Sampling(256, stop=("\n",))),
        ({"until": ["a", "b"], "temperature": 0.0}, Sampling(256, stop=("a", "b"))),
        ({"do_sample": True, "max_gen_toks": 5}, Sampling(5, temperature=1.0)),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 3}, Sampling(256, 0.5, 3, 0.9)),
    ],
)
def test_what_a_task_asks_of_an_answer(options, expected):
    assert sampling_of(options) == expected


def test_what_is_not_known_of_an_answer_is_refused():
    with pytest.raises(UserError, match="have num_beams, which is not known here"):
        sampling_of({"num_beams": 4})


def test_the_command_writes_what_the_harness_found(folder, models, capsys):
    (folder / "yaml").mkdir(exist_ok=True)
    (folder / "yaml" / "meals.yaml").write_text("task: meals")
    words = ["--lm-eval", "meals", "--include-path", str(folder / "yaml"), "--limit", "1"]
    words += ["--subset", str(folder / "half.json"), "--out", str(folder / "out")]
    command = ["evaluate", str(folder / "run"), *words]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((folder / "out/lm_eval.csv").open()))
    lines = (folder / "out/lm_eval_questions.jsonl").read_text().splitlines()
    for (model, arm), found, row, line in zip(models, result["scores"], rows, lines, strict=True):
        ((logprob, _),) = model.loglikelihood([asked("the bread", " and salt")])
        assert found == {
            **{"experts": arm.name, "task": "meals", "metric": "acc", "filter": "none"},
            **{"value": logprob, "standard_error": None, "questions": 1},
        }
        assert float(row["value"]) == logprob and json.loads(line)["experts"] == arm.name
    assert result["limit"] == 1 and len(result["arms"]) == 2
    assert main(command) == 0
    assert "meals" in capsys.readouterr().out
    assert "| meals |" in (folder / "out/lm_eval.md").read_text()


def test_what_is_missing_is_one_line(folder, models, monkeypatch, capsys):
    (folder / "empty").mkdir(exist_ok=True)
    command = ["evaluate", str(folder / "run"), "--lm-eval", "other", "--include-path"]
    for place, line in (
        ("none", "no such folder of tasks"),
        ("empty", "no such task, it has none"),
    ):
        assert main([*command, str(folder / place)]) == 2
        assert line in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main([*command, str(folder / "empty")]) == 2
    error = capsys.readouterr().err
    assert "needs the package lm-eval" in error and error.count("\n") == 1


# ---- the real package


def environment(folder: Path) -> Path:
    """A Python with lm-eval and what it needs, on top of this one, whose torch stays. Skips the
    test where packages cannot be had."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    ask = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    packages = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    Path(packages, "below.pth").write_text("\n".join([str(ROOT), *site.getsitepackages()]))
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"lm-eval=={VERSION}"],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if done.returncode and "No matching distribution found for" in done.stderr:
        pytest.skip(f"lm-eval: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return python


def questions(count: int, split: str, seed: int) -> list[dict]:
    rng, lines = random.Random(seed), []
    for _ in range(count):
        domains = rng.sample(sorted(WORDS), 3)
        choices = [some(rng, one, rng.randint(1, 5)) for one in domains]
        answer = rng.randrange(3)
        lines.append(
            {
                "question": some(rng, domains[answer], rng.randint(2, 30)),
                "choices": choices,
                "answer": answer,
                "split": split,
            }
        )
    return lines


YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}, train: {train}}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: {shots}
output_type: {output}
doc_to_text: "{prompt}"
doc_to_target: "{target}"
"""
ASKED = "Question: {{question}}\\nAnswer:"


def write_yaml(folder, name, output, target, shots=0, prompt=ASKED, more=""):
    text = YAML.format(
        name=name,
        test=folder / f"{name}-test.jsonl",
        train=folder / f"{name}-train.jsonl",
        shots=shots,
        output=output,
        prompt=prompt,
        target=target,
    )
    (folder / "yaml").mkdir(exist_ok=True)
    (folder / "yaml" / f"{name}.yaml").write_text(text + more)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_real_harness_agrees_on_every_question(folder, tmp_path):
    """500 questions with choices after two examples, 40 generated answers and some texts, with all
    experts and with a subset."""
    python = environment(tmp_path / "environment")
    run = {"cwd": tmp_path, "env": {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}}

    def answer(*words: str) -> str:
        done = subprocess.run(
            [python, *map(str, words)], capture_output=True, text=True, timeout=1800, **run
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stdout

    names = "import lm_eval.api.model as m; print(sorted(m.TemplateLM.__abstractmethods__))"
    assert answer("-c", names).strip() == str(sorted(TemplateLM.__abstractmethods__))
    assert answer("-c", "import torch; print(torch.__version__)").strip() == torch.__version__

    rng = random.Random(2)
    files = {
        "choices": [*questions(500, "test", 0), *questions(4, "train", 1)],
        "words": [
            {"question": some(rng, "garden", 3), "answer": some(rng, "garden", 2), "split": "test"}
            for _ in range(40)
        ],
        "texts": [{"text": some(rng, "harbour", n), "split": "test"} for n in (70, 3, 20, 150)],
    }
    for name, lines in files.items():
        write_lines(tmp_path / f"{name}.jsonl", *lines)
        (task,) = read_tasks([tmp_path / f"{name}.jsonl"], TaskSettings())
        # The harness takes the first examples of a file: those that come first in our order.
        shots = [lines[item.line - 1] for item in task.examples] or lines[:1]
        write_lines(tmp_path / f"{name}-train.jsonl", *shots)
        write_lines(tmp_path / f"{name}-test.jsonl", *(r for r in lines if r["split"] == "test"))
    write_yaml(
        *(tmp_path, "choices", "multiple_choice", "{{answer}}", 2),
        more='doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
    )
    write_yaml(
        *(tmp_path, "words", "generate_until", "{{answer}}"),
        more='generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\n',
    )
    write_yaml(
        *(tmp_path, "texts", "loglikelihood_rolling", "{{text}}", 0, ""),
        more="metric_list: [{metric: bits_per_byte}]\n",
    )
    common = [folder / "run", "--subset", folder / "half.json", "--out", tmp_path / "out", "--json"]
    include = ["--lm-eval", *files, "--include-path", tmp_path / "yaml"]
    theirs = json.loads(answer("-m", "emotrain.cli", "evaluate", *common, *include))
    ours = {
        name: evaluate_tasks(
            folder / "run",
            [tmp_path / f"{name}.jsonl"],
            TaskSettings(shots=2 * (name == "choices"), answer_tokens=8, subsets=(str(common[2]),)),
        )
        for name in files
    }
    samples = [
        json.loads(line)
        for line in (tmp_path / "out/lm_eval_questions.jsonl").read_text().splitlines()
    ]
    for experts in ("all experts", str(folder / "half.json")):
        compare(experts, samples, ours, theirs)


def compare(experts, samples, ours, theirs) -> None:
    def of(task):
        theirs = [one for one in samples if (one["experts"], one["task"]) == (experts, task)]
        answers = [one for one in ours[task].answers if one.experts == experts]
        return zip(sorted(theirs, key=lambda one: one["doc_id"]), answers, strict=True)

    found = {
        (one["task"], one["metric"]): one["value"]
        for one in theirs["scores"]
        if one["experts"] == experts
    }
    for sample, own in of("choices"):
        assert sample["acc"] == own.scores["accuracy_raw"]
        assert sample["acc_norm"] == own.scores["accuracy_per_char"]
    for name, metric in (("raw", "acc"), ("per_char", "acc_norm")):
        number = ours["choices"].score("choices", experts).metrics[f"accuracy_{name}"]
        assert number.value == pytest.approx(found["choices", metric], abs=1e-12)
    for sample, own in of("words"):
        assert sample["resps"][0][0].strip() == own.details["answer"]
    bits = ours["texts"].score("texts", experts).metrics["bits_per_byte"].value
    assert bits == pytest.approx(found["texts", "bits_per_byte"], abs=1e-6)
