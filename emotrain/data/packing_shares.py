"""How a packing treats documents: how many lie whole in one sequence, which gives them one pool."""

from __future__ import annotations

import numpy as np

from emotrain.data.opening import PACKINGS
from emotrain.data.source import TokenStore, Window
from emotrain.errors import UserError

MAX_TOKENS = 2**26
"""Tokens that are measured, from the start of the data on."""


class _Start:
    """The first tokens of a store."""

    def __init__(self, store: TokenStore, most_tokens: int):
        self._store = store
        self.path, self.split = store.path, store.split
        self.fingerprint, self.vocab_size = store.fingerprint, store.vocab_size
        self.eos_id, self.tokenizer_file = store.eos_id, store.tokenizer_file
        self.shard_tokens: list[int] = []
        for tokens in store.shard_tokens:
            self.shard_tokens.append(min(tokens, most_tokens))
            most_tokens -= self.shard_tokens[-1]

    def window(self, shard: int, start: int, stop: int) -> Window:
        return self._store.window(shard, start, stop)

    def edges(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._store.edges(shard, start, stop)


def packing_shares(
    store: TokenStore, sequence_length: int, packing: str, most_tokens: int = MAX_TOKENS
) -> dict[str, float]:
    """Shares of the documents that lie in the sequences of a packing with all of their tokens.

    Args:
        packing: a name of `data.packing`.
        most_tokens: how much of the data is read, from its start.
    Returns:
        `sequences` and `documents` measured; `utilisation`, tokens of documents of all tokens of
        the sequences; `one_pool`, the share of documents that lie whole in one sequence, and
        `one_pool_of_fitting`, of those that are not longer than one; `cut`, the others of all;
        `pieces`, documents and pieces of them in a sequence.
    Raises:
        UserError: the measured part holds no sequence, or cannot be read.
    """
    part = _Start(store, most_tokens)
    windows = PACKINGS[packing](part, sequence_length)
    ids, lengths = [], []
    for shard, tokens in enumerate(part.shard_tokens):
        used = tokens // sequence_length * sequence_length
        if used:
            found = part.window(shard, 0, used)
            # The last document may go on behind the last sequence.
            last = len(found.ids) - (used < store.shard_tokens[shard])
            ids.append(found.ids[:last])
            lengths.append(found.lengths[:last])
    ids_D, lengths_D = np.concatenate(ids), np.concatenate(lengths)
    if not len(ids_D):
        raise UserError(
            f"{store.path}: no document ends inside of the first {most_tokens} tokens; measure more"
        )
    order = np.argsort(ids_D)
    ids_D, lengths_D = ids_D[order], lengths_D[order]
    whole = pieces = of_documents = 0
    for first in range(0, windows.num_sequences, 1024):
        rows = windows.rows(np.arange(first, min(first + 1024, windows.num_sequences)))
        at = np.searchsorted(ids_D[:-1], rows.ids_G)
        whole += int(((ids_D[at] == rows.ids_G) & (lengths_D[at] == rows.lengths_G)).sum())
        pieces += len(rows.ids_G)
        of_documents += int(rows.lengths_G[rows.ids_G >= 0].sum())
    documents, fitting = len(ids_D), int((lengths_D <= sequence_length).sum())
    return {
        "sequences": windows.num_sequences,
        "documents": documents,
        "utilisation": of_documents / (windows.num_sequences * sequence_length),
        "one_pool": whole / documents,
        "one_pool_of_fitting": whole / max(fitting, 1),
        "cut": 1 - whole / documents,
        "pieces": pieces / windows.num_sequences,
    }
