"""Proves what launches say of their own cost, in Triton's interpreter: a kernel reads the tensors
that its cost names and writes those that it names, and none else. (`test_kernels_compile.py` counts
their bytes and FLOPs by hand.)"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import triton_interpreter
from torch import Tensor

from emotrain.kernels import parcels
from emotrain.kernels.cost import Cost
from emotrain.kernels.linear_cross_entropy import linear_cross_entropy
from emotrain.kernels.permute import permute, unpermute
from emotrain.kernels.rowwise import rms_norm, rotate_heads, swiglu_down
from emotrain.kernels.slots import SortedSlots, sort_slots
from emotrain.kernels.triton_grouped_mlp import grouped_mlp_triton
from emotrain.kernels.triton_launch import Launch, recording, tiles
from emotrain.kernels.triton_routing import decide_in_triton
from emotrain.kernels.tuning import GEMM_KERNELS, TileConfig

assert triton_interpreter.triton.knobs.runtime.interpret

SMALL = {name: TileConfig(64, 64, 64, warps=4, stages=1, group=2) for name in GEMM_KERNELS}
TOKENS, EXPERTS, CHOSEN, WIDTH, HIDDEN = 80, 5, 2, 40, 24
ROWWISE_KERNELS = {
    "norm", "norm_backward", "rotate", "rotate_back", "swiglu", "swiglu_backward",
}  # fmt: skip


def present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None and tensor.numel()]


class Touches:
    """Runs each launch on copies of its arguments, several times with some of them changed, and
    notes where it touches other tensors than its cost says."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.wrong: list[str] = []

    def __call__(self, launch: Launch) -> None:
        given = {
            argument.data_ptr(): argument
            for argument in launch.arguments
            if isinstance(argument, Tensor) and argument.numel()
        }
        cost = launch.cost
        reads = {t.data_ptr() for t in present((*cost.reads, *cost.slot_reads))}
        writes = {t.data_ptr() for t in present((*cost.writes, *cost.slot_writes))}
        assert reads | writes <= set(given), f"{launch.name} names what it is not given"
        others = set(given) - reads

        def run(before: dict[int, Tensor]) -> dict[int, Tensor]:
            after = {place: as_it_lies(tensor, tensor) for place, tensor in before.items()}
            arguments = [
                after.get(argument.data_ptr(), argument)
                if isinstance(argument, Tensor)
                else argument
                for argument in launch.arguments
            ]
            launch.kernel[launch.grid](*arguments, **launch.options)
            return after

        def with_others(number: int) -> dict[int, Tensor]:
            """The arguments, those that are not read filled with a number that is no result."""
            fill = torch.tensor(number)
            return {
                place: as_it_lies(tensor, fill.to(tensor.dtype)) if place in others else tensor
                for place, tensor in given.items()
            }

        before = with_others(-3)
        first, second = run(before), run(with_others(-5))
        written = {place: ~same(first[place], before[place]) for place in given}
        if {place for place in given if written[place].any()} != writes:
            self.wrong.append(f"{launch.name} writes other tensors than it says")
        if not all(same(first[out], second[out])[written[out]].all() for out in writes):
            self.wrong.append(f"{launch.name} reads more than it says")
        for place in reads:
            changed = torch.tensor(0 if given[place].any() else 1).to(given[place].dtype)
            third = run(before | {place: as_it_lies(given[place], changed)})
            if all(same(first[out], third[out])[written[out]].all() for out in writes):
                self.wrong.append(f"{launch.name} does not read {tuple(given[place].shape)}")
        launch.kernel[launch.grid](*launch.arguments, **launch.options)
        self.seen.add(launch.name)


def as_it_lies(tensor: Tensor, values: Tensor) -> Tensor:
    """These values in memory of the same strides."""
    memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return memory.copy_(values)


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


def sorting(slots: SortedSlots) -> None:
    experts_R = torch.full((TOKENS * CHOSEN,), EXPERTS)
    experts_R[slots.slot_R[: slots.ends_N[-1]]] = torch.repeat_interleave(
        torch.arange(EXPERTS), slots.ends_N.diff(prepend=torch.zeros(1, dtype=torch.int64))
    )
    sort_slots(experts_R.view(TOKENS, CHOSEN), EXPERTS, backend="triton")


def travel(_: SortedSlots) -> None:
    spread = parcels.Spread(EXPERTS, 2, 3)
    experts_TK = torch.rand(TOKENS, EXPERTS).argsort(dim=1)[:, :CHOSEN]
    experts_TK[:5] = EXPERTS
    x_TD, weights_TK = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, CHOSEN) + 0.1
    layout = parcels.ParcelLayout.of(x_TD, weights_TK, spread.per_rank)
    position_TW, send_W2 = parcels.destinations(experts_TK, spread, "triton")
    sent = int(send_W2[:, 0].sum())
    parcels_OB = parcels.pack(
        x_TD, weights_TK, experts_TK, position_TW, sent, layout, spread, "triton"
    )
    parcels.combine(layout.rows(parcels_OB), position_TW, "triton")
    parcels.spread_rows(x_TD, position_TW, sent, "triton")
    parcels.unpack_gradients(parcels_OB, experts_TK, position_TW, layout, spread, "triton")


def routing(_: SortedSlots) -> None:
    documents = 3
    document_T = torch.arange(TOKENS) * documents // TOKENS
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


def rowwise(_: SortedSlots) -> None:
    x_TD, weight_D = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.rand(WIDTH)
    rms_norm(x_TD, weight_D.requires_grad_(), 1e-5, "triton").square().sum().backward()
    qkv_BSF = torch.randn(2, TOKENS // 2, 4 * 8, requires_grad=True)
    angle = torch.rand(TOKENS // 2, 4)
    parts = rotate_heads(qkv_BSF + 0, angle.cos(), angle.sin(), 2, 1, "triton")
    torch.cat(parts, dim=2).square().sum().backward()
    hidden_TF = torch.randn(TOKENS, 2 * HIDDEN, requires_grad=True)
    swiglu_down(hidden_TF, torch.randn(HIDDEN, WIDTH), "triton").square().sum().backward()


def head(_: SortedSlots) -> None:
    hidden_TD, head_VD = torch.randn(TOKENS, WIDTH), torch.randn(HIDDEN, WIDTH)
    targets_T = torch.arange(TOKENS) % HIDDEN
    targets_T[::3] = -100
    for leaf_VD in (head_VD, head_VD.requires_grad_()):
        linear_cross_entropy(hidden_TD, leaf_VD, targets_T, 0.1, "triton")


@pytest.mark.parametrize(
    ("work", "kernels"),
    [
        (head, {"cross_entropy"}),
        (experts, {"plan", "combine", *GEMM_KERNELS}),
        (sorting, {"count", "place"}),
        (travel, {"destination", "pack", "combine", "pick_weights"}),
        (rows, {"plan", "gather", "combine"}),
        (routing, {"score", "pool", "route", "route_backward"}),
        (rowwise, ROWWISE_KERNELS),
    ],
)
def test_a_cost_names_what_the_kernel_touches(
    work: Callable[[SortedSlots], None], kernels: set[str]
) -> None:
    torch.manual_seed(0)
    experts_TK = torch.rand(TOKENS, EXPERTS).argsort(dim=1)[:, :CHOSEN]
    experts_TK[:5, 1] = EXPERTS  # a few empty slots
    touches = Touches()
    with tiles(SMALL), recording("sm_90", touches):
        work(sort_slots(experts_TK, EXPERTS))
    assert touches.wrong == [] and touches.seen == kernels


def test_rows_of_empty_slots_cost_nothing() -> None:
    """Of 10 slots 4 are in use: whole operands, and 4 rows of the others."""
    x_TD, a_RD, b_RJ, bank = (torch.empty(n, 4) for n in (6, 10, 10, 3))
    cost = Cost((bank, None), (), 10, (x_TD, a_RD), (b_RJ, None), slot_flops=7)
    assert (cost.bytes_read(4), cost.bytes_written(4), cost.flops(4)) == (48 + 4 * 32, 4 * 16, 28)
    assert cost.flops() == cost.flops(99) == 70
    assert Cost((), (), 0, (torch.empty(0, 4),)).bytes_read() == 0
