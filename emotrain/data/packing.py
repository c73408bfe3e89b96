"""From documents to packed rows: for evaluation, and wherever documents are at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emotrain.batch import PADDING_ID, PackedBatch
from emotrain.errors import UserError


def packed_rows(
    tokens_BS: np.ndarray,
    lengths: Sequence[Sequence[int]],
    ids: Sequence[Sequence[int]],
    cross_document_targets: bool,
) -> PackedBatch:
    """`PackedBatch.from_documents`, with the lengths and ids of each row in a list of its own."""
    return PackedBatch.from_documents(
        tokens_BS,
        np.concatenate([np.asarray(row, dtype=np.int64) for row in lengths]),
        np.concatenate([np.asarray(row, dtype=np.int64) for row in ids]),
        cross_document_targets,
    )


def pack_documents(
    documents: Sequence[np.ndarray], ids: Sequence[int], row_length: int, pad_id: int = 0
) -> PackedBatch:
    """Pack whole documents for evaluation: no document sees another one, and every token but the
    first of a piece is predicted.

    A document longer than a row is cut into pieces of `row_length` tokens, each a document of its
    own with the same permanent id. Pieces go, in order, into the first row with room. A row that is
    not full ends in padding: one pseudo-document with id -1, without targets.

    Args:
        documents: token ids [length] of each document, none empty.
        ids: the permanent id of each document.
        row_length: tokens of a row.
        pad_id: token id of padding positions.
    Raises:
        ValueError: no documents, an empty one, or not one id a document.
    """
    if (
        len(documents) != len(ids)
        or not len(documents)
        or min(map(len, documents)) < 1
        or row_length < 1
    ):
        raise UserError(
            f"{len(documents)} documents and {len(ids)} ids cannot be packed into rows of "
            f"{row_length}; give at "
            f"least one document, none empty, one id each, and a positive row length"
        )
    rows: list[list[tuple[np.ndarray, int]]] = []
    room = np.zeros(0, dtype=np.int64)
    for document, document_id in zip(documents, ids, strict=True):
        for begin in range(0, len(document), row_length):
            piece = document[begin : begin + row_length]
            fits = np.flatnonzero(room >= len(piece))
            row = int(fits[0]) if fits.size else len(rows)
            if row == len(rows):
                rows.append([])
                room = np.append(room, row_length)
            rows[row].append((piece, int(document_id)))
            room[row] -= len(piece)
    tokens_BS = np.full((len(rows), row_length), pad_id, dtype=np.int64)
    for row, pieces in enumerate(rows):
        tokens_BS[row, : row_length - room[row]] = np.concatenate([piece for piece, _ in pieces])
    padding = [[int(left)] if left else [] for left in room]
    lengths = [
        [len(piece) for piece, _ in pieces] + pad for pieces, pad in zip(rows, padding, strict=True)
    ]
    packed_ids = [
        [i for _, i in pieces] + [PADDING_ID] * len(pad)
        for pieces, pad in zip(rows, padding, strict=True)
    ]
    return packed_rows(tokens_BS, lengths, packed_ids, cross_document_targets=False)
