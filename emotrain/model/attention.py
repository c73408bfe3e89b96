"""Causal self-attention inside documents, with rotary positions (spec 1.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emotrain.config import ModelConfig


class Attention(nn.Module):
    """Multi-head attention, no biases. Positions are those of the sequence and do not restart at documents."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.qkv = nn.Linear(config.d_model, (self.num_heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(self.num_heads * self.head_dim, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask_B1SS: Tensor | None) -> Tensor:
        """`mask_B1SS`: bool, True where a query (third axis) may see a key; None means plain causal attention."""
        heads = self.qkv(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk_BASC, v_BASC = heads.split((self.num_heads + self.kv_heads, self.kv_heads), dim=1)
        q_BASC, k_BASC = rotate(qk_BASC, *rotary).split((self.num_heads, self.kv_heads), dim=1)
        y_BASC = F.scaled_dot_product_attention(q_BASC, k_BASC, v_BASC, attn_mask=mask_B1SS, is_causal=mask_B1SS is None,
                                                enable_gqa=self.num_heads != self.kv_heads)
        return self.out(y_BASC.transpose(1, 2).flatten(2))


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, fp32 [S, C / 2]: one column for each pair of a head."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BASC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in fp32: pairs are (i, i + C / 2); `cos` and `sin` from `rotary_table`."""
    dtype = torch.promote_types(x_BASC.dtype, torch.float32)
    return _Rotate.apply(x_BASC.to(dtype), cos.to(dtype), sin.to(dtype)).to(x_BASC.dtype)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing is kept but the angles, and half the passes of autograd's."""

    @staticmethod
    def forward(ctx, x_BASC, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _Rotate.rotated(x_BASC, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BASC):
        cos, sin = ctx.saved_tensors
        return _Rotate.rotated(grad_BASC, cos, -sin), None, None

    @staticmethod
    def rotated(x_BASC, cos, sin):
        y_BASC = x_BASC * cos.repeat(1, 2)
        (first, second), (y_first, y_second) = x_BASC.chunk(2, dim=-1), y_BASC.chunk(2, dim=-1)
        y_first.addcmul_(second, sin, value=-1)
        y_second.addcmul_(first, sin)
        return y_BASC


def document_mask(document_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S]: a token sees itself and the earlier tokens of its own document."""
    length = document_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=document_BS.device).tril_()
    return ((document_BS[:, :, None] == document_BS[:, None, :]) & causal_SS)[:, None]
