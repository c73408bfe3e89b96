"""From a checkpoint to one with experts for a domain and back, as a user goes: what new experts
begin as, training them alone, what other domains notice (nothing), and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emotrain.cli import main
from emotrain.config import config_from_dict, load_config
from emotrain.data.formats import Dataset
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.perplexity import pack
from emotrain.model.transformer import Transformer
from emotrain.modular.artefact import read_subset
from emotrain.modular.scores import collect_scores
from emotrain.subsets import usage
from emotrain.subsets.exclusive import add_experts, remove_experts
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from tests.conftest import ROOT, run_command, tiny_settings

OTHERS = ("garden", "harbour")


def settings_of(data: Path, run_dir: Path, **training) -> dict:
    """Those of a tiny run; weights are larger, so that its experts soon matter."""
    settings = tiny_settings(data, run_dir, **training)
    settings["model"]["init_std"] = 0.2
    return settings


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """A trained run of two layers of 7 routed experts and a shared one."""
    folder = tmp_path_factory.mktemp("run")
    run_module.train(config_from_dict(settings_of(tiny_data, folder, steps=12)), Ranks())
    return folder


@pytest.fixture(scope="module")
def added(run, tmp_path_factory) -> Path:
    """The same with two experts for the kitchen, random ones."""
    out = tmp_path_factory.mktemp("added") / "kitchen"
    add_experts(run, out, "kitchen", 2)
    return out


@pytest.fixture(scope="module")
def trained(added, tiny_data, tmp_path_factory) -> Path:
    """The run that trains these two alone."""
    folder = tmp_path_factory.mktemp("trained")
    experts = {"routed": 9, "shared": 1, "top_k": 2, "hidden": 8, "exclusive": {"kitchen": 2}}
    settings = settings_of(tiny_data, folder, steps=60)
    settings["model"]["experts"] = experts
    settings["data"]["domain"] = "kitchen"
    settings["finetune"] = {
        "start": str(added),
        "train": "routed,router",
        "experts": "exclusive:kitchen",
    }
    run_module.train(config_from_dict(settings), Ranks())
    return folder


def parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_model(checkpoint)[1].named_parameters()}


def asked(capsys, *words, code: int = 0) -> dict:
    """What a command reports with --json."""
    assert main([*map(str, words), "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def experts_of(values: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of common and shared experts, and of the two new ones."""
    common = [i for i in range(len(values)) if i not in (7, 8)]
    return values[common], values[7:9]


# ---- adding and removing


def test_everything_else_stays_and_removing_gives_the_model_back(run, added, tmp_path, capsys):
    before, after = parameters(run), parameters(added)
    assert before.keys() == after.keys()
    for name, values in after.items():
        is_row = ".experts." in name or ".router." in name
        assert torch.equal(experts_of(values, name)[0] if is_row else values, before[name]), name
    assert (added / "tokenizer.json").read_bytes() == (find(run) / "tokenizer.json").read_bytes()
    told = asked(
        capsys, "experts", "remove", added, "--domain", "kitchen", "--out", tmp_path / "back",
        "--check",
    )  # fmt: skip
    assert told["exclusive"] == {} and told["max_difference"] == 0.0
    assert told["experts_per_layer"] == [8, 8]
    assert all(torch.equal(parameters(tmp_path / "back")[name], p) for name, p in before.items())
    back, first = (load_config(f / "config.yaml") for f in (tmp_path / "back", find(run)))
    assert back.model == first.model


def test_random_ones_begin_as_in_a_new_model(added):
    config, model = load_model(added)
    fresh = Transformer(config.model).initialize(config.training.seed)
    for name, values in fresh.named_parameters():
        if ".experts." in name or ".router." in name:
            new = experts_of(model.get_parameter(name), name)[1]
            assert torch.equal(new, experts_of(values, name)[1])


def test_a_second_domain_comes_after_the_first_and_leaves_without_it(run, added, tmp_path, capsys):
    both, left = tmp_path / "both", tmp_path / "left"
    words = ["experts", "add", added, "--domain", "garden", "--count", 1, "--out", both, "--check"]
    told = asked(capsys, *words)
    assert told["exclusive"] == {"kitchen": 2, "garden": 1} and told["max_difference"] == 0.0
    listed = asked(capsys, "experts", "list", both)
    assert listed["common_per_layer"] == [7, 7]
    assert listed["domains"]["kitchen"] == {"count": 2, "experts_per_layer": [[7, 8], [7, 8]]}
    assert listed["domains"]["garden"] == {"count": 1, "experts_per_layer": [[9], [9]]}
    remove_experts(both, left, "kitchen")
    for name, values in parameters(left).items():
        if ".experts." in name:
            assert torch.equal(
                values, torch.cat([parameters(both)[name][:7], parameters(both)[name][9:]])
            )
    assert main(["experts", "list", str(left)]) == 0
    shown = capsys.readouterr().out
    assert "garden" in shown and "kitchen" not in shown
    assert main(["experts", "list", str(run)]) == 0
    assert "has no exclusive experts" in capsys.readouterr().out


@pytest.fixture(scope="module")
def ranked(run, tiny_data) -> list[list[int]]:
    """By a pass of our own: the experts of each layer, most probability in the kitchen first."""
    config, model = load_model(run)
    documents = [ids for _, ids, _ in Dataset(tiny_data).documents("train", "kitchen")]
    batches = pack(documents, config.data.sequence_length, 4)
    scores = collect_scores(model, batches, torch.zeros(len(documents), dtype=torch.int64), 1)
    return [layer["router_once"][0].argsort(descending=True).tolist() for layer in scores]


def test_nearest_ones_are_copies_of_the_most_used(run, ranked, tiny_data, tmp_path, capsys):
    words = ["experts", "add", run, "--domain", "kitchen", "--count", 2, "--init", "nearest"]
    told = asked(capsys, *words, "--calibration", tiny_data, "--out", tmp_path / "new")
    assert told["sources_per_layer"] == [[[best], [second]] for best, second, *_ in ranked]
    for name, values in parameters(tmp_path / "new").items():
        if ".experts." in name or ".router." in name:
            layer = int(name.split(".")[1])
            assert torch.equal(values[7:9], parameters(run)[name][ranked[layer][:2]])


@pytest.mark.parametrize("text", [True, False])
def test_a_mean_has_noise_that_tells_its_experts_apart(
    text, run, ranked, tiny_data, tmp_path, capsys
):
    words = ["experts", "add", run, "--domain", "kitchen", "--count", 2, "--init", "mean"]
    calibration = ["--calibration", tiny_data] if text else []
    told = asked(capsys, *words, *calibration, "--out", tmp_path / "new")
    wanted = [sorted(of[:2]) if text else list(range(7)) for of in ranked]
    assert told["sources_per_layer"] == [[of, of] for of in wanted]
    for name, values in parameters(tmp_path / "new").items():
        if ".experts." in name or ".router." in name:
            mean = parameters(run)[name][wanted[int(name.split(".")[1])]].mean(0)
            noise = values[7:9] - mean
            assert float(noise.std() / mean.std()) == pytest.approx(0.1, abs=0.04)
            assert not torch.equal(noise[0], noise[1])


# ---- training


def test_they_alone_are_trained_and_other_domains_notice_nothing(
    run, added, trained, tiny_data, tmp_path, capsys
):
    before, after = parameters(added), parameters(trained)
    for name, values in after.items():
        if ".experts." not in name and ".router." not in name:
            assert torch.equal(values, before[name]), name
            continue
        (frozen, new), (stayed, begun) = experts_of(values, name), experts_of(before[name], name)
        assert torch.equal(frozen, stayed) and not torch.equal(new, begun), name
    told = asked(
        capsys, "experts", "remove", trained, "--domain", "kitchen", "--out", tmp_path / "back",
        "--check",
    )  # fmt: skip
    assert told["max_difference"] == 0.0
    assert all(
        torch.equal(parameters(tmp_path / "back")[name], p) for name, p in parameters(run).items()
    )

    def losses(checkpoint, *domains):
        words = ["evaluate", checkpoint, "--data", tiny_data, "--out", tmp_path / "evaluation"]
        words += ["--keep", 0.5, "--random-seeds", 0, "--document-tokens", 64]
        return asked(capsys, *words, "--domains", *domains)["domains"]

    others, kitchen = losses(run, *OTHERS), losses(run, "kitchen")["kitchen"]
    now = {**losses(trained, *OTHERS), **losses(trained, "kitchen")}
    for name in OTHERS:
        # The same to the last digit, also with half of the experts: of the same documents, which
        # share their passes.
        assert now[name]["loss_nats"] == others[name]["loss_nats"]
        half = [of[name]["subset_loss_nats"]["0.5"]["selected"] for of in (now, others)]
        assert half[0] == half[1]
    assert now["kitchen"]["loss_nats"] < kitchen["loss_nats"] - 0.03
    half = [of["subset_loss_nats"]["0.5"]["selected"] for of in (now["kitchen"], kitchen)]
    assert half[0] < half[1] - 0.03


def test_answers_are_of_the_domain_too(run, added, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "bread and", "answer": "salt"}\n' * 3)
    words = ["finetune", added, "--data", answers, "--domain", "kitchen", "--steps", 2]
    words += [
        "--experts",
        "exclusive:kitchen",
        "--out",
        tmp_path / "run",
        "training.global_batch=2",
    ]
    told = asked(capsys, *words, "training.micro_batch=2", "optimizer.lr=1e-2")
    assert told["train"] == "routed,router"
    for name, values in parameters(tmp_path / "run").items():
        before = parameters(added)[name]
        if ".experts." in name or ".router." in name:
            (frozen, new), (stayed, begun) = experts_of(values, name), experts_of(before, name)
            assert torch.equal(frozen, stayed) and not torch.equal(new, begun), name
        else:
            assert torch.equal(values, before), name
    # A model without them has no use for the domain of a file that names none.
    words = ["finetune", run, "--data", answers, "--domain", "kitchen", "--steps", 2]
    assert main(list(map(str, [*words, "--out", tmp_path / "other"]))) == 2
    assert "remove data.domain" in capsys.readouterr().err


# ---- subsets and other programs


def test_a_subset_of_the_domain_has_them_and_is_a_model_like_any_other(
    trained, tiny_data, tmp_path, capsys
):
    select = ["select", trained, "--calibration", tiny_data]
    for method in ("router", "reap", "random"):
        out = tmp_path / f"{method}.json"
        words = ["--domain", "kitchen", "--keep", 5, "--method", method, "--out", out]
        asked(capsys, *select, *words)
        subset = read_subset(out)
        for layer in (0, 1):
            assert {7, 8} < set(subset.routed(layer)) and len(subset.routed(layer)) == 4
    # All that the kitchen uses, as a plain checkpoint: the same model for its text.
    words = ["--domain", "kitchen", "--keep", 10, "--out", tmp_path / "it.json"]
    everything = asked(capsys, *select, *words)
    assert everything["fidelity"]["kl_nats"] == 0
    told = asked(
        capsys, "extract", trained, tmp_path / "it.json", "--out", tmp_path / "small", "--check"
    )
    assert told["max_difference"] == 0.0 and told["experts_per_layer"] == [10, 10]
    assert load_config(tmp_path / "small/config.yaml").model.experts.exclusive == ()
    loss = {}
    for checkpoint in (trained, tmp_path / "small"):
        words = [
            "evaluate",
            checkpoint,
            "--data",
            tiny_data,
            "--keep",
            1.0,
            "--out",
            tmp_path / "e",
        ]
        loss[checkpoint] = asked(capsys, *words, "--domains", "kitchen")["domains"]["kitchen"]
    assert loss[trained]["loss_nats"] == loss[tmp_path / "small"]["loss_nats"]
    asked(capsys, "export", tmp_path / "small", "--out", tmp_path / "hf", "--layout", "published")
    # Others never get them.
    words = ["--domain", "garden", "--keep", 8, "--out", tmp_path / "garden.json"]
    garden = asked(capsys, *select, *words)
    assert garden["experts_kept_per_layer"] == [[0, 1, 2, 3, 4, 5, 6, 9]] * 2


@pytest.mark.long
def test_the_benchmark_says_what_a_domain_gains_and_others_notice(run, tiny_data, tmp_path):
    script = ROOT / "benchmarks/exclusive_experts.py"
    words = [run, "--data", tiny_data, "--domain", "kitchen", "--others", "garden", "--json"]
    words += ["--init", "random", "--steps", 30, "--settings", "optimizer.lr=1e-2"]
    done = run_command(script, *words, "training.micro_batch=4", "training.global_batch=4")
    assert done.returncode == 0, done.stderr
    (of,) = json.loads(done.stdout.splitlines()[-1])["inits"].values()
    assert of["trained_loss_nats"] < of["untrained_loss_nats"]
    assert of["other_domains"] == 1 and of["other_domains_changed"] == of["frozen_changed"] == 0


# ---- mistakes


def test_what_cannot_be_is_one_line_and_nothing_written(run, added, tiny_data, tmp_path, capsys):
    out = tmp_path / "new"
    select = ["select", added, "--calibration", tiny_data, "--out", tmp_path / "it.json"]
    add = ["experts", "add", run, "--domain", "garden", "--out", out]
    for words, fault in (
        (["experts", "add", added, "--domain", "kitchen", "--out", out], "for kitchen already"),
        ([*add, "--count", 0], "1 to 65,536 experts"),
        (["experts", "add", run, "--domain", "", "--out", out], "give a name"),
        ([*add, "--init", "zero"], "choose one of random, mean, nearest"),
        ([*add, "--init", "nearest"], "--calibration DATA"),
        (
            [*add, "--init", "nearest", "--calibration", tiny_data, "--micro-batch", -1],
            "positive number of rows",
        ),
        ([*add, "--calibration", tiny_data], "leave out --calibration"),
        (["experts", "remove", added, "--domain", "garden", "--out", out], "has them for kitchen"),
        (["export", added, "--out", out, "--layout", "published"], "emotrain experts remove"),
        ([*select, "--domain", "garden", "--keep", 9], "keep 2 to 8"),
        ([*select, "--domain", "kitchen", "--keep", 3], "keep 4 to 10"),
    ):
        assert main(list(map(str, words))) == 2, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert fault in error, error
        assert not out.exists() and not (tmp_path / "it.json").exists()
    out.mkdir()
    (out / "mine").write_text("mine")
    assert main(list(map(str, add))) == 2
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_every_argument_is_checked_before_the_model_reads_text(
    run, tiny_data, tmp_path, capsys, monkeypatch
):
    def loaded(*_):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(usage, "load_model", loaded)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    words = ["experts", "add", run, "--init", "nearest", "--calibration", tiny_data]
    words += ["--domain", "kitchen", "--out", tmp_path / "new"]
    for change, fault in (
        (["--count", 0], "1 to 65,536 experts"),
        (["--count", 1 << 40], "1 to 65,536 experts"),
        (["--domain", "nowhere"], "no training documents of domain 'nowhere'"),
        (["--out", tmp_path / "there"], "exists"),
        (["--out", tmp_path / "there" / "mine"], "exists"),
        (["--documents", -1], "documents=-1"),
        (["--document-tokens", 1], "document_tokens=1"),
        (["--micro-batch", -1], "positive number of rows"),
        (["--calibration", tmp_path / "none"], "no such calibration data"),
    ):
        assert main(list(map(str, [*words, *change]))) == 2, change
        assert fault in capsys.readouterr().err, change
        assert not (tmp_path / "new").exists()


def test_training_experts_that_are_not_there_is_refused(added, tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run")
    settings["finetune"] = {"train": "routed,router", "experts": "exclusive:kitchen"}
    with pytest.raises(UserError, match="has no exclusive experts for 'kitchen'"):
        run_module.train(config_from_dict(settings), Ranks())
