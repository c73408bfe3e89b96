"""The new tokens of several sequences, one after the other, without padding: a step of generation.

A sequence brings one token (it is being generated) or a piece of its prompt. Those with one token
come first: their attention is one call for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Piece:
    """Several new tokens of one sequence."""

    first: int
    """Where they start among the tokens of the step."""
    count: int
    pages_X: Tensor | None
    """int64 pages of the whole sequence; None where no token came before these."""
    length: int
    """Tokens of the sequence up to the last of these."""


@dataclass(frozen=True)
class RaggedBatch:
    """T new tokens of several sequences."""

    tokens_T: Tensor
    positions_T: Tensor
    seats_T: Tensor
    rows_T: Tensor
    """int64: the token's row of the cache, page * PAGE + place."""
    singles: int
    """Sequences with one token, B of them; they come first."""
    pages_BX: Tensor | None
    """int64 pages of those sequences; 0 where one has fewer than another."""
    length: int
    """Tokens of the longest of them."""
    mask_B11Y: Tensor | None
    """0 for tokens of the sequence, -inf beyond its end; None where all are of one length."""
    pieces: tuple[Piece, ...]
    outputs_X: Tensor | None
    """int64: the tokens whose hidden states are wanted; None for all."""

    @classmethod
    def of(
        cls, parts: Sequence[Part], device: torch.device | str, dtype: torch.dtype
    ) -> RaggedBatch:
        """Parts of one token come first, in `parts` already."""
        singles = sum(len(part.tokens) == 1 for part in parts)
        assert all(len(part.tokens) == 1 for part in parts[:singles]), "single tokens come first"
        columns: list[np.ndarray] = []
        if singles:
            columns.append(
                np.array(
                    [
                        (
                            part.tokens[0],
                            part.start,
                            part.seat,
                            part.pages[part.start // PAGE] * PAGE + part.start % PAGE,
                        )
                        for part in parts[:singles]
                    ]
                ).T
            )
        columns += [_columns(part) for part in parts[singles:]]
        table = torch.from_numpy(np.concatenate(columns, axis=1)).to(device)
        tokens_T, positions_T, seats_T, rows_T = table.unbind()
        pages_BX, length, mask = _singles(parts[:singles], device, dtype)
        first, pieces = singles, []
        for part in parts[singles:]:
            count = len(part.tokens)
            pages_X = torch.tensor(list(part.pages), device=device) if part.start else None
            pieces.append(Piece(first, count, pages_X, part.start + count))
            first += count
        return cls(
            tokens_T,
            positions_T,
            seats_T,
            rows_T,
            singles,
            pages_BX,
            length,
            mask,
            tuple(pieces),
            _outputs(parts, device),
        )


def _columns(part: Part) -> np.ndarray:
    """Tokens, positions, seats and rows of a part, [4, t]."""
    position_t = np.arange(part.start, part.start + len(part.tokens))
    row_t = np.asarray(part.pages)[position_t // PAGE] * PAGE + position_t % PAGE
    return np.stack([np.asarray(part.tokens), position_t, np.full_like(row_t, part.seat), row_t])


def _singles(
    parts: Sequence[Part], device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor | None, int, Tensor | None]:
    """Pages, longest length and mask of sequences with one new token."""
    if not parts:
        return None, 0, None
    lengths = [part.start + 1 for part in parts]
    longest = max(lengths)
    used = -(-longest // PAGE)
    pages = [[*part.pages[:used], *[0] * (used - len(part.pages))] for part in parts]
    pages_BX = torch.tensor(pages, device=device)
    if min(lengths) == longest:
        return pages_BX, longest, None
    beyond_BY = (
        torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
    )
    mask_BY = torch.zeros(beyond_BY.shape, device=device, dtype=dtype)
    return pages_BX, longest, mask_BY.masked_fill_(beyond_BY, -torch.inf)[:, None, None]


def _outputs(parts: Sequence[Part], device: torch.device | str) -> Tensor | None:
    if all(len(part.tokens) == 1 or part.all_outputs for part in parts):
        return None
    wanted, first = [], 0
    for part in parts:
        end = first + len(part.tokens)
        wanted.append(np.arange(first if part.all_outputs else end - 1, end))
        first = end
    return torch.from_numpy(np.concatenate(wanted)).to(device)
