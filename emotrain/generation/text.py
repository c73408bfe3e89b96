"""Text of tokens as they come: whole characters alone, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNKNOWN = "\ufffd"
"""What a decoder writes for bytes that are no character, or not one yet."""
WINDOW = 8
"""Tokens of the prompt that the first new one may lean on: more than a character has bytes."""


class Detokenizer:
    """Text that each further token adds. All pieces together are the text of all tokens.

    A token may hold a part of a character, or need the one before it (a space between words). So
    the tokens of the last piece are decoded again with the new ones, and what they add is the new
    piece. A character that is not whole yet waits for its other bytes.
    """

    def __init__(self, decode: Callable[[tuple[int, ...]], str], before: Sequence[int] = ()):
        """`before`: tokens that come before the first one, whose text is not given out."""
        self._decode = decode
        self._ids = tuple(before[-WINDOW:])
        self._old = len(self._ids)
        """Tokens of the window whose text has been given out."""
        text = decode(self._ids)
        self._sent = len(text) - text.endswith(UNKNOWN)
        """Characters of the window that have been."""

    def add(self, token: int) -> str:
        """Text that can be given out now."""
        self._ids += (token,)
        text = self._decode(self._ids)
        if text.endswith(UNKNOWN):
            # What comes before the last one no further byte can change.
            piece = text[self._sent : -1]
            self._sent += len(piece)
            return piece
        piece = text[self._sent :]
        # The new tokens stay: the next one may lean on them.
        self._ids = self._ids[self._old :]
        self._old = len(self._ids)
        self._sent = len(self._decode(self._ids))
        return piece

    def end(self) -> str:
        """The rest, when no token follows."""
        piece = self._decode(self._ids)[self._sent :]
        self._sent += len(piece)
        return piece


class StopScanner:
    """Holds back text that may become a stop string, and ends at the first that is whole."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """Text that can be given out now."""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def end(self) -> str:
        """The rest, when no text follows."""
        held, self._held = self._held, ""
        return held
