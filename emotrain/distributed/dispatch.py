"""Expert parallelism: tokens travel to the ranks that hold their experts and come back. Nothing is
dropped or padded.

A token goes once to each rank that holds at least one of its experts, with its routing weights and
which of that rank's experts it chose, and comes back as one weighted sum. With 7 of 127 experts
over 8 ranks that is 4.9 rows a token instead of 7.

    rows_OD     sorted by destination      --exchange-->   rows_ID       sorted by origin
    shared experts and statistics run                      grouped_mlp over this rank's experts
    y_TD  = sum of a token's rows          <--exchange--   sums_ID       one a row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from emotrain.kernels import Decision, SortedSlots, permute, sort_slots, unpermute
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
        experts_TK = decision.experts_TK
        if self._position_N is not None:
            experts_TK = self._position_N[experts_TK]
        with torch.no_grad():
            owner_TK = torch.where(
                experts_TK < self.num_experts,
                experts_TK // self.per_rank,
                self.num_ranks,
            )
            ranks_TW, send_W2 = self._destinations(owner_TK)
        send, received, num_local_slots = self.split_sizes(send_W2)
        slots = sort_slots(ranks_TW, send_W2[:, 0], sum(send))
        token_O, rank_O1 = (
            slots.token_R[: sum(send)],
            (slots.slot_R[: sum(send)] % self.num_ranks)[:, None],
        )
        mine_OK = owner_TK.index_select(0, token_O) == rank_O1
        local_OK = experts_TK.index_select(0, token_O) - rank_O1 * self.per_rank
        weights_OK = torch.where(mine_OK, decision.weights_TK.index_select(0, token_O), 0)

        there = _Exchange(self.group, send, received)
        choices_IK = there.start(
            torch.where(mine_OK, local_OK, self.per_rank).to(self._choice_dtype)
        )
        weights_IK, rows_ID = _Depart.apply(there, weights_OK, permute(x_TD, slots, self.backend))
        result = meanwhile()
        weights_IK, rows_ID = _Arrive.apply(there, weights_IK, rows_ID)
        sums_ID = experts(
            rows_ID, weights_IK, self._local_slots(choices_IK.long(), num_local_slots)
        )

        back = _Exchange(self.group, received, send)
        (sums_OD,) = _Arrive.apply(back, *_Depart.apply(back, sums_ID))
        return unpermute(sums_OD, slots, len(x_TD), backend=self.backend), result

    def split_sizes(self, send_W2: Tensor) -> tuple[list[int], list[int], int]:
        """Rows sent to and received from each rank, and the slots of this rank's experts that the
        latter bring. The one place of the forward pass where numbers reach the host.

        Args:
            send_W2: rows and slots for each rank.
        """
        received_W2 = torch.empty_like(send_W2)
        dist.all_to_all_single(received_W2, send_W2, group=self.group)
        sizes_3W = torch.stack([send_W2[:, 0], received_W2[:, 0], received_W2[:, 1]])
        sent, received, slots = sizes_3W.tolist()
        return sent, received, sum(slots)

    def _destinations(self, owner_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The ranks that each token goes to, [T, W] with W where it does not go; rows and slots
        for each rank, [W, 2]."""
        ranks_W = torch.arange(self.num_ranks, device=owner_TK.device)
        slots_TW = owner_TK.new_zeros(len(owner_TK), self.num_ranks + 1).scatter_add_(
            1, owner_TK, torch.ones_like(owner_TK)
        )[:, :-1]
        goes_TW = slots_TW > 0
        return torch.where(goes_TW, ranks_W, self.num_ranks), torch.stack(
            [goes_TW.sum(0), slots_TW.sum(0)], dim=1
        )

    @property
    def _choice_dtype(self) -> torch.dtype:
        return torch.uint8 if self.per_rank < 256 else torch.int32

    def _local_slots(self, choices_IK: Tensor, in_use: int) -> SortedSlots:
        """Slots of the rows that arrived, by this rank's experts; other ranks' choices are empty
        slots."""
        # per_rank marks a choice of another rank; the last ranks may hold fewer experts than that.
        choices_IK = choices_IK.clamp(max=self.num_local)
        counts = choices_IK.new_zeros(self.num_local + 1)
        counts.scatter_add_(0, choices_IK.reshape(-1), torch.ones_like(choices_IK.reshape(-1)))
        return sort_slots(choices_IK, counts[:-1], in_use)


class _Exchange:
    """Rows on their way between ranks: started in one place, waited for in another, in either
    direction."""

    def __init__(self, group: dist.ProcessGroup, send: list[int], received: list[int]):
        self.group, self.send, self.received = group, send, received
        self._under_way: list[tuple[Tensor, dist.Work]] = []

    def start(self, rows: Tensor, home: bool = False) -> Tensor:
        """Send rows; returns the buffer that is whole after `wait`. `home` sends what had
        arrived back to where it came from."""
        send, received = (self.received, self.send) if home else (self.send, self.received)
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            arriving, rows.contiguous(), received, send, group=self.group, async_op=True
        )
        self._under_way.append((arriving, work))
        return arriving

    def wait(self) -> list[Tensor]:
        """What has arrived, in the order it was sent."""
        arrived, self._under_way = self._under_way, []
        for _, work in arrived:
            work.wait()
        return [rows for rows, _ in arrived]


# The two halves of an exchange are two nodes of the graph, so that in backward too what lies
# between them runs while gradients travel: the engine takes ready nodes in reverse order of their
# making.


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, *tensors):
        ctx.exchange = exchange
        return tuple(exchange.start(rows) for rows in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *_grads):
        return None, *ctx.exchange.wait()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, *tensors):
        ctx.exchange = exchange
        exchange.wait()
        return tuple(rows.view_as(rows) for rows in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        for grad in grads:
            ctx.exchange.start(grad, home=True)
        # Of the right shape and of no further use: `_Depart` hands on what comes home.
        return None, *grads
