"""Conversations as tokens, by the template of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from emotrain.data.tokenizer import read_tokenizer
from emotrain.errors import UserError
from emotrain.serving.schema import ChatMessage


class NoTemplateError(UserError):
    """The tokenizer has no template for conversations."""


class ChatTemplate:
    """The template beside a tokenizer: `chat_template.jinja`, or in `tokenizer_config.json`.

    What a template writes may be special tokens, such as the marks of turns; what a message says is
    ordinary text.
    """

    def __init__(self, folder: Path):
        """`folder`: of a checkpoint, with its tokenizer.json.

        Raises:
            UserError: a template that cannot be read.
        """
        settings = _settings(folder / "tokenizer_config.json")
        self.source = _source(folder, settings)
        """None where there is none."""
        self._tokens = {
            name: value.get("content", "") if isinstance(value, dict) else value
            for name, value in settings.items()
            if name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        if self.source is not None:
            self._backend = read_tokenizer(folder / "tokenizer.json")
            self._backend.no_truncation()
            self._backend.no_padding()
            added = self._backend.get_added_tokens_decoder().values()
            self._special = [token.content for token in added if token.special]

    def tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The tokens that the model goes on from.

        Raises:
            NoTemplateError: there is none. UserError: it does not take these messages, or one of
                them spells a special token.
        """
        text = self.render(messages)
        for message in messages:
            for said in (message.content, message.name or ""):
                if found := [token for token in self._special if token in said]:
                    raise UserError(
                        f"a message has {found[0]!r}, which is a mark of the chat template; leave "
                        f"it out"
                    )
        return self._backend.encode(text, add_special_tokens=False).ids

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The same as text."""
        if self.source is None:
            raise NoTemplateError(
                "this model's tokenizer has no chat template; use /v1/completions"
            )
        # A template comes with the model, and is a program: it runs without a way out.
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # As transformers renders: templates are written for that.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        try:
            return environment.from_string(self.source).render(
                messages=[message.model_dump(exclude_none=True) for message in messages],
                add_generation_prompt=True,
                **self._tokens,
            )
        except (TemplateError, ArithmeticError, TypeError, ValueError) as error:
            raise UserError(f"the chat template does not take these messages: {error}") from None


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); mend or remove it") from None
    return settings


def _source(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(f"{file}: is no text ({error}); mend or remove it") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None
