"""Where each of our parameters lies in the Hugging Face formats, and the other way round.

    published  the format of the released models (spec 10.2): the shared experts are the last ones
               of `mlp.experts`, and `mlp.gate` has a row for each of them
    clean      what transformers 5 and vLLM expect of a model with shared experts: `mlp.gate` and
               `mlp.experts` hold the routed experts alone, the shared ones are one wide
               `mlp.shared_experts`

A `Link` is a box of one of our parameters and the rows of the tensor of the format that hold the
same numbers: q, k and v are row ranges of one matrix, gate and up those of an expert's slice, down
a slice transposed. Both directions read the same links, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from emotrain.config import ModelConfig

Layout = Literal["published", "clean"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The tensors with a row for each id of the vocabulary."""


@dataclass(frozen=True)
class Link:
    """A box of a parameter, as rows [rows, cols] (or [rows], of a norm), and where they lie."""

    parameter: str
    offsets: tuple[int, ...]
    """Where the box starts in the parameter."""
    sizes: tuple[int, ...]
    """Of the box, a size for each axis; all but the last two are 1."""
    tensor: str | None
    """Name in the format; None where the format leaves these rows out, which nothing depends on."""
    row: int = 0
    """The first of the rows in the tensor, transposed where `transposed`."""
    transposed: bool = False
    """Whether the tensor holds them as columns."""

    @property
    def rows(self) -> int:
        return self.sizes[max(0, len(self.sizes) - 2)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box without the axes of length 1 before its rows."""
        return self.sizes[-2:]


def links(config: ModelConfig, layout: Layout) -> Iterator[Link]:
    """All links of a model, in the order of its parameters; those of one parameter fill it in the
    order of its elements. A bank of experts that several layers share is linked to each of them.
    """
    V, D = config.vocab_size, config.d_model
    yield Link("embedding.weight", (0, 0), (V, D), EMBEDDING)
    for layer in range(config.num_layers):
        block, prefix = f"blocks.{layer}", f"model.layers.{layer}"
        yield Link(
            f"{block}.attention_norm.weight", (0,), (D,), f"{prefix}.pre_attention_layernorm.weight"
        )
        heads = (config.num_heads, config.kv_heads, config.kv_heads)
        rows = [count * config.head_dim for count in heads]
        starts = [0, rows[0], rows[0] + rows[1]]
        for name, start, count in zip("qkv", starts, rows, strict=True):
            yield Link(
                f"{block}.attention.qkv.weight",
                (start, 0),
                (count, D),
                f"{prefix}.self_attn.{name}_proj.weight",
            )
        yield Link(
            f"{block}.attention.out.weight",
            (0, 0),
            (D, rows[0]),
            f"{prefix}.self_attn.o_proj.weight",
        )
        yield Link(
            f"{block}.moe_norm.weight", (0,), (D,), f"{prefix}.pre_feedforward_layernorm.weight"
        )
        yield from _expert_links(config, layer, f"{prefix}.mlp", layout)
    yield Link("norm.weight", (0,), (D,), "model.norm.weight")
    yield Link("head.weight", (0, 0), (V, D), HEAD)


def _expert_links(config: ModelConfig, layer: int, mlp: str, layout: Layout) -> Iterator[Link]:
    block, routed, shared = f"blocks.{layer}", config.routed_in_layer(layer), config.experts.shared
    D, H = config.d_model, config.experts.hidden
    router, gate = f"{block}.moe.router.weight_ED", f"{mlp}.gate.weight"
    if layout == "published":
        yield Link(router, (0, 0), (routed + shared, D), gate)
    else:
        yield Link(router, (0, 0), (routed, D), gate)
        if shared:
            yield Link(router, (routed, 0), (shared, D), None)
    # The parameters of a shared bank have the name of the first layer that uses it.
    bank = config.bank_of_layer(layer)
    owner = next(i for i in range(layer + 1) if config.bank_of_layer(i) == bank)
    experts = f"blocks.{owner}.moe.experts"
    yield from _swiglu_links(
        f"{experts}.gate_up_NFD",
        f"{experts}.down_NHD",
        [(f"{mlp}.experts.{expert}", 0) for expert in range(routed)],
        D,
        H,
    )
    of_shared = (
        [(f"{mlp}.experts.{routed + i}", 0) for i in range(shared)]
        if layout == "published"
        else [(f"{mlp}.shared_experts", i * H) for i in range(shared)]
    )
    experts = f"{block}.moe.shared"
    yield from _swiglu_links(f"{experts}.gate_up_MFD", f"{experts}.down_MHD", of_shared, D, H)


def _swiglu_links(
    gate_up: str, down: str, experts: list[tuple[str, int]], D: int, H: int
) -> Iterator[Link]:
    """Links of a stack of experts.

    Args:
        experts: of each its name in the format, and its first hidden unit there.
    """
    for index, (expert, row) in enumerate(experts):
        for half, name in enumerate(("gate", "up")):
            yield Link(
                gate_up, (index, half * H, 0), (1, H, D), f"{expert}.{name}_proj.weight", row
            )
    for index, (expert, row) in enumerate(experts):
        yield Link(down, (index, 0, 0), (1, H, D), f"{expert}.down_proj.weight", row, True)


def tensors_of(all_links: list[Link]) -> dict[str, list[Link]]:
    """The links of each tensor of the format, in the order of its rows."""
    found: dict[str, list[Link]] = {}
    for link in all_links:
        if link.tensor is not None:
            found.setdefault(link.tensor, []).append(link)
    for of_tensor in found.values():
        of_tensor.sort(key=lambda link: link.row)
        assert of_tensor[0].row == 0
        assert all(one.row + one.rows == next_one.row for one, next_one in pairwise(of_tensor))
    return found


def parameters_of(all_links: list[Link]) -> dict[str, list[Link]]:
    """The links of each of our parameters, in the order of its elements; of a bank that several
    layers share, those of the first."""
    found: dict[str, dict[tuple[int, ...], Link]] = {}
    for link in all_links:
        found.setdefault(link.parameter, {}).setdefault(link.offsets, link)
    return {name: list(boxes.values()) for name, boxes in found.items()}


def shape_of(of_tensor: list[Link]) -> tuple[int, ...]:
    """Shape of a tensor of the format."""
    rows, first = sum(link.rows for link in of_tensor), of_tensor[0]
    shape = (rows, *first.shape[1:])
    return shape[::-1] if first.transposed else shape
