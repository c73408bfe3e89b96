"""Which rank holds which routed expert, in training.

Everything but the exchange of tokens speaks of an expert by its number: router, counts, losses,
statistics, checkpoints. A bank has N positions, of which rank 0 holds the first ceil(N / W), rank 1
the next, and its order says which expert is at each. Without a placement, that is the expert of the
same number.

    order     (4, 1, 5, 0, 2, 3)         rank 0 holds experts 4, 1, 5 and rank 1 experts 0, 2, 3

A model is built, and checkpoints are read and written, by number; `place_experts` takes the rows of
its banks, and their optimizer state, from one order to another. What is computed stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from emotrain.distributed.dispatch import AllToAllDispatcher
from emotrain.distributed.mesh import Holders
from emotrain.distributed.ranks import local_part
from emotrain.model.moe import RoutedExperts
from emotrain.model.transformer import Transformer

Order = tuple[int, ...]
"""The experts of rank 0, then those of rank 1, …"""


def dispatchers(model: Transformer) -> list[tuple[AllToAllDispatcher, RoutedExperts]]:
    """Of each layer whose experts are spread over ranks: what takes its tokens to them, and its
    bank."""
    return [
        (block.moe.dispatcher, block.moe.experts)
        for block in model.blocks
        if isinstance(block.moe.dispatcher, AllToAllDispatcher) and block.moe.experts is not None
    ]


def orders_of(model: Transformer) -> tuple[Order, ...]:
    """The order of each layer with experts that are spread over ranks."""
    return tuple(dispatcher.order for dispatcher, _ in dispatchers(model))


@torch.no_grad()
def place_experts(
    model: Transformer,
    orders: Sequence[Order],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Move every routed expert to the position that an order says, and its optimizer state with
    it. All ranks call this alike, between steps.

    Args:
        orders: one a layer with routed experts, the same for layers of one bank; none means by
            number.
    """
    moved = set()
    layers = dispatchers(model)
    for (dispatcher, experts), order in zip(
        layers, orders or [tuple(range(d.num_experts)) for d, _ in layers], strict=True
    ):
        # Under DeepSpeed, which never moves experts, nobody knows the holders.
        if experts not in moved and dispatcher.order != tuple(order):
            assert dispatcher.holders is not None
            move = _Move(dispatcher.holders, dispatcher.order, order)
            for parameter in experts.parameters():
                state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
                for tensor in (parameter, *state.values()):
                    # AdamW's count of updates has no rows.
                    if tensor.ndim:
                        move(local_part(tensor))
            moved.add(experts)
        dispatcher.place(order, local_part(experts.gate_up_NFD).device)


@contextmanager
def by_number(model: Transformer, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block experts lie by number, as checkpoints know them. Not left in order where the
    block raises: other ranks may never come."""
    orders = orders_of(model)
    place_experts(model, (), optimizer)
    yield
    place_experts(model, orders, optimizer)


class _Move:
    """Takes the rows of tensors that are spread over processes from one order to another."""

    def __init__(self, holders: Holders, before: Order, after: Order):
        self.group, rank_N = holders.group, holders.rank_N
        rank, position = self.group.rank(), {expert: at for at, expert in enumerate(before)}
        first = rank_N.index(rank) if rank in rank_N else 0
        # (from, to) of each row that moves, in the same sequence on every rank.
        moves = [(position[expert], to) for to, expert in enumerate(after)]
        moves = [(here, there) for here, there in moves if here != there]
        ranks = range(self.group.size())
        leave = [[h for h, t in moves if (rank_N[h], rank_N[t]) == (rank, w)] for w in ranks]
        enter = [[t for h, t in moves if (rank_N[h], rank_N[t]) == (w, rank)] for w in ranks]
        self.sent, self.received = [len(rows) for rows in leave], [len(rows) for rows in enter]
        self.leave = torch.tensor(sum(leave, []), dtype=torch.int64) - first
        self.enter = torch.tensor(sum(enter, []), dtype=torch.int64) - first
        self.moves = bool(moves)

    def __call__(self, rows: Tensor) -> None:
        """In place, on this rank's rows."""
        if not self.moves:
            return
        leaving = rows.index_select(0, self.leave.to(rows.device))
        entering = rows.new_empty(len(self.enter), *rows.shape[1:])
        dist.all_to_all_single(entering, leaving, self.received, self.sent, group=self.group)
        rows.index_copy_(0, self.enter.to(rows.device), entering)
