"""A data set that is whole or does not exist: a `StagedFolder` with a lock, which tells what a
process writes from what a dead one left, and with a look at what it would replace."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
from pathlib import Path
from types import TracebackType

from emotrain.data.manifest import MANIFEST, SPLITS, TOKENIZER, read_manifest
from emotrain.errors import UserError, WriteError
from emotrain.folders import StagedFolder, remove

LOCK = ".lock"
"""Held while a staging folder is being written; one that nobody holds was left behind by a
process that died."""


class Staging:
    """Writes a data set into a hidden folder beside DIR, and gives it DIR's name in `commit`.
    Without a commit it is removed.

    A process killed at any moment leaves DIR as it was before or as it is after. What it had
    written so far is removed by the next one that writes to DIR.

    Args:
        out: DIR.
        overwrite: whether DIR may be an older data set, which the new one replaces. A folder that
            holds anything else is never replaced.
    Raises:
        ValueError: DIR exists and may not be replaced, or something that is not a folder is where
            it would lie.
    """

    def __init__(self, out: str | Path, overwrite: bool = False):
        self.out = Path(os.path.realpath(out))
        self.overwrite = overwrite
        self._check_target()
        self._remove_leftovers()
        self._staged = StagedFolder(self.out)
        self._staged.make()
        self.folder = self._staged.path
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
        self._staged.discard()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WriteError(
                f"no space left on the disk of {self.out}; free some or choose another --out (a "
                f"data set takes 2 or "
                f"4 bytes a token, and about as much again while it is made)"
            ) from None

    def commit(self) -> None:
        """Make the staged folder DIR, in place of the data set that was there."""
        self._check_target()
        self._staged.publish()
        (self.out / LOCK).unlink()

    def _check_target(self) -> None:
        out = self.out
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{out.parent}: not a folder; choose another --out") from None
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not self.overwrite:
            raise UserError(f"{out}: exists; choose another --out, or replace it with --overwrite")
        _check_replaceable(out)

    def _remove_leftovers(self) -> None:
        place, name = self.out.parent, glob.escape(self.out.name)
        for folder in place.glob(f".{name}.removed-*"):
            remove(folder)
        # They once had a name that was not hidden.
        for folder in [*place.glob(f".{name}.partial-*"), *place.glob(f"{name}.partial-*")]:
            if _is_abandoned(folder):
                remove(folder)


def _is_abandoned(folder: Path) -> bool:
    """Whether no process writes a staged folder any more: it died, or replaced this data set and
    died before it had removed it. A folder without either is just being made."""
    lock = folder / LOCK
    if not lock.is_file():
        return (folder / MANIFEST).is_file() and folder.name.startswith(".")
    if not lock.stat().st_size:
        return False
    with open(lock) as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that is not a data set, or holds files that are not part of it: they would
    be deleted."""
    try:
        manifest = read_manifest(folder)
    except (ValueError, OSError):
        raise UserError(
            f"{folder}: is not a prepared data set, and --overwrite replaces nothing else; choose "
            f"another "
            f"--out"
        ) from None
    known = {MANIFEST, TOKENIZER, LOCK} | {
        info.file for split in SPLITS for info in manifest["splits"][split]["shards"]
    }
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and not (name in SPLITS and path.is_dir()):
            raise UserError(
                f"{folder}: holds {name}, which is not part of the data set; move it away before "
                f"--overwrite"
            )
