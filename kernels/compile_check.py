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
from dataclasses import dataclass
from typing import Any

import torch

from emotrain.kernels.backends import require_triton
from emotrain.kernels.launches import recorded_launches
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
