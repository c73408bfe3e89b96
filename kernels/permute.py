"""Rows to the order of their destinations and back, for expert parallelism: the readable twins.

Destinations may be experts or ranks: whatever `sort_slots` sorted by. A token has a row for each of
its slots in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emotrain.kernels.backends import choose_backend
from emotrain.kernels.slots import SortedSlots


def permute(x_TD: Tensor, slots: SortedSlots, backend: str = "auto") -> Tensor:
    """The row of its token for each sorted slot -> [R, D]; zeros for the empty slots at the end.

    Where the host knows how many slots are in use, no rows are made for the others. Backward adds
    the rows of each token. See `choose_backend` for `backend` and errors.
    """
    num_rows = slots.num_rows
    if choose_backend(backend, x_TD, slots.ends_N.shape[0]) == "triton":
        from emotrain.kernels.triton_permute import permute_triton

        return permute_triton(x_TD, slots)
    return torch.where(
        _in_use(slots, num_rows)[:, None], x_TD.index_select(0, slots.token_R[:num_rows]), 0
    )


def unpermute(
    rows_RD: Tensor,
    slots: SortedSlots,
    num_tokens: int,
    weights_TK: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(Weighted) sum of each token's rows -> [T, D], in the dtype of the rows; zeros for a token
    without any.

    Args:
        rows_RD: one row a sorted slot; those of empty slots may hold anything, or be left out.
        num_tokens: T.
        weights_TK: weight of each slot; those of empty slots may be anything. None adds the rows as
            they are, and backward needs none of them.
    """
    if choose_backend(backend, rows_RD, slots.ends_N.shape[0]) == "triton":
        from emotrain.kernels.triton_permute import unpermute_triton

        return unpermute_triton(rows_RD, slots, num_tokens, weights_TK)
    num_rows = rows_RD.shape[0]
    in_use_R = _in_use(slots, num_rows)
    rows_RD = torch.where(in_use_R[:, None], rows_RD, 0)
    if weights_TK is not None:
        weights_R = torch.where(in_use_R, weights_TK.reshape(-1)[slots.slot_R[:num_rows]], 0)
        rows_RD = rows_RD * weights_R[:, None].to(rows_RD.dtype)
    return rows_RD.new_zeros(num_tokens, rows_RD.shape[1]).index_add(
        0, slots.token_R[:num_rows], rows_RD
    )


def _in_use(slots: SortedSlots, num_rows: int) -> Tensor:
    """bool [R]: False for the empty slots at the end."""
    return torch.arange(num_rows, device=slots.token_R.device) < slots.ends_N[-1]
