"""Settings from YAML files and the command line, and back into a file.

OmegaConf reads the YAML, merges and interpolates. The types are checked here, because OmegaConf
turns "2" into 2 and 1 into true, and a mistake should be said instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from emotrain.config.kinds import PATH, Counts, Names, PathText, Shares
from emotrain.config.old_names import translate, warn_of_old_names
from emotrain.config.rules import check, pool_fault
from emotrain.config.schema import Config, flatten, setting_types
from emotrain.errors import MissingFileError, UserError

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig

OTHER_NAMES = {
    "betas": "optimizer.beta1",
    "batch_size": "training.global_batch",
    "grad_clip": "optimizer.clip_norm",
    "hidden_size": "model.d_model",
    "learning_rate": "optimizer.lr",
    "max_grad_norm": "optimizer.clip_norm",
    "max_lr": "optimizer.lr",
    "max_seq_len": "data.sequence_length",
    "max_steps": "training.steps",
    "n_layers": "model.num_layers",
    "num_experts": "model.experts.routed",
    "num_experts_per_tok": "model.experts.top_k",
    "output_dir": "training.run_dir",
    "save_every": "training.checkpoint_every",
}
"""Names that other trainers use for our settings and that look too different to be guessed."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, the files its `base:` names, and `key=value` overrides, and check the
    result.

    Raises:
        UserError: an unknown setting (names the nearest known one), a wrong type, a value out of
            range or a combination that cannot work. MissingFileError: no such file.
    """
    from omegaconf import OmegaConf

    path = Path(path)
    merged = OmegaConf.merge(_read_file(path, ()), *map(_read_override, overrides))
    with _one_line(f"{path}"):
        settings = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    return config_from_dict({str(name): value for name, value in settings.items()}, f"{path}: ")


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a YAML file and the files its `base:` names say, without what they leave open; see
    `load_config` for errors."""
    from omegaconf import OmegaConf

    with _one_line(f"{path}"):
        settings = OmegaConf.to_container(_read_file(Path(path), ()), resolve=True)
    assert isinstance(settings, dict)
    return {str(name): value for name, value in settings.items()}


def with_settings(
    config: Config, settings: dict[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """A configuration with some settings in place of its own, and `key=value` over those; see
    `load_config` for errors."""
    from omegaconf import OmegaConf

    base, over = (_without_interpolation(each) for each in (config_to_dict(config), settings))
    merged = OmegaConf.merge(base, over, *map(_read_override, overrides))
    with _one_line("settings"):
        resolved = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return config_from_dict({str(name): value for name, value in resolved.items()})


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


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries, the inverse of `config_from_dict`."""
    return dataclasses.asdict(config)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to the same value."""
    from omegaconf import OmegaConf

    settings = config_to_dict(config)
    settings["model"]["experts"]["exclusive"] = dict(config.model.experts.exclusive)
    text = OmegaConf.to_yaml(OmegaConf.create(_without_interpolation(settings)))
    Path(path).write_text(text, encoding="utf-8")


def _without_interpolation(value: Any) -> Any:
    """Settings whose texts are read back as they are, `${` in them too."""
    if isinstance(value, dict):
        return {name: _without_interpolation(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_interpolation(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _allow_larger_pools(config: Config) -> Config:
    router = config.model.router
    pool = dataclasses.replace(router.pool, allow_larger=True)
    router = dataclasses.replace(router, pool=pool)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, router=router))


def _read_file(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    """The file's settings over those of the file its `base:` names (relative to the file
    itself)."""
    from omegaconf import DictConfig, OmegaConf

    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: its base files lead back to it; break the circle")
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such configuration file; `ls configs` shows those that come with the "
            f"project"
        )
    with _one_line(f"{path}: not readable as YAML"):
        settings = OmegaConf.load(path)
    if not isinstance(settings, DictConfig):
        raise UserError(f"{path}: must hold `key: value` settings, not a list")
    with _one_line(f"{path}"):
        base = settings.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise UserError(f"{path}: base={base!r} must be the name of one file")
    merged = OmegaConf.merge(_read_file(path.parent / base, (*seen, path)), settings)
    assert isinstance(merged, DictConfig)
    return merged


def _read_override(override: str) -> DictConfig:
    """`key=value` as settings: text is taken as typed, other values are read as in a file."""
    from omegaconf import OmegaConf

    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(
            f"{override!r} is not a setting; write key=value, for example optimizer.lr=1e-3"
        )
    with _one_line(f"{key}={value} is not readable"):
        if _is_text(setting_types().get(key)):
            return OmegaConf.create(_nested(key, _unquoted(value)))
        return OmegaConf.from_dotlist([f"{key}={value}"])


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _unquoted(text: str) -> str:
    """Text without the quotes around it that a file would need."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Errors of YAML and OmegaConf in one line, with the setting they are about."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].removeprefix("KeyError raised while resolving ")
        key = f": {error.full_key}" if error.full_key else ""
        raise UserError(f"{what}{key}: {reason}") from None
    except (YAMLError, UnicodeError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from None
    except OSError as error:
        if error.errno is not None:  # the disk, and no fault of the content
            raise
        raise UserError(f"{what}: {' '.join(str(error).split())}") from None


def _build(cls: type, settings: Any, prefix: str) -> Any:
    """An instance of a settings class from a dictionary, refusing unknown keys and wrong types."""
    if not isinstance(settings, dict):
        raise UserError(
            f"{prefix.rstrip('.')}={settings!r} is a group of settings; give it as `name: value` "
            f"lines"
        )
    types = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if name not in types:
            raise UserError(_unknown(key, str(name), value))
        if dataclasses.is_dataclass(types[name]):
            values[name] = _build(types[name], value, f"{key}.")
        else:
            values[name] = _coerce(key, value, types[name])
    return cls(**values)


def _unknown(key: str, name: str, value: Any) -> str:
    known = {name for name, _ in flatten(Config())}
    if "." in name and key in known:
        *groups, leaf = name.split(".")
        nested = f"{leaf}: {value}"
        for group in reversed(groups):
            nested = f"{group}: {{{nested}}}"
        return f"{name} is one name with a dot in it; nest it: `{nested}`"
    nearest = _nearest(key)
    hint = f"did you mean {nearest}?" if nearest else "`emotrain settings` lists them all"
    return f"{key} is not a setting; {hint}"


def _nearest(key: str) -> str | None:
    """The setting or group that a wrong key most likely means: one of its section before any
    other."""
    section, _, leaf = key.rpartition(".")
    if leaf in OTHER_NAMES:
        return OTHER_NAMES[leaf]
    leaves = [name for name, _ in flatten(Config())]
    groups = {name[:dot] for name in leaves for dot, letter in enumerate(name) if letter == "."}
    every = [*leaves, *sorted(groups, key=len)]
    here = [name for name in every if name.rpartition(".")[0] == section]
    for candidates in (here, every):
        # Of equal last words the first one counts.
        by_leaf = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        if close := difflib.get_close_matches(leaf, by_leaf, n=1):
            return by_leaf[close[0]]
    return None


def _is_text(kind: Any) -> bool:
    return _plain(kind) is str


def _plain(kind: Any) -> Any:
    """The type of a setting without what bounds it."""
    if typing.get_origin(kind) is Literal:
        return str
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """`value` as the type of its field. Whole floats pass as integers, so that `tokens: 130e9`
    can be written."""
    plain = _plain(kind)
    if plain is bool and isinstance(value, bool):
        return value
    if plain is str and isinstance(value, str):
        _check_text(key, value)
        return os.path.expanduser(value) if PATH in typing.get_args(kind) else value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if plain is int and _is_whole(value):
            return int(value)
        if plain is float and not (isinstance(value, int) and abs(value) > sys.float_info.max):
            return float(value)
    is_list = plain == tuple[int, ...] and isinstance(value, (list, tuple))
    if is_list and all(type(count) is int and count >= 0 for count in value):
        return tuple(value)
    if plain in (Names, Shares) and isinstance(value, (list, tuple)):
        of_item = PathText if PATH in typing.get_args(kind) else typing.get_args(plain)[0]
        return tuple(_coerce(key, item, of_item) for item in value)
    if plain == Counts and (counts := _counts(value)) is not None:
        return counts
    if isinstance(value, dict) and plain != Counts:
        raise UserError(f"{key} is a value, not a group of settings; give it as {key}=VALUE")
    names = {
        bool: "true or false",
        str: "text",
        int: "a whole number below 2^63",
        float: "a number",
        tuple[int, ...]: "a list of whole numbers",
        Names: "a list of names, as in [code, law]",
        Shares: "a list of numbers, as in [0.5, 0.25]",
        Counts: "whole numbers by name, as in {name: 2}",
    }
    raise UserError(f"{key}={value!r} must be {names[plain]}{_quotes_hint(value)}")


def _check_text(key: str, text: str) -> None:
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise UserError(f"{key}={text!r} has characters that no text has; leave them out")


def _counts(value: Any) -> Counts | None:
    """Numbers by name, from a mapping or from pairs; None where it is neither."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, (list, tuple)):
        return None
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or [type(item) for item in pair] != [str, int]:
            return None
    return tuple((name, count) for name, count in pairs)


def _quotes_hint(value: Any) -> str:
    """What to say of a number that is text: from quotes, or from the environment."""
    try:
        float(value if isinstance(value, str) else "")
    except ValueError:
        return ""
    return "; leave out the quotes, and write ${oc.decode:${oc.env:NAME}} for a variable's number"


def _is_whole(value: float) -> bool:
    return (isinstance(value, int) or value.is_integer()) and abs(value) < 2**63
