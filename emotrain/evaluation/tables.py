"""The numbers of an evaluation as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emotrain.tables import Table

ARM_NAMES = {"selected": "own choice", "random": "random", "cross_domain": "another domain's"}
"""What a reader calls the arms of a sweep."""


def mean_table(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Mean loss increase over domains, one line a model and share of experts kept.

    Args:
        evaluations: (label, result of `sweep`); one evaluation needs no label.
    """
    several = len(evaluations) > 1
    rows = []
    for label, result in evaluations:
        mean = result["mean"]
        for keep in mean["increase_nats"]:
            cells = [
                plus_minus(mean["increase_nats"][keep][arm], mean["standard_error_nats"][keep][arm])
                for arm in ARM_NAMES
            ]
            loss = f"{mean['subset_loss_nats'][keep]['selected']:.3f}"
            rows.append((*([label] if several else []), kept_label(result, keep), loss, *cells))
    header = (*(["model"] if several else []), "experts kept", "loss", *ARM_NAMES.values())
    return Table(
        "Loss with the experts a domain chose itself, and its increase over the full model by who "
        "chose them, in nats/token; "
        "mean over domains, unweighted; ± standard error over documents",
        header,
        tuple(rows),
        names=1 + several,
    )


def domain_table(result: Mapping[str, Any]) -> Table:
    """Each domain's full loss, and the increase with the experts it chose itself."""
    keeps = [keep for keep in result["mean"]["increase_nats"] if not keeps_everything(result, keep)]
    rows = tuple(
        (
            name,
            str(domain["documents"]),
            f"{domain['loss_nats']:.3f}",
            *(
                plus_minus(
                    domain["increase_nats"][keep]["selected"],
                    domain["standard_error_nats"][keep]["selected"],
                )
                for keep in keeps
            ),
        )
        for name, domain in result["domains"].items()
    )
    header = (
        "domain",
        "docs",
        "full loss",
        *(f"+ with {kept_label(result, keep)}" for keep in keeps),
    )
    return Table(
        "Each domain with the experts it chose, in nats/token; ± standard error over documents",
        header,
        rows,
    )


def routing_table(result: Mapping[str, Any]) -> Table:
    """Per layer with routed experts: likeness of the domains' routing, and the spread of one
    document."""
    routing = result["routing"]
    effective = routing["effective_experts_per_layer"]
    cosines = routing["domain_cosine_per_layer"] or [None] * len(effective)
    rows = [
        (str(layer), plain(cosine, 3), plain(experts, 1))
        for layer, (cosine, experts) in enumerate(zip(cosines, effective, strict=True), 1)
    ]
    rows.append(
        ("mean", plain(routing["domain_cosine"], 3), plain(routing["effective_experts"], 1))
    )
    return Table(
        "Routing: mean cosine between two domains (1: they use the same experts), and effective "
        "experts of one document "
        "(exp of the entropy of its mean routing)",
        ("MoE layer", "cosine of domains", "effective experts"),
        tuple(rows),
    )


def keeps_everything(result: Mapping[str, Any], keep: str) -> bool:
    """Whether a share leaves no expert out in any layer."""
    return result["experts"]["kept_per_layer"][keep] == result["experts"]["per_layer"]


def kept_label(result: Mapping[str, Any], keep: str) -> str:
    """`8 of 32`, or the share where layers differ in size."""
    kept, of = set(result["experts"]["kept_per_layer"][keep]), set(result["experts"]["per_layer"])
    return (
        f"{kept.pop()} of {of.pop()}"
        if len(kept) == len(of) == 1
        else f"{float(keep):.3g} of each layer"
    )


def plus_minus(increase: float | None, error: float | None) -> str:
    """`+0.012 ± 0.003`; a dash where an arm has no runs."""
    return "–" if increase is None or error is None else f"{increase:+.3f} ± {error:.3f}"


def plain(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
