"""Proves that the reference page is true, and that settings can be searched at a terminal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from emotrain.cli import main
from emotrain.config import (
    Config,
    flatten,
)
from emotrain.settings import field_docs, settings_reference, settings_text

ROOT = Path(__file__).resolve().parents[1]


# ---- the reference page


def test_every_setting_is_documented() -> None:
    def classes(cls: type) -> list[type]:
        inner = [type(getattr(cls(), item.name)) for item in dataclasses.fields(cls)]
        return [
            cls,
            *(found for kind in inner if dataclasses.is_dataclass(kind) for found in classes(kind)),
        ]

    for cls in classes(Config):
        assert field_docs(cls).keys() == {item.name for item in dataclasses.fields(cls)}


def test_the_settings_page_is_the_generated_one() -> None:
    page = settings_reference()
    assert all(f"| `{key}` |" in page for key, _ in flatten(Config()))
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == page, (
        "run: emotrain settings --markdown > docs/settings.md"
    )


def test_the_page_has_no_empty_part() -> None:
    for part in settings_reference().split("\n## ")[1:]:
        assert part.count("\n| `") >= 1, part


def test_a_terminal_gets_the_same_in_100_columns() -> None:
    text = settings_text()
    assert max(map(len, text.splitlines())) <= 100 and "|" not in text
    for key, default in flatten(Config()):
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        assert f"  {key}={list(default) if isinstance(default, tuple) else shown}\n" in text


def test_settings_can_be_searched(capsys: pytest.CaptureFixture[str]) -> None:
    def keys(*words: str) -> list[str]:
        assert main(["settings", "--json", *words]) == 0
        return list(json.loads(capsys.readouterr().out))

    assert keys() == [key for key, _ in flatten(Config())]
    assert keys("router.pool.") == [
        f"model.router.pool.{name}"
        for name in (
            *("kind", "min", "max", "size", "per", "allow_larger", "unit", "chosen_by"),
            *("across_windows", "none_share", "warmup_steps", "scores"),
        )
    ]
    assert "optimizer.warmup_steps" in keys("Warm-Up")
    assert main(["settings", "zzz"]) == 2
    assert "no setting has 'zzz' in its name or meaning" in capsys.readouterr().err
    assert main(["settings", "pool", "--markdown"]) == 2
    assert main(["settings", "--markdown"]) == 0
    capsys.readouterr()
