"""A data set folder that is whole or does not exist: written beside its final name and moved
there at the end."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from emotrain.data.manifest import MANIFEST, SPLITS, TOKENIZER, read_manifest
from emotrain.errors import UserError, WriteError
from emotrain.files import flush_to_disk

LOCK = ".lock"
"""Held while a staging folder is being written; one that nobody holds was left behind by a
process that died."""


class Staging:
    """Writes a data set into `DIR.partial-…`, beside DIR, and moves it to DIR in `commit`. Without
    a commit it is removed.

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
        self.folder = self.out.with_name(f"{self.out.name}.partial-{secrets.token_hex(4)}")
        self.folder.mkdir()
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
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WriteError(
                f"no space left on the disk of {self.out}; free some or choose another --out (a "
                f"data set takes 2 or "
                f"4 bytes a token, and about as much again while it is made)"
            ) from None

    def commit(self) -> None:
        """Make the staged folder DIR, in place of the data set that was there. Everything is on
        the disk before."""
        for root, _, names in os.walk(self.folder):
            for name in names:
                flush_to_disk(Path(root, name))
            flush_to_disk(Path(root))
        self._check_target()
        if self.out.is_dir() and any(self.out.iterdir()):
            _exchange(self.folder, self.out)
            (self.folder / LOCK).write_text("the data set that was replaced\n")
        else:
            os.rename(self.folder, self.out)
        flush_to_disk(self.out.parent)
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
        for name in glob.glob(f"{glob.escape(str(self.out))}.partial-*"):
            lock = Path(name, LOCK)
            if not lock.is_file() or not lock.stat().st_size:
                continue
            with open(lock) as held:
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                shutil.rmtree(name, ignore_errors=True)


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


def _exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders in one step, so that at no moment either name is missing."""
    libc, at_cwd, exchange = (
        ctypes.CDLL(None, use_errno=True),
        -100,
        2,
    )  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    if (
        hasattr(libc, "renameat2")
        and libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0
    ):
        return
    aside = one.with_name(
        f"{one.name}-old"
    )  # a file system or C library without it: two steps, nothing is ever deleted
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)
