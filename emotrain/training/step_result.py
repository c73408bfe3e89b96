"""What a training step answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from emotrain.model.report import RoutingReport


@dataclass(frozen=True)
class StepResult:
    """Losses of one step over the whole global batch, and this rank's routing."""

    loss: float
    """What was optimised: cross entropy, z-losses and balance, weighted."""
    cross_entropy: float
    """Nats a target token."""
    z: float
    """Mean squared log-normaliser of the logits, unweighted."""
    balance: float
    """Mean over layers of the balance loss, unweighted; 1 is perfect."""
    router_z: float
    """Mean over layers of the router z-loss, unweighted."""
    num_targets: int
    """Positions with a loss, over all ranks."""
    grad_norm: float
    """Global gradient norm before clipping."""
    reports: Sequence[RoutingReport]
    """This rank's routing, one report a micro-batch, without gradients."""
    micro_batch_losses: Sequence[Tensor]
    """This rank's share of `loss`, one a micro-batch."""
    stop: bool
    """Whether any rank was asked to stop."""
    applied: bool
    """Whether the parameters were updated: not where the loss or the gradient is not finite."""
    by_source: Sequence[Tensor | None]
    """This rank's loss of each source of a mixture, one a micro-batch; see `SourceLosses`."""
