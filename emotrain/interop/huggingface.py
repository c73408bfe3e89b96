"""Read a model in the published Hugging Face format (spec 10.1, 10.2): `config.json` and
`model.safetensors`, or shards with `model.safetensors.index.json`.

Every published tensor is a *view* of one of our parameters (`published_views`): q, k and v are row
ranges of one matrix, gate and up those of an expert's slice, down a slice transposed. Reading is
therefore one copy of each tensor into its view; at no time is more than the model and one tensor in
memory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.config import ModelConfig, config_from_dict
from emotrain.errors import MissingFileError, UserError
from emotrain.folders import is_safe_name
from emotrain.model.transformer import Transformer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((None, False), "attention without biases"),
    "rope_scaling": ((None,), "plain rotary positions"),
    "tie_word_embeddings": ((None, False), "an output head of its own"),
    "always_active_experts": ((None, []), "shared experts (num_shared_experts)"),
    "always_active_experts_per_layer": ((None, []), "shared experts (num_shared_experts)"),
    "dense_mlp_bias": ((None, False), "experts without biases"),
    "hidden_act": ((None, "silu"), "silu experts"),
    "model_type": (("emo",), "EMO checkpoints"),
    "sliding_window": ((None,), "attention over the whole document"),
    "quantization_config": ((None,), "weights in floating point"),
}
"""Settings that change what a model computes and are supported at some values only: those, and
what is supported."""

WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dense_intermediate_size",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "num_local_experts",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Settings that do not change the logits of a forward pass."""

LARGEST_SIZE = 1 << 20
"""Of any count or width in config.json, so that no product of them overflows."""

FLOATING = {"F64", "F32", "F16", "BF16"}
"""Types that a weight may have on disk."""


def load_huggingface(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[ModelConfig, Transformer]:
    """Read a published checkpoint. A row of tokens is one document to it: use
    `PackedBatch.from_rows`, without pools.

    Args:
        folder: holds config.json and the weights. Nothing in it is trusted: names, shapes and types
            are checked before memory is taken, and nothing outside the folder's own files is
            opened.
        dtype: of the parameters; what is on disk is converted.
    Raises:
        ValueError: a setting or a tensor that is missing, unexpected or unsupported.
            FileNotFoundError: no such files.
    """
    folder = Path(folder)
    files = _find_tensors(folder)
    config = _model_config(
        _read_json(folder / "config.json"), folder / "config.json", num_tensors=len(files)
    )
    with torch.device("meta"):
        model = Transformer(config)
    _check_tensors(folder, files, published_views(model))
    model = model.to(dtype).to_empty(device="cpu")
    _copy_tensors(files, published_views(model))
    return config, model


@torch.no_grad()
def published_views(model: Transformer) -> dict[str, Tensor]:
    """Each tensor of the published format (spec 10.2), in its shape, as a view of the model's
    parameters."""
    views = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    config = model.config
    rows = [
        heads * config.head_dim for heads in (config.num_heads, config.kv_heads, config.kv_heads)
    ]
    for layer, block in enumerate(model.blocks):
        prefix = f"model.layers.{layer}"
        views[f"{prefix}.pre_attention_layernorm.weight"] = block.attention_norm.weight
        views[f"{prefix}.pre_feedforward_layernorm.weight"] = block.moe_norm.weight
        for name, weight in zip("qkv", block.attention.qkv.weight.split(rows), strict=True):
            views[f"{prefix}.self_attn.{name}_proj.weight"] = weight
        views[f"{prefix}.self_attn.o_proj.weight"] = block.attention.out.weight
        assert block.moe.router is not None, (
            "the published format has a routed expert in each layer"
        )
        views[f"{prefix}.mlp.gate.weight"] = block.moe.router.weight_ED
        routed, shared = block.moe.experts, block.moe.shared
        experts = [*zip(routed.gate_up_NFD, routed.down_NHD, strict=True)] if routed else []
        if shared is not None:
            experts += zip(shared.gate_up_MFD, shared.down_MHD, strict=True)
        for expert, (gate_up_FD, down_HD) in enumerate(experts):
            gate_HD, up_HD = gate_up_FD.chunk(2)
            for name, weight in (("gate", gate_HD), ("up", up_HD), ("down", down_HD.t())):
                views[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = weight
    return {name: view.detach() for name, view in views.items()}


@dataclass(frozen=True)
class _Header:
    """What a weight file says of one of its tensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _find_tensors(folder: Path) -> dict[str, _Header]:
    """The header of every tensor, from the one file or from the shards that the index names."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise MissingFileError(
                f"{folder}: neither {WEIGHTS} nor {INDEX} is here; give the folder of a Hugging "
                f"Face checkpoint"
            )
        return _headers(folder / WEIGHTS)
    weight_map = _weight_map(folder)
    if (folder / WEIGHTS).is_file() and WEIGHTS not in weight_map.values():
        # A save in one file and a later one in shards leave both; either can be the older one.
        raise UserError(
            f"{folder}: has both {WEIGHTS} and {INDEX}, which does not name it; a checkpoint is "
            f"one file or shards, remove the one that is left from another save"
        )
    shards = {shard: _headers(folder / shard) for shard in sorted(set(weight_map.values()))}
    absent = [name for name, shard in weight_map.items() if name not in shards[shard]]
    unlisted = [
        name
        for shard, headers in shards.items()
        for name in headers
        if weight_map.get(name) != shard
    ]
    if absent or unlisted:
        raise UserError(
            f"{folder / INDEX} and its files disagree about {_some(absent + unlisted)}; download "
            f"them again"
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _weight_map(folder: Path) -> dict[str, str]:
    """The shard of each tensor, from the index."""
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: weight_map must name the file of each tensor")
    for tensor, shard in weight_map.items():
        # Without a drive or a leading dot either, which could lead out of the folder.
        if (
            not isinstance(shard, str)
            or not is_safe_name(shard)
            or not shard.endswith(".safetensors")
            or shard.startswith(".")
            or ":" in shard
        ):
            raise UserError(
                f"{folder / INDEX}: {tensor} is said to be in {shard!r}; it must be a .safetensors "
                f"file of this folder"
            )
    return weight_map


def _headers(file: Path) -> dict[str, _Header]:
    with _open(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no iterator)
        return {
            name: _Header(file, tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        }


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise MissingFileError(f"{file}: no such file; the download is not complete")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not readable as safetensors ({error}); download it again"
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise MissingFileError(
            f"{file}: no such file; give the folder of a Hugging Face checkpoint"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); download it again") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file}: must hold a JSON object, not a {type(settings).__name__}")
    return settings


def _model_config(published: dict[str, Any], file: Path, num_tensors: int) -> ModelConfig:
    """Our settings for a published config.json; `num_tensors` bounds the counts before anything
    is built from them."""
    reader = _Published(dict(published), file)
    reader.refuse_unsupported()
    layers, heads = reader.number("num_hidden_layers"), reader.number("num_attention_heads")
    width = reader.number("hidden_size")
    experts = reader.experts(layers, num_tensors)
    normalize = reader.take("norm_topk_prob") or False
    if normalize and experts["shared"]:
        raise UserError(
            f"{file}: norm_topk_prob={normalize!r} is not supported with "
            f"num_shared_experts={experts['shared']}; set one to 0"
        )
    model = {
        "vocab_size": reader.number("vocab_size"),
        "d_model": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": reader.number("num_key_value_heads", heads),
        "rope_theta": _rope_theta(reader.settings, file),
        "norm_eps": reader.settings.pop("rms_norm_eps", 1e-6),
        "experts": experts,
        "router": {
            "normalize_weights": normalize,
            "shared_weight": "softmax" if experts["shared"] > 1 else "one",
            "pool": {"kind": "none"},
        },
    }
    if heads and (head_dim := reader.take("head_dim")) not in (None, width // heads):
        raise UserError(
            f"{file}: head_dim={head_dim!r} is not supported, only hidden_size / "
            f"num_attention_heads = {width // heads}"
        )
    if unknown := sorted(reader.settings.keys() - WITHOUT_EFFECT):
        warnings.warn(
            f"{file}: not used, and not known to have no effect: {_some(unknown)}", stacklevel=3
        )
    try:
        config = config_from_dict({"model": model}).model
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    if config.experts.top_k == 0:
        raise UserError(
            f"{file}: num_experts_per_tok={experts['shared']} are all shared experts; the "
            f"published format needs a routed one"
        )
    return config


@dataclass
class _Published:
    """Takes settings out of a published config.json, refusing those that cannot be."""

    settings: dict[str, Any]
    file: Path

    def take(self, key: str) -> Any:
        return self.settings.pop(key, None)

    def number(self, key: str, *default: int) -> int:
        value = self.take(key)
        value = default[0] if value is None and default else value
        if type(value) is not int or not 0 <= value <= LARGEST_SIZE:
            raise UserError(
                f"{self.file}: {key}={value!r} must be a whole number up to {LARGEST_SIZE}; "
                f"correct it"
            )
        return value

    def refuse_unsupported(self) -> None:
        for key, (allowed, supported) in REFUSED.items():
            value = self.settings.pop(key, allowed[0])
            if value not in allowed:
                raise UserError(
                    f"{self.file}: {key}={value!r} is not supported, only {supported}; convert the "
                    f"model to that"
                )

    def experts(self, layers: int, num_tensors: int) -> dict[str, Any]:
        """Our counts, which are of routed experts; the published ones count the shared too."""
        shared, experts = self.number("num_shared_experts", 0), self.number("num_experts")
        per_layer = _per_layer(self.take("num_experts_per_layer"), layers, self.file)
        if max(layers, *(per_layer or [experts])) > num_tensors:
            raise UserError(
                f"{self.file}: {layers} layers of {max(per_layer or [experts])} experts need more "
                f"than the {num_tensors} tensors of the weights; config.json belongs to another "
                f"checkpoint"
            )
        shared_per_layer = self.take("num_shared_experts_per_layer")
        if shared_per_layer not in (None, [shared] * layers):
            raise UserError(
                f"{self.file}: num_shared_experts_per_layer={shared_per_layer!r} is not supported, "
                f"only num_shared_experts={shared} in every layer; convert the model to that"
            )

        def routed(count: int, name: str) -> int:
            if count < shared:
                raise UserError(
                    f"{self.file}: {name}={count} counts num_shared_experts={shared} too and is "
                    f"fewer; correct it"
                )
            return count - shared

        return {
            "routed": routed(experts, "num_experts"),
            "shared": shared,
            "top_k": routed(self.number("num_experts_per_tok"), "num_experts_per_tok"),
            "hidden": self.number("intermediate_size"),
            "routed_per_layer": [
                routed(count, "an entry of num_experts_per_layer") for count in per_layer
            ],
        }


def _per_layer(value: Any, num_layers: int, file: Path) -> list[int]:
    """Experts of each layer where they differ; empty where they do not."""
    if value is None:
        return []
    if (
        not isinstance(value, list)
        or len(value) != num_layers
        or any(type(count) is not int for count in value)
    ):
        raise UserError(
            f"{file}: num_experts_per_layer={value!r} must hold one whole number for each of "
            f"{num_layers} layers; correct it"
        )
    if 0 in value:
        raise UserError(
            f"{file}: num_experts_per_layer={value!r} is not supported: 0 means a dense layer; "
            f"every layer needs experts"
        )
    return value


def _rope_theta(settings: dict[str, Any], file: Path) -> float:
    """The base of the rotary frequencies, from the place of transformers 4 or of 5."""
    theta, rope = settings.pop("rope_theta", None), settings.pop("rope_parameters", None)
    if isinstance(rope, dict):
        if rope.get("rope_type", "default") != "default":
            raise UserError(
                f"{file}: rope_parameters={rope!r} is not supported, only plain rotary positions; "
                f"convert the model to that"
            )
        theta = rope.get("rope_theta", theta)
    return 500000.0 if theta is None else theta


def _check_tensors(folder: Path, files: dict[str, _Header], views: dict[str, Tensor]) -> None:
    """Names, shapes and types of the tensors on disk are those of the model."""
    if missing := [name for name in views if name not in files]:
        raise UserError(
            f"{folder}: missing {_some(missing)}; config.json belongs to another checkpoint, or a "
            f"file is missing"
        )
    if unexpected := [name for name in files if name not in views]:
        raise UserError(
            f"{folder}: unexpected {_some(unexpected)}; config.json belongs to another checkpoint"
        )
    for name, view in views.items():
        header = files[name]
        if header.shape != tuple(view.shape):
            raise UserError(
                f"{header.file}: {name} has shape {list(header.shape)}, config.json says "
                f"{list(view.shape)}; "
                f"they belong to different checkpoints"
            )
        if header.dtype not in FLOATING:
            raise UserError(
                f"{header.file}: {name} has type {header.dtype}, weights must be one of "
                f"{', '.join(sorted(FLOATING))}; "
                f"convert the model"
            )


@torch.no_grad()
def _copy_tensors(files: dict[str, _Header], views: dict[str, Tensor]) -> None:
    for file, names in _by_file(files):
        with _open(file) as tensors:
            for name in names:
                views[name].copy_(tensors.get_tensor(name))


def _by_file(files: dict[str, _Header]) -> Iterator[tuple[Path, list[str]]]:
    for file in sorted({header.file for header in files.values()}):
        yield file, [name for name, header in files.items() if header.file == file]


def _some(names: list[str]) -> str:
    """Up to three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
