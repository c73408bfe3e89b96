"""A subset of experts as a file: which experts each layer keeps, why, and of which model.

One JSON object. The keys of the published `pruning_metadata.json` (spec 7.4) are among its own, so
that what reads those reads this.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.errors import MissingFileError, UserError
from emotrain.files import json_text, write_whole

FORMAT = 1
LARGEST = 1 << 28
"""Bytes of the largest file that is read: scores of 10 million experts."""

METHOD_NAMES = {
    "router": "greedy_layerwise",
    "router_once": "global",
    "easy_ep_reference": "easy_ep",
    "random": "random",
}
"""Methods that the published scripts have, by their names there."""


@dataclass(frozen=True)
class Calibration:
    """The text that chose the experts."""

    source: str
    """The data folder or file, or `prompt`."""
    domain: str
    """The domain of the data; empty where it has none."""
    documents: int
    tokens: int
    """Tokens that scored, end-of-document tokens included."""
    fingerprint: str
    """sha256 over the token ids of the documents, in order."""


@dataclass(frozen=True)
class Fidelity:
    """How near the subset's predictions are to the full model's, without labels."""

    kl_nats: float
    """Mean over tokens of KL(full || subset)."""
    acceptance: float
    """Mean over tokens of the sum of min(p, q) over the vocabulary: the share of the subset's
    tokens that speculative decoding with the full model would accept."""
    documents: int
    tokens: int
    held_back: bool
    """Whether the documents had no part in the choice; not where a single one was given."""


@dataclass(frozen=True)
class Parent:
    """A subset that another one was made of."""

    file: str
    """Where it was."""
    fingerprint: str
    """sha256 of the file."""
    method: str
    domain: str
    weight: float = 1.0
    """Of its scores in a merge."""


@dataclass(frozen=True)
class Subset:
    """Which experts of a model are kept."""

    experts_kept_per_layer: tuple[tuple[int, ...], ...]
    """For each layer, ascending: ids of routed experts in [0, N), then the shared ones, N to
    E - 1."""
    experts_per_layer: tuple[int, ...]
    """E of each layer of the full model."""
    num_shared_experts: int
    method: str
    """By which the experts were chosen, or the operation on `parents`: `union`, …"""
    precision: str
    """Of the weights that were scored: `fp32` or `bf16`; `mixed` where those of parents differ."""
    budget: str
    """What was asked for; empty for an operation that has none."""
    checkpoint: str
    """Folder of the full model, where it was."""
    checkpoint_fingerprint: str
    """Checksum of its manifest."""
    tokenizer_fingerprint: str
    """sha256 of its tokenizer.json; empty without one."""
    calibration: Calibration
    scores_per_layer: tuple[tuple[float, ...], ...] = ()
    """Score of every routed expert of each layer; empty where the method has none."""
    forward_passes: int = 0
    """Passes of the calibration text through the model."""
    seed: int = 0
    fidelity: Fidelity | None = None
    parents: tuple[Parent, ...] = ()
    """The subsets that this one was made of, in their order; empty for one that was selected."""

    def __post_init__(self) -> None:
        _check(self)

    def routed(self, layer: int) -> tuple[int, ...]:
        """Ids of the routed experts that a layer keeps."""
        routed = self.experts_per_layer[layer] - self.num_shared_experts
        return tuple(i for i in self.experts_kept_per_layer[layer] if i < routed)

    def to_json(self) -> dict[str, Any]:
        """With the published keys."""
        counts = [len(kept) for kept in self.experts_kept_per_layer]
        return {
            "format": FORMAT,
            **dataclasses.asdict(self),
            "original_model": self.checkpoint,
            "prune_keep_k": counts[0] if len(set(counts)) == 1 else min(counts),
            "pruning_method": METHOD_NAMES.get(self.method, self.method),
            "task": self.calibration.domain or self.calibration.source,
            "split": "train",
            "num_shots_override": None,
            "num_calibration": self.calibration.documents,
            "prune_seed": self.seed,
        }

    def save(self, path: Path) -> Path:
        return write_whole(path, (json_text(self.to_json(), indent=1) + "\n").encode())


def read_subset(path: str | Path) -> Subset:
    """Read an artefact. Nothing in it is trusted.

    Raises:
        UserError: no such file, not an artefact of this format, or experts that cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such subset; write one with emotrain select")
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path.stat().st_size} bytes are more than a subset takes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise UserError(f"format {found!r} is not {FORMAT}, the one this version reads")
        return _build(Subset, content)
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not a usable subset ({reason}); select it again") from None


def _build(cls: type, content: Mapping[str, Any]) -> Any:
    """A dataclass of what JSON holds, each value of its declared type."""
    values = {}
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        if entry.name in content:
            values[entry.name] = _value(entry.name, content[entry.name], hints[entry.name])
        elif entry.default is dataclasses.MISSING:
            raise UserError(f"{entry.name} is missing")
    return cls(**values)


def _value(name: str, value: Any, kind: Any) -> Any:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list):
            return tuple(_value(name, item, arguments[0]) for item in value)
    elif arguments:  # of a class, or None
        return None if value is None else _value(name, value, arguments[0])
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return _build(typing.cast(type, kind), value)
    elif kind is float:
        if type(value) in (int, float) and abs(value) < math.inf:
            return float(value)
    elif type(value) is kind:
        return value
    raise UserError(f"{name} holds {_shown(value)}, which is not what it should be")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _check(subset: Subset) -> None:
    layers, shared = len(subset.experts_per_layer), subset.num_shared_experts
    if not layers or len(subset.experts_kept_per_layer) != layers:
        raise UserError(
            f"experts_kept_per_layer has {len(subset.experts_kept_per_layer)} layers, "
            f"experts_per_layer {layers}"
        )
    if subset.scores_per_layer and len(subset.scores_per_layer) != layers:
        raise UserError(f"scores_per_layer has {len(subset.scores_per_layer)} layers of {layers}")
    if shared < 0:
        raise UserError(f"num_shared_experts={shared} is negative")
    for layer, (kept, most) in enumerate(
        zip(subset.experts_kept_per_layer, subset.experts_per_layer, strict=True)
    ):
        if list(kept) != sorted(set(kept)) or not all(0 <= i < most for i in kept):
            raise UserError(
                f"layer {layer} keeps experts {_shown(list(kept))}, which must be ascending and "
                f"between 0 and {most - 1}, each once"
            )
        routed = most - shared
        if routed < 0 or list(kept[-shared:] if shared else ()) != list(range(routed, most)):
            raise UserError(f"layer {layer} leaves out a shared expert of {routed} to {most - 1}")
        if routed and len(kept) == shared:
            raise UserError(f"layer {layer} keeps no routed expert; at least one is needed")
        scores = subset.scores_per_layer[layer] if subset.scores_per_layer else None
        if scores is not None and len(scores) != routed:
            raise UserError(f"layer {layer} has {len(scores)} scores for {routed} routed experts")


def kept_of(routed: Sequence[int], num_routed: int, num_shared: int) -> tuple[int, ...]:
    """A layer's entry of `experts_kept_per_layer`: its routed experts, then the shared ones."""
    return (*sorted(routed), *range(num_routed, num_routed + num_shared))
