"""What a block does to each token by itself, between its matrix products: RMSNorm, rotary
positions, SwiGLU.

Each is one autograd function that keeps what backward cannot make again, in the type it came in.
The passes over the rows are those of `InTorch`, to be read, or the functions of the same names in
triton_rowwise.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.kernels.backends import choose_backend


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """x / rms(x) * weight along the last axis, in fp32 at least, returned in the dtype of x. Keeps
    x and a number a row.

    Args:
        x: [..., D].
        weight_D: of the dtype of x.
        eps: added to the mean square.
        backend: see `choose_backend`, also for errors.
    """
    return _RMSNorm.apply(x.contiguous(), weight_D, eps, _passes(backend, x))


def rotate_heads(
    qkv_BSF: Tensor, cos: Tensor, sin: Tensor, num_heads: int, kv_heads: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a projection -> [B, S, heads, C] each, the first two turned by
    their positions (rotary embedding) in fp32 at least. Keeps nothing but the angles.

    In place: the three are views of `qkv_BSF`, which nobody may need as it was. A linear layer does
    not need its result.

    Args:
        qkv_BSF: contiguous; heads of queries, of keys, of values.
        cos, sin: fp32 [S, C / 2]; pairs of a head are (i, i + C / 2).
        backend: see `choose_backend`, also for errors.
    """
    heads = [num_heads, kv_heads, kv_heads]
    return _RotateHeads.apply(qkv_BSF, cos, sin, heads, _passes(backend, qkv_BSF))


def swiglu_down(hidden_XF: Tensor, down_XD: Tensor, backend: str = "auto") -> Tensor:
    """(silu(gate) * up) @ down -> [T, D]. Keeps `hidden_XF`; the product is made again.

    Args:
        hidden_XF: [T, M, F] or [T, F], gate and up side by side; contiguous.
        down_XD: [M * H, D], of the same dtype.
        backend: see `choose_backend`, also for errors.
    """
    return _SwiGLUDown.apply(hidden_XF, down_XD, _passes(backend, hidden_XF))


def _passes(backend: str, tensor: Tensor) -> Any:
    """Where the passes are written: torch.compile fuses those that it can read."""
    if torch.compiler.is_compiling() or choose_backend(backend, tensor, 1) != "triton":
        return InTorch
    from emotrain.kernels import triton_rowwise

    return triton_rowwise


def wide_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight.T in fp32 at least -> [T, E]. Autograd would keep a wide copy of x; this keeps x,
    which the experts keep too."""
    return _WideLinear.apply(x_TD, weight_ED)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps, passes):
        y, scale = passes.normalize(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        ctx.passes = passes
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *ctx.passes.normalize_backward(grad, *ctx.saved_tensors), None, None


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_BSF, cos, sin, heads, passes):
        qkv_BSAC = qkv_BSF.unflatten(-1, (sum(heads), -1))
        passes.rotate_(qkv_BSAC, heads[0] + heads[1], cos, sin)
        ctx.save_for_backward(cos, sin)
        ctx.passes = passes
        return qkv_BSAC.split(heads, dim=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return ctx.passes.rotate_back(*grads, *ctx.saved_tensors), None, None, None, None


class _SwiGLUDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_XF, down_XD, passes):
        ctx.save_for_backward(hidden_XF, down_XD)
        ctx.passes = passes
        return passes.swiglu(hidden_XF).flatten(1) @ down_XD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        hidden_XF, down_XD = ctx.saved_tensors
        *sizes, inner = hidden_XF.shape
        grad_act_XH = (grad_TD @ down_XD.t()).view(*sizes, inner // 2)
        grad_hidden_XF, act_XH = ctx.passes.swiglu_backward(grad_act_XH, hidden_XF)
        return grad_hidden_XF, act_XH.flatten(1).t() @ grad_TD, None


class InTorch:
    """The passes in PyTorch."""

    @staticmethod
    def normalize(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x * scale * weight, and scale = 1 / rms(x): [..., 1], fp32 at least."""
        wide = widened(x)
        # On a CPU torch's own rms_norm falls apart into fifteen passes over x; these four save 6 %
        # of a training step at d_model 128.
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return (wide * scale).mul_(weight_D).to(x.dtype), scale

    @staticmethod
    def normalize_backward(
        grad: Tensor, x: Tensor, weight_D: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""
        grad, wide, weight_D = widened(grad), widened(x), widened(weight_D)
        grad_x = grad * wide
        grad_weight_D = grad_x.flatten(0, -2).t() @ scale.flatten()
        # d scale / dx = -scale^3 x / D, so that
        # grad_x = scale weight grad - x scale^3 sum(weight grad x) / D
        from_scale = (grad_x @ weight_D)[..., None].mul_(scale.pow(3)).div_(-x.shape[-1])
        grad_x = (grad * weight_D).mul_(scale).addcmul_(wide, from_scale)
        return grad_x.to(x.dtype), grad_weight_D.to(x.dtype)

    @staticmethod
    def rotate_(x_BSAC: Tensor, num_turned: int, cos: Tensor, sin: Tensor) -> None:
        """Turn every pair of the first heads by the angle of its position, in place."""
        x_BSAC = x_BSAC[:, :, :num_turned]
        wide = widened(x_BSAC)
        cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
        first, second = wide.chunk(2, dim=-1)
        turned = (first * cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).addcmul_(first, sin)
        first.copy_(turned)
        if wide is not x_BSAC:
            x_BSAC.copy_(wide)

    @staticmethod
    def rotate_back(
        grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """The gradient of a rotation is the rotation back -> that of the projection [B, S, F]."""
        grad_BSAC = torch.cat((grad_q, grad_k, grad_v), dim=2)
        InTorch.rotate_(grad_BSAC, grad_q.shape[2] + grad_k.shape[2], cos, -sin)
        return grad_BSAC.flatten(2)

    @staticmethod
    def swiglu(hidden_XF: Tensor) -> Tensor:
        """silu(gate) * up."""
        gate_XH, up_XH = hidden_XF.chunk(2, dim=-1)
        return F.silu(gate_XH).mul_(up_XH)

    @staticmethod
    def swiglu_backward(grad_act_XH: Tensor, hidden_XF: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of `hidden_XF`, and silu(gate) * up once more."""
        gate_XH, up_XH = hidden_XF.chunk(2, dim=-1)
        silu_XH = F.silu(gate_XH)
        grad_gate_XH = torch.ops.aten.silu_backward(grad_act_XH * up_XH, gate_XH)
        grad_hidden_XF = torch.cat((grad_gate_XH, grad_act_XH * silu_XH), dim=-1)
        return grad_hidden_XF, silu_XH.mul_(up_XH)


def widened(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        return widened(x_TD) @ widened(weight_ED).t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TE):
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD = (grad_TE @ widened(weight_ED)).to(x_TD.dtype)
        return grad_x_TD, (grad_TE.t() @ widened(x_TD)).to(weight_ED.dtype)
