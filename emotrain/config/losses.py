"""Settings of the losses, and of what balances the load of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emotrain.config.kinds import NonNegativeFloat


@dataclass(frozen=True)
class LossConfig:
    """Loss terms. Router terms are averaged over layers."""

    balance_method: Literal["loss", "bias"] = "loss"
    """What balances the load of experts: a `loss`, or the `bias` by which routers choose, which
    moves after every step (loss-free, arXiv 2408.15664; spec 2.8). `bias` needs `balance` 0."""
    bias_rate: float = 1e-3
    """How far `bias` moves an expert's bias in a step."""
    balance: NonNegativeFloat = 0.1
    """Weight of the load-balance loss (spec 2.6)."""
    balance_scope: Literal["global_batch", "data_parallel", "micro_batch"] = "global_batch"
    """Tokens over which expert load is balanced: `global_batch` (every document of the optimizer
    step), `data_parallel` (one micro-batch across ranks, as the reference), or `micro_batch`."""
    balance_schedule: Literal["joint", "running"] = "joint"
    """How `global_batch` treats several micro-batches a step. `joint`: forward all, then backward
    all (exact; keeps the activations of every micro-batch). `running`: counts of the step so far
    (approximate, no extra memory)."""
    router_z: NonNegativeFloat = 0.001
    """Weight of the router z-loss (spec 2.7)."""
    router_z_logits: Literal["pool", "all"] = "pool"
    """Logits under the router z-loss: those of the document's `pool`, or `all` routed experts."""
    z: NonNegativeFloat = 1e-5
    """Weight of the z-loss on the language-model logits."""
