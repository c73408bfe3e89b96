"""Answers in words, by the engine of `emotrain generate`: many prompts at once, each with its own
experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from emotrain.data.tokenizer import TextTokenizer
from emotrain.errors import UserError
from emotrain.generation.engine import Engine, EngineLimits, cache_tokens_needed
from emotrain.generation.request import GenerationRequest
from emotrain.generation.sampling import Sampling
from emotrain.generation.sequence import Generation
from emotrain.model.transformer import Transformer
from emotrain.progress import Track, untracked
from emotrain.tasks.scoring import encode_texts

AT_ONCE = 32
"""Sequences that run together."""


def generate(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    samplings: Sequence[Sampling],
    subsets: Sequence[Sequence[Tensor] | None],
    most_tokens: int,
    track: Track[Any] = untracked,
    description: str = "generating",
) -> list[str]:
    """How the model goes on from each prompt, up to a stop text, the end of the document or the
    most tokens. What does not fit is cut from the start of a prompt; an empty one begins with an
    end-of-document token.

    Args:
        samplings: of each prompt.
        subsets: of each prompt, for each layer bool [N]: the routed experts it may use; None for
            all.
        most_tokens: of a prompt and its answer.
    Raises:
        UserError: an answer that leaves no room for a prompt.
    """
    requests = []
    for ids, sampling, subset in zip(
        encode_texts(tokenizer, prompts), samplings, subsets, strict=True
    ):
        room = most_tokens - sampling.max_tokens
        if room < 1:
            raise UserError(
                f"an answer of {sampling.max_tokens} tokens leaves no room for a prompt in the "
                f"{most_tokens} that the model reads; ask for fewer"
            )
        requests.append(GenerationRequest((ids or (tokenizer.eos_id,))[-room:], sampling, subset))
    lengths = [len(request.tokens) + request.sampling.max_tokens for request in requests]
    if not requests:
        return []
    needed = cache_tokens_needed(sorted(lengths)[-AT_ONCE:])
    engine = Engine(model, EngineLimits(AT_ONCE, needed, most_tokens), tokenizer)
    found: list[Generation] = []
    # Long prompts first: at the end no single one is waited for.
    order = sorted(range(len(requests)), key=lambda i: -lengths[i])
    for number in track(order, description):
        found.append(engine.submit(requests[number]))
        while engine.num_running + engine.num_waiting >= AT_ONCE:
            engine.step()
    while engine.busy:
        engine.step()
    for generation in found:
        if generation.error is not None:
            raise generation.error
    texts = dict(zip(order, (generation.text for generation in found), strict=True))
    return [texts[number] for number in range(len(requests))]
