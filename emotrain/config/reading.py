"""Settings from YAML files and the command line, and back into a file."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emotrain.config.old_names import translate, warn_of_old_names
from emotrain.config.rules import check, pool_fault
from emotrain.config.schema import Config, flatten
from emotrain.errors import MissingFileError, UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, the files its `base:` names, and `key=value` overrides, and check the
    result.

    Raises:
        ValueError: an unknown setting (names the nearest known one), a wrong type, a value out of
            range or a combination that cannot work. FileNotFoundError: no such file.
    """
    path = Path(path)
    settings = _read_yaml_chain(path, ())
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"{override!r} is not a setting; write key=value, for example optimizer.lr=1e-3"
            )
        _set(settings, key.strip(), _parse_scalar(key, value))
    return config_from_dict(settings, f"{path}: ")


def config_from_dict(settings: dict[str, Any], source: str = "") -> Config:
    """Build and check a Config from nested dictionaries; see `load_config` for errors.

    Args:
        source: what a warning about old names begins with.
    """
    settings, renamed = translate(settings)
    config = _build(Config, settings, "")
    if renamed and pool_fault(config.model):
        # Runs from before the rule go on with the pools that they drew.
        config = _allow_larger_pools(config)
        renamed["model.router.pool.allow_larger"] = True
    check(config)
    if renamed:
        warn_of_old_names(source, renamed)
    return config


def _allow_larger_pools(config: Config) -> Config:
    router = config.model.router
    pool = dataclasses.replace(router.pool, allow_larger=True)
    router = dataclasses.replace(router, pool=pool)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, router=router))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries, the inverse of `config_from_dict`."""
    return dataclasses.asdict(config)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to the same value."""
    from omegaconf import OmegaConf

    settings = config_to_dict(config)
    settings["model"]["experts"]["routed_per_layer"] = list(config.model.experts.routed_per_layer)
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(settings)), encoding="utf-8")


def _read_yaml_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's settings over those of the file its `base:` names (relative to the file
    itself)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: its base files lead back to it; break the circle")
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such configuration file; `ls configs` shows those that come with the "
            f"project"
        )
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must hold `key: value` settings, not a {type(settings).__name__}")
    base = settings.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise UserError(f"{path}: base={base!r} must be the name of one file")
    merged = _read_yaml_chain(path.parent / base, (*seen, path))
    _merge(merged, settings)
    return merged


def _merge(into: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _set(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        child = settings.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{dotted}: {parent} is a value, not a group of settings")
        settings = child
    settings[leaf] = value


def _parse_scalar(key: str, text: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{key}={text} is not readable: {' '.join(str(error).split())}") from None


def _build(cls: type, settings: Any, prefix: str) -> Any:
    """An instance of a settings class from a dictionary, refusing unknown keys and wrong types."""
    if not isinstance(settings, dict):
        raise UserError(
            f"{prefix.rstrip('.')}={settings!r} is a group of settings; give it as `name: value` "
            f"lines"
        )
    known = {item.name: item for item in dataclasses.fields(cls)}
    for name in settings:
        if name not in known:
            raise UserError(_unknown(f"{prefix}{name}"))
    types = typing.get_type_hints(cls)
    values = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(types[name]):
            values[name] = _build(types[name], value, f"{prefix}{name}.")
        else:
            values[name] = _coerce(f"{prefix}{name}", value, types[name])
    return cls(**values)


def _unknown(key: str) -> str:
    known = {name for name, _ in flatten(Config())}
    known |= {name[:dot] for name in known for dot, letter in enumerate(name) if letter == "."}
    nearest = max(sorted(known), key=lambda name: _likeness(key, name))
    hint = (
        f"did you mean {nearest}?"
        if _likeness(key, nearest) >= 0.6
        else "`emotrain settings` lists them all"
    )
    return f"{key} is not a setting; {hint}"


def _likeness(wanted: str, known: str) -> float:
    """How well a known setting answers a wanted one: by its last word, and more so in the same
    section."""
    (section, _, leaf), (known_section, _, known_leaf) = (
        wanted.rpartition("."),
        known.rpartition("."),
    )
    words, known_words = leaf.split("_"), known_leaf.split("_")
    alike = difflib.SequenceMatcher(None, leaf, known_leaf).ratio()
    if len(words) > 1 and known_leaf == "".join(word[:1] for word in words):  # learning_rate, lr
        alike = 0.9
    if common := max(
        (len(word) for word in words if word in known_words), default=0
    ):  # batch_size, global_batch
        alike = max(alike, 0.6 + 0.01 * common)
    return alike + 0.2 * (section == known_section) if alike >= 0.6 else 0.0


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """`value` as the type of its field. Whole floats pass as integers, so that `tokens: 130e9`
    can be written."""
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        kind is int
        and is_number
        and (isinstance(value, int) or value.is_integer())
        and abs(value) < 2**63
    ):
        return int(value)
    if (
        kind is float
        and is_number
        and not (isinstance(value, int) and abs(value) > sys.float_info.max)
    ):
        return float(value)
    if (
        kind == tuple[int, ...]
        and isinstance(value, (list, tuple))
        and all(type(v) is int and v >= 0 for v in value)
    ):
        return tuple(value)
    names = {
        bool: "true or false",
        str: "text",
        int: "a whole number below 2^63",
        float: "a number",
        tuple[int, ...]: "a list of whole numbers",
    }
    raise UserError(f"{key}={value!r} must be {names[kind]}")
