"""The engine of a run that tunes a model: it updates some rows of a parameter and not others
(`finetune.experts`)."""

from __future__ import annotations

from pathlib import Path

from emotrain.config import Config
from emotrain.distributed.parallelize import build_model
from emotrain.distributed.ranks import Ranks
from emotrain.training.checkpoint_folders import TrainingState
from emotrain.training.engine import NativeEngine
from emotrain.training.engine_protocol import Update
from emotrain.training.optimizer import build_optimizer
from emotrain.training.rows import TrainedRows


def build_engine(config: Config, ranks: Ranks, fresh: bool) -> NativeEngine:
    """The engine that a configuration asks for; see `NativeEngine.build`."""
    kind = TunedEngine if config.finetune.experts else NativeEngine
    return kind.build(config, ranks, fresh)


class TunedEngine(NativeEngine):
    """Parameters whose rows are trained in part."""

    rows: TrainedRows

    @classmethod
    def build(cls, config: Config, ranks: Ranks, fresh: bool) -> TunedEngine:
        model = build_model(config, ranks, fresh)
        rows = TrainedRows.of(model, config)
        optimizer = build_optimizer(model, config.optimizer, rows)
        # Before the update and at its learning rate, as AdamW decays.
        optimizer.register_step_pre_hook(
            lambda updating, *_: rows.decay(updating.param_groups[0]["lr"])
        )
        engine = cls(model, optimizer, config.training.uses_bfloat16(ranks.device.type))
        engine.rows = rows
        return engine

    def finish_step(self, max_norm: float, ranks: Ranks) -> Update:
        self.rows.clear_gradients()
        return super().finish_step(max_norm, ranks)

    def restore(self, path: Path, weights_only: bool = False) -> TrainingState:
        state = super().restore(path, weights_only)
        assert self.optimizer is not None
        self.rows.clear_moments(self.optimizer)
        return state
