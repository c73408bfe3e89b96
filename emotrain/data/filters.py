"""Sequences that repeat themselves get no loss (spec 4.4): they pass through the model, and
their targets are ignored."""

from __future__ import annotations

import numpy as np

from emotrain.config import RepetitionFilterConfig

MIN_REPORTED = 3
"""Fewer repetitions than this never count, whatever `max_count` says."""


def is_repetitive(tokens_BS: np.ndarray, config: RepetitionFilterConfig) -> np.ndarray:
    """Which rows hold a stretch with some period that repeats at least `max_count` times.

    A stretch of `times` repetitions of period p is a run of at least (times - 1) * p positions at
    which a token equals the one p positions before it. The reference looks for such runs in rows of
    p tokens, extended on both sides; as every run of 2p - 1 positions holds a whole aligned row,
    both find the same sequences.

    Args:
        tokens_BS: integers [B, S].
    Returns:
        bool [B].
    """
    num_rows, length = tokens_BS.shape
    found_B = np.zeros(num_rows, dtype=bool)
    times = max(config.max_count, MIN_REPORTED)
    for period in range(config.min_period, min(config.max_period, length // 3) + 1):
        run = (times - 1) * period
        if run > length - period:
            break
        equal = tokens_BS[:, period:] == tokens_BS[:, :-period]
        count = np.zeros((num_rows, length - period + 1), dtype=np.int64)
        np.cumsum(equal, axis=1, out=count[:, 1:])
        found_B |= (count[:, run:] - count[:, :-run] == run).any(axis=1)
    return found_B
