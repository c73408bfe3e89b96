"""Proves the exchange of tokens between ranks: the same sums and gradients as with all experts on
one rank, a token once to each rank that holds one of its experts, and work that overlaps the
exchange in both directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_config

from emotrain.distributed.dispatch import AllToAllDispatcher
from emotrain.distributed.ranks import Ranks
from emotrain.kernels import Decision
from emotrain.model.moe import LocalDispatcher, RoutedExperts
from tests.processes import run_ranks

WIDTH, HIDDEN = 16, 8


def bank(num_experts: int) -> RoutedExperts:
    """All experts of a layer, the same in every process, in fp64."""
    experts = RoutedExperts(
        tiny_config(
            model__experts__routed=num_experts,
            model__experts__top_k=1,
            model__router__pool__max=num_experts,
            model__router__pool__min=1,
        ).model,
        layer=0,
    ).double()
    generator = torch.Generator().manual_seed(7)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3, generator=generator)
    return experts


def part_of(experts: RoutedExperts, rank: int, world_size: int) -> RoutedExperts:
    """The experts of one rank, as torch.chunk deals them."""
    part = bank(experts.gate_up_NFD.shape[0])
    for name, parameter in experts.named_parameters():
        setattr(part, name, torch.nn.Parameter(parameter.detach().chunk(world_size)[rank].clone()))
    return part


CHOICES = {
    "random": lambda rank, n: torch.rand(12, n).argsort(dim=1)[:, :3],
    "empty slots": lambda rank, n: torch.where(
        torch.rand(12, 3) < 0.5, n, torch.rand(12, n).argsort(dim=1)[:, :3]
    ),
    "all to the last expert": lambda rank, n: torch.tensor([[n - 1, n, n]] * 5),
    "all to the first rank": lambda rank, n: torch.tensor([[0, 1, n]] * 5),
    "one rank has no token": lambda rank, n: torch.rand(0 if rank == 1 else 9, n).argsort(dim=1)[
        :, :3
    ],
    "nothing is routed": lambda rank, n: torch.full((4, 3), n),
}


def routing_of(choices: str, rank: int, num_experts: int) -> Decision:
    torch.manual_seed(rank)
    experts_TK = CHOICES[choices](rank, num_experts)
    weights_TK = torch.where(
        experts_TK < num_experts, torch.rand(experts_TK.shape, dtype=torch.float64), 0
    )
    counts_N = torch.bincount(experts_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]
    return Decision(None, weights_TK.requires_grad_(), experts_TK, None, counts_N, None, None)


def _same_as_local(ranks: Ranks, choices: str, num_experts: int) -> None:
    rank, world_size = ranks.rank, ranks.world_size
    whole = bank(num_experts)
    part = part_of(whole, rank, world_size)
    routing = routing_of(choices, rank, num_experts)
    x_TD = torch.randn(len(routing.experts_TK), WIDTH, dtype=torch.float64, requires_grad=True)
    cotangent_TD = torch.randn_like(x_TD)
    leaves = (x_TD, routing.weights_TK)
    got_TD, answer = AllToAllDispatcher(dist.group.WORLD, num_experts)(
        x_TD, routing, part, lambda: "done"
    )
    assert answer == "done"
    got = torch.autograd.grad(got_TD, (*leaves, *part.parameters()), cotangent_TD)
    wanted_TD, _ = LocalDispatcher()(x_TD, routing, whole, lambda: None)
    wanted = torch.autograd.grad(wanted_TD, (*leaves, *whole.parameters()), cotangent_TD)
    torch.testing.assert_close(got_TD, wanted_TD, rtol=1e-12, atol=1e-13)
    for mine, local in zip(got[:2], wanted[:2], strict=True):
        torch.testing.assert_close(mine, local, rtol=1e-12, atol=1e-13)
    # This rank's experts get the gradients of all ranks' tokens.
    for mine, local in zip(got[2:], wanted[2:], strict=True):
        local = local.clone()
        dist.all_reduce(local)
        torch.testing.assert_close(mine, local.chunk(world_size)[rank], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize(("world_size", "num_experts"), [(2, 8), (2, 7), (4, 7)])
def test_sums_and_gradients_are_those_of_one_rank(
    world_size: int, num_experts: int, choices: str
) -> None:
    run_ranks(_same_as_local, world_size, choices, num_experts)


def _kernels_agree(ranks: Ranks) -> None:
    """In float32, the one precision that kernels and twins share; to the bit where no sum is
    taken in another order."""
    part = part_of(bank(7), ranks.rank, ranks.world_size).float()
    results = []
    for backend in ("torch", "triton"):
        part.backend = backend
        routing = routing_of("empty slots", ranks.rank, 7)
        weights_TK = routing.weights_TK.detach().float().requires_grad_()
        routing = replace(routing, weights_TK=weights_TK)
        x_TD = torch.randn(12, WIDTH, requires_grad=True)
        y_TD, _ = AllToAllDispatcher(dist.group.WORLD, 7, backend)(
            x_TD, routing, part, lambda: None
        )
        leaves = (x_TD, weights_TK, *part.parameters())
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_kernels_exchange_what_their_twins_do() -> None:
    run_ranks(_kernels_agree, 2)


def _once_to_each_rank(ranks: Ranks) -> None:
    """Experts 0 and 1 are rank 0's, 2 and 3 rank 1's."""
    routing = Decision(
        None,
        torch.full((4, 2), 0.5, dtype=torch.float64),
        torch.tensor([[0, 1], [0, 2], [3, 2], [4, 4]]),
        None,
        torch.tensor([2, 1, 2, 1]),
        None,
        None,
    )
    sizes = []

    class Watched(AllToAllDispatcher):
        def split_sizes(self, send_W2):
            sizes.append(super().split_sizes(send_W2))
            return sizes[-1]

    Watched(dist.group.WORLD, 4)(
        torch.randn(4, WIDTH, dtype=torch.float64),
        routing,
        part_of(bank(4), ranks.rank, 2),
        lambda: None,
    )
    # Two of four tokens have an expert on each rank: three slots on either, from each of two ranks.
    assert sizes == [([2, 2], [2, 2], 6)]


def test_a_token_goes_once_to_each_rank_that_holds_one_of_its_experts() -> None:
    run_ranks(_once_to_each_rank, 2)


class _Noted(torch.autograd.Function):
    """Notes when it passes, forward and backward."""

    @staticmethod
    def forward(ctx, x, events):
        events.append("meanwhile")
        ctx.events = events
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append("meanwhile")
        return grad, None


def _overlaps(ranks: Ranks) -> None:
    events: list[str] = []
    original = dist.all_to_all_single

    class Work:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("wait")
            self.work.wait()

    def noted(*args, async_op=False, **options):
        work = original(*args, async_op=async_op, **options)
        if async_op:
            events.append("start")
            return Work(work)
        return work

    dist.all_to_all_single = noted
    routing, experts = routing_of("random", ranks.rank, 8), part_of(bank(8), ranks.rank, 2)
    x_TD = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    y_TD, shared_TD = AllToAllDispatcher(dist.group.WORLD, 8)(
        x_TD, routing, experts, lambda: _Noted.apply(x_TD, events)
    )
    there, back = ["start", "meanwhile", "wait"], ["start", "wait"]
    assert events == [*there, *back]
    events.clear()
    (y_TD + shared_TD).sum().backward()
    assert events == [*back, *there]


def test_what_needs_no_token_runs_while_tokens_and_gradients_travel() -> None:
    run_ranks(_overlaps, 2)
