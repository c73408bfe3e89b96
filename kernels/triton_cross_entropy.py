"""Triton kernel of the cross entropy of a block of logits, whose gradient takes their place.

The logits of a token are read twice and written once. One program has a token, so that sums have
one order and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emotrain.kernels.cost import Cost
from emotrain.kernels.triton_launch import check_operands, launch

LANES, WARPS = 1024, 16
"""Logits that a program holds at a time, in pieces of 16 bytes: two pieces a thread. Each lane has
a running maximum and sum of its own, so that no thread waits for another within the loop."""
PIECE_BYTES = 16


def cross_entropy_triton(
    logits_tV: Tensor, target_t: Tensor, z_weight: float, ignore: int, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Cross entropy and squared log-normaliser of each token, fp32 and 0 where the target is
    `ignore`; NaN where it is no token of the vocabulary. Computed in fp32.

    Args:
        logits_tV: bfloat16 or float32; with `needs_grad` overwritten by the gradient of the sum of
            cross entropies plus `z_weight` times that of the squares.
    """
    check_operands("linear_cross_entropy", logits_tV)
    num_tokens, vocab = logits_tV.shape
    cross_entropy_t, z_t = (logits_tV.new_empty(num_tokens, dtype=torch.float32) for _ in range(2))
    gradient = logits_tV if needs_grad else None
    launch(
        cross_entropy_kernel,
        (num_tokens,),
        None,
        # Forward and backward each pass over all logits.
        Cost(reads=(logits_tV, gradient, target_t), writes=(cross_entropy_t, z_t, gradient)),
        logits_tV,
        target_t,
        cross_entropy_t,
        z_t,
        float(z_weight),
        V=vocab,
        IGNORE=ignore,
        NEEDS_GRAD=needs_grad,
        LANES=LANES,
        PIECE=PIECE_BYTES // logits_tV.itemsize,
        num_warps=WARPS,
    )
    return cross_entropy_t, z_t


@triton.jit
def cross_entropy_kernel(
    logits_tV,
    target_t,
    cross_entropy_t,
    z_t,
    z_weight,
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    LANES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """lse - logit[target] and lse^2 of one token; the gradient over its logits."""
    token = tl.program_id(0)
    row = logits_tV + token.to(tl.int64) * V
    target = tl.load(target_t + token)
    v = tl.arange(0, LANES)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    if target == IGNORE:
        tl.store(cross_entropy_t + token, 0.0)
        tl.store(z_t + token, 0.0)
        if NEEDS_GRAD:
            zero = tl.zeros((LANES, PIECE), dtype=logits_tV.dtype.element_ty)
            for start in range(0, V, LANES * PIECE):
                tl.store(row + start + v, zero, mask=start + v < V)
    else:
        in_vocabulary = (target >= 0) & (target < V)
        target_logit = tl.load(row + target, mask=in_vocabulary, other=float("nan")).to(tl.float32)
        # Less than any logit, and finite: lanes beyond the vocabulary have nothing else.
        max_l = tl.full((LANES,), -3.0e38, dtype=tl.float32)
        sum_l = tl.zeros((LANES,), dtype=tl.float32)
        for start in range(0, V, LANES * PIECE):
            x = tl.load(row + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32)
            new_l = tl.maximum(max_l, tl.max(x, axis=1))
            sum_l = sum_l * tl.exp(max_l - new_l) + tl.sum(tl.exp(x - new_l[:, None]), axis=1)
            max_l = new_l
        peak = tl.max(max_l, axis=0)
        total = tl.sum(sum_l * tl.exp(max_l - peak), axis=0)
        lse = peak + tl.log(total)
        tl.store(cross_entropy_t + token, tl.log(total) + (peak - target_logit))
        tl.store(z_t + token, lse * lse)
        if NEEDS_GRAD:
            # d(lse - logit_target + w lse^2) / dlogits = (1 + 2 w lse) softmax - onehot(target)
            scale = (1 + 2 * z_weight * lse) / total
            for start in range(0, V, LANES * PIECE):
                inside = start + v < V
                x = tl.load(row + start + v, mask=inside, other=-float("inf")).to(tl.float32)
                grad = scale * tl.exp(x - peak) - tl.where(start + v == target, 1.0, 0.0)
                tl.store(row + start + v, grad.to(logits_tV.dtype.element_ty), mask=inside)
