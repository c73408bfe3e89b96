"""Proves what launches say of their own cost, in Triton's interpreter: a kernel reads the tensors
that its cost names and writes those that it names, and none else. (`test_kernels_compile.py` counts
their bytes and FLOPs by hand.)"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import triton_interpreter
from torch import Tensor

from emotrain.kernels.cost import Cost
from emotrain.kernels.permute import permute, unpermute
from emotrain.kernels.slots import SortedSlots, sort_slots
from emotrain.kernels.triton_grouped_mlp import grouped_mlp_triton
from emotrain.kernels.triton_launch import Launch, recording, tiles
from emotrain.kernels.triton_routing import decide_in_triton
from emotrain.kernels.tuning import GEMM_KERNELS, TileConfig

assert triton_interpreter.triton.knobs.runtime.interpret

SMALL = {name: TileConfig(32, 32, 32, warps=4, stages=1, group=2) for name in GEMM_KERNELS}
TOKENS, EXPERTS, CHOSEN, WIDTH, HIDDEN = 80, 5, 2, 40, 24


def present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None and tensor.numel()]


class Touches:
    """Runs each launch several times over changed arguments, and notes what it touched against what
    its cost says."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.wrong: list[str] = []

    def __call__(self, launch: Launch) -> None:
        by_place = {
            argument.data_ptr(): argument
            for argument in launch.arguments
            if isinstance(argument, Tensor) and argument.numel()
        }
        cost = launch.cost
        reads = {t.data_ptr() for t in present((*cost.reads, *cost.slot_reads))}
        writes = {t.data_ptr() for t in present((*cost.writes, *cost.slot_writes))}
        whole = {t.data_ptr() for t in present(cost.writes)}
        before = {place: tensor.clone() for place, tensor in by_place.items()}

        def run(**filled: tuple[set[int], int]) -> dict[int, Tensor]:
            """Arguments after a run in which those of some places were one number before it."""
            for place, tensor in by_place.items():
                tensor.copy_(before[place])
                for places, value in filled.values():
                    if place in places:
                        tensor.fill_(value)
            launch.kernel[launch.grid](*launch.arguments, **launch.options)
            return {place: tensor.clone() for place, tensor in by_place.items()}

        others = set(by_place) - reads
        first, second = run(others=(others, 77)), run(others=(others, 33))
        written = {}
        for place, tensor in first.items():
            start = torch.full_like(tensor, 77) if place in others else before[place]
            written[place] = ~same(tensor, start)
            if not same(tensor, second[place])[written[place]].all():
                self.wrong.append(f"{launch.name} reads what it does not say")
        changed = {place for place, where in written.items() if where.any()}
        if changed != writes or not all(written[place].all() for place in whole - reads):
            self.wrong.append(f"{launch.name} writes other tensors than it says")
        for place in reads & set(by_place):
            third = run(others=(others, 77), zeros=({place}, 0))
            if all(
                same(third[out], first[out])[written[out]].all() for out in writes if out != place
            ):
                self.wrong.append(f"{launch.name} does not read argument {place}")
        if not reads <= set(by_place) or not writes <= set(by_place):
            self.wrong.append(f"{launch.name} names what it is not given")
        run()
        self.seen.add(launch.name)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors hold the same; NaN is the same as NaN."""
    return (a == b) | ((a != a) & (b != b))


def experts(slots: SortedSlots) -> None:
    leaves = [
        torch.randn(TOKENS, WIDTH),
        torch.rand(TOKENS, CHOSEN) + 0.1,
        torch.randn(EXPERTS, 2 * HIDDEN, WIDTH),
        torch.randn(EXPERTS, HIDDEN, WIDTH),
    ]
    x_TD, weights_TK, *banks = (leaf.requires_grad_() for leaf in leaves)
    grouped_mlp_triton(x_TD, weights_TK, slots, *banks).square().sum().backward()
    with torch.no_grad():
        grouped_mlp_triton(x_TD, weights_TK, slots, *banks)


def rows(slots: SortedSlots) -> None:
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weights_TK = (torch.rand(TOKENS, CHOSEN) + 0.1).requires_grad_()
    for weights in (weights_TK, None):
        rows_RD = permute(x_TD, slots, "triton")
        unpermute(rows_RD, slots, TOKENS, weights, "triton").square().sum().backward()


def routing(_: SortedSlots) -> None:
    documents = 3
    # Tokens of a document lie apart, so that their order is one.
    document_T = torch.arange(TOKENS) * 7 % documents
    kept_GN = torch.ones(documents, EXPERTS, dtype=torch.bool)
    kept_GN[1, :2] = False
    valid_T = torch.arange(TOKENS) % 9 != 0
    sizes_G = torch.tensor([2, 3, 4])
    for sizes, kept, valid in (
        (sizes_G, None, None),
        (sizes_G, kept_GN, valid_T),
        (None, kept_GN, valid_T),
        (None, None, None),
    ):
        logits_TN = torch.randn(TOKENS, EXPERTS, requires_grad=True)
        decision = decide_in_triton(logits_TN, document_T, documents, CHOSEN, sizes, kept, valid)
        (
            decision.weights_TK.square().sum()
            + decision.probabilities_TN.square().sum()
            + decision.lse_T.square().sum()
        ).backward()


@pytest.mark.parametrize(
    ("work", "kernels"),
    [
        (experts, {"plan", "combine", *GEMM_KERNELS}),
        (rows, {"plan", "gather", "combine"}),
        (routing, {"score", "pool", "route", "route_backward"}),
    ],
)
def test_a_cost_names_what_the_kernel_touches(
    work: Callable[[SortedSlots], None], kernels: set[str]
) -> None:
    torch.manual_seed(0)
    experts_TK = torch.rand(TOKENS, EXPERTS).argsort(dim=1)[:, :CHOSEN]
    experts_TK[:5, 1] = EXPERTS  # a few empty slots
    counts_N = torch.bincount(experts_TK.flatten(), minlength=EXPERTS + 1)[:EXPERTS]
    touches = Touches()
    with tiles(SMALL), recording("sm_90", touches):
        work(sort_slots(experts_TK, counts_N))
    assert touches.wrong == [] and touches.seen == kernels


def test_rows_of_empty_slots_cost_nothing() -> None:
    """Of 10 slots 4 are in use: whole operands, and 4 rows of the others."""
    x_TD, a_RD, b_RJ, bank = (torch.empty(n, 4) for n in (6, 10, 10, 3))
    cost = Cost((bank, None), (), 10, (x_TD, a_RD), (b_RJ, None), slot_flops=7)
    assert (cost.bytes_read(4), cost.bytes_written(4), cost.flops(4)) == (48 + 4 * 32, 4 * 16, 28)
    assert cost.flops() == cost.flops(99) == 70
    assert Cost((), (), 0, (torch.empty(0, 4),)).bytes_read() == 0
