"""`emotrain inspect`: what a configuration will cost, before anything is built: parameters,
steps, FLOPs, memory."""

from __future__ import annotations

from typing import Any

from emotrain.config import Config

FLOPS_FORMULA = "6 * (active parameters - input embedding) + 6 * layers * width * sequence length"


def run_costs(config: Config) -> dict[str, Any]:
    """The costs of a run. Counts are exact (spec 1.6); nothing is allocated.

    Memory is that of one whole copy, in bytes: fp32 weights and gradients, and two fp32 moments of
    AdamW. Activations are not in it. FLOPs are those of forward and backward.
    """
    from emotrain.model.transformer import parameter_counts
    from emotrain.training.metrics import flops_per_token

    counts, anneals = parameter_counts(config.model), bool(config.anneal.checkpoint)
    tokens = config.num_steps * config.tokens_per_step
    weights_bytes = 4 * counts["total_parameters"]
    return {
        **counts,
        "layers": config.model.num_layers,
        "experts_per_layer": [
            config.model.experts_in_layer(layer) for layer in range(config.model.num_layers)
        ],
        "experts_per_token": config.model.experts.top_k + config.model.experts.shared,
        "shared_experts": config.model.experts.shared,
        "tokens_per_step": config.tokens_per_step,
        "steps": config.num_steps,
        "tokens": tokens,
        "schedule": "linear to 0 from the checkpoint's learning rate"
        if anneals
        else config.optimizer.schedule,
        "warmup_steps": 0 if anneals else config.optimizer.warmup_steps,
        "peak_lr": None if anneals else config.optimizer.lr,
        "final_lr": 0.0 if anneals else config.optimizer.lr * config.optimizer.final_ratio,
        "flops_per_token": flops_per_token(config),
        "flops": flops_per_token(config) * tokens,
        "weights_bytes": weights_bytes,
        "gradients_bytes": weights_bytes,
        "optimizer_bytes": 2 * weights_bytes,
    }


def describe(costs: dict[str, Any]) -> str:
    """The same for a person to read."""
    per_layer = costs["experts_per_layer"]
    experts = str(per_layer[0]) if len(set(per_layer)) == 1 else ", ".join(map(str, per_layer))
    lines = ["Parameters"]
    parts = [key for key in costs if key.endswith("_parameters")]
    lines += [_line(key.removesuffix("_parameters"), f"{costs[key]:,}") for key in parts]
    lines += [
        _line("experts of a layer", experts, f"{costs['shared_experts']} shared"),
        _line("experts of a token", str(costs["experts_per_token"]), "the shared ones included"),
        "Run",
        _line("tokens a step", f"{costs['tokens_per_step']:,}"),
        _line("steps", f"{costs['steps']:,}", f"{costs['tokens']:,} tokens"),
    ]
    if costs["peak_lr"] is not None:
        lines.append(
            _line(
                "peak learning rate",
                f"{costs['peak_lr']:g}",
                f"after {costs['warmup_steps']:,} steps",
            )
        )
    lines += [
        _line("final learning rate", f"{costs['final_lr']:g}", costs["schedule"]),
        "FLOPs, forward and backward",
        _line("a token", f"{costs['flops_per_token']:.4g}", FLOPS_FORMULA),
        _line("the run", f"{costs['flops']:.4g}"),
        "Memory of one whole copy, without activations",
    ]
    lines += [
        _line(part, f"{costs[f'{part}_bytes'] / 2**30:,.2f} GiB", note)
        for part, note in (
            ("weights", "fp32"),
            ("gradients", "fp32"),
            ("optimizer", "two fp32 moments"),
        )
    ]
    return "\n".join(lines)


def _line(name: str, value: str, note: str = "") -> str:
    return f"  {name:<20}{value:>18}{'  ' + note if note else ''}"
