"""`emotrain kernels`: compile every Triton kernel ahead of time, without a GPU, and look at the
machine code.

The public functions are called on meta tensors of the published shapes while a recorder keeps every
launch: what is compiled is what a training step would launch, with the same specialisation of its
arguments. Triton brings the assembler along.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emotrain.kernels.backends import require_triton
from emotrain.kernels.slots import SortedSlots, sort_slots
from emotrain.kernels.tuning import SPACE


@dataclass(frozen=True)
class Device:
    """What a multiprocessor of a target offers (CUDA C++ programming guide, "compute
    capabilities")."""

    name: str
    shared_per_block: int
    """Bytes of shared memory that one program may use."""
    shared_per_processor: int
    """Bytes that the programs of one multiprocessor share; each takes 1 KiB more than it asks
    for."""
    tensor_core: str
    """The instruction that reaches the full rate of its tensor cores."""
    registers: int = 65536
    warps: int = 64


DEVICES = {
    "sm_80": Device("A100", 163 << 10, 164 << 10, "mma"),
    "sm_90": Device("H100", 227 << 10, 228 << 10, "wgmma"),
    "sm_100": Device("B200", 227 << 10, 228 << 10, "tcgen05"),
}

# Such as `red.global.gpu.relaxed.add.f32`: sums in whatever order they come.
FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.\S*\.(?:f16|bf16|f32|f64)\S*\s")

PUBLISHED = {
    "tokens": 16384,
    "width": 2048,
    "hidden": 1024,
    "num_experts": 127,
    "num_chosen": 7,
    "shared": 1,
    "ranks": 8,
    "documents": 24,
    "heads": 16,
    "kv_heads": 16,
    "head_width": 128,
}
"""One micro-batch of the published model: 4 sequences of 4,096 tokens (spec 1.2, 5)."""


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    target: str
    kernel: str
    dtype: str
    tile: str
    """rows x columns x depth, warps, stages; empty for kernels without a tile."""
    default: bool
    """Whether this is what ships, and not another point of the tuning space."""
    registers: int
    spills: int
    """Bytes a thread keeps in local memory."""
    shared: int
    """Bytes of shared memory of one program."""
    occupancy: float
    """Warps that a multiprocessor can hold at once, as a share of the most it could."""
    instruction: str
    """Tensor-core instruction of the code: wgmma, tcgen05, mma or none."""
    float_atomics: int = 0
    """Instructions that add floats to memory in whatever order they come."""

    def cells(self) -> tuple[str, ...]:
        """What stands under `HEADER`."""
        return (
            self.target,
            self.kernel,
            self.dtype,
            self.tile,
            "" if self.default else "space",
            str(self.registers),
            str(self.spills),
            f"{self.shared / 1024:.0f}",
            f"{self.occupancy:.0%}",
            self.instruction,
        )

    def failures(self) -> list[str]:
        """What must not ship, a line each."""
        device, name = (
            DEVICES[self.target],
            f"{self.target} {self.kernel} {self.dtype} {self.tile}".strip(),
        )
        found = []
        if self.spills:
            found.append(
                f"{name}: {self.spills} bytes of registers spilled; choose a smaller tile or more "
                f"warps"
            )
        if self.shared > device.shared_per_block:
            found.append(
                f"{name}: {self.shared} bytes of shared memory, over the {device.shared_per_block} "
                f"of an {device.name}"
            )
        if self.tile and self.instruction != device.tensor_core:
            found.append(
                f"{name}: tensor-core instruction {self.instruction}, not {device.tensor_core}"
            )
        if self.float_atomics:
            found.append(
                f"{name}: {self.float_atomics} float atomics, whose sums differ from run to run"
            )
        return found


def summarize(rows: list[Row], failures: list[str]) -> dict[str, Any]:
    """The result as plain data: `default_spills` in bytes, `<target>_gemm_instruction`, and a
    row a kernel."""
    import triton

    result: dict[str, Any] = {
        "triton": triton.__version__,
        "default_spills": sum(row.spills for row in rows if row.default),
    }
    for target in dict.fromkeys(row.target for row in rows):
        found = {
            row.instruction for row in rows if row.target == target and row.default and row.tile
        }
        result[f"{target}_gemm_instruction"] = " ".join(sorted(found))
    return {**result, "failures": failures, "rows": [dataclasses.asdict(row) for row in rows]}


HEADER = (
    "target",
    "kernel",
    "dtype",
    "tile",
    "",
    "registers",
    "spills",
    "shared KiB",
    "occupancy",
    "instruction",
)
"""What the cells of a row are: five names, four numbers, one note."""


def compile_all(targets: list[str], with_space: bool) -> list[Row]:
    """Compile every kernel for every target in bfloat16 and float32; the tuning space in
    bfloat16."""
    rows = []
    for target in targets:
        activate(target)
        for dtype in (torch.bfloat16, torch.float32):
            for launch in recorded_launches(target, dtype):
                rows.append(compile_launch(target, dtype, launch, launch.config, default=True))
                if with_space and launch.config is not None and dtype == torch.bfloat16:
                    others = SPACE[launch.kernel.__name__.removesuffix("_kernel")]
                    rows += [
                        compile_launch(target, dtype, launch, tile, default=False)
                        for tile in others
                        if tile != launch.config
                    ]
    return rows


def activate(target: str) -> None:
    """Compile for `target` from now on, in this process."""
    # What is interpreted cannot be compiled, and kernels ask when they are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    require_triton()
    import triton

    triton.runtime.driver.set_active(_driver(target))


def recorded_launches(
    target: str,
    dtype: torch.dtype,
    shapes: Mapping[str, int] | None = None,
    routing: bool | None = None,
) -> list[Any]:
    """The distinct launches of one block, forward and backward.

    Args:
        shapes: what differs from `PUBLISHED`, under its names (a dense block has 0 routed experts);
            and `held`, the experts of a rank. With `ranks` given, launches are those of a layer
            that is spread so; else those of one rank and of the published number of them.
        routing: whether routing is among them, which is in float32 always (None: where `dtype` is).
    """
    from emotrain.kernels import triton_launch

    sizes = {**PUBLISHED, **(shapes or {})}
    seen: dict[tuple[Any, ...], Any] = {}

    def remember(launch: Any) -> None:
        dtypes = tuple(
            argument.dtype for argument in launch.arguments if isinstance(argument, torch.Tensor)
        )
        seen.setdefault((launch.kernel.__name__, dtypes, *sorted(launch.options.items())), launch)

    with torch.device("meta"), triton_launch.recording(target, remember):
        _pass_rows(sizes, dtype)
        if sizes["num_experts"]:
            if routing or (routing is None and dtype == torch.float32):
                _route(sizes)
            for ranks in {sizes["ranks"]} if "ranks" in (shapes or {}) else (1, sizes["ranks"]):
                (_compute if ranks == 1 else _dispatch)(sizes, dtype)
    return list(seen.values())


def _route(sizes: Mapping[str, int]) -> None:
    """Routing of a layer, as training and evaluation ask for it."""
    from emotrain.kernels.triton_routing import decide_in_triton

    tokens, documents, num_experts = sizes["tokens"], sizes["documents"], sizes["num_experts"]
    logits_TE = torch.empty(tokens, num_experts + sizes["shared"], requires_grad=True)
    logits_TN = logits_TE[:, :num_experts]
    document_T = torch.empty(tokens, dtype=torch.int64)
    pool_size_G = torch.empty(2, documents, dtype=torch.int64)[1]  # of the second layer
    kept_GN, valid_T = (
        torch.empty(shape, dtype=torch.bool) for shape in ((documents, num_experts), (tokens,))
    )
    of_batch = (logits_TN, document_T, documents, sizes["num_chosen"])
    routing = decide_in_triton(*of_batch, pool_size_G)
    (routing.weights_TK.sum() + routing.probabilities_TN.sum() + routing.lse_T.sum()).backward()
    # With the z-loss on all logits nothing asks for the normaliser inside of pools.
    routing = decide_in_triton(*of_batch)
    (routing.weights_TK.sum() + routing.probabilities_TN.sum()).backward()
    for pool in (pool_size_G, None):  # padded batches, an expert subset
        decide_in_triton(*of_batch, pool, None, valid_T)
        decide_in_triton(*of_batch, pool, kept_GN, valid_T)


def _compute(sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """The experts of a layer, and rows to their experts and back, all on one rank."""
    from emotrain.kernels.permute import permute, unpermute

    tokens, num_experts = sizes["tokens"], sizes["num_experts"]
    experts_TK = torch.empty(tokens, sizes["num_chosen"], dtype=torch.int64)
    x_TD = torch.empty(tokens, sizes["width"], dtype=dtype, requires_grad=True)
    weights_TK = torch.empty(experts_TK.shape, requires_grad=True)
    slots = sort_slots(experts_TK, num_experts, backend="triton")
    _experts(sizes, x_TD, weights_TK, slots)
    # For MegaBlocks, whose slots torch may have sorted.
    slots = replace(slots, position_R=None)
    unpermute(permute(x_TD, slots, "triton"), slots, tokens, weights_TK, "triton").backward(
        x_TD.detach()
    )


def _dispatch(sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """The same over ranks, of which each has as many tokens."""
    from emotrain.kernels import parcels

    tokens, num_ranks = sizes["tokens"], sizes["ranks"]
    per_rank = -(-sizes["num_experts"] // num_ranks)
    spread = parcels.Spread(sizes["num_experts"], num_ranks, per_rank)
    experts_TK = torch.empty(tokens, sizes["num_chosen"], dtype=torch.int64)
    x_TD, weights_TK = (
        torch.empty(tokens, sizes["width"], dtype=dtype),
        torch.empty(experts_TK.shape),
    )
    layout = parcels.ParcelLayout.of(x_TD, weights_TK, per_rank)
    position_TW, _ = parcels.destinations(experts_TK, spread, "triton")
    parcels_OB = parcels.pack(
        x_TD, weights_TK, experts_TK, position_TW, tokens, layout, spread, "triton"
    )
    slots = sort_slots(layout.choices(parcels_OB), sizes.get("held", per_rank), tokens, "triton")
    rows_ID, weights_IK = layout.rows(parcels_OB), layout.weights(parcels_OB)
    _experts(sizes, rows_ID.requires_grad_(), weights_IK.requires_grad_(), slots)
    parcels.combine(parcels.spread_rows(x_TD, position_TW, tokens, "triton"), position_TW, "triton")
    layout = layout.of_gradients
    parcels.unpack_gradients(
        layout.empty(x_TD, tokens), experts_TK, position_TW, layout, spread, "triton"
    )


def _experts(
    sizes: Mapping[str, int], x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots
) -> None:
    from emotrain.kernels.triton_grouped_mlp import grouped_mlp_triton

    num_experts, width, hidden = len(slots.ends_N), sizes["width"], sizes["hidden"]
    gate_up_NFD, down_NHD = (
        torch.empty(num_experts, *shape, dtype=x_TD.dtype, requires_grad=True)
        for shape in ((2 * hidden, width), (hidden, width))
    )
    y_TD = grouped_mlp_triton(x_TD, weights_TK, slots, gate_up_NFD, down_NHD)
    y_TD.backward(torch.empty_like(y_TD))
    # Evaluation keeps nothing for backward, and spreads no experts.
    if slots.in_use is None:
        with torch.no_grad():
            grouped_mlp_triton(x_TD, weights_TK, slots, gate_up_NFD, down_NHD)


def _pass_rows(sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """Norms, rotary positions, and SwiGLU of the shared experts."""
    from emotrain.kernels.rowwise import rms_norm, rotate_heads, swiglu_down

    tokens, width, heads, kv_heads, head_width = (
        sizes[name] for name in ("tokens", "width", "heads", "kv_heads", "head_width")
    )

    def leaf(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, requires_grad=True)

    x_TD, angle = leaf(tokens, width), torch.empty(tokens, head_width // 2)
    rms_norm(x_TD, leaf(width), 1e-6, "triton").backward(x_TD.detach())
    qkv_BSF = leaf(1, tokens, (heads + 2 * kv_heads) * head_width) + 0
    parts = rotate_heads(qkv_BSF, angle, angle, heads, kv_heads, "triton")
    torch.autograd.backward(parts, [part.detach() for part in parts])
    if sizes["shared"]:
        gate_up_TF, down_HD = leaf(tokens, 2 * sizes["hidden"]), leaf(sizes["hidden"], width)
        swiglu_down(gate_up_TF, down_HD, "triton").backward(x_TD.detach())


def compile_launch(target: str, dtype: torch.dtype, launch: Any, tile: Any, default: bool) -> Row:
    options, described = dict(launch.options), ""
    if tile is not None:
        options |= tile.options()
        described = tile.describe()
    kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **options)
    registers, spills = _resources(kernel.asm["cubin"])
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    ptx = kernel.asm["ptx"]
    return Row(
        target,
        _variant(launch),
        str(dtype).removeprefix("torch."),
        described,
        default,
        registers,
        spills,
        shared,
        _occupancy(DEVICES[target], registers, shared, warps),
        _instruction(ptx),
        len(FLOAT_ATOMIC.findall(ptx)),
    )


def _variant(launch: Any) -> str:
    """Name of a kernel with the options that choose its code; `J1024` is the length of its
    banks' other axis."""
    sizes = [f"J{launch.options['J']}"] if "J" in launch.options else []
    flags = [
        f"+{key.lower().removeprefix('has_')}"
        for key, value in launch.options.items()
        if value is True
    ]
    return " ".join([launch.kernel.__name__.removesuffix("_kernel"), *sizes, *flags])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes a thread keeps in local memory, which is where spilled
    registers go."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout)
    assert usage, report.stdout
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def _instruction(ptx: str) -> str:
    found = (
        name
        for name, text in (
            ("wgmma", "wgmma.mma_async"),
            ("tcgen05", "tcgen05.mma"),
            ("mma", "mma.sync"),
        )
        if text in ptx
    )
    return next(found, "none")


def _occupancy(device: Device, registers: int, shared: int, warps: int) -> float:
    """Registers are given out to a warp in units of 256, that is 8 a thread."""
    per_warp = -(-registers // 8) * 8 * 32
    programs = min(
        device.warps // warps,
        device.registers // (per_warp * warps),
        device.shared_per_processor // (shared + 1024),
    )
    return programs * warps / device.warps


def _driver(target: str) -> Any:
    """A Triton driver for a device that is not there: it can compile and cannot launch."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    number = int(target.removeprefix("sm_"))

    class AbsentDevice(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", number, 32)

        def get_current_device(self) -> int:
            return number  # one compile cache a target

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("there is no device to time on")

    return AbsentDevice()
