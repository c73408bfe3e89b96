"""How near the routed experts come to the machine's matmul rate, forward + backward, and what else
they could be computed with.

    python benchmarks/experts.py [--shape quickstart] [--shape large] [--json] [--threads 2]

For each shape (tokens, width D, hidden width H, experts N, experts a token K), with balanced random
routing in float32:

    fraction_of_matmul_peak   useful FLOPs a second over those of a dense 2048 x 2048 x 2048 matmul
                              timed in the same rounds. Useful: 3 GEMMs of D x H a slot, three times
                              over (forward, and two as large in backward)
    gemm_only_fraction        the same share for those GEMMs alone, through torch.mm into buffers
                              that are there: what no path on torch's GEMM can exceed
    speedup_over_torch        time of backend=torch, the readable twin, over ours (backend=auto:
                              compiled where g++ is installed)
    speedup_over_grouped_mm   the same through torch's grouped GEMM and autograd
    speedup_over_loop         the same by a loop over experts and autograd, each expert's weights
                              taken by `unbind`

All of them start from the sorted slots, and end with gradients of tokens, routing weights and
expert weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _measure import arguments, report, time_in_turn
from torch import Tensor
from torch.nn import functional as F

from emotrain.kernels import SortedSlots, grouped_mlp, sort_slots

SHAPES = {
    "quickstart": {"tokens": 8192, "width": 128, "hidden": 128, "experts": 31, "chosen": 3},
    "modularity": {"tokens": 8192, "width": 192, "hidden": 64, "experts": 63, "chosen": 3},
    "large": {"tokens": 8192, "width": 512, "hidden": 256, "experts": 64, "chosen": 7},
    "tiny": {"tokens": 64, "width": 16, "hidden": 16, "experts": 8, "chosen": 2},
}
SQUARE = 2048


def through_grouped_mm(
    x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor
) -> Tensor:
    """The experts through `torch.nn.functional.grouped_mm`."""
    ends_N = slots.ends_N.to(torch.int32)
    hidden_RF = F.grouped_mm(x_TD[slots.token_R], gate_up_NFD.transpose(1, 2), offs=ends_N)
    gate_RH, up_RH = hidden_RF.chunk(2, dim=-1)
    y_RD = F.grouped_mm(F.silu(gate_RH) * up_RH, down_NHD, offs=ends_N) * weights_TK.reshape(-1)[
        slots.slot_R, None
    ].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, slots.token_R, y_RD)


def through_loop(
    x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor
) -> Tensor:
    """The experts one after the other, left to autograd."""
    lengths = slots.ends_N.diff(prepend=slots.ends_N.new_zeros(1)).tolist()
    parts = []
    for x_rD, gate_up_FD, down_HD in zip(
        x_TD[slots.token_R].split(lengths), gate_up_NFD.unbind(), down_NHD.unbind(), strict=True
    ):
        gate_rH, up_rH = (x_rD @ gate_up_FD.t()).chunk(2, dim=-1)
        parts.append((F.silu(gate_rH) * up_rH) @ down_HD)
    weights_R1 = weights_TK.reshape(-1)[slots.slot_R, None].to(x_TD.dtype)
    y_RD = torch.cat(parts) * weights_R1
    return torch.zeros_like(x_TD).index_add(0, slots.token_R, y_RD)


def gemms_alone(
    tokens: int, width: int, hidden: int, num_experts: int, chosen: int
) -> Callable[[], None]:
    """The six GEMMs of each expert, forward and backward, on as many rows as it has on average."""
    rows = tokens * chosen // num_experts
    x_rD, hidden_rF, act_rH = (
        torch.randn(rows, width),
        torch.randn(rows, 2 * hidden),
        torch.randn(rows, hidden),
    )
    gate_up_NFD, down_NHD = (
        torch.randn(num_experts, 2 * hidden, width),
        torch.randn(num_experts, hidden, width),
    )
    y_rD, z_rF, z_rH, z_NFD, z_NHD = (
        torch.zeros_like(tensor) for tensor in (x_rD, hidden_rF, act_rH, gate_up_NFD, down_NHD)
    )

    def run() -> None:
        for gate_up_FD, down_HD in zip(gate_up_NFD, down_NHD, strict=True):
            torch.mm(x_rD, gate_up_FD.t(), out=z_rF)
            torch.mm(act_rH, down_HD, out=y_rD)
        for gate_up_FD, down_HD, z_FD, z_HD in zip(
            gate_up_NFD, down_NHD, z_NFD, z_NHD, strict=True
        ):
            torch.mm(x_rD, down_HD.t(), out=z_rH)
            torch.mm(act_rH.t(), x_rD, out=z_HD)
            torch.mm(hidden_rF.t(), x_rD, out=z_FD)
            torch.mm(hidden_rF, gate_up_FD, out=y_rD)

    return run


def arm(
    experts: Callable[..., Tensor],
    tokens: int,
    width: int,
    hidden: int,
    num_experts: int,
    chosen: int,
) -> Callable[[], None]:
    """Forward + backward of `experts` on random numbers that are the same for every arm."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    experts_TK = torch.rand(tokens, num_experts, generator=generator).topk(chosen, dim=1).indices
    slots = sort_slots(experts_TK, num_experts)
    inputs = [normal(tokens, width), torch.rand(tokens, chosen, generator=generator)]
    weights = [
        normal(num_experts, 2 * hidden, width) * width**-0.5,
        normal(num_experts, hidden, width) * hidden**-0.5,
    ]
    grad_TD = normal(tokens, width)
    leaves = [tensor.requires_grad_() for tensor in inputs + weights]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        experts(leaves[0], leaves[1], slots, leaves[2], leaves[3]).backward(grad_TD)

    return run


def main() -> None:
    parser = arguments(__doc__, repeats=15)
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        action="append",
        help="may be given several times (default: quickstart and large)",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    square = torch.randn(SQUARE, SQUARE)
    timings: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name in args.shape or ["quickstart", "large"]:
        tokens, width, hidden, num_experts, chosen = SHAPES[name].values()
        arms = {
            key: arm(experts, tokens, width, hidden, num_experts, chosen)
            for key, experts in (
                ("ours", grouped_mlp),
                ("torch", partial(grouped_mlp, backend="torch")),
                ("grouped_mm", through_grouped_mm),
                ("loop", through_loop),
            )
        }
        bounds = {"gemms": gemms_alone(*SHAPES[name].values()), "matmul": lambda: square @ square}
        taken = time_in_turn(arms | bounds, args.repeats, warmup=2)
        flops = 3 * 3 * 2 * tokens * chosen * width * hidden
        rate, peak = flops / taken["ours"].median, 2 * SQUARE**3 / taken["matmul"].median
        result: dict[str, Any] = {
            "fraction_of_matmul_peak": rate / peak,
            "gemm_only_fraction": flops / taken["gemms"].median / peak,
            "speedup_over_torch": taken["torch"].median / taken["ours"].median,
            "speedup_over_grouped_mm": taken["grouped_mm"].median / taken["ours"].median,
            "speedup_over_loop": taken["loop"].median / taken["ours"].median,
            "gflops": rate / 1e6,
            "matmul_gflops": peak / 1e6,
        }
        results[name] = {**result, **SHAPES[name]}
        timings |= {f"{name}: {key}": timing for key, timing in taken.items()}
    report("Routed experts, forward + backward", timings, results, args.json)


if __name__ == "__main__":
    main()
