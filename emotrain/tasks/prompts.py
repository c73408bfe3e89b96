"""What a model is shown: examples with their answers, then the question.

Question: 1 + 1 = ?
Answer: 2

Question: 2 + 2 = ?
Answer:
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emotrain.data.answers import spaced
from emotrain.errors import UserError
from emotrain.tasks.items import Item, Kind, TaskFile, in_order, read_file
from emotrain.tasks.settings import TaskSettings

BETWEEN = "\n\n"
"""Between an example and what follows."""


@dataclass(frozen=True)
class Task:
    """The questions of a file, and examples for them."""

    file: TaskFile
    questions: tuple[Item, ...]
    """Those that are asked."""
    available: int
    """How many could be: more where a limit cut them."""
    examples: tuple[Item, ...]
    """In the order of the seed. Shots come from the start, calibration from the end."""
    examples_from: Path
    num_shots: int

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def kind(self) -> Kind:
        return self.file.kind

    def prompt(self, item: Item) -> str:
        """Examples and the question, up to where the answer begins.

        Raises:
            UserError: too few examples.
        """
        if not self.num_shots:
            return item.prompt
        fitting = [
            example
            for example in self.examples
            if example.asks != item.asks
            # Without a subject, an example or a question goes with every one.
            and (example.subject == item.subject or not (example.subject and item.subject))
        ]
        if len(fitting) < self.num_shots:
            of_subject = f" of subject {item.subject!r}" if item.subject else ""
            raise UserError(
                f"{self.examples_from}: has {len(fitting)} examples{of_subject} for "
                f"{self.file.path}, line {item.line}, --shots is {self.num_shots}; lower it, or "
                f"give more of them another `split` than the questions or with --shots-from FILE"
            )
        shown = [spaced(shot.prompt, shot.answer) for shot in fitting[: self.num_shots]]
        return BETWEEN.join([*shown, item.prompt])

    def calibration(self, count: int = 0) -> list[str]:
        """Examples as the paper shows them to choose experts by (spec 7.2): their shots, the
        question and its answer. None of them is asked. `count` of them, 0 for all.

        Raises:
            UserError: fewer than `count`.
        """
        asked = {item.asks for item in self.file.items if item.split == self.questions[0].split}
        unasked = [example for example in self.examples if example.asks not in asked]
        count = count or max(1, len(unasked))
        if len(unasked) < count:
            raise UserError(
                f"{self.examples_from}: has {len(unasked)} examples that are not asked, {count} "
                f"are needed to choose the experts of {self.name}; lower --calibration-documents, "
                f"or give more of them another `split` than the questions or with --shots-from FILE"
            )
        chosen = unasked[-count:]
        if self.kind == "text":
            return [item.answer for item in chosen]
        return [spaced(self.prompt(item), item.answer) for item in chosen]


def read_tasks(files: Sequence[str | Path], settings: TaskSettings) -> list[Task]:
    """Read the files of an evaluation.

    Raises:
        UserError: a file that cannot be used, two of one name, or no question in the split.
    """
    if settings.shots_from and len(files) > 1:
        raise UserError(
            f"--shots-from {settings.shots_from} has the examples of one task, {len(files)} are "
            f"given; evaluate them one by one, or put examples into their files with a `split`"
        )
    given = read_file(settings.shots_from) if settings.shots_from else None
    tasks: list[Task] = []
    for path in files:
        file = read_file(path)
        if file.name in [task.name for task in tasks]:
            raise UserError(f"{path}: is the second task of the name {file.name}; rename one")
        if given is not None and given.kind != file.kind:
            raise UserError(
                f"{given.path}: has examples of kind {given.kind}, {path} is of kind {file.kind}"
            )
        tasks.append(_task(file, given, settings))
    if settings.shots and all(task.kind == "text" for task in tasks):
        raise UserError(f"--shots {settings.shots}: plain texts have no examples; leave it out")
    return tasks


def _task(file: TaskFile, given: TaskFile | None, settings: TaskSettings) -> Task:
    asked = [item for item in file.items if item.split == settings.split]
    if not asked:
        splits = sorted({item.split for item in file.items})
        raise UserError(
            f"{file.path}: has no questions of split {settings.split!r}, its splits are "
            f"{', '.join(splits)}; name one with --split"
        )
    others = [item for item in file.items if item.split != settings.split]
    return Task(
        file,
        tuple(asked[: settings.limit or None]),
        len(asked),
        in_order(given.items if given else others, settings.seed),
        given.path if given else file.path,
        0 if file.kind == "text" else settings.shots,
    )
