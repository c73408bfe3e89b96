"""How many experts a layer of a model can keep. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence

from emotrain.config import ModelConfig
from emotrain.errors import UserError


def experts_kept(config: ModelConfig, fraction: float) -> tuple[int, ...]:
    """Experts that a layer keeps, for each layer, shared ones included: the fraction of its
    experts, rounded. Exclusive experts do not count.

    Never fewer than the shared experts and one routed one. Layers without routed experts stay as
    they are.

    Raises:
        ValueError: a fraction outside (0, 1], or a dense model.
    """
    if not 0 < fraction <= 1:
        raise UserError(
            f"keep={fraction:g} is not a share of the experts; give numbers above 0 and up to 1, "
            f"for example 0.25"
        )
    shared, all_experts = config.experts.shared, counted_experts(config)
    if all(count == shared for count in all_experts):
        raise UserError(
            "the model is dense: it has no routed experts to choose from; use a model with "
            "model.experts.routed above 0"
        )
    return tuple(
        count if count == shared else max(shared + 1, round(fraction * count))
        for count in all_experts
    )


def counted_experts(config: ModelConfig) -> tuple[int, ...]:
    """Experts of each layer that are common to all domains, shared ones included."""
    shared = config.experts.shared
    return tuple(config.common_in_layer(layer) + shared for layer in range(config.num_layers))


def check_counts(config: ModelConfig, counts: Sequence[int]) -> None:
    """Refuse counts of kept experts (shared ones included) that the model cannot have."""
    if len(counts) != config.num_layers:
        raise UserError(
            f"{len(counts)} counts of kept experts for {config.num_layers} layers; give one a layer"
        )
    for layer, count in enumerate(counts):
        most = config.experts_in_layer(layer)
        least = min(most, config.experts.shared + 1)
        if not least <= count <= most:
            raise UserError(
                f"layer {layer} cannot keep {count} of its {most} experts; keep {least} to {most}, "
                f"which counts "
                f"{config.experts.shared} shared"
            )
