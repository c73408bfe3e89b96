"""The numbers of an evaluation as tables."""

from __future__ import annotations

from collections.abc import Sequence

from emotrain.evaluation.results import ARMS, Arm, Measurement
from emotrain.tables import Table, csv_text

ARM_NAMES: dict[Arm, str] = {
    "selected": "own choice",
    "random": "random",
    "cross_domain": "another domain's",
}
"""What a reader calls the arms of an evaluation."""


def tables(result: Measurement) -> list[Table]:
    """All that is shown of one evaluation; what sums it up comes last."""
    return [domain_table(result), routing_table(result), mean_table([("", result)])]


def mean_table(evaluations: Sequence[tuple[str, Measurement]]) -> Table:
    """Mean loss increase over domains, one line a model and share of experts kept.

    Args:
        evaluations: (label, result of `measure`); one evaluation needs no label.
    """
    several = len(evaluations) > 1
    rows = [
        (
            *([label] if several else []),
            result.experts.label(keep),
            plain(result.mean.subset_loss_nats[keep].selected, 3),
            *(plus_minus(result.mean.increase(keep, arm)) for arm in ARM_NAMES),
        )
        for label, result in evaluations
        for keep in result.keeps
    ]
    header = (*(["model"] if several else []), "experts kept", "loss", *ARM_NAMES.values())
    fewer = sorted({result.settings.control_documents for _, result in evaluations} - {0})
    controls = f" (of controls the first {' or '.join(map(str, fewer))} a domain)" if fewer else ""
    return Table(
        "Loss with the experts a domain chose itself, and its increase over the full model by who "
        "chose them, in nats/token; "
        f"mean over domains, unweighted; ± standard error over documents{controls}",
        header,
        tuple(rows),
        names=1 + several,
    )


def domain_table(result: Measurement) -> Table:
    """Each domain's full loss, and the increase with the experts it chose itself."""
    keeps = result.smaller_keeps
    rows = tuple(
        (
            name,
            str(domain.documents),
            plain(domain.loss_nats, 3),
            *(plus_minus(domain.increase(keep, "selected")) for keep in keeps),
        )
        for name, domain in result.domains.items()
    )
    return Table(
        "Each domain with the experts it chose, in nats/token; ± standard error over documents",
        (
            "domain",
            "docs",
            "full loss",
            *(f"+ with {result.experts.label(keep)}" for keep in keeps),
        ),
        rows,
    )


def routing_table(result: Measurement) -> Table:
    """Per layer with routed experts: likeness of the domains' routing, and the spread of one
    document."""
    routing = result.routing
    effective = routing.effective_experts_per_layer
    cosines = routing.domain_cosine_per_layer or [None] * len(effective)
    rows = [
        (str(layer), plain(cosine, 3), plain(experts, 1))
        for layer, (cosine, experts) in enumerate(zip(cosines, effective, strict=True), 1)
    ]
    rows.append(("mean", plain(routing.domain_cosine, 3), plain(routing.effective_experts, 1)))
    return Table(
        "Routing: mean cosine between two domains (1: they use the same experts), and effective "
        "experts of one document "
        "(exp of the entropy of its mean routing)",
        ("MoE layer", "cosine of domains", "effective experts"),
        tuple(rows),
    )


def subset_csv(evaluations: Sequence[tuple[str, Measurement]]) -> str:
    """The numbers of `subset_figure`: a row a model, domain (empty: the mean over domains), share
    of experts kept and arm; losses in nats/token."""
    header = (
        "model", "domain", "share_kept", "experts_kept", "arm",
        "loss_nats", "increase_nats", "standard_error_nats",
    )  # fmt: skip
    rows = [
        (
            *(label, domain, keep, result.experts.label(keep), arm),
            getattr(losses.subset_loss_nats[keep], arm),
            *(losses.increase(keep, arm) or (None, None)),
        )
        for label, result in evaluations
        for domain, losses in {"": result.mean, **result.domains}.items()
        for keep in result.keeps
        for arm in ARMS
    ]
    return csv_text(header, (row for row in rows if row[5] is not None))


def plus_minus(increase: tuple[float, float] | None) -> str:
    """`+0.012 ± 0.003`; a dash where there is none."""
    return "–" if increase is None else f"{increase[0]:+.3f} ± {increase[1]:.3f}"


def plain(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
