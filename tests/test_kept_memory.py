"""Proves what a block keeps for backward, a token: each operand of a matrix product, of attention
and of a norm once, in bfloat16. One copy more, in whatever type, fails."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from helpers import tiny_batch, tiny_model
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.model.attention import TokenView
from emotrain.model.router import LayerRequest
from emotrain.model.transformer import Block, Transformer

assert triton_interpreter.triton.knobs.runtime.interpret

WIDTH, HIDDEN, CHOSEN, LENGTH = 512, 64, 2, 16


def kept_by(block: Block, x_BSD: Tensor, batch: PackedBatch, view: TokenView) -> int:
    """Bytes of all storages that a pass keeps, parameters and what was there before left out."""
    there = {p.untyped_storage().data_ptr() for p in block.parameters()}
    there |= {t.untyped_storage().data_ptr() for t in (view.cos, view.sin)}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = block(x_BSD, batch, view, LayerRequest())
    assert result[0].requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in there)


def kept_a_token(model: Transformer) -> float:
    """The difference between two sequences and one: what does not grow with tokens falls out."""
    sizes = []
    for rows in (1, 2):
        batch = tiny_batch(((LENGTH,),) * rows)
        with torch.autocast("cpu", torch.bfloat16):
            x_BSD, view = model.embed(batch)
            sizes.append(kept_by(model.blocks[0], x_BSD, batch, view))
    return (sizes[1] - sizes[0]) / LENGTH


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_block_keeps_each_operand_once_in_bfloat16(backend: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    model = tiny_model(
        model__d_model=WIDTH,
        model__num_heads=4,
        model__num_kv_heads=kv_heads,
        model__experts__hidden=HIDDEN,
        model__experts__top_k=CHOSEN,
        model__experts__backend=backend,
        model__attention__document_mask=False,
        model__router__pool__kind="none",
    )
    qkv = (4 + 2 * kv_heads) * WIDTH // 4
    # The block's input, its norm, queries with keys and values, what attention returns, the
    # second norm's input, its norm; hidden of the routed experts and of the shared one.
    numbers = 2 * WIDTH + qkv + WIDTH + 2 * WIDTH + 2 * HIDDEN * (CHOSEN + 1)
    rest = kept_a_token(model) - 2 * numbers
    # Scales of norms and of attention, probabilities, choices, their weights, tokens and order.
    assert 0 < rest < WIDTH, f"{rest} bytes a token beside the operands"
