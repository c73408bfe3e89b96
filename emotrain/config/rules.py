"""What settings may be: words to choose from, bounds, and combinations that can work."""

from __future__ import annotations

import math

from emotrain.config.schema import Config, ModelConfig, flatten
from emotrain.errors import UserError

CHOICES = {
    "model.router.gating": ("softmax", "sigmoid"),
    "model.router.shared_weight": ("one", "softmax"),
    "model.router.pool.kind": ("none", "fixed", "uniform"),
    "model.router.pool.per": ("layer", "document"),
    "model.experts.sharing": ("none", "groups", "all"),
    "model.experts.backend": ("auto", "torch", "triton", "megablocks"),
    "losses.balance_scope": ("global_batch", "data_parallel", "micro_batch"),
    "losses.balance_schedule": ("joint", "running"),
    "losses.router_z_logits": ("pool", "all"),
    "optimizer.schedule": ("cosine", "linear"),
    "training.precision": ("auto", "float32", "bfloat16"),
    "training.device": ("auto", "cpu", "cuda"),
    "training.on_checkpoint_error": ("stop", "warn"),
    "parallel.recompute": ("none", "selective", "full"),
}
"""Settings that take one of a few words."""

MAY_BE_ZERO = {
    "model.experts.routed",
    "model.experts.shared",
    "model.experts.top_k",
    "model.router.pool.max",
    "model.num_kv_heads",
    "losses.balance",
    "losses.router_z",
    "losses.z",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.warmup_steps",
    "optimizer.final_ratio",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.lr",
    "anneal.tokens",
    "training.seed",
    "training.steps",
    "training.tokens",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.peak_tflops",
    "parallel.shard",
    "profile.start",
}
"""Numbers that may be zero; every other number must be positive, and none may be negative."""


def check(config: Config) -> None:
    """Refuse values out of range and combinations that cannot work: one line with the value, the
    rule and the fix."""
    for key, value in flatten(config):
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{key}={value} is not known; choose one of {', '.join(CHOICES[key])}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key}={value} is not finite; give a finite number")
            if value < 0 or (value == 0 and key not in MAY_BE_ZERO):
                raise UserError(
                    f"{key}={value} must be {'at least 0' if key in MAY_BE_ZERO else 'positive'}"
                )
    model = config.model
    _require(
        model.d_model % model.num_heads == 0,
        f"model.d_model={model.d_model} is not a multiple of "
        f"model.num_heads={model.num_heads}; change one of them",
    )
    _require(
        model.head_dim % 2 == 0,
        f"attention heads are {model.head_dim} wide (d_model / num_heads); rotary positions "
        f"need an even width, change model.num_heads",
    )
    _require(
        model.num_heads % model.kv_heads == 0,
        f"model.num_heads={model.num_heads} is not a multiple of "
        f"model.num_kv_heads={model.kv_heads}; change one of them",
    )
    _check_experts(model)
    if fault := pool_fault(model):
        raise UserError(fault)
    _require(
        config.data.sequence_length >= 2,
        "data.sequence_length=1 leaves nothing to predict; make it at least 2",
    )
    filter_ = config.data.repetition_filter
    _require(
        filter_.min_period <= filter_.max_period,
        f"data.repetition_filter.min_period={filter_.min_period} is above "
        f"max_period={filter_.max_period}; swap them",
    )
    _require(
        config.optimizer.beta1 < 1 and config.optimizer.beta2 < 1,
        f"optimizer.beta1={config.optimizer.beta1}, beta2={config.optimizer.beta2} must be below 1",
    )
    _require(
        config.training.global_batch % config.training.micro_batch == 0,
        f"training.global_batch={config.training.global_batch} is not a multiple of "
        f"training.micro_batch={config.training.micro_batch}; change one of them",
    )
    if config.anneal.checkpoint:
        _require(
            config.num_steps > 0,
            f"anneal.tokens={config.anneal.tokens} is less than one step of "
            f"{config.tokens_per_step} tokens; raise it",
        )


def _check_experts(model: ModelConfig) -> None:
    experts = model.experts
    _require(
        len(experts.routed_per_layer) in (0, model.num_layers),
        f"model.experts.routed_per_layer has {len(experts.routed_per_layer)} entries for "
        f"{model.num_layers} layers; give one a layer, or none",
    )
    _require(
        experts.routed + experts.shared > 0 or bool(experts.routed_per_layer),
        "model.experts.routed=0 and model.experts.shared=0 leave no experts; raise one of them",
    )
    _require(
        experts.sharing != "groups" or model.num_layers % experts.layers_per_bank == 0,
        f"model.experts.layers_per_bank={experts.layers_per_bank} does not divide "
        f"model.num_layers={model.num_layers}; choose a divisor",
    )
    _require(
        experts.sharing == "none" or len(set(experts.routed_per_layer)) <= 1,
        f"model.experts.sharing={experts.sharing} needs as many experts in every layer; give "
        f"model.experts.routed_per_layer equal entries or none",
    )
    for layer in range(model.num_layers):
        routed = model.routed_in_layer(layer)
        _require(
            (experts.top_k == 0) == (routed == 0),
            f"layer {layer} has {routed} routed experts and model.experts.top_k={experts.top_k}; "
            f"only a dense model, whose experts are all shared, has 0 of both",
        )
        _require(
            experts.top_k <= routed or bool(experts.routed_per_layer),
            f"model.experts.top_k={experts.top_k} is more than model.experts.routed={routed}; "
            f"raise model.experts.routed or lower top_k",
        )


def pool_fault(model: ModelConfig) -> str:
    """What is wrong with the sizes of document pools, in one line; empty if nothing is."""
    pool, drawn = model.router.pool, model.pool
    key = "model.router.pool"
    if pool.max and pool.min > pool.max:
        return f"{key}.min={pool.min} is above {key}.max={pool.max}; swap them"
    routed_L = [model.routed_in_layer(layer) for layer in range(model.num_layers)]
    if pool.kind == "none" or pool.allow_larger or not max(routed_L):
        return ""
    given = {"size": pool.size} if pool.kind == "fixed" else {"min": pool.min, "max": pool.max}
    fewest = min(routed_L)
    for name, size in given.items():
        if size > fewest:
            return (
                f"{key}.{name}={size} is more than the {fewest} routed experts of layer "
                f"{routed_L.index(fewest)}; lower it{' (0 means all)' if name == 'max' else ''}, "
                f"or set {key}.allow_larger=true: a larger pool restricts nothing"
            )
    name, least = ("size", pool.size) if pool.kind == "fixed" else ("min", drawn.min)
    if least >= max(routed_L):
        return (
            f"{key}.{name}={least} makes every pool all {least} routed experts, which is a "
            f"standard MoE; lower it, or set {key}.kind=none"
        )
    return ""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
