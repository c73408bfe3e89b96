"""Completions in the words of OpenAI's interface: from a body to sequences, and from what they have
become to an answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from emotrain.data.tokenizer import TextTokenizer
from emotrain.generation.loading import encode
from emotrain.generation.request import GenerationRequest
from emotrain.generation.sampling import Sampling, TokenLogprob
from emotrain.generation.sequence import STOP, Delta, Generation
from emotrain.generation.text import UNKNOWN
from emotrain.serving.models import ServedModel
from emotrain.serving.schema import ChatBody, CompletionBody, SamplingBody

Json = dict[str, Any]


def characters_of(body: CompletionBody) -> int:
    """Of all texts among its prompts."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    return sum(len(prompt) for prompt in prompts if isinstance(prompt, str))


def prompts_of(body: CompletionBody, tokenizer: TextTokenizer) -> list[list[int]]:
    """Token ids of every prompt. A text stands for itself: nothing is put before or after it."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [encode(tokenizer, prompt)]
    if isinstance(prompt[0], int):
        return [list(prompt)]
    return [encode(tokenizer, one) if isinstance(one, str) else list(one) for one in prompt]


def requests_of(
    body: SamplingBody, prompts: Sequence[Sequence[int]], model: ServedModel, max_tokens: int
) -> list[GenerationRequest]:
    """One for each prompt."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    logprobs = body.logprobs if isinstance(body, CompletionBody) else None
    seed = body.seed if body.seed is not None else uuid.uuid4().int & ((1 << 63) - 1)
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        stop=stop,
        ignore_end=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=isinstance(body, CompletionBody)
        and bool(body.echo)
        and logprobs is not None,
        seed=seed,
    )
    return [GenerationRequest(prompt, sampling, model.subset, model.pool) for prompt in prompts]


class TokenTexts:
    """Tokens as the text that stands for each in log probabilities."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Its text; `token_id:N` where it is a part of a character, or none."""
        if (text := self._known.get(token)) is None:
            text = self._tokenizer.decode([token])
            if UNKNOWN in text or not text:
                text = f"token_id:{token}"
            self._known[token] = text
        return text


def logprobs_json(
    entries: Sequence[TokenLogprob | None],
    tokens: Sequence[int],
    num_top: int,
    offset: int,
    texts: TokenTexts,
) -> Json:
    """`choices[].logprobs`. A token's own log probability is among `top_logprobs` too, and is the
    very float at their head where the token is the greedy one."""
    names, own, offsets = [], [], []
    top: list[dict[str, float] | None] = []
    for token, entry in zip(tokens, entries, strict=True):
        name = texts(token)
        names.append(name)
        offsets.append(offset)
        offset += len(name)
        own.append(None if entry is None else entry.logprob)
        if entry is None:
            top.append(None)
            continue
        best: dict[str, float] = {}
        for other, logprob in entry.top[:num_top]:
            best.setdefault(texts(other), logprob)  # best first
        best.setdefault(name, entry.logprob)
        top.append(best)
    return {
        "tokens": names,
        "token_logprobs": own,
        "top_logprobs": top,
        "text_offset": offsets,
    }


class Answer:
    """Turns the sequences of one completion into JSON, whole or piece by piece."""

    def __init__(self, body: SamplingBody, texts: TokenTexts, tokenizer: TextTokenizer):
        self.body, self._texts, self._tokenizer = body, texts, tokenizer
        self.is_chat = isinstance(body, ChatBody)
        kind = "chat.completion" if self.is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }
        self._kind = kind
        self._sent: dict[int, int] = {}
        """Generated tokens of each choice whose log probabilities were sent."""
        self._offsets: dict[int, int] = {}
        """Characters of the tokens of each choice whose log probabilities were sent."""

    # ---- whole

    def whole(self, generations: Sequence[Generation]) -> Json:
        choices = [self._choice(i, generation) for i, generation in enumerate(generations)]
        return {**self._head, "object": self._kind, "choices": choices, **self.usage(generations)}

    def usage(self, generations: Sequence[Generation]) -> Json:
        """A prompt counts once, however many choices it has."""
        read = sum(len(g.request.tokens) for g in generations[:: self.body.n or 1])
        written = sum(len(g.tokens) for g in generations)
        return {
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": written,
                "total_tokens": read + written,
            }
        }

    def _choice(self, index: int, generation: Generation) -> Json:
        reason = _reason(generation.finish_reason)
        if self.is_chat:
            message = {"role": "assistant", "content": generation.text, "refusal": None}
            return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}
        return {
            "index": index,
            "text": self._echoed(generation) + generation.text,
            "logprobs": self._logprobs(index, generation, len(generation.tokens)),
            "finish_reason": reason,
        }

    def _echoed(self, generation: Generation) -> str:
        if not (isinstance(self.body, CompletionBody) and self.body.echo):
            return ""
        return self._tokenizer.decode(generation.request.tokens)

    def _logprobs(self, index: int, generation: Generation, until: int) -> Json | None:
        """Of what has not been sent yet, up to the token `until`."""
        body = self.body
        if not isinstance(body, CompletionBody) or body.logprobs is None:
            return None
        begun, sent = index in self._sent, self._sent.get(index, 0)
        self._sent[index] = until
        entries: list[TokenLogprob | None] = list(generation.logprobs[sent:until])
        tokens = list(generation.tokens[sent:until])
        if body.echo and not begun:
            entries = [*generation.prompt_logprobs, *entries]
            tokens = [*generation.request.tokens, *tokens]
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(self._texts(token)) for token in tokens)
        return logprobs_json(entries, tokens, body.logprobs, offset, self._texts)

    # ---- piece by piece

    def first_chunk(self, index: int) -> Json | None:
        """Of a choice of a chat: who speaks."""
        if not self.is_chat:
            return None
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}}, None)

    def chunk(self, index: int, delta: Delta, until: int) -> Json:
        """What was added to a choice.

        Args:
            until: generated tokens so far, those of this piece included.
        """
        generation, text, reason = delta.generation, delta.text, delta.finish_reason
        if self.is_chat:
            content = {"content": text} if text else {}
            return self._chunk({"index": index, "delta": content}, reason)
        begun = index in self._sent
        logprobs = self._logprobs(index, generation, until)
        if not begun:
            text = self._echoed(generation) + text
            self._sent.setdefault(index, until)
        return self._chunk({"index": index, "text": text, "logprobs": logprobs}, reason)

    def last_chunk(self, generations: Sequence[Generation]) -> Json:
        """The usage, where it was asked for."""
        return {**self._chunk(None, None), **self.usage(generations)}

    def _chunk(self, choice: Json | None, reason: str | None) -> Json:
        kind = "chat.completion.chunk" if self.is_chat else self._kind
        choices = [] if choice is None else [{**choice, "finish_reason": _reason(reason)}]
        return {**self._head, "object": kind, "choices": choices}


def _reason(reason: str | None) -> str | None:
    """Clients know `stop` and `length`; a sequence that was cancelled was stopped."""
    return STOP if reason == "cancelled" else reason
