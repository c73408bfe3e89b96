"""What an evaluation of expert subsets measures."""

from __future__ import annotations

from dataclasses import dataclass

from emotrain.errors import UserError


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure."""

    keep: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    """Shares of each layer's experts to keep, shared ones included."""
    calibration_documents: int = 8
    """Training documents of a domain that choose its experts."""
    documents: int = 64
    """Most held-out documents of a domain."""
    control_documents: int = 0
    """Held-out documents of a domain, the first ones, that the controls `random` and `cross_domain`
    are measured on: fewer cost less and have larger errors. 0: all that the loss is measured on."""
    document_tokens: int = 0
    """Tokens of a document that count, from its start; 0 means all. Documents, not tokens, are the
    independent draws: shorter ones cost little certainty and save time."""
    domains: tuple[str, ...] = ()
    """Names of the domains to measure; none means all of the data's."""
    seed: int = 0
    """Seed of the first random subset."""
    random_seeds: int = 1
    """Random subsets at each share; their losses are averaged. 0 leaves the control out."""
    cross_domain: str = "next"
    """Whose experts the cross-domain control uses: of the `next` domain by name, or of `all`
    others in turn (averaged)."""

    def __post_init__(self) -> None:
        if not self.keep:
            raise UserError("keep is empty; give at least one share of experts, for example 0.25")
        if self.calibration_documents < 1:
            raise UserError(
                f"calibration_documents={self.calibration_documents} leaves nothing to choose "
                f"experts by; give at least 1"
            )
        if self.documents < 2:
            raise UserError(
                f"documents={self.documents} gives no standard error; give at least 2 a domain"
            )
        if self.control_documents < 0 or self.control_documents == 1:
            raise UserError(
                f"control_documents={self.control_documents} gives no standard error; give at "
                f"least 2 a domain, or 0 for all"
            )
        if self.document_tokens < 0 or self.document_tokens == 1:
            raise UserError(
                f"document_tokens={self.document_tokens} leaves nothing to predict; give at least "
                f"2, or 0 for whole documents"
            )
        if self.random_seeds < 0:
            raise UserError(
                f"random_seeds={self.random_seeds} must be at least 0; 0 leaves the random control "
                f"out"
            )
        if self.cross_domain not in ("next", "all"):
            raise UserError(
                f"cross_domain={self.cross_domain} is not known; choose one of next, all"
            )
