"""Folders that are whole or do not exist: written under a hidden name beside the target, flushed to
the disk, and renamed at the end. Checkpoints (`emotrain.training.checkpoint`) are made so, and what
`emotrain.staging` makes. The files of checkpoints are listed in a manifest with sizes and
checksums.

A process killed at any moment leaves the target as it was before or as it is after. What it had
written so far is a leftover under a hidden name, which readers never look at.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from emotrain.errors import UserError
from emotrain.files import flush_to_disk, json_text, sha256_of

log = logging.getLogger("emotrain")

MANIFEST = "manifest.json"
"""Name of the list of a folder's files, written last."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a manifest."""

    bytes: int
    sha256: str
    """Hexadecimal digest of the contents."""


class StagedFolder:
    """A folder on its way to `target`. Processes that write it together agree on `token`."""

    def __init__(self, target: Path, token: str | None = None):
        self.target = Path(target)
        # A name of its own: what another process left, and cannot be removed, is never in the way.
        self.token = token or secrets.token_hex(4)

    @property
    def path(self) -> Path:
        """Where the files are written."""
        return _hidden(self.target, "partial", self.token)

    def make(self, num_bytes: int = 0) -> None:
        """Make the empty folder.

        Raises:
            OSError: not enough space for `num_bytes`, or the place is not writable.
        """
        parent = self.target.parent
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"it needs {num_bytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free",
            )
        remove(self.path)
        self.path.mkdir()

    def commit(self, form: int, written: Mapping[str, FileEntry]) -> None:
        """Write the manifest and give the folder its name, in place of an older folder there.

        Args:
            form: number of the manifest's format.
            written: files that are on the disk already, with their checksums; all others but
                hidden ones are flushed and hashed here.
        """
        entries = dict(written)
        for file in sorted(self.path.iterdir()):
            if file.name not in entries and not file.name.startswith("."):
                flush_to_disk(file)
                entries[file.name] = FileEntry(file.stat().st_size, sha256_of(file))
        listed = {name: vars(entry) for name, entry in entries.items()}
        manifest = self.path / MANIFEST
        manifest.write_text(json_text({"format": form, "files": listed}, indent=1), "utf-8")
        self.publish(flushed=entries)

    def publish(self, flushed: Collection[str] = ()) -> None:
        """Give the folder its name, in place of what has it, once everything is on the disk.

        Args:
            flushed: paths inside of the folder that are on the disk already.
        """
        for root, _, names in os.walk(self.path):
            for file in (Path(root, name) for name in names):
                if file.relative_to(self.path).as_posix() not in flushed:
                    flush_to_disk(file)
            flush_to_disk(Path(root))
        if os.path.lexists(self.target):
            exchange(self.path, self.target)
            flush_to_disk(self.target.parent)
            # A name of its own again: what cannot be removed must not be in the way of `make`.
            replaced = _hidden(self.target, "removed", self.token)
            os.rename(self.path, replaced)
            remove(replaced)
        else:
            os.rename(self.path, self.target)
        flush_to_disk(self.target.parent)

    def discard(self) -> None:
        """Remove what has been written so far, as far as that is possible."""
        shutil.rmtree(self.path, ignore_errors=True)


def _hidden(path: Path, why: str, token: str = "") -> Path:
    return path.with_name(f".{path.name}.{why}-{token or secrets.token_hex(4)}")


@contextmanager
def exclusive_lock(path: Path) -> Iterator[bool]:
    """Within the block no other process has this lock file -> whether that is so. The lock ends
    with the process, however that ends. On a file system without locks there is a warning."""
    with open(path, "a") as lock:
        alone = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                alone = False
            else:
                log.warning("%s: this file system has no locks (%s)", path.parent, error.strerror)
        yield alone


def exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders in one step, so that at no moment either name is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    paths = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2") and libc.renameat2(at_cwd, paths[0], at_cwd, paths[1], swap) == 0:
        return
    # A file system or C library without it: two steps, and nothing is ever deleted.
    aside = _hidden(other, "aside")
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def remove(folder: Path) -> None:
    """Remove a folder: it is out of sight at once, whoever dies on the way. A link is removed,
    never what it points to. What cannot be removed stays under a hidden name, with a warning."""
    if not os.path.lexists(folder):
        return
    doomed = folder
    if not folder.name.startswith("."):
        doomed = _hidden(folder, "removed")
        os.rename(folder, doomed)
    try:
        if doomed.is_symlink() or not doomed.is_dir():
            doomed.unlink()
        else:
            shutil.rmtree(doomed)
    except OSError as error:
        log.warning(
            "%s: could not be removed (%s); it takes space and is not read, remove it by hand",
            error.filename or doomed,
            error.strerror or error,
        )


def is_safe_name(name: str) -> bool:
    """Whether a name from a file can be that of a file in the same folder and nothing else."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in "/\\\0")


def read_manifest(
    folder: Path, formats: Collection[int], required: Iterable[str]
) -> dict[str, FileEntry]:
    """The files of a folder by name. Nothing in the manifest is trusted.

    Raises:
        UserError: not a manifest of one of these formats, one that names files it must not, or one
            that lacks a required file.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] not in formats:
            known = " or ".join(map(str, formats))
            raise UserError(
                f"format {manifest['format']!r} is not {known}, the one this version reads"
            )
        entries = {
            name: FileEntry(entry["bytes"], entry["sha256"])
            for name, entry in manifest["files"].items()
        }
        for name, entry in entries.items():
            if type(entry.bytes) is not int or not isinstance(entry.sha256, str):
                raise UserError(
                    f"size and checksum of {name!r} are {entry.bytes!r} and {entry.sha256!r}"
                )
            if not is_safe_name(name):
                raise UserError(f"{name!r} is not the name of a file in it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder}: its {MANIFEST} is not readable ({error}); use another checkpoint"
        ) from None
    for name in required:
        if name not in entries:
            raise UserError(f"{folder}: {name} is not in its {MANIFEST}; use another checkpoint")
    return entries


def check_files(
    folder: Path,
    entries: Mapping[str, FileEntry],
    hashed: Callable[[list[str]], Iterable[str]],
    track: Callable[[int], object],
) -> None:
    """Check the files of a folder against its manifest.

    Args:
        hashed: picks those of the named files whose contents are read; sizes are checked of all.
        track: told the bytes of each file that was read.
    Raises:
        UserError: a file is missing, a link, of another size, or damaged; names the file.
    """
    for name, entry in entries.items():
        file = folder / name
        if file.is_symlink():
            raise UserError(
                f"{file}: is a link, and a checkpoint is made of files; copy what it points to here"
            )
        if not file.is_file():
            raise UserError(f"{folder}: {name} is missing; use another checkpoint")
        size = file.stat().st_size
        if size != entry.bytes:
            raise UserError(
                f"{file}: {size} bytes where {entry.bytes} were written; use another checkpoint"
            )
    for name in hashed(sorted(entries)):
        if sha256_of(folder / name) != entries[name].sha256:
            raise UserError(
                f"{folder / name}: contents differ from the checksum in {MANIFEST}; use another "
                f"checkpoint"
            )
        track(entries[name].bytes)
