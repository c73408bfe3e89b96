"""`emotrain finetune` and `emotrain reinsert`, as a user goes: tune a subset on documents, on
answers, to a teacher; put it back; and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from emotrain.cli import main
from emotrain.config import config_from_dict, load_config, read_settings
from emotrain.data.answers import AnswerLoader
from emotrain.data.formats import Dataset
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.measure import evaluate
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.folders import read_manifest
from emotrain.modular.artefact import read_subset
from emotrain.subsets.extraction import extract
from emotrain.subsets.reinsertion import reinsert
from emotrain.subsets.selection import SelectSettings, select
from emotrain.subsets.tuning import RECIPE
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from tests.conftest import ROOT, run_command, tiny_settings
from tests.processes import run_ranks

SMALL = ("training.global_batch=4", "training.micro_batch=4", "training.tensorboard=false")
"""Settings that the tests take in place of the recipe's."""


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """A trained run of two layers of 7 routed experts and a shared one."""
    folder = tmp_path_factory.mktemp("run")
    run_module.train(config_from_dict(tiny_settings(tiny_data, folder)), Ranks())
    return find(folder)


@pytest.fixture(scope="module")
def subset(run, tiny_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("subset")
    chosen = select(run, tiny_data, SelectSettings(keep="4,5", domain="kitchen", documents=8))
    return chosen.save(folder / "it.json")


@pytest.fixture(scope="module")
def small(run, subset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "small"
    return extract(run, subset, folder).path


def asked(capsys, *words) -> dict:
    """What a command reports with --json."""
    assert main([*map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *words) -> str:
    """The one line with which a command is refused."""
    assert main([*map(str, words)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_model(find(checkpoint))[1].named_parameters()}


def hashes(checkpoint: Path) -> dict[str, str]:
    """sha256 of the files of weights."""
    entries = read_manifest(checkpoint, (2,), ())
    return {name: e.sha256 for name, e in entries.items() if name.startswith("model-")}


# ---- finetune


def test_the_recipe_is_the_committed_configuration():
    assert read_settings(ROOT / "configs/finetune.yaml") == RECIPE


def test_a_subset_is_tuned_on_its_domain_for_an_epoch(small, tiny_data, tmp_path, capsys):
    result = asked(
        capsys, "finetune", small, "--data", tiny_data, "--domain", "kitchen", "--train", "router",
        "--epochs", "0.5", "--out", tmp_path / "tuned", *SMALL, "optimizer.lr=1e-2",
    )  # fmt: skip
    config = load_config(tmp_path / "tuned/config.yaml")
    tokens = Dataset(tiny_data).domains["train"]["kitchen"]["tokens"]
    assert result["step"] == -(-(tokens // 32) // 8), "half of its sequences, four a step"
    assert config.optimizer.warmup_share == 0.1 and config.optimizer.lr == 0.01
    assert config.model == load_model(small)[0].model and config.data.domain == "kitchen"
    before, after = tensors(small), tensors(tmp_path / "tuned")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "router" in name}
    # The same command has nothing left to do.
    again = asked(
        capsys, "finetune", small, "--data", tiny_data, "--domain", "kitchen", "--train", "router",
        "--epochs", "0.5", "--out", tmp_path / "tuned", *SMALL, "optimizer.lr=1e-2",
    )  # fmt: skip
    assert again["step"] == result["step"] and not again["metrics"]


def test_experts_of_a_subset_are_tuned_in_the_full_model(run, subset, tiny_data, tmp_path, capsys):
    asked(
        capsys, "finetune", run, "--data", tiny_data, "--experts", subset, "--steps", 2,
        "--out", tmp_path / "tuned", *SMALL, "optimizer.lr=1e-2",
    )  # fmt: skip
    before, after = tensors(run), tensors(tmp_path / "tuned")
    for name, tensor in before.items():
        if ".moe.experts." not in name:
            assert torch.equal(tensor, after[name]), name
            continue
        kept = list(read_subset(subset).routed(int(name.split(".")[1])))
        others = [i for i in range(7) if i not in kept]
        assert torch.equal(tensor[others], after[name][others])
        assert not torch.equal(tensor[kept], after[name][kept])


def test_a_subset_learns_from_the_full_model(run, small, tiny_data, tmp_path, capsys):
    result = asked(
        capsys, "finetune", small, "--data", tiny_data, "--teacher", run, "--steps", 2,
        "--train", "router,shared", "--temperature", 2, "--out", tmp_path / "tuned", *SMALL,
        "losses.balance=0", "optimizer.lr=1e-1",
    )  # fmt: skip
    # The divergence alone, far below the cross entropy of the labels.
    assert 0 < result["metrics"]["loss"] < 0.1 < result["metrics"]["cross_entropy"]
    assert load_config(tmp_path / "tuned/config.yaml").finetune.temperature == 2


def test_documents_of_a_file_are_prepared_with_the_models_tokenizer(small, tmp_path, capsys):
    file = tmp_path / "documents.jsonl"
    file.write_text('{"text": "bread salt oven butter knead rise flour crust bake slice"}\n' * 60)
    for _ in range(2):  # the second time the run goes on with what is prepared
        asked(
            capsys, "finetune", small, "--data", file, "--steps", 1, "--out", tmp_path / "tuned",
            *SMALL,
        )  # fmt: skip
    prepared = Dataset(tmp_path / "tuned/data")
    assert prepared.num_documents("train") == 60
    assert prepared.tokenizer().to_json() == (small / "tokenizer.json").read_text()


# ---- answers


@pytest.fixture
def answers(tmp_path) -> Path:
    file = tmp_path / "answers.jsonl"
    lines: list[dict] = [
        {"prompt": "bread or salt?", "answer": "bread"},
        {"question": "tide or sail? ", "choices": ["tide", "sail"], "answer": 1},
        {"prompt": "anchor " * 40, "answer": "mast"},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return file


def test_answers_alone_have_a_loss(answers, small):
    from emotrain.data.tokenizer import load_tokenizer

    loader = AnswerLoader(answers, small / "tokenizer.json", 32, seed=3)
    tokenizer = load_tokenizer(small / "tokenizer.json")
    batch = loader.batch(range(6))
    assert batch.tokens_BS.shape[1] == 32 and batch.has_padding
    found: dict[int, tuple[str, str]] = {}
    for row in range(6):
        document = batch.document_BS[row, 0]
        size = int((batch.document_BS[row] == document).sum())
        targets = batch.targets_BS[row]
        learned = targets >= 0
        # What is predicted is what comes next, up to EOS, and nothing of the prompt.
        assert torch.equal(targets[learned], batch.tokens_BS[row, 1:][learned[:-1]])
        first = int(learned.nonzero()[0]) + 1
        assert learned[first - 1 : size - 1].all() and not learned[size - 1 :].any()
        assert int(batch.tokens_BS[row, size - 1]) == tokenizer.eos_id
        ids = batch.tokens_BS[row].tolist()
        number = int(batch.document_ids_G[document])
        found[number] = tokenizer.decode(ids[:first]), tokenizer.decode(ids[first : size - 1])
    assert found[0] == ("bread or salt?", " bread")
    assert found[1] == ("tide or sail? ", "sail")
    assert found[2][1] == "mast" and found[2][0] == ("anchor " * 40)[-len(found[2][0]) :]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"prompt": "a", "answer": ""}', "line 1 is not a prompt with its answer .its answer is"),
        ('{"answer": "b"}', "line 1 is not a prompt"),
        ('{"question": "a", "choices": ["b"], "answer": 1}', "there is no choice 1"),
        ('{"question": "a", "choices": 3, "answer": 0}', "line 1 is not a prompt"),
        ('{"prompt": ["a"], "answer": "b"}', "its prompt is no text"),
    ],
)
def test_a_broken_pair_is_named_with_its_line(line, fault, small, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=fault):
        AnswerLoader(file, small / "tokenizer.json", 32, seed=0)


def as_ranks(monkeypatch, *words) -> list[int]:
    """Exit codes of a command as two processes of a launcher."""
    # The group is the test's, which leaves it.
    monkeypatch.setattr(Ranks, "__exit__", lambda *_: None)

    def run(ranks: Ranks) -> int:
        known = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "0"}
        os.environ |= {**known, "RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.world_size)}
        return main(list(map(str, words)))

    return run_ranks(run, 2)


def check_as_one(one: Path, two: Path, begun: Path) -> None:
    alone, together = tensors(one), tensors(two)
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, together[name], rtol=0, atol=2e-4, msg=name)
    assert not torch.equal(alone["head.weight"], tensors(begun)["head.weight"])


def test_two_processes_tune_as_one(small, answers, tmp_path, capsys, monkeypatch):
    words = ("finetune", small, "--data", answers, "--steps", 3, *SMALL, "optimizer.lr=1e-2")
    asked(capsys, *words, "--out", tmp_path / "one")
    two = (*words, "training.micro_batch=2", "--out", tmp_path / "two")
    assert as_ranks(monkeypatch, *two) == [0, 0]
    check_as_one(tmp_path / "one", tmp_path / "two", small)


def test_documents_are_prepared_by_one_process(small, tmp_path, capfd, monkeypatch):
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(f'{{"text": "the oven and pot {i}"}}\n' for i in range(60)))
    words = ("finetune", small, "--data", documents, "--steps", 1, "--out", tmp_path / "tuned")
    words = (*words, *SMALL, "training.micro_batch=2")
    assert as_ranks(monkeypatch, *words) == [2, 2]
    assert "with --only-config first" in capfd.readouterr().err
    assert not (tmp_path / "tuned").exists()
    monkeypatch.undo()
    assert main([*map(str, words), "--only-config"]) == 0
    assert as_ranks(monkeypatch, *words) == [0, 0]
    assert find(tmp_path / "tuned").name.endswith("1")


@pytest.mark.long
def test_torchrun_tunes_as_one_process(small, tiny_data, tmp_path, capsys):
    words = ("finetune", small, "--data", tiny_data, "--domain", "kitchen", "--steps", 3, *SMALL)
    words = (*words, "--train", "routed,head", "optimizer.lr=1e-2")
    asked(capsys, *words, "--out", tmp_path / "one")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    two = ("-m", "emotrain", *map(str, words), "training.micro_batch=2", "--json")
    done = run_command(
        *launcher, *two, "--out", tmp_path / "two", env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["step"] == 3
    check_as_one(tmp_path / "one", tmp_path / "two", small)


# ---- reinsert


def test_an_untouched_subset_changes_no_bit(run, small, subset, tmp_path, capsys):
    for number, parts in enumerate(("routed", "all")):
        result = asked(
            capsys, "reinsert", run, small, subset, "--parts", parts,
            "--out", tmp_path / f"{number}",
        )  # fmt: skip
        assert result["changed_tensors"] == 0
        assert hashes(tmp_path / f"{number}") == hashes(run)


@pytest.mark.long
def test_it_keeps_the_files_of_any_layout(run, subset, small, tiny_data, tmp_path):
    """Of four ranks, whose experts FSDP2 cuts along their hidden width."""
    made = tiny_settings(tiny_data, tmp_path / "four", micro_batch=1, steps=1)
    made["parallel"], made["finetune"] = {"ep": 2}, {"start": str(run), "train": "norms"}
    run_ranks(lambda ranks: run_module.train(config_from_dict(made), ranks), 4)
    four = find(tmp_path / "four")
    own = select(four, tiny_data, SelectSettings(keep="4")).save(tmp_path / "four.json")
    extracted = extract(four, own, tmp_path / "extracted").path
    done = reinsert(four, extracted, own, tmp_path / "back", parts="all")
    assert len(hashes(four)) == 4 and hashes(done.path) == hashes(four)


@pytest.fixture(scope="module")
def tuned(small, tiny_data, tmp_path_factory) -> Path:
    """The subset, all of it tuned."""
    folder = tmp_path_factory.mktemp("tuned")
    words = ["finetune", small, "--data", tiny_data, "--steps", 2, "--out", folder, *SMALL]
    measured = [
        "evaluation.every=2",
        "evaluation.documents=2",
        "evaluation.calibration_documents=1",
    ]
    assert main([*map(str, words), "optimizer.lr=1e-2", *measured]) == 0
    return find(folder)


def test_tuning_is_evaluated_as_training_is(tuned, tiny_data):
    lines = (tuned.parent.parent / "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line).get("evaluation/loss_nats") for line in lines]
    wanted = evaluate(tuned, tiny_data, EvaluationSettings(documents=2, calibration_documents=1))
    assert measured == [wanted.mean.loss_nats]


@pytest.mark.parametrize(
    ("parts", "blend"), [("routed", 0.25), ("router,shared", 1.0), ("trunk", 1.0)]
)
def test_what_was_tuned_comes_back_to_its_place(parts, blend, run, tuned, subset, tmp_path, capsys):
    result = asked(
        capsys, "reinsert", run, tuned, subset, "--out", tmp_path / "back", "--parts", parts,
        "--blend", blend,
    )  # fmt: skip
    full, small, back = tensors(run), tensors(tuned), tensors(tmp_path / "back")
    chosen = {"trunk": ("attention", "norm", "embedding", "head")}.get(
        parts, ("experts",) if parts == "routed" else ("router", "shared")
    )
    changed = set()
    for name, tensor in full.items():
        expected = tensor.clone()
        if any(word in name for word in chosen) and not ("moe." in name and parts == "trunk"):
            rows: list | slice = slice(None)
            if ".moe." in name and "shared" not in name:
                layer = int(name.split(".")[1])
                of = read_subset(subset)
                router = "router" in name
                rows = list(of.experts_kept_per_layer[layer] if router else of.routed(layer))
            mixed = small[name] if blend == 1 else tensor[rows].lerp(small[name], blend)
            expected[rows] = mixed
        assert torch.equal(back[name], expected), name
        if not torch.equal(expected, tensor):
            changed.add(name)
    assert set(result["changed_tensor_names"]) == changed and result["changed_tensors"] > 0
    assert result["changed_parameters"] == sum(
        int((back[name] != full[name]).sum()) for name in changed
    )


def test_it_says_what_every_domain_has_lost(run, tuned, subset, tiny_data, tmp_path, capsys):
    result = asked(
        capsys, "reinsert", run, tuned, subset, "--out", tmp_path / "back", "--data", tiny_data,
        "--documents", 4,
    )  # fmt: skip
    assert set(result["domains"]) == {"garden", "harbour", "kitchen"}
    settings = EvaluationSettings(keep=(1.0,), documents=4, document_tokens=512)
    told = {
        "before": evaluate(run, tiny_data, settings),
        "after": evaluate(tmp_path / "back", tiny_data, settings),
    }
    for domain, change in result["domains"].items():
        for name in told:
            loss = told[name].domains[domain].loss_nats
            assert change[f"{name}_nats"] == pytest.approx(loss, abs=1e-5)
        assert change["change_nats"] == pytest.approx(
            change["after_nats"] - change["before_nats"], abs=1e-9
        )
        assert change["standard_error_nats"] >= 0 and change["documents"] == 4
    assert main(
        ["reinsert", str(run), str(tuned), str(subset), "--out", str(tmp_path / "text"),
         "--data", str(tiny_data), "--documents", "2"]
    ) == 0  # fmt: skip
    assert "kitchen" in capsys.readouterr().out


# ---- mistakes


def test_mistakes_are_one_line_and_nothing_is_written(
    run, small, tuned, subset, tiny_data, tmp_path, capsys
):
    out = tmp_path / "out"
    other = select(run, tiny_data, SelectSettings(keep="3")).save(tmp_path / "other.json")
    tune = ("finetune", small, "--out", out, "--data")
    back = ("reinsert", run, tuned, subset, "--out", out)
    for words, fault in (
        ((*tune, "nowhere"), "nowhere: no such data"),
        ((*tune, tiny_data, "--domain", "sea"), "has no train documents of domain 'sea'"),
        ((*tune, tiny_data, "--train", "gate"), "'gate' is no part of a model"),
        ((*tune, tiny_data, "--experts", subset), "give the checkpoint it was selected from"),
        ((*tune, tiny_data, "--experts", "5"), "layer 0 has routed experts 0 to 2"),
        ((*tune, tiny_data, "--teacher", "nowhere"), "nowhere: no checkpoint here"),
        ((*tune, tiny_data, "--epochs", "0"), "epochs=0.0, steps=0: give a positive number"),
        ((*tune, tiny_data, "--steps", "3", "optimizer.rate=1"), "optimizer.rate is not a setting"),
        ((*back, "--parts", "gate"), "'gate' is no part of a model"),
        ((*back, "--blend", "0"), "blend=0.0 is the share"),
        (("reinsert", run, tuned, other, "--out", out), "is not the model of this subset"),
        (("reinsert", small, tuned, subset, "--out", out), "was selected from"),
        (("reinsert", run, run, subset, "--out", out), "is not the model of this subset"),
        (("reinsert", run, tuned, subset, "--out", tiny_data), "exists"),
        ((*back, "--data", "nowhere"), "nowhere"),
    ):
        assert fault in refused(capsys, *words), words
        assert not out.exists(), words
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    line = refused(capsys, "finetune", small, "--data", tiny_data, "--steps", 1, "--out", small)
    assert "is a checkpoint, which a run would spoil" in line
    assert before == {path.name: path.read_bytes() for path in small.iterdir()}
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"title": "no text"}\n')
    assert main([*map(str, tune), str(empty)]) == 2
    assert "no train documents in 1 files" in capsys.readouterr().err and not out.exists()


def test_a_model_without_a_tokenizer_is_tuned_on_tokens_alone(
    small, tiny_data, answers, tmp_path, capsys
):
    bare = shutil.copytree(small, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    manifest = json.loads((bare / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (bare / "manifest.json").write_text(json.dumps(manifest))
    words = ("finetune", bare, "--steps", 1, "--out", tmp_path / "tuned", *SMALL, "--data")
    assert "has no tokenizer.json" in refused(capsys, *words, answers)
    assert asked(capsys, *words, tiny_data)["step"] == 1


def test_a_plan_refuses_what_it_cannot_count(run, capsys):
    line = refused(
        capsys, "plan", ROOT / "configs/quickstart.yaml", "--gpus-per-node", 1,
        f"finetune.teacher={run}",
    )  # fmt: skip
    assert "a plan knows no second model" in line
