"""What differs between the data of a checkpoint and those of the run that goes on from it, as far
as they have been read."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any


def difference(then: str, now: str, position: int) -> str:
    """What differs between the data of two fingerprints before a position, in words; empty where
    nothing does. Of mixtures the weights of later positions, and sources that have not been read,
    make no difference."""
    old, new = _mixture(then), _mixture(now)
    if then == now:
        return ""
    if old is None or new is None:
        return f"fingerprint {_short(then, old)}, here {_short(now, new)}"
    if old["span"] != new["span"]:
        return f"with groups of {old['span']} sequences, here of {new['span']}"
    old_stages, new_stages = _stages(old, position), _stages(new, position)
    for index, (start, weights) in enumerate(old_stages):
        if index >= len(new_stages) or new_stages[index][0] != start:
            return f"a stage begins at sequence {start}, and here none does"
        if changed := _of_weights(weights, new_stages[index][1]):
            return changed
    if len(new_stages) > len(old_stages):
        return f"a stage begins at sequence {new_stages[len(old_stages)][0]}, and there none did"
    used = [name for name in old["mixture"] if any(name in weights for _, weights in old_stages)]
    for name in used:
        if old["mixture"][name] != new["mixture"].get(name):
            return f"source {name} has other data or another sequence length"
    if used != [name for name in new["mixture"] if name in used]:
        return f"the sources were in the order {', '.join(used)}"
    return ""


def _of_weights(then: dict[str, Fraction], now: dict[str, Fraction]) -> str:
    changes = [
        f"{name} had weight {float(then.get(name, 0)):.6g}, here {float(now.get(name, 0)):.6g}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]
    return ", ".join(changes)


def _mixture(fingerprint: str) -> dict[str, Any] | None:
    return json.loads(fingerprint) if fingerprint.startswith('{"mixture"') else None


def _stages(mixture: dict[str, Any], position: int) -> list[tuple[int, dict[str, Fraction]]]:
    """Start and weights, without those of 0, of the stages that begin before a position."""
    return [
        (start, {name: Fraction(weight) for name, weight in weights.items() if Fraction(weight)})
        for start, weights in mixture["stages"]
        if start < position
    ]


def _short(fingerprint: str, mixture: dict[str, Any] | None) -> str:
    return fingerprint if mixture is None else f"a mixture of {', '.join(mixture['mixture'])}"
