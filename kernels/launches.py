"""What one block of the model and the head launch on a GPU, recorded on tensors without data: the
public functions are called, forward and backward, and nothing runs.

`compile_check.py` compiles it ahead of time at the published shapes, `warm_up.py` at those of a run
before its first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emotrain.kernels.slots import SortedSlots, sort_slots

PUBLISHED = {
    "tokens": 16384,
    "width": 2048,
    "hidden": 1024,
    "num_experts": 127,
    "num_chosen": 7,
    "shared": 1,
    "ranks": 8,
    "documents": 24,
    "heads": 16,
    "kv_heads": 16,
    "head_width": 128,
    "vocab": 100352,
    "choice_bias": 1,
}
"""One micro-batch of the published model: 4 sequences of 4,096 tokens (spec 1.2, 5)."""


def recorded_launches(
    target: str,
    dtype: torch.dtype,
    shapes: Mapping[str, int] | None = None,
    routing: bool | None = None,
) -> list[Any]:
    """The distinct launches of one block and of the head with its loss, forward and backward.

    Args:
        shapes: what differs from `PUBLISHED`, under its names (a dense block has 0 routed experts);
            and `held`, the experts of a rank. With `ranks` given, launches are those of a layer
            that is spread so; else those of one rank and of the published number of them.
        routing: whether routing is among them, which is in float32 always (None: where `dtype` is).
    """
    from emotrain.kernels import triton_launch

    sizes = {**PUBLISHED, **(shapes or {})}
    seen: dict[tuple[Any, ...], Any] = {}

    def remember(launch: Any) -> None:
        dtypes = tuple(
            argument.dtype for argument in launch.arguments if isinstance(argument, torch.Tensor)
        )
        seen.setdefault((launch.kernel.__name__, dtypes, *sorted(launch.options.items())), launch)

    with torch.device("meta"), triton_launch.recording(target, remember):
        _pass_rows(sizes, dtype)
        _use_head(sizes, dtype)
        if sizes["num_experts"]:
            if routing or (routing is None and dtype == torch.float32):
                _route(sizes)
            for ranks in {sizes["ranks"]} if "ranks" in (shapes or {}) else (1, sizes["ranks"]):
                (_compute if ranks == 1 else _dispatch)(sizes, dtype)
    return list(seen.values())


def _route(sizes: Mapping[str, int]) -> None:
    """Routing of a layer, as training and evaluation ask for it."""
    from emotrain.kernels.triton_routing import decide_in_triton

    tokens, documents, num_experts = sizes["tokens"], sizes["documents"], sizes["num_experts"]
    logits_TE = torch.empty(tokens, num_experts + sizes["shared"], requires_grad=True)
    logits_TN = logits_TE[:, :num_experts]
    document_T = torch.empty(tokens, dtype=torch.int64)
    pool_size_G = torch.empty(2, documents, dtype=torch.int64)[1]  # of the second layer
    kept_GN, valid_T = (
        torch.empty(shape, dtype=torch.bool) for shape in ((documents, num_experts), (tokens,))
    )
    of_batch = (logits_TN, document_T, documents, sizes["num_chosen"])
    biases = (None, torch.empty(num_experts)) if sizes["choice_bias"] else (None,)
    for bias_N in biases:
        decide = partial(decide_in_triton, *of_batch, choice_bias_N=bias_N)
        routing = decide(pool_size_G)
        (routing.weights_TK.sum() + routing.probabilities_TN.sum() + routing.lse_T.sum()).backward()
        # With the z-loss on all logits nothing asks for the normaliser inside of pools.
        routing = decide()
        (routing.weights_TK.sum() + routing.probabilities_TN.sum()).backward()
        if bias_N is not None:
            # With biases alone, nothing but the task's loss and the z-loss asks for a gradient.
            routing = decide(pool_size_G)
            (routing.weights_TK.sum() + routing.lse_T.sum()).backward()
            decide().weights_TK.sum().backward()
        for pool in (pool_size_G, None):  # padded batches, an expert subset
            decide(pool, None, valid_T)
            decide(pool, kept_GN, valid_T)


def _compute(sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """The experts of a layer, and rows to their experts and back, all on one rank."""
    from emotrain.kernels.permute import permute, unpermute

    tokens, num_experts = sizes["tokens"], sizes["num_experts"]
    experts_TK = torch.empty(tokens, sizes["num_chosen"], dtype=torch.int64)
    x_TD = torch.empty(tokens, sizes["width"], dtype=dtype, requires_grad=True)
    weights_TK = torch.empty(experts_TK.shape, requires_grad=True)
    slots = sort_slots(experts_TK, num_experts, backend="triton")
    _experts(sizes, x_TD, weights_TK, slots)
    # For MegaBlocks, whose slots torch may have sorted.
    slots = replace(slots, position_R=None)
    unpermute(permute(x_TD, slots, "triton"), slots, tokens, weights_TK, "triton").backward(
        x_TD.detach()
    )


def _dispatch(sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """The same over ranks, of which each has as many tokens."""
    from emotrain.kernels import parcels

    tokens, num_ranks = sizes["tokens"], sizes["ranks"]
    per_rank = -(-sizes["num_experts"] // num_ranks)
    spread = parcels.Spread(sizes["num_experts"], num_ranks, per_rank)
    experts_TK = torch.empty(tokens, sizes["num_chosen"], dtype=torch.int64)
    x_TD, weights_TK = (
        torch.empty(tokens, sizes["width"], dtype=dtype),
        torch.empty(experts_TK.shape),
    )
    layout = parcels.ParcelLayout.of(x_TD, weights_TK, per_rank)
    position_TW, _ = parcels.destinations(experts_TK, spread, "triton")
    parcels_OB = parcels.pack(
        x_TD, weights_TK, experts_TK, position_TW, tokens, layout, spread, "triton"
    )
    slots = sort_slots(layout.choices(parcels_OB), sizes.get("held", per_rank), tokens, "triton")
    rows_ID, weights_IK = layout.rows(parcels_OB), layout.weights(parcels_OB)
    _experts(sizes, rows_ID.requires_grad_(), weights_IK.requires_grad_(), slots)
    parcels.combine(parcels.spread_rows(x_TD, position_TW, tokens, "triton"), position_TW, "triton")
    layout = layout.of_gradients
    parcels.unpack_gradients(
        layout.empty(x_TD, tokens), experts_TK, position_TW, layout, spread, "triton"
    )


def _experts(
    sizes: Mapping[str, int], x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots
) -> None:
    from emotrain.kernels.triton_grouped_mlp import grouped_mlp_triton

    num_experts, width, hidden = len(slots.ends_N), sizes["width"], sizes["hidden"]
    gate_up_NFD, down_NHD = (
        torch.empty(num_experts, *shape, dtype=x_TD.dtype, requires_grad=True)
        for shape in ((2 * hidden, width), (hidden, width))
    )
    y_TD = grouped_mlp_triton(x_TD, weights_TK, slots, gate_up_NFD, down_NHD)
    y_TD.backward(torch.empty_like(y_TD))
    # Evaluation keeps nothing for backward, and spreads no experts.
    if slots.in_use is None:
        with torch.no_grad():
            grouped_mlp_triton(x_TD, weights_TK, slots, gate_up_NFD, down_NHD)


def _pass_rows(sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """Norms, rotary positions, and SwiGLU of the shared experts."""
    from emotrain.kernels.rowwise import rms_norm, rotate_heads, swiglu_down

    tokens, width, heads, kv_heads, head_width = (
        sizes[name] for name in ("tokens", "width", "heads", "kv_heads", "head_width")
    )

    def leaf(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, requires_grad=True)

    x_TD, angle = leaf(tokens, width), torch.empty(tokens, head_width // 2)
    rms_norm(x_TD, leaf(width), 1e-6, "triton").backward(x_TD.detach())
    qkv_BSF = leaf(1, tokens, (heads + 2 * kv_heads) * head_width) + 0
    parts = rotate_heads(qkv_BSF, angle, angle, heads, kv_heads, "triton")
    torch.autograd.backward(parts, [part.detach() for part in parts])
    if sizes["shared"]:
        gate_up_TF, down_HD = leaf(tokens, 2 * sizes["hidden"]), leaf(sizes["hidden"], width)
        swiglu_down(gate_up_TF, down_HD, "triton").backward(x_TD.detach())


def _use_head(sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """The head and its loss, with a gradient and without."""
    from emotrain.kernels.linear_cross_entropy import linear_cross_entropy

    tokens, width = sizes["tokens"], sizes["width"]
    x_TD, target_T = torch.empty(tokens, width, dtype=dtype), torch.empty(tokens, dtype=torch.int64)
    head_VD = torch.empty(sizes["vocab"], width, dtype=dtype, requires_grad=True)
    for head in (head_VD, head_VD.detach()):
        linear_cross_entropy(x_TD, head, target_T, 0.0, "triton")
