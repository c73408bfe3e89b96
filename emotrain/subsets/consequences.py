"""What a change of a model's weights costs each domain: losses with all experts, before and
after, on held-out documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from emotrain.batch import PackedBatch
from emotrain.evaluation.measure import choose_device, group_of_each, mean_increase, precision_on
from emotrain.evaluation.perplexity import DocumentLosses, document_losses, pack
from emotrain.evaluation.reading import DomainDocuments, read_domains
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.progress import Track, untracked
from emotrain.training.checkpoint import find, load_model
from emotrain.training.checkpoint_folders import read_config


@dataclass(frozen=True)
class DomainChange:
    """Of one domain, in nats a token."""

    before_nats: float
    after_nats: float
    change_nats: float
    """Negative where the domain has won."""
    standard_error_nats: float
    """Of the change, over documents."""
    documents: int


def read_held_out(
    checkpoint: str | Path, data: str | Path, settings: EvaluationSettings
) -> dict[str, DomainDocuments]:
    """The documents of a prepared data set on which `changes` measures a checkpoint.

    Raises:
        UserError: data of another tokenizer, or too few documents.
    """
    folder = find(checkpoint)
    return read_domains(data, read_config(folder), folder, settings)


def changes(
    before: str | Path,
    after: str | Path,
    domains: Mapping[str, DomainDocuments],
    *,
    device: str = "auto",
    track: Track[PackedBatch] = untracked,
) -> dict[str, DomainChange]:
    """The change of every domain from one checkpoint to another.

    Args:
        domains: of `read_held_out`.
    """
    target = choose_device(device)
    groups = [domains[name].held_out for name in domains]
    group_U, sizes = group_of_each(groups), list(map(len, groups))
    losses: list[DocumentLosses] = []
    for checkpoint, name in ((find(before), "before"), (find(after), "after")):
        config, model = load_model(checkpoint, target)
        if not losses:
            documents = [ids for group in groups for ids in group]
            rows, length = config.training.micro_batch, config.data.sequence_length
            batches = pack(documents, length, rows, config.model.attention.document_mask)
        losses.append(
            document_losses(
                model, batches, group_U, None, track, name, precision_on(config, target)
            )
        )
    old, new = losses
    increase_J, error_J = mean_increase(new.loss_U - old.loss_U, old.targets_U, group_U)
    sums = torch.stack([old.loss_U, old.targets_U.double()])
    loss_J, targets_J = sums.new_zeros(2, len(sizes)).index_add_(1, group_U, sums)
    before_J = loss_J / targets_J
    return {
        name: DomainChange(
            before_nats=float(before_J[j]),
            after_nats=float(before_J[j] + increase_J[j]),
            change_nats=float(increase_J[j]),
            standard_error_nats=float(error_J[j]),
            documents=sizes[j],
        )
        for j, name in enumerate(domains)
    }
