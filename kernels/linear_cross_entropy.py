"""Output head and loss in one pass over blocks of tokens, so that the [T, V] logits never exist
as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100
BLOCK_BYTES = 4 << 20
"""Logits of one block: small enough to stay in a core's cache, large enough for a full-speed
GEMM."""
GPU_BLOCK_BYTES = 512 << 20
"""The same on a GPU, where a block is a dozen launches: at the published vocabulary 13 blocks a
micro-batch."""


def linear_cross_entropy(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens of cross entropy and squared log-normaliser of `hidden @ head.T` (spec 5).

    Gradients are formed in the forward pass, block by block, while a block's logits are in cache;
    backward only scales them. Logits and sums are fp32 at least.

    Args:
        hidden_TD: final hidden states.
        head_VD: output head.
        targets_T: int64 token ids; -100 where no loss is taken.
        z_weight: weight of logsumexp(logits)^2 in the differentiable sum.
    Returns:
        (loss, cross_entropy, z): scalars. loss = cross_entropy + z_weight * z carries the gradient;
        the others do not.
    """
    return _LinearCrossEntropy.apply(hidden_TD, head_VD, targets_T, z_weight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, targets_T, z_weight):
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        compute_dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        cross_entropy = hidden_TD.new_zeros((), dtype=compute_dtype)
        z = torch.zeros_like(cross_entropy)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_grad else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=compute_dtype) if needs_grad else None
        block_bytes = GPU_BLOCK_BYTES if hidden_TD.is_cuda else BLOCK_BYTES
        block = max(1, block_bytes // (head_VD.shape[0] * compute_dtype.itemsize))
        for start in range(0, hidden_TD.shape[0], block):
            hidden_tD, target_t = hidden_TD[start : start + block], targets_T[start : start + block]
            logits_tV = (hidden_tD @ head_VD.t()).to(compute_dtype)
            counted_t = target_t != IGNORE
            index_t1 = torch.where(counted_t, target_t, 0)[:, None]
            target_logit_t = logits_tV.gather(1, index_t1)[:, 0]
            max_t1 = logits_tV.amax(dim=1, keepdim=True)
            exp_tV = logits_tV.sub_(max_t1).exp_()
            sum_t = exp_tV.sum(dim=1)
            lse_t = sum_t.log() + max_t1[:, 0]
            cross_entropy += torch.where(counted_t, lse_t - target_logit_t, 0).sum()
            z += torch.where(counted_t, lse_t.square(), 0).sum()
            if needs_grad:
                # d(lse - logit_target + w lse^2) / dlogits = (1 + 2 w lse) softmax - onehot(target)
                scale_t = torch.where(counted_t, (1 + 2 * z_weight * lse_t) / sum_t, 0)
                grad_tV = exp_tV.mul_(scale_t[:, None]).scatter_add_(
                    1, index_t1, -counted_t[:, None].to(compute_dtype)
                )
                grad_tV = grad_tV.to(hidden_TD.dtype)
                torch.mm(grad_tV, head_VD, out=grad_hidden_TD[start : start + block])
                if grad_tV.dtype == compute_dtype:
                    grad_head_VD.addmm_(grad_tV.t(), hidden_tD)
                else:
                    grad_head_VD += grad_tV.t() @ hidden_tD
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(cross_entropy, z)
        return cross_entropy + z_weight * z, cross_entropy, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_cross_entropy, _grad_z):
        grad_hidden_TD, grad_head_VD = ctx.saved_tensors
        return (
            grad_hidden_TD * grad_loss.to(grad_hidden_TD.dtype),
            (grad_head_VD * grad_loss).to(ctx.head_dtype),
            None,
            None,
        )
