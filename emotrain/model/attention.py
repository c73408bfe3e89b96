"""Causal self-attention inside documents, with rotary positions (spec 1.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig
from emotrain.kernels import rotate_heads
from emotrain.model.varlen import attend_documents


class Attention(nn.Module):
    """Multi-head attention, no biases. Positions are those of the sequence and do not restart at
    documents."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = (
            config.num_heads,
            config.kv_heads,
            config.head_dim,
        )
        self.backend = config.experts.backend
        self.qkv = nn.Linear(
            config.d_model, (self.num_heads + 2 * self.kv_heads) * self.head_dim, bias=False
        )
        self.out = nn.Linear(self.num_heads * self.head_dim, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor, view: TokenView) -> Tensor:
        q_BSAC, k_BSAC, v_BSAC = rotate_heads(
            self.qkv(x_BSD), view.cos, view.sin, self.num_heads, self.kv_heads, self.backend
        )
        if isinstance(view.documents, DocumentEnds):
            q_TAC, k_TAC, v_TAC = (part.flatten(0, 1) for part in (q_BSAC, k_BSAC, v_BSAC))
            # The row length bounds that of its documents, which the host does not know.
            y_TAC = attend_documents(q_TAC, k_TAC, v_TAC, view.documents.edges, x_BSD.shape[1])
            return self.out(y_TAC.flatten(1).view_as(x_BSD))
        mask_B1SS = None if view.documents is None else view.documents.mask_B1SS
        y_BASC = F.scaled_dot_product_attention(
            q_BSAC.transpose(1, 2),
            k_BSAC.transpose(1, 2),
            v_BSAC.transpose(1, 2),
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=self.num_heads != self.kv_heads,
        )
        return self.out(y_BASC.transpose(1, 2).flatten(2))


def rotary_table(
    length: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, fp32 [S, C / 2]: one column for each pair of a head."""
    frequency = theta ** (
        -torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    )
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


@dataclass(frozen=True)
class DocumentMask:
    """What each token sees, as a mask."""

    mask_B1SS: Tensor
    """bool, True where a query (third axis) may see a key."""


@dataclass(frozen=True)
class DocumentEnds:
    """What each token sees, as the places where documents end: all that flash attention needs,
    and 4 bytes a document."""

    edges: Tensor
    """int32: 0, then one past the last token of each document in the flattened rows."""


@dataclass(frozen=True)
class TokenView:
    """Where each token stands and what it sees: the same for every layer."""

    cos: Tensor
    """fp32 [S, C / 2], from `rotary_table`."""
    sin: Tensor
    documents: DocumentMask | DocumentEnds | None
    """See `documents_of`; None means plain causal attention."""

    @classmethod
    def of(cls, batch: PackedBatch, head_dim: int, config: ModelConfig) -> TokenView:
        length, device = batch.tokens_BS.shape[1], batch.tokens_BS.device
        cos, sin = rotary_table(length, head_dim, config.rope_theta, device)
        return cls(cos, sin, documents_of(batch) if config.attention.document_mask else None)


def documents_of(batch: PackedBatch) -> DocumentMask | DocumentEnds:
    """A token sees itself and the earlier tokens of its own document: for flash attention where
    it runs (CUDA, bf16)."""
    flash = (
        batch.tokens_BS.is_cuda
        and torch.is_autocast_enabled("cuda")
        and torch.get_autocast_dtype("cuda") == torch.bfloat16
    )
    return document_ends(batch) if flash else document_mask(batch)


def document_mask(batch: PackedBatch) -> DocumentMask:
    length = batch.document_BS.shape[1]
    causal_SS = torch.ones(
        length, length, dtype=torch.bool, device=batch.document_BS.device
    ).tril_()
    return DocumentMask(
        ((batch.document_BS[:, :, None] == batch.document_BS[:, None, :]) & causal_SS)[:, None]
    )


def document_ends(batch: PackedBatch) -> DocumentEnds:
    tokens = batch.document_T.new_zeros(batch.num_documents + 1, dtype=torch.int32)
    tokens.scatter_add_(
        0, batch.document_T + 1, torch.ones_like(batch.document_T, dtype=torch.int32)
    )
    return DocumentEnds(tokens.cumsum(0, dtype=torch.int32))
