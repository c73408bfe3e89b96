"""Tokens a second of generation: the engine against reading the whole text anew, transformers, and
itself with four subsets in one batch.

    python benchmarks/generate.py [--json] [--peer hf] [key=value ...]

A random model of the shape of configs/quickstart.yaml, which key=value settings change, continues
random prompts, greedily, on the CPU in float32:

    tokens_per_second_1, _8   new tokens of all sequences a second, prompts read too
    speedup_over_uncached     at one sequence, over the model that trains, which reads the whole
                              text for every token
    speedup_over_hf_1, _8     over `generate` of transformers' OLMoE of the same sizes, with the
                              fastest of its expert implementations (--peer hf). transformers has
                              no EMO; OLMoE has as many experts a token, all of them routed, and
                              two more norms in attention
    mixed_over_single         at --sequences: four subsets of --keep of the experts in one batch,
                              over the first of them for all
    subset_over_full          at --sequences: the first of them, over all experts
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import arguments, report, time_in_turn
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Config, ModelConfig, load_config
from emotrain.generation.engine import Engine, EngineLimits
from emotrain.generation.request import GenerationRequest
from emotrain.generation.sampling import Sampling
from emotrain.model.transformer import Transformer

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
HF_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
SUBSETS = 4

Masks = Sequence[Tensor] | None


def prompts_of(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def subset_of(config: ModelConfig, share: float, seed: int) -> list[Tensor]:
    """A random share of the routed experts of each layer."""
    generator, masks = torch.Generator().manual_seed(seed), []
    for layer in range(config.num_layers):
        routed = config.routed_in_layer(layer)
        order_N = torch.randperm(routed, generator=generator)
        masks.append(order_N < max(1, round(share * routed)))
    return masks


def engine_arm(
    model: Transformer, prompts: Sequence[list[int]], new: int, subsets: Sequence[Masks] = (None,)
) -> Callable[[], list[list[int]]]:
    """All prompts as one batch; sequence i has subset i of `subsets`, again and again."""
    limits = EngineLimits(len(prompts), (len(prompts[0]) + new + 32) * len(prompts))
    engine = Engine(model, limits)
    sampling = Sampling(max_tokens=new)

    def run() -> list[list[int]]:
        found = [
            engine.submit(GenerationRequest(ids, sampling, subsets[i % len(subsets)]))
            for i, ids in enumerate(prompts)
        ]
        while engine.busy:
            engine.step()
        return [generation.tokens for generation in found]

    return run


def uncached_arm(model: Transformer, prompt: list[int], new: int) -> Callable[[], list[int]]:
    @torch.inference_mode()
    def run() -> list[int]:
        tokens = list(prompt)
        for _ in range(new):
            output = model(PackedBatch.from_rows(torch.tensor([tokens])))
            tokens.append(int(model.head(output.hidden_TD[-1:]).argmax()))
        return tokens[len(prompt) :]

    return run


def hf_arm(
    config: ModelConfig, prompts: Sequence[list[int]], new: int, implementation: str
) -> Callable[[], Any]:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    model = OlmoeForCausalLM._from_config(
        OlmoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.experts.hidden,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=len(prompts[0]) + new,
            num_experts=config.experts_in_layer(0),
            num_experts_per_tok=config.experts.top_k + config.experts.shared,
            initializer_range=config.init_std,
            rms_norm_eps=config.norm_eps,
            pad_token_id=0,
            eos_token_id=None,
        ),
        attn_implementation="sdpa",
        experts_implementation=implementation,
        dtype=torch.float32,
    ).eval()
    ids = torch.tensor(prompts)

    @torch.inference_mode()
    def run() -> Any:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )

    return run


def fastest_hf(
    config: ModelConfig, prompts: Sequence[list[int]], new: int
) -> tuple[str, Callable[[], Any]]:
    """The implementation of experts that is the fastest here, and its arm."""
    try:
        import transformers
    except ImportError:
        raise SystemExit(
            "--peer hf needs transformers, which is not installed; pip install -e '.[bench]'"
        ) from None
    transformers.logging.set_verbosity_error()
    arms = {name: hf_arm(config, prompts, new, name) for name in HF_IMPLEMENTATIONS}
    times = time_in_turn(arms, repeats=2)
    name = min(times, key=lambda arm: times[arm].median)
    return name, arms[name]


def measure(config: Config, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times and results."""
    model_config, new = config.model, args.new
    model = Transformer(model_config).initialize(0).requires_grad_(False)
    prompts = prompts_of(max(8, args.sequences), args.prompt, model_config.vocab_size)
    subsets = [subset_of(model_config, args.keep, seed) for seed in range(SUBSETS)]
    many = prompts[: args.sequences]
    arms: dict[str, Callable[[], Any]] = {
        "engine, 1": engine_arm(model, prompts[:1], new),
        "engine, 8": engine_arm(model, prompts[:8], new),
        "uncached, 1": uncached_arm(model, prompts[0], new),
        "all experts": engine_arm(model, many, new),
        "one subset": engine_arm(model, many, new, subsets[:1]),
        "four subsets": engine_arm(model, many, new, subsets),
    }
    assert arms["engine, 1"]()[0] == arms["uncached, 1"](), "the cache has changed a token"
    results: dict[str, Any] = {"prompt_tokens": args.prompt, "new_tokens": new}
    if args.peer:
        for count in (1, 8):
            name, arms[f"hf, {count}"] = fastest_hf(model_config, prompts[:count], new)
            results[f"hf_experts_implementation_{count}"] = name
    times = time_in_turn(arms, args.repeats)
    median = {name: timing.median for name, timing in times.items()}
    for count in (1, 8):
        results[f"tokens_per_second_{count}"] = 1e3 * count * new / median[f"engine, {count}"]
        if args.peer:
            ratio = median[f"hf, {count}"] / median[f"engine, {count}"]
            results[f"speedup_over_hf_{count}"] = ratio
    results["speedup_over_uncached"] = median["uncached, 1"] / median["engine, 1"]
    results["sequences"] = args.sequences
    results["mixed_over_single"] = median["one subset"] / median["four subsets"]
    results["subset_over_full"] = median["all experts"] / median["one subset"]
    return times, results


def main() -> None:
    parser = arguments(__doc__ or "", repeats=7)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=96, help="tokens to generate")
    parser.add_argument("--sequences", type=int, default=32, help="of the arms with subsets")
    parser.add_argument("--keep", type=float, default=0.125, help="share of a subset")
    parser.add_argument("--peer", choices=["hf"], help="also measure transformers' OLMoE")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times, results = measure(load_config(QUICKSTART, args.settings), args)
    report("generation", times, results, args.json)


if __name__ == "__main__":
    main()
