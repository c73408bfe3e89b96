"""A forward pass over the new tokens of several sequences, with the keys and values of earlier ones
in a cache.

Weights and arithmetic are those of `emotrain.model`: the same norms, rotation, router and experts.
Only attention differs, which reads the cache, and what training alone needs is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.generation.cache import PAGE, KVCache
from emotrain.generation.ragged import Piece, RaggedBatch
from emotrain.generation.seats import Seats, StepSeats
from emotrain.kernels import rotate_heads, sort_slots
from emotrain.kernels.backends import choose_backend
from emotrain.kernels.rowwise import wide_linear
from emotrain.model.attention import rotary_table
from emotrain.model.moe import MoELayer
from emotrain.model.router import route
from emotrain.model.transformer import Block, Transformer


class CachedModel:
    """A model, its cache, and the seats of its sequences."""

    def __init__(self, model: Transformer, cache: KVCache, seats: Seats, max_length: int):
        self.model, self.cache, self.seats = model, cache, seats
        weight = model.embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        config = model.config
        self.cos, self.sin = rotary_table(
            max_length, config.head_dim, config.rope_theta, weight.device
        )

    def hidden(self, batch: RaggedBatch, step: StepSeats) -> Tensor:
        """Normed final hidden states [X, D] of the tokens that the batch wants. Keys and values of
        all its tokens are in the cache afterwards."""
        x_TD = self.model.embedding(batch.tokens_T)
        cos, sin = self.cos[batch.positions_T], self.sin[batch.positions_T]
        for layer, block in enumerate(self.model.blocks):
            x_TD = x_TD + self._attend(layer, block, x_TD, (cos, sin), batch)
            x_TD = x_TD + self._experts(layer, block.moe, block.moe_norm(x_TD), step)
        return self.model.norm(x_TD if batch.outputs_X is None else x_TD[batch.outputs_X])

    def logits(self, hidden_XD: Tensor) -> Tensor:
        return self.model.head(hidden_XD)

    def _attend(
        self,
        layer: int,
        block: Block,
        x_TD: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: RaggedBatch,
    ) -> Tensor:
        attention = block.attention
        heads = attention.num_heads
        qkv_TF = attention.qkv(block.attention_norm(x_TD))
        rotate_heads(
            qkv_TF[None], *angles, heads, attention.kv_heads, attention.backend
        )  # in place
        qkv_TAC = qkv_TF.unflatten(1, (-1, attention.head_dim))
        q_TAC, kv_TAC = qkv_TAC[:, :heads], qkv_TAC[:, heads:]
        store = self.cache.layers[layer]
        store.view(-1, *store.shape[2:]).index_copy_(0, batch.rows_T, kv_TAC)
        y_TF = attend_cached(q_TAC, kv_TAC, store, batch)
        return attention.out(y_TF)

    def _experts(self, layer: int, moe: MoELayer, x_TD: Tensor, step: StepSeats) -> Tensor:
        router, experts, shared = moe.router, moe.experts, moe.shared
        if router is None or experts is None:
            assert shared is not None, "a dense layer has shared experts"
            return shared(x_TD)
        logits_TE = wide_linear(x_TD, router.weight_ED.to(x_TD.dtype))
        num_routed = router.num_routed
        logits_TN = self.seats.restrict(layer, logits_TE[:, :num_routed], step)
        _, weights_TK, experts_TK = route(
            logits_TN, router.num_chosen, router.config.gating, router.config.normalize_weights
        )
        backend = choose_backend(experts.backend, x_TD, num_routed)
        y_TD = experts(x_TD, weights_TK, sort_slots(experts_TK, num_routed, backend=backend))
        if shared is None:
            return y_TD
        return y_TD + shared(x_TD, router.shared_weights(logits_TE))


def attend_cached(q_TAC: Tensor, kv_TAC: Tensor, store: Tensor, batch: RaggedBatch) -> Tensor:
    """Each new token attends to the tokens of its sequence up to itself -> [T, A * C].

    Args:
        q_TAC: rotated queries.
        kv_TAC: rotated keys, then values, of the new tokens; heads of keys divide those of queries.
        store: the layer's pages, which hold them already.
    """
    parts = []
    if batch.pages_BX is not None:
        parts.append(_attend_singles(q_TAC[: batch.singles], store, batch))
    for piece in batch.pieces:
        span = slice(piece.first, piece.first + piece.count)
        parts.append(_attend_piece(q_TAC[span], kv_TAC[span], store, piece))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_singles(q_BAC: Tensor, store: Tensor, batch: RaggedBatch) -> Tensor:
    """One token of each sequence. Query heads that share a key head are its queries: with one
    token, all of them see the same keys."""
    pages_BX = batch.pages_BX
    assert pages_BX is not None
    k_BAYC, v_BAYC = _read(store, pages_BX, batch.length)
    kv_heads = k_BAYC.shape[1]
    y_BAXC = F.scaled_dot_product_attention(
        q_BAC.unflatten(1, (kv_heads, -1)), k_BAYC, v_BAYC, attn_mask=batch.mask_B11Y
    )
    return y_BAXC.reshape(q_BAC.shape[0], -1)


def _attend_piece(q_tAC: Tensor, kv_tAC: Tensor, store: Tensor, piece: Piece) -> Tensor:
    """Several tokens of one sequence, with those before them."""
    mask_tY = None
    if piece.pages_X is None:
        k_1AYC, v_1AYC = (part.transpose(0, 1)[None] for part in kv_tAC.chunk(2, dim=1))
    else:
        k_1AYC, v_1AYC = _read(store, piece.pages_X[None], piece.length)
        before = piece.length - piece.count
        mask_tY = torch.ones(
            piece.count, piece.length, dtype=torch.bool, device=q_tAC.device
        ).tril_(before)
    y_1AtC = F.scaled_dot_product_attention(
        q_tAC.transpose(0, 1)[None],
        k_1AYC,
        v_1AYC,
        attn_mask=mask_tY,
        is_causal=mask_tY is None,
        enable_gqa=k_1AYC.shape[1] != q_tAC.shape[1],
    )
    return y_1AtC[0].transpose(0, 1).flatten(1)


def _read(store: Tensor, pages_BX: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, A, Y, C] of the first `length` tokens of sequences with these pages."""
    num, used = pages_BX.shape[0], -(-length // PAGE)
    pages_X = pages_BX[:, :used].reshape(-1)
    kv_BYAC = store.index_select(0, pages_X).view(num, used * PAGE, *store.shape[2:])[:, :length]
    k_BYAC, v_BYAC = kv_BYAC.chunk(2, dim=2)
    return k_BYAC.transpose(1, 2), v_BYAC.transpose(1, 2)
