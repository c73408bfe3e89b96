"""MosaicML's MDS, as llm-foundry and `streaming.MDSWriter` write it; `mds_shards` says what its
files look like.

At the start the places of all samples are read, 4 bytes each (of samples with another column of
varying size also the start of each, so that most of the file is touched), and only their sums are
kept. What a window needs is read again and checked: sizes, types, shapes. Hashes are checked when a
shard is first used, on this machine's disk.

A document is a sample; or, where all samples have as many tokens, what EOS ends: so llm-foundry
cuts its stream (`--concat_tokens`). `data.raw.documents` says another rule. The permanent id of a
document is the number of its sample, or the position of its first token; see `plain`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate

import numpy as np

from emotrain.config import RawTokensConfig
from emotrain.data.checks import STAT_THREADS
from emotrain.data.source import Window
from emotrain.data.stores.content import OpenFiles, sampled
from emotrain.data.stores.listing import list_files
from emotrain.data.stores.mds_shards import INDEX, PIECE, Part, Places, parts_of
from emotrain.data.stores.plain import eos_edges
from emotrain.data.stores.vocabulary import Vocabulary, check_tokens
from emotrain.errors import MissingFileError, UserError

log = logging.getLogger("emotrain")

CACHE_BYTES = 2**28
"""Of the places of samples that stay in memory."""


class MdsStore:
    """MDS as `emotrain.data.source.TokenStore`.

    Args:
        path: what was given, for messages.
        parts: the shards.
        vocabulary: of their tokens.
        documents: `rows`, `eos` or `auto`; see `RawTokensConfig`.
        verify_checksums: check the hashes of shards.
    Raises:
        UserError: a shard that is not as it must be.
    """

    split = "train"

    def __init__(
        self,
        path: str,
        parts: Sequence[Part],
        vocabulary: Vocabulary,
        documents: str,
        verify_checksums: bool,
    ):
        self.path, self._parts = path, parts
        self.vocab_size, self.eos_id = vocabulary.size, vocabulary.eos_id
        self.tokenizer_file, self.eos_token = vocabulary.tokenizer_file, vocabulary.eos_token
        self.labels = [part.label for part in parts]
        self._unchecked = set(range(len(parts))) if verify_checksums else set()
        self._places: OrderedDict[int, Places] = OrderedDict()
        self._lock = threading.Lock()
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            known = list(pool.map(_known, parts))
            self._digests = [digest for _, _, digest in known]
        self.shard_tokens = [tokens for tokens, _, _ in known]
        if not sum(self.shard_tokens):
            raise UserError(f"{path}: has no tokens; give documents")
        longest = {length for _, length, _ in known}
        cut = len(longest) == 1 and 0 not in longest and sum(part.samples for part in parts) > 1
        self.by_eos = documents == "eos" or (documents == "auto" and cut)
        if documents == "auto":
            rule = f"what EOS ends: all samples have {longest} tokens" if cut else "a sample"
            log.info("%s: a document is %s (data.raw.documents)", path, rule)
        sizes = self.shard_tokens if self.by_eos else [part.samples for part in parts]
        self._firsts = list(accumulate(sizes, initial=0))
        if self.by_eos and not self._ended():
            raise UserError(
                f"{parts[0].content.name}: none of its tokens is {self.eos_id}, which ends "
                f"documents; give the tokenizer that it was written with, or "
                f"data.raw.documents=rows where a sample is one"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of the shards' hashes or samples in their order, of the rule for documents and of the
        vocabulary."""
        rule = "eos" if self.by_eos else "rows"
        identity = ["mds", rule, self.vocab_size, self.eos_id, self._digests]
        return hashlib.sha256(json.dumps(identity, allow_nan=False).encode()).hexdigest()[:16]

    def name_of(self, shard: int) -> str:
        """The file of a shard."""
        return self._parts[shard].content.name

    def window(self, shard: int, start: int, stop: int) -> Window:
        part, places = self._parts[shard], self._places_of(shard)
        first = int(np.searchsorted(places.tokens, start, "right")) - 1
        last = int(np.searchsorted(places.tokens, stop, "left"))
        ends, begins = places.bytes[first : last + 1], places.tokens[first : last + 1]
        found = part.tokens(ends, np.diff(begins).tolist(), first)
        tokens = found[0] if len(found) == 1 else np.concatenate(found)
        tokens = tokens[start - begins[0] : stop - begins[0]]
        check_tokens(part.content.name, tokens, start, self.vocab_size)
        if self.by_eos:
            edges = eos_edges(tokens, self.eos_id)
            return Window(tokens, np.diff(edges), edges[:-1] + (self._firsts[shard] + start))
        lengths = np.diff(begins.clip(start, stop))
        kept = np.flatnonzero(lengths)
        return Window(tokens, lengths[kept], kept + (first + self._firsts[shard]))

    def edges(self, shard: int, start: int, stop: int) -> np.ndarray:
        if self.by_eos:
            return np.cumsum([start, *self.window(shard, start, stop).lengths.tolist()])
        tokens = self._places_of(shard).tokens
        inside = tokens[(tokens > start) & (tokens < stop)]
        return np.unique(np.concatenate(([start], inside, [stop])))

    def _ended(self) -> bool:
        """Whether the first shard has an EOS; nearly always its first tokens do."""
        total, start, size = self.shard_tokens[0], 0, 2**12
        while start < total:
            stop = min(start + size, total)
            if (self.window(0, start, stop).tokens == self.eos_id).any():
                return True
            start, size = stop, min(4 * size, PIECE // 8)
        return False

    def _places_of(self, shard: int) -> Places:
        """The places of a shard, whose bytes are checked the first time."""
        part = self._parts[shard]
        with self._lock:
            if shard in self._unchecked:
                # Of an object store all of a shard would be fetched for one window of it.
                if "://" not in part.content.name:
                    part.check()
                self._unchecked.discard(shard)
            if shard in self._places:
                self._places.move_to_end(shard)
                return self._places[shard]
            places = self._places[shard] = part.places()
            if places.tokens[-1] != self.shard_tokens[shard]:
                raise part.refuse("has other samples than when it was opened")
            while sum(16 * len(p.bytes) for p in self._places.values()) > CACHE_BYTES:
                if len(self._places) == 1:
                    break
                self._places.popitem(last=False)
            return places


def _known(part: Part) -> tuple[int, int, str]:
    """Tokens of a shard, those of each of its samples (0 where they differ), and what it is."""
    tokens = part.places().tokens
    counts = np.diff(tokens)
    even = int(counts[0]) if (counts == counts[0]).all() else 0
    identity = (
        json.dumps(part.hashes, sort_keys=True, allow_nan=False)
        if part.hashes
        else sampled(part.content)
    )
    return int(tokens[-1]), even, f"{part.samples} {part.layout} {identity}"


def open_mds(
    path: str,
    raw: RawTokensConfig,
    vocabulary: Vocabulary,
    domain: str,
    verify_checksums: bool = True,
) -> MdsStore:
    """The MDS that a path means: a folder with an `index.json`, that file, or several of them; of
    one domain if it is not empty.

    Raises:
        UserError: no such index, or one that is not as it must be.
    """
    name, files = path, OpenFiles()
    if "://" in path and path.endswith("/"):
        name = f"{path}{INDEX}"
    elif os.path.isdir(path):
        name = os.path.join(path, INDEX)
        if not os.path.isfile(name):
            raise MissingFileError(
                f"{path}: has no {INDEX}; give the folder that has it (of one split), or several "
                f"with a pattern, '{path}/*/{INDEX}'"
            )
    parts: list[Part] = []
    for listed in list_files(name, (INDEX,), raw, domain):
        parts += parts_of(listed, raw, files)
    return MdsStore(path, parts, vocabulary, raw.documents, verify_checksums)
