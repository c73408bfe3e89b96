"""From a path to what can be trained on."""

from __future__ import annotations

from pathlib import Path

from emotrain.config import RepetitionFilterConfig
from emotrain.data.domain_store import DomainStore
from emotrain.data.formats import Dataset
from emotrain.data.loader import Loader, StreamWindows
from emotrain.data.source import TokenStore


def open_loader(
    path: str | Path,
    sequence_length: int,
    seed: int,
    *,
    cross_document_targets: bool = True,
    repetition_filter: RepetitionFilterConfig | None = None,
    verify_checksums: bool = True,
    domain: str = "",
    split: str = "train",
    span: int = 1,
) -> Loader:
    """The sequences of a prepared data set, in order.

    Args:
        path: folder written by `emotrain prepare`.
        sequence_length: tokens of a sequence.
        seed: of the order.
        cross_document_targets, repetition_filter: see `Loader`.
        verify_checksums: hash what is read, each time; see `Dataset`.
        domain: only its documents, which use its exclusive experts; empty for all documents.
        split: `train` or `valid`.
        span: sequences that stay neighbours, for pools across windows; see `StreamWindows`.
    Raises:
        FileNotFoundError: no data set there. UserError: a damaged one, one without a whole
            sequence, or a bad argument.
    """
    whole = Dataset(path, verify_checksums).store(split)
    store: TokenStore = DomainStore(whole, domain, sequence_length) if domain else whole
    part = f"domain {domain}" if domain else ""
    windows = StreamWindows(store, sequence_length, span, part)
    return Loader(
        windows,
        seed,
        cross_document_targets=cross_document_targets,
        repetition_filter=repetition_filter,
        domain=domain,
    )
