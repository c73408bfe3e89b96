"""Which experts each sequence of a step may use, one seat a sequence.

A seat has a subset (all experts, or those of a subset) and inside of it a pool: everything, or the
experts that the text so far gives the most routing probability. A pool is chosen when the prompt is
read, layer by layer, as in training, and chosen anew when `renew` is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emotrain.config import ModelConfig
from emotrain.model.router import select_pool
from emotrain.modular.select import allowed_experts


class Seats:
    """Masks and scores of every seat, for each layer [B, N]: B seats."""

    def __init__(self, config: ModelConfig, num_seats: int, device: torch.device | str = "cpu"):
        counts = [config.routed_in_layer(layer) for layer in range(config.num_layers)]

        def table() -> list[Tensor]:
            return [torch.zeros(num_seats, count, device=device) for count in counts]

        self.subset, self.pool, self.scores = table(), table(), table()
        """0 for experts that may be used, -inf for others: of the subset alone, and of the pool
        inside of it. Then the routing probabilities of the text so far, summed."""
        self._all = allowed_experts(config) if config.experts.exclusive else None
        """What a sequence of no exclusive domain may use, for each layer bool [N]; None for all."""
        self.restricted: set[int] = set()
        """Seats that may not use all experts."""
        self.sizes: dict[int, tuple[int, ...]] = {}
        """Seats with a pool, and its size in each layer."""
        self.choosing: set[int] = set()
        """Seats whose pool is chosen in the next step."""
        self._device = torch.device(device)
        self._fresh: list[tuple[Tensor, Tensor]] = []

    def take(
        self, seat: int, subset: Sequence[Tensor] | None, sizes: tuple[int, ...] | None
    ) -> None:
        """Give a seat to a sequence.

        Args:
            subset: for each layer bool [N], the experts that may be used; None for all but those
                that are exclusive to a domain.
            sizes: of the pool in each layer; None for no pool.
        """
        subset = self._all if subset is None else subset
        for layer, (own, pool, scores) in enumerate(
            zip(self.subset, self.pool, self.scores, strict=True)
        ):
            own[seat] = 0
            if subset is not None:
                own[seat].masked_fill_(~subset[layer].to(own.device), -torch.inf)
            pool[seat] = own[seat]
            scores[seat] = 0
        self.leave(seat)
        if subset is not None or sizes is not None:
            self.restricted.add(seat)
        if sizes is not None:
            self.sizes[seat] = sizes
            self.choosing.add(seat)

    def leave(self, seat: int) -> None:
        self.restricted.discard(seat)
        self.choosing.discard(seat)
        self.sizes.pop(seat, None)

    def renew(self, seat: int) -> float:
        """Choose a pool anew from the text so far; returns the share of its experts that are new,
        mean over layers with routed experts."""
        seats_X, switched = torch.tensor([seat], device=self._device), []
        for layer, pool in enumerate(self.pool):
            if pool.shape[1] == 0:
                continue
            before_N = pool[seat] == 0
            self._choose(layer, [seat], seats_X, self.scores[layer][seat][None])
            now_N = pool[seat] == 0
            switched.append((now_N & ~before_N).sum() / now_N.sum())
        # One wait for the device, and not one a layer.
        shares = torch.stack(switched).tolist() if switched else [0.0]
        return sum(shares) / len(shares)

    def kept(self, seat: int) -> list[list[int]]:
        """Numbers of the routed experts that the seat may use, a list a layer."""
        counts = [pool.shape[1] for pool in self.pool]
        may_use = torch.cat([pool[seat] for pool in self.pool]).cpu() == 0
        return [of_N.nonzero()[:, 0].tolist() for of_N in may_use.split(counts)]

    def pool_of(self, seat: int) -> list[tuple[Tensor, Tensor]] | None:
        """For each layer the pool of a seat and its scores, to be taken by others that have read
        the same; None where it has no pool."""
        if seat not in self.sizes:
            return None
        tables = zip(self.pool, self.scores, strict=True)
        return [(pool[seat].clone(), scores[seat].clone()) for pool, scores in tables]

    def take_pool(self, seat: int, known: list[tuple[Tensor, Tensor]]) -> None:
        """Give a seat the pool that another one had, `pool_of`."""
        for pool, scores, of_layer in zip(self.pool, self.scores, known, strict=True):
            pool[seat], scores[seat] = of_layer
        self.choosing.discard(seat)

    def restrict(self, layer: int, logits_TN: Tensor, step: StepSeats) -> Tensor:
        """Router logits with -inf at experts that a token's sequence may not use; scores of
        sequences with a pool grow."""
        if step.scored_X is not None:
            self.score(layer, logits_TN, step)
        if not step.restricted:
            return logits_TN
        return logits_TN + self.pool[layer][step.seats_T]

    def score(self, layer: int, logits_TN: Tensor, step: StepSeats) -> None:
        """Add the routing probabilities of tokens whose sequence has a pool, before the pool, and
        choose pools that are due."""
        assert step.scored_X is not None
        scored_X = step.seats_T[step.scored_X]
        free_XN = torch.softmax(logits_TN[step.scored_X] + self.subset[layer][scored_X], dim=1)
        fresh = torch.zeros_like(self.scores[layer]).index_add_(0, scored_X, free_XN)
        self._fresh.append((self.scores[layer], fresh))
        if step.choosing_X is not None:
            self._choose(layer, step.choosing, step.choosing_X, fresh[step.choosing_X])

    def _choose(self, layer: int, seats: Sequence[int], seats_X: Tensor, scores_XN: Tensor) -> None:
        """`seats_X`: the same numbers, on the device."""
        size_X = scores_XN.new_tensor(
            [self.sizes[seat][layer] for seat in seats], dtype=torch.int64
        )
        chosen_XN = select_pool(scores_XN, size_X)
        subset_XN = self.subset[layer][seats_X]
        self.pool[layer][seats_X] = subset_XN.masked_fill(~chosen_XN, -torch.inf)

    def step(self, seats: Sequence[int], counts: Sequence[int], seats_T: Tensor) -> StepSeats:
        """What a step needs to know, of sequences at these seats with so many new tokens each."""
        self._fresh.clear()
        if not self.restricted.intersection(seats):
            return StepSeats(seats_T, False, None, None)
        scored_X, choosing_X, chosen = None, None, []
        if self.sizes.keys() & set(seats):
            has_pool = torch.tensor([seat in self.sizes for seat in seats])
            scored_T = has_pool.repeat_interleave(torch.tensor(counts))
            scored_X = scored_T.nonzero()[:, 0].to(seats_T.device)
            if chosen := [seat for seat in seats if seat in self.choosing]:
                choosing_X = torch.tensor(chosen, device=seats_T.device)
        return StepSeats(seats_T, True, scored_X, choosing_X, tuple(chosen))

    def commit(self, seats: Sequence[int]) -> None:
        """The step has run: its scores count. A step that failed leaves the old ones."""
        for scores, fresh in self._fresh:
            scores += fresh
        self._fresh.clear()
        self.choosing.difference_update(seats)


@dataclass(frozen=True)
class StepSeats:
    """The seats of a step's tokens."""

    seats_T: Tensor
    """int64."""
    restricted: bool
    """Whether any of them may not use all experts."""
    scored_X: Tensor | None
    """int64: the tokens whose sequence has a pool; None where none has."""
    choosing_X: Tensor | None
    """int64: the seats whose pool this step chooses."""
    choosing: tuple[int, ...] = ()
    """The same, where the host can read them."""
