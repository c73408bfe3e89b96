"""The YAML file of a mixture.

    sources:
      web:   {path: data/web, weight: 0.7}
      code:  {path: data/code, weight: 0.2, max_epochs: 4}
      books: {path: data/books, weight: 0.1, domain: novels}

How much of each source: `weight`, relative to the others; or `epochs`, passes over it; or `tokens`.
A file uses one of the three. Passes and tokens are what a run of their sum reads; a run of another
length keeps the shares. With `stages` the weights stand there instead:

    stages:
      - {until_tokens: 50e9, weights: {web: 0.9, code: 0.1}}
      - {weights: {web: 0.5, code: 0.3, books: 0.2}}

Paths are relative to the file.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from emotrain.config.reading import read_settings
from emotrain.data.mixture import Mixture, Source
from emotrain.data.mixture_order import Stage, shares, source_seed
from emotrain.data.opening import open_loader
from emotrain.errors import MissingFileError, UserError

UNITS = ("weight", "epochs", "tokens")
SOURCE_KEYS = ("path", "domain", "max_epochs", *UNITS)
STAGE_KEYS = ("until_tokens", "weights")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class SourceEntry:
    """A source as the file names it."""

    name: str
    path: str
    domain: str = ""
    max_epochs: Fraction | None = None
    amount: Fraction = Fraction(0)
    """In the unit of the file; 0 where its stages have the weights."""


@dataclass(frozen=True)
class StageEntry:
    """A stage as the file names it."""

    until_tokens: int | None
    """Of the whole order; None for the last stage."""
    weights: dict[str, Fraction]


@dataclass(frozen=True)
class MixtureFile:
    """A mixture as written, before any data are looked at."""

    path: Path
    sources: tuple[SourceEntry, ...]
    unit: str
    """One of UNITS."""
    stages: tuple[StageEntry, ...] = ()


def is_mixture(path: str | Path) -> bool:
    """Whether a path is that of a mixture: a YAML file."""
    return Path(path).suffix in (".yaml", ".yml")


def open_mixture(path: str | Path, sequence_length: int, seed: int, **options: Any) -> Mixture:
    """The sequences of a mixture, in order.

    Args:
        path: the YAML file.
        sequence_length, seed: as of `open_loader`; each source gets a seed of its own.
        options: other arguments of `open_loader`, for every source.
    Raises:
        UserError: a file that cannot be used, or a source, with its name.
    """
    file = read_mixture(path)
    sources = []
    for entry in file.sources:
        own = source_seed(seed, entry.name)
        try:
            loader = open_loader(entry.path, sequence_length, own, domain=entry.domain, **options)
        except UserError as error:
            raise type(error)(f"{path}: source {entry.name}: {error}") from error
        sources.append(Source(entry.name, loader, entry.max_epochs))
    span = sources[0].loader.source.span
    return Mixture(path, sources, _stages(file, sources, sequence_length * span), seed)


def first_path(path: str | Path) -> str:
    """Where the first source lies: the tokenizer there is that of all."""
    return read_mixture(path).sources[0].path


def own_tokens(file: MixtureFile, mixture: Mixture) -> int | None:
    """Tokens of the run that the file describes, where it says passes or tokens."""
    amounts = [entry.amount for entry in file.sources]
    if file.unit == "epochs":
        loaders = (source.loader for source in mixture.sources)
        amounts = [
            amount * loader.num_sequences * loader.sequence_length
            for amount, loader in zip(amounts, loaders, strict=True)
        ]
    return round(sum(amounts)) if file.unit != "weight" else None


def read_mixture(path: str | Path) -> MixtureFile:
    """
    Raises:
        MissingFileError: no such file. UserError: it is no mixture, with the key.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; a mixture names its sources in one")
    content = read_settings(path)
    _only(f"{path}", content, ("sources", "stages"))
    named = content.get("sources")
    if not isinstance(named, dict) or not named:
        raise UserError(
            f"{path}: has no sources; give at least one, as in "
            f"`sources: {{web: {{path: data/web, weight: 1}}}}`"
        )
    stages = content.get("stages")
    sources, units = [], dict[str, str]()
    for key, value in named.items():
        name, where = str(key), f"{path}: source {key}"
        if not NAME.fullmatch(name):
            raise UserError(f"{where}: a name has letters, digits, `_`, `.`, `-`; choose another")
        if not isinstance(value, dict) or not isinstance(value.get("path"), str):
            raise UserError(f"{where}: has no path; name the folder of its data")
        _only(where, value, SOURCE_KEYS)
        if not isinstance(domain := value.get("domain", ""), str):
            raise UserError(f"{where}: domain={domain!r} is no text; name one of its domains")
        given = [unit for unit in UNITS if unit in value]
        if len(given) != (stages is None):
            raise UserError(
                f"{where}: has {' and '.join(given) or 'none'} of {', '.join(UNITS)}; give "
                + ("one of them" if stages is None else "none, the weights are in stages")
            )
        units |= {unit: name for unit in given}
        sources.append(
            SourceEntry(
                name,
                _beside(path, value["path"]),
                domain,
                _number(where, "max_epochs", value["max_epochs"])
                if "max_epochs" in value
                else None,
                _number(where, given[0], value[given[0]]) if given else Fraction(0),
            )
        )
    if len(units) > 1:
        first, second = list(units.items())[:2]
        raise UserError(
            f"{path}: source {first[1]} has {first[0]} and source {second[1]} {second[0]}; give "
            f"all sources the same"
        )
    names = [source.name for source in sources]
    entries = () if stages is None else _read_stages(path, stages, names)
    return MixtureFile(path, tuple(sources), next(iter(units), "weight"), entries)


def _read_stages(path: Path, stages: Any, names: Sequence[str]) -> tuple[StageEntry, ...]:
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{path}: stages is no list of stages; give at least one, or leave it out")
    found: list[StageEntry] = []
    for number, stage in enumerate(stages, 1):
        where, is_last = f"{path}: stage {number}", number == len(stages)
        if not isinstance(stage, dict) or not isinstance(stage.get("weights"), dict):
            raise UserError(f"{where}: has no weights; give weights: {{web: 0.7, code: 0.3}}")
        _only(where, stage, STAGE_KEYS)
        if ("until_tokens" in stage) == is_last:
            rule = "the last stage has no until_tokens" if is_last else "has no until_tokens"
            fix = "leave it out" if is_last else "say where it ends, the last one alone is open"
            raise UserError(f"{where}: {rule}; {fix}")
        weights = {
            str(name): _share(where, name, value) for name, value in stage["weights"].items()
        }
        _only(f"{where}: weights", weights, names)
        if not any(weights.values()):
            raise UserError(f"{where}: no source has a weight above 0; give one")
        until = None if is_last else int(_number(where, "until_tokens", stage["until_tokens"]))
        found.append(StageEntry(until, weights))
    unused = [name for name in names if not any(stage.weights.get(name) for stage in found)]
    if unused:
        raise UserError(
            f"{path}: no stage has a weight for {', '.join(unused)}; give one, or remove the source"
        )
    return tuple(found)


def _stages(file: MixtureFile, sources: Sequence[Source], group_tokens: int) -> list[Stage]:
    """Shares from one group to another.

    Args:
        group_tokens: tokens of a group of sequences.
    """
    if not file.stages:
        amounts = [entry.amount for entry in file.sources]
        if file.unit == "epochs":
            sizes = [source.loader.num_sequences for source in sources]
            amounts = [amount * size for amount, size in zip(amounts, sizes, strict=True)]
        return [Stage(0, shares(amounts))]
    stages, start = [], 0
    for number, entry in enumerate(file.stages, 1):
        weights = shares([entry.weights.get(source.name, Fraction(0)) for source in sources])
        stages.append(Stage(start, weights))
        if entry.until_tokens is not None:
            end = entry.until_tokens // group_tokens
            if end <= start:
                raise UserError(
                    f"{file.path}: stage {number}: until_tokens={entry.until_tokens} is not above "
                    f"{start * group_tokens}, where it begins, by one sequence at least; raise it"
                )
            start = end
    return stages


def _beside(path: Path, name: str) -> str:
    """A path relative to the file; an address of an object store stays as it is."""
    return name if "://" in name else str(path.parent / name)


def _share(where: str, name: Any, value: Any) -> Fraction:
    return Fraction(0) if value == 0 and value is not False else _number(where, str(name), value)


def _number(where: str, key: str, value: Any) -> Fraction:
    """A positive number, exactly as it is written."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise UserError(f"{where}: {key}={value!r} is no positive number; give one")
    return Fraction(repr(value))


def _only(where: str, content: dict[Any, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise UserError(
                f"{where}: {key} is not known; "
                + (f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}")
            )
