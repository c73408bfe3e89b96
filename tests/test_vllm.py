"""Proves the vLLM plugin as far as a CPU can: with vLLM's layers replaced by plain ones it computes
what our model computes, from every kind of folder and on every kind of rank; each tensor of a
folder goes to one place; what vLLM would do wrong is refused."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_model
from safetensors.torch import load_file
from test_fixtures import found
from test_huggingface import CONFIG, published_tensors
from test_interchange import clean_tensors, save, tensors_in
from torch import Tensor
from vllm_standins import PLACE, AllReduce, ModelRegistry, Place, modules

from emotrain.batch import PackedBatch
from emotrain.cli import main
from emotrain.errors import UserError
from emotrain.interop.export_folder import export_checkpoint
from emotrain.interop.huggingface import load_huggingface
from emotrain.interop.serving import ServedModel, split_softmax
from emotrain.model.router import RoutingRequest
from emotrain.modular.artefact import Calibration, Subset
from emotrain.training.checkpoint import load_model
from emotrain.training.checkpoint_folders import identity
from tests.conftest import ROOT

ALONE: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "enable_expert_parallel": False,
    "enable_eplb": False,
    "enable_ep_weight_filter": False,
    "all2all_backend": "allgather_reducescatter",
}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """emotrain.interop.vllm_model over stand-ins."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    name = "emotrain.interop.vllm_model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)
    import emotrain.interop

    vars(emotrain.interop).pop("vllm_model", None)


def vllm_config(published: dict[str, Any], folder: str = "folder", **parallel: Any) -> Any:
    """What vLLM gives a model, of what ours reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: dict(published)),
            model=folder,
            max_model_len=64,
        ),
        parallel_config=SimpleNamespace(**{**ALONE, **parallel}),
        aux_output_config=SimpleNamespace(enable_return_routed_experts=False),
        quant_config=None,
        cache_config=None,
    )


def serve(
    plugin: ModuleType,
    published: dict[str, Any],
    tensors: dict[str, Tensor],
    tokens_T: Tensor,
    ranks: int = 1,
    experts: bool = False,
    stages: int = 1,
) -> Tensor:
    """Logits [T, V] of one sequence."""
    results: dict[int, Tensor] = {}
    all_reduce = AllReduce(ranks)

    def run(rank: int) -> None:
        between = None
        for stage in range(stages):
            PLACE.now = Place(rank, ranks, experts, stage, stages, all_reduce)
            config = vllm_config(
                published, tensor_parallel_size=ranks, enable_expert_parallel=experts
            )
            model = plugin.EmoForCausalLM(vllm_config=config)
            names = model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
            # vLLM looks for parameters that no weight came for.
            assert all(
                any(own.startswith(name) for name in names) for own, _ in model.named_parameters()
            )
            assert not any(own.isnan().any() for own in model.parameters())
            positions_T = torch.arange(len(tokens_T))
            between = model(tokens_T, positions_T, between)
        results[rank] = model.compute_logits(between)

    threads = [Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == ranks
    for logits_TV in results.values():
        torch.testing.assert_close(logits_TV, results[0])
    return results[0]


def compare(plugin: ModuleType, folder: Path, **spread: Any) -> None:
    """A folder's logits, served, are those of our own forward pass."""
    config, model = load_huggingface(folder)
    tokens_T = torch.randint(config.vocab_size, (24,), generator=torch.Generator().manual_seed(0))
    batch = PackedBatch.from_rows(tokens_T[None])
    published = json.loads((folder / "config.json").read_text())
    with torch.inference_mode():
        ours_TV = model.logits(model(batch))
        served_TV = serve(plugin, published, tensors_in(folder), tokens_T, **spread)
    torch.testing.assert_close(served_TV, ours_TV, atol=1e-4, rtol=0)
    assert ours_TV.abs().max() > 0.1


# ---- the same logits


@pytest.mark.fixtures
@pytest.mark.parametrize("folder", found("hf_*"))
def test_released_format_has_the_logits_of_the_reference(plugin: ModuleType, folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    published = json.loads((folder / "config.json").read_text())
    for tokens_T, logits_TV in zip(expected["input_ids"], expected["logits"], strict=True):
        served_TV = serve(plugin, published, tensors_in(folder), tokens_T)
        torch.testing.assert_close(served_TV, logits_TV, atol=1e-4, rtol=0)
    compare(plugin, folder)


ONE: dict[str, Any] = {
    "model__num_heads": 4,
    "model__num_kv_heads": 2,
    "model__experts__hidden": 12,
}
KINDS: dict[str, dict[str, Any]] = {
    "one shared": {},
    "none shared": {"model__experts__shared": 0},
    "divided by the sum": {
        "model__experts__shared": 0,
        "model__router__normalize_weights": True,
    },
    "two shared of weight one": {"model__experts__shared": 2},
    "two shared of weights": {
        "model__experts__shared": 2,
        "model__router__shared_weight": "softmax",
    },
    "layers differ": {"model__experts__routed_per_layer": [4, 8]},
    "fewer than are chosen": {
        "model__experts__routed_per_layer": [2, 8],
        "model__router__pool__allow_larger": True,
    },
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of a kind of model in a layout, made once."""
    root = tmp_path_factory.mktemp("exported")

    def make(kind: str, layout: str) -> Path:
        folder, checkpoint = root / f"{kind} {layout}", root / kind
        if not folder.exists():
            if not checkpoint.exists():
                settings = {**ONE, **KINDS[kind]}
                save(checkpoint, tiny_config(**settings), tiny_model(**settings))
            export_checkpoint(checkpoint, folder, layout)
        return folder

    return make


@pytest.mark.parametrize(
    "kind, layout",
    [
        *((kind, "published") for kind in KINDS if kind != "two shared of weight one"),
        *((kind, "clean") for kind in KINDS if kind != "two shared of weights"),
    ],
)
def test_every_kind_of_folder_has_our_logits(plugin, exported, kind: str, layout: str) -> None:
    compare(plugin, exported(kind, layout))


@pytest.mark.parametrize(
    "spread",
    [
        {"ranks": 2},
        {"ranks": 4},
        {"ranks": 2, "experts": True},
        {"ranks": 4, "experts": True},
        {"stages": 2},
        {"ranks": 2, "stages": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["layers differ", "two shared of weights"])
def test_every_way_to_spread_it_has_our_logits(plugin, exported, kind: str, spread) -> None:
    """10 experts on 4 ranks: ranks may have different numbers. With 4 ranks and 2 heads of keys,
    two ranks have the same head."""
    compare(plugin, exported(kind, "published"), **spread)


@pytest.fixture(scope="module")
def subset_folders(tmp_path_factory) -> dict[str, Path]:
    """A model, and its extracted subset in both layouts, with as many experts in a layer as chosen
    there."""
    root = tmp_path_factory.mktemp("subset")
    full = save(root / "full", tiny_config(**ONE), tiny_model(**ONE))
    kept = ((0, 2, 5, 8), (1, 3, 4, 6, 7, 8))
    subset = Subset(
        experts_kept_per_layer=kept,
        experts_per_layer=(9, 9),
        num_shared_experts=1,
        method="random",
        precision="fp32",
        budget="4,6",
        checkpoint=str(full),
        checkpoint_fingerprint=identity(full),
        tokenizer_fingerprint="",
        calibration=Calibration("none", "", 1, 1, ""),
    )
    assert main(["extract", str(full), str(subset.save(root / "subset.json")), "--out",
                 str(root / "small")]) == 0  # fmt: skip
    folders = {"full": full}
    for layout in ("published", "clean"):
        export_checkpoint(root / "small", root / layout, layout)
        folders[layout] = root / layout
    return folders


@pytest.mark.parametrize("layout", ["published", "clean"])
def test_an_extracted_subset_is_served_as_the_masked_model(plugin, subset_folders, layout) -> None:
    folder = subset_folders[layout]
    compare(plugin, folder)
    _, full = load_model(subset_folders["full"])
    tokens_T = torch.arange(20) * 3 % full.config.vocab_size
    kept = [torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4, 6, 7])]
    published = json.loads((folder / "config.json").read_text())
    with torch.inference_mode():
        batch = PackedBatch.from_rows(tokens_T[None])
        masked_TV = full.logits(full(batch, RoutingRequest(subset=kept)))
        served_TV = serve(plugin, published, tensors_in(folder), tokens_T)
    torch.testing.assert_close(served_TV, masked_TV, atol=1e-4, rtol=0)


def test_a_padded_vocabulary_is_cut(plugin: ModuleType) -> None:
    tensors, tokens_T = published_tensors(), torch.arange(20)
    plain_TV = serve(plugin, CONFIG, tensors, tokens_T)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((6, 16), 1e9)])
    assert torch.equal(serve(plugin, CONFIG, tensors, tokens_T), plain_TV)


# ---- every tensor in one place


@pytest.mark.parametrize("layout", ["published", "clean"])
def test_every_tensor_goes_to_one_place(plugin, layout: str) -> None:
    """Each element of a folder gets a number of its own: after loading, the parameters hold each of
    them once, but for the router's rows of shared experts, which nothing depends on."""
    tensors = published_tensors({**CONFIG, "num_experts_per_layer": [4, 6]})
    config = {**CONFIG, "num_experts_per_layer": [4, 6]}
    if layout == "clean":
        tensors = clean_tensors(config, tensors)
        config |= {"expert_layout": "clean", "num_experts_per_layer": [3, 5]}
        config |= {"num_experts": 5, "num_experts_per_tok": 2}
    numbers = torch.arange(sum(map(Tensor.numel, tensors.values())), dtype=torch.float64)
    parts = numbers.split([tensor.numel() for tensor in tensors.values()])
    tensors = {
        name: own.view(tensor.shape).float()
        for (name, tensor), own in zip(tensors.items(), parts, strict=True)
    }
    assert numbers.numel() < 1 << 24, "exact in float32"
    unused = [
        tensor[-1]
        for name, tensor in tensors.items()
        if layout == "published" and name.endswith("gate.weight")
    ]
    PLACE.now = Place()
    model = plugin.EmoForCausalLM(vllm_config=vllm_config(config))
    model.load_weights(iter(tensors.items()))
    places = [own.flatten() for own in model.parameters()]
    everything = torch.cat(places + unused).sort().values
    assert torch.equal(everything, numbers.float())


def change(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda tensors: tensors.pop(EXPERT.format(2)), f"{EXPERT.format(2)} is missing (1 of 53"),
        (change(EXPERT.format(6), torch.zeros(8, 16)), f"{EXPERT.format(6)} is not of this model"),
        (
            change(EXPERT.format(2), torch.zeros(8, 15)),
            "has shape [8, 15], config.json says [8, 16",
        ),
        (change("lm_head.weight", torch.zeros(63, 16)), "has shape [63, 16]"),
        (change("lm_head.weight", torch.zeros(())), "has shape []"),
        (change("lm_head.weight", torch.zeros(64 + 1024, 16)), "has shape [1088, 16]"),
        (
            change(EXPERT.format(2), torch.zeros(8, 16, dtype=torch.float8_e4m3fn)),
            "has type torch.float8_e4m3fn",
        ),
        (change("model.layers.0.mlp.gate.bias", torch.zeros(6)), "gate.bias is not of this model"),
    ],
)
def test_a_folder_that_lies_is_refused(plugin, spoil, says: str) -> None:
    """vLLM itself passes over an expert that a layer does not have and does not miss one."""
    tensors = published_tensors()
    spoil(tensors)
    PLACE.now = Place()
    model = plugin.EmoForCausalLM(vllm_config=vllm_config(CONFIG))
    with pytest.raises(UserError) as caught:
        model.load_weights(iter(tensors.items()))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_that_comes_twice_is_refused() -> None:
    tensors = list(published_tensors().items())
    with pytest.raises(UserError, match="comes twice"):
        list(ServedModel.read(CONFIG).weights([*tensors, tensors[0]]))


# ---- routing


def test_weighted_shared_experts_follow_the_reference() -> None:
    """Spec 10.4, token by token: softmax over the routed logits, the best as they are; softmax over
    the shared ones."""
    torch.manual_seed(0)
    logits_TE = torch.randn(50, 9)
    weights, experts = split_softmax(logits_TE, logits_TE, 5, False, num_routed=7)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int32
    for token, logits_E in enumerate(logits_TE):
        exp = logits_E.exp()
        routed, shared = exp[:7] / exp[:7].sum(), exp[7:] / exp[7:].sum()
        best = sorted(range(7), key=lambda i: -routed[i])[:3]
        assert experts[token].tolist() == [*best, 7, 8]
        expected = torch.tensor([*(routed[i] for i in best), *shared])
        torch.testing.assert_close(weights[token], expected)


# ---- what vLLM would do wrong


@pytest.mark.parametrize(
    "parallel, says",
    [
        ({"enable_eplb": True}, "--enable-eplb is not supported"),
        ({"tensor_parallel_size": 3}, "3 processes share the 8 hidden units"),
        (
            {"tensor_parallel_size": 2, "data_parallel_size": 3},
            "6 processes share the 8 hidden units",
        ),
        ({"enable_expert_parallel": True, "data_parallel_size": 4}, "a layer has 3 experts"),
        (
            {"enable_expert_parallel": True, "enable_ep_weight_filter": True},
            "--enable-ep-weight-filter counts experts",
        ),
        (
            {
                "enable_expert_parallel": True,
                "all2all_backend": "deepep_v2",
                "data_parallel_size": 2,
            },
            "--all2all-backend deepep_v2",
        ),
    ],
)
def test_ways_to_spread_that_would_go_wrong_are_refused(plugin, parallel, says: str) -> None:
    config = {**CONFIG, "num_experts_per_layer": [4, 6]}
    PLACE.now = Place()
    with pytest.raises(UserError) as caught:
        plugin.EmoForCausalLM(vllm_config=vllm_config(config, **parallel))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_chosen_experts_are_returned_where_each_layer_has_as_many_as_config_says(exported) -> None:
    def ask(kind: str, layout: str) -> None:
        published = json.loads((exported(kind, layout) / "config.json").read_text())
        ServedModel.read(published).check_spread(SimpleNamespace(**ALONE), returns_experts=True)

    ask("one shared", "clean")
    ask("none shared", "published")
    for kind, layout in [("one shared", "published"), ("fewer than are chosen", "clean")]:
        with pytest.raises(UserError, match="--enable-return-routed-experts"):
            ask(kind, layout)


def test_settings_that_nobody_knows_are_named(plugin, capsys) -> None:
    PLACE.now = Place()
    general = {"id2label": {0: "LABEL_0"}, "return_dict": True}
    plugin.EmoForCausalLM(vllm_config=vllm_config({**CONFIG, **general}))
    assert capsys.readouterr().err == ""
    plugin.EmoForCausalLM(vllm_config=vllm_config({**CONFIG, **general, "logit_scale": 2}))
    assert "logit_scale" in capsys.readouterr().err


# ---- the entry point


def entry_point() -> EntryPoint:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [(name, value)] = project["entry-points"]["vllm.general_plugins"].items()
    return EntryPoint(name, value, "vllm.general_plugins")


def test_registering_imports_neither_torch_nor_the_model() -> None:
    """In a process of its own, with stand-ins for the two packages that it talks to. Nor is there
    anything that emotrain depends on but torch where its dependencies are not installed."""
    dependencies = ["numpy", "pyarrow", "omegaconf", "tokenizers", "safetensors", "rich"]
    program = f"""
import sys
from types import ModuleType
vllm, transformers, known = ModuleType("vllm"), ModuleType("transformers"), []
class ModelRegistry:
    register_model = staticmethod(lambda *names: known.append(names))
class AutoConfig:
    register = staticmethod(lambda name, cls, exist_ok: known.append((name, cls.model_type)))
vllm.ModelRegistry, transformers.AutoConfig = ModelRegistry, AutoConfig
transformers.PreTrainedConfig = object
sys.modules |= {{"vllm": vllm, "transformers": transformers}}
from importlib.metadata import EntryPoint
register = EntryPoint("emotrain", "{entry_point().value}", "").load()
register()
register()
model = "emotrain.interop.vllm_model:EmoForCausalLM"
assert known == 2 * [("emo", "emo"), ("EmoForCausalLM", model)]
print(sorted({{"torch", "numpy", "omegaconf", "emotrain.interop.vllm_model"}} & set(sys.modules)))

torch = sys.modules["torch"] = ModuleType("torch")
vars(torch).update(Tensor=object, float32=0, bfloat16=1, float16=2)
sys.modules |= dict.fromkeys({dependencies!r})
from emotrain.interop.serving import ServedModel
assert ServedModel.read({CONFIG!r}).layer(0).experts == 5
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n" and done.returncode == 0, done.stderr


def test_a_failing_registration_does_not_stop_vllm(plugin, monkeypatch, caplog) -> None:
    """Without transformers, and where the registry has changed."""
    register = entry_point().load()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with caplog.at_level(logging.WARNING):
        register()
    assert "did not register" in caplog.text and "transformers" in caplog.text
    assert not ModelRegistry.models
