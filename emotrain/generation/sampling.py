"""The next token of each sequence: greedy, or drawn by temperature, top-k and top-p; and the log
probabilities of tokens.

A draw is a pure function of the seed, the position and the logits of its own sequence. What else is
in the batch has no part in it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emotrain.errors import UserError

MOST_LOGPROBS = 100
"""Alternatives of a token whose log probabilities can be asked for."""
MOST_STOPS = 16
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How a sequence goes on, and when it ends."""

    max_tokens: int = 128
    """Most tokens to generate; 0 reads the prompt alone."""
    temperature: float = 0.0
    """Logits are divided by it; 0 is greedy: always the most likely token, of equals the lowest
    id."""
    top_k: int = 0
    """Draw among so many most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that have this probability together, at least one.
    After `top_k`."""
    seed: int = 0
    """Of the draws; any integer."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of its text."""
    ignore_end: bool = False
    """Whether the end-of-document token is a token like any other."""
    logprobs: int | None = None
    """Log probabilities of the tokens, and of so many alternatives each; None for none."""
    prompt_logprobs: bool = False
    """Whether also those of the prompt's tokens (`logprobs` says how many)."""

    def __post_init__(self) -> None:
        for name, value, good, rule in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 0, "0 or more"),
            (
                "temperature",
                self.temperature,
                0 <= self.temperature < math.inf,
                "0 for greedy, or a number above it",
            ),
            ("top_k", self.top_k, self.top_k >= 0, "0 for all tokens, or a number of them"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a probability above 0 and up to 1"),
            (
                "stop",
                len(self.stop),
                len(self.stop) <= MOST_STOPS and all(self.stop),
                f"at most {MOST_STOPS} texts, none of them empty",
            ),
            (
                "logprobs",
                self.logprobs,
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"0 to {MOST_LOGPROBS}",
            ),
        ):
            if not good:
                raise UserError(f"{name}={value} cannot be; give {rule}")


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, in nats, before temperature, top-k and top-p."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens, best first. A token is the greedy one where its `logprob` is the very
    float of the first: both come from one row of numbers."""


def draw(seed: int, position: int) -> float:
    """Uniform in [0, 1), of the seed and the position of the token: two rounds of splitmix64."""
    return (_mix(_mix(seed & MASK) + position & MASK) >> 11) * 2.0**-53


def _mix(key: int) -> int:
    key = (key + 0x9E3779B97F4A7C15) & MASK
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & MASK
    return key ^ (key >> 31)


def choose_tokens(
    logits_BV: Tensor, sampling: Sequence[Sampling], positions: Sequence[int]
) -> list[int]:
    """The next token of each sequence.

    Args:
        logits_BV: of the tokens that may be chosen.
        positions: of the token to be chosen, in its sequence.
    """
    if not any(one.temperature for one in sampling):
        return logits_BV.argmax(dim=1).tolist()
    chosen = [0] * len(sampling)
    groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for index, one in enumerate(sampling):
        # Rows of a group have candidates of one number: how many changes how sums are rounded.
        most = min(one.top_k or logits_BV.shape[1], logits_BV.shape[1])
        ordered = bool(one.top_k) or one.top_p < 1
        groups[(ordered, most) if one.temperature else (False, 0)].append(index)
    for (ordered, most), rows in groups.items():
        of_group = logits_BV[rows]
        if most == 0:
            found = of_group.argmax(dim=1).tolist()
        else:
            of_rows = [sampling[row] for row in rows]
            uniform = [draw(sampling[row].seed, positions[row]) for row in rows]
            found = _drawn(of_group, of_rows, uniform, most if ordered else 0)
        for row, token in zip(rows, found, strict=True):
            chosen[row] = token
    return chosen


def _drawn(
    logits_BV: Tensor, sampling: Sequence[Sampling], uniform: Sequence[float], most: int
) -> list[int]:
    """Tokens drawn by inverse distribution function, among the `most` likeliest in their order, or
    among all in the order of ids (0)."""
    ids_BX = None
    wide_BX = logits_BV.double()
    if most == logits_BV.shape[1]:
        wide_BX, ids_BX = torch.sort(wide_BX, dim=1, descending=True, stable=True)
    elif most:
        wide_BX, ids_BX = torch.topk(wide_BX, most, dim=1)
    temperature_B1 = wide_BX.new_tensor([one.temperature for one in sampling])[:, None]
    p_BX = torch.softmax(wide_BX / temperature_B1, dim=1)
    if ids_BX is not None:
        before_BX = p_BX.cumsum(dim=1) - p_BX
        top_p_B1 = wide_BX.new_tensor([one.top_p for one in sampling])[:, None]
        # The first token is always one, also where rounding says that more came before it.
        outside_BX = before_BX >= top_p_B1
        outside_BX[:, 0] = False
        p_BX = p_BX.masked_fill(outside_BX & (top_p_B1 < 1), 0)
    sums_BX = p_BX.cumsum(dim=1)
    target_B1 = sums_BX.new_tensor(uniform)[:, None] * sums_BX[:, -1:]
    at_B1 = torch.searchsorted(sums_BX, target_B1, right=True)
    # Rounding may put the target on the last sum, behind which nothing is.
    last_B1 = (p_BX > 0).cumsum(dim=1).argmax(dim=1, keepdim=True)
    at_B1 = torch.minimum(at_B1, last_B1)
    found_B1 = at_B1 if ids_BX is None else ids_BX.gather(1, at_B1)
    return found_B1[:, 0].tolist()


def log_probabilities(
    logits_XV: Tensor, tokens: Sequence[int], num_top: int, num_tokens: int
) -> list[TokenLogprob]:
    """How likely each token was, by the logits of the position before it, and the likeliest ones.

    Args:
        num_top: alternatives to name; at least the likeliest is named.
        num_tokens: ids from here on are no tokens, and not named.
    """
    logprobs_XV = torch.log_softmax(logits_XV.float(), dim=1)
    most = min(max(num_top, 1), num_tokens)
    top_XY, ids_XY = logprobs_XV[:, :num_tokens].topk(most, dim=1)
    token_X1 = torch.tensor(tokens, device=logits_XV.device)[:, None]
    own_X1 = logprobs_XV.gather(1, token_X1)
    # One wait for the device; float64 holds both.
    found = torch.cat([own_X1.double(), top_XY.double(), ids_XY.double()], dim=1).tolist()
    return [
        TokenLogprob(token, own, tuple(zip(map(int, row[most:]), row[:most], strict=True)))
        for token, (own, *row) in zip(tokens, found, strict=True)
    ]
