"""A model that is asked questions, and what every pass of it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from emotrain.config import Config
from emotrain.data.tokenizer import TextTokenizer
from emotrain.distributed.ranks import Ranks
from emotrain.distributed.shares import ALONE
from emotrain.evaluation.measure import precision_on, rows_of
from emotrain.generation.loading import load_weights, open_generator
from emotrain.model.transformer import Transformer
from emotrain.progress import Track, untracked


@dataclass
class Session:
    """A model, and what every pass of it needs."""

    model: Transformer
    tokenizer: TextTokenizer
    config: Config
    rows: int
    """Of one forward pass."""
    precision: torch.dtype | None
    track: Track[Any] = field(default=untracked)
    ranks: Ranks = field(default=ALONE)
    """Those that have the model between them."""

    @property
    def most_tokens(self) -> int:
        """That the model reads at once: as in training."""
        return self.config.data.sequence_length


def open_session(
    checkpoint: str | Path,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
) -> tuple[Path, Session]:
    """Load a checkpoint with its tokenizer -> its folder and what runs it.

    Args:
        micro_batch: rows of one forward pass; 0 means as in training.
    Raises:
        UserError: see `open_generator`, `load_weights`, `rows_of`.
    """
    rows_of(micro_batch, 1)
    folder, config, tokenizer = open_generator(checkpoint)
    rows = rows_of(micro_batch, config.training.micro_batch)
    model = load_weights(folder, device)
    precision = precision_on(config, model.head.weight.device)
    return folder, Session(model, tokenizer, config, rows, precision, track)
