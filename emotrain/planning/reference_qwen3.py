"""A step of Qwen3-30B-A3B in NVIDIA's NeMo AutoModel on 8 H100, for calibration.

Its settings are those of the published benchmark (docs/performance-summary.md and
examples/benchmark/configs/qwen3_moe_30b_te_deepep.yaml of NVIDIA-NeMo/Automodel, October 2025): 512
sequences of 4,096 tokens a step, 4 a micro-batch, experts over all 8 GPUs, blocks computed again in
backward, a gate that is balanced and costs nothing.

The plan of our own code with that layout gives collectives, GEMMs and element-wise passes. What
differs is replaced:

    experts      a cuBLAS product an expert, of thousands of rows each (grouped_gemm 1.1.4 as it is
                 built by default), rows copied into and out of expert order
    attention    32 heads of 128 with 4 of keys and values, cuDNN's kernel; Transformer Engine's
                 fused norms and projections
    router       none
    head         torch's cross entropy on bf16 logits
    exchange     rows alone, one way at a time, by DeepEP's kernels
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from emotrain.config import Config, config_from_dict
from emotrain.planning.cost import Work
from emotrain.planning.dry_run import Measured
from emotrain.planning.parts import Part
from emotrain.planning.reference import replace_parts
from emotrain.planning.trace import Collective, Kernel, Operation, Task, rewrite
from emotrain.training.engine import Phase

PUBLISHED_TOKENS_PER_SECOND = 12_040.0
"""Of one of 8 H100."""
QUERY_WIDTH, KEY_WIDTH = 32 * 128, 4 * 128


def qwen3_config() -> Config:
    """The model in our settings. Its attention is wider than ours can be; `qwen3_work` widens
    it."""
    return config_from_dict(
        {
            "model": {
                "vocab_size": 151_936,
                "d_model": 2048,
                "num_layers": 48,
                "num_heads": 16,
                "attention": {"document_mask": False},
                "experts": {"routed": 128, "shared": 0, "top_k": 8, "hidden": 768},
                "router": {"pool": {"kind": "none"}},
            },
            "data": {"sequence_length": 4096},
            "losses": {"balance": 0.0, "balance_scope": "micro_batch", "router_z": 0.0, "z": 0.0},
            "training": {"steps": 30, "global_batch": 512, "micro_batch": 4},
            "parallel": {"ep": 8, "recompute": "full"},
        }
    )


def qwen3_work(config: Config, measured: Measured) -> Work:
    """A step of AutoModel on one GPU.

    Args:
        config: `qwen3_config`.
        measured: the dry run of our code with it, under `reference.plain_fsdp2`.
    """
    tokens = measured.tokens // measured.micro_batches
    instead = replace_parts(list(_experts(config, tokens)), list(_head(config, tokens)))

    def change(task: Task) -> Sequence[Operation] | None:
        operation = task.operation
        if isinstance(operation, Kernel) and operation.part == Part.ROUTER:
            return []
        if isinstance(operation, Kernel) and operation.part == Part.ATTENTION:
            return [_attention(operation, config)]
        if isinstance(operation, Collective) and operation.kind == "all_to_all":
            # Sizes, weights and choices travel with the rows there.
            rows = operation.bytes > tokens * config.model.d_model
            return [replace(operation, kind="deepep")] if rows else []
        return instead(task)

    fused = frozenset({Part.ATTENTION, Part.NORMS})
    return Work(rewrite(measured.tasks, change), measured.axes, measured.tokens, fused)


def _attention(kernel: Kernel, config: Config) -> Kernel:
    """Theirs in place of ours: queries of twice the width, an eighth of the keys and values."""
    width = config.model.d_model
    if "attn" in kernel.name or "attention" in kernel.name:
        return replace(kernel, name="cudnn attention", flops=kernel.flops * QUERY_WIDTH // width)
    ours, theirs = 4 * width, 2 * QUERY_WIDTH + 2 * KEY_WIDTH
    scale = theirs / ours if kernel.flops else (QUERY_WIDTH + 2 * KEY_WIDTH) / (3 * width)
    return replace(kernel, flops=int(kernel.flops * scale), bytes=int(kernel.bytes * scale))


def _experts(config: Config, tokens: int) -> Iterator[Kernel]:
    """Those of one GPU in one layer and micro-batch, and backwards."""
    model = config.model
    slots, ep = tokens * model.chosen_in_layer(0), config.parallel.ep
    rows, inner = 2 * slots * model.d_model, 2 * slots * model.experts.hidden
    bank = 2 * model.routed_in_layer(0) // ep * model.d_model * model.experts.hidden
    flops = 2 * slots * model.d_model * model.experts.hidden

    def kernel(name: str, phase: Phase, size: int, computed: int = 0) -> Kernel:
        return Kernel(name, Part.EXPERTS, phase, torch.bfloat16, computed, size)

    yield kernel("permute", Phase.FORWARD, 2 * rows)
    yield kernel("mm", Phase.FORWARD, rows + 2 * inner + 2 * bank, 2 * flops)
    yield kernel("swiglu", Phase.FORWARD, 3 * inner)
    yield kernel("mm", Phase.FORWARD, rows + inner + bank, flops)
    yield kernel("unpermute", Phase.FORWARD, 2 * rows)
    yield kernel("unpermute, dx", Phase.BACKWARD, 2 * rows)
    for _ in ("dx", "dw"):
        yield kernel("mm", Phase.BACKWARD, rows + inner + bank, flops)
    yield kernel("swiglu, dx", Phase.BACKWARD, 5 * inner)
    for _ in ("dx", "dw"):
        yield kernel("mm", Phase.BACKWARD, rows + 2 * inner + 2 * bank, 2 * flops)
    yield kernel("permute, dx", Phase.BACKWARD, 2 * rows)


def _head(config: Config, tokens: int) -> Iterator[Kernel]:
    """Output head, torch's cross entropy in bf16, and backwards."""
    vocabulary, width = config.model.vocab_size, config.model.d_model
    logits, flops = tokens * vocabulary, 2 * tokens * vocabulary * width
    operands = 2 * (tokens * width + vocabulary * width + logits)

    def kernel(name: str, phase: Phase, size: int, computed: int = 0) -> Kernel:
        return Kernel(name, Part.HEAD, phase, torch.bfloat16, computed, size)

    yield kernel("mm", Phase.FORWARD, operands, flops)
    yield kernel("log_softmax", Phase.FORWARD, 4 * logits)
    yield kernel("nll backward", Phase.BACKWARD, 2 * logits)
    yield kernel("log_softmax backward", Phase.BACKWARD, 6 * logits)
    yield kernel("mm", Phase.BACKWARD, operands, flops)
    yield kernel("mm", Phase.BACKWARD, operands, flops)
