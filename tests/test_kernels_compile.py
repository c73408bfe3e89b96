"""Proves the machine code of the Triton kernels without a GPU: everything that a training step
launches at the published shapes is compiled for A100 and H100, spills no register and reaches the
tensor cores. And that the roofline on paper counts what is launched.

Compilation runs in a process of its own: in this one kernels are interpreted."""

from __future__ import annotations

import json
import re

import pytest
import triton_interpreter

from emotrain.kernels.compile_check import DEVICES, FLOAT_ATOMIC, Row
from emotrain.kernels.launches import PUBLISHED
from emotrain.kernels.tuning import GEMM_KERNELS, SPACE
from tests.conftest import ROOT, run_command
from tests.processes import run_script

assert triton_interpreter.triton.knobs.runtime.interpret


PROGRAM = """
import sys, torch
from emotrain.cli import main

code = main(["kernels", "--target", "sm_80,sm_90", "--defaults-only", "--json"])
if code:
    sys.exit(code)

# Then a tile that is too large.
from emotrain.kernels import compile_check as check, tuning

tuning.DEFAULTS["sm_90"][torch.bfloat16]["grad_hidden"] = tuning.TileConfig(128, 256, 64, 8, 3)
launch = next(launch for launch in check.recorded_launches("sm_90", torch.bfloat16)
              if "grad_hidden" in str(launch.kernel))
check.activate("sm_90")
row = check.compile_launch("sm_90", torch.bfloat16, launch, launch.config, True)
print(row.failures())
"""


@pytest.fixture(scope="module")
def compiled() -> list[str]:
    """The two lines of `PROGRAM`."""
    done = run_command("-c", PROGRAM, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


def test_what_ships_spills_nothing_and_reaches_the_tensor_cores(compiled: list[str]) -> None:
    result = json.loads(compiled[0])
    assert result["default_spills"] == 0 and result["failures"] == []
    assert result["sm_80_gemm_instruction"] == "mma" and result["sm_90_gemm_instruction"] == "wgmma"
    assert 1 <= result["host_waits_per_step"] <= 6
    assert result["dispatch_launches_per_layer"] <= 15 and result["exchanges_per_layer"] <= 4
    kernels = {row["kernel"].split()[0] for row in result["rows"]}
    assert kernels == {
        *GEMM_KERNELS,
        "score",
        "pool",
        "route",
        "route_backward",
        "plan",
        "combine",
        "gather",
        "norm",
        "norm_backward",
        "rotate",
        "rotate_back",
        "swiglu",
        "swiglu_backward",
        "count",
        "place",
        "destination",
        "pack",
        "pick_weights",
        "cross_entropy",
    }


@pytest.mark.long
def test_the_tuning_space_and_the_next_target() -> None:
    done = run_command(
        "-m", "emotrain.cli", "kernels", "--target", "sm_80,sm_90,sm_100", "--json", timeout=1200
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    for name, space in SPACE.items():
        tiles = {
            row["tile"]
            for row in rows
            if row["kernel"].split()[0] == name and row["dtype"] == "bfloat16"
        }
        assert {tile.describe() for tile in space} <= tiles


@pytest.mark.long
@pytest.mark.parametrize(
    "shape, may_spill",
    [
        ({"num_experts": 256, "num_chosen": 16}, False),
        ({"width": 512, "hidden": 256, "num_experts": 64}, False),
        (
            {
                "tokens": 7,
                "width": 40,
                "hidden": 24,
                "num_experts": 1,
                "num_chosen": 1,
                "documents": 1,
            },
            False,
        ),
        # Widths that no tile divides cost masks, and registers.
        ({"tokens": 1000, "width": 200, "hidden": 72, "num_experts": 5, "num_chosen": 2}, True),
        ({"width": 33, "hidden": 17}, True),
    ],
    ids=str,
)
def test_other_shapes_compile(shape: dict[str, int], may_spill: bool) -> None:
    """The interpreter accepts what the compiler may not."""
    program = (
        "from emotrain.kernels import compile_check as check, launches\n"
        f"launches.PUBLISHED.update({shape})\n"
        "rows = check.compile_all(['sm_80', 'sm_90'], with_space=False)\n"
        f"print([line for row in rows for line in row.failures() if not ({may_spill} and 'spilled' "
        f"in line)])"
    )
    done = run_command("-c", program, timeout=600)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_tile_too_large_for_the_registers_is_found(compiled: list[str]) -> None:
    assert "bytes of registers spilled; choose a smaller tile or more warps" in compiled[1]


def test_what_must_not_ship() -> None:
    good = {
        "target": "sm_90",
        "kernel": "rows",
        "dtype": "bfloat16",
        "tile": "128x128x64 w8 s3",
        "default": True,
        "registers": 100,
        "spills": 0,
        "shared": 1024,
        "occupancy": 0.5,
        "instruction": "wgmma",
    }
    assert Row(**good).failures() == []
    for change, words in (
        ({"spills": 8}, "8 bytes of registers spilled"),
        ({"instruction": "mma"}, "instruction mma, not wgmma"),
        ({"shared": DEVICES["sm_90"].shared_per_block + 1}, "over the 232448 of an H100"),
        ({"instruction": "none", "target": "sm_80"}, "instruction none, not mma"),
        ({"float_atomics": 2}, "2 float atomics, whose sums differ from run to run"),
    ):
        (line,) = Row(**{**good, **change}).failures()
        assert words in line and "\n" not in line
    assert FLOAT_ATOMIC.search(
        "@%p1 red.global.gpu.relaxed.add.f32 [%rd1], %r1;"
    ) and FLOAT_ATOMIC.search("atom.add.noftz.bf16x2 %r1, [%rd1], %r2;")
    assert not FLOAT_ATOMIC.search(
        "atom.global.gpu.relaxed.add.u64 %rd2, [%rd1], %rd3;  mul.f32 %r1, %r2, %r3;"
    )


def test_an_unknown_target_is_refused_and_the_known_ones_are_in_the_help() -> None:
    told = run_script("emotrain", "kernels", "--help").stdout
    assert set(re.findall(r"sm_\d+", told)) == set(DEVICES)
    done = run_script("emotrain", "kernels", "--target", "sm_42")
    assert (
        done.returncode == 2
        and done.stderr == "error: target sm_42 is not known; choose of sm_80, sm_90, sm_100\n"
    )


# ---- the roofline


def test_the_roofline_counts_what_a_hand_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels by their launches and on paper: each tensor once, rows gathered by token once a
    slot. `index` is 8 bytes a slot (its token or its choice), `word` is 4 (a weight or a
    position). The tables of tiles and of experts are left out on paper."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import roofline

    sizes = [PUBLISHED[name] for name in ("tokens", "width", "hidden", "num_experts", "num_chosen")]
    layer = roofline.Layer(*sizes)
    rows, inner, bank, gemm, x = layer.rows, layer.inner, layer.bank, layer.gemm, layer.x
    index, word = 8 * layer.slots, 4 * layer.slots
    by_hand = [
        ("plan", index, word, 0),
        ("gate_up", index + rows + 2 * bank, 3 * inner, 2 * gemm),
        ("rows", index + word + inner + bank, rows, gemm),
        ("combine", word + rows, x, 0),
        # The weights' gradient leaves one partial sum for 128 hidden units.
        (
            "grad_hidden",
            2 * index + word + rows + bank + 2 * inner,
            3 * inner + word * layer.hidden / 128,
            gemm,
        ),
        ("weight_grad", index + inner + rows, bank, gemm),
        ("weight_grad", index + 2 * inner + rows, 2 * bank, 2 * gemm),
        ("rows", 2 * inner + 2 * bank, rows, 2 * gemm),
        ("combine", word + rows, x, 0),
    ]
    kernels, kept = roofline.fused(layer)
    for kernel, (name, read, written, flops) in zip(kernels, by_hand, strict=True):
        assert kernel.name == name and kernel.flops == flops
        assert kernel.read == pytest.approx(read, rel=0.002), name
        assert kernel.written == pytest.approx(written, rel=0.02 if name == "plan" else 0), name
    # Besides x: gate and up, two indices, a weight and a position of each slot.
    assert kept == pytest.approx(2 * inner + 2 * index + 2 * word, rel=0.002)


def test_the_roofline_bar() -> None:
    done = run_script(ROOT / "benchmarks/roofline.py", "--json")
    result = json.loads(done.stdout)
    assert (
        result["traffic_over_permute_copy"] <= 0.60
        and result["note"] == "a model on paper, not a measurement"
    )
    assert "not a measurement" in run_script(ROOT / "benchmarks/roofline.py").stdout
