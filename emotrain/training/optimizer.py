"""AdamW with the parameter groups and schedules of spec 5."""

from __future__ import annotations

import math

import torch
from torch import nn

from emotrain.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters. Only the input embedding is exempt from weight decay: norms, routers, experts and head decay."""
    decayed = [p for name, p in model.named_parameters() if name != "embedding.weight"]
    exempt = [p for name, p in model.named_parameters() if name == "embedding.weight"]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of the update number `step`, counted from 1 (spec 5)."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_ratio + (1 - config.final_ratio) * shape)


def anneal_learning_rate(start_lr: float, start_step: int, step: int, num_steps: int) -> float:
    """Linear from `start_lr` after `start_step` to zero `num_steps` later (spec 5.1)."""
    return start_lr * max(0.0, (start_step + num_steps - step) / num_steps)


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients in place so that their global norm is at most `max_norm` (0: leave them). Returns the norm before."""
    gradients = [p.grad for p in parameters]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm
