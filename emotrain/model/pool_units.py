"""What has a pool, and what chooses it, where that is not a document of the batch each time
(`PoolConfig.unit`, `chosen_by` and `across_windows`).

    document       a a a a a a a a b b b b b
    segment:3      0 0 0 1 1 1 2 2 3 3 3 4 4     the units, each with a pool of its own
    other_part     0 0 0 0 1 1 1 1 2 2 2 3 3     each half has the pool that the other one chooses
    prefix:3       * * *           * * *         only these tokens choose

A document that is cut by the ends of windows is one again in `across_windows` rows of the batch:

    rows           a a a a | a a b b | b b b b | b c c c      4 tokens each
    1              0 0 0 0 | 1 1 2 2 | 3 3 3 3 | 4 5 5 5      as published
    2              0 0 0 0 | 0 0 1 1 | 2 2 2 2 | 2 3 3 3      b goes on in rows of another pair
    4              0 0 0 0 | 0 0 1 1 | 1 1 1 1 | 1 2 2 2

Whether a token counts and to what depends on its place in its document alone, so that no layout
changes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import PoolConfig


@dataclass(frozen=True)
class PoolUnits:
    """The U units of a batch, each of which has one pool."""

    unit_T: Tensor
    """int64: the unit of each token."""
    document_U: Tensor
    """int64: the document of each unit; the first, of one that is cut."""
    chooser_U: Tensor
    """int64: the unit whose tokens choose the pool."""
    counts_T: Tensor
    """bool: the tokens that choose."""

    def scores(
        self, probabilities_TN: Tensor, pool_size_G: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The scores that choose each unit's pool [U, N], and its size: that of its document.

        Args:
            probabilities_TN: those before a pool was drawn.
        """
        counted_TN = torch.where(self.counts_T[:, None], probabilities_TN, 0)
        scores_UN = counted_TN.new_zeros(len(self.chooser_U), counted_TN.shape[1])
        scores_UN.index_add_(0, self.unit_T, counted_TN)
        size_U = None if pool_size_G is None else pool_size_G[self.document_U]
        return scores_UN[self.chooser_U], size_U


def pool_units(pool: PoolConfig, batch: PackedBatch) -> PoolUnits:
    """The units of a batch by `pool.unit` and `pool.chosen_by`. Their number follows from the shape
    of the batch, so that no host waits for it; some have no tokens."""
    document_T, piece_G = batch.document_T, None
    if pool.across_windows > 1:
        document_T, piece_G = joined(batch, pool.across_windows)
    place_T, length_T = places(document_T, batch.num_documents)
    unit_T, per_document = document_T, 1
    if pool.unit != "document":
        size = _number(pool.unit)
        per_document = -(-batch.tokens_BS.shape[1] * pool.across_windows // size)
        unit_T = document_T * per_document + place_T // size
        length_T = (length_T - place_T // size * size).clamp(max=size)
        place_T = place_T % size
    counts_T = torch.ones_like(document_T, dtype=torch.bool)
    if pool.chosen_by == "other_part":
        per_document *= 2
        unit_T = unit_T * 2 + (2 * place_T >= length_T).long()
    elif pool.chosen_by != "document":
        counts_T = place_T < _number(pool.chosen_by)
    units = torch.arange(batch.num_documents * per_document, device=document_T.device)
    chooser_U = units
    if pool.chosen_by == "other_part":
        tokens_U = torch.zeros_like(units).index_add_(0, unit_T, torch.ones_like(unit_T))
        # A part of one token has no other part, and chooses itself.
        chooser_U = torch.where(tokens_U[units ^ 1] > 0, units ^ 1, units)
    document_U = units // per_document
    if piece_G is not None:
        document_U = piece_G[document_U]
    return PoolUnits(unit_T, document_U, chooser_U, counts_T)


def joined(batch: PackedBatch, rows: int) -> tuple[Tensor, Tensor]:
    """Documents that are one over the ends of rows, where each `rows` rows are windows that follow
    one another in the data.

    Returns:
        int64 [T] in [0, G): which of them each token belongs to; int64 [G]: the first piece of each
        of them, and 0 beyond the last.
    """
    ids_G, length_S = batch.document_ids_G, batch.tokens_BS.shape[1]
    length_G = torch.zeros_like(ids_G)
    length_G.index_add_(0, batch.document_T, torch.ones_like(batch.document_T))
    start_G = length_G.cumsum(0) - length_G
    goes_on_G = (start_G % length_S == 0) & (start_G // length_S % rows != 0)
    goes_on_G &= ids_G == ids_G.roll(1)
    whole_G = (~goes_on_G).cumsum(0) - 1
    pieces_G = torch.arange(len(ids_G), device=ids_G.device)
    # The places of later pieces are written beyond the last whole, and cut off.
    piece_G = torch.zeros(len(ids_G) + 1, dtype=torch.int64, device=ids_G.device)
    piece_G.scatter_(0, torch.where(goes_on_G, len(ids_G), whole_G), pieces_G)
    return whole_G[batch.document_T], piece_G[:-1]


def places(document_T: Tensor, num_documents: int) -> tuple[Tensor, Tensor]:
    """The place of each token in its document, from 0, and the length of that, both int64 [T].
    Documents follow one another."""
    length_G = document_T.new_zeros(num_documents)
    length_G.index_add_(0, document_T, torch.ones_like(document_T))
    start_G = length_G.cumsum(0) - length_G
    place_T = torch.arange(len(document_T), device=document_T.device) - start_G[document_T]
    return place_T, length_G[document_T]


def _number(setting: str) -> int:
    """N of `word:N`, which the configuration's rules have checked."""
    return int(setting.partition(":")[2])
