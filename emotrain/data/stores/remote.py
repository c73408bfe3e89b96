"""Files of object stores and web servers, by range reads.

    s3://bucket/tokens/       emotrain[s3]
    gs://bucket/tokens/       emotrain[gcs]
    https://host/a.npy        emotrain[http]

Of a file only what a window needs is asked for, in blocks of BLOCK_BYTES, neighbours in one
request; the blocks that were read last stay in memory. Names, sizes and ETags of an object store's
files come from one listing, which is asked for again when data are opened again.

A request that fails, takes too long or gives other than as many bytes as were asked for is made
again, ATTEMPTS times in all, and each failure is said. Then one line names address and place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from types import MethodType
from typing import Any

import numpy as np

from emotrain.data.stores.content import Content
from emotrain.errors import MissingFileError, MissingPackageError, RunError, UserError

log = logging.getLogger("emotrain")

BLOCK_BYTES = 2**16
CACHE_BLOCKS = 2**10
"""Blocks in memory: 64 MiB."""
ATTEMPTS = 4
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; twice as many before each further one."""
TIMEOUT = 60.0
"""Seconds for one request."""
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
LARGEST_LIST = 2**28


class RemoteFiles:
    """What lies under one scheme, such as `s3`, with the blocks of its files that were read
    last."""

    def __init__(self, scheme: str, address: str):
        import fsspec

        options: dict[str, Any] = {}
        if EXTRAS.get(scheme) == "s3":
            limits = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
            options = {"config_kwargs": {**limits, "retries": {"max_attempts": 1}}}
        try:
            self.system: Any = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            raise MissingPackageError(
                f"{address}: {error}; pip install 'emotrain[{EXTRAS.get(scheme, 'http')}]'"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{address}: {error}; give s3://, gs://, https:// or a file of this machine"
            ) from None
        # Attempts of s3fs and of gcsfs would multiply with ours; gcsfs makes its in a decorator.
        self.system.retries = 1
        if once := getattr(getattr(type(self.system), "_request", None), "__wrapped__", None):
            self.system._request = MethodType(once, self.system)
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._listings: dict[str, dict[str, dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def call(self, address: str, what: str, name: str, *args: Any, **options: Any) -> Any:
        """A method of the file system, as often as ATTEMPTS.

        Args:
            what: is asked for, for messages.
        """
        return self._often(address, what, lambda: self._once(name, *args, **options))

    def listing(self, address: str) -> dict[str, dict[str, Any]]:
        """What is known of the files that a pattern means, or that lie below a folder, by their
        addresses."""
        if address not in self._listings:
            how = "glob" if any(letter in address for letter in "*[") else "find"
            found = self.call(address, "what it means", how, address, detail=True)
            whole = self.system.unstrip_protocol
            names = {name if "://" in name else whole(name): found[name] for name in found}
            self._listings[address] = names
        return self._listings[address]

    def info(self, address: str) -> dict[str, Any]:
        """What is known of a file: from a listing, where one says its size."""
        for names in list(self._listings.values()):
            if (known := names.get(address, {})).get("size") is not None:
                return known
        return dict(self.call(address, "its size", "info", address))

    def forget(self) -> None:
        """Ask anew what lies there."""
        self._listings.clear()
        self.system.invalidate_cache()

    def block(self, key: tuple[str, int]) -> bytes | None:
        """A block that is in memory."""
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def keep(self, key: tuple[str, int], block: bytes) -> None:
        """Put a block into memory."""
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > CACHE_BLOCKS:
                self._blocks.popitem(last=False)

    def fetch(self, address: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file."""

        def ask() -> bytes:
            found = self._once("cat_file", address, start=start, end=stop)
            if len(found) != stop - start:
                raise ValueError(
                    f"it gives {len(found)} bytes instead of {stop - start}; does it serve ranges?"
                )
            return bytes(found)

        return bytes(self._often(address, f"bytes {start} to {stop}", ask))

    def _once(self, name: str, *args: Any, **options: Any) -> Any:
        from fsspec.asyn import AsyncFileSystem, sync

        if isinstance(self.system, AsyncFileSystem):
            method = getattr(self.system, f"_{name}")
            return sync(self.system.loop, method, *args, timeout=TIMEOUT, **options)
        return getattr(self.system, name)(*args, **options)

    def _often(self, address: str, what: str, ask: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask()
            except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
                said = " ".join(str(error).split())
                raise MissingFileError(
                    f"{address}: is not there, or not for you ({said}); check the address and the "
                    f"credentials"
                ) from None
            except Exception as error:  # each library of a file system has its own
                said = " ".join(str(error).split()) or type(error).__name__
                if attempt == ATTEMPTS:
                    raise RunError(
                        f"{address}: {what} cannot be read, after {ATTEMPTS} attempts ({said}); "
                        f"the run goes on from its checkpoint when the store answers again"
                    ) from None
                log.warning("%s: %s: %s; attempt %d", address, what, said, attempt + 1)
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))


class RemoteContent:
    """A file of an object store, as `emotrain.data.stores.content.Content`."""

    def __init__(self, name: str, size: int, sign: str, files: RemoteFiles):
        self.name, self.size, self.sign, self._files = name, size, sign, files
        self._key = f"{name} {sign}"  # a file that was written again has other blocks

    def read(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.size:
            raise UserError(
                f"{self.name}: has {self.size} bytes, {start} to {stop} are wanted; copy it again"
            )
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        known = {number: self._files.block((self._key, number)) for number in range(first, last)}
        missing = [number for number, block in known.items() if block is None]
        for low, high in _runs(missing):
            at = low * BLOCK_BYTES
            content = self._files.fetch(self.name, at, min(high * BLOCK_BYTES, self.size))
            for number in range(low, high):
                offset = number * BLOCK_BYTES - at
                known[number] = content[offset : offset + BLOCK_BYTES]
                self._files.keep((self._key, number), known[number] or b"")
        whole = b"".join(block or b"" for block in known.values())
        offset = first * BLOCK_BYTES
        return np.frombuffer(whole, np.uint8)[start - offset : stop - offset]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours among rising numbers, as [first, last)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


_SYSTEMS: dict[str, RemoteFiles] = {}
_SYSTEMS_LOCK = threading.Lock()


def files_of(address: str) -> RemoteFiles:
    """The file system of an address."""
    scheme = address.partition("://")[0]
    with _SYSTEMS_LOCK:
        if scheme not in _SYSTEMS:
            _SYSTEMS[scheme] = RemoteFiles(scheme, address)
        return _SYSTEMS[scheme]


def look(address: str) -> Content:
    """A file by its address, with its size."""
    files = files_of(address)
    return _content(address, files.info(address), files)


def exists(folder: str, name: str) -> bool:
    """Whether a file lies in a folder, which ends in `/`. Object stores list what they hold; a web
    server may not, and is asked for the file."""
    if not folder.startswith("http"):
        return f"{folder}{name}" in files_of(folder).listing(folder)
    try:
        look(f"{folder}{name}")
    except MissingFileError:
        return False
    return True


def names_at(address: str, endings: Sequence[str]) -> list[str]:
    """The addresses of files with these endings that a pattern means, or that lie below a folder,
    sorted; nothing where the address is neither."""
    names = files_of(address).listing(address)
    return sorted(name for name in names if name.endswith(tuple(endings)))


def text_at(address: str) -> bytes:
    """The content of a small file."""
    content = look(address)
    if content.size > LARGEST_LIST:
        raise UserError(f"{address}: has {content.size} bytes, too many for a list of files")
    return content.read(0, content.size).tobytes()


def _content(address: str, info: dict[str, Any], files: RemoteFiles) -> Content:
    size = info.get("size")
    if info.get("type") == "directory":
        raise UserError(f"{address}: is a folder; name files alone")
    if size is None:
        raise UserError(
            f"{address}: does not say how long it is, so no part of it can be asked for"
        )
    keys = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime")
    sign = next((str(info[key]) for key in keys if info.get(key)), "")
    return RemoteContent(address, int(size), sign, files)
