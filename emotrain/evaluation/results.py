"""What an evaluation finds, as dataclasses. `evaluation.json` is their JSON form: a key for each
field, losses in nats a token."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emotrain.errors import UserError
from emotrain.evaluation.settings import EvaluationSettings

FORMAT = 1

Arm = Literal["selected", "random", "cross_domain"]
ARMS: tuple[Arm, ...] = typing.get_args(Arm)
"""Who chose the experts that are kept; see `emotrain.evaluation.measure`."""


@dataclass(frozen=True)
class ByArm:
    """One number for each arm; None where an arm has no runs, or its number is not finite."""

    selected: float | None
    random: float | None
    cross_domain: float | None


@dataclass(frozen=True)
class SubsetLosses:
    """Losses with all experts, and with the share of them that is the key of a table."""

    loss_nats: float | None
    """Of the full model; None where it is not finite."""
    subset_loss_nats: dict[str, ByArm]
    increase_nats: dict[str, ByArm]
    """Over the full model."""
    standard_error_nats: dict[str, ByArm]
    """Of the increase, over documents."""

    def increase(self, keep: str, arm: Arm) -> tuple[float, float] | None:
        """Increase of the loss with a share of the experts, and its standard error; None where the
        arm has none."""
        increase = getattr(self.increase_nats[keep], arm)
        error = getattr(self.standard_error_nats[keep], arm)
        return None if increase is None or error is None else (increase, error)


@dataclass(frozen=True)
class DomainLosses(SubsetLosses):
    """Losses of one domain, and what they were measured on."""

    documents: int
    """Held-out documents."""
    targets: int
    """Tokens of them that were predicted."""
    calibration_documents: int
    """Training documents that chose the experts."""


@dataclass(frozen=True)
class ExpertCounts:
    """Experts of the layers. Counts of a layer have the shared experts in them."""

    per_layer: tuple[int, ...]
    shared: int
    per_token: int
    kept_per_layer: dict[str, tuple[int, ...]]
    """For each share, what each layer keeps."""

    def keeps_all(self, keep: str) -> bool:
        """Whether a share leaves no expert out in any layer."""
        return self.kept_per_layer[keep] == self.per_layer

    def label(self, keep: str) -> str:
        """`8 of 32`, or the share where layers differ in size."""
        kept, of = set(self.kept_per_layer[keep]), set(self.per_layer)
        if len(kept) == len(of) == 1:
            return f"{kept.pop()} of {of.pop()}"
        return f"{float(keep):.3g} of each layer"


@dataclass(frozen=True)
class RoutingSummary:
    """How far the domains part ways in the full model; a list has one entry for each layer with
    routed experts."""

    domain_cosine_per_layer: tuple[float | None, ...]
    """Of the mean routing of two domains, mean over pairs; empty with one domain."""
    domain_cosine: float | None
    effective_experts_per_layer: tuple[float | None, ...]
    """That one document spreads over: exp of the entropy of its mean routing."""
    effective_experts: float | None


@dataclass(frozen=True)
class Measurement:
    """What `emotrain.evaluation.measure.measure` finds out about a model."""

    settings: EvaluationSettings
    """As measured: shares in falling order, domains by name."""
    experts: ExpertCounts
    domains: dict[str, DomainLosses]
    mean: SubsetLosses
    """Over domains, each with the same weight."""
    routing: RoutingSummary

    @property
    def keeps(self) -> tuple[str, ...]:
        """The shares measured, in falling order: the keys of every table."""
        return tuple(map(str, self.settings.keep))

    @property
    def smaller_keeps(self) -> tuple[str, ...]:
        """Those of them that leave experts out."""
        return tuple(keep for keep in self.keeps if not self.experts.keeps_all(keep))


@dataclass(frozen=True, kw_only=True)
class Evaluation(Measurement):
    """What was measured, of what, on what."""

    checkpoint: str
    step: int
    data: str
    sequence_length: int

    def to_json(self) -> dict[str, Any]:
        """For `emotrain.files.json_text`; what was evaluated comes first."""
        values = dataclasses.asdict(self)
        head = {name: values.pop(name) for name in Evaluation.__annotations__}
        return {"format": FORMAT, **head, **values}

    @classmethod
    def from_json(cls, value: Any, file: Path) -> Evaluation:
        """The inverse of `to_json`. Nothing in `value` is trusted.

        Args:
            file: where it is from, for messages.
        Raises:
            UserError: a key is unknown or missing, or its value is of another type or does not fit
                the others; names the file and the key.
        """
        try:
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                form = value.get("format") if isinstance(value, dict) else value
                raise UserError(f"format is {form!r}, not {FORMAT}")
            fields = {key: item for key, item in value.items() if key != "format"}
            result: Evaluation = read_as(cls, fields)
            _check_shares(result)
            return result
        except ValueError as error:
            raise UserError(
                f"{file}: not a result of `emotrain evaluate` ({error}); run it again"
            ) from None


def read_evaluation(file: Path) -> Evaluation:
    """The evaluation that a file holds.

    Raises:
        UserError: the file is not readable as one.
    """
    try:
        # Files of before hold a bare NaN for what is null now.
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not a result of `emotrain evaluate` ({error}); run it again"
        ) from None
    return Evaluation.from_json(value, file)


LATER_KEYS = {EvaluationSettings: ("control_documents", "document_tokens", "domains")}
"""Fields that files of before lack. Their defaults say what was done then."""


def read_as(kind: Any, value: Any, where: str = "") -> Any:
    """A value of JSON as one of a type: dataclass, dict, tuple, optional or plain.

    Args:
        where: keys that lead to the value, with dots between them.
    Raises:
        UserError: another type, a key that is missing or not known; names it.
    """
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else read_as(parts[0], value, where)
    if origin is dict:
        _check_type(value, dict, where)
        return {key: read_as(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        _check_type(value, list, where)
        return tuple(read_as(parts[0], item, where) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    _check_type(value, kind, where)
    return value


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    _check_type(value, dict, where)
    hints, prefix = typing.get_type_hints(kind), f"{where}." if where else ""
    if unknown := sorted(value.keys() - hints.keys()):
        raise UserError(f"{prefix}{unknown[0]} is not known")
    if missing := [n for n in hints if n not in value and n not in LATER_KEYS.get(kind, ())]:
        raise UserError(f"{prefix}{missing[0]} is missing")
    return kind(**{name: read_as(hints[name], item, prefix + name) for name, item in value.items()})


def _check_type(value: Any, kind: type, where: str) -> None:
    if type(value) is not kind:
        names = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
        raise UserError(f"{where or 'it'} is {value!r}, not {names.get(kind, 'a number')}")


def _check_shares(result: Evaluation) -> None:
    """Every table has the shares that were measured as its keys, and there is something in them."""
    tables: dict[str, dict[str, Any]] = {"experts.kept_per_layer": result.experts.kept_per_layer}
    losses = {"mean": result.mean}
    losses.update({f"domains.{name}": domain for name, domain in result.domains.items()})
    for where, entry in losses.items():
        for key in ("subset_loss_nats", "increase_nats", "standard_error_nats"):
            tables[f"{where}.{key}"] = getattr(entry, key)
    for where, table in tables.items():
        if table.keys() != set(result.keeps):
            raise UserError(
                f"{where} has the shares {', '.join(table)}, settings.keep has "
                f"{', '.join(result.keeps)}"
            )
    if not result.domains:
        raise UserError("domains is empty")
    routing = result.routing
    layers = len(routing.effective_experts_per_layer)
    if len(routing.domain_cosine_per_layer) not in (0, layers):
        raise UserError(f"routing.domain_cosine_per_layer has not {layers} entries")
