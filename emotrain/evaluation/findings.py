"""What an evaluation says, in plain sentences: from its numbers alone, whichever way they point."""

from __future__ import annotations

import math
from collections.abc import Iterator

from emotrain.evaluation.results import Arm, Measurement

NOISE = 2.0
"""An effect counts as seen when it is this many standard errors from zero."""

CONTROLS: tuple[tuple[Arm, str, str, str], ...] = (
    (
        "random",
        "experts drawn at random",
        "so it matters which experts stay",
        "it does not matter which experts stay",
    ),
    (
        "cross_domain",
        "experts chosen by another domain",
        "so the subsets are special to their domains",
        "the subsets are not special to their domains",
    ),
)
"""Arm, what it keeps, and what follows where it is worse than the domain's own choice, and where
it is not."""


def findings(result: Measurement) -> list[str]:
    """One sentence a finding."""
    return list(_findings(result))


def _findings(result: Measurement) -> Iterator[str]:
    keeps = [keep for keep in result.smaller_keeps if result.mean.increase(keep, "selected")]
    for keep in keeps:
        yield _subset_sentence(result, keep)
    for keep in keeps[-1:]:
        for arm, kept, if_worse, if_equal in CONTROLS:
            if result.mean.increase(keep, arm):
                yield _control_sentence(result, keep, arm, kept, if_worse, if_equal)
        costs = {name: domain.increase(keep, "selected") for name, domain in result.domains.items()}
        cost = {name: increase[0] for name, increase in costs.items() if increase}
        if len(cost) > 1:
            yield _extremes_sentence(cost, result.experts.label(keep))
    cosine, effective = result.routing.domain_cosine, result.routing.effective_experts
    if cosine is not None and effective is not None:
        yield (
            f"The mean routing of two domains has a cosine of {cosine:.2f} on average (1 would "
            f"mean that they use the same experts), and one document spreads over {effective:.1f} "
            f"experts of a layer."
        )


def _subset_sentence(result: Measurement, keep: str) -> str:
    increase, error = _increase(result, keep, "selected")
    base = (
        f"With {result.experts.label(keep)} experts, chosen by "
        f"{result.settings.calibration_documents} of its documents, a domain's loss"
    )
    if abs(increase) <= NOISE * error:
        return (
            f"{base} stays what it was on average: the change of {increase:+.3f} nats/token is "
            f"within {NOISE:g} standard errors."
        )
    # A model that has diverged has losses whose exponential is no float any more.
    times = f"{math.exp(increase):.2f}" if increase < 20 else "more than 100 million"
    return (
        f"{base} {'rises' if increase > 0 else 'falls'} by {abs(increase):.3f} nats/token on "
        f"average: the perplexity is {times} times that of the full model."
    )


def _control_sentence(
    result: Measurement, keep: str, arm: Arm, kept: str, if_worse: str, if_equal: str
) -> str:
    (own, own_error), (other, other_error) = (
        _increase(result, keep, which) for which in ("selected", arm)
    )
    # The arms share documents, so the error of their difference is at most the sum of their errors.
    margin = NOISE * (own_error + other_error)
    if other - own > margin:
        verdict = if_worse
    elif own - other > margin:
        verdict = "less than with its own choice: the selection does harm here"
    else:
        verdict = f"no clear difference: {if_equal}, and the model is not modular by this measure"
    return (
        f"With {result.experts.label(keep)} {kept} the change is {other:+.3f} instead of "
        f"{own:+.3f} nats/token, {verdict}."
    )


def _extremes_sentence(cost: dict[str, float], experts: str) -> str:
    best, worst = min(cost, key=cost.__getitem__), max(cost, key=cost.__getitem__)
    return (
        f"{experts} experts serve {best} best ({cost[best]:+.3f} nats/token) and {worst} worst "
        f"({cost[worst]:+.3f})."
    )


def _increase(result: Measurement, keep: str, arm: Arm) -> tuple[float, float]:
    increase = result.mean.increase(keep, arm)
    assert increase is not None, f"{arm} has no runs"
    return increase
