"""Proves the GPU's attention over documents on a CPU, with torch's kernel (CUDA alone) replaced by
attention document by document: for the signature of every torch that is supported."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from emotrain.model import attention, varlen
from emotrain.model.attention import document_ends
from emotrain.model.varlen import shares_heads


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1),
):  # fmt: skip
    """The signature of torch 2.11."""


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None,
    block_table=None, num_splits=None,
):  # fmt: skip
    """The signature of torch 2.13."""


def one_by_one(signature: inspect.Signature) -> Any:
    """`varlen_attn` of this signature, one document after the other."""

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        q_TAC, k_TAC, v_TAC, ends_q, ends_k, max_q, max_k = bound.args[:7]
        assert bound.kwargs["window_size"] == (-1, 0)
        assert ends_q is ends_k and ends_q.dtype == torch.int32
        # The kernel refuses heads that differ, unless it is told.
        grouped = bound.kwargs.get("enable_gqa", False)
        assert grouped or q_TAC.shape == k_TAC.shape == v_TAC.shape
        parts = []
        for start, end in itertools.pairwise(ends_q.tolist()):
            assert end - start <= max_q == max_k
            q_ATC, k_ATC, v_ATC = (
                part[start:end].transpose(0, 1) for part in (q_TAC, k_TAC, v_TAC)
            )
            y_ATC = F.scaled_dot_product_attention(
                q_ATC, k_ATC, v_ATC, is_causal=True, enable_gqa=grouped
            )
            parts.append(y_ATC.transpose(0, 1))
        return torch.cat(parts)

    return attend


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("version", [torch_2_11, torch_2_13, varlen_attn])
def test_flash_attention_gets_the_documents_of_the_mask(monkeypatch, version, kv_heads) -> None:
    """Results and gradients, with as many heads of keys as of queries and with fewer."""
    torch.manual_seed(0)
    model = tiny_model(model__num_heads=4, model__num_kv_heads=kv_heads).double()
    batch = tiny_batch()

    def result() -> list[Tensor]:
        hidden_TD = model(batch).hidden_TD
        weights = [block.attention.qkv.weight for block in model.blocks]
        return [hidden_TD, *torch.autograd.grad(hidden_TD.square().sum(), weights)]

    by_mask = result()
    monkeypatch.setattr(varlen, "varlen_attn", one_by_one(inspect.signature(version)))
    monkeypatch.setattr(varlen, "SHARES_HEADS", shares_heads(version))
    monkeypatch.setattr(attention, "documents_of", document_ends)
    torch.testing.assert_close(result(), by_mask, rtol=1e-10, atol=1e-12)


def test_versions_differ_in_who_shares_heads() -> None:
    """And the one that is installed was asked."""
    assert not shares_heads(torch_2_11) and shares_heads(torch_2_13)
    assert shares_heads(varlen_attn) == varlen.SHARES_HEADS
