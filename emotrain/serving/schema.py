"""What requests look like: the completions of OpenAI's interface, and a few of our own.

A field that the server cannot honour is refused where it would change the answer, and never
ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from emotrain.generation.sampling import MOST_LOGPROBS, MOST_STOPS
from emotrain.serving.models import NAME

MOST_CHOICES = 16
MOST_PROMPTS = 256
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
SubsetName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), strict=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Of OpenAI's own server; nothing is hidden here."""


class SamplingBody(Body):
    """How any completion is generated."""

    model: str = Field(description="the full model, a subset, or auto:K", max_length=256)
    max_tokens: int | None = Field(None, ge=0, le=1 << 20)
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=0, le=1 << 20, description="0 for all tokens")
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(1 << 63), le=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = False
    user: str | None = Field(None, description="not used")
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)


class CompletionBody(SamplingBody):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_PROMPTS),
        ]
    )
    max_tokens: int | None = Field(16, ge=0, le=1 << 20)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class ChatMessage(Body):
    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None


class ChatBody(SamplingBody):
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=0, le=1 << 20)


class LoadSubsetBody(Body):
    subset_name: SubsetName
    subset_path: str = Field(description="file of emotrain select, in the server's folder for them")


class UnloadSubsetBody(Body):
    subset_name: SubsetName


class TokenizeBody(Body):
    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = Field(
        None, description="either is the same: nothing is put before or after a text"
    )


class DetokenizeBody(Body):
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20)]
    model: str | None = None
