"""The routed experts on MegaBlocks' grouped GEMM (`megablocks.grouped_gemm_util`), for comparison
with our own.

MegaBlocks 0.10 pins torch below 2.7.1 and builds with CUDA alone, so that it is never a dependency
and is imported when it is asked for; docs/kernels.md tells how to make its environment. Its GEMM
wants the counts on the host: this backend waits for the device once a layer, which ours does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.errors import MissingPackageError, UserError
from emotrain.kernels.permute import permute, unpermute
from emotrain.kernels.slots import SortedSlots


def grouped_mlp_megablocks(
    x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor
) -> Tensor:
    """`grouped_mlp` on MegaBlocks: bfloat16 alone.

    Raises:
        ModuleNotFoundError: MegaBlocks, or a part of it, is not installed. ValueError: another
            dtype.
    """
    if x_TD.dtype != torch.bfloat16:
        raise UserError(
            f"experts.backend=megablocks supports bfloat16, not "
            f"{str(x_TD.dtype).removeprefix('torch.')}; use auto"
        )
    gmm = _grouped_gemm()
    ends_N = slots.ends_N.cpu()
    counts_N = torch.diff(ends_N, prepend=ends_N.new_zeros(1))
    slots = replace(slots, in_use=int(ends_N[-1]))
    idle = torch.nonzero(counts_N == 0).flatten().tolist()
    gate_up_NFD, down_NHD = (_ClearIdle.apply(bank, idle) for bank in (gate_up_NFD, down_NHD))
    # Its result has as many rows as its input but writes those in groups alone: the others are
    # never handed over.
    hidden_RF = gmm(permute(x_TD, slots), gate_up_NFD, counts_N, trans_b=True)
    gate_RH, up_RH = hidden_RF.chunk(2, dim=-1)
    y_RD = gmm(F.silu(gate_RH) * up_RH, down_NHD, counts_N)
    return unpermute(y_RD, slots, x_TD.shape[0], weights_TK)


class _ClearIdle(torch.autograd.Function):
    """Zero gradient for experts without slots, whose matrices the library may leave unwritten."""

    @staticmethod
    def forward(ctx, bank_NXY, idle):
        ctx.idle = idle
        return bank_NXY.view_as(bank_NXY)

    @staticmethod
    def backward(ctx, grad_NXY):
        if ctx.idle:
            grad_NXY[ctx.idle] = 0
        return grad_NXY, None


def _grouped_gemm() -> Callable[..., Tensor]:
    try:
        with warnings.catch_warnings():
            # It warns, and goes on without, where its grouped GEMM is missing.
            warnings.simplefilter("ignore")
            from megablocks import grouped_gemm_util
    except ImportError as error:
        raise MissingPackageError(
            f"experts.backend=megablocks needs MegaBlocks ({error}); docs/kernels.md tells how to "
            f"make its environment, or use auto"
        ) from None
    if grouped_gemm_util.ops is None:
        raise MissingPackageError(
            "experts.backend=megablocks needs the package grouped_gemm beside MegaBlocks; "
            "docs/kernels.md "
            "tells how to make its environment, or use auto"
        )
    return grouped_gemm_util.ops.gmm
