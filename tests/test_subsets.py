"""From a checkpoint to a subset and a smaller checkpoint, as a user goes: every source of
calibration text and every method, what the smaller model computes, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from emotrain.cli import main
from emotrain.config import config_from_dict, load_config
from emotrain.data.formats import Dataset
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.perplexity import pack
from emotrain.interop.export_folder import export_checkpoint
from emotrain.modular.artefact import read_subset
from emotrain.modular.select import greedy_select
from emotrain.subsets.extraction import extract
from emotrain.subsets.selection import METHODS, SelectSettings, select
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from tests.conftest import tiny_settings
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """A trained run of two layers of 7 routed experts and a shared one."""
    folder = tmp_path_factory.mktemp("run")
    run_module.train(config_from_dict(tiny_settings(tiny_data, folder)), Ranks())
    return folder


def asked(capsys, *words) -> dict:
    """What a command reports with --json."""
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- select


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_what_was_asked_for_in_few_passes(method, run, tiny_data):
    subset = select(run, tiny_data, SelectSettings(keep="4", method=method, domain="kitchen"))
    assert [len(kept) for kept in subset.experts_kept_per_layer] == [4, 4]
    assert all(kept[-1] == 7 for kept in subset.experts_kept_per_layer), "the shared expert stays"
    assert subset.forward_passes == (0 if method == "random" else 1)
    assert subset.fidelity is not None and subset.fidelity.held_back
    assert 0 < subset.fidelity.acceptance < 1 and subset.fidelity.kl_nats > 0
    for layer, scores in enumerate(subset.scores_per_layer):
        kept = set(subset.routed(layer))
        assert min(scores[i] for i in kept) >= max(scores[i] for i in set(range(7)) - kept)


def test_it_chooses_what_the_evaluation_chooses(run, tiny_data):
    subset = select(run, tiny_data, SelectSettings(keep="4", domain="harbour", documents=8))
    assert subset.calibration.documents == 6, "two of eight are held back"
    config, model = load_model(find(run))
    documents = [ids for _, ids, _ in Dataset(tiny_data).documents("train", "harbour", limit=8)]
    choose = [ids for number, ids in enumerate(documents) if number % 4 != 3]
    batches = pack(choose, config.data.sequence_length, 4)
    masks = greedy_select(model, batches, torch.zeros(6, dtype=torch.int64), 1, (4, 4))
    assert [tuple(mask[0].nonzero()[:, 0].tolist()) for mask in masks] == [
        subset.routed(layer) for layer in (0, 1)
    ]


def test_all_experts_are_the_full_model(run, tiny_data):
    measured = select(run, tiny_data, SelectSettings(keep="8")).fidelity
    assert measured is not None
    assert measured.kl_nats == 0 and measured.acceptance == pytest.approx(1, abs=1e-6)


def test_a_total_takes_one_pass_more(run, tiny_data):
    subset = select(run, tiny_data, SelectSettings(keep="total:9"))
    assert sum(map(len, subset.experts_kept_per_layer)) == 9
    assert subset.forward_passes == 2


def test_text_comes_from_data_documents_questions_or_a_prompt(run, tiny_data, tmp_path, capsys):
    documents = tmp_path / "text.jsonl"
    documents.write_text('{"text": "bread salt oven", "domain": "kitchen"}\n{"text": "anchor"}\n')
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        '{"question": "bread or salt?", "choices": ["bread", "salt"], "answer": 0}\n\n'
        '{"prompt": "tide?", "answer": "anchor"}\n'
    )
    found = {}
    for name, words in {
        "data": ["--calibration", tiny_data, "--domain", "garden"],
        "documents": ["--calibration", documents],
        "kitchen": ["--calibration", documents, "--domain", "kitchen"],
        "questions": ["--calibration", questions],
        "prompt": ["--prompt", "bread salt oven"],
    }.items():
        out = tmp_path / f"{name}.json"
        result = asked(capsys, "select", run, *words, "--keep", "0.5", "--out", out)
        found[name] = result["calibration"]
        assert result["experts_kept_per_layer"] == [
            list(kept) for kept in read_subset(out).experts_kept_per_layer
        ]
    assert found["data"]["domain"] == "garden" and found["data"]["documents"] > 8
    # Of two documents one is held back; a single one both chooses and measures.
    assert [found[name]["documents"] for name in ("documents", "questions", "kitchen")] == [1, 1, 1]
    assert found["kitchen"]["fingerprint"] == found["prompt"]["fingerprint"]
    assert len({entry["fingerprint"] for entry in found.values()}) == 3


def test_the_same_text_and_weights_give_the_same_file(run, tiny_data, tmp_path):
    for name in ("a", "b"):
        select(run, tiny_data, SelectSettings(keep="3")).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--keep", "4"], "give calibration text once: --calibration DATA or --prompt TEXT"),
        (["--prompt", "salt"], "say how many experts to keep, once: --keep 32 or --memory 4GB"),
        (["--prompt", "salt", "--keep", "4", "--memory", "1GB"], "say how many experts to keep"),
        (["--prompt", "salt", "--keep", "4", "--method", "best"], "method=best is not known"),
        (["--prompt", "salt", "--keep", "4", "--documents", "0"], "documents=0 leaves nothing"),
        (["--prompt", "salt", "--keep", "4", "--document-tokens", "1"], "document_tokens=1 leaves"),
        (["--prompt", "", "--keep", "4"], "prompt: has no text to choose experts by"),
        (["--calibration", "nowhere", "--keep", "4"], "nowhere: no such calibration data"),
        (["--calibration", "DATA", "--domain", "sea", "--keep", "4"], "has no training documents"),
        (["--prompt", "salt", "--domain", "sea", "--keep", "4"], "questions are of no domain"),
        (["--prompt", "salt", "--keep", "99"], "--keep 99: the largest layer has 8 experts"),
        (["--prompt", "salt", "--keep", "0"], "layer 0 cannot keep 0 of its 8 experts; keep 2"),
        (["--prompt", "salt", "--memory", "1KB"], "--memory 1KB: the smallest subset"),
        (["--prompt", "salt", "--keep", "4", "--micro-batch", "-1"], "micro_batch=-1 must be"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    words, fault, run, tiny_data, tmp_path, capsys
):
    words = [str(tiny_data) if word == "DATA" else word for word in words]
    out = tmp_path / "it.json"
    assert main(["select", str(run), *words, "--out", str(out)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert fault in line and not out.exists()


def test_a_subset_that_exists_is_left_alone(run, tmp_path, capsys):
    out = tmp_path / "it.json"
    out.write_text("mine")
    assert main(["select", str(run), "--prompt", "salt", "--keep", "4", "--out", str(out)]) == 2
    assert "exists; remove it or choose another --out" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_answers_choose_no_experts(run, tmp_path):
    """Of a question that alone is read. What may be a document with the answer in it is refused."""
    files = {}
    for name, line in {
        "bare": '{"question": "salt?"}',
        "answered": '{"question": "salt?", "choices": ["bread", "salt"], "answer": 1}',
        "prompt": '{"prompt": "salt?", "answer": "salt"}',
        "both": '{"question": "salt?", "text": "salt? salt"}',
    }.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text(line)
    bare, *others = (
        select(run, files[name], SelectSettings(keep="4")).calibration.fingerprint
        for name in ("bare", "answered", "prompt")
    )
    assert others == [bare, bare]
    with pytest.raises(UserError, match="line 1 has a text and a question"):
        select(run, files["both"], SelectSettings(keep="4"))
    with pytest.raises(UserError, match="questions are of no domain"):
        select(run, files["bare"], SelectSettings(keep="4", domain="kitchen"))


def test_a_broken_file_of_questions_is_named_with_its_line(run, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "salt?"}\n{"question": 3}\n')
    with pytest.raises(UserError, match=r"line 2 is not a question"):
        select(run, path, SelectSettings(keep="4"))


# ---- extract


@pytest.fixture
def subset_file(run, tiny_data, tmp_path) -> Path:
    return select(run, tiny_data, SelectSettings(keep="4,6")).save(tmp_path / "it.json")


def test_what_is_extracted_is_the_masked_model_to_the_bit(run, subset_file, tmp_path, capsys):
    result = asked(capsys, "extract", run, subset_file, "--out", tmp_path / "small", "--check")
    assert result["max_difference"] == 0.0 and result["experts_per_layer"] == [4, 6]
    config, model = load_model(tmp_path / "small")
    assert config.model.experts.routed_per_layer == (3, 5)
    assert config.model.router.pool.kind == "none"
    full, subset = load_model(find(run))[1], read_subset(subset_file)
    for layer, (small, block) in enumerate(zip(model.blocks, full.blocks, strict=True)):
        kept, routed = list(subset.experts_kept_per_layer[layer]), list(subset.routed(layer))
        assert torch.equal(small.moe.router.weight_ED, block.moe.router.weight_ED[kept])
        assert torch.equal(small.moe.experts.down_NHD, block.moe.experts.down_NHD[routed])
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["full_parameters"] == sum(p.numel() for p in full.parameters())


@pytest.mark.parametrize("chosen", [(), ("--layout", "published", "--dtype", "bf16")])
def test_a_hugging_face_folder_is_the_export_of_the_checkpoint(
    run, subset_file, tmp_path, capsys, chosen
):
    words = ("extract", run, subset_file, "--out", tmp_path / "hf", "--format", "huggingface")
    result = asked(capsys, *words, *chosen, "--check")
    layout, dtype = (chosen or (0, "clean", 0, "fp32"))[1::2]
    assert (result["format"], result["layout"], result["dtype"]) == ("huggingface", layout, dtype)
    assert result["max_difference"] == 0.0 and result["out"] == str(tmp_path / "hf")
    small = extract(run, subset_file, tmp_path / "small").path
    export_checkpoint(small, tmp_path / "exported", layout, dtype)
    folders = (tmp_path / "hf", tmp_path / "exported")
    one, other = ({file.name: file.read_bytes() for file in sorted(of.iterdir())} for of in folders)
    assert one == other and "config.json" in one
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_written_leaves_nothing(run, subset_file, tmp_path, capsys):
    words = ["extract", str(run), str(subset_file), "--out", str(tmp_path / "hf")]
    assert main([*words, "--layout", "clean"]) == 2
    assert "add --format huggingface" in capsys.readouterr().err
    other = replace(read_subset(subset_file), checkpoint_fingerprint="0" * 64)
    words[2] = str(other.save(tmp_path / "other.json"))
    assert main([*words, "--format", "huggingface"]) == 2
    assert "has other weights than" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"it.json", "other.json"}


def test_a_wrong_expert_is_found_by_the_check(run, subset_file, tmp_path, capsys, monkeypatch):
    from emotrain.subsets import extraction

    real = extraction._rows
    monkeypatch.setattr(
        extraction, "_rows", lambda name, of: real(name, of) and real(name, of)[::-1]
    )
    words = ["extract", run, subset_file, "--out", tmp_path / "small", "--check", "--json"]
    assert main([*map(str, words)]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_difference"] > 1e-4


def test_it_reads_a_checkpoint_of_any_layout(run, subset_file, tiny_data, tmp_path):
    """Saved by four ranks, two copies of two shares of experts, which FSDP2 cut further."""
    settings = tiny_settings(tiny_data, tmp_path / "four", micro_batch=1)
    settings["parallel"] = {"ep": 2}
    settings["training"]["resume"] = str(find(run))
    settings["training"]["steps"] = 7
    run_ranks(lambda ranks: run_module.train(config_from_dict(settings), ranks), 4)
    written = find(tmp_path / "four")
    assert len(list(written.glob("model-*.safetensors"))) == 4
    subset = select(written, tiny_data, SelectSettings(keep="4")).save(tmp_path / "four.json")
    assert extract(written, subset, tmp_path / "small", check=True).max_difference == 0.0


def test_training_and_evaluation_go_on_from_it(run, subset_file, tiny_data, tmp_path, capsys):
    extract(run, subset_file, tmp_path / "small")
    config = load_config(tmp_path / "small/config.yaml")
    settings = tiny_settings(tiny_data, tmp_path / "tuned", steps=8)
    settings["model"]["experts"] |= {"routed": 5, "routed_per_layer": [3, 5]}
    settings["model"]["router"] = {"pool": {"kind": "none"}}
    assert config_from_dict(settings).model == config.model
    settings["training"]["resume"] = str(tmp_path / "small")
    result = run_module.train(config_from_dict(settings), Ranks())
    assert np.isfinite(result["metrics"]["loss"])
    assert find(tmp_path / "tuned").name == "step-00000008"
    told = asked(
        capsys, "evaluate", tmp_path / "small", "--data", tiny_data, "--keep", "0.5",
        "--out", tmp_path / "evaluation",
    )  # fmt: skip
    assert told["experts"]["per_layer"] == [4, 6]


def test_reading_costs_the_experts_that_are_kept(run, subset_file, tmp_path, monkeypatch):
    import safetensors

    read = 0

    class Slice:
        def __init__(self, part):
            self.part = part

        def get_shape(self):
            return self.part.get_shape()

        def __getitem__(self, key):
            nonlocal read
            values = self.part[key]
            read += values.numel()
            return values

    class Opened:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.tensors = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, name):
            return Slice(self.tensors.get_slice(name))

    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Opened)
    assert extract(run, subset_file, tmp_path / "small").parameters == read


def damaged(folder: Path) -> None:
    file = next(folder.glob("model-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def other_weights(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")


def other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (damaged, "contents differ from the checksum"),
        (other_weights, "has other weights than the checkpoint that the subset was selected"),
        (other_tokenizer, "has another tokenizer than"),
    ],
)
def test_another_or_a_damaged_checkpoint_is_refused(harm, fault, run, subset_file, tmp_path):
    folder = shutil.copytree(find(run), tmp_path / "copy")
    harm(folder)
    with pytest.raises(UserError, match=fault) as caught:
        extract(folder, subset_file, tmp_path / "small")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "small").exists() and not list(tmp_path.glob(".small*"))


def test_a_target_that_exists_is_left_alone(run, subset_file, tmp_path):
    (tmp_path / "small").write_text("mine")
    with pytest.raises(UserError, match="exists; remove it or choose another --out"):
        extract(run, subset_file, tmp_path / "small")
    assert (tmp_path / "small").read_text() == "mine"


def test_a_subset_of_another_shape_is_refused(run, subset_file, tmp_path):
    content = json.loads(subset_file.read_text())
    content |= {"experts_per_layer": [8, 8, 8], "scores_per_layer": []}
    content["experts_kept_per_layer"] = [[0, 7]] * 3
    subset_file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has \(8, 8\) experts a layer, the subset is of a model"):
        extract(run, subset_file, tmp_path / "small")
