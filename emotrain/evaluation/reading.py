"""The documents of each domain that an evaluation needs, and whether data and checkpoint have one
tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.config import Config
from emotrain.data.formats import Dataset
from emotrain.data.tokenizer import TextTokenizer, load_tokenizer
from emotrain.errors import MissingFileError, UserError
from emotrain.evaluation.settings import EvaluationSettings

log = logging.getLogger("emotrain")


@dataclass(frozen=True)
class DomainDocuments:
    """Token ids of a domain's documents, each ending in EOS."""

    calibration: Sequence[np.ndarray]
    """Choose the experts; the loss never sees them."""
    held_out: Sequence[np.ndarray]
    """Measure the loss."""


def read_domains(
    data: str | Path, config: Config, checkpoint: Path, settings: EvaluationSettings
) -> dict[str, DomainDocuments]:
    """Calibration documents (train split) and held-out documents (valid split) of every domain of
    the valid split.

    `prepare` stores documents in a shuffled order, so the first ones are a random sample of their
    domain. Documents without anything to predict (EOS alone) are passed over.

    Raises:
        UserError: data of another vocabulary than the model's, or too few documents.
    """
    dataset, names = _open(data, config, checkpoint, settings.domains)

    def take(split: str, domain: str, count: int) -> list[np.ndarray]:
        return documents_of(dataset, split, domain, count, settings.document_tokens)

    found: dict[str, DomainDocuments] = {}
    problems = []
    for name in names:
        calibration = take("train", name, settings.calibration_documents)
        held_out = take("valid", name, settings.documents)
        problem = _too_few(name, calibration, held_out, settings)
        if problem and settings.domains:
            raise UserError(f"{data}: {problem}")
        if problem:
            problems.append(problem)
            log.warning("%s: %s; the domain is left out", data, problem)
        else:
            found[name] = DomainDocuments(calibration, held_out)
    if not found:
        raise UserError(f"{data}: no domain has enough documents: {problems[0]}")
    return found


def read_held_out(
    data: str | Path,
    config: Config,
    checkpoint: Path,
    documents: int,
    document_tokens: int = 0,
    domains: Sequence[str] = (),
) -> dict[str, list[np.ndarray]]:
    """Token ids of the held-out documents of every domain, those that `read_domains` measures a
    loss on; one document is enough.

    Args:
        documents, document_tokens: at most so many of a domain, and so much of each (0: all).
        domains: names; none means all of the valid split.
    Raises:
        UserError: data of another vocabulary than the model's, or a domain without documents.
    """
    dataset, names = _open(data, config, checkpoint, domains)
    found = {
        name: documents_of(dataset, "valid", name, documents, document_tokens) for name in names
    }
    for name in [name for name, held_out in found.items() if not held_out]:
        told = f"{data}: domain {name!r} has only empty valid documents"
        if domains or len(found) == 1:
            raise UserError(f"{told}; prepare the data again, or leave the domain out")
        log.warning("%s; the domain is left out", told)
        del found[name]
    return found


def _open(
    data: str | Path, config: Config, checkpoint: Path, domains: Sequence[str]
) -> tuple[Dataset, list[str]]:
    """The data set, and the domains asked for, each once, or all of its valid split."""
    dataset = Dataset(data, verify_checksums=config.data.verify_checksums)
    check_vocabulary(dataset.path, dataset.vocab_size, config, checkpoint)
    names = sorted(name for name, count in dataset.domains["valid"].items() if count["documents"])
    if not names:
        raise UserError(
            f"{data}: its valid split has no documents to measure a loss on; prepare it again with "
            f"a larger valid share"
        )
    if unknown := sorted(set(domains) - set(names)):
        raise UserError(
            f"{data}: has no held-out documents of domain {unknown[0]!r}; its domains are "
            f"{', '.join(names)}"
        )
    return dataset, list(dict.fromkeys(domains)) or names


def documents_of(
    dataset: Dataset, split: str, domain: str, count: int, document_tokens: int = 0
) -> list[np.ndarray]:
    """The first documents of a domain in which there is something to predict: token ids of at most
    `count`, and at most `document_tokens` (0: all) of each. None of an unknown domain."""
    if domain not in dataset.domains[split]:
        return []
    whole = (ids for _, ids, _ in dataset.documents(split, domain) if len(ids) > 1)
    return [ids[: document_tokens or None] for ids in islice(whole, count)]


def _too_few(
    name: str,
    calibration: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    settings: EvaluationSettings,
) -> str | None:
    """What a domain lacks, in words."""
    wanted = settings.calibration_documents
    if len(calibration) < wanted:
        return (
            f"domain {name!r} has {len(calibration)} train documents, {wanted} are needed; lower "
            f"calibration_documents or prepare more of them"
        )
    if len(held_out) < 2:
        return (
            f"domain {name!r} has {len(held_out)} valid documents, 2 are needed; prepare the data "
            f"again with a larger valid share"
        )
    return None


def tokenizer_file(checkpoint: Path) -> Path:
    """
    Raises:
        MissingFileError: the checkpoint has no tokenizer.
    """
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        raise MissingFileError(
            f"{checkpoint}: has no tokenizer.json, without which it reads no text and writes none; "
            f"put that of its training there"
        )
    return file


def tokenizer_of(checkpoint: Path, config: Config) -> TextTokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        UserError: there is none, or it has ids that the model lacks.
    """
    tokenizer = load_tokenizer(tokenizer_file(checkpoint))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} ids and its model "
            f"{config.model.vocab_size}; put the tokenizer of its training there"
        )
    return tokenizer


def check_vocabulary(data: Path, vocab_size: int, config: Config, checkpoint: Path) -> None:
    if vocab_size > config.model.vocab_size:
        raise UserError(
            f"{data} has a vocabulary of {vocab_size} tokens, the model has "
            f"model.vocab_size={config.model.vocab_size}; "
            f"evaluate on data prepared with the tokenizer of the training data"
        )
    files = data / "tokenizer.json", checkpoint / "tokenizer.json"
    if all(file.is_file() for file in files):
        own, trained = map(_tokenizer_identity, files)
        if own != trained:
            raise UserError(
                f"{files[0]} is not the tokenizer that the model was trained with; prepare the "
                f"data with "
                f"--tokenizer {files[1]}"
            )


def _tokenizer_identity(file: Path) -> list[Any]:
    """What decides the ids of a text; the rest of the file may differ by version."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return [
            settings.get(key) for key in ("model", "added_tokens", "pre_tokenizer", "normalizer")
        ]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: not readable as a tokenizer ({error}); restore it") from None
