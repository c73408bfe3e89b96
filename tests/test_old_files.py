"""Checkpoints and data sets of before stay readable, and mean what they meant: `old_files` was
written by an earlier commit, which its README names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from emotrain.cli import main
from emotrain.config import load_config
from emotrain.data.opening import open_loader
from emotrain.data.tokenizer import load_tokenizer
from emotrain.distributed.ranks import Ranks
from emotrain.training import checkpoint
from emotrain.training import run as run_module

OLD = Path(__file__).parent / "old_files"
RUNS = ("one_process", "two_processes")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(OLD, tmp_path / "old_files"))


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_data_set_has_the_documents_it_was_made_of():
    documents = [json.loads(line) for line in (OLD / "documents.jsonl").read_text().splitlines()]
    texts = {document["text"] for document in documents if document["split"] == "train"}
    loader = open_loader(OLD / "data", 8, seed=0)
    assert loader.num_tokens == 2648 and loader.num_sequences == 331
    tokenizer = load_tokenizer(loader.tokenizer_file)
    seen = 0
    for tokens_S in loader.batch(range(loader.num_sequences)).tokens_BS.numpy():
        for piece_T in np.split(tokens_S, np.flatnonzero(tokens_S == loader.source.store.eos_id)):
            piece = tokenizer.decode(piece_T[piece_T != loader.source.store.eos_id])
            assert any(piece in text for text in texts), piece
            seen += len(piece)
    assert seen >= sum(map(len, texts)) - 8 * 20, "all of them but the end of the last"


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_whole_and_is_loaded(name, old, capsys):
    assert main(["verify", str(old / name)]) == 0
    config, model = checkpoint.load_model(old / name)
    experts = config.model.experts
    assert (experts.routed, experts.shared, experts.top_k) == (6, 1, 2)
    _, other = checkpoint.load_model(old / RUNS[0])
    for (key, parameter), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_as_it_did_then(name, old):
    """The fifth step of the run, which the earlier version made too."""
    *_, wanted = metrics(old / name)
    settings = [f"training.run_dir={old / name}", f"data.path={old / 'data'}"]
    summary = run_module.train(load_config(old / "config.yaml", settings), Ranks())
    assert summary["step"] == 5 and checkpoint.find(old / name).name == "step-00000005"
    *_, got = metrics(old / name)
    assert got["step"] == wanted["step"] == 5 and len(metrics(old / name)) == 5
    for key in ("loss", "cross_entropy", "z_loss", "router_z_loss", "grad_norm", "lr"):
        assert got[key] == pytest.approx(wanted[key], rel=1e-5), key
    assert got["pool_size_mean"] == pytest.approx(wanted["pool_size_mean"])


def test_a_checkpoint_is_evaluated_as_it_was_then(old, capsys):
    command = ["evaluate", old / "one_process", "--data", old / "data", "--keep", "1.0", "0.5"]
    command += ["--documents", "2", "--calibration-documents", "2", "--json"]
    assert main([str(word) for word in command]) == 0
    domains = json.loads(capsys.readouterr().out.splitlines()[-1])["domains"]
    for domain, whole, half in (
        ("harbour", 5.451008584764269, 5.4509890204981755),
        ("kitchen", 5.48682078956998, 5.486901444448551),
    ):
        losses = domains[domain]["subset_loss_nats"]
        assert domains[domain]["loss_nats"] == pytest.approx(whole, rel=1e-6)
        assert losses["0.5"]["selected"] == pytest.approx(half, rel=1e-6)
