"""The new tokens of several sequences, one after the other, without padding: a step of generation.

A sequence brings one token (it is being generated) or a piece of its prompt. Those with one token
come first: in torch their attention is one call for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from emotrain.generation.cache import PAGE


@dataclass(frozen=True)
class Part:
    """What one sequence brings to a step."""

    tokens: Sequence[int]
    """New tokens, at least one."""
    start: int
    """Position of the first of them: so many tokens are in the cache."""
    seat: int
    """Where the model keeps which experts the sequence may use."""
    pages: Sequence[int]
    """Its pages of the cache, which also hold the new tokens."""
    all_outputs: bool = False
    """Whether hidden states of all new tokens are wanted, and not of the last alone."""

    @property
    def length(self) -> int:
        """Tokens of the sequence up to the last new one."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Piece:
    """Several new tokens of one sequence."""

    first: int
    """Where they start among the tokens of the step."""
    count: int
    pages_1X: Tensor
    """int64 pages of the sequence."""
    length: int
    """Tokens of the sequence up to the last of these."""


@dataclass(frozen=True)
class RaggedBatch:
    """T new tokens of B sequences."""

    tokens_T: Tensor
    """int64, as all that follow."""
    positions_T: Tensor
    seats_T: Tensor
    rows_T: Tensor
    """The token's row of the cache, page * PAGE + place."""
    sequences_T: Tensor
    """The token's row of `pages_BX`."""
    pages_BX: Tensor
    """Pages of each sequence; 0 where one has fewer than another."""
    singles: int
    """Sequences with one token; they come first."""
    lengths: tuple[int, ...]
    """Tokens of each of them."""
    dtype: torch.dtype
    """Of attention."""
    pieces: tuple[Piece, ...]
    outputs_X: Tensor | None
    """int64: the tokens whose hidden states are wanted; None for all."""

    @property
    def length(self) -> int:
        """Tokens of the longest of those with one new token."""
        return max(self.lengths, default=0)

    @cached_property
    def mask_B11Y(self) -> Tensor | None:
        """For those: 0 for tokens of the sequence, -inf beyond its end; None where all are of one
        length."""
        return _mask(self.lengths, self.tokens_T.device, self.dtype)

    @classmethod
    def of(
        cls, parts: Sequence[Part], device: torch.device | str, dtype: torch.dtype
    ) -> RaggedBatch:
        """Parts of one token come first, in `parts` already. `dtype` is that of attention."""
        singles = sum(len(part.tokens) == 1 for part in parts)
        assert all(len(part.tokens) == 1 for part in parts[:singles]), "single tokens come first"
        of_singles = [
            (part.tokens[0], part.start, part.seat, _row(part, part.start), index)
            for index, part in enumerate(parts[:singles])
        ]
        columns = [_columns(part, index) for index, part in enumerate(parts) if index >= singles]
        if of_singles:
            columns.insert(0, np.array(of_singles).T)
        table = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
        tokens_T, positions_T, seats_T, rows_T, sequences_T = (
            torch.from_numpy(np.ascontiguousarray(table)).to(device).unbind()
        )
        most = max(-(-part.length // PAGE) for part in parts)
        pages_BX = torch.tensor(
            [[*part.pages[:most], *[0] * (most - len(part.pages))] for part in parts], device=device
        )
        first, pieces = singles, []
        for index, part in enumerate(parts[singles:], singles):
            count = len(part.tokens)
            pieces.append(Piece(first, count, pages_BX[index : index + 1], part.length))
            first += count
        return cls(
            tokens_T,
            positions_T,
            seats_T,
            rows_T,
            sequences_T,
            pages_BX,
            singles,
            tuple(part.length for part in parts[:singles]),
            dtype,
            tuple(pieces),
            _outputs(parts, device),
        )


def _row(part: Part, position: int) -> int:
    return part.pages[position // PAGE] * PAGE + position % PAGE


def _columns(part: Part, index: int) -> np.ndarray:
    """Token, position, seat, row and sequence of each token of a part, [5, t]."""
    position_t = np.arange(part.start, part.length)
    row_t = np.asarray(part.pages)[position_t // PAGE] * PAGE + position_t % PAGE
    seat_t, index_t = np.full_like(row_t, part.seat), np.full_like(row_t, index)
    return np.stack([np.asarray(part.tokens), position_t, seat_t, row_t, index_t])


def _mask(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """What sequences of these lengths do not see of the longest."""
    if not lengths or min(lengths) == max(lengths):
        return None
    places_Y = torch.arange(max(lengths), device=device)
    beyond_BY = places_Y >= torch.tensor(lengths, device=device)[:, None]
    mask_BY = torch.zeros(beyond_BY.shape, device=device, dtype=dtype)
    return mask_BY.masked_fill_(beyond_BY, -torch.inf)[:, None, None]


def _outputs(parts: Sequence[Part], device: torch.device | str) -> Tensor | None:
    if all(len(part.tokens) == 1 or part.all_outputs for part in parts):
        return None
    wanted, first = [], 0
    for part in parts:
        end = first + len(part.tokens)
        wanted.append(np.arange(first if part.all_outputs else end - 1, end))
        first = end
    return torch.from_numpy(np.concatenate(wanted)).to(device)
