"""A shard on its way to the disk, and the checksums of its blocks. `formats` says what it looks
like."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emotrain.data.manifest import ShardInfo
from emotrain.files import sha256_of

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BYTES = 2**16
"""Tokens or offsets under one checksum: a few sequences of tokens, hashed in under 0.1 ms. Part
of the format."""
SUM_BYTES = 8
"""Of a block's sha256 that are kept: they find damage. It is the manifest's sha256 that names
the contents."""


def write_shard(
    path: Path,
    tokens: np.ndarray,
    offsets: np.ndarray,
    domains: Sequence[str],
    sources: Sequence[str],
) -> ShardInfo:
    """Write documents as one shard, flushed to the disk.

    Args:
        path: the file; the name of its folder is the split.
        tokens: uint16 or uint32, the documents one after the other.
        offsets: int64 [documents + 1].
        domains, sources: one string a document.
    """
    import pyarrow as pa

    columns = [
        pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(tokens)),
        pa.array(domains, pa.string()).dictionary_encode(),
        pa.array(sources, pa.string()),
    ]
    sums = {"tokens": block_sums(tokens), "offsets": block_sums(offsets.astype(np.int64))}
    metadata = {f"{name}_sums": base64.b64encode(value) for name, value in sums.items()}
    batch = pa.record_batch(columns, schema=schema(tokens.dtype).with_metadata(metadata))
    with open(path, "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    return ShardInfo(
        f"{path.parent.name}/{path.name}",
        len(offsets) - 1,
        len(tokens),
        path.stat().st_size,
        sha256_of(path),
        sha256_of_sums(sums),
    )


def schema(dtype: np.dtype) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("tokens", pa.large_list(pa.from_numpy_dtype(dtype))),
            ("domain", pa.dictionary(pa.int32(), pa.string())),
            ("source", pa.string()),
        ]
    )


def block_sums(values: np.ndarray) -> bytes:
    """The checksums of an array's blocks of BLOCK_BYTES, SUM_BYTES each, one after the other."""
    content = np.ascontiguousarray(values).view(np.uint8).data
    blocks = (content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES))
    return b"".join(hashlib.sha256(block).digest()[:SUM_BYTES] for block in blocks)


def sha256_of_sums(sums: dict[str, bytes]) -> str:
    return hashlib.sha256(sums["tokens"] + sums["offsets"]).hexdigest()
