"""Which experts a task is done with: all, those of a file, those that the task's own examples
choose, and as many at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from emotrain.config import Config
from emotrain.data.tokenizer import TextTokenizer
from emotrain.distributed.ranks import Ranks
from emotrain.distributed.shares import ALONE
from emotrain.errors import UserError
from emotrain.evaluation.measure import group_of_each
from emotrain.evaluation.perplexity import autocast, pack
from emotrain.files import sha256_of
from emotrain.generation.loading import load_subset
from emotrain.model.transformer import Transformer
from emotrain.modular.artefact import kept_of
from emotrain.modular.counts import counted_experts, experts_kept
from emotrain.modular.select import Subsets, greedy_rankings, random_select
from emotrain.progress import Track, untracked
from emotrain.subsets.calibration import CalibrationText
from emotrain.tasks.prompts import Task
from emotrain.tasks.scoring import encode_texts
from emotrain.tasks.settings import TaskSettings

ALL = "all experts"


@dataclass(frozen=True)
class Arm:
    """A choice of experts for every task."""

    name: str
    chosen_by: Literal["all", "file", "task", "random"]
    keep: float | None = None
    """Share of the experts; None for all and for a file."""
    seed: int | None = None
    """Of a random choice."""
    file: str = ""
    file_fingerprint: str = ""
    masks: Subsets | None = dataclasses.field(default=None, repr=False)
    """For each layer bool [J, N], the routed experts of each task; None for all."""

    def kept(self, task: int, shared: int) -> tuple[tuple[int, ...], ...] | None:
        """Ids of each layer's experts, shared ones last, as in a file of `emotrain select`."""
        if self.masks is None:
            return None
        rows = [mask_JN[task] for mask_JN in self.masks]
        return tuple(kept_of(row_N.nonzero()[:, 0].tolist(), len(row_N), shared) for row_N in rows)


def fixed_arms(
    subsets: Sequence[str], folder: Path, config: Config, num_tasks: int = 1
) -> list[Arm]:
    """All experts, and those of each file of `emotrain select`.

    Raises:
        UserError: not a subset of this checkpoint, or the same twice.
    """
    arms = [Arm(ALL, "all")]
    for file in subsets:
        if file in [arm.name for arm in arms]:
            raise UserError(f"--subset {file} is given twice; give it once")
        masks = tuple(mask_N.expand(num_tasks, -1) for mask_N in load_subset(file, folder, config))
        fingerprint = sha256_of(Path(file))
        arms.append(Arm(file, "file", file=file, file_fingerprint=fingerprint, masks=masks))
    return arms


def chosen_arms(
    model: Transformer,
    texts: Sequence[CalibrationText],
    settings: TaskSettings,
    row_length: int,
    rows_per_batch: int,
    precision: torch.dtype | None,
    track: Track[Any] = untracked,
    ranks: Ranks = ALONE,
) -> list[Arm]:
    """At each share of `settings.keep` that leaves experts out, those that each task chooses, and
    as many at random.

    Args:
        texts: that choose, of each task.
        ranks: those that have the model between them.
    """
    config = model.config
    sizes = {keep: experts_kept(config, keep) for keep in sorted(set(settings.keep), reverse=True)}
    sizes = {keep: kept for keep, kept in sizes.items() if kept != counted_experts(config)}
    if not sizes:
        return []
    documents = [ids for text in texts for ids in text.choose]
    group_U = group_of_each([text.choose for text in texts])
    batches = pack(documents, row_length, rows_per_batch, config.attention.document_mask)
    with autocast(model.head.weight.device, precision):
        counts_of_each = list(sizes.values())
        found = greedy_rankings(
            model, batches, group_U, len(texts), counts_of_each, track, ranks=ranks
        )
    arms: list[Arm] = []
    for (keep, counts), (chosen, _) in zip(sizes.items(), found, strict=True):
        masks = tuple(mask_JN.cpu() for mask_JN in chosen)
        arms.append(Arm(f"keep {keep}, own choice", "task", keep, masks=masks))
        for seed in range(settings.seed, settings.seed + settings.random_seeds):
            masks = random_select(config, len(texts), counts, seed)
            arms.append(Arm(f"keep {keep}, random {seed}", "random", keep, seed, masks=masks))
    return arms


def calibration_of(
    tasks: Sequence[Task], tokenizer: TextTokenizer, count: int
) -> list[CalibrationText]:
    """Examples that choose the experts of each task, without an end-of-document token, as in the
    paper (spec 7.2).

    Raises:
        UserError: a task with fewer than `count`.
    """
    found = []
    for task in tasks:
        ids = encode_texts(tokenizer, task.calibration(count))
        documents = [np.array(one, dtype=np.uint32) for one in ids]
        found.append(CalibrationText(str(task.examples_from), task.name, documents, (), True))
    return found
