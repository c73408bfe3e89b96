"""Parameters of a model by part, without building it."""

from __future__ import annotations

from collections.abc import Collection

import torch

from emotrain.config import ModelConfig
from emotrain.model.parts import part_of
from emotrain.model.transformer import Transformer


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameter counts by part, in total, and active for one token (spec 1.6), without allocating
    the model.

    Routers count as active with all their rows. Active experts are those that layers apply to a
    token: one that two layers of a shared bank apply counts twice, as its FLOPs do.
    """
    with torch.device("meta"):
        model = Transformer(config)
    counts = {"embedding": 0, "head": 0, "attention": 0, "norms": 0, "routers": 0, "experts": 0}
    for name, parameter in model.named_parameters():
        part = next(
            (
                part
                for part, key in (
                    ("routers", ".moe.router."),
                    ("experts", ".moe."),
                    ("attention", ".attention."),
                    ("norms", "norm.weight"),
                    ("embedding", "embedding."),
                    ("head", "head."),
                )
                if key in name
            )
        )
        counts[part] += parameter.numel()
    one_expert = 3 * config.d_model * config.experts.hidden
    applied = sum(
        config.chosen_in_layer(layer) + config.experts.shared for layer in range(config.num_layers)
    )
    total = sum(counts.values())
    return {
        **{f"{part}_parameters": count for part, count in counts.items()},
        "total_parameters": total,
        "active_parameters": total - counts["experts"] + applied * one_expert,
    }


def trained_count(config: ModelConfig, parts: Collection[str]) -> int:
    """Parameters of some parts (`emotrain.config.finetune.PARTS`)."""
    with torch.device("meta"):
        model = Transformer(config)
    return sum(p.numel() for name, p in model.named_parameters() if part_of(name) in parts)
