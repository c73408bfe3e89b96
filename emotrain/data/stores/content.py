"""The bytes of a file, by place.

Files are read, not mapped: a window is some pages, which cost the same either way, and a file that
shrinks under a map ends the process with a signal instead of a line that names the file.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from io import FileIO
from pathlib import PurePath
from typing import Protocol

import numpy as np

from emotrain.errors import MissingFileError, UserError

MAX_OPEN = 64
"""Files that stay open at a time; opening again is a look into the folder."""

SAMPLE_BYTES = 4096
"""Of the start, the middle and the end of a file that are part of its fingerprint."""


class Content(Protocol):
    """A file that can be read from any place. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """Path or address, for messages."""

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""

    @property
    def sign(self) -> str:
        """What is known of its bytes without reading them, such as a checksum; may be empty."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The bytes [start, stop), as read-only uint8.

        Raises:
            UserError: they are not there.
        """


class OpenFiles:
    """Descriptors of the files that were read last."""

    def __init__(self, most: int = MAX_OPEN):
        self._most = most
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> FileIO:
        """A file, open as long as somebody holds it: one that is dropped here closes when the last
        reader lets go."""
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
            try:
                file = self._files[name] = FileIO(name)
            except (FileNotFoundError, NotADirectoryError):
                raise MissingFileError(f"{name}: no such file; restore it") from None
            if len(self._files) > self._most:
                self._files.popitem(last=False)
            return file


class LocalContent:
    """A file of this machine.

    Args:
        size: its bytes.
        files: shared by the files of a store.
    """

    sign = ""

    def __init__(self, name: str, size: int, files: OpenFiles):
        self.name, self.size, self._files = name, size, files

    def read(self, start: int, stop: int) -> np.ndarray:
        file = self._files.get(self.name)
        pieces, at = [], start
        while at < stop:
            piece = os.pread(file.fileno(), stop - at, at)
            if not piece:
                raise UserError(
                    f"{self.name}: ends at byte {at}, and had {self.size} bytes when it was "
                    f"opened; copy it again"
                )
            pieces.append(piece)
            at += len(piece)
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), dtype=np.uint8)


def named(content: Content) -> bytes:
    """What is known of a file without reading it, for fingerprints: where it lies is no part."""
    text = f"{PurePath(content.name).name} {content.size} {content.sign} "
    return text.encode("utf-8", "surrogateescape")


def sampled(content: Content) -> str:
    """A digest of a file's name, size and some of its bytes; of none where a store signs them."""
    if content.sign:
        return hashlib.sha256(named(content)).hexdigest()
    digest, most = hashlib.sha256(named(content)), content.size - SAMPLE_BYTES
    for start in sorted({0, max(most // 2, 0), max(most, 0)}):
        digest.update(content.read(start, min(start + SAMPLE_BYTES, content.size)).tobytes())
    return digest.hexdigest()
