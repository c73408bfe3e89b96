"""Which source each position of a mixture reads, and where in that source's own order: a pure
function of (seed, position).

    weights       web 7/10, code 2/10, books 1/10
    block         |  web code web web books web web code web web  |  web web ...
    its place     |    0    0   1   2     0   3   4    1   5   6  |    7   8 ...

1. **Blocks.** The order is cut into blocks. Before block b of B positions, source j has read
   floor(w_j * b * B + phase_j) of its own, in exact fractions; the source with the largest weight
   reads the rest. So after every block each source is within one position of its share, and the
   largest within one for each of the others, however long the run is. A phase in [0, 1) for each
   source, drawn from the seed, keeps small sources from coming all at once.
2. **Inside a block** a keyed permutation of its positions says which are whose, and each source
   reads on in its own order: nothing is left out and nothing comes twice in a pass.
3. **Stages** have their own weights. A source reads on where it stood: a stage may end anywhere.
4. **Groups.** With `span` N, positions [g * N, (g + 1) * N) read N positions of one source that
   follow one another, and all of the above is about groups.

B is the power of two from 64 and from the square of the number of sources: then the largest source,
with B / n positions of a block at least, has some left after the others were rounded.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from emotrain.data.loader import keyed, permute
from emotrain.errors import UserError

LEAST_BLOCK = 64
BLOCKS_HELD = 8
"""Blocks that are kept for the next batch, which often lies in the same ones."""


@dataclass(frozen=True)
class Stage:
    """The weights of a part of the order."""

    start: int
    """Group that it begins with."""
    weights: tuple[Fraction, ...]
    """The share of each source; they sum to 1."""


class _Block(NamedTuple):
    before_X: np.ndarray
    """int64: what each source has read before the block."""
    source_Y: np.ndarray
    """int64: whose each of its groups is."""
    number_Y: np.ndarray
    """int64: which one of those that its source has in the block."""


class MixtureOrder:
    """The order of a mixture; see the top of this file. Nothing changes in it but a small cache:
    all methods may be called from several threads.

    Args:
        names: of the sources; each has its own random numbers, whatever the others are.
        stages: the first begins with group 0; the last one has no end.
        seed: of the run.
        span: positions of a group.
    Raises:
        UserError: stages that do not begin at 0 or do not rise, or weights that are no shares.
    """

    def __init__(self, names: Sequence[str], stages: Sequence[Stage], seed: int, span: int = 1):
        starts = [stage.start for stage in stages]
        if not names or span < 1 or starts[:1] != [0] or sorted(set(starts)) != starts:
            raise UserError(
                f"a mixture of {len(names)} sources in groups of {span}, with stages that begin at "
                f"groups {starts}: give a source, a group of a position or more, and stages that "
                f"begin at 0 and rise"
            )
        for stage in stages:
            if (
                len(stage.weights) != len(names)
                or min(stage.weights) < 0
                or sum(stage.weights) != 1
            ):
                raise UserError(
                    f"weights {', '.join(map(str, stage.weights))} of {len(names)} sources: give "
                    f"each one that is not negative; they sum to 1"
                )
        self.names, self.stages, self.seed, self.span = tuple(names), tuple(stages), seed, span
        self._phases = [Fraction(source_seed(seed, f"{name} phase"), 2**63) for name in names]
        self._key = source_seed(seed, "blocks of the mixture")
        self._block = lru_cache(BLOCKS_HELD)(self._make_block)
        self._starts = np.array(starts, dtype=np.int64)
        self._sizes = np.array([block_size(stage.weights) for stage in stages], dtype=np.int64)
        self._bases: list[list[int]] = [[0] * len(names)]
        """What each source has read before each stage."""
        for index, start in enumerate(starts[1:]):
            self._bases.append(self._read_before(index, start))

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and place in its own order of each position: int64 [B] each."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise UserError(
                f"position {positions.min()} is before the start; positions are at least 0"
            )
        groups_B, inside_B = np.divmod(positions, self.span)
        stage_B = np.searchsorted(self._starts, groups_B, side="right") - 1
        block_B, slot_B = np.divmod(groups_B - self._starts[stage_B], self._sizes[stage_B])
        first_B = groups_B - slot_B
        source_B, place_B = np.empty_like(groups_B), np.empty_like(groups_B)
        for first in np.unique(first_B):
            rows = np.flatnonzero(first_B == first)
            block = self._block(int(stage_B[rows[0]]), int(block_B[rows[0]]))
            source_B[rows] = block.source_Y[slot_B[rows]]
            place_B[rows] = block.before_X[source_B[rows]] + block.number_Y[slot_B[rows]]
        return source_B, place_B * self.span + inside_B

    def counts(self, position: int) -> list[int]:
        """How many of the positions before this one each source has; they sum to it."""
        group, inside = divmod(position, self.span)
        stage = bisect_right(self._starts.tolist(), group) - 1
        counts = [count * self.span for count in self._read_before(stage, group)]
        if inside:
            counts[int(self.locate([position])[0][0])] += inside
        return counts

    def _read_before(self, stage: int, group: int) -> list[int]:
        """Groups that each source has read before this one, which is in the stage or its end."""
        number, slot = divmod(group - self.stages[stage].start, int(self._sizes[stage]))
        block = self._block(stage, number)
        counts_X = np.bincount(block.source_Y[:slot], minlength=len(self.names))
        return (block.before_X + counts_X).tolist()

    def _make_block(self, stage: int, number: int) -> _Block:
        size, start = int(self._sizes[stage]), self.stages[stage].start
        before, after = (self._rounded(stage, (number + k) * size) for k in (0, 1))
        counts_X = np.array([b - a for a, b in zip(before, after, strict=True)])
        key = keyed(self._key, np.array([start + number * size]))
        places_Y = permute(np.arange(size), size, np.repeat(key, size))
        source_Y = np.searchsorted(np.cumsum(counts_X), places_Y, side="right")
        in_turn, number_Y = np.argsort(source_Y, kind="stable"), np.empty(size, dtype=np.int64)
        firsts_X = np.cumsum(counts_X) - counts_X
        number_Y[in_turn] = np.arange(size) - np.repeat(firsts_X, counts_X)
        return _Block(np.array(before, dtype=np.int64), source_Y, number_Y)

    def _rounded(self, stage: int, groups: int) -> list[int]:
        """What each source has read after so many groups of a stage, a multiple of its block."""
        weights, base = self.stages[stage].weights, self._bases[stage]
        read = [
            (weight * groups + phase).__floor__()
            for weight, phase in zip(weights, self._phases, strict=True)
        ]
        largest = weights.index(max(weights))
        read[largest] += groups - sum(read)
        return [a + b for a, b in zip(base, read, strict=True)]


def source_seed(seed: int, name: str) -> int:
    """A seed in [0, 2^63) for one source of a run: that of its own order."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def block_size(weights: Sequence[Fraction]) -> int:
    """Groups of a block: a power of two."""
    sources = sum(weight > 0 for weight in weights)
    return max(LEAST_BLOCK, 1 << (sources**2 - 1).bit_length())


def shares(amounts: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Amounts as parts of their sum."""
    total = sum(amounts)
    return tuple(amount / total for amount in amounts)
