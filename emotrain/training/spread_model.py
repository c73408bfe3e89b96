"""A trained model that only predicts, spread over the processes as a run's own is: no process makes
more of it than its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from emotrain.config import Config, FinetuneConfig, ParallelConfig, with_settings
from emotrain.distributed.parallelize import build_model
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.model.parts import stored_tensors
from emotrain.model.transformer import Transformer
from emotrain.training.checkpoint import restore_parts
from emotrain.training.tensor_index import TensorPart

LAYOUT = ("parallel.replicate", "parallel.shard", "parallel.ep")
"""Settings of how processes share a model that only predicts."""


def layout_of(config: Config, overrides: Sequence[str] = ()) -> Config:
    """A checkpoint's configuration with the layout of who reads it: `parallel.*` settings as
    `key=value`, over their defaults. The layout of training is left behind, and compilation.

    Raises:
        UserError: another setting, or a value that it cannot have.
    """
    for override in overrides:
        if override.partition("=")[0] not in LAYOUT:
            raise UserError(
                f"{override}: an evaluation takes {', '.join(LAYOUT)}; all else is the checkpoint's"
            )
    plain = replace(
        config,
        parallel=ParallelConfig(),
        training=replace(config.training, compile=False),
    )
    return with_settings(plain, {}, overrides)


def load_to_predict(folder: Path, config: Config, ranks: Ranks) -> Transformer:
    """The model of a checkpoint of any layout, on the device of each rank, without gradients.

    Args:
        config: its `model` is the checkpoint's; `parallel` says how it is spread, `training` in
            which precision it computes.
    Raises:
        UserError: a damaged checkpoint, or a layout that cannot be. On all ranks.
    """
    parallel, setup = config.parallel, config.training
    own = replace(
        config,
        finetune=FinetuneConfig(),
        # It has no backward pass and trains nothing: experts stay where they are, and the rows of
        # no step must divide.
        parallel=ParallelConfig(parallel.replicate, parallel.shard, parallel.ep),
        training=replace(setup, global_batch=setup.micro_batch * ranks.world_size),
    )
    model = build_model(own, ranks, fresh=False).requires_grad_(False)
    parts = {name: TensorPart.of(tensor) for name, tensor in stored_tensors(model).items()}
    restore_parts(folder, lambda num_updates: parts, weights_only=True)
    return model
