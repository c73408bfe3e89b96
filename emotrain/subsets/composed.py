"""How near subsets come to the full model on the text of their domains, as masks over its experts
and as models of their own: `emotrain subsets fidelity`.

A composed subset was selected for no text, so that its file says nothing of it. As masks it is what
`emotrain generate --subset` and the server run, as a model what `emotrain extract` writes. The two
are the same but where it keeps exclusive experts, which in a model of its own are of no domain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, rows_of
from emotrain.evaluation.perplexity import pack_groups
from emotrain.evaluation.reading import read_domains
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.modular.algebra import Operand, read_operands
from emotrain.modular.select import masks_of
from emotrain.progress import Track, untracked
from emotrain.subsets.extraction import taken_from
from emotrain.subsets.fidelity import Predictor, masked, nearness
from emotrain.subsets.selection import require_allowed, require_same_model
from emotrain.training.checkpoint import find, load_model
from emotrain.training.checkpoint_folders import read_config


@dataclass(frozen=True)
class DomainFidelity:
    """How near a subset is to the full model on held-out documents of one domain."""

    file: str
    domain: str
    documents: int
    tokens: int
    """That were predicted."""
    kl_nats: float
    """Mean over tokens of KL(full || subset), as masks."""
    acceptance: float
    """Mean over tokens of the sum of min(p, q), as masks."""
    extracted_kl_nats: float
    """The same two as a model of its own."""
    extracted_acceptance: float
    max_difference_nats: float
    """Largest difference of a log probability between masks and model."""


def composed_fidelity(
    checkpoint: str | Path,
    data: str | Path,
    files: Sequence[str | Path],
    *,
    domains: Sequence[str] = (),
    documents: int = 64,
    document_tokens: int = 0,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[PackedBatch] = untracked,
) -> list[DomainFidelity]:
    """Measure every subset on every one of its domains.

    Args:
        checkpoint: the one the subsets were selected from, or its run.
        data: a folder written by `emotrain prepare`.
        domains: to measure on; none means those that a subset, or what it was made of, was selected
            for.
        documents, document_tokens: most held-out documents of a domain, and tokens of each.
        micro_batch: rows of one forward pass; 0 means as in training.
    Raises:
        UserError: subsets of another checkpoint, a domain that is not known, too few documents.
    """
    folder, target = find(checkpoint), choose_device(device)
    config = read_config(folder)
    rows = rows_of(micro_batch, config.training.micro_batch)
    operands = read_operands(files, least=1)
    for operand in operands:
        require_same_model(operand.subset, folder, config)
    names = {operand.file: list(domains) or _domains(operand) for operand in operands}
    every = sorted({name for of in names.values() for name in of})
    settings = EvaluationSettings(
        calibration_documents=1,
        documents=documents,
        document_tokens=document_tokens,
        domains=tuple(every),
    )
    found = read_domains(data, config, folder, settings)
    for operand in operands:
        for name in names[operand.file]:
            require_allowed(operand.file, operand.subset, name, config)
    _, model = load_model(folder, target)
    measured = []
    for operand in operands:
        others = [
            masked(model, masks_of(operand.subset)),
            Predictor(taken_from(model, config, operand.subset)),
        ]
        for name in names[operand.file]:
            held_out = found[name].held_out
            batches = _packed(held_out, name, config, rows)
            near = nearness(Predictor(model), others, batches, track)
            (kl, extracted_kl), (acceptance, extracted_acceptance) = near.kl_nats, near.acceptance
            measured.append(
                DomainFidelity(
                    operand.file,
                    name,
                    len(held_out),
                    near.tokens,
                    kl,
                    acceptance,
                    extracted_kl,
                    extracted_acceptance,
                    near.max_difference_nats,
                )
            )
    return measured


def _domains(operand: Operand) -> list[str]:
    """What a subset was selected for, or those were that it was made of."""
    subset = operand.subset
    names = [of.domain for of in subset.parents] or [subset.calibration.domain]
    found = sorted({name for name in names if name})
    if not found:
        raise UserError(
            f"{operand.file}: was selected for no domain; name what to measure on with --domains"
        )
    return found


def _packed(
    documents: Sequence[np.ndarray], domain: str, config: Config, rows: int
) -> list[PackedBatch]:
    known = domain if domain in dict(config.model.experts.exclusive) else ""
    mask = config.model.attention.document_mask
    return pack_groups([documents], [known], config.data.sequence_length, rows, mask)


def to_json(found: Sequence[DomainFidelity]) -> dict[str, Any]:
    return {"subsets": [dataclasses.asdict(of) for of in found]}
