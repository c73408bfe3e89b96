"""How a step reaches the parameters. Two engines: this file's, for a plain model or one under
FSDP2, and DeepSpeed's (deepspeed.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.distributed.parallelize import build_model
from emotrain.distributed.ranks import Ranks, local_part, num_copies
from emotrain.kernels import HeadGradient
from emotrain.model.losses import language_model_sums
from emotrain.model.report import LossSums, RoutingReport
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Transformer
from emotrain.training import checkpoint
from emotrain.training.engine_protocol import Update
from emotrain.training.optimizer import build_optimizer


class Phase(StrEnum):
    """A part of a step. Phases do not nest; one that comes several times in a step is added up."""

    DATA = "data wait"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"
    """A forward pass inside backward; the planner alone tells it from the rest of backward."""
    CLIPPING = "clipping"
    OPTIMIZER = "optimizer"
    CLIPPING_AND_OPTIMIZER = "clipping and optimizer"
    """DeepSpeed does both in one."""
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint copy"
    OTHER = "other"
    """What no other phase covers."""


Recorder = Callable[[str], AbstractContextManager[None]]

_NOTHING = nullcontext()
_recorder: Recorder | None = None


def part(phase: str) -> AbstractContextManager[None]:
    """This phase of the step, for `with`: it is recorded where somebody records, and else does
    nothing."""
    return _NOTHING if _recorder is None else _recorder(phase)


def record_phases(recorder: Recorder | None) -> None:
    """From now on `recorder` opens and closes every phase; None records no more."""
    global _recorder
    _recorder = recorder


class NativeEngine:
    """The engine of a plain model, or one under FSDP2. Without an optimizer a step ends with the
    clipped gradient."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer | None = None,
        bfloat16: bool = False,
    ):
        """`bfloat16`: whether forward passes run under autocast to it."""
        self.model, self.optimizer, self.bfloat16 = model, optimizer, bfloat16
        self._head_gradient = HeadGradient()

    @classmethod
    def build(cls, config: Config, ranks: Ranks, fresh: bool) -> NativeEngine:
        """`fresh`: whether the model gets its initial values, or waits for those of a
        checkpoint."""
        model = build_model(config, ranks, fresh)
        bfloat16 = config.training.uses_bfloat16(ranks.device.type)
        return cls(model, build_optimizer(model, config.optimizer), bfloat16)

    def set_learning_rate(self, rate: float) -> None:
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def start_step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self._head_gradient = HeadGradient()

    def forward(
        self, batch: PackedBatch, request: RoutingRequest, z_weight: float
    ) -> tuple[LossSums, RoutingReport]:
        device, backend = batch.tokens_BS.device.type, self.model.config.experts.backend
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
            with part(Phase.FORWARD):
                output = self.model(batch, request)
            with part(Phase.LOSS):
                sums = language_model_sums(
                    output, self.model.head, batch, z_weight, backend, self._head_gradient
                )
        return sums, output.routing

    def backward(self, loss: Tensor, is_last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(is_last)
            # Copies of the model sum their gradients once a step.
            self.model.set_requires_all_reduce(is_last)
            # What is there of the head's gradient is that of all micro-batches until now, and its
            # reduction has the whole of this backward pass to run under.
            self._head_gradient.is_due = is_last
        spreading(loss).backward()

    def finish_step(self, max_norm: float, ranks: Ranks) -> Update:
        with part(Phase.CLIPPING):
            trained = [p for p in self.model.parameters() if p.requires_grad]
            norm = float(clip_gradients(trained, max_norm, ranks))
        if self.optimizer is None or not math.isfinite(norm):
            return Update(norm, applied=False)
        with part(Phase.OPTIMIZER):
            self.optimizer.step()
        return Update(norm, applied=True)

    def save(
        self,
        writer: checkpoint.CheckpointWriter,
        config: Config,
        state: checkpoint.TrainingState,
        tokenizer: Path | None,
    ) -> None:
        assert self.optimizer is not None
        writer.save(self.model, self.optimizer, config, state, tokenizer)

    def restore(self, path: Path, weights_only: bool = False) -> checkpoint.TrainingState:
        assert self.optimizer is not None
        return checkpoint.restore(path, self.model, self.optimizer, weights_only)


def spreading(loss: Tensor) -> Tensor:
    """A loss whose gradient is not finite where it is not: engines skip updates by gradients."""
    return loss * (1 + 0 * loss.detach())


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float, ranks: Ranks) -> torch.Tensor:
    """Scale gradients in place so that their global norm is at most `max_norm` (0: leave them).
    Returns the norm before.

    One norm over all parameters, wherever their parts are: each rank adds the squares of what it
    holds, divided by how many ranks hold the same.
    """
    gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
    assert len(gradients) == len(parameters)
    norms = list(torch._foreach_norm(gradients))
    # Numbers that go with the launch: a tensor of them would be a copy that waits for the device.
    torch._foreach_div_(norms, [num_copies(p) ** 0.5 for p in parameters])
    norm = ranks.sum(torch.stack(norms).double().square().sum()).sqrt()
    if max_norm > 0:
        torch._foreach_mul_(
            gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].dtype)
        )
    return norm
