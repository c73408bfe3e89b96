"""What a domain loses where its experts share a model with those of others: `emotrain subsets
interference`.

Three models on the same held-out documents of each subset's domain: the full one, the subset alone,
and the composed subset (the union, or another one that is given). In the composed one a token may
choose experts that were kept for another domain: it can lose by that, and it can gain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.errors import UserError
from emotrain.evaluation.measure import (
    choose_device,
    group_of_each,
    mean_increase,
    precision_on,
    rows_of,
)
from emotrain.evaluation.perplexity import document_losses, pack_groups
from emotrain.evaluation.reading import read_domains
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.model.transformer import Transformer
from emotrain.modular.algebra import Operand, combine, read_operands
from emotrain.modular.artefact import Subset
from emotrain.modular.select import Subsets, masks_of
from emotrain.progress import Track, untracked
from emotrain.subsets.selection import require_allowed, require_same_model
from emotrain.training.checkpoint import find, load_model
from emotrain.training.checkpoint_folders import read_config


@dataclass(frozen=True)
class DomainInterference:
    """Losses of one subset's domain, in nats a token, and their differences with the standard error
    over documents."""

    file: str
    domain: str
    documents: int
    targets: int
    """Tokens that were predicted."""
    loss_nats: float
    """Of the full model."""
    own_increase_nats: float
    """What the subset loses against the full model."""
    own_standard_error_nats: float
    composed_increase_nats: float
    """What the composed subset loses against the full model."""
    composed_standard_error_nats: float
    interference_nats: float
    """What the composed subset loses against the subset alone; negative where it gains."""
    interference_standard_error_nats: float


@dataclass(frozen=True)
class Interference:
    """Losses of every subset's domain."""

    checkpoint: str
    data: str
    composed: str
    """The file of the composed subset; `union` for that of the subsets."""
    experts_per_layer: tuple[int, ...]
    """That the composed subset keeps, shared ones included."""
    subsets: tuple[DomainInterference, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def interference(
    checkpoint: str | Path,
    data: str | Path,
    files: Sequence[str | Path],
    *,
    composed: str | Path | None = None,
    domains: Sequence[str] = (),
    documents: int = 64,
    document_tokens: int = 0,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[PackedBatch] = untracked,
) -> Interference:
    """Measure what subsets lose in a composed one, on held-out documents.

    Args:
        checkpoint: the one the subsets were selected from, or its run.
        data: a folder written by `emotrain prepare`.
        files: subsets, one for each domain.
        composed: the subset to measure; None means the union of `files`.
        domains: one for each subset; none means those that they were selected for.
        documents: most held-out documents of a domain.
        micro_batch: rows of one forward pass; 0 means as in training.
    Raises:
        UserError: subsets of another checkpoint, a domain that is not known, too few documents.
    """
    folder, target = find(checkpoint), choose_device(device)
    config = read_config(folder)
    rows = rows_of(micro_batch, config.training.micro_batch)
    operands = read_operands(files, least=1)
    extra = [] if composed is None else read_operands([composed], least=1)
    for operand in (*operands, *extra):
        require_same_model(operand.subset, folder, config)
    whole = extra[0].subset if extra else combine("union", operands)
    names = _domains(operands, domains)
    settings = EvaluationSettings(
        calibration_documents=1,
        documents=documents,
        document_tokens=document_tokens,
        domains=tuple(sorted(set(names))),
    )
    found = read_domains(data, config, folder, settings)
    held_out = [found[name].held_out for name in names]
    for operand, name in zip(operands, names, strict=True):
        for subset in (operand.subset, whole):
            require_allowed(operand.file, subset, name, config)
    _, model = load_model(folder, target)
    arms, targets_U = _losses(model, held_out, names, operands, whole, config, target, rows, track)
    group_U = group_of_each(held_out)
    return Interference(
        checkpoint=str(folder),
        data=str(data),
        composed=str(composed or "union"),
        experts_per_layer=tuple(map(len, whole.experts_kept_per_layer)),
        subsets=_summary(operands, names, arms, targets_U, group_U),
    )


def _domains(operands: Sequence[Operand], given: Sequence[str]) -> list[str]:
    if given:
        if len(given) != len(operands):
            raise UserError(
                f"--domains names {len(given)} domains for {len(operands)} subsets; name one for "
                f"each"
            )
        return list(given)
    for operand in operands:
        if operand.subset.parents or not operand.subset.calibration.domain:
            raise UserError(
                f"{operand.file}: was not selected for one domain; name one for each subset with "
                f"--domains"
            )
    return [operand.subset.calibration.domain for operand in operands]


def _losses(
    model: Transformer,
    held_out: Sequence[Sequence[Any]],
    names: Sequence[str],
    operands: Sequence[Operand],
    whole: Subset,
    config: Config,
    device: torch.device,
    rows: int,
    track: Track[PackedBatch],
) -> tuple[Tensor, Tensor]:
    """Sums of each document's losses, float64 [3, U], with all experts, with those of its subset
    and with those of the composed one, and its targets, int64 [U].

    Documents of all domains share a batch, each with the mask of its own subset. The three passes
    see the same batches: where masks are equal, losses are to the bit. Exclusive experts stay with
    their domain.
    """
    group_U = group_of_each(held_out)
    known = dict(config.model.experts.exclusive)
    batches = pack_groups(
        held_out,
        [name if name in known else "" for name in names],
        config.data.sequence_length,
        rows,
        config.model.attention.document_mask,
    )
    arms = {
        "full model": None,
        "each subset": _masks([operand.subset for operand in operands]),
        "composed subset": _masks([whole] * len(operands)),
    }
    losses = [
        document_losses(model, batches, group_U, masks, track, what, precision_on(config, device))
        for what, masks in arms.items()
    ]
    return torch.stack([arm.loss_U for arm in losses]), losses[0].targets_U


def _masks(subsets: Sequence[Subset]) -> Subsets:
    """For each layer bool [J, N]: the routed experts that each of these subsets keeps."""
    return tuple(map(torch.stack, zip(*map(masks_of, subsets), strict=True)))


def _summary(
    operands: Sequence[Operand],
    names: Sequence[str],
    arms: Tensor,
    targets_U: Tensor,
    group_U: Tensor,
) -> tuple[DomainInterference, ...]:
    full_U, own_U, composed_U = arms
    differences = [
        mean_increase(change_U, targets_U, group_U)
        for change_U in (own_U - full_U, composed_U - full_U, composed_U - own_U)
    ]

    def of_subset(j: int) -> DomainInterference:
        (own, own_error), (composed, composed_error), (change, change_error) = (
            (float(mean_J[j]), float(error_J[j])) for mean_J, error_J in differences
        )
        is_own_U = group_U == j
        targets = int(targets_U[is_own_U].sum())
        return DomainInterference(
            file=operands[j].file,
            domain=names[j],
            documents=int(is_own_U.sum()),
            targets=targets,
            loss_nats=float(full_U[is_own_U].sum()) / targets,
            own_increase_nats=own,
            own_standard_error_nats=own_error,
            composed_increase_nats=composed,
            composed_standard_error_nats=composed_error,
            interference_nats=change,
            interference_standard_error_nats=change_error,
        )

    return tuple(map(of_subset, range(len(operands))))
