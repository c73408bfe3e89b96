"""Shuffles that are pure functions of a seed: no state, no stored permutation, the same on every
machine.

`mix64` is the finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit integers
whose output bits look independent of its input. `prepare` uses it to scatter documents over shards;
`permute` builds the order of training sequences from it.
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: the increment of splitmix64, which keeps consecutive keys
far apart."""

ROUNDS = 6
"""Feistel rounds. Four with ideal round functions already give a pseudo-random permutation (Luby
and Rackoff, 1988)."""


def mix64(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values, element by element; a bijection. Shape and dtype are kept."""
    x = values.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed(key: int, values: np.ndarray) -> np.ndarray:
    """uint64 hashes of non-negative integers under an integer key; distinct values keep distinct
    hashes."""
    start = mix64(np.array([key % 2**64], dtype=np.uint64) + np.uint64(GOLDEN))
    return mix64(values.astype(np.uint64) * np.uint64(GOLDEN) + start)


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where keyed permutations of [0, size) send `indices`, in O(1) time and memory an index.

    A Feistel network is a bijection of [0, 4^h) for any round function. With the smallest h that
    covers `size`, an output at or above `size` is sent through again ("cycle walking") until it
    falls inside: still a bijection, of [0, size), after fewer than four passes on average.

    Args:
        indices: integers [P] in [0, size).
        size: how many things are permuted, 1 to 2^62.
        keys: uint64 [P]; indices with equal keys are permuted together.
    Returns:
        int64 [P].
    """
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    result = indices.astype(np.uint64)
    outside = np.arange(result.size)
    while outside.size:
        left, right, key = result[outside] >> half, result[outside] & mask, keys[outside]
        for _ in range(ROUNDS):
            left, right = right, left ^ (mix64(right ^ key) & mask)
            key = key + np.uint64(GOLDEN)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64)
