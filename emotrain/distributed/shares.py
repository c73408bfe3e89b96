"""Batches divided over ranks that have a model between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emotrain.batch import IGNORE, PADDING_ID, PackedBatch
from emotrain.distributed.ranks import Ranks

ALONE = Ranks()
"""A process that has the whole model."""


def share(batches: Sequence[PackedBatch], ranks: Ranks) -> list[PackedBatch]:
    """This rank's share of batches that all ranks know. Every rank has as many, some of padding
    alone: gathers of parameters and exchanges of tokens need all of them."""
    each = -(-len(batches) // ranks.world_size)
    own = list(batches[ranks.rank :: ranks.world_size])
    return own + [_padding_like(batches[0])] * (each - len(own))


def _padding_like(batch: PackedBatch) -> PackedBatch:
    rows = torch.arange(len(batch.tokens_BS))
    return PackedBatch(
        torch.zeros_like(batch.tokens_BS),
        torch.full_like(batch.targets_BS, IGNORE),
        rows[:, None].expand_as(batch.tokens_BS),
        torch.full_like(rows, PADDING_ID),
        has_padding=True,
    )
