"""What is checked of the shards of a data set, before they are used."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from emotrain.data.manifest import MANIFEST, ShardInfo
from emotrain.errors import MissingFileError, UserError
from emotrain.files import sha256_of

if TYPE_CHECKING:
    import pyarrow as pa

STAT_THREADS, STAT_CHUNK = 16, 256
"""Sizes of files are asked for by so many threads, so many files at a time: on a network file
system each is a round trip."""


UNORDERED = "has document offsets that do not rise from 0 to its number of tokens"


def refuse(path: Path | str, fault: str) -> NoReturn:
    raise UserError(f"{path}: {fault}; copy the shard again or run `emotrain prepare` again")


def check_sizes(folder: Path, infos: Sequence[ShardInfo]) -> None:
    """Every shard is there and has its size."""

    def check(chunk: list[ShardInfo]) -> None:
        for info in chunk:
            path = f"{folder}/{info.file}"
            try:
                found = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                found = None
            if found is None or not stat.S_ISREG(found.st_mode):
                raise MissingFileError(
                    f"{path}: shard is missing; restore it or run `emotrain prepare` again"
                )
            if found.st_size != info.bytes:
                raise UserError(
                    f"{path}: has {found.st_size} bytes, {MANIFEST} says {info.bytes}; copy it "
                    f"again or run "
                    f"`emotrain prepare` again"
                )

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        list(
            pool.map(
                check,
                (infos[start : start + STAT_CHUNK] for start in range(0, len(infos), STAT_CHUNK)),
            )
        )


def check_checksum(path: Path, info: ShardInfo) -> None:
    """The bytes of a shard are those that were written."""
    found = sha256_of(path)
    if found != info.sha256:
        raise UserError(
            f"{path}: its bytes have changed since {MANIFEST} was written (sha256 "
            f"{found[:12]}…); copy it again or run `emotrain prepare` again"
        )


def check_contents(path: Path, batch: pa.RecordBatch, offsets: np.ndarray) -> None:
    """Check everything about a shard but the values of its tokens; linear in documents."""
    import pyarrow as pa

    try:
        batch.validate(full=True)  # offsets, UTF-8 and domain codes
    except (pa.ArrowException, UnicodeDecodeError) as error:
        refuse(path, f"is not a readable Arrow file ({' '.join(str(error).split())})")
    if (np.diff(offsets) < 1).any():
        refuse(path, UNORDERED)
