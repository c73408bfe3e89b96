"""Keys and values of the tokens that a model has read, in pages, for many sequences at once.

A page holds PAGE tokens of one sequence, in every layer. A sequence takes pages as it grows and
gives them back when it ends, in any order: what is left can always be used. Admission counts in
advance: a sequence is promised the pages that its longest form needs, so that no running sequence
ever waits for memory.
"""

from __future__ import annotations

import torch

from emotrain.config import ModelConfig
from emotrain.errors import UserError

PAGE = 32
"""Tokens of a page: a sequence wastes half of one on average."""
FIRST_PAGES = 16
"""Pages that memory is taken for at the start; their number doubles when they are used up."""


def pages_of(num_tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-num_tokens // PAGE)


class KVCache:
    """Pages of keys and values, up to a limit.

    `layers[l]` is [X, PAGE, A, C]: X pages; of a token the heads of keys, then those of values.
    """

    def __init__(
        self,
        config: ModelConfig,
        limit_tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """
        Args:
            limit_tokens: most tokens of all sequences together, rounded down to whole pages.
        Raises:
            UserError: less than a page.
        """
        self.limit_pages = limit_tokens // PAGE
        if self.limit_pages < 1:
            raise UserError(
                f"a cache of {limit_tokens} tokens holds none of its pages of {PAGE}; give at "
                f"least {PAGE}"
            )
        heads = 2 * config.kv_heads
        first = min(FIRST_PAGES, self.limit_pages)
        self.layers = [
            torch.zeros(first, PAGE, heads, config.head_dim, device=device, dtype=dtype)
            for _ in range(config.num_layers)
        ]
        self._free = list(reversed(range(first)))
        self._promised = 0

    @property
    def pages_in_use(self) -> int:
        return self.layers[0].shape[0] - len(self._free)

    @property
    def promised_pages(self) -> int:
        """Pages that the running sequences may still grow to."""
        return self._promised

    def promise(self, num_tokens: int) -> bool:
        """Promise a sequence that it may grow to so many tokens; False where others hold too
        much."""
        if self._promised + pages_of(num_tokens) > self.limit_pages:
            return False
        self._promised += pages_of(num_tokens)
        return True

    def extend(self, pages: list[int], num_tokens: int) -> None:
        """Give a sequence pages until they hold `num_tokens` tokens; `pages`, those it has, grows.
        The promise covers them."""
        for _ in range(pages_of(num_tokens) - len(pages)):
            if not self._free:
                self._grow()
            pages.append(self._free.pop())

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy pages to others, each to the one at its place."""
        device = self.layers[0].device
        from_X, to_X = torch.tensor([sources, targets], device=device)
        for layer in self.layers:
            layer[to_X] = layer[from_X]

    def release(self, pages: list[int], num_tokens: int) -> None:
        """Take back the pages of a sequence and what it was promised."""
        self._promised -= pages_of(num_tokens)
        self._free += reversed(pages)
        pages.clear()

    def _grow(self) -> None:
        old = self.layers[0].shape[0]
        new = min(2 * old, self.limit_pages)
        assert new > old, "a promise covers every page"
        for index, layer in enumerate(self.layers):
            larger = layer.new_zeros(new, *layer.shape[1:])
            larger[:old] = layer
            self.layers[index] = larger
        self._free += reversed(range(old, new))
