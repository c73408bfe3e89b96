"""Bytes and FLOPs of one layer's routed experts, forward and backward, on paper, for three designs
on an A100 and an H100.

    python benchmarks/roofline.py [--tokens 16384] [--imbalance 1.5] [--json]

THIS IS A MODEL, NOT A MEASUREMENT: nothing here ran on a GPU. It counts what each kernel must move
between the GPU's memory and its processors if every operand travels once a kernel, and rows that
are gathered by token once a slot; what tiles read again comes from the L2 cache and is not counted.
Our kernels' launches say this of themselves (`emotrain.kernels.cost`); the other designs are
counted here.
A kernel then takes the longer of bytes / bandwidth and FLOPs / peak; real kernels take more.

    fused          our Triton kernels: rows gathered in the loads of a GEMM, SwiGLU and weights in
                   their epilogues
    permute copy   the published design (spec 3.2; MegaBlocks' grouped path): rows copied into
                   expert order, three GEMMs, rows copied back and summed. Its SwiGLU is counted as
                   one kernel, in its favour
    padding        every expert padded to the fullest one, which has --imbalance times the mean
                   number of slots

    traffic_over_permute_copy   bytes of `fused` over bytes of `permute copy`, expert weights and
                                their gradients included

The router and the shared expert are the same in every design and left out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emotrain.kernels.slots import SortedSlots
from emotrain.planning.stand_ins import import_launch_code

DEVICES = {"A100": (2.039e12, 312e12), "H100": (3.35e12, 989e12)}
"""Bytes a second and bfloat16 FLOPs a second of the SXM boards with 80 GB (NVIDIA's data
sheets)."""
ELEMENT = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: what it moves, in bytes, and what it computes."""

    name: str
    read: float
    written: float
    flops: float = 0.0

    @property
    def bytes(self) -> float:
        return self.read + self.written


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer's routed experts, in bytes of bfloat16 where they are tensors."""

    tokens: int
    width: int
    hidden: int
    experts: int
    chosen: int

    @property
    def slots(self) -> int:
        return self.tokens * self.chosen

    @property
    def x(self) -> float:
        """A row of D for each token; with K in front of it, for each slot."""
        return self.tokens * self.width * ELEMENT

    @property
    def rows(self) -> float:
        return self.slots * self.width * ELEMENT

    @property
    def inner(self) -> float:
        """A row of H for each slot."""
        return self.slots * self.hidden * ELEMENT

    @property
    def bank(self) -> float:
        """One of the three matrices of every expert."""
        return self.experts * self.width * self.hidden * ELEMENT

    @property
    def gemm(self) -> float:
        """FLOPs of every slot's row through one matrix."""
        return 2.0 * self.slots * self.width * self.hidden


def fused(layer: Layer) -> tuple[list[Kernel], float]:
    """Our kernels in the order of their launches, as the launches say their cost, and the bytes
    kept for backward besides x, which the norm before the layer shares, and the experts' weights.
    Nothing is launched, so that no GPU and no Triton is needed."""
    import_launch_code()
    from emotrain.kernels.triton_grouped_mlp import grouped_mlp_triton
    from emotrain.kernels.triton_launch import Launch, recording

    launches: list[Launch] = []
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor)] = tensor
        return tensor

    with torch.device("meta"), recording("sm_90", launches.append):
        slot_R = torch.empty(layer.slots, dtype=torch.int64)
        slots = SortedSlots(
            torch.empty_like(slot_R), slot_R, torch.empty(layer.experts, dtype=torch.int64)
        )
        x_TD, gate_up_NFD, down_NHD = (
            torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
            for shape in (
                (layer.tokens, layer.width),
                (layer.experts, 2 * layer.hidden, layer.width),
                (layer.experts, layer.hidden, layer.width),
            )
        )
        weights_TK = torch.empty(layer.tokens, layer.chosen, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y_TD = grouped_mlp_triton(x_TD, weights_TK, slots, gate_up_NFD, down_NHD)
        y_TD.backward(x_TD.detach())
    for tensor in (x_TD, gate_up_NFD, down_NHD):
        kept.pop(id(tensor), None)
    kernels = [
        Kernel(
            launch.name,
            launch.cost.bytes_read(),
            launch.cost.bytes_written(),
            launch.cost.flops(),
        )
        for launch in launches
    ]
    return kernels, sum(tensor.nbytes for tensor in kept.values())


def permute_copy(layer: Layer) -> tuple[list[Kernel], float]:
    """The published design: copies, one GEMM a matrix, copies."""
    rows, inner, bank, gemm, index, word = (
        layer.rows,
        layer.inner,
        layer.bank,
        layer.gemm,
        8.0 * layer.slots,
        4.0 * layer.slots,
    )
    kernels = [
        Kernel("gather", index + rows, rows),
        Kernel("gate", rows + bank, inner, gemm),
        Kernel("up", rows + bank, inner, gemm),
        Kernel("swiglu", 2 * inner, inner),
        Kernel("down", inner + bank, rows, gemm),
        Kernel("scatter", index + word + rows, rows),
        Kernel("sum of choices", rows, layer.x),
        # Backward.
        Kernel("scatter, dx", index + word + rows, rows),
        Kernel("scatter, dweights", index + 2 * rows, word),
        Kernel("down, dx", rows + bank, inner, gemm),
        Kernel("down, dw", inner + rows, bank, gemm),
        Kernel("swiglu, dx", 3 * inner, 2 * inner),
        Kernel("gate, dx", inner + bank, rows, gemm),
        Kernel("up, dx", inner + bank, rows, gemm),
        Kernel("gate dx + up dx", 2 * rows, rows),
        Kernel("gate, dw", inner + rows, bank, gemm),
        Kernel("up, dw", inner + rows, bank, gemm),
        Kernel("gather, dx", index + rows, rows),
        Kernel("sum of choices, dx", rows, layer.x),
    ]
    # The permuted rows, gate, up, their product, the rows before they are weighted, and the
    # indices.
    return kernels, 2 * rows + 3 * inner + 2 * index + word


def padding(layer: Layer, imbalance: float) -> tuple[list[Kernel], float]:
    """The permute-copy design with `imbalance` times the rows: every expert is as long as the
    fullest one."""
    kernels, kept = permute_copy(layer)
    extra, extra_kept = permute_copy(
        Layer(layer.tokens, layer.width, layer.hidden, 0, layer.chosen)
    )
    more = imbalance - 1
    padded = [
        Kernel(
            kernel.name,
            kernel.read + more * add.read,
            kernel.written + more * add.written,
            kernel.flops + more * add.flops,
        )
        for kernel, add in zip(kernels, extra, strict=True)
    ]
    return padded, kept + more * extra_kept


def milliseconds(kernels: list[Kernel], device: str) -> float:
    """The least time that the device's bandwidth and peak allow."""
    bandwidth, peak = DEVICES[device]
    return 1e3 * sum(max(kernel.bytes / bandwidth, kernel.flops / peak) for kernel in kernels)


def compare(layer: Layer, imbalance: float) -> dict:
    """Every design on every device, and the ratio that the kernels are held to."""
    designs = {
        "fused": fused(layer),
        "permute copy": permute_copy(layer),
        "padding": padding(layer, imbalance),
    }
    results: dict[str, dict[str, Any]] = {
        name: {
            "gigabytes": sum(kernel.bytes for kernel in kernels) / 1e9,
            "teraflops": sum(kernel.flops for kernel in kernels) / 1e12,
            "kept_for_backward_gigabytes": kept / 1e9,
            **{f"{device}_ms": milliseconds(kernels, device) for device in DEVICES},
            "kernels": [
                {
                    "name": kernel.name,
                    "read": kernel.read,
                    "written": kernel.written,
                    "flops": kernel.flops,
                }
                for kernel in kernels
            ],
        }
        for name, (kernels, kept) in designs.items()
    }
    ours, theirs = results["fused"]["gigabytes"], results["permute copy"]["gigabytes"]
    weights = (
        9 * layer.bank / 1e9
    )  # three matrices read forward, read backward, and their gradients written
    return {
        "note": "a model on paper, not a measurement",
        "layer": vars(layer),
        "imbalance": imbalance,
        "traffic_over_permute_copy": ours / theirs,
        "activation_traffic_over_permute_copy": (ours - weights) / (theirs - weights),
        "activation_memory_gigabytes": results["fused"]["kept_for_backward_gigabytes"],
        "designs": results,
    }


def table(result: dict) -> str:
    lines = [
        "A model on paper, not a measurement: one layer's routed experts, forward + backward, "
        "bfloat16.",
        ", ".join(f"{name} {value:,}" for name, value in result["layer"].items()),
        "",
        f"{'design':<14}{'traffic GB':>12}{'TFLOP':>9}{'kept GB':>9}{'A100 ms':>10}{'H100 ms':>10}",
    ]
    for name, row in result["designs"].items():
        lines.append(
            f"{name:<14}{row['gigabytes']:>12.2f}{row['teraflops']:>9.2f}{row['kept_for_backward_gigabytes']:>9.2f}"
            f"{row['A100_ms']:>10.2f}{row['H100_ms']:>10.2f}"
        )
    lines += [
        "",
        f"traffic over the permute-copy design: {result['traffic_over_permute_copy']:.3f} "
        f"(without the experts' weights: {result['activation_traffic_over_permute_copy']:.3f})",
        f"activation memory of a layer: {result['activation_memory_gigabytes'] * 1e3:.0f} MB, "
        f"{result['activation_memory_gigabytes'] * 1e9 / result['layer']['tokens'] / 1024:.1f} KiB "
        f"a token",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384,
        help="tokens of a micro-batch (default: 4 sequences of 4,096)",
    )
    parser.add_argument("--width", type=int, default=2048, help="D (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="H (default: %(default)s)")
    parser.add_argument(
        "--experts", type=int, default=127, help="N, routed experts (default: %(default)s)"
    )
    parser.add_argument(
        "--chosen", type=int, default=7, help="K, routed experts of a token (default: %(default)s)"
    )
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.5,
        help="slots of the fullest expert over the mean (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    result = compare(
        Layer(args.tokens, args.width, args.hidden, args.experts, args.chosen), args.imbalance
    )
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
