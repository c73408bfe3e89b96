"""A task as a subject of a sweep: its questions are the items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emotrain.data.tokenizer import TextTokenizer
from emotrain.modular.select import Subsets
from emotrain.sweeps.plan import ALL, Plan
from emotrain.sweeps.subjects import Subject, Text
from emotrain.tasks.arms import Arm
from emotrain.tasks.evaluation import ask, questions_of
from emotrain.tasks.prompts import Task, read_tasks
from emotrain.tasks.results import Answer
from emotrain.tasks.scoring import encode_texts
from emotrain.tasks.session import Session
from emotrain.tasks.settings import TaskSettings, headline


@dataclass
class TaskSubject(Subject):
    """The headline metric of a task. `name` is its file."""

    tokenizer: TextTokenizer | None = None

    def calibration(self, size: int, seed: int) -> Text:
        if size == ALL:
            texts = self._task.calibration()
        else:
            texts = self._task.calibration(size * (seed + 1))[:size]
        ids = encode_texts(self._session.tokenizer, texts)
        return [np.array(one, dtype=np.uint32) for one in ids]

    def run(self, subsets: Sequence[Subsets | None]) -> list[tuple[str, list[float], list[float]]]:
        task, session, settings = self._task, self._session, settings_of(self.plan)
        questions = questions_of(task, 0, session.tokenizer, session.most_tokens, settings)
        metric = headline(task.kind, settings)
        results = []
        for kept in subsets:
            arm = Arm("", "all" if kept is None else "task", masks=kept)
            answers = ask(session, [task], questions, arm, settings)
            items = [_item(answer, metric) for answer in answers]
            results.append((metric, [amount for amount, _ in items], [size for _, size in items]))
        return results

    @property
    def _task(self) -> Task:
        return tasks_of(self.plan)[self.plan.tasks.index(self.name)]

    @property
    def _session(self) -> Session:
        assert self.tokenizer is not None
        return Session(self.model, self.tokenizer, self.config, self.rows, self.precision)


def settings_of(plan: Plan) -> TaskSettings:
    """How a plan asks the questions of its tasks."""
    return TaskSettings(shots=plan.shots, limit=plan.questions)


def tasks_of(plan: Plan) -> list[Task]:
    """The tasks of a plan, in its order. Raises: UserError, see `read_tasks`."""
    return read_tasks(plan.tasks, settings_of(plan))


def _item(answer: Answer, metric: str) -> tuple[float, float]:
    """Amount and size of a question."""
    if not answer.is_finite:
        return math.nan, 1.0
    if metric == "bits_per_byte":
        return answer.gold_nats / math.log(2), float(answer.gold_bytes)
    return answer.scores[metric], 1.0
