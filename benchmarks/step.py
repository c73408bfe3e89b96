"""A whole training step: EMO against the standard MoE, and against transformers' OLMoE.

    python benchmarks/step.py [key=value ...] [--config configs/quickstart.yaml] [--peer hf]
    [--json] [--threads 2]

One call is what training does for one update: forward, all losses, backward, clipping, AdamW
(`forward_backward` of the training loop, then the optimizer), on random tokens from the initial
weights, with the learning rate of the first update.

    emo_over_standard    time of the EMO step (pools as configured) over that of the same model with
                         the pool off
    speedup_over_hf      with `--peer hf`: our EMO tokens/s over those of the fastest of
                         transformers' expert implementations

The peer is `OlmoeForCausalLM` at the same layers, widths, heads, vocabulary and sequences, with as
many experts a layer and a token as ours, shared ones counted, and the same AdamW and clipping;
measured as it is used, in float32, with SDPA attention and its balance loss. What differs: OLMoE
normalises queries and keys, has no shared expert and no z-losses, and attends causally over the
whole sequence without regard to documents. An implementation that does not fit into memory, or that
a short trial shows to be far from the fastest, is skipped, and the result says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _measure import arguments, random_documents, report, time_in_turn

from emotrain.batch import PackedBatch
from emotrain.config import Config, PoolConfig, load_config
from emotrain.distributed.ranks import Ranks
from emotrain.model.transformer import Transformer
from emotrain.training.engine import NativeEngine, clip_gradients
from emotrain.training.optimizer import build_optimizer, learning_rate
from emotrain.training.step import train_step

HF_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
TRIAL_ROWS, HOPELESS = 4, 5
"""Each implementation is tried on this many sequences first; one this many times slower there
than the fastest is not measured further."""
QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"


def our_step(config: Config, micro_batches: list[PackedBatch]) -> Callable[[], None]:
    """One update of our model."""
    model = Transformer(config.model).initialize(seed=0)
    optimizer = build_optimizer(
        model, replace(config.optimizer, lr=learning_rate(config.optimizer, 1, config.num_steps))
    )
    engine, step = NativeEngine(model, optimizer), 0

    def run() -> None:
        nonlocal step
        step += 1
        result = train_step(engine, micro_batches, config, step, Ranks())
        assert result.applied

    return run


def hf_step(
    config: Config,
    micro_batches: list[PackedBatch],
    implementation: str,
    device: torch.device | None = None,
) -> Callable[[], None]:
    """One update of transformers' OLMoE; on a GPU under autocast to bfloat16, as ours."""
    device = device or torch.device("cpu")
    from transformers import OlmoeConfig, OlmoeForCausalLM

    model_config = config.model
    torch.manual_seed(0)
    model = OlmoeForCausalLM._from_config(
        OlmoeConfig(
            vocab_size=model_config.vocab_size,
            hidden_size=model_config.d_model,
            intermediate_size=model_config.experts.hidden,
            num_hidden_layers=model_config.num_layers,
            num_attention_heads=model_config.num_heads,
            num_key_value_heads=model_config.kv_heads,
            max_position_embeddings=config.data.sequence_length,
            num_experts=model_config.experts_in_layer(0),
            num_experts_per_tok=model_config.experts.top_k + model_config.experts.shared,
            initializer_range=model_config.init_std,
            rms_norm_eps=model_config.norm_eps,
            output_router_logits=True,
            router_aux_loss_coef=config.losses.balance,
            use_cache=False,
            pad_token_id=None,
            eos_token_id=None,
        ),
        attn_implementation="sdpa",
        experts_implementation=implementation,
        dtype=torch.float32,
    ).train()
    model.to(device)
    optimizer = build_optimizer(
        model, replace(config.optimizer, lr=learning_rate(config.optimizer, 1, config.num_steps))
    )
    parameters = list(model.parameters())

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for batch in micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(input_ids=batch.tokens_BS, labels=batch.tokens_BS).loss
            (loss / len(micro_batches)).backward()
        clip_gradients(parameters, config.optimizer.clip_norm, Ranks())
        optimizer.step()

    return run


def hf_arms(
    config: Config, micro_batches: list[PackedBatch]
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """The peer's implementations worth a full measurement, and why the others are not."""
    try:
        import transformers
    except ImportError:
        raise SystemExit(
            "--peer hf needs transformers, which is not installed; pip install -e '.[bench]'"
        ) from None
    transformers.logging.set_verbosity_error()
    rows, length = min(TRIAL_ROWS, config.training.micro_batch), config.data.sequence_length
    trial_batch = [random_documents(rows, length, rows, config.model.vocab_size)]
    seconds, skipped = {}, {}
    for implementation in HF_IMPLEMENTATIONS:
        needed = _batched_mm_bytes(config) if implementation == "batched_mm" else 0
        if needed > 0.8 * _available_bytes():
            skipped[implementation] = (
                f"needs about {needed / 2**30:.1f} GiB, {_available_bytes() / 2**30:.1f} GiB are "
                f"free"
            )
            continue
        try:
            timing = time_in_turn(
                {"trial": hf_step(config, trial_batch, implementation)}, repeats=1
            )
        except (RuntimeError, NotImplementedError, MemoryError) as error:
            skipped[implementation] = " ".join(str(error).split())[:200]
        else:
            seconds[implementation] = timing["trial"].minimum / 1e3
    for implementation in [
        name for name in seconds if seconds[name] > HOPELESS * min(seconds.values())
    ]:
        skipped[implementation] = (
            f"{rows * length / seconds.pop(implementation):,.0f} tokens/s in a trial with {rows} "
            f"sequences, "
            f"more than {HOPELESS} times slower than the fastest"
        )
    return {f"hf {name}": hf_step(config, micro_batches, name) for name in seconds}, skipped


def _batched_mm_bytes(config: Config) -> int:
    """batched_mm copies an expert's weights for every slot, keeps them for the backward pass,
    and there makes gradients as large."""
    experts = config.model.experts
    one_layer = (
        config.training.micro_batch
        * config.data.sequence_length
        * (experts.top_k + experts.shared)
        * 3
        * experts.hidden
        * config.model.d_model
        * 4
    )
    return (config.model.num_layers + 1) * one_layer


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = arguments(__doc__, repeats=10)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over those of the configuration"
    )
    parser.add_argument(
        "--config",
        default=QUICKSTART,
        help="configuration of the EMO model (default: configs/quickstart.yaml)",
    )
    parser.add_argument(
        "--documents-per-sequence",
        type=int,
        default=2,
        help="documents of a packed sequence, on average (default: %(default)s)",
    )
    parser.add_argument(
        "--peer", choices=["hf"], help="also measure transformers' OLMoE (the `bench` extra)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    emo = load_config(args.config, args.overrides)
    standard = replace(
        emo,
        model=replace(emo.model, router=replace(emo.model.router, pool=PoolConfig(kind="none"))),
    )
    rows, length = emo.training.micro_batch, emo.data.sequence_length
    micro_batches = [
        random_documents(
            rows, length, rows * args.documents_per_sequence, emo.model.vocab_size, seed
        )
        for seed in range(emo.training.global_batch // rows)
    ]
    arms = {"EMO": our_step(emo, micro_batches), "standard MoE": our_step(standard, micro_batches)}
    peers, skipped = hf_arms(emo, micro_batches) if args.peer == "hf" else ({}, {})
    timings = time_in_turn(arms | peers, args.repeats, warmup=2)

    tokens_per_second = {
        name: emo.tokens_per_step / timing.median * 1e3 for name, timing in timings.items()
    }
    results: dict[str, Any] = {
        "emo_over_standard": timings["EMO"].median / timings["standard MoE"].median,
        "emo_tokens_per_second": tokens_per_second["EMO"],
        "standard_tokens_per_second": tokens_per_second["standard MoE"],
        "tokens_per_step": emo.tokens_per_step,
    }
    if peers:
        fastest = max(peers, key=tokens_per_second.__getitem__)
        results |= {
            "speedup_over_hf": tokens_per_second["EMO"] / tokens_per_second[fastest],
            "hf_fastest_implementation": fastest.removeprefix("hf "),
            "hf_tokens_per_second": {
                name.removeprefix("hf "): tokens_per_second[name] for name in peers
            },
        }
    if args.peer:
        results["hf_skipped"] = skipped
    report(f"Training step of {args.config}", timings, results, args.json)


if __name__ == "__main__":
    main()
