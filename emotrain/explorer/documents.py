"""The documents that a page shows: which ones, and the start of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from emotrain.data.formats import Dataset
from emotrain.errors import UserError


@dataclass(frozen=True)
class ShownDocuments:
    """U documents of a data set, without their end-of-document tokens."""

    id_U: np.ndarray
    """int64 ids in the data set."""
    tokens: list[np.ndarray]
    """Token ids of the start of each, at least one."""
    domains: list[str]
    """Names, in alphabetical order."""
    domain_U: np.ndarray
    """int64, index into `domains`."""

    @property
    def start_U(self) -> np.ndarray:
        """int64 [U + 1]: where each document starts when all follow one another."""
        return np.concatenate([[0], np.cumsum([len(ids) for ids in self.tokens])])


def read_documents(
    dataset: Dataset, split: str, count: int, document_tokens: int, ids: np.ndarray | None = None
) -> ShownDocuments:
    """The first documents of a split, which are a random sample: `prepare` has shuffled them.
    Those without a token but the last are passed over.

    Args:
        count: at most so many.
        document_tokens: tokens of a document, from its start.
        ids: only these documents, ascending; None means all.
    Raises:
        UserError: there is no document to show.
    """
    wanted = None if ids is None else set(ids.tolist())
    found_ids: list[int] = []
    tokens: list[np.ndarray] = []
    names: list[str] = []
    for document_id, document, domain in _first(dataset, split, wanted):
        if len(found_ids) == count:
            break
        body = document[:-1] if document[-1] == dataset.eos_id else document
        if len(body):
            found_ids.append(document_id)
            tokens.append(np.array(body[:document_tokens]))
            names.append(domain)
    if not found_ids:
        raise UserError(
            f"{dataset.path}: its {split} split has no document to show; choose another --split"
        )
    domains, domain_U = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    return ShownDocuments(np.array(found_ids), tokens, domains.tolist(), domain_U.reshape(-1))


def _first(
    dataset: Dataset, split: str, wanted: set[int] | None
) -> Iterable[tuple[int, np.ndarray, str]]:
    for document in dataset.documents(split):
        if wanted is None or document[0] in wanted:
            yield document
