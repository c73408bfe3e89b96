"""Tile sizes of the Triton GEMM kernels: the only place that holds any.

Defaults were chosen by what the compiler makes of them (`emotrain kernels`): tensor-core
instructions, no spilled register, asynchronous copies, and many FLOPs for each byte read from the
L2 cache. They have not been timed on a GPU; `SPACE` is what a timed search should try, every entry
free of spills at the published shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileConfig:
    """One program of a GEMM kernel: the tile of the output it makes, and how."""

    rows: int
    """Rows of the tile: slots of one expert, or rows of a weight gradient."""
    columns: int
    """Columns of the tile."""
    depth: int
    """Length of one step along the summed axis."""
    warps: int
    """Warps of 32 threads."""
    stages: int
    """Steps of the software pipeline. Rows that are gathered inside the loop (weight_grad) need two
    more for the same depth: their token is loaded ahead of them."""
    group: int = 8
    """Row tiles that take turns on one column tile, for the L2 cache."""

    def options(self) -> dict[str, int]:
        """Compile-time constants and launch options of a kernel."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def describe(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth} w{self.warps} s{self.stages}"


GEMM_KERNELS = ("gate_up", "rows", "grad_hidden", "weight_grad")
"""Kernels with a TileConfig."""
WALKERS = GEMM_KERNELS[:3]
"""They walk the same tiles of slots, cut to the rows of the first: entries of theirs that are used
together have the same rows (`check_rows`)."""

_FLOAT32 = {
    "gate_up": TileConfig(64, 64, 32, 8, 3),
    "rows": TileConfig(64, 64, 32, 8, 3),
    "grad_hidden": TileConfig(64, 64, 32, 8, 3),
    "weight_grad": TileConfig(64, 64, 32, 8, 5),
}

DEFAULTS: dict[str, dict[torch.dtype, dict[str, TileConfig]]] = {
    "sm_80": {
        torch.bfloat16: {
            "gate_up": TileConfig(128, 128, 64, 8, 3),
            "rows": TileConfig(128, 128, 64, 8, 3),
            "grad_hidden": TileConfig(128, 128, 64, 8, 3),
            "weight_grad": TileConfig(128, 128, 64, 8, 5),
        },
        torch.float32: _FLOAT32,
    },
    # Three times the rate of tensor cores on less than twice the bandwidth of the L2 cache: 85
    # FLOPs for each byte that a tile reads from it, where 128 columns have 64. The epilogue of
    # grad_hidden has no registers for as many.
    "sm_90": {
        torch.bfloat16: {
            "gate_up": TileConfig(128, 256, 64, 8, 3),
            "rows": TileConfig(128, 256, 64, 8, 3),
            "grad_hidden": TileConfig(128, 128, 64, 8, 3),
            "weight_grad": TileConfig(128, 256, 64, 8, 5),
        },
        torch.float32: _FLOAT32,
    },
}
"""Target -> dtype -> kernel -> tile. A newer target takes those of the newest one it knows."""

SPACE: dict[str, tuple[TileConfig, ...]] = {
    "gate_up": (
        TileConfig(128, 128, 64, 8, 3),
        TileConfig(128, 128, 64, 8, 4),
        TileConfig(128, 128, 32, 8, 4),
        TileConfig(128, 64, 64, 4, 3),
        TileConfig(64, 128, 64, 4, 3),
        TileConfig(128, 256, 64, 8, 3),
    ),
    "rows": (
        TileConfig(128, 128, 64, 8, 3),
        TileConfig(128, 128, 64, 8, 4),
        TileConfig(128, 128, 32, 4, 4),
        TileConfig(128, 64, 64, 4, 3),
        TileConfig(64, 128, 64, 4, 3),
        TileConfig(128, 256, 64, 8, 3),
    ),
    "grad_hidden": (
        TileConfig(128, 128, 64, 8, 3),
        TileConfig(128, 128, 64, 8, 4),
        TileConfig(128, 128, 32, 8, 4),
        TileConfig(128, 64, 64, 8, 3),
        TileConfig(64, 128, 64, 8, 3),
        TileConfig(64, 64, 64, 4, 3),
    ),
    "weight_grad": (
        TileConfig(128, 128, 64, 8, 5),
        TileConfig(128, 128, 32, 8, 5),
        TileConfig(128, 128, 32, 4, 5),
        TileConfig(128, 64, 64, 4, 5),
        TileConfig(64, 128, 64, 4, 5),
        TileConfig(128, 256, 64, 8, 5),
    ),
}
"""bfloat16 tiles worth timing; `joint_space` says which of them together."""


def default_tiles(target: str, dtype: torch.dtype) -> dict[str, TileConfig]:
    """Tile of each GEMM kernel for a target such as `sm_90`; the interpreter takes those of the
    oldest."""
    known = [
        name for name in DEFAULTS if target != "interpreter" and _number(name) <= _number(target)
    ]
    return DEFAULTS[max(known, key=_number) if known else "sm_80"][dtype]


def joint_space() -> Iterator[dict[str, TileConfig]]:
    """Every choice of SPACE that may run together, a tile for each kernel."""
    for combination in itertools.product(*(SPACE[kernel] for kernel in GEMM_KERNELS)):
        configs = dict(zip(GEMM_KERNELS, combination, strict=True))
        if len({configs[kernel].rows for kernel in WALKERS}) == 1:
            yield configs


def check_rows(configs: Mapping[str, TileConfig]) -> None:
    """Refuse tiles for kernels that walk the same tiles of slots and differ in rows: all but the
    first would run with rows that nobody chose.

    Raises:
        ValueError: such tiles.
    """
    rows = {kernel: configs[kernel].rows for kernel in WALKERS if kernel in configs}
    if len(set(rows.values())) > 1:
        raise ValueError(f"{rows}: these kernels walk the same tiles; give them the same rows")


def _number(target: str) -> int:
    return int(target.removeprefix("sm_"))
