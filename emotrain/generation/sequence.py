"""A sequence from its submission to its end: what users see of it, and what the engine holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from emotrain.generation.request import GenerationRequest
from emotrain.generation.sampling import TokenLogprob
from emotrain.generation.text import Detokenizer, StopScanner

STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"
"""Why a generation ended: a stop text or the end of the document; `max_tokens`; by `cancel`; what
it needed could not be read."""


@dataclass
class Generation:
    """A sequence from its submission on. Read it at any time; the engine alone writes it."""

    id: int
    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    """Generated so far, an end-of-document token included."""
    text: str = ""
    """Theirs as far as it is certain, without a stop text."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of `tokens`, where asked for."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """Of the prompt's tokens, where asked for; None for the first, which nothing predicts."""
    finish_reason: str | None = None
    error: BaseException | None = None
    """What ended it, where `finish_reason` is `error`."""
    experts_kept: list[list[int]] | None = None
    """Numbers of the routed experts of each layer that it may use, at the end those it used last;
    None where it may use all."""
    pool_renewals: int = 0
    """How often its pool was chosen anew."""
    switch_rate: float | None = None
    """Share of a pool's experts that were not in the one before, mean over layers and renewals;
    None before the first."""


@dataclass(frozen=True)
class Delta:
    """What a step added to a generation."""

    generation: Generation
    tokens: tuple[int, ...]
    text: str
    """May be empty: characters that are not whole, or that may begin a stop text, wait."""
    finish_reason: str | None


class TextCoder(Protocol):
    """What an engine needs of a tokenizer: `emotrain.data.tokenizer.TextTokenizer` is one."""

    eos_id: int
    vocab_size: int

    def decode(self, ids: Sequence[int]) -> str: ...


class Prompt:
    """A prompt that several sequences may go on from. The first of those that run reads it, and
    the others copy what it has made of it."""

    def __init__(self, several: bool):
        self.several = several
        self.holders: list[Running] = []
        """Those that run, in the order they came: the first reads it, or has read it."""
        self.logits_1V: Tensor | None = None
        """Of its last token, once it has been read, where several sequences need them."""
        self.pool: list[tuple[Tensor, Tensor]] | None = None
        """What `Seats.pool_of` said then."""


class Running:
    """A generation in the engine."""

    def __init__(
        self,
        generation: Generation,
        prompt: Prompt,
        decode: Callable[[tuple[int, ...]], str] | None,
    ):
        self.generation, self.prompt = generation, prompt
        request = generation.request
        self.known = list(request.tokens)
        """The prompt, and what was generated."""
        self.read = 0
        """Tokens whose keys and values are in the cache."""
        self.seat = -1
        self.pages: list[int] = []
        self.most_tokens = len(self.known) + request.sampling.max_tokens
        self.switched = 0.0
        self.stops = StopScanner(request.sampling.stop)
        self.detokenizer = None
        if decode is not None:
            self.detokenizer = Detokenizer(decode, self.known)

    @property
    def pending(self) -> int:
        """Tokens that the model has not read."""
        return len(self.known) - self.read

    @property
    def waits(self) -> bool:
        """Whether another sequence reads its prompt."""
        return not self.read and self.prompt.holders[0] is not self

    @property
    def has_prompt(self) -> bool:
        """Whether its prompt is in the cache."""
        return self.read >= len(self.generation.request.tokens)
