"""Proves that JSON is JSON: no reader of ours or of another language meets a bare NaN."""

from __future__ import annotations

import ast
import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from helpers import write

from emotrain.cli import main
from emotrain.commands import COMMANDS
from emotrain.commands.common import finish
from emotrain.config import config_from_dict, save_config
from emotrain.evaluation import figures
from emotrain.files import json_text
from tests.conftest import ROOT, tiny_settings, write_documents


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"a": [math.nan, 1.5, (math.inf, {"b": -math.inf})], "c": "NaN", "d": None, "e": True}
    assert strict(json_text(value)) == {
        "a": [None, 1.5, [None, {"b": None}]],
        "c": "NaN",
        "d": None,
        "e": True,
    }


def test_commands_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    finish(Namespace(json=True), {"loss": math.nan, "name": "ü"}, "")
    assert strict(capsys.readouterr().out) == {"loss": None, "name": "ü"}


PNG = b"\x89PNG\r\n\x1a\n"
KEYS = {
    "prepare": "out vocab_size eos_id files documents tokens text_bytes shard_bytes domains "
    "skipped_documents passed_over_files seconds",
    "convert": "out documents tokens eos_added domains seconds",
    "train": "run_dir step last_step tokens seconds mean_tokens_per_second metrics interrupted "
    "checkpoint_step",
    "data": "mixture sequence_length tokens sources stages warnings plot",
    "inspect": "total_parameters active_parameters tokens_per_step tokens flops flops_per_token "
    "weights_bytes gradients_bytes optimizer_bytes warnings",
    "evaluate": "format checkpoint step data sequence_length settings experts domains mean routing",
    "report": "report",
    "locality": "format checkpoint step data settings routed_experts_per_layer experts_per_token "
    "documents tokens overall domains layers curve compared_with",
    "cluster": "format domain_nmi domain_ami domain_nmi_shuffled domain_purity token_identity_nmi "
    "token_identity_ami document_domain_nmi checkpoint step data split documents tokens levels",
    "explore": "documents document_tokens tokens domains models size_mib",
    "sweep": "cells failed plan means subjects",
    "coverage": "format checkpoint step data settings",
    "placement": "format checkpoint step data ep rows_per_token contiguous_rows_per_token "
    "rows_over_contiguous load_max_over_mean exchange_load_max_over_mean layers",
    "plan": "gpu nodes gpus_per_node fits peak_gib usable_gib memory_gib tokens_per_second_per_gpu "
    "mfu step_seconds communication_seconds communication_bytes flops assumptions changes",
    "verify": "whole checkpoints leftovers",
    "import": "checkpoint folder layout tensors parameters bytes files dtypes vocab_size "
    "dropped_vocab_rows padded_vocab_rows unused_settings",
    "select": "out checkpoint method experts_kept_per_layer experts_per_layer fidelity",
    "extract": "out format layout dtype parameters full_parameters experts_per_layer "
    "max_difference",
    "generate": "generations seconds tokens_per_second",
    "finetune": "run_dir step last_step tokens metrics interrupted checkpoint_step start train",
    "reinsert": "out parts blend tensors changed_tensors changed_tensor_names changed_parameters "
    "domains",
    "experts": "out exclusive experts_per_layer parameters sources_per_layer max_difference",
    "subsets": "out checkpoint method experts_kept_per_layer experts_per_layer parents",
    "export": "folder checkpoint step layout dtype tensors parameters bytes files vocab_size",
    "kernels": "triton default_spills failures rows",
    "settings": "model.router.pool.kind model.router.pool.min",
}
"""Keys of each command's result, which scripts read. Units are in the names."""


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Files of pictures, which are no part of a result, cost a third of its time. Those inside of
    pages are drawn."""
    real = figures._figure

    def drawn(draw: Any, size: Any, look: Any, **save: Any) -> bytes:
        return PNG if save["format"] == "png" else real(draw, size, look, **save)

    patch.setattr(figures, "_figure", drawn)


def test_json_is_all_of_stdout_with_stable_keys(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every command. Progress, tables and warnings leave stdout alone, also those that do not
    come from Python."""
    undrawn(monkeypatch)
    data, run_dir, config = tmp_path / "data", tmp_path / "run", tmp_path / "config.yaml"
    documents = write_documents(tmp_path / "documents.jsonl")
    with documents.open("a", encoding="utf-8") as file:
        file.write("{broken\n")  # which prepare warns of
    save_config(config_from_dict(tiny_settings(data, run_dir)), config)
    ids = tmp_path / "ids.npy"
    ids.write_bytes(bytes([9, 0, 8, 0, 0, 0]) * 50)  # two tokens and EOS, uint16
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"{{models: {{run: {run_dir}}}, data: {data}, keep: [0.5], methods: [router], "
        f"calibration_documents: [1], documents: 2, out: {tmp_path / 'sweep'}}}"
    )
    mixture = write(tmp_path / "mix.yaml", "sources: {all: {path: data, weight: 1}}")
    # Compiling kernels takes minutes; test_kernels_compile.py looks at that result.
    monkeypatch.setattr("emotrain.kernels.compile_check.compile_all", lambda *_, **__: [])
    arguments: dict[str, list[Any]] = {
        "prepare": [documents, "--out", data, "--train-tokenizer", "--vocab-size", 300],
        "convert": [ids, "--out", tmp_path / "converted", "--vocab-size", 300],
        "data": ["show", mixture, "--config", config],
        "train": [config],
        "inspect": [config],
        "evaluate": [run_dir, "--data", data, "--keep", 0.5, "--random-seeds", 0],
        "report": [run_dir],
        "locality": [run_dir, "--data", data, "--documents", 2],
        "cluster": [run_dir, "--data", data, "--clusters", 4],
        "coverage": [run_dir, "--data", data, "--documents", 4],
        "sweep": [sweep, "--jobs", 1],
        "explore": [run_dir, "--data", data, "--num-clusters", 4, "--out", tmp_path / "page.html"],
        "placement": [run_dir, "--data", data, "--ep", 2, "--out", tmp_path / "placement.json"],
        "plan": [config, "--gpus-per-node", 1],
        "verify": [run_dir],
        "select": [run_dir, "--calibration", data, "--keep", 4, "--out", tmp_path / "subset.json"],
        "subsets": ["union", *[tmp_path / "subset.json"] * 2, "--out", tmp_path / "union.json"],
        "extract": [run_dir, tmp_path / "subset.json", "--out", tmp_path / "subset", "--check"],
        "generate": [run_dir, "bread", "--max-tokens", 2],
        "finetune": [
            tmp_path / "subset",
            "--data",
            data,
            "--steps",
            1,
            "--out",
            tmp_path / "tuned",
        ],
        "reinsert": [
            run_dir,
            tmp_path / "tuned",
            tmp_path / "subset.json",
            "--out",
            tmp_path / "back",
        ],
        "experts": ["add", run_dir, "--domain", "kitchen", "--out", tmp_path / "larger"],
        "export": [run_dir, "--out", tmp_path / "exported", "--layout", "published"],
        "import": [tmp_path / "exported", "--out", tmp_path / "imported"],
        "kernels": [],
        "settings": ["pool"],
    }
    # `serve` ends when it is told to: test_serving.py reads its line.
    assert arguments.keys() == KEYS.keys() == COMMANDS.keys() - {"serve"}
    for command, words in arguments.items():
        assert main([command, *map(str, words), "--json"]) == 0
        printed = capfd.readouterr()
        assert printed.out.count("\n") == 1, f"{command} prints more than its result: {printed.out}"
        result = strict(printed.out)
        assert set(KEYS[command].split()) <= result.keys(), command


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_diverged_is_still_json_and_has_a_report(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(tiny_data, tmp_path / "run", max_skipped_steps=100)
    settings["optimizer"] |= {"lr": 1e30, "clip_norm": 0}
    save_config(config_from_dict(settings), tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml"), "--json"]) == 2
    assert "updates in a row were not finite" in capsys.readouterr().err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [strict(line) for line in lines]
    assert records[-1]["loss"] is None
    finish(Namespace(json=True), {"metrics": {"loss": float("nan"), "lr": float("inf")}}, "")
    summary = strict(capsys.readouterr().out.splitlines()[-1])
    assert summary == {"metrics": {"loss": None, "lr": None}}
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "emotrain").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).name
)
def test_every_writer_of_json_refuses_nan_or_makes_it_null(path: Path) -> None:
    """Either `json_text`, or `allow_nan=False` where nothing but whole numbers and text is
    written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
            names = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert names.get("allow_nan") == "False", (
                f"{path}:{node.lineno}: use emotrain.files.json_text"
            )
