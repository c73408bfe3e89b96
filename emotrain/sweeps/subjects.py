"""What a model is measured on: a domain of a data set, or a task. The cells of one are measured
together: one pass over each calibration text chooses for all shares.

A cell's number is to the bit the same whichever others are measured with it, so that a sweep that
was interrupted, or grew, ends like one that was not."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.data.formats import Dataset
from emotrain.errors import UserError
from emotrain.evaluation.measure import precision_on, with_own
from emotrain.evaluation.perplexity import autocast, losses_of_arms, pack_groups
from emotrain.evaluation.reading import documents_of
from emotrain.model.transformer import Transformer
from emotrain.modular.counts import experts_kept
from emotrain.modular.scores import CRITERIA, collect_scores
from emotrain.modular.select import (
    Subsets,
    best_experts,
    greedy_rankings,
    own_experts,
    random_select,
)
from emotrain.sweeps.plan import ALL, FULL, Cell, Plan

Text = Sequence[np.ndarray]
"""Token ids of documents."""


@dataclass(frozen=True)
class Items:
    """What the items of a subject came to with some experts."""

    metric: str
    amounts: tuple[float, ...]
    sizes: tuple[float, ...]
    experts_kept_per_layer: tuple[int, ...]


@dataclass
class Subject(ABC):
    """A model, and what it is measured on."""

    model: Transformer
    config: Config
    plan: Plan
    rows: int
    """Of one forward pass."""
    name: str
    exclusive: str = ""
    """The domain whose exclusive experts are used."""

    @abstractmethod
    def calibration(self, size: int, seed: int) -> Text:
        """The text of a draw. Draws of one size share no document.

        Raises:
            UserError: there is too little.
        """

    @abstractmethod
    def run(self, subsets: Sequence[Subsets | None]) -> list[tuple[str, list[float], list[float]]]:
        """Of each choice of experts the metric, and amount and size of each item."""

    @property
    def precision(self) -> torch.dtype | None:
        return precision_on(self.config, self.model.head.weight.device)

    def measure(self, cells: Sequence[Cell]) -> dict[Cell, Items | UserError]:
        """Cells of this model and subject; those that cannot be have an error."""
        found: dict[Cell, Items | UserError] = {}
        texts: dict[tuple[int, int], Text] = {}
        for cell in cells:
            size, seed = cell.calibration_documents, cell.seed
            if size and (size, seed) not in texts:
                try:
                    texts[size, seed] = self.calibration(size, seed)
                except UserError as error:
                    found[cell] = error
        subsets = self._choose([cell for cell in cells if cell not in found], texts)
        if subsets:
            results = self.run(list(subsets.values()))
            for (cell, kept), (metric, amounts, sizes) in zip(
                subsets.items(), results, strict=True
            ):
                found[cell] = Items(metric, tuple(amounts), tuple(sizes), self._kept(kept))
        return found

    def _choose(
        self, cells: Sequence[Cell], texts: Mapping[tuple[int, int], Text]
    ) -> dict[Cell, Subsets | None]:
        """For each layer bool [1, N], the experts of each cell; None for all."""
        config = self.config.model
        own, shared = own_experts(config, [self.exclusive]), config.experts.shared
        counts = {cell.keep: experts_kept(config, cell.keep) for cell in cells}
        found: dict[Cell, Subsets | None] = {}
        for cell in cells:
            if cell.method == FULL:
                found[cell] = None
            if cell.method == "random":
                drawn = random_select(config, 1, counts[cell.keep], self._seed(cell.seed))
                found[cell] = with_own(drawn, own)
        for draw, text in texts.items():
            of_draw = [c for c in cells if (c.calibration_documents, c.seed) == draw]
            arguments = self.model, self.packed(text), torch.zeros(len(text)).long(), 1
            with autocast(self.model.head.weight.device, self.precision):
                if greedy := [cell for cell in of_draw if cell.method == "router"]:
                    sizes = [counts[cell.keep] for cell in greedy]
                    rankings = greedy_rankings(*arguments, sizes, domains=[self.exclusive])
                    for cell, (subsets, _) in zip(greedy, rankings, strict=True):
                        found[cell] = with_own(subsets, own)
                if by_score := [cell for cell in of_draw if cell.method in CRITERIA]:
                    scores = collect_scores(*arguments)
            for cell in by_score:
                found[cell] = tuple(
                    best_experts(of_layer[cell.method].cpu(), own_JN, count - shared)
                    for of_layer, own_JN, count in zip(scores, own, counts[cell.keep], strict=True)
                )
        return {cell: found[cell] for cell in cells}

    def packed(self, documents: Text) -> list[PackedBatch]:
        length, mask = self.config.data.sequence_length, self.config.model.attention.document_mask
        return pack_groups([documents], [self.exclusive], length, self.rows, mask)

    def _seed(self, seed: int) -> int:
        """Subjects draw apart from each other, and each whatever others there are."""
        digest = hashlib.sha256(f"{seed} {self.name}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def _kept(self, subsets: Subsets | None) -> tuple[int, ...]:
        config = self.config.model
        if subsets is None:
            return tuple(map(config.experts_in_layer, range(config.num_layers)))
        return tuple(int(mask_JN.sum()) + config.experts.shared for mask_JN in subsets)


@dataclass
class Domain(Subject):
    """The losses of held-out documents, in nats; their sizes are the tokens that are predicted."""

    dataset: Dataset | None = None

    def _documents(self, split: str, count: int) -> Text:
        assert self.dataset is not None
        return documents_of(self.dataset, split, self.name, count, self.plan.document_tokens)

    def calibration(self, size: int, seed: int) -> Text:
        if size == ALL:
            return self._every_one()
        there = self._documents("train", size * (seed + 1))
        if len(there) < size * (seed + 1):
            raise UserError(
                f"domain {self.name!r} has {len(there)} train documents; seed {seed} takes {size} "
                f"from document {size * seed} on: lower calibration_documents or seeds"
            )
        return there[size * seed :]

    def _every_one(self) -> Text:
        there = self._documents("train", sys.maxsize)
        if not there:
            raise UserError(f"domain {self.name!r} has no train documents; leave it out")
        return there

    def run(self, subsets: Sequence[Subsets | None]) -> list[tuple[str, list[float], list[float]]]:
        held_out = self._documents("valid", self.plan.documents)
        losses = losses_of_arms(
            self.model,
            self.packed(held_out),
            torch.zeros(len(held_out), dtype=torch.int64),
            subsets,
            precision=self.precision,
            # One subset after the other: the sizes of matrix products, and with them the last
            # bits, do not depend on which cells are measured together.
            rows_per_pass=1,
        )
        sizes = [loss.targets_U.double().tolist() for loss in losses]
        return [
            ("loss_nats_per_token", loss.loss_U.tolist(), of_loss)
            for loss, of_loss in zip(losses, sizes, strict=True)
        ]
