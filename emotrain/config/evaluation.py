"""Settings of the evaluation inside a training run."""

from __future__ import annotations

from dataclasses import dataclass

from emotrain.config.kinds import Names, NonNegativeInt, Paths, PathText, Shares


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out losses and tasks while training, on the run's own layout: of the full model, and of
    the experts that a domain's documents choose. Training itself stays what it is, to the bit."""

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
    pool_size: NonNegativeInt = 0
    """Size of the document pools, in routed experts, of one more held-out loss, beside that
    without pools; the published runs measured every 250 steps with pools of 32 of 127. 0: none."""
    tasks: Paths = ()
    """Files of questions or texts (docs/tasks.md) that are asked as well, such as
    `[capitals.jsonl]`."""
    shots: NonNegativeInt = 0
    """Examples with answers before each question of a task."""
    questions: NonNegativeInt = 0
    """Most questions of a task; 0 asks all."""
    answer_tokens: int = 50
    """Most tokens of a generated answer."""
    task_keep: Shares = ()
    """Shares of each layer's experts that tasks keep as well, each those that
    `calibration_documents` examples of its file choose; empty asks the full model alone."""
