"""What a step asks of an engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.distributed.ranks import Ranks
from emotrain.model.report import LossSums, RoutingReport
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Transformer
from emotrain.training import checkpoint


@dataclass(frozen=True)
class Update:
    """What became of the gradient of a step."""

    grad_norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """Whether the parameters were updated: not by a gradient that is not finite."""


class Engine(Protocol):
    """What a step needs of a model and its optimizer, whoever spreads them over processes.

    A step calls `start_step`; `forward` and `backward` for every micro-batch, either by turns or
    all forward passes first; then `finish_step`.
    """

    model: Transformer
    optimizer: torch.optim.Optimizer | None

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the coming updates."""

    def start_step(self) -> None:
        """Begin a step without a gradient."""

    def forward(
        self, batch: PackedBatch, request: RoutingRequest, z_weight: float
    ) -> tuple[LossSums, RoutingReport]:
        """Loss sums and routing of one micro-batch; `z_weight` is that of the z-loss on the
        language-model logits."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add a micro-batch's gradient to that of the step; after the last one it is the sum over
        ranks."""

    def finish_step(self, max_norm: float, ranks: Ranks) -> Update:
        """Clip the gradient of the step to a global norm of `max_norm` (0: leave it) and, where it
        is finite, update the parameters."""

    def save(
        self,
        writer: checkpoint.CheckpointWriter,
        config: Config,
        state: checkpoint.TrainingState,
        tokenizer: Path | None,
    ) -> None:
        """Begin a checkpoint that any layout and any engine go on from."""

    def restore(self, path: Path, weights_only: bool = False) -> checkpoint.TrainingState:
        """Load a checkpoint of any layout and engine, or its weights alone; returns where it
        stands."""
