"""Conversations as text, by the template of the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from emotrain.errors import UserError
from emotrain.serving.schema import ChatMessage


class NoTemplateError(UserError):
    """The tokenizer has no template for conversations."""


class ChatTemplate:
    """The template beside a tokenizer: `chat_template.jinja`, or in `tokenizer_config.json`."""

    def __init__(self, folder: Path):
        self.source = _source(folder)
        """None where there is none."""

    def render(self, messages: list[ChatMessage]) -> str:
        """The text that the model goes on from.

        Raises:
            NoTemplateError: there is none. UserError: it does not take these messages.
        """
        if self.source is None:
            raise NoTemplateError(
                "this model's tokenizer has no chat template; use /v1/completions"
            )
        # A template comes with the model, and is a program: it runs without a way out.
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.source).render(
                messages=[message.model_dump(exclude_none=True) for message in messages],
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template does not take these messages: {error}") from None


def _source(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); mend or remove it") from None
    return template if isinstance(template, str) else None
