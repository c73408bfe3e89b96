"""What travels between ranks under expert parallelism: parcels, and where they lie. The readable
twins of triton_parcels.py.

A parcel is a token's row on its way to one rank that holds some of its experts, and behind the row
its weights and which of that rank's experts they are for, as bytes: one exchange takes all of it.
Gradients come back as parcels without choices.

    row, D numbers | weights, K numbers | choices, K small integers | up to a multiple of 32 bytes
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SECTOR = 32
"""Bytes that a GPU reads from its memory at once: rows begin where one does."""


@dataclass(frozen=True)
class ParcelLayout:
    """Where the parts of a parcel lie."""

    width: int
    """D."""
    num_chosen: int
    """K."""
    dtype: torch.dtype
    """Of a row."""
    weight_dtype: torch.dtype
    choice_dtype: torch.dtype | None
    """None: without choices, as gradients travel."""

    @classmethod
    def of(cls, x_TD: Tensor, weights_TK: Tensor, per_rank: int) -> ParcelLayout:
        """For tokens and weights like these, on ranks of up to `per_rank` experts."""
        choice_dtype = torch.uint8 if per_rank < 256 else torch.int32
        return cls(x_TD.shape[1], weights_TK.shape[1], x_TD.dtype, weights_TK.dtype, choice_dtype)

    @property
    def of_gradients(self) -> ParcelLayout:
        return ParcelLayout(self.width, self.num_chosen, self.dtype, self.weight_dtype, None)

    @cached_property
    def weights_at(self) -> int:
        """Byte at which the weights begin; so begin the choices at `choices_at`."""
        return _up_to(self.width * self.dtype.itemsize, self.weight_dtype.itemsize)

    @cached_property
    def choices_at(self) -> int:
        return self.weights_at + self.num_chosen * self.weight_dtype.itemsize

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a parcel."""
        choices = self.num_chosen * self.choice_dtype.itemsize if self.choice_dtype else 0
        return _up_to(self.choices_at + choices, SECTOR)

    def empty(self, like: Tensor, num_parcels: int) -> Tensor:
        """uint8 [O, bytes] on the device of `like`."""
        return like.new_empty(num_parcels, self.num_bytes, dtype=torch.uint8)

    def rows(self, parcels_OB: Tensor) -> Tensor:
        """A view of the rows, [O, D]."""
        return parcels_OB.view(self.dtype)[:, : self.width]

    def weights(self, parcels_OB: Tensor) -> Tensor:
        """A view of the weights, [O, K]."""
        first = self.weights_at // self.weight_dtype.itemsize
        return parcels_OB.view(self.weight_dtype)[:, first : first + self.num_chosen]

    def choices(self, parcels_OB: Tensor) -> Tensor:
        """A view of the choices, [O, K]: the number of an expert on the rank that the parcel goes
        to, or `per_rank` for one of another rank and for an empty slot."""
        assert self.choice_dtype is not None, "gradients carry no choices"
        first = self.choices_at // self.choice_dtype.itemsize
        return parcels_OB.view(self.choice_dtype)[:, first : first + self.num_chosen]


@dataclass(frozen=True)
class Spread:
    """How the N experts of a layer are spread over W ranks."""

    num_experts: int
    num_ranks: int
    per_rank: int
    """Experts of a rank; the last ones may hold fewer."""


def destinations(experts_TK: Tensor, spread: Spread, backend: str) -> tuple[Tensor, Tensor]:
    """Where the parcels of each token lie among all that this rank sends: those for rank 0 first,
    for each rank in the order of their tokens. A token goes once to each rank that holds at least
    one of its experts.

    Args:
        experts_TK: int64 expert of each slot; N marks an empty one.
        backend: `triton` or `torch`: what `choose_backend` chose.
    Returns:
        position_TW, int32, -1 where the token does not go; send_W2, int64: parcels and slots for
        each rank.
    """
    if backend == "triton":
        from emotrain.kernels.triton_parcels import destinations_triton

        return destinations_triton(experts_TK, spread)
    owner_TK = torch.where(
        experts_TK < spread.num_experts, experts_TK // spread.per_rank, spread.num_ranks
    )
    ranks_W = torch.arange(spread.num_ranks, device=experts_TK.device)
    slots_TW = (owner_TK[:, :, None] == ranks_W).sum(1)
    goes_TW = slots_TW > 0
    send_W2 = torch.stack([goes_TW.sum(0), slots_TW.sum(0)], dim=1)
    start_W = send_W2[:, 0].cumsum(0) - send_W2[:, 0]
    position_TW = torch.where(goes_TW, start_W + goes_TW.cumsum(0) - 1, -1)
    return position_TW.int(), send_W2


def pack(
    x_TD: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    position_TW: Tensor,
    num_parcels: int,
    layout: ParcelLayout,
    spread: Spread,
    backend: str,
) -> Tensor:
    """The parcels that leave -> uint8 [O, bytes]."""
    parcels_OB = layout.empty(x_TD, num_parcels)
    if backend == "triton":
        from emotrain.kernels.triton_parcels import pack_triton

        pack_triton(x_TD, weights_TK, experts_TK, position_TW, parcels_OB, layout, spread)
        return parcels_OB
    token_O, rank_O = _origins(position_TW, num_parcels)
    experts_OK = experts_TK.index_select(0, token_O)
    local_OK = experts_OK - rank_O[:, None] * spread.per_rank
    mine_OK = (local_OK >= 0) & (local_OK < spread.per_rank) & (experts_OK < spread.num_experts)
    layout.rows(parcels_OB).copy_(x_TD.index_select(0, token_O))
    weights_OK = weights_TK.index_select(0, token_O)
    layout.weights(parcels_OB).copy_(torch.where(mine_OK, weights_OK, 0))
    layout.choices(parcels_OB).copy_(torch.where(mine_OK, local_OK, spread.per_rank))
    return parcels_OB


def unpack_gradients(
    parcels_OB: Tensor,
    experts_TK: Tensor,
    position_TW: Tensor,
    layout: ParcelLayout,
    spread: Spread,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The backward of `pack`, from the parcels of gradients that came back: the sum of a token's
    rows [T, D], and the gradient of each slot's weight [T, K], 0 for empty slots."""
    rows_OD, weights_OK = layout.rows(parcels_OB), layout.weights(parcels_OB)
    grad_x_TD = combine(rows_OD, position_TW, backend)
    if backend == "triton":
        from emotrain.kernels.triton_parcels import pick_weights_triton

        return grad_x_TD, pick_weights_triton(weights_OK, experts_TK, position_TW, spread)
    used_TK = experts_TK < spread.num_experts
    owner_TK = torch.where(used_TK, experts_TK // spread.per_rank, 0)
    parcel_TK = position_TW.gather(1, owner_TK).long()
    slots_K = torch.arange(layout.num_chosen, device=experts_TK.device)
    if len(parcels_OB) == 0:
        return grad_x_TD, weights_OK.new_zeros(experts_TK.shape)
    picked_TK = weights_OK[parcel_TK.clamp(min=0), slots_K]
    return grad_x_TD, torch.where(used_TK, picked_TK, 0)


def combine(rows_OD: Tensor, position_TW: Tensor, backend: str) -> Tensor:
    """Sum of each token's rows -> [T, D], rank by rank; 0 for a token without any.

    Args:
        rows_OD: unit stride along D.
    """
    if backend == "triton":
        from emotrain.kernels.triton_permute import combine_rows

        return combine_rows(rows_OD, position_TW, len(position_TW))
    token_O, _ = _origins(position_TW, len(rows_OD))
    return rows_OD.new_zeros(len(position_TW), rows_OD.shape[1]).index_add_(0, token_O, rows_OD)


def spread_rows(x_TD: Tensor, position_TW: Tensor, num_rows: int, backend: str) -> Tensor:
    """The backward of `combine`: the row of its token for each parcel -> [O, D]."""
    if backend == "triton":
        from emotrain.kernels.triton_parcels import spread_rows_triton

        return spread_rows_triton(x_TD, position_TW, num_rows)
    return x_TD.index_select(0, _origins(position_TW, num_rows)[0])


def _origins(position_TW: Tensor, num_parcels: int) -> tuple[Tensor, Tensor]:
    """int64 token and rank of each parcel, [O]."""
    # One more place takes the pairs of token and rank without a parcel.
    places = position_TW.reshape(-1).long()
    places = torch.where(places < 0, num_parcels, places)
    pairs = torch.arange(len(places), device=places.device)
    pair_O = pairs.new_empty(num_parcels + 1).scatter_(0, places, pairs)[:num_parcels]
    return pair_O // position_TW.shape[1], pair_O % position_TW.shape[1]


def _up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
