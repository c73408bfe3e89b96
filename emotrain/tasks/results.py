"""What an evaluation on tasks finds. `tasks.json` is its JSON form: a key for each field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emotrain.modular.artefact import Calibration
from emotrain.tasks.items import Kind
from emotrain.tasks.metrics import bits_per_byte, mean_and_error
from emotrain.tasks.settings import NORMALISATIONS, TaskSettings

FORMAT = 1

ACCURACIES = tuple(f"accuracy_{name}" for name in NORMALISATIONS)
METRICS: dict[Kind, tuple[str, ...]] = {
    "choice": (*ACCURACIES, "bits_per_byte"),
    "generation": ("exact_match", "f1", "bits_per_byte"),
    "text": ("bits_per_byte",),
}
"""Of each kind of task. All but bits are shares of the questions, 0 to 1."""


@dataclass(frozen=True)
class Number:
    value: float
    standard_error: float | None
    """Over questions; None with a single one."""


@dataclass(frozen=True)
class Answer:
    """What a question came to with some experts: a line of `questions.jsonl`."""

    task: str
    experts: str
    line: int
    """In the task's file."""
    scores: dict[str, float]
    """By metric, without `bits_per_byte`."""
    gold_nats: float
    """Negative log probability of the gold answer, or of the text."""
    gold_bytes: int
    """Of what these nats are the probability: with the space before an answer."""
    cut: bool
    """Whether the start of its prompt did not fit."""
    details: dict[str, Any]
    """Choices: `gold`, `chosen`, `logprobs_nats`, `unconditional_logprobs_nats`. Generation:
    `answer`."""

    @property
    def is_finite(self) -> bool:
        of_choices = [
            number
            for name in ("logprobs_nats", "unconditional_logprobs_nats")
            for number in self.details.get(name, ())
        ]
        return all(map(math.isfinite, (self.gold_nats, *of_choices)))

    def to_json(self) -> dict[str, Any]:
        """A flat object."""
        values = dataclasses.asdict(self)
        scores, details = values.pop("scores"), values.pop("details")
        return {**values, **scores, **details}


@dataclass(frozen=True)
class TaskInfo:
    """A task, and what was asked of it."""

    name: str
    kind: Kind
    file: str
    fingerprint: str
    """sha256 of the file."""
    split: str
    questions: int
    """That were asked."""
    available: int
    """Questions of the split: more than `questions` where --limit cut them."""
    shots: int
    examples: int
    examples_from: str
    cut_prompts: int
    """Questions whose examples did not all fit."""
    headline: str
    """The metric that stands for the task."""
    calibration: Calibration | None
    """The examples that chose its experts."""


@dataclass(frozen=True)
class Score:
    """A task with some experts."""

    task: str
    experts: str
    questions: int
    metrics: dict[str, Number]
    """Empty where the model's numbers are not finite."""
    experts_kept_per_layer: tuple[tuple[int, ...], ...] | None
    """None for all."""


@dataclass(frozen=True)
class ArmInfo:
    """Who chose the experts."""

    name: str
    chosen_by: str
    """`all`, `file`, `task` (its own examples) or `random`."""
    keep: float | None
    seed: int | None
    file: str
    file_fingerprint: str
    kept: str
    """Experts that layers keep, shared ones counted: `8 of 32`."""


@dataclass(frozen=True)
class Mean:
    """Over tasks, each with the same weight."""

    experts: str
    metric: str
    value: float
    standard_error: float | None
    tasks: int


@dataclass(frozen=True)
class TaskEvaluation:
    """All that was found."""

    checkpoint: str
    checkpoint_fingerprint: str
    step: int
    tokenizer_fingerprint: str
    sequence_length: int
    settings: TaskSettings
    tasks: tuple[TaskInfo, ...]
    arms: tuple[ArmInfo, ...]
    scores: tuple[Score, ...]
    answers: tuple[Answer, ...] = dataclasses.field(repr=False)

    @property
    def incomplete(self) -> list[str]:
        """Why there is no mean over tasks; nothing where there is one."""
        cut = [
            f"{task.name} has {task.questions} of {task.available} questions (--limit)"
            for task in self.tasks
            if task.questions < task.available
        ]
        failed = [
            f"{score.task} with {score.experts} gave numbers that are not finite"
            for score in self.scores
            if not score.metrics
        ]
        return cut + failed

    @property
    def means(self) -> list[Mean]:
        """Of several tasks, where all of them are complete."""
        if len(self.tasks) < 2 or self.incomplete:
            return []
        wanted = dict.fromkeys(task.headline for task in self.tasks) | {"bits_per_byte": None}
        return [self._mean(arm.name, metric) for arm in self.arms for metric in wanted]

    def _mean(self, experts: str, metric: str) -> Mean:
        found = [
            score.metrics[metric]
            for score in self.scores
            if score.experts == experts and metric in score.metrics
        ]
        errors = [number.standard_error for number in found]
        # Tasks have different questions, so that their errors are independent.
        error = (
            None
            if None in errors
            else math.sqrt(math.fsum(e * e for e in errors if e is not None)) / len(found)
        )
        value = math.fsum(number.value for number in found) / len(found)
        return Mean(experts, metric, value, error, len(found))

    def score(self, task: str, experts: str) -> Score:
        return next(s for s in self.scores if (s.task, s.experts) == (task, experts))

    def to_json(self) -> dict[str, Any]:
        """For `emotrain.files.json_text`; answers have a file of their own."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "answers"
        }
        plain = {
            name: [dataclasses.asdict(one) for one in value] if isinstance(value, tuple) else value
            for name, value in values.items()
        }
        return {
            "format": FORMAT,
            **plain,
            "settings": dataclasses.asdict(self.settings),
            "mean": [dataclasses.asdict(mean) for mean in self.means],
            "mean_refused": "; ".join(self.incomplete) or None,
        }


def numbers_of(kind: Kind, answers: Sequence[Answer]) -> dict[str, Number]:
    """The metrics of a task; none where a log probability is not finite."""
    if not all(answer.is_finite for answer in answers):
        return {}
    found = {
        metric: Number(*mean_and_error([answer.scores[metric] for answer in answers]))
        for metric in METRICS[kind]
        if metric != "bits_per_byte"
    }
    nats = [answer.gold_nats for answer in answers]
    sizes = [answer.gold_bytes for answer in answers]
    return {**found, "bits_per_byte": Number(*bits_per_byte(nats, sizes))}
