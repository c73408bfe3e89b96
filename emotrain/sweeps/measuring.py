"""The cells of a model on a domain, measured together: one pass over each calibration text chooses
for all shares, and up to the first experts all subsets share a pass over the held-out documents.

A cell's number is to the bit the same whichever others are measured with it, so that a sweep that
was interrupted, or grew, ends like one that was not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.data.formats import Dataset
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, precision_on, rows_of, with_own
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
from emotrain.sweeps.plan import FULL, Cell, Plan
from emotrain.training.checkpoint import load_model

Text = list[np.ndarray]
"""Token ids of documents."""
Draw = tuple[int, int]
"""Calibration documents, and the seed that says which."""


@dataclass(frozen=True)
class Items:
    """What the items of a subject came to with some experts."""

    amounts: tuple[float, ...]
    sizes: tuple[float, ...]
    experts_kept_per_layer: tuple[int, ...]


class Bench:
    """Measures cells, with one model loaded at a time: the one that was asked for last."""

    def __init__(self, plan: Plan, checkpoints: dict[str, Path], device: str, micro_batch: int):
        """
        Args:
            checkpoints: of each model of the plan.
            micro_batch: rows of one forward pass; 0 means as in training.
        """
        self._plan, self._checkpoints, self._micro_batch = plan, checkpoints, micro_batch
        self._device = choose_device(device)
        self._dataset = Dataset(plan.data)
        self._loaded: tuple[str, Config, Transformer] | None = None

    def measure(self, cells: Sequence[Cell]) -> dict[Cell, Items | UserError]:
        """Cells of one model and one subject; those that cannot be have an error."""
        model, subject = cells[0].model, cells[0].subject
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # two models need not fit
            self._loaded = (model, *load_model(self._checkpoints[model], self._device))
        return _Domain(self, self._loaded[1], self._loaded[2], subject).measure(cells)

    def documents(self, split: str, domain: str, count: int) -> Text:
        return documents_of(self._dataset, split, domain, count, self._plan.document_tokens)

    @property
    def most_documents(self) -> int:
        return self._plan.documents

    def rows(self, config: Config) -> int:
        return rows_of(self._micro_batch, config.training.micro_batch)


class _Domain:
    """A model on the documents of a domain."""

    def __init__(self, bench: Bench, config: Config, model: Transformer, domain: str):
        self.bench, self.config, self.model, self.domain = bench, config, model, domain
        self.exclusive = domain if domain in dict(config.model.experts.exclusive) else ""
        self.precision = precision_on(config, model.head.weight.device)
        self.rows = bench.rows(config)

    def measure(self, cells: Sequence[Cell]) -> dict[Cell, Items | UserError]:
        texts, found = self._read(cells)
        subsets = self._choose([cell for cell in cells if cell not in found], texts)
        if not subsets:
            return found
        held_out = self.bench.documents("valid", self.domain, self.bench.most_documents)
        losses = losses_of_arms(
            self.model,
            self._packed(held_out),
            torch.zeros(len(held_out), dtype=torch.int64),
            list(subsets.values()),
            precision=self.precision,
            # One subset after the other: the sizes of matrix products, and with them the last
            # bits, do not depend on which cells are measured together.
            rows_per_pass=1,
        )
        for (cell, of_cell), loss in zip(subsets.items(), losses, strict=True):
            found[cell] = Items(
                tuple(loss.loss_U.tolist()),
                tuple(map(float, loss.targets_U.tolist())),
                self._kept(of_cell),
            )
        return found

    def _read(
        self, cells: Sequence[Cell]
    ) -> tuple[dict[Draw, Text], dict[Cell, Items | UserError]]:
        """The documents of each draw, and the cells whose documents are not there. Draws of one
        size share no document."""
        draws = {(c.calibration_documents, c.seed): c for c in cells if c.calibration_documents}
        needed = max((size * (seed + 1) for size, seed in draws), default=0)
        there = self.bench.documents("train", self.domain, needed)
        texts = {
            (size, seed): there[size * seed : size * (seed + 1)]
            for size, seed in draws
            if size * (seed + 1) <= len(there)
        }
        lacking: dict[Cell, Items | UserError] = {}
        for cell in cells:
            size, seed = cell.calibration_documents, cell.seed
            if size and (size, seed) not in texts:
                lacking[cell] = UserError(
                    f"domain {self.domain!r} has {len(there)} train documents; seed {seed} takes "
                    f"{size} from document {size * seed} on: lower calibration_documents or seeds"
                )
        return texts, lacking

    def _choose(self, cells: Sequence[Cell], texts: dict[Draw, Text]) -> dict[Cell, Subsets | None]:
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
            arguments = self.model, self._packed(text), torch.zeros(len(text)).long(), 1
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

    def _seed(self, seed: int) -> int:
        """Domains draw apart from each other, and a domain whatever others there are."""
        digest = hashlib.sha256(f"{seed} {self.domain}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def _packed(self, documents: Text) -> list[PackedBatch]:
        length, mask = self.config.data.sequence_length, self.config.model.attention.document_mask
        return pack_groups([documents], [self.exclusive], length, self.rows, mask)

    def _kept(self, subsets: Subsets | None) -> tuple[int, ...]:
        config = self.config.model
        if subsets is None:
            return tuple(map(config.experts_in_layer, range(config.num_layers)))
        return tuple(int(mask_JN.sum()) + config.experts.shared for mask_JN in subsets)
