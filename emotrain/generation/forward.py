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
from emotrain.kernels import cpu_rows, rotate_heads, sort_slots
from emotrain.kernels.backends import choose_backend
from emotrain.kernels.rowwise import wide_linear
from emotrain.model.attention import rotary_table
from emotrain.model.moe import MoELayer
from emotrain.model.parts import stored_tensors
from emotrain.model.router import DocumentPoolRouter, route
from emotrain.model.transformer import Block, Transformer
from emotrain.modular.lazy_experts import LazyExperts


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
        self._attend_rows = cpu_rows.Attend(
            config.num_heads, config.kv_heads, config.head_dim, PAGE, config.norm_eps
        )
        self.has_rows = config.experts.backend == "auto" and cpu_rows.can_run(*_weights(model))
        """Whether `hidden` of few tokens runs in the kernel of cpu_rows: a token is then the same
        to the bit in every batch."""

    def hidden(self, batch: RaggedBatch, step: StepSeats, rows: bool = False) -> Tensor:
        """Normed final hidden states [X, D] of the tokens that the batch wants. Keys and values of
        all its tokens are in the cache afterwards.

        Args:
            rows: use the kernel for few tokens, where the model has it.
        """
        x_TD = self.model.embedding(batch.tokens_T)
        if rows:
            self._through_rows(x_TD, batch, step)
        else:
            angles = self.cos[batch.positions_T], self.sin[batch.positions_T]
            for layer, block in enumerate(self.model.blocks):
                x_TD = x_TD + self._attend(layer, block, x_TD, angles, batch)
                x_TD = x_TD + self._experts(layer, block.moe, block.moe_norm(x_TD), step)
        return self.model.norm(x_TD if batch.outputs_X is None else x_TD[batch.outputs_X])

    def logits(self, hidden_XD: Tensor, rows: bool = False) -> Tensor:
        """[X, V]."""
        if rows:
            return cpu_rows.linear(hidden_XD, self.model.head.weight)
        return self.model.head(hidden_XD)

    # ---- few tokens

    def _through_rows(self, x_TD: Tensor, batch: RaggedBatch, step: StepSeats) -> None:
        """All blocks, in place."""
        angles, tokens = (
            (self.cos, self.sin),
            (batch.positions_T, batch.rows_T, batch.sequences_T),
        )
        for layer, block in enumerate(self.model.blocks):
            moe, attention = block.moe, block.attention
            weights = (
                block.attention_norm.weight,
                attention.qkv.weight,
                attention.out.weight,
                block.moe_norm.weight,
                None if moe.router is None else moe.router.weight_ED,
            )
            normed_TD, logits_TE = self._attend_rows(
                x_TD, weights, angles, self.cache.layers[layer], tokens, batch.pages_BX
            )
            if moe.router is not None and moe.experts is not None:
                routed = self._route_rows(layer, moe.router, logits_TE, step)
                if isinstance(moe.experts, LazyExperts):
                    moe.experts.add_rows(x_TD, normed_TD, *routed)
                else:
                    banks = moe.experts.gate_up_NFD, moe.experts.down_NHD
                    cpu_rows.add_experts(x_TD, normed_TD, *routed, *banks)
            if moe.shared is not None:
                shared = None
                if moe.router is not None:
                    shared = moe.router.shared_weights(logits_TE)
                banks = moe.shared.gate_up_MFD, moe.shared.down_MHD
                cpu_rows.add_experts(x_TD, normed_TD, shared, None, *banks)

    def _route_rows(
        self, layer: int, router: DocumentPoolRouter, logits_TE: Tensor, step: StepSeats
    ) -> tuple[Tensor, Tensor]:
        """As `_route`."""
        if step.scored_X is not None:
            self.seats.score(layer, logits_TE[:, : router.num_routed], step)
        return cpu_rows.route(
            logits_TE,
            (router.num_routed, router.num_chosen),
            (router.config.gating == "sigmoid", router.config.normalize_weights),
            self.seats.pool[layer] if step.restricted else None,
            step.seats_T,
            router.choice_bias_N,
        )

    # ---- many tokens

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
        # In place.
        rotate_heads(qkv_TF[None], *angles, heads, attention.kv_heads, attention.backend)
        qkv_TAC = qkv_TF.unflatten(1, (-1, attention.head_dim))
        q_TAC, kv_TAC = qkv_TAC[:, :heads], qkv_TAC[:, heads:]
        store = self.cache.layers[layer]
        store.view(-1, *store.shape[2:]).index_copy_(0, batch.rows_T, kv_TAC)
        return attention.out(attend_cached(q_TAC, kv_TAC, store, batch))

    def _experts(self, layer: int, moe: MoELayer, x_TD: Tensor, step: StepSeats) -> Tensor:
        router, experts, shared = moe.router, moe.experts, moe.shared
        if router is None or experts is None:
            assert shared is not None, "a dense layer has shared experts"
            return shared(x_TD)
        logits_TE = wide_linear(x_TD, router.weight_ED.to(x_TD.dtype))
        weights_TK, experts_TK = self._route(layer, router, logits_TE, step)
        num_routed = router.num_routed
        backend = choose_backend(experts.backend, x_TD, num_routed)
        y_TD = experts(x_TD, weights_TK, sort_slots(experts_TK, num_routed, backend=backend))
        if shared is None:
            return y_TD
        return y_TD + shared(x_TD, router.shared_weights(logits_TE))

    def _route(
        self, layer: int, router: DocumentPoolRouter, logits_TE: Tensor, step: StepSeats
    ) -> tuple[Tensor, Tensor]:
        """Weights and routed experts of each token, [T, K], inside of what its sequence may use."""
        logits_TN = self.seats.restrict(layer, logits_TE[:, : router.num_routed], step)
        config = router.config
        _, weights_TK, experts_TK = route(
            logits_TN,
            router.num_chosen,
            config.gating,
            config.normalize_weights,
            choice_bias_N=router.choice_bias_N,
        )
        return weights_TK, experts_TK


def _weights(model: Transformer) -> list[Tensor]:
    """All weights: the kernel reads them where they lie."""
    banks = [bank for bank in model.expert_banks() if isinstance(bank, LazyExperts)]
    stores = [part for bank in banks for part in (bank.store.gate_up_XFD, bank.store.down_XHD)]
    return [*stored_tensors(model).values(), *stores]


# ---- attention in torch


def attend_cached(q_TAC: Tensor, kv_TAC: Tensor, store: Tensor, batch: RaggedBatch) -> Tensor:
    """Each new token attends to the tokens of its sequence up to itself -> [T, A * C].

    Args:
        q_TAC: rotated queries.
        kv_TAC: rotated keys, then values, of the new tokens; heads of keys divide those of queries.
        store: the layer's pages, which hold them already.
    """
    parts = []
    if batch.singles:
        parts.append(_attend_singles(q_TAC[: batch.singles], store, batch))
    for piece in batch.pieces:
        span = slice(piece.first, piece.first + piece.count)
        parts.append(_attend_piece(q_TAC[span], kv_TAC[span], store, piece))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_singles(q_BAC: Tensor, store: Tensor, batch: RaggedBatch) -> Tensor:
    """One token of each sequence. Query heads that share a key head are its queries: with one
    token, all of them see the same keys."""
    k_BAYC, v_BAYC = _read(store, batch.pages_BX[: batch.singles], batch.length)
    kv_heads = k_BAYC.shape[1]
    y_BAXC = F.scaled_dot_product_attention(
        q_BAC.unflatten(1, (kv_heads, -1)), k_BAYC, v_BAYC, attn_mask=batch.mask_B11Y
    )
    return y_BAXC.reshape(q_BAC.shape[0], -1)


def _attend_piece(q_tAC: Tensor, kv_tAC: Tensor, store: Tensor, piece: Piece) -> Tensor:
    """Several tokens of one sequence, with those before them."""
    mask_tY = None
    before = piece.length - piece.count
    if not before:
        k_1AYC, v_1AYC = (part.transpose(0, 1)[None] for part in kv_tAC.chunk(2, dim=1))
    else:
        k_1AYC, v_1AYC = _read(store, piece.pages_1X, piece.length)
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
