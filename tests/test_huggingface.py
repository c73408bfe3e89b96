"""Proves the reader of the published format: what is written as spec 10.2 says is read back
exactly, and a folder that lies is refused with one line that says where. (Agreement with real
files of that format: test_fixtures.py.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.interop.huggingface import load_huggingface
from emotrain.model.transformer import Transformer

CONFIG: dict[str, Any] = {
    "model_type": "emo",
    "architectures": ["EmoForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_shared_experts": 1,
    "num_experts_per_tok": 3,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "output_router_logits": True,
    "transformers_version": "4.57.1",
}


def published_tensors(config: dict[str, Any] = CONFIG) -> dict[str, Tensor]:
    """Random tensors named and shaped by hand from spec 10.2."""
    torch.manual_seed(0)
    width, hidden, head_dim = (
        config["hidden_size"],
        config["intermediate_size"],
        config["hidden_size"] // config["num_attention_heads"],
    )
    kv_width = config["num_key_value_heads"] * head_dim
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        "lm_head.weight": (config["vocab_size"], width),
    }
    for i, experts in enumerate(
        config.get("num_experts_per_layer") or [config["num_experts"]] * config["num_hidden_layers"]
    ):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.pre_attention_layernorm.weight": (width,),
            f"{layer}.pre_feedforward_layernorm.weight": (width,),
            f"{layer}.self_attn.q_proj.weight": (width, width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.self_attn.k_proj.weight": (kv_width, width),
            f"{layer}.self_attn.v_proj.weight": (kv_width, width),
            f"{layer}.mlp.gate.weight": (experts, width),
        }
        for e in range(experts):
            shapes |= {
                f"{layer}.mlp.experts.{e}.gate_proj.weight": (hidden, width),
                f"{layer}.mlp.experts.{e}.up_proj.weight": (hidden, width),
                f"{layer}.mlp.experts.{e}.down_proj.weight": (width, hidden),
            }
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    """A checkpoint folder; settings override CONFIG, None takes one away."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **settings}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(published_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def shard(folder: Path) -> dict[str, Any]:
    """Cut model.safetensors in two; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for file, part in (
        ("model-1-of-2.safetensors", names[::2]),
        ("model-2-of-2.safetensors", names[1::2]),
    ):
        save_file({name: tensors[name] for name in part}, folder / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def refusal(folder: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_huggingface(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


# ---- what is read


def test_every_tensor_lands_in_its_place(tmp_path: Path) -> None:
    tensors = published_tensors()
    config, model = load_huggingface(write(tmp_path))
    state, first, second = model.state_dict(), "model.layers.0", "model.layers.1"
    assert torch.equal(state["embedding.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(state["head.weight"], tensors["lm_head.weight"]) and torch.equal(
        state["norm.weight"], tensors["model.norm.weight"]
    )
    assert torch.equal(
        state["blocks.0.attention_norm.weight"], tensors[f"{first}.pre_attention_layernorm.weight"]
    )
    assert torch.equal(
        state["blocks.0.moe_norm.weight"], tensors[f"{first}.pre_feedforward_layernorm.weight"]
    )
    assert torch.equal(
        state["blocks.1.attention.qkv.weight"],
        torch.cat([tensors[f"{second}.self_attn.{x}_proj.weight"] for x in "qkv"]),
    )
    assert torch.equal(
        state["blocks.1.attention.out.weight"], tensors[f"{second}.self_attn.o_proj.weight"]
    )
    assert torch.equal(state["blocks.1.moe.router.weight_ED"], tensors[f"{second}.mlp.gate.weight"])
    places = [
        *(("experts.gate_up_NFD", "experts.down_NHD", e) for e in range(5)),
        ("shared.gate_up_MFD", "shared.down_MHD", 0),
    ]
    for expert, (gate_up, down, i) in enumerate(places):
        theirs = [
            tensors[f"{first}.mlp.experts.{expert}.{name}_proj.weight"]
            for name in ("gate", "up", "down")
        ]
        assert torch.equal(state[f"blocks.0.moe.{gate_up}"][i], torch.cat(theirs[:2]))
        assert torch.equal(state[f"blocks.0.moe.{down}"][i], theirs[2].T)
    assert (config.rope_theta, config.norm_eps, config.kv_heads, config.experts.top_k) == (
        10000.0,
        1e-5,
        2,
        2,
    )
    assert (
        config.router.pool.kind == "none"
        and not config.router.normalize_weights
        and config.router.shared_weight == "one"
    )
    assert all(
        parameter.requires_grad and not parameter.is_meta for parameter in model.parameters()
    )


def test_shards_and_other_types_give_the_same_model(tmp_path: Path) -> None:
    _, whole = load_huggingface(write(tmp_path / "whole"))
    shard(write(tmp_path / "shards"))
    _, from_shards = load_huggingface(tmp_path / "shards")
    halved = {name: tensor.bfloat16() for name, tensor in published_tensors().items()}
    _, from_half = load_huggingface(write(tmp_path / "half", halved))
    _, as_half = load_huggingface(tmp_path / "whole", dtype=torch.bfloat16)
    for name, parameter in whole.named_parameters():
        assert torch.equal(from_shards.get_parameter(name), parameter)
        assert from_half.get_parameter(name).dtype == torch.float32
        assert torch.equal(as_half.get_parameter(name), parameter.bfloat16())
        assert torch.equal(from_half.get_parameter(name), parameter.bfloat16().float())


def test_layers_may_have_different_numbers_of_experts(tmp_path: Path) -> None:
    settings = {"num_experts_per_layer": [4, 9], "num_shared_experts_per_layer": [1, 1]}
    config, model = load_huggingface(
        write(tmp_path, published_tensors({**CONFIG, **settings}), **settings)
    )
    assert config.experts.routed_per_layer == (3, 8)
    assert [
        layer.counts_N.shape[0]
        for layer in model(PackedBatch.from_rows(torch.arange(12)[None])).routing.layers
    ] == [3, 8]


def test_several_shared_experts_share_a_softmax(tmp_path: Path) -> None:
    """Spec 10.4: there they weigh a softmax of their logits; in training each weighs 1."""
    config, model = load_huggingface(write(tmp_path, num_shared_experts=2))
    assert config.router.shared_weight == "softmax"
    router = model.blocks[0].moe.router
    weights_TM = router.shared_weights(torch.randn(12, len(router.weight_ED)))
    torch.testing.assert_close(weights_TM.sum(dim=1), torch.ones(12))


def test_settings_without_shared_experts_and_of_newer_writers(tmp_path: Path) -> None:
    config, _ = load_huggingface(
        write(
            tmp_path,
            num_shared_experts=0,
            norm_topk_prob=True,
            rope_theta=None,
            rope_parameters={"rope_type": "default", "rope_theta": 7e5},
        )
    )
    assert (
        config.router.normalize_weights and config.experts.shared == 0 and config.rope_theta == 7e5
    )


def test_unknown_settings_are_named_in_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="logit_softcapping"):
        load_huggingface(write(tmp_path, logit_softcapping=30.0))


def test_nothing_is_allocated_before_the_files_are_found_to_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transformer, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    assert "shape [64, 16]" in refusal(write(tmp_path, vocab_size=1_000_000))


# ---- what is refused


@pytest.mark.parametrize(
    "setting, value",
    [
        ("always_active_experts", [3]),
        ("always_active_experts_per_layer", [[3], [3]]),
        ("attention_bias", True),
        ("rope_scaling", {"type": "yarn", "factor": 4}),
        ("tie_word_embeddings", True),
        ("dense_mlp_bias", True),
        ("hidden_act", "gelu"),
        ("model_type", "olmoe"),
        ("norm_topk_prob", True),
        ("num_experts_per_layer", [0, 6]),
        ("num_experts_per_layer", [6]),
        ("num_experts_per_layer", "6"),
        ("num_shared_experts_per_layer", [1, 2]),
        ("head_dim", 8),
        ("sliding_window", 128),
        ("quantization_config", {"bits": 4}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ],
)
def test_unsupported_settings_are_refused_with_their_value(
    tmp_path: Path, setting: str, value: Any
) -> None:
    message = refusal(write(tmp_path, **{setting: value}))
    assert setting in message and repr(value) in message and "config.json" in message


@pytest.mark.parametrize(
    "setting, value",
    [
        ("hidden_size", "16"),
        ("hidden_size", 2**40),
        ("num_hidden_layers", True),
        ("vocab_size", -1),
        ("num_attention_heads", 0),
        ("num_experts", 1.5),
        ("rope_theta", "big"),
        ("rope_theta", -1.0),
        ("rms_norm_eps", None),
        ("num_experts_per_tok", 1),
        ("num_experts_per_tok", 50),
        ("num_attention_heads", 5),
        ("num_hidden_layers", 10**6),
        ("num_experts", 10**6),
    ],
)
def test_settings_of_a_wrong_type_or_size_are_refused(
    tmp_path: Path, setting: str, value: Any
) -> None:
    folder = write(tmp_path, **{setting: value})
    if value is None:
        (folder / "config.json").write_text(json.dumps({**CONFIG, setting: [1e-6]}))
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"emo"', "[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (write(tmp_path) / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    tensors = published_tensors()
    tensor = tensors.pop(name)
    assert f"missing {name}" in refusal(write(tmp_path, tensors))
    assert "unexpected model.extra" in refusal(
        write(tmp_path, {**tensors, name: tensor, "model.extra": tensor.clone()})
    )
    assert f"{name} has shape [8, 16], config.json says [16, 8]" in refusal(
        write(tmp_path, {**tensors, name: tensor.T.contiguous()})
    )
    assert f"{name} has type I64" in refusal(write(tmp_path, {**tensors, name: tensor.long()}))
    many = {key: value for key, value in tensors.items() if ".experts." not in key}
    assert "and 33 more" in refusal(write(tmp_path, many))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/outside.safetensors",
        "..\\outside.safetensors",
        "c:outside.safetensors",
        "..",
        "weights.bin",
        "",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    folder = write(tmp_path / "inside")
    index = shard(folder)
    (folder / "model-1-of-2.safetensors").rename(tmp_path / "outside.safetensors")
    index["weight_map"]["lm_head.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "it must be a .safetensors file of this folder" in refusal(folder)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path) -> None:
    index = shard(write(tmp_path))
    moved = {**index["weight_map"], "lm_head.weight": "model-2-of-2.safetensors"}
    for broken, expected in (
        ({"weight_map": moved}, "disagree about lm_head.weight"),
        ({}, "weight_map must name"),
        ({"weight_map": {}}, "weight_map must name"),
        ({"weight_map": [1]}, "weight_map must name"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(broken))
        assert expected in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-2-of-2.safetensors").unlink()
    assert "the download is not complete" in refusal(tmp_path)


@pytest.mark.parametrize("left_over", ["the file", "the shards"])
def test_one_file_beside_shards_is_refused_whichever_is_older(
    tmp_path: Path, left_over: str
) -> None:
    """Either could be what an earlier save left: the wrong one would load without a word."""
    shard(write(tmp_path))
    save_file(published_tensors(), tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert "both model.safetensors and model.safetensors.index.json" in message
    assert "one file or shards, remove the one" in message
    if left_over == "the file":
        (tmp_path / "model.safetensors").unlink()
    else:
        (tmp_path / "model.safetensors.index.json").unlink()
    load_huggingface(tmp_path)


def test_an_index_may_name_the_one_file_as_its_only_shard(tmp_path: Path) -> None:
    names = load_file(write(tmp_path) / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_huggingface(tmp_path)


def test_broken_and_missing_files_are_refused(tmp_path: Path) -> None:
    assert "neither model.safetensors" in refusal(tmp_path)
    weights = write(tmp_path) / "model.safetensors"
    for damaged in (b"", b"\xff" * 64, weights.read_bytes()[:-10]):
        weights.write_bytes(damaged)
        assert "not readable as safetensors" in refusal(tmp_path)
    write(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json: no such file" in refusal(tmp_path)
