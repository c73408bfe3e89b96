"""The loss of each source of a mixture, from the losses of tokens that are computed anyway. A row
of a batch is of one source, which the id of its first document says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emotrain.batch import SOURCE_BITS, PackedBatch


class SourceLosses:
    """Takes the cross entropy of each token, block after block (`linear_cross_entropy`)."""

    def __init__(self, batch: PackedBatch):
        self._batch = batch
        self._blocks: list[Tensor] = []

    def __call__(self, cross_entropy_t: Tensor) -> None:
        self._blocks.append(cross_entropy_t)

    def sums(self) -> Tensor:
        """float64 [X, 2]: for each of X sources the sum of the cross entropy, in nats, and the
        number of targets. Nothing waits for the device, and the same bits come out every time."""
        batch = self._batch
        loss_BS = torch.cat(self._blocks).view_as(batch.targets_BS)
        loss_B = loss_BS.sum(dim=1, dtype=torch.float64)
        targets_B = (batch.targets_BS >= 0).sum(dim=1, dtype=torch.float64)
        sources_X = torch.arange(batch.num_sources, device=loss_B.device)
        of_source_XB = source_of_rows(batch) == sources_X[:, None]
        sums = [torch.where(of_source_XB, row_B, 0).sum(dim=1) for row_B in (loss_B, targets_B)]
        return torch.stack(sums, dim=1)


def source_of_rows(batch: PackedBatch) -> Tensor:
    """int64 [B]: the number of each row's source."""
    return batch.document_ids_G[batch.document_BS[:, 0]] >> SOURCE_BITS
