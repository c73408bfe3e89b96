"""The names that a request may ask for: the full model, subsets of its experts, and `auto:K`."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from emotrain.config import Config
from emotrain.errors import UserError
from emotrain.generation.loading import load_subset
from emotrain.generation.request import PoolOfText, read_pool

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
AUTO = re.compile(r"auto:(?:\d{1,6}|0?\.\d{1,6}|1\.0)")
MOST_SUBSETS = 1024


class UnknownModelError(UserError):
    """No model of that name is served."""


class ForbiddenError(UserError):
    """The server was not started to do that."""


@dataclass(frozen=True)
class ServedModel:
    """What a name stands for."""

    subset: list[Tensor] | None = None
    """For each layer bool [N]: the routed experts that may be used; None for all."""
    pool: PoolOfText | None = None


class ModelTable:
    """Models by name. Subsets come and go while requests run: a request keeps what it has."""

    def __init__(self, name: str, folder: Path, config: Config, subset_folder: Path | None):
        """
        Args:
            name: of the full model.
            folder: the checkpoint.
            subset_folder: where files of subsets may be loaded from by request; None: nowhere.
        Raises:
            UserError: the name cannot be.
        """
        self.name, self._folder, self._config = check_name(name), folder, config
        self._subset_folder = subset_folder.resolve() if subset_folder else None
        self._subsets: dict[str, list[Tensor]] = {}
        self._lock = threading.Lock()

    def find(self, name: str) -> ServedModel:
        """
        Raises:
            UnknownModelError: nothing has that name; says what there is.
        """
        if name == self.name:
            return ServedModel()
        subset = self._subsets.get(name)
        if subset is not None:
            return ServedModel(subset)
        if AUTO.fullmatch(name):
            return ServedModel(pool=read_pool(name, "", self._config.model))
        raise UnknownModelError(
            f"model {name[:80]!r} is not served; there are {', '.join(self.names())} and auto:K "
            f"(K experts a layer, or a share)"
        )

    def names(self) -> list[str]:
        """The full model, then subsets in the order they came."""
        return [self.name, *self._subsets]

    def load(self, name: str, file: Path) -> None:
        """Serve a subset. The same name again takes the new file.

        Raises:
            UserError: the name cannot be or is the model's, or the file is not a subset of it.
        """
        if check_name(name) == self.name:
            raise UserError(f"{name} is the name of the full model; choose another")
        masks = load_subset(file, self._folder, self._config)
        with self._lock:
            if len(self._subsets) >= MOST_SUBSETS and name not in self._subsets:
                raise UserError(f"{MOST_SUBSETS} subsets are loaded; unload one first")
            self._subsets[name] = masks

    def load_requested(self, name: str, path: str) -> None:
        """The same of a path that came over the network, inside of the folder for that.

        Raises:
            ForbiddenError: there is no such folder, or the path leaves it.
        """
        if self._subset_folder is None:
            raise ForbiddenError(
                "subsets cannot be loaded by request; start the server with --subset-folder DIR"
            )
        try:
            file = (self._subset_folder / path).resolve()
        except (OSError, ValueError) as error:
            raise UserError(f"path {path[:200]!r} cannot be ({error}); give a file") from None
        if not file.is_relative_to(self._subset_folder):
            raise ForbiddenError(f"path {path[:200]!r} is not in the folder of subsets")
        try:
            self.load(name, file)
        except UserError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"path {path[:200]!r} cannot be read ({reason})") from None

    def unload(self, name: str) -> None:
        """
        Raises:
            UnknownModelError: no subset has that name.
        """
        with self._lock:
            if self._subsets.pop(name, None) is None:
                known = ", ".join(self._subsets) or "none"
                raise UnknownModelError(f"subset {name[:80]!r} is not loaded; there are: {known}")


def check_name(name: str) -> str:
    """
    Raises:
        UserError: not a name for a model.
    """
    if NAME.fullmatch(name) is None:
        raise UserError(
            f"name {name[:80]!r}: give letters, digits, points, dashes and underscores, at most 64"
        )
    return name


def named_files(words: list[str]) -> Mapping[str, Path]:
    """`NAME=FILE` of the command line.

    Raises:
        UserError: another form, or a name twice.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, separator, file = word.partition("=")
        if not separator or not file:
            raise UserError(f"--subset {word}: give a name and a file: rust=rust.json")
        if name in found:
            raise UserError(f"--subset {word}: the name {name} is given twice; choose another")
        found[name] = Path(file)
    return found
