"""A new folder that is whole or does not exist: a `StagedFolder` with a lock, which tells what a
process writes from what a dead one left. Data sets, imports and exports are made so."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from emotrain.errors import ExistingFileError, UserError, WriteError
from emotrain.folders import StagedFolder, remove

GOES_ON = "prepare"
"""Token of folders that wait to be gone on with (`emotrain.preparation.half_done`): they are no
leftovers."""

LOCK = ".lock"
"""Held while a staging folder is being written; one that nobody holds was left behind by a
process that died."""


class Staging:
    """Writes into a hidden folder beside `out`, and gives it the name of `out` in `commit`. Without
    a commit it is removed.

    A process killed at any moment leaves `out` as it was before or as it is after. What it had
    written so far is removed by the next one that writes to `out`.

    Args:
        out: a folder that does not exist, or is empty.
        num_bytes: that will be written, as far as it is known: refused where the disk has less.
        check_replaceable: raises where the folder at `out` may not be replaced; without it none
            may.
        space_hint: how much space is needed, for the line that says that there is none.
    Raises:
        ValueError: `out` exists and may not be replaced, or something that is not a folder is where
            it would lie. OSError: the disk has not enough space.
    """

    def __init__(
        self,
        out: str | Path,
        num_bytes: int = 0,
        check_replaceable: Callable[[Path], None] | None = None,
        space_hint: str = "",
    ):
        self.out = Path(os.path.realpath(out))
        self._check_replaceable, self._space_hint = check_replaceable, space_hint
        self._check_target()
        self._remove_leftovers()
        self.staged = StagedFolder(self.out)
        self.staged.make(num_bytes)
        self.folder = self.staged.path
        self._lock = open(self.folder / LOCK, "w")  # noqa: SIM115 (locked until __exit__)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._lock.write("written to by a running process while locked\n")
        self._lock.flush()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        self.staged.discard()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WriteError(
                f"no space left on the disk of {self.out}; free some or choose another --out"
                f"{self._space_hint}"
            ) from None

    def commit(self, publish: Callable[[], None] | None = None) -> None:
        """Make the staged folder `out`, in place of what may be replaced.

        Args:
            publish: gives the folder its name; `StagedFolder.publish` by default.
        """
        self._check_target()
        (publish or self.staged.publish)()
        (self.out / LOCK).unlink()

    def _check_target(self) -> None:
        out = self.out
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{out.parent}: not a folder; choose another --out") from None
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if self._check_replaceable is None:
            raise ExistingFileError(f"{out}: exists; choose another --out")
        self._check_replaceable(out)

    def _remove_leftovers(self) -> None:
        place, name = self.out.parent, glob.escape(self.out.name)
        for folder in place.glob(f".{name}.removed-*"):
            remove(folder)
        # They once had a name that was not hidden.
        for folder in [*place.glob(f".{name}.partial-*"), *place.glob(f"{name}.partial-*")]:
            if not folder.name.endswith(f".partial-{GOES_ON}") and is_abandoned(folder):
                remove(folder)


def is_abandoned(folder: Path) -> bool:
    """Whether no process writes a staged folder any more: it died, or replaced another folder and
    died before it had removed that. An empty folder is just being made."""
    lock = folder / LOCK
    if not lock.is_file():
        return folder.name.startswith(".") and any(folder.iterdir())
    if not lock.stat().st_size:
        return False
    with open(lock) as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
