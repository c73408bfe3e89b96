"""Names that settings had before: files and checkpoints that have them stay readable."""

from __future__ import annotations

import logging
import os
from typing import Any

from emotrain.errors import UserError

OLD_DEFAULTS: dict[str, Any] = {"count": 128, "per_token": 8, "count_per_layer": []}
"""Old names below `model.experts`. They counted the shared experts too."""
NEW_NAMES = {"count": "routed", "per_token": "top_k", "count_per_layer": "routed_per_layer"}


def translate(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merged settings with new names for old ones, and what to write instead: dotted key -> value,
    empty where there is no old name.

    Raises:
        UserError: an old and a new name together, or a count that leaves no experts.
    """
    model = settings.get("model")
    if not isinstance(model, dict) or not isinstance(experts := model.get("experts"), dict):
        return settings, {}
    if not (old := OLD_DEFAULTS.keys() & experts.keys()):
        return settings, {}
    if new := sorted(set(NEW_NAMES.values()) & experts.keys()):
        raise UserError(
            f"model.experts.{min(old)} (an old name) and model.experts.{new[0]} are both given; "
            f"write model.experts.{NEW_NAMES[min(old)]}, which leaves out the shared experts, alone"
        )
    shared = experts.get("shared", 1)
    routed = {
        NEW_NAMES[name]: _without(shared, name, experts.get(name, default))
        for name, default in OLD_DEFAULTS.items()
    }
    kept = {name: value for name, value in experts.items() if name not in OLD_DEFAULTS}
    # Defaults counted the shared experts too: they are said where that makes a difference.
    said = [NEW_NAMES[name] for name in OLD_DEFAULTS if name in old or shared != 1]
    renamed = {f"model.experts.{name}": routed[name] for name in said if routed[name] != []}
    return {**settings, "model": {**model, "experts": {**kept, **routed}}}, renamed


def warn_of_old_names(source: str, renamed: dict[str, Any]) -> None:
    """One line on what to write instead, from the first process of a run."""
    if os.environ.get("RANK", "0") == "0":
        shown = ", ".join(f"{key}={_shown(value)}" for key, value in renamed.items())
        logging.getLogger(__name__).warning(
            "%smodel.experts counts routed experts alone now; write %s instead of the old names",
            source,
            shown,
        )


def _without(shared: Any, name: str, value: Any) -> Any:
    """A count without the shared experts. What is no count stays: its type is refused later, under
    the new name."""
    if isinstance(value, (list, tuple)):
        return [_without(shared, name, count) for count in value]
    numbers = (value, shared)
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
        return value
    if value < shared:
        raise UserError(
            f"model.experts.{name}={value} (an old name) counts model.experts.shared={shared} too; "
            f"write model.experts.{NEW_NAMES[name]}, which counts routed experts alone"
        )
    return value - shared


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
