"""What the `rates` phase measured, written into emotrain/planning/hardware.py."""

from __future__ import annotations

import ast
import json
import textwrap
from pathlib import Path

from emotrain.planning.hardware import RATES, Rate

WIDTH = 100


def apply_rates(entries: str, path: Path) -> list[str]:
    """Replace entries of `RATES` in the file.

    Args:
        entries: those of `rates_text`.
    Returns:
        The names that were replaced.
    """
    measured: dict[str, Rate] = eval("{" + entries + "}", {"Rate": Rate})  # written by rates_text
    lines = path.read_text(encoding="utf-8").splitlines()
    for key, value in reversed(_entries_of("\n".join(lines))):
        if (rate := measured.get(key)) is not None:
            assert value.end_lineno is not None
            lines[value.lineno - 1 : value.end_lineno] = _shown(key, rate)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [name for name in RATES if name in measured]


def _entries_of(source: str) -> list[tuple[str, ast.expr]]:
    """Keys and values of the dictionary RATES, each of which begins a line."""
    (table,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "RATES"
    )
    assert isinstance(table, ast.Dict)
    return [
        (str(key.value), value)
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant)
    ]


def _shown(name: str, rate: Rate) -> list[str]:
    """An entry as the formatter leaves it: an argument a line, its meaning in lines of strings."""
    pieces = textwrap.wrap(rate.meaning, WIDTH - 12)
    meaning = [f"        {json.dumps(piece + ' ')}" for piece in pieces[:-1]]
    numbers = (f"{value:.3g}" for value in (rate.value, rate.pessimistic, rate.optimistic))
    return [
        f'    "{name}": Rate(',
        *(f"        {float(number)}," for number in numbers),
        f'        "{rate.kind}",',
        *meaning,
        f"        {json.dumps(pieces[-1])},",
        "    ),",
    ]
