"""Proves the MegaBlocks adapter: against the real Python code of MegaBlocks 0.10 and grouped_gemm
0.3, with their compiled operators alone replaced; and its one-line refusals.

They build with CUDA alone. `python tests/megablocks_sources.py .megablocks` installs what is Python
of them; without it, or a folder named by EMOTRAIN_MEGABLOCKS, the comparison is skipped.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emotrain.kernels.backends import choose_backend
from emotrain.kernels.grouped_mlp import grouped_mlp
from emotrain.kernels.megablocks_adapter import grouped_mlp_megablocks
from emotrain.kernels.slots import SortedSlots, sort_slots
from tests.conftest import ROOT

NUM_EXPERTS, CHOSEN, WIDTH, HIDDEN = 6, 3, 24, 16


def compiled_gmm(
    a: Tensor, b: Tensor, c: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool
) -> None:
    """The compiled operator, with its own demands: sizes on the host, bfloat16, contiguous. What
    it does not write stays NaN."""
    assert batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64
    assert (
        a.dtype == b.dtype == c.dtype == torch.bfloat16 and a.is_contiguous() and b.is_contiguous()
    )
    c.fill_(torch.nan)
    start = 0
    for group, size in enumerate(batch_sizes.tolist()):
        rows = slice(start, start + size)
        if trans_a and size:
            c[group] = (a[rows].float().t() @ b[rows].float()).bfloat16()
        elif not trans_a:
            c[rows] = (a[rows].float() @ (b[group].t() if trans_b else b[group]).float()).bfloat16()
        start += size


@pytest.fixture
def real_megablocks(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ.get("EMOTRAIN_MEGABLOCKS", ROOT / ".megablocks"))
    if not all((folder / package).is_dir() for package in ("megablocks", "grouped_gemm", "stk")):
        pytest.skip(
            "MegaBlocks' Python code is not installed: python tests/megablocks_sources.py "
            ".megablocks"
        )
    pytest.importorskip("triton", reason="MegaBlocks imports Triton")
    monkeypatch.syspath_prepend(folder)
    for name, contents in {
        "megablocks_ops": {},
        "grouped_gemm_backend": {"gmm": compiled_gmm},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def forget_megablocks():
    torch.manual_seed(0)
    yield
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("megablocks", "grouped_gemm", "stk")
    ]:
        del sys.modules[name]


def arguments(dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], SortedSlots]:
    """Leaves and slots: expert 4 idle, some slots empty, and a token without any."""
    experts_TK = torch.rand(20, NUM_EXPERTS).argsort(dim=1)[:, :CHOSEN]
    experts_TK[(experts_TK == 4) | (torch.rand(20, CHOSEN) < 0.2)] = NUM_EXPERTS
    experts_TK[7] = NUM_EXPERTS
    leaves = [
        torch.randn(20, WIDTH).to(dtype),
        torch.rand(20, CHOSEN),
        (torch.randn(NUM_EXPERTS, 2 * HIDDEN, WIDTH) / 4).to(dtype),
        (torch.randn(NUM_EXPERTS, HIDDEN, WIDTH) / 4).to(dtype),
    ]
    return [leaf.requires_grad_() for leaf in leaves], sort_slots(experts_TK, NUM_EXPERTS)


def test_the_adapter_agrees_with_the_twin(real_megablocks: None) -> None:
    (x_TD, weights_TK, gate_up_NFD, down_NHD), slots = arguments()
    y_TD = grouped_mlp_megablocks(x_TD, weights_TK, slots, gate_up_NFD, down_NHD)
    wide = [
        leaf.detach().float().requires_grad_() for leaf in (x_TD, weights_TK, gate_up_NFD, down_NHD)
    ]
    expected_TD = grouped_mlp(wide[0], wide[1], slots, *wide[2:])
    cotangent_TD = torch.randn(20, WIDTH)
    ours = [
        y_TD,
        *torch.autograd.grad(
            y_TD, (x_TD, weights_TK, gate_up_NFD, down_NHD), cotangent_TD.bfloat16()
        ),
    ]
    theirs = [expected_TD, *torch.autograd.grad(expected_TD, wide, cotangent_TD)]
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            mine.float(), reference, atol=2e-2 * reference.abs().max().item(), rtol=0
        )
    assert (y_TD[7] == 0).all() and (ours[3][4] == 0).all()


def test_its_own_layer_reads_the_weights_as_we_do(real_megablocks: None) -> None:
    """MegaBlocks' own gated layer on the rows of the experts: gate is its w1, up its v1, down
    its w2."""
    from megablocks.layers.glu import memory_optimized_grouped_glu

    (x_TD, weights_TK, gate_up_NFD, down_NHD), slots = arguments()
    used = int(slots.ends_N[-1])
    gate_NHD, up_NHD = (half.contiguous() for half in gate_up_NFD.detach().chunk(2, dim=1))
    counts_N = torch.diff(slots.ends_N, prepend=slots.ends_N.new_zeros(1))
    rows_RD = memory_optimized_grouped_glu(
        x_TD.detach()[slots.token_R[:used]],
        gate_NHD,
        up_NHD,
        down_NHD.detach(),
        counts_N,
        torch.nn.functional.silu,
    )
    weights_R1 = weights_TK.detach().reshape(-1)[slots.slot_R[:used], None]
    expected_TD = torch.zeros(20, WIDTH).index_add(
        0, slots.token_R[:used], rows_RD.float() * weights_R1
    )
    y_TD = grouped_mlp_megablocks(x_TD, weights_TK, slots, gate_up_NFD, down_NHD)
    torch.testing.assert_close(
        y_TD.float(), expected_TD, atol=2e-2 * expected_TD.abs().max().item(), rtol=0
    )


def test_where_it_is_absent_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, slots = arguments()
    monkeypatch.setitem(sys.modules, "megablocks", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"experts\.backend=megablocks needs MegaBlocks .*docs/kernels\.md.*auto",
    ):
        grouped_mlp_megablocks(*leaves[:2], slots, *leaves[2:])
    assert "\n" not in str(
        pytest.raises(
            ModuleNotFoundError, grouped_mlp_megablocks, *leaves[:2], slots, *leaves[2:]
        ).value
    )


def test_other_types_and_devices_are_refused() -> None:
    leaves, slots = arguments(torch.float32)
    with pytest.raises(ValueError, match="megablocks supports bfloat16, not float32"):
        grouped_mlp_megablocks(*leaves[:2], slots, *leaves[2:])
    with pytest.raises(ValueError, match="megablocks runs on NVIDIA GPUs, not on cpu"):
        grouped_mlp(*leaves[:2], slots, *leaves[2:], backend="megablocks")
    assert (
        choose_backend("megablocks", leaves[0], NUM_EXPERTS) == "torch"
    )  # for routing and permutation, as `auto`
