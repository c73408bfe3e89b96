"""Proves that exported folders run with transformers: its classes load them with the code that they
carry, and compute what our model computes, in every version that is promised. The released format
runs so too, its code swapped."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_fixtures import found
from test_huggingface import write
from test_interchange import refused, save, snapshot, tensors_in
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from emotrain.batch import PackedBatch
from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.interop import model_code
from emotrain.interop.export_folder import export_checkpoint
from emotrain.interop.huggingface import load_huggingface
from emotrain.interop.import_folder import import_folder
from emotrain.interop.model_code import AUTO_MAP, CODE, ORIGINAL, swap_code
from emotrain.model.transformer import Transformer
from emotrain.training.run import train
from tests.conftest import ROOT, tiny_settings

VERSIONS = ["transformers==5.16.1", "transformers==5.20.2", "transformers"]
"""The oldest that vLLM 0.33 takes, its newest, and the newest there is."""

PAGE = (ROOT / "docs/interchange.md").read_text(encoding="utf-8")
(SNIPPET,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)

PEER = Path(__file__).with_name("modeling_peer.py")

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "published": ("published", {"model__num_kv_heads": 1, "model__rope_theta": 100.0}),
    "published_shared": (
        "published",
        {
            "model__experts__shared": 2,
            "model__router__shared_weight": "softmax",
            "model__experts__routed_per_layer": [2, 8],
            "model__router__pool__min": 2,
        },
    ),
    "published_normalised": (
        "published",
        {"model__experts__shared": 0, "model__router__normalize_weights": True},
    ),
    "clean": (
        "clean",
        {
            "model__experts__shared": 3,
            "model__experts__routed_per_layer": [8, 2],
            "model__router__pool__min": 2,
        },
    ),
    "clean_alone": ("clean", {"model__experts__shared": 0, "model__experts__sharing": "all"}),
}
"""Layout and settings of tiny models; a layer of 2 experts has fewer than a token would choose."""


def expect(folder: Path, model: Transformer, tokens_BS: Tensor, **more: Tensor) -> Path:
    """Write beside a folder what our model computes. Returns the folder."""
    batch = PackedBatch.from_rows(tokens_BS)
    logits_BSV = model.logits(model(batch)).view(*tokens_BS.shape, -1)
    loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    ours = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.layers.0.self_attn.o_proj.weight": "blocks.0.attention.out.weight",
        "model.layers.1.pre_feedforward_layernorm.weight": "blocks.1.moe_norm.weight",
    }
    wanted = {"input_ids": tokens_BS, "logits": logits_BSV.detach(), **more}
    for theirs, name in ours.items():
        wanted[theirs] = model.get_parameter(name).grad
    gate = model.get_parameter("blocks.1.moe.router.weight_ED").grad
    rows = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.weight"].shape[0]
    # Of a lone shared expert, whose weight is 1 whatever its row says, there is no gradient.
    wanted["model.layers.1.mlp.gate.weight"] = gate[:rows].clone()
    save_file(wanted, folder.with_name(f"{folder.name}.safetensors"))
    return folder


def export_cases(folder: Path, names: list[str]) -> list[Path]:
    folders = []
    for seed, name in enumerate(names):
        layout, settings = CASES[name]
        config, model = tiny_config(**settings), tiny_model(seed, **settings)
        export_checkpoint(save(folder / f"{name}-run", config, model), folder / name, layout)
        tokens_BS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(seed))
        folders.append(expect(folder / name, model, tokens_BS))
    return folders


def export_run(folder: Path, data: Path) -> Path:
    """A run with a tokenizer, in the clean layout."""
    run = folder / "run"
    train(config_from_dict(tiny_settings(data, run, steps=1)))
    assert main(["export", str(run), "--out", str(folder / "trained"), "--layout", "clean"]) == 0
    _, model = load_huggingface(folder / "trained")
    text = "bread salt anchor"
    ids = Tokenizer.from_file(str(data / "tokenizer.json")).encode(text).ids
    tokens_BS = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(9))
    words = {"token_ids": torch.tensor(ids), "text": torch.tensor(list(text.encode()))}
    return expect(folder / "trained", model, tokens_BS, **words)


def swap_fixture(folder: Path, fixture: Path) -> Path:
    """A released folder, its code swapped, with the values of the reference code beside it."""
    expected = load_file(fixture / "expected.safetensors")
    copy = folder / fixture.name
    shutil.copytree(fixture, copy, ignore=shutil.ignore_patterns("expected.*"))
    assert main(["export", "--code-only", str(copy)]) == 0
    kept = {name: expected[name] for name in ("input_ids", "logits")}
    save_file(kept, folder / f"{fixture.name}.safetensors")
    return copy


def run_python(python: Path | str, home: Path, *words: str | Path) -> str:
    """What a Python prints that runs in `home`, which is where transformers keeps its files too."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, *words], cwd=home, env=environ, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_peer(python: Path | str, folders: list[Path], home: Path) -> dict[str, Any]:
    """What `modeling_peer.py` prints."""
    return json.loads(run_python(python, home, PEER, *folders).splitlines()[-1])


def check(cases: dict[str, dict[str, Any]]) -> None:
    """Logits to 1e-4 in fp32, and all else that a folder must do."""
    for folder, result in cases.items():
        for name in ("eager", "batched_mm", "grouped_mm"):
            for what in ("logits", "cached_logits", "gradients"):
                assert result[f"{name}_{what}"] < 1e-4, (folder, name, what, result)
        balances = ("balance", "balance_of_labels", "balance_of_part")
        for name in ("attention_logits", "body_logits", "loss", *balances):
            assert result[name] < 1e-4, (folder, name, result)
        for name in ("cached", "padded", "recomputed"):
            assert result[name] is True, (folder, name)
        for name, std in result["fresh_std"].items():
            assert 0.7 < std < 1.3, (folder, name, std)
        check_saved(Path(folder))
    one_shared = next(r for f, r in cases.items() if Path(f).name in ("published", "hf_emo_tiny"))
    assert len(one_shared["refused"]) >= 10
    for name, line in one_shared["refused"].items():
        assert name in line and "\n" not in line, line


def check_saved(folder: Path) -> None:
    """What `save_pretrained` wrote is the same folder: it is imported, and has all bits."""
    saved = folder.with_name(f"{folder.name}-saved")
    theirs, ours = tensors_in(saved), tensors_in(folder)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert all((saved / name).is_file() for name in CODE)
    written = json.loads((saved / "config.json").read_text())
    assert written["norm_topk_prob"] is (folder.name == "published_normalised")
    assert written["num_shared_experts"] == written["n_shared_experts"]
    config, _ = load_huggingface(folder)
    with TemporaryDirectory() as out:
        result = import_folder(saved, Path(out) / "in")
        assert result.unused_settings == []
    assert load_huggingface(saved)[0] == config


HAVE = importlib.util.find_spec("transformers") is not None


@pytest.mark.skipif(not HAVE, reason="needs the bench extra: pip install -e '.[bench]'")
def test_exported_folders_run_with_the_transformers_that_is_installed(tmp_path: Path) -> None:
    result = run_peer(sys.executable, export_cases(tmp_path, ["published", "clean"]), tmp_path)
    check(result["cases"])


def environment(folder: Path, requirement: str) -> Path:
    """A Python in `folder` that has transformers, and torch from here. Skips where packages cannot
    be had."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--upgrade", requirement]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=1800)
    if done.returncode and "No matching distribution found for" in done.stderr:
        pytest.skip(f"{requirement}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(packages.glob("torch/")), "transformers brought another torch"
    return python


@pytest.fixture(scope="module")
def all_folders(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("folders")
    folders = [*export_cases(folder, list(CASES)), export_run(folder, tiny_data)]
    fixtures = [case.values[0] if hasattr(case, "values") else case for case in found("hf_*")]
    return folders + [swap_fixture(folder, path) for path in fixtures if path is not None]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("requirement", VERSIONS)
def test_exported_folders_run_with_every_version(
    requirement: str, all_folders: list[Path], tmp_path: Path
) -> None:
    for folder in all_folders:
        shutil.rmtree(folder.with_name(f"{folder.name}-saved"), ignore_errors=True)
    python = environment(tmp_path / "environment", requirement)
    result = run_peer(python, all_folders, tmp_path)
    if "==" in requirement:
        assert result["transformers"] == requirement.split("==")[1]
    check(result["cases"])
    (trained,) = [case for name, case in result["cases"].items() if Path(name).name == "trained"]
    assert trained["eos_token"] == "<|endoftext|>"
    (trained_folder,) = [path for path in all_folders if path.name == "trained"]
    (tmp_path / "exported").symlink_to(trained_folder)
    assert run_python(python, tmp_path, "-c", SNIPPET).strip()
    worst = max(case["grouped_mm_logits"] for case in result["cases"].values())
    print(f"transformers {result['transformers']}: {len(all_folders)} folders, {worst:.1e}")


# ---- the swap


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder with code of its own, of which config.json says something that we do not know."""
    auto_map = {"AutoModelForCausalLM": "modeling_emo.EmoForCausalLM"}
    folder = write(tmp_path / "released", auto_map=auto_map, extra=[1, {"a": None}])
    (folder / "modeling_emo.py").write_text("raise SystemExit")
    return folder


def test_a_swap_changes_the_code_and_nothing_else(released: Path, capsys: Any) -> None:
    before = snapshot(released)
    assert main(["export", "--code-only", str(released), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    after = snapshot(released)
    assert set(after) - set(before) == {*CODE, ORIGINAL} == {*result["code"], ORIGINAL}
    assert {name for name in before if before[name] != after[name]} == {"config.json"}
    assert after[ORIGINAL] == before["config.json"] and result["original_config"] == ORIGINAL
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    assert result["replaced_auto_map"] == old["auto_map"] and result["unused_settings"] == ["extra"]
    assert new == {**old, "auto_map": AUTO_MAP} and list(new) == list(old)
    # Once more, after an update: the code is new, the first config.json stays kept.
    (released / CODE[0]).write_text("old")
    assert main(["export", "--code-only", str(released), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert snapshot(released) == after
    assert result["original_config"] is None and result["replaced_auto_map"] is None


def test_a_swap_leaves_what_a_link_points_to(released: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (released / "config.json").rename(blob)
    (released / "config.json").symlink_to(blob)
    before = blob.read_bytes()
    swap_code(released)
    assert blob.read_bytes() == before and not (released / "config.json").is_symlink()


@pytest.mark.parametrize("step", ["write_whole", "flush_to_disk"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_swap_that_fails_changes_nothing(
    released: Path, monkeypatch: pytest.MonkeyPatch, step: str, at: int
) -> None:
    before, calls, real = snapshot(released), [], getattr(model_code, step)

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == at + 1:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(model_code, step, full)
    with pytest.raises(OSError):
        swap_code(released)
    assert snapshot(released) == before


def test_a_folder_that_cannot_run_is_refused_and_stays(tmp_path: Path) -> None:
    def swap(folder: Path) -> Callable[[], Any]:
        return lambda: swap_code(folder)

    folder = write(tmp_path / "biased", attention_bias=True)
    assert "attention_bias=True is not supported" in refused(swap(folder), tmp_path)
    folder = write(tmp_path / "other", model_type="olmoe")
    assert "model_type='olmoe' is not supported" in refused(swap(folder), tmp_path)
    folder = write(tmp_path / "more", num_hidden_layers=3)
    assert "config.json belongs to another checkpoint" in refused(swap(folder), tmp_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--code-only", "F", "--out", "G"], "takes no --out; leave that out"),
        (["RUN", "--code-only", "F"], "takes no CHECKPOINT; leave that out"),
        (["RUN", "--out", "G"], "--layout is missing; it needs CHECKPOINT, --out and --layout, or"),
        ([], "CHECKPOINT, --out, --layout is missing"),
        (["--code-only", "nowhere"], "give the folder of a Hugging Face checkpoint"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words: list[str], line: str, capsys) -> None:
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and line in error
