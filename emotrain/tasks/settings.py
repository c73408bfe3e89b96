"""What an evaluation on tasks measures."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from emotrain.errors import UserError

Normalisation = Literal["raw", "per_char", "unconditional"]
NORMALISATIONS: tuple[Normalisation, ...] = typing.get_args(Normalisation)
"""How the choices of a question are compared; `emotrain.tasks.metrics.choose`."""


@dataclass(frozen=True)
class TaskSettings:
    """What to measure."""

    shots: int = 0
    """Examples before each question."""
    shots_from: str = ""
    """File of the examples; empty takes those items of a task's file that are not asked."""
    split: str = "test"
    """Items that are asked. One without a split counts as `test`."""
    seed: int = 0
    """Of the order in which examples become shots and calibration, and of the first random
    subset."""
    limit: int = 0
    """Most questions of a task; 0 asks all."""
    normalisation: Normalisation = "raw"
    """The one whose accuracy is the headline; all are recorded."""
    answer_tokens: int = 50
    """Most tokens of a generated answer."""
    keep: tuple[float, ...] = ()
    """Shares of each layer's experts to keep, shared ones included; each task chooses its own by
    examples."""
    calibration_documents: int = 8
    """Examples of a task that choose its experts."""
    random_seeds: int = 1
    """Random subsets at each share below 1; 0 leaves the control out."""
    subsets: tuple[str, ...] = ()
    """Files of `emotrain select`."""

    def __post_init__(self) -> None:
        for name, least in (
            ("shots", 0),
            ("limit", 0),
            ("answer_tokens", 1),
            ("calibration_documents", 1),
            ("random_seeds", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"{name}={value} cannot be; give {least} or more")
        if self.normalisation not in NORMALISATIONS:
            raise UserError(
                f"normalisation={self.normalisation} is not known; choose one of "
                f"{', '.join(NORMALISATIONS)}"
            )
        if not self.split:
            raise UserError("split is empty; name the one that is asked, for example test")


def headline(kind: str, settings: TaskSettings) -> str:
    """The metric that stands for a task of a kind."""
    headlines = {
        "choice": f"accuracy_{settings.normalisation}",
        "generation": "f1",
        "text": "bits_per_byte",
    }
    return headlines[kind]
