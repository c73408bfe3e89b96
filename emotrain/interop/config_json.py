"""`config.json` of a Hugging Face folder, read as our settings and written from them (spec 10.1).

The published format counts shared experts as experts: 128 of which a token uses 8 are 127 routed
ones, of which it uses 7, and 1 shared one. The clean format counts routed ones alone, and says so:
`expert_layout` is `clean`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.config import Config, ModelConfig, config_from_dict
from emotrain.errors import UserError
from emotrain.interop.layouts import LAYOUTS, Layout

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


@dataclass(frozen=True)
class PublishedConfig:
    """What a config.json says."""

    model: ModelConfig
    layout: Layout
    unused: list[str]
    """Settings that are not used, and not known to have no effect."""


def read_config(published: dict[str, Any], file: Path, num_tensors: int) -> PublishedConfig:
    """Our settings for a config.json.

    Args:
        file: where it stands, for errors.
        num_tensors: of the weights, which bounds the counts before anything is built from them.
    Raises:
        UserError: a setting that is missing, of a wrong type or size, or not supported.
    """
    reader = _Published(dict(published), file)
    reader.refuse_unsupported()
    layout = reader.layout()
    layers, heads = reader.number("num_hidden_layers"), reader.number("num_attention_heads")
    width = reader.number("hidden_size")
    experts = reader.experts(layers, num_tensors, layout)
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
            "shared_weight": "softmax"
            if experts["shared"] > 1 and layout == "published"
            else "one",
            "pool": {"kind": "none"},
        },
    }
    if heads and (head_dim := reader.take("head_dim")) not in (None, width // heads):
        raise UserError(
            f"{file}: head_dim={head_dim!r} is not supported, only hidden_size / "
            f"num_attention_heads = {width // heads}"
        )
    try:
        config = config_from_dict({"model": model}).model
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    if config.experts.top_k == 0:
        raise UserError(
            f"{file}: num_experts_per_tok={published.get('num_experts_per_tok')} has no routed "
            f"expert among them; the format needs one"
        )
    return PublishedConfig(config, layout, sorted(reader.settings.keys() - WITHOUT_EFFECT))


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

    def layout(self) -> Layout:
        value = self.take("expert_layout") or LAYOUTS[0]
        if value not in LAYOUTS:
            raise UserError(
                f"{self.file}: expert_layout={value!r} must be {' or '.join(LAYOUTS)}; correct it"
            )
        return value

    def shared(self, layers: int) -> int:
        """The number of shared experts, which has two names."""
        shared = self.number("num_shared_experts", self.settings.get("n_shared_experts") or 0)
        if (other := self.number("n_shared_experts", shared)) != shared:
            raise UserError(
                f"{self.file}: num_shared_experts={shared} and n_shared_experts={other} are two "
                f"names of one number; correct one"
            )
        of_layers = self.take("num_shared_experts_per_layer")
        if of_layers not in (None, [shared] * layers):
            raise UserError(
                f"{self.file}: num_shared_experts_per_layer={of_layers!r} is not supported, only "
                f"num_shared_experts={shared} for each of {layers} layers; convert the model to "
                "that"
            )
        return shared

    def experts(self, layers: int, num_tensors: int, layout: Layout) -> dict[str, Any]:
        """Our counts, which are of routed experts; the published ones count the shared too."""
        experts, shared = self.number("num_experts"), self.shared(min(layers, num_tensors))
        per_layer = _per_layer(self.take("num_experts_per_layer"), layers, self.file)
        if max(layers, sum(per_layer) or layers * experts) > num_tensors:
            raise UserError(
                f"{self.file}: {layers} layers of {max(per_layer or [experts])} experts need more "
                f"than the {num_tensors} tensors of the weights; config.json belongs to another "
                f"checkpoint"
            )
        counted = shared if layout == "published" else 0

        def routed(count: int, name: str) -> int:
            if count < counted:
                raise UserError(
                    f"{self.file}: {name}={count} counts num_shared_experts={shared} too and is "
                    f"fewer; correct it"
                )
            return count - counted

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


KEPT = {
    "attention_dropout": (int, float),
    "bos_token_id": (int, list),
    "eos_token_id": (int, list),
    "initializer_range": (int, float),
    "max_position_embeddings": (int,),
    "output_router_logits": (bool,),
    "pad_token_id": (int,),
    "router_aux_loss_coef": (int, float),
    "use_cache": (bool,),
}
"""Settings that our configuration has no place for and an export writes again, and their types."""


def kept_settings(published: dict[str, Any]) -> dict[str, Any]:
    """Those of `KEPT`, where they are of their type."""
    return {
        name: value
        for name, kinds in KEPT.items()
        if type(value := published.get(name)) in kinds
        and (not isinstance(value, list) or all(type(item) is int for item in value))
    }


def write_config(
    config: Config, layout: Layout, dtype: str, kept: dict[str, Any]
) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        dtype: of the weights, as torch calls it.
        kept: see `kept_settings`.
    Raises:
        UserError: a model that the format cannot describe.
    """
    model = config.model
    _refuse_unwritable(model, layout)
    shared = model.experts.shared
    counted = shared if layout == "published" else 0
    per_layer = model.experts.routed_per_layer
    return {
        "architectures": ["EmoForCausalLM"],
        "model_type": "emo",
        **({"expert_layout": layout} if layout != LAYOUTS[0] else {}),
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.experts.hidden,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "num_experts": model.experts.routed + counted,
        "num_experts_per_tok": model.experts.top_k + counted,
        # Our readers and the published code know the one name, vLLM the other.
        "num_shared_experts": shared,
        "n_shared_experts": shared,
        "num_experts_per_layer": [count + counted for count in per_layer] or None,
        "num_shared_experts_per_layer": [shared] * model.num_layers if per_layer else None,
        # Written always: vLLM divides weights by their sum where it is missing.
        "norm_topk_prob": model.router.normalize_weights,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        # transformers 4 and 5 read it from different places.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": model.init_std,
        "max_position_embeddings": config.data.sequence_length,
        "use_cache": True,
        "dtype": dtype,
        **kept,
    }


def _refuse_unwritable(model: ModelConfig, layout: Layout) -> None:
    experts, router = model.experts, model.router
    if not min(experts.routed_per_layer or (experts.routed,)):
        raise UserError(
            "model.experts.routed=0: the format has routed experts in every layer; a dense model "
            "cannot be exported"
        )
    if experts.exclusive:
        raise UserError(
            f"model.experts.exclusive={dict(experts.exclusive)}: the format has no experts that "
            f"some documents use and others do not; export a subset of one domain (emotrain select "
            f"--domain, extract), or the model without them (emotrain experts remove)"
        )
    if router.choice_bias:
        raise UserError(
            "model.router.choice_bias=true: the format has no bias that chooses experts and does "
            "not weigh them, and no router without one does the same; export a model trained with "
            "losses.balance_method=loss"
        )
    if router.gating != "softmax":
        raise UserError(
            f"model.router.gating={router.gating}: the format knows softmax alone; the model "
            f"cannot be exported"
        )
    if router.normalize_weights and experts.shared:
        raise UserError(
            f"model.router.normalize_weights=true with model.experts.shared={experts.shared}: the "
            f"format has one or the other; the model cannot be exported"
        )
    if experts.shared > 1:
        needed = {"softmax": "published", "one": "clean"}[router.shared_weight]
        if layout != needed:
            raise UserError(
                f"model.router.shared_weight={router.shared_weight} with "
                f"model.experts.shared={experts.shared}: the {layout} layout weighs several shared "
                f"experts otherwise; use --layout {needed}"
            )
