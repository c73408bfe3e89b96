"""Several data sets as one: each position reads a sequence of one of them, in given shares.

Which one, and where in its order, is `mixture_order`'s; here sequences of several loaders become
one batch. A document of source j has the id that it has in its data set plus j * 2^48: ids key
random draws, and no two documents of a mixture have the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emotrain.batch import SOURCE_BITS, PackedBatch
from emotrain.data.loader import Loader
from emotrain.data.mixture_order import MixtureOrder, Stage
from emotrain.errors import UserError
from emotrain.files import sha256_of

log = logging.getLogger("emotrain")

MOST_SOURCES = 2 ** (63 - SOURCE_BITS)
MANY_PASSES = 4
"""Passes over a source above which a run warns: up to about four are worth nearly as much as new
tokens (Muennighoff et al., arXiv 2305.16264)."""


@dataclass(frozen=True)
class Source:
    """A data set of a mixture."""

    name: str
    loader: Loader
    """In the source's own order: its seed is `source_seed(seed of the run, name)`."""
    max_epochs: Fraction | None = None
    """How often a run may read it."""


class Mixture:
    """Sequences of several sources, as `emotrain.data.source.DataSource`. All methods may be called
    from several threads.

    Args:
        path: of the mixture, for messages.
        sources: at least one, with names that differ.
        stages: with a weight for each source.
        seed: of the run.
    Raises:
        UserError: sources with other tokens than the first one's.
    """

    def __init__(
        self,
        path: str | Path,
        sources: Sequence[Source],
        stages: Sequence[Stage],
        seed: int,
    ):
        if len(sources) > MOST_SOURCES:
            raise UserError(
                f"{path}: has {len(sources)} sources, at most {MOST_SOURCES} can be told apart; "
                f"prepare some of them as one data set"
            )
        _check_tokens(path, sources)
        self.path, self.sources = path, tuple(sources)
        names, span = [source.name for source in sources], sources[0].loader.source.span
        self.order = MixtureOrder(names, stages, seed, span)
        self.sequence_length = sources[0].loader.sequence_length
        self.vocab_size = sources[0].loader.vocab_size
        self.num_sequences = sum(source.loader.num_sequences for source in sources)
        """Sequences of all sources."""
        self.num_tokens = sum(source.loader.num_tokens for source in sources)
        domains = {source.loader.domain for source in sources}
        self.domain = domains.pop() if len(domains) == 1 else ""
        """The domain of all sources; empty where they have several."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.order.names

    @property
    def tokenizer_file(self) -> Path:
        files = [source.loader.tokenizer_file for source in self.sources]
        return next((file for file in files if file.is_file()), files[0])

    @cached_property
    def fingerprint(self) -> str:
        """JSON of the sources' fingerprints and of the weights: `mixture_changes` says what differs
        between two, and from where on."""
        stages = [
            [
                stage.start * self.order.span,
                dict(zip(self.names, map(str, stage.weights), strict=True)),
            ]
            for stage in self.order.stages
        ]
        prints = {source.name: source.loader.fingerprint for source in self.sources}
        identity = {"mixture": prints, "span": self.order.span, "stages": stages}
        return json.dumps(identity, allow_nan=False)

    def batch(self, positions: Sequence[int] | np.ndarray) -> PackedBatch:
        """The sequences at `positions` of the order, as rows of one batch of CPU tensors."""
        return self._batches([np.asarray(positions, dtype=np.int64)])[0]

    def step(
        self,
        step_index: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[PackedBatch]:
        """As `Loader.step`."""
        span = self.order.span
        blocks = Loader.micro_batches(step_index, global_batch, micro_batch, rank, world_size, span)
        return self._batches([np.array(positions) for positions in blocks])

    def _batches(self, blocks: Sequence[np.ndarray]) -> list[PackedBatch]:
        """A batch for the positions of each block. Every source is read once for all of them."""
        source_B, place_B = self.order.locate(np.concatenate(blocks))
        parts, rows = [], []
        for source in np.unique(source_B).tolist():
            own = np.flatnonzero(source_B == source)
            packed = self.sources[source].loader.batch(place_B[own])
            ids_G = packed.document_ids_G
            ids_G = torch.where(ids_G < 0, ids_G, ids_G + (source << SOURCE_BITS))
            parts.append(replace(packed, document_ids_G=ids_G))
            rows.append(own)
        whole = replace(together(parts), domain=self.domain, num_sources=len(self.sources))
        order = np.argsort(np.concatenate(rows))
        ends = np.cumsum([len(block) for block in blocks])
        return [picked(whole, order_b) for order_b in np.split(order, ends[:-1])]

    def epochs(self, position: int) -> list[float]:
        """How often each source has been read before a position."""
        return [
            count / source.loader.num_sequences
            for count, source in zip(self.order.counts(position), self.sources, strict=True)
        ]

    def check_length(self, end: int, start: int = 0) -> None:
        """Warn of sources that a run repeats often.

        Args:
            start, end: positions that the run reads from and up to.
        Raises:
            UserError: it reads a source more often than that may be.
        """
        for source, epochs, before in zip(
            self.sources, self.epochs(end), self.epochs(start), strict=True
        ):
            tokens = source.loader.num_sequences * self.sequence_length
            what = f"{source.name} of {self.path}: {epochs:.3g} passes over its {tokens:,} tokens"
            if source.max_epochs is not None and epochs > source.max_epochs:
                raise UserError(
                    f"{what} in the {end * self.sequence_length:,} tokens of the run, and "
                    f"max_epochs is {float(source.max_epochs):g}; lower its weight, train on fewer "
                    f"tokens, or raise max_epochs"
                )
            if epochs > max(MANY_PASSES, before):
                log.warning("%s; repeated so often they teach less than new ones", what)

    def described(self) -> dict[str, dict[str, Any]]:
        """For each source what identifies it, and its weight in each stage."""
        return {
            source.name: {
                "path": str(source.loader.source.store.path),
                "domain": source.loader.domain,
                "fingerprint": source.loader.fingerprint,
                "sequences": source.loader.num_sequences,
                "tokens": source.loader.num_tokens,
                "weights": [float(stage.weights[index]) for stage in self.order.stages],
            }
            for index, source in enumerate(self.sources)
        }


def together(parts: Sequence[PackedBatch]) -> PackedBatch:
    """The rows of several batches in one, one batch after the other."""
    if len(parts) == 1:
        return parts[0]
    firsts = np.cumsum([0, *(part.num_documents for part in parts)])[:-1].tolist()
    numbers = [part.document_BS + first for part, first in zip(parts, firsts, strict=True)]
    return replace(
        parts[0],
        tokens_BS=torch.cat([part.tokens_BS for part in parts]),
        targets_BS=torch.cat([part.targets_BS for part in parts]),
        document_BS=torch.cat(numbers),
        document_ids_G=torch.cat([part.document_ids_G for part in parts]),
        has_padding=any(part.has_padding for part in parts),
    )


def picked(batch: PackedBatch, rows: np.ndarray) -> PackedBatch:
    """Some rows of a batch, in this order: int64 [B]."""
    rows_B = torch.from_numpy(rows)
    numbers_BS = batch.document_BS[rows_B]
    numbers_T = numbers_BS.view(-1)
    # No document spans two rows, so that a new number is a new document.
    begins_T = torch.cat([numbers_T.new_ones(1, dtype=torch.bool), numbers_T[1:] != numbers_T[:-1]])
    ids_G = batch.document_ids_G[numbers_T[begins_T]]
    return replace(
        batch,
        tokens_BS=batch.tokens_BS[rows_B],
        targets_BS=batch.targets_BS[rows_B],
        document_BS=begins_T.cumsum(0).sub_(1).view_as(numbers_BS),
        document_ids_G=ids_G,
        has_padding=batch.has_padding and bool((ids_G < 0).any()),
    )


def _check_tokens(path: str | Path, sources: Sequence[Source]) -> None:
    """Refuse sources whose numbers mean other tokens."""

    def tokens_of(source: Source) -> dict[str, Any]:
        loader = source.loader
        file = loader.tokenizer_file
        return {
            "tokens": loader.vocab_size,
            "EOS": loader.source.store.eos_id,
            "tokenizer": sha256_of(file)[:12] if file.is_file() else None,
        }

    known = tokens_of(sources[0])
    by = dict.fromkeys(known, sources[0].name)
    for source in sources[1:]:
        for key, value in tokens_of(source).items():
            if known[key] is None:
                known[key], by[key] = value, source.name
            elif value is not None and value != known[key]:
                raise UserError(
                    f"{path}: source {source.name} has {key} {value}, {by[key]} has {known[key]}; "
                    f"the sources of a mixture share one tokenizer: prepare them with the same"
                )
