"""What stands in for a GPU and for data in a dry run: kernels that are counted and not started,
operators that CUDA would run, and 0 where a number reaches the host."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.data.packing import packed_rows
from emotrain.distributed.mesh import Layout, experts_of_rank
from emotrain.errors import UserError
from emotrain.planning.meter import Meter
from emotrain.planning.parts import Part

MEAN_DOCUMENT = 1318
"""Tokens: 4,060 billion in 3,080 million documents (OLMoE, arXiv 2409.02060, table 2; its
tokenizer)."""


def synthetic_batch(config: Config, mean_document: int = MEAN_DOCUMENT) -> PackedBatch:
    """A micro-batch of documents whose lengths are exponentially distributed, cut by the
    sequences as packing cuts them."""
    length, rows = config.data.sequence_length, config.training.micro_batch
    total = rows * length
    # Multiples of the golden ratio fill [0, 1) evenly from the first on: a small batch has typical
    # lengths too.
    uniform = (np.arange(2 * total // mean_document + 8) * 0.6180339887 + 0.5) % 1
    ends = np.cumsum(np.maximum(1, -mean_document * np.log1p(-uniform)).astype(np.int64))
    edges = np.unique(np.concatenate([ends[ends < total], np.arange(0, total + 1, length)]))
    lengths, rows_of = np.diff(edges), edges[:-1] // length
    per_row = [lengths[rows_of == row].tolist() for row in range(rows)]
    ids = [np.flatnonzero(rows_of == row).tolist() for row in range(rows)]
    return packed_rows(np.zeros((rows, length), dtype=np.int64), per_row, ids, True)


def held_experts(num_experts: int, num_ranks: int) -> list[int]:
    """Experts of each rank."""
    return [experts_of_rank(num_experts, num_ranks, rank) for rank in range(num_ranks)]


CUDA_GRANULARITY = 512
"""Bytes that the CUDA allocator rounds a request up to."""


@dataclass(frozen=True)
class Routing:
    """What the dry run assumes of the data: how many ranks a token's experts are on, and how
    unequal ranks are."""

    ranks_per_token: float = 0.0
    """Expert ranks that a token goes to; 0 means as many as k choices without preference reach.
    Documents whose pools lie together need fewer."""
    imbalance: float = 1.0
    """Routed slots of this rank's experts over the mean. The rows that bring them grow alike, until
    every token sends one."""
    ep: int = 0
    """Number of ranks that both are of; with another number, choices are without preference. 0: any
    number."""
    is_measured: bool = False
    """Whether both were measured, of a placement of experts."""
    others: tuple[Routing, ...] = ()
    """The same for other numbers of ranks."""

    def on(self, num_ranks: int) -> Routing:
        """What is said of this number of ranks, else routing without preference."""
        said = (one for one in (self, *self.others) if one.ep in (0, num_ranks))
        return next(said, Routing())

    def sent(self, num_experts: int, chosen: int, held: Sequence[int], tokens: int) -> list[int]:
        """Rows to each rank that holds `held` of the experts: a token goes wherever one of its k
        different experts is."""
        share_R = [
            1 - math.comb(num_experts - h, chosen) / math.comb(num_experts, chosen) for h in held
        ]
        wanted = self.on(len(held)).ranks_per_token
        scale = wanted / sum(share_R) if wanted else 1.0
        return [min(tokens, round(tokens * share * scale)) for share in share_R]

    def received(
        self, num_experts: int, chosen: int, held: Sequence[int], tokens: int
    ) -> tuple[int, int]:
        """Rows that rank 0 gets from each rank, and the slots of its experts that all of them
        bring: no more a row than a token has choices and the rank experts."""
        imbalance = self.on(len(held)).imbalance
        rows = min(tokens, round(self.sent(num_experts, chosen, held, tokens)[0] * imbalance))
        slots = round(tokens * len(held) * chosen * held[0] / num_experts * imbalance)
        return rows, min(slots, rows * len(held) * min(chosen, held[0]))


class ZeroOnHost(TorchDispatchMode):
    """Answers 0 where a tensor's value is asked for, and tells `on_wait` where the host would wait
    for the device: there, and where the host makes a tensor of its own numbers, which reach the
    device by a copy that waits. A list of all values of a tensor is one wait."""

    def __init__(self, on_wait: Callable[[], None]) -> None:
        super().__init__()
        self.on_wait = on_wait

    def __enter__(self) -> ZeroOnHost:
        self.patch = ExitStack()

        def tolist(tensor: Tensor) -> list[float]:
            self.waited()
            (length,) = tensor.shape
            return [0.0 if tensor.is_floating_point() else 0] * length

        replace_attribute(self.patch, FakeTensor, "tolist", tolist)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.patch.close()
        super().__exit__(*exception)

    def waited(self) -> None:
        self.on_wait()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.lift_fresh.default:
            self.waited()
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waited()
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


def _attention(
    q_BASC: Tensor,
    k_BASC: Tensor,
    v_BASC: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """The operators of scaled_dot_product_attention on CUDA: the flash kernel takes no mask; the
    other one takes one of the dtype of the queries, and keeps it."""
    if enable_gqa:
        copies = q_BASC.shape[1] // k_BASC.shape[1]
        k_BASC, v_BASC = k_BASC.repeat_interleave(copies, 1), v_BASC.repeat_interleave(copies, 1)
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            q_BASC, k_BASC, v_BASC, 0.0, is_causal
        )[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q_BASC.dtype).masked_fill_(
            attn_mask.logical_not(), -torch.inf
        )
    bias = attn_mask.expand(*q_BASC.shape[:2], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q_BASC, k_BASC, v_BASC, bias, q_BASC.requires_grad
    )[0]


def _causal_flops(q_BASC: Tensor, *_: Any, **__: Any) -> int:
    """Of the flash kernel, which leaves out the scores of later tokens."""
    batch, heads, length, width = q_BASC.shape
    return 4 * batch * heads * (length * (length + 1) // 2) * width


@contextmanager
def gpu_kernels(
    meter: Meter, target: str, config: Config, layout: Layout, routing: Routing
) -> Iterator[None]:
    """Within this context the Triton kernels are chosen where a GPU would, and their launches
    counted instead of started."""
    if config.model.experts.backend == "megablocks":
        raise UserError(
            "experts.backend=megablocks cannot be planned: its memory is its own; plan with "
            "model.experts.backend=auto"
        )
    import_launch_code()
    from emotrain.kernels.triton_launch import Launch, recording

    tokens, lengths_G = (
        config.training.micro_batch * config.data.sequence_length,
        synthetic_batch(config).document_T.bincount(),
    )

    chosen, routed, ep = config.model.chosen_in_layer(0), config.model.routed_in_layer(0), layout.ep
    slots_in_use, rows_sent = tokens * chosen, 0
    if ep > 1:
        held = held_experts(routed, ep)
        slots_in_use = routing.received(routed, chosen, held, tokens)[1]
        rows_sent = sum(routing.sent(routed, chosen, held, tokens))

    def count(launch: Launch) -> None:
        # Slots of a dispatcher are rows on their way to an expert rank.
        used = rows_sent if meter.part == Part.DISPATCH else slots_in_use
        tensors = [argument for argument in launch.arguments if isinstance(argument, Tensor)]
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.int64)
        cost = launch.cost
        size = cost.bytes_read(used) + cost.bytes_written(used)
        meter.record(launch.name, dtype, cost.flops(used), size, ours=True)

    capability = tuple(divmod(int(target.removeprefix("sm_")), 10))
    with ExitStack() as stack:
        replace_attribute(stack, torch.cuda, "get_device_capability", lambda *_: capability)
        replace_attribute(stack, sys.modules["emotrain.kernels.backends"], "HAS_TRITON", True)
        # Attention inside documents computes the scores of each token with the earlier ones of its
        # document.
        pair_flops = (
            4
            * int((lengths_G * (lengths_G + 1) // 2).sum())
            * config.model.num_heads
            * config.model.head_dim
        )
        meter.formulas |= {
            "_varlen_attn": lambda *_, **__: pair_flops,
            "_varlen_attn_backward": lambda *_, **__: 5 * pair_flops // 2,
            "_scaled_dot_product_flash_attention": _causal_flops,
            "_scaled_dot_product_flash_attention_backward": lambda *arguments, **__: (
                5 * _causal_flops(*arguments[1:4]) // 2
            ),
        }
        if config.training.uses_bfloat16("cuda"):
            stack.callback(torch.set_autocast_enabled, "cuda", torch.is_autocast_enabled("cuda"))
            stack.callback(torch.set_autocast_dtype, "cuda", torch.get_autocast_dtype("cuda"))
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
        stack.enter_context(recording(target, count))
        replace_attribute(stack, F, "scaled_dot_product_attention", _attention)
        # A GEMM that sums in float32 what it multiplies in bfloat16 is an operator of CUDA alone.
        replace_attribute(
            stack,
            sys.modules["emotrain.kernels.linear_cross_entropy"],
            "add_product",
            lambda total, a, b, beta: meter.record(
                "addmm",
                a.dtype,
                2 * a.numel() * b.shape[1],
                a.nbytes + b.nbytes + (1 + beta) * total.nbytes,
            ),
        )
        # Code that asks a tensor whether it is on a GPU takes the way it would take there.
        stack.callback(delattr, torch.Tensor, "is_cuda")
        setattr(torch.Tensor, "is_cuda", property(lambda _: True))  # noqa: B010 - mypy: a bool
        yield


def replace_attribute(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack closes."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def import_launch_code() -> None:
    """Import the Triton wrappers, also where Triton is not installed: a dry run calls what
    launches kernels, never a kernel."""
    if importlib.util.find_spec("triton") is not None:
        return
    language: Any = types.ModuleType("triton.language")
    triton: Any = types.ModuleType("triton")
    triton.jit = lambda *function, **_: function[0] if function else lambda function: function
    triton.cdiv = lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    triton.language, language.constexpr = language, None
    sys.modules.update({"triton": triton, "triton.language": language})
    try:
        from emotrain.kernels import (  # noqa: F401
            triton_cross_entropy,
            triton_grouped_mlp,
            triton_parcels,
            triton_routing,
            triton_rowwise,
        )
    finally:
        for name in ("triton", "triton.language"):
            del sys.modules[name]
