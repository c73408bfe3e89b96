"""What is refused: values out of range and combinations that cannot work."""

from __future__ import annotations

import math
import re
import typing
from typing import Any, Literal

from emotrain.config.finetune import PARTS
from emotrain.config.kinds import AT_LEAST_0
from emotrain.config.schema import Config, ModelConfig, flatten, setting_types
from emotrain.errors import UserError


def check(config: Config) -> None:
    """Refuse values out of range and combinations that cannot work: one line with the value, the
    rule and the fix."""
    types = setting_types()
    for key, value in flatten(config):
        _check_value(key, value, types[key])
    _check_model(config.model)
    _check_experts(config.model)
    if fault := pool_fault(config.model):
        raise UserError(fault)
    _check_balance(config)
    _check_run(config)
    _check_finetune(config)
    _check_evaluation(config)


def warnings_of(config: Config) -> list[str]:
    """What is allowed and most likely not meant, one line each."""
    warmup, steps = config.optimizer.warmup_steps, config.num_steps
    if config.anneal.checkpoint or config.optimizer.warmup_share or not 0 < steps <= warmup:
        return _decaying(config)
    return [
        *_decaying(config),
        f"optimizer.warmup_steps={warmup} is not less than the {steps} steps of the run, which "
        f"ends while the learning rate still rises to optimizer.lr={config.optimizer.lr:g}; lower "
        f"warmup_steps",
    ]


def _decaying(config: Config) -> list[str]:
    """Exclusive experts that a run trains and gives no tokens: weight decay alone moves them."""
    others = [name for name, _ in config.model.experts.exclusive if name != config.data.domain]
    trained = config.finetune.parts & {"routed", "router"} and not config.finetune.experts
    if not others or not trained or not config.optimizer.weight_decay:
        return []
    return [
        f"exclusive experts of {', '.join(others)} get no tokens with data.domain="
        f"{config.data.domain or repr('')}, and optimizer.weight_decay="
        f"{config.optimizer.weight_decay:g} shrinks them; name the experts that are trained "
        f"(finetune.experts), or set weight_decay=0"
    ]


def _check_value(key: str, value: Any, kind: Any) -> None:
    if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
        words = ", ".join(typing.get_args(kind))
        raise UserError(f"{key}={value} is not known; choose one of {words}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if not math.isfinite(value):
        raise UserError(f"{key}={value} is not finite; give a finite number")
    may_be_0 = AT_LEAST_0 in typing.get_args(kind)
    if value < 0 or (value == 0 and not may_be_0):
        raise UserError(f"{key}={value} must be {AT_LEAST_0 if may_be_0 else 'positive'}")


def _check_model(model: ModelConfig) -> None:
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
    _require(
        not model.router.normalize_weights or model.experts.top_k != 1,
        "model.router.normalize_weights=true with model.experts.top_k=1 makes the one weight of a "
        "token always 1, and the router learns nothing; raise top_k or set normalize_weights=false",
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
    _check_exclusive(model)
    for layer, routed in enumerate(experts.routed_per_layer or (experts.routed,)):
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


def _check_exclusive(model: ModelConfig) -> None:
    experts = model.experts
    names = [name for name, _ in experts.exclusive]
    fewest = min(experts.routed_per_layer or (experts.routed,))
    _require(
        all(names) and len(set(names)) == len(names),
        f"model.experts.exclusive={dict(experts.exclusive)} has a domain without a name or twice; "
        f"give each one once",
    )
    _require(
        all(count > 0 for _, count in experts.exclusive),
        f"model.experts.exclusive={dict(experts.exclusive)} has a domain without experts; leave it "
        f"out",
    )
    _require(
        not names or experts.num_exclusive < fewest,
        f"model.experts.exclusive={dict(experts.exclusive)} are {experts.num_exclusive} of the "
        f"{fewest} routed experts of a layer, and leave none for other domains; raise "
        f"model.experts.routed or lower them",
    )
    _require(
        not names or experts.sharing == "none",
        f"model.experts.exclusive needs layers with experts of their own, and "
        f"model.experts.sharing={experts.sharing} shares them; set sharing=none",
    )


def pool_fault(model: ModelConfig) -> str:
    """What is wrong with the sizes of document pools, in one line; empty if nothing is."""
    key, pool, drawn = "model.router.pool", model.router.pool, model.pool
    for name, value, words in (
        ("unit", pool.unit, ("document", "segment:N")),
        ("chosen_by", pool.chosen_by, ("document", "prefix:N", "other_part")),
    ):
        word, colon, number = value.partition(":")
        known = f"{word}:N" if colon else word
        if known not in words or (colon and not re.fullmatch("[1-9][0-9]{0,8}", number)):
            return f"{key}.{name}={value} is not known; give {' or '.join(words)}, N from 1"
    if pool.none_share >= 1:
        return (
            f"{key}.none_share={pool.none_share:g} leaves no document with a pool, which is a "
            f"standard MoE; lower it below 1, or set {key}.kind=none"
        )
    if pool.max and pool.min > pool.max:
        return f"{key}.min={pool.min} is above {key}.max={pool.max}; swap them"
    if drawn.kind == "none":
        return ""
    is_fixed = drawn.kind == "fixed"
    if pool.allow_larger:
        if is_fixed or drawn.min <= drawn.max:
            return ""
        return f"{key}.min={pool.min} needs a {key}.max of at least that; 0 means {drawn.max} here"
    routed_L = tuple(map(model.common_in_layer, range(model.num_layers)))
    sizes = {"size": pool.size} if is_fixed else {"min": pool.min, "max": pool.max}
    for name, size in sizes.items():
        if size > min(routed_L):
            return (
                f"{key}.{name}={size} is more than the {min(routed_L)} routed experts of layer "
                f"{routed_L.index(min(routed_L))}; lower it"
                f"{' (0 means all)' if name == 'max' else ''}, or set {key}.allow_larger=true: a "
                f"larger pool restricts nothing"
            )
    name, least = ("size", pool.size) if is_fixed else ("min", pool.min)
    if least == max(routed_L):
        return (
            f"{key}.{name}={least} makes every pool all {least} routed experts, which is a "
            f"standard MoE; lower it, or set {key}.kind=none"
        )
    return ""


def _check_balance(config: Config) -> None:
    losses, method = config.losses, "losses.balance_method=bias"
    if losses.balance_method != "bias":
        return
    _require(
        losses.balance == 0,
        f"losses.balance={losses.balance:g} is the weight of the loss that {method} does without; "
        f"set losses.balance=0",
    )
    for key, value, only in (
        ("balance_scope", losses.balance_scope, "global_batch"),
        ("balance_schedule", losses.balance_schedule, "joint"),
    ):
        _require(
            value == only,
            f"losses.{key}={value} is of the balance loss, which {method} does without: it counts "
            f"the global batch, and no backward pass waits for it; remove losses.{key}",
        )
    _require(
        config.model.experts.top_k > 0,
        f"{method} moves the biases of routers, and a dense model has none; set "
        f"losses.balance_method=loss",
    )
    setup = config.finetune
    _require(
        "router" in setup.parts and not setup.experts,
        f"{method} moves routers, of which finetune.train={setup.train}, "
        f"finetune.experts={setup.experts!r} keeps some as they are; set "
        f"losses.balance_method=loss, which leaves biases where they are",
    )


def _check_run(config: Config) -> None:
    _require(
        config.data.sequence_length >= 2,
        "data.sequence_length=1 leaves nothing to predict; make it at least 2",
    )
    windows = config.model.router.pool.across_windows
    _require(
        config.training.micro_batch % windows == 0,
        f"model.router.pool.across_windows={windows}: the windows of a document lie in one "
        f"micro-batch, and training.micro_batch={config.training.micro_batch} is no multiple of "
        f"them; make it one",
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
    _require(
        config.parallel.placement == "contiguous" or config.parallel.ep > 1,
        f"parallel.placement={config.parallel.placement} places experts on the ranks of "
        f"parallel.ep, which is 1; raise parallel.ep, or remove parallel.placement",
    )
    _require(
        config.parallel.placement != "auto" or config.training.checkpoint_every > 0,
        "parallel.placement=auto moves experts at multiples of training.checkpoint_every, which is "
        "0; give the steps between checkpoints",
    )
    if config.anneal.checkpoint:
        _require(
            config.num_steps > 0,
            f"anneal.tokens={config.anneal.tokens} is less than one step of "
            f"{config.tokens_per_step} tokens; raise it",
        )


def _check_finetune(config: Config) -> None:
    setup = config.finetune
    for name in setup.parts - set(PARTS):
        raise UserError(
            f"finetune.train={setup.train}: {name!r} is no part of a model; choose of all, trunk, "
            f"{', '.join(PARTS)}, with commas between"
        )
    _require(
        not setup.experts or bool(setup.parts & {"routed", "router"}),
        f"finetune.experts={setup.experts} names experts and finetune.train={setup.train} trains "
        f"none; add routed to finetune.train",
    )
    _require(
        not setup.experts or config.parallel.placement == "contiguous",
        f"finetune.experts={setup.experts} knows experts by number, which "
        f"parallel.placement={config.parallel.placement} moves; remove parallel.placement",
    )
    _require(
        not setup.experts or config.model.experts.sharing == "none",
        f"finetune.experts={setup.experts} names experts of a layer, and layers share theirs "
        f"(model.experts.sharing={config.model.experts.sharing}); remove finetune.experts",
    )
    for key, value in (
        ("anneal.checkpoint", config.anneal.checkpoint),
        ("training.resume", config.training.resume),
    ):
        _require(
            not setup.start or value in ("", "auto", "never"),
            f"finetune.start={setup.start} and {key}={value} both say where the run begins; remove "
            f"one of them",
        )
    for name, share in (
        ("finetune.teacher_weight", setup.teacher_weight),
        ("optimizer.warmup_share", config.optimizer.warmup_share),
    ):
        _require(share <= 1, f"{name}={share} is a share; make it at most 1")


def _check_evaluation(config: Config) -> None:
    setup = config.evaluation
    for name, keep in (("keep", setup.keep), ("task_keep", setup.task_keep)):
        for share in keep:
            _require(
                0 < share <= 1,
                f"evaluation.{name}={list(keep)}: {share:g} is not a share of the experts; give "
                f"numbers above 0 and up to 1, for example 0.25",
            )
    for name in ("shots", "questions", "task_keep"):
        value = getattr(setup, name)
        shown = list(value) if isinstance(value, tuple) else value
        _require(
            bool(setup.tasks) or not value,
            f"evaluation.{name}={shown} says how tasks are asked, and none is given; name their "
            f"files: evaluation.tasks=[FILE]",
        )
    _require(
        setup.documents >= 2,
        f"evaluation.documents={setup.documents} gives no standard error; give at least 2 a domain",
    )
    _require(
        setup.document_tokens != 1,
        "evaluation.document_tokens=1 leaves nothing to predict; give at least 2, or 0 for whole "
        "documents",
    )
    _require(
        len(set(setup.domains)) == len(setup.domains),
        f"evaluation.domains={list(setup.domains)} names one twice; give each domain once",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
