"""Documents of a store on their way to shards."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.data.loader import keyed
from emotrain.data.manifest import SPLITS, ShardInfo
from emotrain.data.shards import write_shard
from emotrain.files import json_text
from emotrain.progress import ProgressBar

BUFFER_BYTES = 2**28
"""Bytes of documents held before they are appended to their buckets."""


HELD_OUT, BUCKET, PLACE = range(3)
"""What a hash of a document's number decides; each has a key of its own, so that the three are
unrelated."""


class Shuffle:
    """Documents on their way to shards: one bucket a shard, in order of arrival until the
    shard is finished.

    A bucket is two files, to which buffers are appended: the token ids, and a JSON line [place,
    length, domain, source] a document. Documents of a shard are ordered by `place`.
    """

    def __init__(self, folder: Path, buckets: dict[str, int], seed: int, dtype: np.dtype):
        self.folder, self.buckets, self.seed, self.dtype = folder, buckets, seed, dtype
        self.tokens: defaultdict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        self.lines: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
        self.buffered = 0
        for split in SPLITS:
            (folder / split).mkdir()

    def add(
        self,
        first_number: int,
        named: list[tuple[str, str]],
        tokens: list[np.ndarray],
        valid_fraction: float,
    ) -> None:
        """Take documents, numbered from `first_number`, with (domain, source) of each."""

        numbers = np.arange(first_number, first_number + len(named))
        hashes = {what: keyed(3 * self.seed + what, numbers) for what in (HELD_OUT, BUCKET, PLACE)}
        held_out, choices, places = (
            hashes[HELD_OUT] < np.uint64(valid_fraction * 2**64),
            hashes[BUCKET],
            hashes[PLACE].tolist(),
        )
        for index, ((domain, source), ids) in enumerate(zip(named, tokens, strict=True)):
            split = "valid" if held_out[index] else "train"
            bucket = split, int(choices[index]) % self.buckets[split]
            self.tokens[bucket].append(ids.astype(self.dtype))
            self.lines[bucket].append(json_text([places[index], len(ids), domain, source]))
            self.buffered += self.tokens[bucket][-1].nbytes
        if self.buffered >= BUFFER_BYTES:
            self._flush()

    def finish(self, bar: ProgressBar) -> dict[str, dict[str, Any]]:
        """Write the shards, removing each bucket after it; for each split, ShardInfos and counts
        by domain."""
        self._flush()
        bar.start("writing shards", sum(self.buckets.values()))
        splits: dict[str, dict[str, Any]] = {}
        for split in SPLITS:
            shards: list[ShardInfo] = []
            counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
            for number in range(self.buckets[split]):
                if self._paths((split, number))[0].exists():
                    shards.append(self._finish_bucket((split, number), len(shards), counts))
                bar.advance(1)
            splits[split] = {
                "shards": shards,
                "domains": {domain: dict(counts[domain]) for domain in sorted(counts)},
            }
        return splits

    def _finish_bucket(
        self, bucket: tuple[str, int], shard: int, counts: defaultdict[str, Counter[str]]
    ) -> ShardInfo:
        tokens_path, lines_path = self._paths(bucket)
        tokens = np.fromfile(tokens_path, dtype=self.dtype)
        lines = lines_path.read_text(encoding="utf-8").splitlines()
        places, lengths, domains, sources = zip(*map(json.loads, lines), strict=True)
        ends = np.cumsum(lengths)
        order = np.argsort(np.array(places, dtype=np.uint64)).tolist()
        shuffled = np.concatenate([tokens[ends[row] - lengths[row] : ends[row]] for row in order])
        offsets = np.concatenate([[0], np.cumsum([lengths[row] for row in order])]).astype(np.int64)
        for domain, length in zip(domains, lengths, strict=True):
            counts[domain].update(documents=1, tokens=length)
        info = write_shard(
            self.folder / bucket[0] / f"shard-{shard:05d}.arrow",
            shuffled,
            offsets,
            [domains[row] for row in order],
            [sources[row] for row in order],
        )
        tokens_path.unlink()
        lines_path.unlink()
        return info

    def _flush(self) -> None:
        for bucket, arrays in self.tokens.items():
            tokens_path, lines_path = self._paths(bucket)
            with open(tokens_path, "ab") as file:
                file.write(np.concatenate(arrays).tobytes())
            with open(lines_path, "a", encoding="utf-8") as file:
                file.write("\n".join(self.lines[bucket]) + "\n")
        self.tokens.clear()
        self.lines.clear()
        self.buffered = 0

    def _paths(self, bucket: tuple[str, int]) -> tuple[Path, Path]:
        stem = f"{bucket[0]}-{bucket[1]:05d}"
        return self.folder / f"{stem}.tokens", self.folder / f"{stem}.lines"
