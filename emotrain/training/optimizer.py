"""AdamW with the parameter groups and schedules of spec 5."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from emotrain.config import OptimizerConfig
from emotrain.errors import UserError


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, without_decay: Container[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained. Only the input embedding is exempt from weight
    decay: norms, routers, experts and head decay, but those that are decayed elsewhere."""
    # A fused update takes the parameters of one mesh at a time, so that expert parallelism's have a
    # group of their own.
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = name == "embedding.weight" or parameter in without_decay
        decay = 0.0 if exempt else config.weight_decay
        group = groups.setdefault(
            (decay, getattr(parameter, "device_mesh", None)), {"params": [], "weight_decay": decay}
        )
        group["params"].append(parameter)
    if not groups:
        raise UserError(
            "finetune.train names no part that the model has; choose one that it has, or all"
        )
    return torch.optim.AdamW(
        groups.values(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of the update number `step`, counted from 1 (spec 5)."""
    warmup = learning_rate_warmup(config, num_steps)
    if step < warmup:
        return config.lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_ratio + (1 - config.final_ratio) * shape)


def learning_rate_warmup(config: OptimizerConfig, num_steps: int) -> int:
    """Steps of warm-up in a run of so many."""
    return math.ceil(config.warmup_share * num_steps) or config.warmup_steps


def anneal_learning_rate(start_lr: float, start_step: int, step: int, num_steps: int) -> float:
    """Linear from `start_lr` after `start_step` to zero `num_steps` later (spec 5.1)."""
    return start_lr * max(0.0, (start_step + num_steps - step) / num_steps)
