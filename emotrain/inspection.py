"""`emotrain inspect`: what a configuration is and what it will cost, before anything is built:
experts and pool, parameters, steps, FLOPs, memory, layout and data."""

from __future__ import annotations

import dataclasses
from typing import Any

from emotrain.config import Config, ModelConfig, warnings_of
from emotrain.errors import UserError

FLOPS_FORMULA = "6 * (active parameters - input embedding) + 6 * layers * width * sequence length"
BACKENDS = {
    "auto": "Triton on a GPU, compiled C++ or PyTorch on a CPU",
    "torch": "PyTorch, the readable twin",
    "triton": "the Triton kernels",
    "megablocks": "MegaBlocks' grouped GEMM for the experts, Triton for the rest",
}


def run_costs(config: Config) -> dict[str, Any]:
    """What `emotrain inspect --json` prints. Counts are exact (spec 1.6); nothing is allocated.

    Memory is that of one whole copy, in bytes: fp32 weights, and of parameters that are trained
    gradients and two fp32 moments of AdamW. Activations are not in it. FLOPs are those of forward
    and backward.
    """
    from emotrain.model.counts import parameter_counts, trained_count
    from emotrain.training.metrics import flops_per_token
    from emotrain.training.optimizer import learning_rate_warmup

    counts, anneals = parameter_counts(config.model), bool(config.anneal.checkpoint)
    tokens = config.num_steps * config.tokens_per_step
    weights_bytes = 4 * counts["total_parameters"]
    trained = trained_count(config.model, config.finetune.parts)
    warmup = learning_rate_warmup(config.optimizer, config.num_steps)
    model, pool = config.model, config.model.pool
    return {
        **counts,
        "trained_parameters": trained,
        "layers": model.num_layers,
        "routed_experts_per_layer": [
            model.routed_in_layer(layer) for layer in range(model.num_layers)
        ],
        "shared_experts": model.experts.shared,
        "top_k": model.experts.top_k,
        "pool": {**dataclasses.asdict(pool), "text": pool_text(model)},
        "backend": model.experts.backend,
        "tokens_per_step": config.tokens_per_step,
        "steps": config.num_steps,
        "tokens": tokens,
        "schedule": "linear to 0 from the checkpoint's learning rate"
        if anneals
        else config.optimizer.schedule,
        "warmup_steps": 0 if anneals else warmup,
        "peak_lr": None if anneals else config.optimizer.lr,
        "final_lr": 0.0 if anneals else config.optimizer.lr * config.optimizer.final_ratio,
        "flops_per_token": flops_per_token(config),
        "flops": flops_per_token(config) * tokens,
        "weights_bytes": weights_bytes,
        "gradients_bytes": 4 * trained,
        "optimizer_bytes": 8 * trained,
        "parallel": dataclasses.asdict(config.parallel),
        "data": _data(config, tokens),
        "warnings": warnings_of(config),
    }


def pool_text(model: ModelConfig) -> str:
    """The document pool in words."""
    pool = model.pool
    if not max(model.experts.routed_per_layer or (model.experts.routed,)):
        return "none: a dense model"
    if pool.kind == "none":
        return "none: a standard MoE"
    sizes = {"fixed": f"{pool.size}", "uniform": f"{pool.min} to {pool.max}"}
    return f"{sizes[pool.kind]} routed experts" if pool.kind in sizes else pool.kind


def describe(config: Config, costs: dict[str, Any]) -> str:
    """The same for a person to read."""
    sections = {
        "Model": _model_lines(config, costs),
        "Parameters": [
            _line(key.removesuffix("_parameters"), f"{costs[key]:,}")
            for key in costs
            if key.endswith("_parameters")
        ],
        "Run": _run_lines(costs),
        "FLOPs, forward and backward": [
            _line("a token", f"{costs['flops_per_token']:.4g}"),
            _line("the run", f"{costs['flops']:.4g}"),
            f"  a token: {FLOPS_FORMULA}",
        ],
        "Memory of one whole copy, without activations": [
            _line(part, f"{costs[f'{part}_bytes'] / 2**30:,.2f} GiB", note)
            for part, note in (
                ("weights", "fp32"),
                ("gradients", "fp32"),
                ("optimizer", "two fp32 moments"),
            )
        ],
        "Parallel layout": _parallel_lines(config),
        "Data": _data_lines(config, costs["data"]),
    }
    lines = [line for title, body in sections.items() for line in (title, *body)]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in costs["warnings"])])


def _model_lines(config: Config, costs: dict[str, Any]) -> list[str]:
    model, experts = config.model, config.model.experts
    per_layer = costs["routed_experts_per_layer"]
    routed = str(per_layer[0]) if len(set(per_layer)) == 1 else ", ".join(map(str, per_layer))
    drawn = {
        ("uniform", "layer"): "a size drawn for each document and layer",
        ("uniform", "document"): "a size drawn for each document, the same in all layers",
    }
    return [
        _line("layers", str(model.num_layers), f"width {model.d_model}, {model.num_heads} heads"),
        _line("routed experts, N", routed, "of a layer, to choose from"),
        _line("shared experts, M", str(experts.shared), "of a layer, used by every token"),
        _line("top-k, K", str(experts.top_k), "routed experts that a token uses"),
        _line("document pool", pool_text(model), drawn.get((model.pool.kind, model.pool.per), "")),
        _line("backend", experts.backend, BACKENDS[experts.backend]),
    ]


def _run_lines(costs: dict[str, Any]) -> list[str]:
    lines = [
        _line("tokens a step", f"{costs['tokens_per_step']:,}"),
        _line("steps", f"{costs['steps']:,}", f"{costs['tokens']:,} tokens"),
    ]
    if costs["peak_lr"] is not None:
        after = f"after {costs['warmup_steps']:,} steps"
        lines.append(_line("peak learning rate", f"{costs['peak_lr']:g}", after))
    return [*lines, _line("final learning rate", f"{costs['final_lr']:g}", costs["schedule"])]


def _parallel_lines(config: Config) -> list[str]:
    parallel, training = config.parallel, config.training
    return [
        _line("replicate", str(parallel.replicate), "copies of the model"),
        _line("shard", str(parallel.shard or "all"), "processes that one copy is spread over"),
        _line("ep", str(parallel.ep), "processes that the experts of a layer are spread over"),
        _line("recompute", parallel.recompute, "what backward computes again"),
        _line("global batch", f"{training.global_batch:,}", "sequences of a step, all processes"),
        _line("micro-batch", str(training.micro_batch), "sequences of a forward pass, one process"),
    ]


def _data(config: Config, tokens: int) -> dict[str, Any]:
    """The data set as far as it is there: its training tokens, and how often the run sees them."""
    from emotrain.data.mixture_file import is_mixture
    from emotrain.data.opening import open_store
    from emotrain.training.data_source import open_sources

    found: dict[str, Any] = {"path": config.data.path, "tokens": None, "passes": None}
    if not config.data.path:
        return found | {"note": "data.path is not set"}
    mixed = is_mixture(config.data.path)
    try:
        if mixed:
            size = open_sources(config).num_tokens
        else:
            store = open_store(
                config.data.path,
                tokenizer=config.data.tokenizer,
                raw=config.data.raw,
                verify_checksums=False,
            )
            size = sum(store.shard_tokens)
    except FileNotFoundError:
        return found | {"note": "not prepared yet (emotrain prepare)"}
    except (UserError, OSError) as error:
        return found | {"note": " ".join(str(error).split())}
    passes = tokens / size if size else 0.0
    note = f"{size:,} training tokens; the run passes over them {passes:.3g} times"
    if mixed:
        note += f" on average; `emotrain data show {config.data.path}` shows each source"
    return found | {"tokens": size, "passes": passes, "note": note}


def _data_lines(config: Config, data: dict[str, Any]) -> list[str]:
    across = "yes" if config.data.cross_document_targets else "no"
    return [
        _line("path", data["path"] or "none"),
        f"  {data['note']}",
        _line("sequence length", f"{config.data.sequence_length:,}", "tokens"),
        _line("targets across", across, "whether a document's last token predicts the next one"),
    ]


def _line(name: str, value: str, note: str = "") -> str:
    return f"  {name:<20}{value:>22}{'  ' + note if note else ''}"
