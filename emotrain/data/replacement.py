"""Sequences in place of those that are not trained on: those that repeat themselves, by
`data.repetition_filter.action=replace`, and those that cannot be read, by
`data.on_bad_data=replace`.

Which sequence comes instead is a pure function of the seed, the position and the data, so that it
is the same on every number of ranks and in every micro-batch: position p draws numbers of sequences
by hashes of (seed, p, attempt) until one is good. Sequences of a span are replaced together.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from typing import Any

import numpy as np

from emotrain.config import RepetitionFilterConfig
from emotrain.data.filters import is_repetitive
from emotrain.data.loader import Loader, keyed
from emotrain.data.source import Rows, Windows
from emotrain.errors import UserError

log = logging.getLogger("emotrain")

MAX_ATTEMPTS = 100
"""Sequences drawn for one position. Where half of the data is bad, not one position of 10^30 needs
so many."""
MAX_LOGGED = 100
"""Positions with bad data that are logged one by one."""


class ReplacingLoader(Loader):
    """As `Loader`, with good sequences only.

    Args:
        repetition_filter: with `action=replace`, sequences that repeat themselves are replaced.
        bad_data: whether sequences that cannot be read are replaced; else they raise.
        options: other arguments of `Loader`.
    """

    def __init__(
        self,
        windows: Windows,
        seed: int,
        *,
        repetition_filter: RepetitionFilterConfig | None = None,
        bad_data: bool = False,
        **options: Any,
    ):
        super().__init__(windows, seed, repetition_filter=repetition_filter, **options)
        self.bad_data = bad_data
        self.replaces = None
        """The filter whose sequences are replaced; `repetition_filter` masks."""
        if self.repetition_filter and self.repetition_filter.action == "replace":
            self.replaces, self.repetition_filter = self.repetition_filter, None
        self.examined = self.rejected = self.replaced = 0
        """Spans looked at, those of them that were not good, and sequences that were replaced, by
        this loader so far."""
        self._replaced: set[int] = set()
        """First positions of spans that were replaced, of those that nobody asked for yet."""
        self._logged: set[int] = set()
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        if not self.replaces:
            return super().fingerprint
        identity = f"{super().fingerprint} replaced by {MAX_ATTEMPTS} {self.replaces}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def rows(self, positions: np.ndarray) -> Rows:
        """The sequences at `positions`.

        Raises:
            UserError: no good sequence was found for a position.
        """
        numbers, span = self.windows(positions), self.source.span
        if span == 1 and (rows := self._good(numbers)):
            self._count(examined=len(numbers))
            return rows
        spans, inside = np.divmod(positions, span)
        found = {}
        for which in np.unique(spans).tolist():
            at = int(np.flatnonzero(spans == which)[0])
            found[which] = self._of_span(which, int(numbers[at]) // span)
        parts = [_row(found[s], i) for s, i in zip(spans.tolist(), inside.tolist(), strict=True)]
        return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _of_span(self, which: int, number: int) -> Rows:
        """The sequences of the span at positions which * span and on; those of `number` where
        they are good."""
        span = self.source.span
        errors: list[Exception] = []
        for attempt in range(MAX_ATTEMPTS + 1):
            if attempt:
                draw = int(keyed(self.seed, np.array([which]))[0])
                draw = int(keyed(draw, np.array([attempt]))[0])
                number = draw % (self.source.num_sequences // span)
            rows = self._good(np.arange(number * span, (number + 1) * span), errors)
            self._count(examined=1, rejected=rows is None)
            if rows:
                if attempt:
                    self._count(replaced=span)
                    with self._lock:
                        self._replaced.add(which * span)
                if errors:
                    self._log(which * span, errors[0])
                return rows
        raise UserError(
            f"position {which * span}: none of {MAX_ATTEMPTS} sequences drawn for it is good, "
            f"{self.rejected / self.examined:.0%} of those read so far are not"
            f"{f' (the last one: {errors[-1]})' if errors else ''}; repair the data, or relax "
            f"data.repetition_filter"
        )

    def replaced_among(self, positions: np.ndarray) -> int:
        """How many of these positions, which were read, got another sequence. What lies before
        them is forgotten."""
        span = self.source.span
        inside = set((np.asarray(positions) // span * span).tolist())
        with self._lock:
            self._replaced -= {at for at in self._replaced if at < min(inside, default=0)}
            return span * len(self._replaced & inside)

    def _good(self, numbers: np.ndarray, errors: list[Exception] | None = None) -> Rows | None:
        """The sequences of these numbers if all of them are good. What could not be read is put
        into `errors`."""
        try:
            rows = self.source.rows(numbers)
        except (UserError, OSError) as error:
            if not self.bad_data:
                raise
            if errors is not None:
                errors.append(error)
            return None
        config = self.replaces
        return None if config and is_repetitive(rows.tokens_BS, config).any() else rows

    def _count(self, examined: int = 0, rejected: int = 0, replaced: int = 0) -> None:
        with self._lock:
            self.examined += examined
            self.rejected += rejected
            self.replaced += replaced

    def _log(self, position: int, error: Exception) -> None:
        with self._lock:
            if position in self._logged or len(self._logged) > MAX_LOGGED:
                return
            self._logged.add(position)
            last = len(self._logged) > MAX_LOGGED
        if last:
            log.warning("more positions have bad data; they are not logged one by one")
        else:
            log.warning(
                "position %d of %s: another sequence is read in place of one that cannot be: %s",
                position,
                self.source.store.path,
                error,
            )


def _row(rows: Rows, index: int) -> Rows:
    """One of the rows."""
    ends = np.cumsum(rows.lengths_G)
    length = rows.tokens_BS.shape[1]
    first, last = np.searchsorted(ends, [index * length, (index + 1) * length], side="right")
    return Rows(
        rows.tokens_BS[index : index + 1], rows.lengths_G[first:last], rows.ids_G[first:last]
    )
