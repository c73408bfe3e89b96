"""The model whose predictions a run learns (`finetune.teacher`): spread over the processes as the
run's own is, without gradients and without optimizer state."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Config, LossConfig
from emotrain.distributed.gathering import gathered
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.model.imitation import Imitation
from emotrain.training.checkpoint_folders import find, read_config
from emotrain.training.spread_model import load_to_predict

log = logging.getLogger("emotrain")


class Teacher:
    """A trained model that only predicts."""

    def __init__(self, checkpoint: str | Path, config: Config, ranks: Ranks):
        """
        Args:
            checkpoint: of any layout, or the folder of a run (then its newest).
            config: of the run.
        Raises:
            UserError: no checkpoint, a damaged one, or one of another vocabulary.
        """
        folder = find(checkpoint)
        model = read_config(folder).model
        if model.vocab_size != config.model.vocab_size:
            raise UserError(
                f"finetune.teacher={checkpoint} predicts {model.vocab_size} tokens, the model "
                f"{config.model.vocab_size}; give a teacher with the model's tokenizer"
            )
        self.weight, self.temperature = config.finetune.teacher_weight, config.finetune.temperature
        # Without the run's losses: its routers may have biases that the teacher's have not.
        alone = replace(config, model=model, losses=LossConfig())
        self.model = load_to_predict(folder, alone, ranks)
        if ranks.is_first:
            log.info("learning from the predictions of %s", folder)

    @contextmanager
    def imitation(self, batch: PackedBatch) -> Iterator[Imitation]:
        """The loss of a micro-batch, within the block: the weights of the teacher's head are
        together there."""
        with torch.no_grad():
            hidden_TD = self.model(batch).hidden_TD
        head = self.model.head
        with gathered(head):
            yield Imitation(hidden_TD, _as(head.weight, hidden_TD), self.weight, self.temperature)


def _as(weight: Tensor, hidden_TD: Tensor) -> Tensor:
    return weight.detach().to(hidden_TD.dtype)
