"""PackedBatch: the tokens of a micro-batch and the documents they belong to.

This is the only truth about documents. Attention masks, expert pools and per-document statistics
all read `document_BS`; nothing else looks for end-of-document tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emotrain.errors import UserError

IGNORE = -100
"""Target value of a position without a loss."""

PADDING_ID = -1
"""Permanent id of the pseudo-document that padding tokens belong to."""

SOURCE_BITS = 48
"""Permanent ids are below 2^48, in a mixture those of source j between j and j + 1 times that."""


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of S tokens, packed from G documents (or pieces of documents cut by the sequence
    length).

    A document cut by the end of a sequence goes on in another one as a document of its own there,
    so that what a token sees and where it is routed never depends on which sequences share its
    micro-batch.
    """

    tokens_BS: Tensor
    """int64 token ids."""
    targets_BS: Tensor
    """int64 id of the token to predict at each position; -100 where no loss is taken."""
    document_BS: Tensor
    """int64 in [0, G): which document of this batch the token belongs to. An EOS token ends its own
    document. Documents follow one another: along the flattened rows the numbers never fall, and
    none spans two rows."""
    document_ids_G: Tensor
    """int64 permanent id of each document in its data set; -1 is padding. Random draws are keyed
    by it."""
    has_padding: bool = False
    """Whether any token is padding (a host-side fact, so that the usual path needs no mask)."""
    domain: str = ""
    """Domain of all documents, whose exclusive experts they use; empty for none."""
    num_sources: int = 1
    """Sources of the mixture that the rows are from; 1 without one."""

    @property
    def num_documents(self) -> int:
        return self.document_ids_G.shape[0]

    @property
    def document_T(self) -> Tensor:
        return self.document_BS.reshape(-1)

    @property
    def valid_T(self) -> Tensor | None:
        """bool [T], False for padding; None where there is no padding."""
        return (self.document_ids_G >= 0)[self.document_T] if self.has_padding else None

    def to(self, device: torch.device | str) -> PackedBatch:
        def move(tensor: Tensor) -> Tensor:
            # From memory that is not pinned the copy would wait for the GPU.
            if torch.device(device).type == "cuda" and not tensor.is_cuda:
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        moved: Any = {name: move(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    @classmethod
    def from_rows(cls, tokens_BS: Tensor, document_ids_G: Tensor | None = None) -> PackedBatch:
        """Each row is one document. Targets are the row shifted by one; the last position has
        none."""
        num_rows = tokens_BS.shape[0]
        rows = torch.arange(num_rows, device=tokens_BS.device)
        targets_BS = torch.full_like(tokens_BS, IGNORE)
        targets_BS[:, :-1] = tokens_BS[:, 1:]
        ids = rows.clone() if document_ids_G is None else document_ids_G
        return cls(tokens_BS, targets_BS, rows[:, None].expand_as(tokens_BS), ids)

    @classmethod
    def from_documents(
        cls,
        tokens_BS: np.ndarray,
        lengths_G: np.ndarray,
        ids_G: np.ndarray,
        cross_document_targets: bool,
    ) -> PackedBatch:
        """Build a batch from rows and the lengths and permanent ids of the documents that fill
        them, one row after the other.

        Args:
            tokens_BS: integers; int64 is used in place.
            lengths_G: document lengths in tokens; those of a row sum to S.
            ids_G: int64 permanent document ids (-1 marks padding, which has no loss).
            cross_document_targets: whether the last token of a document predicts the first of the
                next one in the same row (the reference trains on these, spec 4.3).
        Raises:
            ValueError: lengths that do not sum to S in each row, or not one id a length.
        """
        num_rows, row_length = tokens_BS.shape
        ends_G = np.cumsum(lengths_G)
        row_ends_B = np.arange(1, num_rows + 1) * row_length
        if (
            len(ids_G) != len(lengths_G)
            or not len(ids_G)
            or lengths_G.min() < 1
            or ends_G[-1] != row_ends_B[-1]
            or (ends_G[np.searchsorted(ends_G, row_ends_B)] != row_ends_B).any()
        ):
            raise UserError(
                f"{len(ids_G)} documents of lengths {lengths_G.tolist()} do not fill {num_rows} "
                f"rows of {row_length} tokens; give positive lengths that sum to it in each row, "
                f"and one id each"
            )
        document_BS = np.repeat(np.arange(len(ids_G)), lengths_G).reshape(num_rows, row_length)
        tokens_BS = tokens_BS.astype(np.int64, copy=False)
        targets_BS = np.empty_like(tokens_BS)
        targets_BS[:, :-1] = tokens_BS[:, 1:]
        targets_BS[:, -1] = IGNORE
        if not cross_document_targets:
            targets_BS.reshape(-1)[ends_G - 1] = IGNORE
        has_padding = bool((ids_G < 0).any())
        if has_padding:
            is_padding_BS = ids_G[document_BS] < 0
            targets_BS[is_padding_BS] = IGNORE
            targets_BS[:, :-1][is_padding_BS[:, 1:]] = IGNORE
        return cls(
            torch.from_numpy(tokens_BS),
            torch.from_numpy(targets_BS),
            torch.from_numpy(document_BS),
            torch.from_numpy(ids_G),
            has_padding,
        )


def mix64(key: Tensor) -> Tensor:
    """splitmix64's step and finaliser on int64, whose arithmetic wraps: every bit of the key
    moves every bit of the result."""
    key = key + -7046029254386353131
    key = (key ^ _shift_right(key, 30)) * -4658895280553007687
    key = (key ^ _shift_right(key, 27)) * -7723592293110705685
    return key ^ _shift_right(key, 31)


def _shift_right(key: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own keeps the sign."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)
