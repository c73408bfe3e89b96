"""A data set on its way, kept when the process that makes it is killed, and gone on with.

.mine.partial-prepare/
    .lock, .part-3-of-16.lock   held by who writes
    plan.json                   what is made: another one is refused
    data/                       what will be the data set: it takes the name in one step
    pieces/, shards/            see `spill` and `shuffle`
    report.json                 what the command prints; from here on only names change
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from emotrain.data.manifest import MANIFEST, SPLITS
from emotrain.data.staging import SPACE_HINT, check_replaceable, refuse
from emotrain.errors import ExistingFileError, UserError, WriteError
from emotrain.files import flush_to_disk, json_text, sha256_of
from emotrain.folders import StagedFolder, exchange, remove
from emotrain.preparation.shuffle import SHARDS
from emotrain.preparation.spill import PIECES, write_durably
from emotrain.staging import GOES_ON, is_abandoned

log = logging.getLogger("emotrain")

LOCK, PLAN, DATA, REPORT = ".lock", "plan.json", "data", "report.json"
PART_LOCK = re.compile(r"\.part-(\d+)-of-(\d+)\.lock")
PATIENCE = 2.0
"""Seconds to wait for a lock: a killed process may take a moment to end."""


class HalfDone:
    """The folder in which a data set is made, for one process, or for a part among several.

    Args:
        out: where the data set will lie.
        overwrite: whether it may replace an older one there, and a half-done one of another plan.
        part: (which, of how many), counted from 1, or None for who does, or ends, all of it.
        keep: whether the folder stays whatever happens, as others put work into it.
    Raises:
        UserError: `out` is there and may not be replaced, or another process writes it.
    """

    def __init__(
        self,
        out: str | Path,
        overwrite: bool = False,
        part: tuple[int, int] | None = None,
        keep: bool = False,
    ):
        self.out, self.overwrite, self.part = Path(os.path.realpath(out)), overwrite, part
        self.staged = StagedFolder(self.out, GOES_ON)
        self.folder, self.data = self.staged.path, self.staged.path / DATA
        self.kept = keep or part is not None
        """Whether the folder stays if this process fails."""
        self._locks: list[IO[str]] = []
        if not (self.folder / REPORT).exists():
            self.check_target()
        self._remove_leftovers()
        self.folder.mkdir(exist_ok=True)
        try:
            self._lock()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> HalfDone:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        mistake = isinstance(error, UserError)
        done = any((self.folder / PIECES).glob("*.json")) if self.folder.is_dir() else False
        if error is not None and done and not mistake:
            self.kept = True
            log.warning(
                "%s: keeps what is done; the same command goes on from there, --overwrite begins "
                "anew with another",
                self.folder,
            )
        if not self.kept:
            remove(self.folder)
        self._release()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WriteError(
                f"no space left on the disk of {self.out}; free some or choose another --out"
                f"{SPACE_HINT}"
            ) from None

    def agree(self, plan: dict[str, Any], loose: bool) -> bool:
        """Take up the plan, or go on with the one that is there, if it is the same one.

        Args:
            loose: whether times of files may differ, as they do between machines.
        Returns:
            Whether a plan was there.
        Raises:
            UserError: another one is there, and may not be dropped; names the difference.
        """
        path = self.folder / PLAN
        found = _read(path)
        if found is not None:
            difference = _difference(found, plan, loose)
            if not difference:
                return True
            if not self.overwrite:
                self.kept = True
                raise UserError(
                    f"{self.out}: half of it is made by another command ({difference}); give that "
                    f"one to go on, another --out, or --overwrite to begin anew"
                )
            if self.part:
                self.kept = True
                raise UserError(
                    f"{self.folder}: half of another data set ({difference}), and a part cannot "
                    f"know that no other part goes on with it; remove the folder first"
                )
        self._clear()
        for folder in (PIECES, SHARDS, DATA, *(f"{DATA}/{split}" for split in SPLITS)):
            (self.folder / folder).mkdir(exist_ok=True)
        write_durably(path, json_text(plan))
        return False

    def parts(self) -> int:
        """Of how many parts this is made; 0 where it is not made in parts."""
        found = [PART_LOCK.fullmatch(path.name) for path in self.folder.glob(".part-*.lock")]
        return max((int(match[2]) for match in found if match), default=0)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Within the block no other part does the same."""
        with open(self.folder / f".{name}.lock", "a") as lock:
            with contextlib.suppress(OSError):  # without locks both do it, with the same result
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def remove_partial(self) -> None:
        """Remove what killed processes were writing."""
        for path in self.folder.rglob("*.partial"):
            path.unlink(missing_ok=True)

    def publish(self, report: dict[str, Any]) -> None:
        """Give the data set its name, in place of what may be replaced."""
        self.check_target()
        written = {"manifest_sha256": sha256_of(self.data / MANIFEST)}
        write_durably(self.folder / REPORT, json_text(report | written))
        for root, _, names in os.walk(self.data):
            for name in names:
                if not name.endswith(".arrow"):  # those were flushed when they were written
                    flush_to_disk(Path(root, name))
            flush_to_disk(Path(root))
        if os.path.lexists(self.out):
            exchange(self.data, self.out)
        else:
            os.rename(self.data, self.out)
        flush_to_disk(self.out.parent)
        remove(self.folder)

    def published(self) -> dict[str, Any] | None:
        """The report, where a process was killed after the data set had its name."""
        found, manifest = _read(self.folder / REPORT), self.out / MANIFEST
        if found is None or not manifest.is_file():
            return None
        return found if sha256_of(manifest) == found.pop("manifest_sha256", "") else None

    def check_target(self) -> None:
        """Refuse to write over what is at `out`."""
        out = self.out
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{out.parent}: not a folder; choose another --out") from None
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            (check_replaceable if self.overwrite else refuse)(out)

    def _remove_leftovers(self) -> None:
        """Remove what other commands, and this one before it could go on, left behind."""
        place, name = self.out.parent, glob.escape(self.out.name)
        for folder in place.glob(f".{name}.removed-*"):
            remove(folder)
        for folder in [*place.glob(f".{name}.partial-*"), *place.glob(f"{name}.partial-*")]:
            if folder != self.folder and is_abandoned(folder):
                remove(folder)

    def _lock(self) -> None:
        whole = self._take(self.folder / LOCK, shared=self.part is not None)
        whole.truncate(0)
        if self.part:
            which, count = self.part
            # Taken while the shared lock is held: who does all of it is shut out.
            others = self.parts()
            if others not in (0, count):
                self.kept = True
                raise UserError(
                    f"--part {which}/{count}: {self.folder} is made in {others} parts; give the "
                    f"same number to all"
                )
            self._take(self.folder / f".part-{which}-of-{count}.lock", shared=False)
        else:
            whole.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            whole.flush()

    def _take(self, path: Path, shared: bool) -> IO[str]:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.folder.mkdir(exist_ok=True)
                lock = open(path, "a+")  # noqa: SIM115 (locked until the end)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    log.warning("%s: this file system has no locks (%s)", path, error.strerror)
                elif time.monotonic() < end:
                    lock.close()
                    time.sleep(0.05)
                    continue
                else:
                    lock.seek(0)
                    who = lock.read().strip()
                    lock.close()
                    self._refuse_second(path, who)
            # Whoever had it may have given the folder away meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(lock.fileno()).st_ino:
                    self._locks.append(lock)
                    return lock
            lock.close()
            self.check_target()

    def _refuse_second(self, path: Path, who: str) -> None:
        self.kept = True
        match = PART_LOCK.fullmatch(path.name)
        if match:
            raise ExistingFileError(
                f"{self.out}: part {match[1]}/{match[2]} is being made by another process; wait "
                f"for it, or give another part"
            )
        by = f" ({who})" if who else ", or parts of it"
        raise ExistingFileError(
            f"{self.out}: is being made by another process{by}; wait for it, or choose another "
            f"--out"
        )

    def _clear(self) -> None:
        """Remove all but the locks."""
        for path in self.folder.iterdir():
            if not path.name.endswith(".lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _release(self) -> None:
        for lock in self._locks:
            lock.close()
        self._locks = []


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def _difference(found: dict[str, Any], plan: dict[str, Any], loose: bool) -> str:
    """How two plans differ, in words; empty where they are one."""
    for name in ("emotrain", "tokenizers", "recipe"):
        ours, theirs = plan.get(name), found.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for key in sorted({*ours, *theirs}):
                if ours.get(key) != theirs.get(key):
                    return f"{key} {theirs.get(key)!r}, now {ours.get(key)!r}"
        elif ours != theirs:
            return f"{name} {theirs!r}, now {ours!r}"
    ours, theirs = ({file["name"]: file for file in p.get("files", [])} for p in (plan, found))
    for what, names in (
        ("new", ours.keys() - theirs.keys()),
        ("gone", theirs.keys() - ours.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"inputs differ: {min(names)}{more} is {what}"
    keys = ("bytes",) if loose else ("bytes", "modified")
    for name, file in ours.items():
        if any(file.get(key) != theirs[name].get(key) for key in keys):
            return f"the input {name} has changed since"
    if [*ours] != [*theirs]:
        return "the inputs come in another order"
    left = {"files", "emotrain", "tokenizers", "recipe"}
    for key in sorted({*plan, *found} - left):
        if plan.get(key) != found.get(key):
            return f"{key} {found.get(key)!r}, now {plan.get(key)!r}"[:300]
    return ""
