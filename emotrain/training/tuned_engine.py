"""The engine of a run that tunes a model: it updates some rows of a parameter and not others
(`finetune.experts`), and learns a teacher's predictions (`finetune.teacher`)."""

from __future__ import annotations

from pathlib import Path

import torch

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.distributed.parallelize import build_model
from emotrain.distributed.ranks import Ranks
from emotrain.model.losses import language_model_sums
from emotrain.model.report import LossSums, RoutingReport
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Transformer
from emotrain.training.checkpoint_folders import TrainingState
from emotrain.training.engine import NativeEngine, Phase, part
from emotrain.training.engine_protocol import Update
from emotrain.training.optimizer import build_optimizer
from emotrain.training.rows import TrainedRows
from emotrain.training.teacher import Teacher


def build_engine(config: Config, ranks: Ranks, fresh: bool) -> NativeEngine:
    """The engine that a configuration asks for; see `NativeEngine.build`."""
    tunes = config.finetune.experts or config.finetune.teacher
    return (TunedEngine if tunes else NativeEngine).build(config, ranks, fresh)


class TunedEngine(NativeEngine):
    """Parameters whose rows are trained in part, and a teacher; either may be there."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        bfloat16: bool = False,
        rows: TrainedRows | None = None,
        teacher: Teacher | None = None,
    ):
        super().__init__(model, optimizer, bfloat16)
        self.rows, self.teacher = rows, teacher
        if rows is not None:
            # Before the update and at its learning rate, as AdamW decays.
            optimizer.register_step_pre_hook(lambda own, *_: rows.decay(own.param_groups[0]["lr"]))

    @classmethod
    def build(cls, config: Config, ranks: Ranks, fresh: bool) -> TunedEngine:
        setup = config.finetune
        teacher = Teacher(setup.teacher, config, ranks) if setup.teacher else None
        model = build_model(config, ranks, fresh)
        rows = TrainedRows.of(model, config) if setup.experts else None
        optimizer = build_optimizer(model, config.optimizer, () if rows is None else rows)
        bfloat16 = config.training.uses_bfloat16(ranks.device.type)
        return cls(model, optimizer, bfloat16, rows, teacher)

    def forward(
        self, batch: PackedBatch, request: RoutingRequest, z_weight: float
    ) -> tuple[LossSums, RoutingReport]:
        if self.teacher is None:
            return super().forward(batch, request, z_weight)
        device = batch.tokens_BS.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
            with part(Phase.FORWARD):
                output = self.model(batch, request)
            with part(Phase.LOSS), self.teacher.imitation(batch) as imitation:
                sums = language_model_sums(
                    output,
                    self.model.head,
                    batch,
                    z_weight,
                    head_gradient=self._head_gradient,
                    of_block=imitation,
                )
        own = LossSums(sums.lm, imitation.cross_entropy, imitation.z, sums.num_targets)
        return own, output.routing

    def finish_step(self, max_norm: float, ranks: Ranks) -> Update:
        if self.rows is not None:
            self.rows.clear_gradients()
        return super().finish_step(max_norm, ranks)

    def restore(self, path: Path, weights_only: bool = False) -> TrainingState:
        state = super().restore(path, weights_only)
        if self.rows is not None and self.optimizer is not None:
            self.rows.clear_moments(self.optimizer)
        return state
