"""Documents that are there twice. Of each set of equal or similar ones the first stays, by its
place in the inputs, whoever encoded it.

`exact`: the hash of the normalised text (Unicode NFC, no case, white space as one space).

`near:S`: MinHash over runs of SHINGLE_WORDS words, as the rensa library computes it. A signature of
B * R values is cut into B bands of R; two documents of similarity s (of their sets of runs) agree
in a band with a chance of about s^R, and the later one is left out if they agree in any: with a
chance of 1 - (1 - s^R)^B. B and R are those whose chance is 0.5 nearest to s = S. A document that
is left out still leaves out others.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emotrain.errors import MissingPackageError, UserError

SHINGLE_WORDS = 5
SIGNATURE = 128
"""Values of a signature, at most."""
MAX_BANDS = 64
TOLERANCE = 0.004
"""By which the similarity with a chance of 0.5 may be off, for a steeper curve."""
SEED = 0
"""Of the hashes of MinHash."""
CURVE = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Similarities at which the card says what the chance is."""
PASS_KEYS = 2**25
"""Keys that are compared at a time; each takes 16 bytes, and as many again while it is sorted."""


@dataclass(frozen=True)
class Deduplication:
    """What `--deduplicate` asks for."""

    kind: str
    """`exact` or `near`."""
    threshold: float = 1.0
    bands: int = 1
    rows: int = 0

    @property
    def key_width(self) -> int:
        """64-bit words of a document's key."""
        return 2 if self.kind == "exact" else self.bands

    def chance(self, similarity: float) -> float:
        """That of two documents of this similarity the later one is left out."""
        return 1 - (1 - similarity**self.rows) ** self.bands

    @property
    def half(self) -> float:
        """The similarity at which that chance is 0.5."""
        return (1 - 0.5 ** (1 / self.bands)) ** (1 / self.rows)

    def described(self) -> dict[str, Any]:
        """Its parameters and its curve, for reports and the card."""
        if self.kind == "exact":
            return {
                "kind": "exact",
                "key": "16 bytes of blake2b of the text in NFC, without case, white space as one "
                "space",
            }
        from importlib.metadata import version

        return {
            "kind": "near",
            "threshold": self.threshold,
            "library": f"rensa {version('rensa')}",
            "hash": "RMinHash",
            "hash_seed": SEED,
            "shingle_words": SHINGLE_WORDS,
            "bands": self.bands,
            "rows": self.rows,
            "similarity_at_chance_half": round(self.half, 4),
            "chance_by_similarity": {f"{s:g}": round(self.chance(s), 4) for s in CURVE},
        }


def parse_deduplication(text: str) -> Deduplication:
    """`exact`, `near` or `near:0.8`.

    Raises:
        UserError: another word, or a threshold that is none.
    """
    kind, _, value = text.partition(":")
    if text == "exact":
        return Deduplication("exact")
    try:
        threshold = float(value or 0.8)
    except ValueError:
        threshold = 0.0
    if kind != "near" or not 0.1 <= threshold <= 0.99:
        raise UserError(
            f"--deduplicate {text!r} is not known; give exact, or near:S with a similarity S from "
            f"0.1 to 0.99"
        )
    choices = [
        Deduplication("near", threshold, bands, rows)
        for bands in range(1, MAX_BANDS + 1)
        for rows in range(1, SIGNATURE // bands + 1)
    ]
    near = min(abs(choice.half - threshold) for choice in choices) + TOLERANCE
    # The more values, the steeper the curve.
    good = [choice for choice in choices if abs(choice.half - threshold) <= near]
    return max(good, key=lambda d: (d.bands * d.rows, -abs(d.half - threshold)))


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def key_maker(wanted: Deduplication) -> Callable[[Sequence[str]], list[tuple[int, ...]]]:
    """The keys of texts: tuples of `key_width` 64-bit numbers.

    Raises:
        MissingPackageError: rensa is not installed.
    """
    if wanted.kind == "exact":
        return lambda texts: [_exact_key(text) for text in texts]
    try:
        from rensa import RMinHash
    except ImportError:
        raise MissingPackageError(
            "--deduplicate near needs rensa; install it with: pip install 'emotrain[dedup]'"
        ) from None
    size = wanted.bands * wanted.rows

    def keys(texts: Sequence[str]) -> list[tuple[int, ...]]:
        sets = [_shingles(text) for text in texts]
        rows = RMinHash.digest_matrix_from_token_sets(sets, num_perm=size, seed=SEED).to_rows()
        values_DBR = np.array(rows, np.uint32).reshape(len(texts), wanted.bands, wanted.rows)
        return [
            tuple(
                int.from_bytes(hashlib.blake2b(band, digest_size=8).digest(), "little")
                for band in map(bytes, document)
            )
            for document in np.ascontiguousarray(values_DBR.astype("<u4"))
        ]

    return keys


def find_duplicates(
    wanted: Deduplication, count: int, read: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
) -> np.ndarray:
    """Which documents are left out.

    The keys are read several times, each time for a share of them, so that memory is PASS_KEYS keys
    and a byte a document, however many there are.

    Args:
        count: how many documents there are.
        read: their places in the inputs, int64 [n], and keys, uint64 [n, key_width], in parts.
    Returns:
        bool [count].
    """
    dropped = np.zeros(count, bool)
    exact = wanted.kind == "exact"
    passes = max(1, -(-count // PASS_KEYS))
    for band in range(1 if exact else wanted.bands):
        for share in range(passes):
            places, firsts, seconds = [], [], []
            for places_n, keys_nW in read():
                mine = keys_nW[:, band] % np.uint64(passes) == np.uint64(share)
                places.append(places_n[mine])
                firsts.append(keys_nW[mine, band])
                if exact:
                    seconds.append(keys_nW[mine, 1])
            place = np.concatenate(places) if places else np.zeros(0, np.int64)
            if not len(place):
                continue
            words = [np.concatenate(firsts)] + ([np.concatenate(seconds)] if exact else [])
            order = np.lexsort((place, *words))
            same = np.ones(len(order) - 1, bool)
            for word in words:
                same &= word[order[1:]] == word[order[:-1]]
            dropped[place[order[1:]][same]] = True
    return dropped


def _exact_key(text: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(normalised(text).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _shingles(text: str) -> list[str]:
    words = normalised(text).split(" ")
    return [
        " ".join(words[start : start + SHINGLE_WORDS])
        for start in range(max(1, len(words) - SHINGLE_WORDS + 1))
    ]
