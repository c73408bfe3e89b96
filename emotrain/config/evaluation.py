"""Settings of the evaluation inside a training run."""

from __future__ import annotations

from dataclasses import dataclass

from emotrain.config.kinds import Names, NonNegativeInt, PathText, Shares


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out losses while training, on the run's own layout: of the full model, and of the
    experts that a domain's documents choose. Training itself stays what it is, to the bit."""

    every: NonNegativeInt = 0
    """Steps between evaluations; the last step of a run has one too. 0: none."""
    data: PathText = ""
    """Folder written by `emotrain prepare`, whose valid split measures and whose train split
    chooses experts; empty means that of `data.path`."""
    domains: Names = ()
    """Domains to measure, such as `[code, law]`; empty means all that have enough documents."""
    documents: int = 32
    """Most held-out documents of a domain."""
    document_tokens: NonNegativeInt = 0
    """Tokens of a document that count, from its start; 0 means all."""
    calibration_documents: int = 8
    """Training documents of a domain that choose its experts."""
    keep: Shares = (0.25,)
    """Shares of each layer's experts that subsets keep, shared ones included, such as
    `[0.5, 0.25]`; empty measures the full model alone."""
