"""Answers in words, many prompts at once, each with its own experts: by the engine of `emotrain
generate`, or token by token with others that have the model between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emotrain.data.tokenizer import TextTokenizer
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.generation.engine import Engine, EngineLimits, cache_tokens_needed
from emotrain.generation.request import GenerationRequest
from emotrain.generation.sampling import Sampling
from emotrain.generation.sequence import Generation
from emotrain.model.transformer import Transformer
from emotrain.modular.select import Subsets
from emotrain.progress import Track, untracked
from emotrain.tasks.scoring import encode_texts, next_tokens

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


def generate_together(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    most_new: int,
    stops: Sequence[str],
    most_tokens: int,
    rows_per_batch: int,
    subsets: Subsets | None,
    group_of_prompt: Sequence[int],
    precision: torch.dtype | None,
    ranks: Ranks,
) -> list[str]:
    """The greedy answers of `generate`, of a model that several processes have between them; all
    get them.

    All of a prompt runs again for each token: no cache of keys and values has to be where the
    parts of the model are. All know all answers after each token, so that they end alike.

    Args:
        most_new: most tokens of an answer.
        stops: texts that end one.
        subsets, group_of_prompt: see `log_probabilities`.
    """
    room = most_tokens - most_new
    texts = [(ids or (tokenizer.eos_id,))[-room:] for ids in encode_texts(tokenizer, prompts)]
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    going = list(range(len(prompts)))
    for _ in range(most_new if prompts else 0):
        tokens = next_tokens(
            model,
            [texts[i] + answers[i] for i in going],
            most_tokens,
            rows_per_batch,
            subsets,
            [group_of_prompt[i] for i in going],
            min(model.config.vocab_size, tokenizer.vocab_size),
            precision,
            ranks,
        )
        for number, token in zip(going, tokens, strict=True):
            answers[number] += (token,)
        going = [i for i in going if not _ends(tokenizer, answers[i], stops)]
        if not going:
            break
    return [_text(tokenizer, answer, stops) for answer in answers]


def _ends(tokenizer: TextTokenizer, ids: tuple[int, ...], stops: Sequence[str]) -> bool:
    text = tokenizer.decode(ids)
    return ids[-1] == tokenizer.eos_id or any(stop in text for stop in stops)


def _text(tokenizer: TextTokenizer, ids: tuple[int, ...], stops: Sequence[str]) -> str:
    """Up to the first stop text, or the end of the document."""
    text = tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.eos_id else ids)
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]
