"""The parts of a model by the names of its parameters, and freezing them."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import Tensor, nn

CHOICE_BIAS = ".moe.router.choice_bias_N"
"""End of the name of a router's bias."""

_PARTS = (
    (r"embedding\.", "embedding"),
    (r"head\.", "head"),
    (r"(.*_)?norm\.", "norms"),
    (r"attention\.", "attention"),
    (r"moe\.experts\.", "routed"),
    (r"moe\.shared\.", "shared"),
    (r"moe\.router\.", "router"),
)


def part_of(name: str) -> str:
    """The part of `emotrain.config.finetune.PARTS` that a parameter is of, from its name."""
    within = re.sub(r"^blocks\.\d+\.", "", name)
    return next(part for pattern, part in _PARTS if re.match(pattern, within))


def freeze(model: nn.Module, trained: Collection[str]) -> None:
    """Train these parts alone: all other parameters get no gradient. In place, before parameters
    are spread over processes."""
    for name, parameter in model.named_parameters():
        if part_of(name) not in trained:
            parameter.requires_grad_(False)


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those that are not frozen, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that makes a model, by name: its parameters, and the biases of its routers, which
    are buffers. What checkpoints hold."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def layer_of(name: str) -> int:
    """The layer of a parameter of a block."""
    return int(name.split(".")[1])
