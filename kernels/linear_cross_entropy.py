"""Output head and loss in one pass over blocks of tokens, so that the [T, V] logits never exist
as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emotrain.kernels.backends import choose_backend

IGNORE = -100
BLOCK_BYTES = 4 << 20
"""Logits of one block in the precision of the loss: small enough to stay in a core's cache, large
enough for a full-speed GEMM."""
GPU_BLOCK_BYTES = 1 << 30
"""The same on a GPU, where the head's gradient is read and written for each block: at the published
vocabulary blocks of 4 to 5 thousand tokens, whose logits stay in bfloat16."""
GPU_BLOCK_MULTIPLE = 128
"""Tokens of a block are a multiple of this: of the rows of a GEMM's tile."""


OfBlock = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor, Tensor | None]]


class HeadGradient:
    """The gradient of the output head, summed over micro-batches in the precision of the loss: one
    [V, D] however many forward passes come before the first backward.

    Forward passes add to it. The first backward after them where it is due takes all of it, and the
    others give none. So the losses that share one must get the same gradient from above, as those
    of the micro-batches of a step do, all divided by the step's count; and backward runs once.
    """

    def __init__(self) -> None:
        self.is_due = True
        """Whether backward takes it. Processes that sum their gradients take it once a step."""
        self._sum_VD: Tensor | None = None

    def add(self, grad_tV: Tensor, hidden_tD: Tensor, dtype: torch.dtype) -> None:
        """Add grad.T @ hidden, the gradient of a block of tokens."""
        is_first = self._sum_VD is None
        if self._sum_VD is None:
            self._sum_VD = hidden_tD.new_empty(grad_tV.shape[1], hidden_tD.shape[1], dtype=dtype)
        add_product(self._sum_VD, grad_tV.t(), hidden_tD, beta=0 if is_first else 1)

    def take(self) -> Tensor | None:
        """The sum, which starts anew; None where nothing was added."""
        taken, self._sum_VD = self._sum_VD, None
        return taken


def linear_cross_entropy(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    z_weight: float,
    backend: str = "auto",
    head_gradient: HeadGradient | None = None,
    of_block: OfBlock | None = None,
    note: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens of cross entropy and squared log-normaliser of `hidden @ head.T` (spec 5).

    Gradients are formed in the forward pass, block by block, while a block's logits are there;
    backward only scales them. Logits have the dtype of `hidden`; what is computed from them,
    their sums and the sum of the head's gradient are fp32 at least. The gradient of the logits has
    the dtype of `hidden` again.

    Args:
        hidden_TD: final hidden states.
        head_VD: output head.
        targets_T: int64 token ids; -100 where no loss is taken.
        z_weight: weight of logsumexp(logits)^2 in the differentiable sum.
        backend: see `choose_backend`, also for errors.
        head_gradient: shared with the other micro-batches of a step, see there; by default the
            gradient of the head is of this call alone.
        of_block: another loss, in place of `_in_torch` (the arguments and results are the same).
        note: is given the cross entropy of each token [t], block after block.
    Returns:
        (loss, cross_entropy, z): scalars. loss = cross_entropy + z_weight * z carries the gradient;
        the others do not.
    """
    if of_block is None:
        of_block = _in_triton if choose_backend(backend, hidden_TD) == "triton" else _in_torch
    return _LinearCrossEntropy.apply(
        hidden_TD, head_VD, targets_T, z_weight, of_block, head_gradient, note
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, targets_T, z_weight, of_block, head_gradient, note):
        hidden_needs_grad, head_needs_grad = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        cross_entropy = hidden_TD.new_zeros((), dtype=dtype)
        z = torch.zeros_like(cross_entropy)
        grad_hidden_TD = torch.empty_like(hidden_TD) if hidden_needs_grad else None
        own_gradient = HeadGradient() if head_gradient is None else head_gradient
        itemsize = (hidden_TD if of_block is _in_triton else cross_entropy).itemsize
        on_gpu = hidden_TD.is_cuda or hidden_TD.is_meta
        block = block_tokens(hidden_TD.shape[0], head_VD.shape[0] * itemsize, on_gpu)
        for start in range(0, hidden_TD.shape[0], block):
            hidden_tD, target_t = hidden_TD[start : start + block], targets_T[start : start + block]
            cross_entropy_t, z_t, grad_tV = of_block(
                hidden_tD, head_VD, target_t, z_weight, hidden_needs_grad or head_needs_grad
            )
            cross_entropy += cross_entropy_t.sum()
            z += z_t.sum()
            if note is not None:
                note(cross_entropy_t)
            if hidden_needs_grad:
                torch.mm(grad_tV, head_VD, out=grad_hidden_TD[start : start + block])
            if head_needs_grad:
                own_gradient.add(grad_tV, hidden_tD, dtype)
            del grad_tV  # before the next block's logits
        ctx.head_gradient, ctx.head_dtype = head_gradient, head_VD.dtype
        grad_head_VD = own_gradient.take() if head_gradient is None else None
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD)
        ctx.mark_non_differentiable(cross_entropy, z)
        return cross_entropy + z_weight * z, cross_entropy, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_cross_entropy, _grad_z):
        grad_hidden_TD, grad_head_VD = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            grad_hidden_TD = _scaled(grad_hidden_TD, grad_loss, grad_hidden_TD.dtype)
        if ctx.head_gradient is not None and ctx.head_gradient.is_due and ctx.needs_input_grad[1]:
            grad_head_VD = ctx.head_gradient.take()
        if grad_head_VD is not None:
            grad_head_VD = _scaled(grad_head_VD, grad_loss, ctx.head_dtype)
        return grad_hidden_TD, grad_head_VD, None, None, None, None, None


def block_tokens(num_tokens: int, token_bytes: int, on_gpu: bool) -> int:
    """Tokens of a block, whose logits take `token_bytes` each. On a GPU a multiple of 128, and of
    several blocks none is much smaller than the others."""
    if not on_gpu:
        return max(1, BLOCK_BYTES // token_bytes)
    multiple = GPU_BLOCK_MULTIPLE
    most = max(1, GPU_BLOCK_BYTES // (token_bytes * multiple)) * multiple
    blocks = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // (blocks * multiple))) * multiple


def _in_torch(
    hidden_tD: Tensor, head_VD: Tensor, target_t: Tensor, z_weight: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross entropy and squared log-normaliser of each token, and the gradient of its logits."""
    wide_tV = (hidden_tD @ head_VD.t()).to(torch.promote_types(hidden_tD.dtype, torch.float32))
    counted_t = target_t != IGNORE
    index_t1 = torch.where(counted_t, target_t, 0)[:, None]
    target_logit_t = wide_tV.gather(1, index_t1)[:, 0]
    max_t1 = wide_tV.amax(dim=1, keepdim=True)
    exp_tV = wide_tV.sub_(max_t1).exp_()
    sum_t = exp_tV.sum(dim=1)
    lse_t = sum_t.log() + max_t1[:, 0]
    cross_entropy_t = torch.where(counted_t, lse_t - target_logit_t, 0)
    z_t = torch.where(counted_t, lse_t.square(), 0)
    if not needs_grad:
        return cross_entropy_t, z_t, None
    # d(lse - logit_target + w lse^2) / dlogits = (1 + 2 w lse) softmax - onehot(target)
    scale_t = torch.where(counted_t, (1 + 2 * z_weight * lse_t) / sum_t, 0)
    grad_tV = exp_tV.mul_(scale_t[:, None]).scatter_add_(
        1, index_t1, -counted_t[:, None].to(exp_tV.dtype)
    )
    return cross_entropy_t, z_t, grad_tV.to(hidden_tD.dtype)


def _in_triton(
    hidden_tD: Tensor, head_VD: Tensor, target_t: Tensor, z_weight: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_in_torch` in Triton: the gradient takes the place of the logits."""
    from emotrain.kernels.triton_cross_entropy import cross_entropy_triton

    logits_tV = hidden_tD @ head_VD.t()
    return *cross_entropy_triton(logits_tV, target_t, z_weight, IGNORE, needs_grad), logits_tV


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a @ b in place, `beta` 0 or 1. `total` may be wider than `a` and `b`:
    a GPU's GEMM sums in its precision, while a CPU rounds the product to theirs."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif beta:
        total += a @ b
    else:
        total.copy_(a @ b)


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a scalar, multiplied in the wider of their precisions and rounded once."""
    return torch.mul(x, scale.view(1, 1), out=x.new_empty(x.shape, dtype=dtype))
