"""torch's flash attention over documents of any lengths, whose signature differs by version."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def shares_heads(attention: Callable[..., Any]) -> bool:
    """Whether this version of `varlen_attn` takes fewer heads of keys than of queries: torch 2.11
    does not."""
    return "enable_gqa" in inspect.signature(attention).parameters


# Asked once: compiled blocks could not ask.
SHARES_HEADS = shares_heads(varlen_attn)


def attend_documents(
    q_TAC: Tensor, k_TAC: Tensor, v_TAC: Tensor, edges: Tensor, max_length: int
) -> Tensor:
    """Each token attends to itself and the earlier ones of its document, on CUDA in bf16 or fp16.

    Args:
        k_TAC, v_TAC: heads that divide those of `q_TAC`.
        edges: int32: 0, then one past the last token of each document.
        max_length: bound of the length of a document, known to the host.
    """
    copies = q_TAC.shape[1] // k_TAC.shape[1]
    shares: dict[str, Any] = {}
    if copies > 1 and SHARES_HEADS:
        shares = {"enable_gqa": True}
    elif copies > 1:
        k_TAC, v_TAC = (part.repeat_interleave(copies, dim=1) for part in (k_TAC, v_TAC))
    y_TAC = varlen_attn(
        q_TAC, k_TAC, v_TAC, edges, edges, max_length, max_length, window_size=(-1, 0), **shares
    )
    assert isinstance(y_TAC, Tensor)
    return y_TAC
