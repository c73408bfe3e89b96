"""What a data set looks like to the method: how long its documents are against a window, where
they are cut, how they lie in sequences, and whether its tokenizer gives their text back.

Of a large data set a part is read: the start of every shard, `tokens` in all. Documents at the
start of a shard stand for all others where the data were shuffled, as `prepare` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from emotrain.data.source import TokenStore
from emotrain.data.tokenizer import TextTokenizer
from emotrain.errors import UserError

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
LESSON = "EMO's method has nothing to learn from where boundaries mean nothing"
SHOWN_TOKENS = 2**14
"""Of a sequence that is shown, at most."""
BEST_FIT_TOKENS = 2**24
"""That are packed to see how, at most, from the first shard on."""
READ_TOKENS = 2**24
"""Of a shard that are looked at at a time."""
ROUND_TRIP_TOKENS = 2**14
"""Of a document that is decoded and encoded again, at most: texts of millions of tokens take
minutes."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents in tokens, EOS included."""

    documents: int
    tokens: int
    mean: float
    largest: int
    quantiles: dict[str, int]
    """By the share of documents that are not longer."""
    histogram: list[tuple[int, int]]
    """For each power of two 2^i from 1: documents of 2^i to 2^(i + 1) - 1 tokens, and their
    number, up to the longest."""
    most_common: int
    """The length that most documents have."""
    most_common_share: float


@dataclass(frozen=True)
class Cuts:
    """What windows do to documents that are packed one after the other (`data.packing=concat`)."""

    window: int
    longer: float
    """Share of documents longer than a window."""
    cut: float
    """Share of documents that lie in more than one window."""
    one_pool_documents: float
    """Share that lies in one, and so has one pool."""
    one_pool_tokens: float
    """Share of tokens in such documents."""
    documents_per_window: float


@dataclass(frozen=True)
class Piece:
    """A document, or what a window holds of it, as shown."""

    document_id: int
    tokens: int
    text: str
    domain: str


@dataclass(frozen=True)
class RoundTrip:
    """Documents decoded and encoded again."""

    documents: int
    same_ids: int
    """That gave the same ids."""
    same_text: int
    """That gave the same text, be it by other ids."""
    first_difference: str
    """Of the first document whose text changed; empty for none."""


@dataclass(frozen=True)
class Survey:
    """What `emotrain inspect DATA` tells."""

    path: str
    split: str
    vocab_size: int
    eos_id: int
    shards: int
    tokens: int
    read_tokens: int
    """Of them, those that the numbers below are of."""
    lengths: Lengths
    cuts: Cuts
    best_fit: dict[str, float] | None
    """Of `data.packing=best_fit`, see `packing_shares`; None where no window is full."""
    domains: dict[str, dict[str, int]]
    """Documents and tokens of each; none where the format has no domains."""
    windows: list[list[Piece]]
    """Sequences as training packs them."""
    round_trip: RoundTrip | None
    """None without a tokenizer."""

    def json(self) -> dict[str, Any]:
        return asdict(self)


def survey(
    store: TokenStore,
    window: int,
    *,
    tokens: int,
    windows: int,
    seed: int = 0,
    tokenizer: TextTokenizer | None = None,
    domains: dict[str, dict[str, int]] | None = None,
    domain_of: Callable[[int], str] = lambda document: "",
) -> Survey:
    """Look at a split of a data set.

    Args:
        window: tokens of a sequence.
        tokens: how many to read, about.
        windows: sequences to show.
        seed: of those.
        tokenizer: to show text and to try a round trip; without one, ids are shown.
        domains: documents and tokens of each.
        domain_of: the domain of a document by its id.
    Raises:
        UserError: bad arguments, or a store that is empty or damaged.
    """
    if window < 2 or tokens < 1 or windows < 0 or seed < 0:
        raise UserError(
            f"window={window}, tokens={tokens}, windows={windows}, seed={seed}: a window has at "
            f"least 2 tokens, tokens are positive, and the others not negative"
        )
    sizes = list(store.shard_tokens)
    if not sum(sizes):
        raise UserError(f"{store.path}: has no {store.split} tokens to look at")
    share = min(1.0, tokens / sum(sizes))
    edges = [
        _edges(store, shard, part)
        for shard, size in enumerate(sizes)
        if (part := min(size, max(window, round(size * share))))
    ]
    whole = [
        # The last document of a part goes on behind it.
        of if of[-1] == size or len(of) < 3 else of[:-1]
        for of, size in zip(edges, (size for size in sizes if size), strict=True)
    ]
    shown = _windows(store, window, windows, seed)
    return Survey(
        str(store.path),
        store.split,
        store.vocab_size,
        store.eos_id,
        len(sizes),
        sum(sizes),
        int(sum(of[-1] for of in edges)),
        lengths_of(np.concatenate([np.diff(of) for of in whole])),
        cuts_of(whole, window),
        _best_fit(store, window, tokens),
        domains or {},
        [
            [
                Piece(number, len(ids), _text(ids[:SHOWN_TOKENS], tokenizer), domain_of(number))
                for number, ids in pieces
            ]
            for pieces in shown
        ],
        None
        if tokenizer is None
        else round_trip([ids for pieces in shown for _, ids in pieces], tokenizer),
    )


def _best_fit(store: TokenStore, window: int, tokens: int) -> dict[str, float] | None:
    from emotrain.data.packing_shares import packing_shares

    most = min(tokens, BEST_FIT_TOKENS)
    if min(most, store.shard_tokens[0]) < window:
        return None
    return packing_shares(store, window, "best_fit", most)


def _edges(store: TokenStore, shard: int, stop: int) -> np.ndarray:
    """As `store.edges` from the start of a shard, without holding all of its tokens."""
    found = [np.zeros(1, dtype=np.int64)]
    for start in range(0, stop, READ_TOKENS):
        # From one token before, so that a document that begins at `start` is seen to.
        edges = store.edges(shard, max(0, start - 1), min(stop, start + READ_TOKENS))
        found.append(edges[1:-1])
    return np.concatenate([*found, [stop]])


def lengths_of(lengths: np.ndarray) -> Lengths:
    """Of int64 lengths, at least one."""
    values, counts = np.unique(lengths, return_counts=True)
    places = np.log2(lengths).astype(np.int64)
    histogram = np.bincount(places)
    ordered = np.quantile(lengths, QUANTILES, method="inverted_cdf").tolist()
    return Lengths(
        len(lengths),
        int(lengths.sum()),
        float(lengths.mean()),
        int(values[-1]),
        {f"{share:g}": int(value) for share, value in zip(QUANTILES, ordered, strict=True)},
        [(2**place, int(count)) for place, count in enumerate(histogram)],
        int(values[counts.argmax()]),
        float(counts.max() / len(lengths)),
    )


def cuts_of(edges: Iterable[np.ndarray], window: int) -> Cuts:
    """Of the edges of documents in shards, each from 0, cut into windows one after the other."""
    documents = longer = cut = 0
    tokens = inside = windows = 0
    for of in edges:
        starts, lengths = of[:-1], np.diff(of)
        is_cut = starts // window != (of[1:] - 1) // window
        documents, longer = documents + len(starts), longer + int((lengths > window).sum())
        cut, tokens = cut + int(is_cut.sum()), tokens + int(of[-1])
        inside += int(lengths[~is_cut].sum())
        # A document that is cut counts in each window that it touches.
        windows += int(((of[1:] - 1) // window - starts // window + 1).sum())
    return Cuts(
        window,
        longer / documents,
        cut / documents,
        1 - cut / documents,
        inside / tokens,
        windows / max(1.0, tokens / window),
    )


def round_trip(documents: Sequence[np.ndarray], tokenizer: TextTokenizer) -> RoundTrip:
    """Decode documents and encode them again, each without its EOS."""
    same_ids = same_text = 0
    difference = ""
    parts = [ids[:ROUND_TRIP_TOKENS] for ids in documents]
    parts = [ids[:-1] if ids[-1] == tokenizer.eos_id else ids for ids in parts]
    texts = [tokenizer.decode(ids) for ids in parts]
    for ids, text, again in zip(parts, texts, tokenizer.encode_batch(texts), strict=True):
        same_ids += np.array_equal(again[:-1], ids)
        back = tokenizer.decode(again[:-1])
        same_text += back == text
        if back != text and not difference:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b),
                min(len(text), len(back)),
            )
            difference = (
                f"{text[max(0, at - 20) : at + 20]!r} becomes {back[max(0, at - 20) : at + 20]!r}"
            )
    return RoundTrip(len(documents), same_ids, same_text, difference)


def _windows(
    store: TokenStore, window: int, count: int, seed: int
) -> list[list[tuple[int, np.ndarray]]]:
    """Some windows of the store: for each, ids and tokens of its documents."""
    from emotrain.data.loader import Loader, StreamWindows

    if not count or max(store.shard_tokens) < window:
        return []
    loader = Loader(StreamWindows(store, window), seed)
    batch = loader.batch(range(min(count, loader.num_sequences)))
    found = []
    for tokens_S, document_S in zip(
        batch.tokens_BS.numpy(), batch.document_BS.numpy(), strict=True
    ):
        cuts = np.flatnonzero(np.diff(document_S)) + 1
        numbers = batch.document_ids_G.numpy()[document_S[np.concatenate(([0], cuts))]]
        found.append(list(zip(numbers.tolist(), np.split(tokens_S, cuts), strict=True)))
    return found


def _text(ids: np.ndarray, tokenizer: TextTokenizer | None) -> str:
    return " ".join(map(str, ids.tolist())) if tokenizer is None else tokenizer.decode(ids)
