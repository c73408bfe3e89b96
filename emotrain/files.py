"""Files that are whole or not there, the proof that they have not changed, and their JSON."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from emotrain.errors import NotAFolderError, WriteError


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file as a whole: a reader sees the old one or the new one. Returns its path."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
    return path


def make_writable(folder: Path) -> None:
    """Make a folder, if it is not there, and find out whether files can be written to it.

    Raises:
        NotAFolderError: a file stands where the folder would be. WriteError: it is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.write_bytes(b"1")
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise NotAFolderError(f"{folder}: is not a folder; choose another") from None
    except OSError as error:
        raise WriteError(
            f"{folder}: not writable ({error.strerror or error}); choose another folder"
        ) from error


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_text(value: Any, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """JSON that every reader takes: a number that is not finite becomes null. (Python writes a bare
    NaN, which is no JSON.)"""

    def dumped(value: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)

    try:
        return dumped(value)
    except ValueError:  # rare, and only then worth a walk through all of it
        return dumped(_finite_or_null(value))


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_null(item) for item in value]
    return value


class HashingFile(io.RawIOBase):
    """A file that is written once, from its start to its end, and hashed on the way."""

    def __init__(self, path: Path):
        super().__init__()
        self.file, self.digest, self.size = open(path, "wb"), hashlib.sha256(), 0  # noqa: SIM115

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)
        return len(content)

    def tell(self) -> int:
        return self.size

    def finish(self) -> tuple[int, str]:
        """Flush it to the disk and close it. Returns its bytes and its sha256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.size, self.digest.hexdigest()
