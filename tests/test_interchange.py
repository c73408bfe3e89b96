"""Proves `emotrain import` and `emotrain export`: every number of a model goes to its place and
comes back bit for bit, in both layouts, in little memory; a folder that lies is refused with one
line, and nothing is written. (What a folder may say: test_huggingface.py.)"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_batch, tiny_config, tiny_model
from safetensors.torch import load_file
from test_fixtures import found
from test_huggingface import CONFIG, published_tensors, shard, write
from torch import Tensor

from emotrain.cli import main
from emotrain.config import Config, config_from_dict, save_config
from emotrain.errors import UserError, WriteError
from emotrain.folders import MANIFEST
from emotrain.interop import export_folder, folder_tensors, import_folder
from emotrain.interop.export_folder import export_checkpoint
from emotrain.interop.huggingface import load_huggingface
from emotrain.interop.layouts import LAYOUTS, links, parameters_of, shape_of, tensors_of
from emotrain.interop.model_code import AUTO_MAP
from emotrain.model.transformer import Transformer
from emotrain.progress import ProgressBar
from emotrain.training import checkpoint
from emotrain.training.run import train
from tests.conftest import ROOT, tiny_settings

run_import = import_folder.import_folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        if file.name != "expected.safetensors"
        for name, tensor in load_file(file).items()
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, types and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def clean_tensors(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The clean layout of published tensors with one shared expert, written out by hand."""
    clean = {}
    layers = config["num_hidden_layers"]
    per_layer = config.get("num_experts_per_layer") or [config["num_experts"]] * layers
    last = {f"model.layers.{layer}": count - 1 for layer, count in enumerate(per_layer)}
    for name, tensor in tensors.items():
        prefix = ".".join(name.split(".")[:3])
        if name.endswith("mlp.gate.weight"):
            clean[name] = tensor[:-1]
        elif prefix in last:
            shared = f"{prefix}.mlp.experts.{last[prefix]}."
            clean[name.replace(shared, f"{prefix}.mlp.shared_experts.")] = tensor
        else:
            clean[name] = tensor
    return clean


def save(folder: Path, config: Config, model: Transformer) -> Path:
    """A checkpoint of a model that was never trained."""
    state = checkpoint.TrainingState(0, 0, "", 0, 4, 0.0)
    optimizer = torch.optim.AdamW(model.parameters())
    return checkpoint.save(folder, model, optimizer, config, state)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def refused(do: Callable[[], Any], beside: Path) -> str:
    """The one line that refuses it; nothing has been written in `beside`."""
    before = snapshot(beside)
    with pytest.raises(UserError) as caught:
        do()
    assert snapshot(beside) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the layouts


PER_LAYER = {"num_experts_per_layer": [4, 9], "num_shared_experts_per_layer": [1, 1]}


def test_the_released_model_has_its_6259_names() -> None:
    """Spec 10.2: 16 * (128 * 3 + 1 + 4 + 2) + 3; the clean layout has as many."""
    model = config_from_dict({"model": {"vocab_size": 100278}}).model
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(16):
        prefix = f"model.layers.{layer}"
        parts = ["pre_attention_layernorm", "pre_feedforward_layernorm", "mlp.gate"]
        parts += [f"self_attn.{name}_proj" for name in "qkvo"]
        parts += [
            f"mlp.experts.{expert}.{name}_proj"
            for expert in range(128)
            for name in ("gate", "up", "down")
        ]
        expected |= {f"{prefix}.{part}.weight" for part in parts}
    published = tensors_of(list(links(model, "published")))
    assert published.keys() == expected and len(expected) == 6259
    clean = tensors_of(list(links(model, "clean")))
    assert len(clean) == 6259 and "model.layers.15.mlp.experts.127.up_proj.weight" not in clean
    layer = "model.layers.3.mlp"
    for names, name, shape in (
        (published, "gate.weight", (128, 2048)),
        (clean, "gate.weight", (127, 2048)),
        (published, "experts.127.gate_proj.weight", (1024, 2048)),
        (published, "experts.0.down_proj.weight", (2048, 1024)),
        (clean, "shared_experts.down_proj.weight", (2048, 1024)),
    ):
        assert shape_of(names[f"{layer}.{name}"]) == shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model__experts__routed_per_layer": [4, 8], "model__num_kv_heads": 1},
        {"model__experts__shared": 0, "model__experts__sharing": "all"},
        {"model__experts__shared": 3},
    ],
)
def test_links_fill_every_parameter_once_in_the_order_of_its_elements(
    layout: Any, settings: dict[str, Any]
) -> None:
    """A file is written by appending what the links say."""
    config = tiny_config(**settings).model
    model = Transformer(config)
    numbers = parameters_of(list(links(config, layout)))
    assert numbers.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        elements = torch.arange(parameter.numel()).view(parameter.shape)
        boxes = []
        for link in numbers[name]:
            box = elements
            for axis, (start, size) in enumerate(zip(link.offsets, link.sizes, strict=True)):
                box = box.narrow(axis, start, size)
            boxes.append(box.flatten())
        assert torch.equal(torch.cat(boxes), elements.flatten()), name


# ---- both directions


@pytest.mark.fixtures
@pytest.mark.parametrize("folder", found("hf_*"))
def test_the_released_format_comes_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    assert main(["import", str(folder), "--out", str(tmp_path / "in")]) == 0
    for layout in LAYOUTS:
        out = str(tmp_path / layout)
        assert main(["export", str(tmp_path / "in"), "--out", out, "--layout", layout]) == 0
    assert_same(tensors_in(tmp_path / "published"), tensors_in(folder))
    theirs = json.loads((folder / "config.json").read_text())
    assert_same(tensors_in(tmp_path / "clean"), clean_tensors(theirs, tensors_in(folder)))
    ours = json.loads((tmp_path / "published/config.json").read_text())
    never_set = {name for name, value in theirs.items() if value in (None, False)}
    assert theirs.keys() - ours.keys() - never_set == {"transformers_version"}
    assert {name: ours[name] for name in ours.keys() & theirs.keys()} == {
        name: theirs[name] for name in ours.keys() & theirs.keys()
    }


@pytest.mark.parametrize(
    ("settings", "dtype", "sharded"),
    [
        ({}, torch.float32, False),
        ({}, torch.bfloat16, True),
        (PER_LAYER, torch.float32, True),
        (PER_LAYER, torch.bfloat16, False),
    ],
)
def test_what_is_imported_and_exported_is_what_was_there(
    tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype, sharded: bool
) -> None:
    tensors = {k: v.to(dtype) for k, v in published_tensors({**CONFIG, **settings}).items()}
    folder = write(tmp_path / "folder", tensors, **settings)
    if sharded:
        shard(folder)
    result = run_import(folder, tmp_path / "in")
    _, expected = load_huggingface(folder)
    config, model = checkpoint.load_model(tmp_path / "in")
    assert_same(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert result.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert config.model.router.pool.kind == "none" and result.layout == "published"
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    export_checkpoint(tmp_path / "in", tmp_path / "published", "published", name)
    assert_same(tensors_in(tmp_path / "published"), tensors)
    export_checkpoint(tmp_path / "in", tmp_path / "clean", "clean", name)
    assert_same(tensors_in(tmp_path / "clean"), clean_tensors({**CONFIG, **settings}, tensors))
    again = run_import(tmp_path / "clean", tmp_path / "again")
    assert again.layout == "clean"
    _, model = checkpoint.load_model(tmp_path / "again")
    for name, parameter in model.named_parameters():
        wanted = expected.get_parameter(name).clone()
        if name.endswith("router.weight_ED"):
            wanted[-1] = 0  # of the shared expert: nothing reads it
        assert torch.equal(parameter, wanted), name


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("published", {}),
        ("published", {"model__experts__shared": 2, "model__router__shared_weight": "softmax"}),
        ("published", {"model__experts__shared": 0, "model__router__normalize_weights": True}),
        ("published", {"model__experts__sharing": "all"}),
        ("clean", {"model__num_kv_heads": 1}),
        ("clean", {"model__experts__shared": 3}),
        ("clean", {"model__experts__shared": 0}),
        ("clean", {"model__experts__routed_per_layer": [4, 8]}),
    ],
)
def test_an_exported_model_computes_the_same(
    tmp_path: Path, layout: Any, settings: dict[str, Any]
) -> None:
    config = tiny_config(**settings)
    model = tiny_model(**settings)
    export_checkpoint(save(tmp_path, config, model), tmp_path / "out", layout)
    exported = json.loads((tmp_path / "out/config.json").read_text())
    shared = config.model.experts.shared
    assert exported["num_shared_experts"] == exported["n_shared_experts"] == shared
    assert exported["norm_topk_prob"] is config.model.router.normalize_weights
    _, read = load_huggingface(tmp_path / "out")
    batch = tiny_batch()
    with torch.no_grad():
        assert torch.equal(read(batch).hidden_TD, model(batch).hidden_TD)


def test_parts_of_several_processes_are_put_together(tmp_path: Path) -> None:
    """Of a run whose ranks wrote a file each."""
    run = ROOT / "tests/old_files/two_processes"
    _, model = checkpoint.load_model(run)
    result = export_checkpoint(run, tmp_path / "out", "published")
    _, read = load_huggingface(tmp_path / "out")
    assert_same(dict(read.named_parameters()), dict(model.named_parameters()))
    assert result.step > 0


def test_large_models_have_several_files_and_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_folder, "FILE_BYTES", 4096)
    folder = write(tmp_path / "folder")
    imported = run_import(folder, tmp_path / "in")
    exported = export_checkpoint(tmp_path / "in", tmp_path / "out", "published")
    assert imported.files > 3 and len(exported.files) > 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == exported.files.keys()
    assert index["metadata"]["total_size"] == 4 * exported.parameters
    largest = max(tensor.nbytes for tensor in published_tensors().values())
    for name, entry in exported.files.items():
        assert (tmp_path / "out" / name).stat().st_size == entry.bytes
        held = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / name).values())
        assert held <= max(4096, largest)
    assert_same(tensors_in(tmp_path / "out"), tensors_in(folder))
    assert main(["verify", str(tmp_path / "in")]) == 0


def test_rows_of_the_vocabulary_beyond_the_configuration_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "folder", vocab_size=60)  # of 64 rows
    assert main(["import", str(folder), "--out", str(tmp_path / "in")]) == 0
    assert "60 rows as in config.json; 4 more were padding" in capsys.readouterr().out
    config, model = checkpoint.load_model(tmp_path / "in")
    tensors = published_tensors()
    assert config.model.vocab_size == 60
    assert torch.equal(model.embedding.weight, tensors["model.embed_tokens.weight"][:60])
    assert torch.equal(model.head.weight, tensors["lm_head.weight"][:60])
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:62]
    write(folder, tensors, vocab_size=60)
    assert "config.json says [60, 16]" in refused(
        lambda: run_import(folder, tmp_path / "other"), tmp_path
    )


# ---- the checkpoint is one like any other

PAGE = (ROOT / "docs/interchange.md").read_text(encoding="utf-8")
SMALLER = {
    "train": ["training.steps=2", "training.micro_batch=16", "training.tensorboard=false"],
    "evaluate": [
        "--documents",
        "2",
        "--calibration-documents",
        "1",
        "--keep",
        "0.5",
        "--random-seeds",
        "0",
    ],
}


def test_the_commands_of_the_page_run_as_they_are_written(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An imported checkpoint is verified, inspected, evaluated, trained from and exported."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if not language]
    assert len(blocks) == 2
    write(tmp_path / "Emo_1b14b_1T")
    monkeypatch.chdir(tmp_path)
    train(config_from_dict(tiny_settings(tiny_data, tmp_path / "runs/quickstart", steps=1)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(tiny_data)
    lines = [line.split()[1:] for block in blocks for line in block.strip().splitlines()]
    known = {"import", "verify", "inspect", "evaluate", "train", "export"}
    assert {line[0] for line in lines} == known
    for line in lines:
        assert main([*line, *SMALLER.get(line[0], [])]) == 0, line
    swapped = json.loads((tmp_path / "Emo_1b14b_1T/config.json").read_text())
    assert swapped["auto_map"] == AUTO_MAP
    state = checkpoint.load_state(checkpoint.find(tmp_path / "runs/further"))
    assert state.step == 2 and state.global_batch == 16 and state.origins
    exported = json.loads((tmp_path / "further/config.json").read_text())
    assert exported["dtype"] == "bfloat16" and exported["eos_token_id"] == 0
    assert json.loads((tmp_path / "further/generation_config.json").read_text()) == {
        "eos_token_id": 0
    }
    tokenizer = (tiny_data / "tokenizer.json").read_bytes()
    assert (tmp_path / "further/tokenizer.json").read_bytes() == tokenizer
    words = json.loads((tmp_path / "further/tokenizer_config.json").read_text())
    assert words["eos_token"] == "<|endoftext|>" and words["model_max_length"] == 32


def test_what_lies_beside_the_weights_comes_back(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    special = {"eos_token_id": [3, 4], "pad_token_id": 1, "max_position_embeddings": 32}
    folder = write(
        tmp_path / "folder", published_tensors({**CONFIG, "vocab_size": 320}), vocab_size=320,
        auto_map={"AutoConfig": "elsewhere.EmoConfig"}, **special,
    )  # fmt: skip
    shutil.copy(tiny_data / "tokenizer.json", folder)
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    (folder / "elsewhere.py").write_text("raise SystemExit")
    assert main(["import", str(folder), "--out", str(tmp_path / "in")]) == 0
    assert "of 320 rows have no token; they are kept" in capsys.readouterr().out
    export_checkpoint(tmp_path / "in", tmp_path / "back", "published")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    exported = json.loads((tmp_path / "back/config.json").read_text())
    assert {name: exported[name] for name in special} == special
    assert exported["auto_map"] == AUTO_MAP and not (tmp_path / "back/elsewhere.py").exists()


# ---- whole or not there


def test_what_exists_is_never_touched(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder")
    run_import(folder, tmp_path / "in")
    (tmp_path / "file").write_text("mine")
    for out in ("in", "folder", "file", "file/below"):
        for do in (
            lambda out=out: run_import(folder, tmp_path / out),
            lambda out=out: export_checkpoint(tmp_path / "in", tmp_path / out, "clean"),
        ):
            message = refused(do, tmp_path)
            assert "choose another --out" in message
    assert "step 7" in refused(lambda: run_import(folder, tmp_path / "step-00000007"), tmp_path)


def test_a_folder_that_appears_meanwhile_is_never_touched(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder")

    class Bar(ProgressBar):
        def advance(self, amount: float = 1) -> None:
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in/mine").write_text("mine")

    with pytest.raises(UserError, match="exists"):
        run_import(folder, tmp_path / "in", Bar(shown=False))
    assert snapshot(tmp_path / "in") == {"mine": b"mine"}
    assert sorted(os.listdir(tmp_path)) == ["folder", "in"]


@pytest.mark.parametrize("pieces", [0, 1, 40])
def test_a_killed_import_or_export_leaves_nothing_half(tmp_path: Path, pieces: int) -> None:
    folder = write(tmp_path / "folder")
    run_import(folder, tmp_path / "in")

    class Bar(ProgressBar):
        left = pieces

        def advance(self, amount: float = 1) -> None:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), 9)

    def export(bar: ProgressBar) -> None:
        export_checkpoint(tmp_path / "in", tmp_path / "out", "published", bar=bar)

    for do in (lambda bar: run_import(folder, tmp_path / "out", bar), export):
        killed = multiprocessing.get_context("fork").Process(target=do, args=(Bar(shown=False),))
        killed.start()
        killed.join()
        assert killed.exitcode == -9
        names = sorted(os.listdir(tmp_path))
        assert names[1:] == ["folder", "in"] and names[0].startswith(".out.partial-")
        do(ProgressBar(shown=False))
        assert sorted(os.listdir(tmp_path)) == ["folder", "in", "out"]
        assert not (tmp_path / "out/.lock").exists()
        shutil.rmtree(tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "folder")

    class Bar(ProgressBar):
        def advance(self, amount: float = 1) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match="no space left.*choose another --out"):
        run_import(folder, tmp_path / "in", Bar(shown=False))
    assert os.listdir(tmp_path) == ["folder"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(OSError, match="it needs .* MB and 0.0 MB are free"):
        run_import(folder, tmp_path / "in")
    assert os.listdir(tmp_path) == ["folder"]


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "layout", "words"),
    [
        ({"model__experts__routed": 0, "model__experts__top_k": 0}, "published", "a dense model"),
        ({"model__router__gating": "sigmoid"}, "published", "gating=sigmoid"),
        ({"model__router__normalize_weights": True}, "clean", "normalize_weights=true"),
        ({"model__experts__shared": 2}, "published", "use --layout clean"),
        (
            {"model__experts__shared": 2, "model__router__shared_weight": "softmax"},
            "clean",
            "use --layout published",
        ),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_refused(
    tmp_path: Path, settings: dict[str, Any], layout: Any, words: str
) -> None:
    path = save(tmp_path, tiny_config(**settings), tiny_model(**settings))
    assert words in refused(lambda: export_checkpoint(path, tmp_path / "out", layout), tmp_path)


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    path = save(tmp_path, tiny_config(), tiny_model())
    weights = path / "model-00000.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1], content[:-1] + b"\0"):
        weights.write_bytes(damaged)
        message = refused(lambda: export_checkpoint(path, tmp_path / "out", "clean"), tmp_path)
        assert "use another checkpoint" in message
    weights.write_bytes(content)
    save_config(tiny_config(model__experts__routed=7), path / "config.yaml")
    assert "config.yaml" in refused(
        lambda: export_checkpoint(path, tmp_path / "out", "clean"), tmp_path
    )
    (path / MANIFEST).unlink()
    assert "no checkpoint here" in refused(
        lambda: export_checkpoint(path, tmp_path / "out", "clean"), tmp_path
    )


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    folder = write(tmp_path / "folder")
    shutil.copy(tiny_data / "tokenizer.json", folder)
    assert "64 rows of embedding" in refused(lambda: run_import(folder, tmp_path / "in"), tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    assert "not a tokenizer.json" in refused(lambda: run_import(folder, tmp_path / "in"), tmp_path)
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(folder_tensors.LARGEST_JSON + 1)
    with pytest.raises(UserError, match="at most"):
        run_import(folder, tmp_path / "in")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", json.dumps(CONFIG)[:-1] + ', "vocab_size": 64}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "a.safetensors", "a": "b"}}'),
    ],
)
def test_a_key_that_stands_there_twice_is_refused(tmp_path: Path, file: str, text: str) -> None:
    folder = write(tmp_path / "folder")
    (folder / file).write_text(text)
    assert "stands there twice" in refused(lambda: run_import(folder, tmp_path / "in"), tmp_path)


def test_a_tensor_that_stands_in_a_file_twice_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "folder") / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entry = '"model.norm.weight":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},'
    header = b"{" + entry.encode() + content[9 : 8 + length]
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert "model.safetensors" in refused(
        lambda: run_import(file.parent, tmp_path / "in"), tmp_path
    )


def test_two_names_of_one_number_must_agree(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", n_shared_experts=2)
    assert "n_shared_experts=2" in refused(lambda: run_import(folder, tmp_path / "in"), tmp_path)
    write(folder, n_shared_experts=1, expert_layout="dirty")
    assert "expert_layout='dirty'" in refused(lambda: run_import(folder, tmp_path / "in"), tmp_path)
    write(folder, num_shared_experts=None, n_shared_experts=1)
    run_import(folder, tmp_path / "in")


# ---- memory


class LiveTensors(ProgressBar):
    """Counts the bytes of all tensors that are alive while a piece is written."""

    def __init__(self) -> None:
        super().__init__(shown=False)
        self.most = 0

    def advance(self, amount: float = 1) -> None:
        storages = {
            storage.data_ptr(): storage.nbytes()
            for value in gc.get_objects()
            if type(value) is Tensor and not value.is_meta
            for storage in [value.untyped_storage()]
        }
        self.most = max(self.most, sum(storages.values()))


def test_no_more_than_a_few_pieces_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer has 26 times the bytes of an expert's matrix, the vocabulary 16 times: neither is
    ever there as a whole."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 32, "vocab_size": 512, "num_experts": 8,
        "num_hidden_layers": 1,
    }  # fmt: skip
    folder = write(tmp_path / "folder", published_tensors({**CONFIG, **sizes}), **sizes)
    matrix = 64 * 32 * 4
    for module in (folder_tensors, export_folder):
        monkeypatch.setattr(module, "BLOCK_BYTES", matrix)
    gc.collect()
    gc.freeze()  # what was there before is not counted, nor looked through at each piece
    try:
        bar = LiveTensors()
        run_import(folder, tmp_path / "in", bar)
        imported, bar.most = bar.most, 0
        export_checkpoint(tmp_path / "in", tmp_path / "out", "published", "bf16", bar)
    finally:
        gc.unfreeze()
    assert matrix <= imported <= 3 * matrix and matrix <= bar.most <= 3 * matrix
