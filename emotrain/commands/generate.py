"""`emotrain generate`: text that goes on from a prompt, with all experts or a few."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from emotrain.commands.common import add_checkpoint, add_device, add_json, finish
from emotrain.errors import UserError

if TYPE_CHECKING:
    from emotrain.generation.engine import Engine
    from emotrain.generation.sequence import Generation
    from emotrain.model.transformer import Transformer
    from emotrain.modular.expert_store import ExpertStore

DESCRIPTION = """\
Continue a prompt. The text appears as it is generated; what was done is told on stderr. Several
prompts run as one batch, each as a document of its own."""
EPILOG = """\
examples:
  emotrain generate runs/quickstart "fn main() {"
  emotrain generate runs/quickstart "Once upon" --temperature 0.8 --top-p 0.95 --seed 7
  emotrain generate runs/quickstart "fn main() {" --subset rust.json
  emotrain generate runs/quickstart "fn main() {" --experts auto:8 --pool sticky:32
  emotrain generate runs/quickstart "fn main() {" --subset rust.json --memory 24MB

`--experts auto:8` keeps the 8 experts of each layer, shared ones counted, that the prompt itself
gives the most routing probability: no other text is needed. `--pool sticky:32` chooses them anew
after every 32 tokens, from all the text so far, and `switch rate` says which share of them changed;
without --experts the pool is as large as in training.

With `--memory` experts are read when the text first needs them, and those that were not used for
longest make room. The text is the same to the last token.

Greedy (--temperature 0) gives the same text every time, and so does a seed. A prompt of - is read
from stdin."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to continue")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=0,
        metavar="N",
        help="most tokens to generate (default: 128, or what --context leaves)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most likely token, 1 draws by the model's probabilities (default: 0)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw among the K most likely tokens"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the most likely tokens that have probability P together",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be repeated",
    )
    parser.add_argument(
        "--subset", metavar="FILE", help="use only the experts of a file of `emotrain select`"
    )
    parser.add_argument(
        "--domain", metavar="NAME", help="use the exclusive experts of this domain too"
    )
    parser.add_argument(
        "--experts", default="", metavar="auto:N", help="keep the N experts that the prompt chooses"
    )
    parser.add_argument(
        "--pool", default="", metavar="sticky:N", help="choose them anew after every N tokens"
    )
    parser.add_argument(
        "--context",
        type=int,
        default=0,
        metavar="N",
        help="most tokens of prompt and text together (default: as in training)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory that the weights may take, for example 2GB: experts are read when they are "
        "needed (default: load all of them)",
    )
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.generation.engine import Engine, EngineLimits, cache_tokens_needed
    from emotrain.generation.loading import (
        encode,
        experts_of_domain,
        load_subset,
        load_weights,
        open_generator,
    )
    from emotrain.generation.request import GenerationRequest, read_pool
    from emotrain.generation.sampling import Sampling
    from emotrain.modular.budget import read_size
    from emotrain.modular.lazy_experts import store_of

    if args.subset and args.domain:
        raise UserError("give --subset or --domain: a subset says by itself which experts it has")
    memory = read_size(args.memory) if args.memory else None
    folder, config, tokenizer = open_generator(args.checkpoint)
    subset = load_subset(args.subset, folder, config) if args.subset else None
    if args.domain:
        subset = experts_of_domain(args.domain, config)
    pool = read_pool(args.experts, args.pool, config.model)
    context = args.context or config.data.sequence_length
    prompts = [encode(tokenizer, _text(prompt)) for prompt in args.prompts]
    longest = max(map(len, prompts))
    if longest >= context:
        raise UserError(
            f"the prompt has {longest} tokens, which leaves none of {context} to generate; shorten "
            f"it, or raise --context"
        )
    sampling = Sampling(
        max_tokens=args.max_tokens or min(128, context - longest),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    model = load_weights(folder, args.device, memory)
    needed = cache_tokens_needed([len(prompt) + sampling.max_tokens for prompt in prompts])
    engine = Engine(model, EngineLimits(len(prompts), needed, context), tokenizer)
    found = [engine.submit(GenerationRequest(ids, sampling, subset, pool)) for ids in prompts]
    start = time.perf_counter()
    _generate(engine, found, quiet=args.json)
    seconds = time.perf_counter() - start
    for generation in found:
        print(_summary(generation, seconds), file=sys.stderr)
    store = store_of(model)
    held = None if store is None else _held(model, store)
    if held is not None:
        print(
            "weights take {weights_bytes:,} bytes, experts {resident_bytes:,} of them: {hits} "
            "times found, {misses} times read, {evictions} evicted".format(**held),
            file=sys.stderr,
        )
    if args.json:
        finish(args, {**_result(found, seconds), "experts_in_memory": held}, "")
    return 0


def _text(prompt: str) -> str:
    return sys.stdin.read() if prompt == "-" else prompt


def _generate(engine: Engine, found: list[Generation], quiet: bool) -> None:
    """Run to the end, and print the first text as it grows, the others after it."""
    shown = 0
    while engine.busy:
        engine.step()
        text = found[0].text
        if not quiet and len(text) > shown:
            print(text[shown:], end="", flush=True)
            shown = len(text)
    for generation in found:
        if generation.error is not None:
            raise generation.error
    if not quiet:
        print(*("", *(generation.text for generation in found[1:])), sep="\n", flush=True)


def _summary(generation: Generation, seconds: float) -> str:
    words = [
        f"{len(generation.request.tokens)} tokens read, {len(generation.tokens)} generated in "
        f"{seconds:.2f} s, ended by {generation.finish_reason}"
    ]
    if generation.switch_rate is not None:
        words.append(
            f"pool renewed {generation.pool_renewals} times, switch rate "
            f"{generation.switch_rate:.3f}"
        )
    return "; ".join(words)


def _held(model: Transformer, store: ExpertStore) -> dict[str, Any]:
    """What is in memory, and how it came there."""
    trunk_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "weights_bytes": trunk_bytes + store.resident_bytes,
        "resident_bytes": store.resident_bytes,
        **vars(store.counters),
    }


def _result(found: list[Generation], seconds: float) -> dict[str, Any]:
    generated = sum(len(generation.tokens) for generation in found)
    return {
        "generations": [
            {
                "text": generation.text,
                "tokens": generation.tokens,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": len(generation.request.tokens),
                "generated_tokens": len(generation.tokens),
                "experts_kept_per_layer": generation.experts_kept,
                "pool_renewals": generation.pool_renewals,
                "switch_rate": generation.switch_rate,
            }
            for generation in found
        ],
        "seconds": seconds,
        "tokens_per_second": generated / seconds,
    }
