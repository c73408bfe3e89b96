"""A shard on its way to the disk. `formats` says what it looks like."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emotrain.data.formats import block_sums, schema, sha256_of_sums
from emotrain.data.manifest import ShardInfo
from emotrain.files import HashingFile


def write_shard(
    path: Path,
    tokens: np.ndarray,
    offsets: np.ndarray,
    domains: Sequence[str],
    sources: Sequence[str],
) -> ShardInfo:
    """Write documents as one shard, flushed to the disk: whole under its name, or not there.

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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with HashingFile(partial) as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        size, digest = file.finish()
    os.replace(partial, path)
    return ShardInfo(
        f"{path.parent.name}/{path.name}",
        len(offsets) - 1,
        len(tokens),
        size,
        digest,
        sha256_of_sums(sums),
    )
