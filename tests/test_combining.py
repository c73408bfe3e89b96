"""Subsets of a trained run combined: what is extracted of a union is the model masked to it, and
what a domain loses in it is the difference of losses that are taken one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.measure import mean_increase
from emotrain.evaluation.perplexity import document_losses, pack
from emotrain.evaluation.reading import read_domains
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import FULL
from emotrain.modular.artefact import read_subset
from emotrain.subsets.extraction import extract
from emotrain.subsets.interference import interference
from emotrain.subsets.selection import SelectSettings, select
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from tests.conftest import tiny_settings
from tests.test_subsets import asked

DOMAINS = ("kitchen", "harbour")


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """A run whose weights are large, so that domains choose different experts, and it shows in
    the loss."""
    folder = tmp_path_factory.mktemp("run")
    settings = tiny_settings(tiny_data, folder, steps=1)
    settings["model"]["init_std"] = 0.4
    run_module.train(config_from_dict(settings), Ranks())
    return folder


@pytest.fixture(scope="module")
def files(run, tiny_data, tmp_path_factory):
    """Subsets of two domains that differ, of layers of different sizes, and their union."""
    folder = tmp_path_factory.mktemp("subsets")
    found = {
        name: select(run, tiny_data, SelectSettings(keep="3,4", domain=name, documents=8)).save(
            folder / f"{name}.json"
        )
        for name in DOMAINS
    }
    words = ["subsets", "union", *found.values(), "--out", folder / "union.json"]
    assert main([*map(str, words)]) == 0
    return {**found, "union": folder / "union.json"}


def masks_of(subset):
    """For each layer bool [N]."""
    layers = range(len(subset.experts_per_layer))
    return [torch.zeros(7, dtype=torch.bool).index_fill_(
        0, torch.tensor(subset.routed(layer)), True) for layer in layers]  # fmt: skip


def test_an_extracted_union_is_the_model_masked_to_it_to_the_bit(run, files, tmp_path):
    subset = read_subset(files["union"])
    parts = [read_subset(files[name]) for name in DOMAINS]
    assert parts[0].experts_kept_per_layer != parts[1].experts_kept_per_layer
    for layer in (0, 1):
        both = set(parts[0].routed(layer)) | set(parts[1].routed(layer))
        assert subset.routed(layer) == tuple(sorted(both))
    assert extract(run, files["union"], tmp_path / "small", check=True).max_difference == 0.0
    # Its router knows all experts of the union: their rows are those of the full model's.
    full, small = load_model(find(run))[1], load_model(tmp_path / "small")[1]
    for layer in (0, 1):
        rows = torch.tensor(subset.experts_kept_per_layer[layer])
        routers = (model.blocks[layer].moe.router.weight_ED for model in (small, full))
        assert torch.equal(next(routers), next(routers)[rows])


def test_interference_is_the_difference_of_losses_one_by_one(run, files, tiny_data):
    names = [files[name] for name in DOMAINS]
    found = interference(run, tiny_data, names, documents=6)
    config, model = load_model(find(run))
    settings = EvaluationSettings(calibration_documents=1, documents=6, domains=DOMAINS)
    documents = read_domains(tiny_data, config, find(run), settings)
    union = masks_of(read_subset(files["union"]))
    for of, name in zip(found.subsets, DOMAINS, strict=True):
        held_out = documents[name].held_out
        group_U = torch.zeros(len(held_out), dtype=torch.int64)
        batches = pack(held_out, config.data.sequence_length, 1)

        def losses(masks, batches=batches, group_U=group_U):
            subsets = None if masks is None else tuple(mask_N[None] for mask_N in masks)
            return document_losses(model, batches, group_U, subsets)

        full, own, composed = map(losses, (None, masks_of(read_subset(files[name])), union))
        assert of.domain == name and of.documents == 6
        assert abs(of.own_increase_nats) > 1e-2 and abs(of.interference_nats) > 1e-3
        assert of.targets == int(full.targets_U.sum())
        assert of.loss_nats == pytest.approx(float(full.loss_U.sum()) / of.targets, abs=1e-5)
        for change, value, error in (
            (own.loss_U - full.loss_U, of.own_increase_nats, of.own_standard_error_nats),
            (
                composed.loss_U - full.loss_U,
                of.composed_increase_nats,
                of.composed_standard_error_nats,
            ),
            (
                composed.loss_U - own.loss_U,
                of.interference_nats,
                of.interference_standard_error_nats,
            ),
        ):
            mean_J, error_J = mean_increase(change, full.targets_U, group_U)
            assert value == pytest.approx(float(mean_J), abs=1e-5)
            assert error == pytest.approx(float(error_J), abs=1e-5)


def test_nothing_is_lost_in_the_union_with_itself_or_in_all_experts(
    run, files, tiny_data, tmp_path, capsys
):
    everything = select(run, tiny_data, SelectSettings(keep="8")).save(tmp_path / "all.json")
    words = ["--checkpoint", run, "--data", tiny_data, "--documents", 4]
    (alone,) = asked(capsys, "subsets", "interference", files["kitchen"], *words)["subsets"]
    assert alone["interference_nats"] == 0 and alone["own_increase_nats"] != 0
    result = asked(
        capsys, "subsets", "interference", files["union"], "--composed", everything,
        "--domains", "garden", *words,
    )  # fmt: skip
    assert result["composed"] == str(everything) and result["experts_per_layer"] == [8, 8]
    (of,) = result["subsets"]
    assert of["domain"] == "garden" and of["composed_increase_nats"] == 0
    assert of["interference_nats"] == -of["own_increase_nats"]


def test_fidelity_is_that_of_the_masks_and_of_the_extracted_model(
    run, files, tiny_data, tmp_path, capsys
):
    """Against both models run document by document, the second one from the disk."""
    words = ["subsets", "fidelity", files["union"], "--checkpoint", run, "--data", tiny_data]
    found = asked(capsys, *words, "--documents", 6)["subsets"]
    assert [of["domain"] for of in found] == sorted(DOMAINS)
    subset = read_subset(files["union"])
    extract(run, files["union"], tmp_path / "small")
    (config, model), (_, small) = load_model(find(run)), load_model(tmp_path / "small")
    kept = RoutingRequest(kept=[mask_N[None] for mask_N in masks_of(subset)])
    settings = EvaluationSettings(calibration_documents=1, documents=6, domains=DOMAINS)
    documents = read_domains(tiny_data, config, find(run), settings)
    for of in found:
        sums, tokens, widest = torch.zeros(4, dtype=torch.float64), 0, 0.0
        for ids in documents[of["domain"]].held_out:
            for batch in pack([ids], config.data.sequence_length, 1):
                is_counted_T = batch.targets_BS.reshape(-1) >= 0
                with torch.inference_mode():
                    full, masked, alone = (
                        torch.log_softmax(of_model.logits(of_model(batch, request)), 1)[
                            is_counted_T
                        ].double()
                        for of_model, request in ((model, FULL), (model, kept), (small, FULL))
                    )
                for index, other in enumerate((masked, alone)):
                    sums[index] += (full.exp() * (full - other)).sum()
                    sums[2 + index] += torch.minimum(full.exp(), other.exp()).sum()
                tokens += len(full)
                widest = max(widest, float((masked - alone).abs().max()))
        names = ("kl_nats", "extracted_kl_nats", "acceptance", "extracted_acceptance")
        assert of["tokens"] == tokens and of["documents"] == 6
        for name, value in zip(names, (sums / tokens).tolist(), strict=True):
            assert of[name] == pytest.approx(value, abs=1e-5)
        assert of["kl_nats"] > 1e-2 and of["acceptance"] < 0.99
        assert of["max_difference_nats"] < 1e-4 and widest < 1e-4


def test_a_merge_takes_the_memory_that_it_was_given(run, files, tmp_path, capsys):
    out = tmp_path / "merged.json"
    words = [files["kitchen"], files["harbour"], "--weights", 2, 1, "--memory", "62KB"]
    result = asked(capsys, "subsets", "merge", *words, "--out", out)
    assert result["out"] == str(out) and result["budget"] == "62KB"
    extract(run, out, tmp_path / "small")
    _, small = load_model(tmp_path / "small")
    size = 4 * sum(parameter.numel() for parameter in small.parameters())
    # A third expert a layer would be one too many.
    assert size <= 62_000 < size + 2 * 1600


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["union"], "union.json: was not selected for one domain; name one for each subset"),
        (["kitchen", "harbour", "--domains", "kitchen"], "--domains names 1 domains for 2 subsets"),
        (["kitchen", "--domains", "sea"], "has no held-out documents of domain 'sea'"),
        (["kitchen", "--composed", "other"], "has other weights than the checkpoint"),
        (["kitchen", "--documents", "1"], "documents=1 gives no standard error"),
        (["kitchen", "--micro-batch", "-1"], "micro_batch=-1 must be a positive number of rows"),
    ],
)
def test_what_cannot_be_measured_is_one_line(words, fault, run, files, tiny_data, tmp_path, capsys):
    content = json.loads(files["kitchen"].read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "checkpoint_fingerprint": "00" * 32}))
    words = [str({**files, "other": other}.get(word, word)) for word in words]
    if "--domains" in words:  # whose names are those of files too
        at = words.index("--domains") + 1
        words[at:] = [word.rsplit("/", 1)[-1].removesuffix(".json") for word in words[at:]]
    words += ["--checkpoint", str(run), "--data", str(tiny_data)]
    assert main(["subsets", "interference", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert fault in line


def test_a_moved_checkpoint_is_named(run, files, tmp_path, capsys):
    """A merge by memory reads the configuration of the model that the subsets are of."""
    folder = shutil.copytree(find(run), tmp_path / "moved")
    words = ["subsets", "merge", files["kitchen"], files["harbour"], "--memory", "1GB"]
    out = ["--out", tmp_path / "m.json", "--checkpoint", folder]
    assert main([*map(str, [*words, *out])]) == 0
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + "\n")
    out[1] = tmp_path / "n.json"
    assert main([*map(str, [*words, *out])]) == 2
    assert "has other weights than" in capsys.readouterr().err and not out[1].exists()


def test_what_is_wanted_of_a_subset_is_asked_of_a_composed_one_too(run, files, tmp_path):
    content = json.loads(files["union"].read_text())
    content["experts_kept_per_layer"][0] = [7, 7]
    (tmp_path / "it.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="layer 0 keeps experts"):
        extract(run, tmp_path / "it.json", tmp_path / "small")
