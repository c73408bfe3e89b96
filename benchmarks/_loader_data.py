"""Data for `loader.py`, and the loaders of other projects on the same tokens.

Run as a program, in the peer's environment, it times one peer:

    PEER_PYTHON benchmarks/_loader_data.py olmo_core|grain FILE DTYPE SEQUENCE_LENGTH BATCH BATCHES
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

EOS = 0
MEAN_LOG, SPREAD_LOG = 6.1, 1.1
"""Of the logarithm of document lengths: 816 tokens in the mean, as on the web."""


def document_lengths(tokens: int, seed: int = 0) -> np.ndarray:
    """int64 lengths, log-normal, that sum to `tokens`."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(2, rng.lognormal(MEAN_LOG, SPREAD_LOG, 100 + tokens // 400))
    ends = np.cumsum(lengths.astype(np.int64))
    return np.diff(np.concatenate(([0], ends[ends < tokens], [tokens])))


def write_data(folder: Path, vocab_size: int, num_shards: int, shard_tokens: int) -> Path:
    """A data set of random tokens. Returns a file of all of them, without a header."""
    from emotrain.data.manifest import token_dtype, write_manifest
    from emotrain.data.shards import write_shard

    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
    dtype, infos, flat = token_dtype(vocab_size), [], folder / "tokens.npy"
    with open(flat, "wb") as stream:
        for number in range(num_shards):
            lengths = document_lengths(shard_tokens, number)
            offsets = np.concatenate(([0], np.cumsum(lengths)))
            rng = np.random.default_rng(number)
            tokens = rng.integers(1, vocab_size, shard_tokens).astype(dtype)
            tokens[offsets[1:] - 1] = EOS
            stream.write(tokens.tobytes())
            names = ["web"] * len(lengths)
            file = f"train/shard-{number:05d}.arrow"
            infos.append(
                replace(write_shard(folder / file, tokens, offsets, names, names), file=file)
            )
    counts = {
        "documents": sum(info.documents for info in infos),
        "tokens": sum(info.tokens for info in infos),
    }
    write_manifest(
        folder,
        vocab_size=vocab_size,
        eos_id=EOS,
        eos_token="<eos>",
        skipped_documents={},
        settings={},
        splits={
            "train": {"shards": infos, "domains": {"web": counts}},
            "valid": {"shards": [], "domains": {}},
        },
    )
    return flat


def memmap_batches(flat: Path, dtype: str, length: int, batch: int) -> Iterator[Any]:
    """The least that a loader does: random windows of a mapped file as int64 tokens and targets,
    without documents, checks or an order that goes on."""
    import torch

    tokens, rng = np.memmap(flat, dtype=dtype, mode="r"), np.random.default_rng(0)
    while True:
        starts = rng.integers(0, (len(tokens) - 1) // length, batch) * length
        rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
        yield torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def olmo_core_batches(flat: Path, dtype: str, length: int, batch: int) -> Iterator[Any]:
    """OLMo-core's windows with lengths of documents, in this process."""
    from olmo_core.data import (
        NumpyDataLoaderConfig,
        NumpyDatasetDType,
        NumpyFSLDatasetConfig,
        TokenizerConfig,
    )

    work = tempfile.mkdtemp()
    dataset = NumpyFSLDatasetConfig(
        paths=[str(flat)],
        sequence_length=length,
        tokenizer=TokenizerConfig(vocab_size=2**17, eos_token_id=EOS, pad_token_id=EOS),
        dtype=NumpyDatasetDType(dtype),
        generate_doc_lengths=True,
        work_dir=work,
    ).build()
    loader = NumpyDataLoaderConfig(global_batch_size=batch * length, seed=0, work_dir=work).build(
        dataset
    )
    while True:
        loader.reshuffle()
        yield from loader


def grain_batches(flat: Path, dtype: str, length: int, batch: int) -> Iterator[Any]:
    """Grain's shuffled windows of a mapped file, without documents, in this process."""
    import grain

    tokens = np.memmap(flat, dtype=dtype, mode="r")

    class Source:
        def __len__(self) -> int:
            return (len(tokens) - 1) // length

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            row = tokens[index * length : (index + 1) * length + 1].astype(np.int64)
            return {"tokens": row[:-1], "targets": row[1:]}

    data = grain.MapDataset.source(Source()).shuffle(seed=0).repeat().batch(batch)
    index = 0
    while True:
        yield data[index]
        index += 1


PEERS: dict[str, tuple[str, Callable[[Path, str, int, int], Iterator[Any]]]] = {
    "olmo_core": ("ai2-olmo-core", olmo_core_batches),
    "grain": ("grain", grain_batches),
}


def main() -> None:
    name, flat, dtype, length, batch, count = sys.argv[1:]
    package, batches = PEERS[name]
    made = batches(Path(flat), dtype, int(length), int(batch))
    seconds = []
    for _ in range(5):
        next(made)
        started = time.process_time()
        for _ in range(int(count)):
            next(made)
        seconds.append(time.process_time() - started)
    rate = int(count) * int(batch) * int(length) / min(seconds)
    print(json.dumps({"version": version(package), "tokens_per_second_per_core": rate}), flush=True)
    os._exit(0)  # threads of the peer may still read ahead


if __name__ == "__main__":
    main()
