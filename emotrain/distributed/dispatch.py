"""Expert parallelism: tokens travel to the ranks that hold their experts and come back. Nothing is
dropped or padded.

A token goes once to each rank that holds at least one of its experts, in one parcel with its
routing weights and which of that rank's experts it chose, and comes back as one weighted sum. With
7 of 127 experts over 8 ranks that is 4.9 rows a token instead of 7.

    parcels_OB  sorted by destination      --exchange-->   parcels_IB    sorted by origin
    shared experts and statistics run                      grouped_mlp over this rank's experts
    y_TD  = sum of a token's rows          <--exchange--   sums_ID       one a row

The ranks exchange sizes before. Backward has the same two exchanges: of the gradients of sums, then
of parcels with the gradients of rows and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from emotrain.distributed.mesh import Holders
from emotrain.kernels import Decision, sort_slots
from emotrain.kernels.backends import choose_backend
from emotrain.kernels.parcels import (
    ParcelLayout,
    Spread,
    combine,
    destinations,
    pack,
    spread_rows,
    unpack_gradients,
)
from emotrain.model.moe import RoutedExperts

Result = TypeVar("Result")


class AllToAllDispatcher:
    """Takes each token to its experts where the N experts of the layer are spread over W ranks,
    ceil(N / W) a rank and fewer on the last, by number or in the order of a placement."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int, backend: str = "auto"):
        self.group, self.backend = group, backend
        self.num_ranks, self.num_experts = group.size(), num_experts
        self.per_rank = -(-num_experts // self.num_ranks)
        self.num_local = min(self.per_rank, num_experts - group.rank() * self.per_rank)
        self.order = tuple(range(num_experts))
        """The experts of rank 0, then those of rank 1, …; see distributed/placement.py."""
        self.holders: Holders | None = None
        """Where the rows of the bank lie, for a change of their order."""
        self._position_N: Tensor | None = None

    def place(self, order: Sequence[int], device: torch.device) -> None:
        """From now on experts lie in this order, a permutation of their numbers."""
        self.order = tuple(order)
        self._position_N = None
        if self.order != tuple(range(self.num_experts)):
            # One more, for empty slots, which stay as they are.
            position_N = torch.tensor([*self.order, self.num_experts]).argsort()
            self._position_N = position_N.to(device)

    @torch.compiler.disable
    def __call__(
        self,
        x_TD: Tensor,
        decision: Decision,
        experts: RoutedExperts,
        meanwhile: Callable[[], Result],
    ) -> tuple[Tensor, Result]:
        """As `LocalDispatcher`: weighted sum of the routed experts of each token [T, D], and the
        result of `meanwhile`, which runs while tokens travel."""
        experts_TK, weights_TK = decision.experts_TK, decision.weights_TK
        if self._position_N is not None:
            experts_TK = self._position_N[experts_TK]
        backend = choose_backend(self.backend, x_TD, self.num_experts)
        spread = Spread(self.num_experts, self.num_ranks, self.per_rank)
        position_TW, send_W2 = destinations(experts_TK, spread, backend)
        send, received, num_local_slots = self.split_sizes(send_W2)
        layout = ParcelLayout.of(x_TD, weights_TK, self.per_rank)
        trip = _Trip(self.group, send, received, layout, spread, backend)
        rows_ID, weights_IK, choices_IK = _Depart.apply(
            trip, x_TD, weights_TK, experts_TK, position_TW
        )
        result = meanwhile()
        rows_ID, weights_IK = _Arrive.apply(trip, rows_ID, weights_IK)
        slots = sort_slots(choices_IK, self.num_local, num_local_slots, backend)
        sums_ID = experts(rows_ID, weights_IK, slots)
        return _ComeHome.apply(trip, sums_ID, position_TW), result

    def split_sizes(self, send_W2: Tensor) -> tuple[list[int], list[int], int]:
        """Rows sent to and received from each rank, and the slots of this rank's experts that the
        latter bring. The one place of the forward pass where numbers reach the host.

        Args:
            send_W2: rows and slots for each rank.
        """
        received_W2 = torch.empty_like(send_W2)
        dist.all_to_all_single(received_W2, send_W2, group=self.group)
        sizes = torch.cat([send_W2, received_W2]).reshape(-1).tolist()
        rows, slots = sizes[::2], sizes[1::2]
        return rows[: self.num_ranks], rows[self.num_ranks :], sum(slots[self.num_ranks :])


class _Trip:
    """Rows on their way between ranks: started in one place, waited for in another, in either
    direction."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: list[int],
        received: list[int],
        layout: ParcelLayout,
        spread: Spread,
        backend: str,
    ):
        self.group, self.send, self.received = group, send, received
        self.layout, self.spread, self.backend = layout, spread, backend
        self._under_way: tuple[Tensor, dist.Work] | None = None

    @property
    def num_sent(self) -> int:
        return sum(self.send)

    def start(self, rows: Tensor, home: bool = False) -> Tensor:
        """Send rows; returns the buffer that is whole after `wait`. `home` sends what had
        arrived back to where it came from."""
        send, received = (self.received, self.send) if home else (self.send, self.received)
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            arriving, rows.contiguous(), received, send, group=self.group, async_op=True
        )
        self._under_way = arriving, work
        return arriving

    def wait(self) -> Tensor:
        """What has arrived."""
        assert self._under_way is not None, "nothing is on its way"
        (arrived, work), self._under_way = self._under_way, None
        work.wait()
        return arrived


# The two halves of the exchange of parcels are two nodes of the graph, so that in backward too what
# lies between them runs while gradients travel: the engine takes ready nodes in reverse order of
# their making.


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trip, x_TD, weights_TK, experts_TK, position_TW):
        parcels_OB = pack(
            x_TD,
            weights_TK,
            experts_TK,
            position_TW,
            trip.num_sent,
            trip.layout,
            trip.spread,
            trip.backend,
        )
        arriving_IB, layout = trip.start(parcels_OB), trip.layout
        choices_IK = layout.choices(arriving_IB)
        ctx.trip = trip
        ctx.save_for_backward(experts_TK, position_TW)
        ctx.mark_non_differentiable(choices_IK)
        ctx.set_materialize_grads(False)
        return layout.rows(arriving_IB), layout.weights(arriving_IB), choices_IK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *_grads):
        trip, (experts_TK, position_TW) = ctx.trip, ctx.saved_tensors
        grad_x_TD, grad_weights_TK = unpack_gradients(
            trip.wait(),
            experts_TK,
            position_TW,
            trip.layout.of_gradients,
            trip.spread,
            trip.backend,
        )
        return None, grad_x_TD, grad_weights_TK, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trip, rows_ID, weights_IK):
        ctx.trip = trip
        trip.wait()
        return rows_ID.view_as(rows_ID), weights_IK.view_as(weights_IK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_ID, grad_weights_IK):
        layout = ctx.trip.layout.of_gradients
        parcels_IB = layout.empty(grad_ID, len(grad_ID))
        rows_ID, weights_IK = layout.rows(parcels_IB), layout.weights(parcels_IB)
        rows_ID.copy_(grad_ID)
        weights_IK.copy_(grad_weights_IK)
        ctx.trip.start(parcels_IB, home=True)
        # Of the right shape and of no further use: `_Depart` hands on what comes home.
        return None, rows_ID, weights_IK


class _ComeHome(torch.autograd.Function):
    """Sums go back to the ranks of their tokens, and become one row a token there."""

    @staticmethod
    def forward(ctx, trip, sums_ID, position_TW):
        ctx.trip = trip
        ctx.save_for_backward(position_TW)
        trip.start(sums_ID, home=True)
        return combine(trip.wait(), position_TW, trip.backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        trip, (position_TW,) = ctx.trip, ctx.saved_tensors
        trip.start(spread_rows(grad_TD, position_TW, trip.num_sent, trip.backend))
        return None, trip.wait(), None
