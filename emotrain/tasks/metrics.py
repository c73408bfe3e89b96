"""Numbers of one question, and of many."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from emotrain.evaluation.measure import mean_increase
from emotrain.tasks.settings import Normalisation

PUNCTUATION = str.maketrans("", "", string.punctuation)


def choose(
    logprobs: Sequence[float], choices: Sequence[str], unconditional: Sequence[float]
) -> dict[Normalisation, int]:
    """The choice that each normalisation takes: the highest score, of equals the first.

        raw            log p(choice | context)
        per_char       the same divided by the characters of the choice
        unconditional  log p(choice | context) - log p(choice | "Answer:")

    Args:
        logprobs: of each choice after its context, in nats.
        choices: without the space that stands before them.
        unconditional: log probability of each choice after "Answer:" alone.
    """
    given = np.array(logprobs)
    characters = np.array([float(len(choice)) for choice in choices])
    scores: dict[Normalisation, np.ndarray] = {
        "raw": given,
        "per_char": given / characters,
        "unconditional": given - np.array(unconditional),
    }
    return {name: int(np.argmax(score)) for name, score in scores.items()}


def normalised(answer: str) -> str:
    """As the SQuAD benchmark compares answers: small letters, no ASCII punctuation, no English
    articles, single spaces."""
    plain = answer.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 where an answer is one of the accepted, both normalised, else 0."""
    return float(normalised(answer) in set(map(normalised, accepted)))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, both normalised; of the accepted answers
    that which fits best."""
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in accepted)


def _f1(words: Sequence[str], accepted: Sequence[str]) -> float:
    if not words or not accepted:
        return float(words == accepted)
    common = sum((Counter(words) & Counter(accepted)).values())
    return 2 * common / (len(words) + len(accepted))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over questions, and its standard error; None with a single question."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))


def bits_per_byte(nats: Sequence[float], sizes: Sequence[int]) -> tuple[float, float | None]:
    """Bits that a byte of text takes, and the standard error.

    All bits over all bytes: a ratio of two sums over texts, whose error follows from the texts'
    residuals.

    Args:
        nats: the negative log probability of each text.
        sizes: its bytes in UTF-8.
    """
    size_U = torch.tensor(sizes)
    bits_U = torch.tensor(nats, dtype=torch.float64) / math.log(2)
    ratio_J, error_J = mean_increase(bits_U, size_U, torch.zeros_like(size_U))
    return float(ratio_J), float(error_J) if len(sizes) > 1 else None
