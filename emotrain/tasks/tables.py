"""The numbers of tasks as tables, as CSV, and a line a question."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from emotrain.evaluation.tables import plain
from emotrain.files import json_text, write_whole
from emotrain.tables import Table
from emotrain.tasks.items import Kind
from emotrain.tasks.results import METRICS, Number, Score, TaskEvaluation

TITLES: dict[Kind, str] = {
    "choice": "Questions with choices: share answered right by log probability (raw), by log "
    "probability a character, and by how much the question adds to it",
    "generation": "Generated answers: share that is one of the accepted, and F1 of their words",
    "text": "Plain texts",
}
NAMES = {
    "accuracy_raw": "raw",
    "accuracy_per_char": "per char",
    "accuracy_unconditional": "unconditional",
    "exact_match": "exact match",
    "f1": "F1",
    "bits_per_byte": "bits/byte",
}
"""What a reader calls a metric."""


def tables(result: TaskEvaluation) -> list[Table]:
    """One of each kind of task, then the means over tasks."""
    kinds: dict[Kind, None] = {task.kind: None for task in result.tasks}
    found = [_of_kind(result, kind) for kind in kinds]
    if result.means:
        found.append(_means(result))
    return found


def _of_kind(result: TaskEvaluation, kind: Kind) -> Table:
    tasks = {task.name: task for task in result.tasks if task.kind == kind}
    kept = {arm.name: arm.kept for arm in result.arms}
    headline = next(iter(tasks.values())).headline
    of_answer = "; bits a byte of the right answer" if kind != "text" else ": bits a byte"
    stands = f"; headline: {NAMES[headline]}" if kind == "choice" else ""
    rows = tuple(
        (
            score.task,
            score.experts,
            kept[score.experts],
            str(score.questions),
            str(tasks[score.task].shots),
            *(_number(score, metric) for metric in METRICS[kind]),
        )
        for score in result.scores
        if score.task in tasks
    )
    return Table(
        f"{TITLES[kind]}{of_answer}; ± standard error over questions{stands}",
        ("task", "experts", "kept", "n", "shots", *(NAMES[metric] for metric in METRICS[kind])),
        rows,
        names=3,
    )


def _means(result: TaskEvaluation) -> Table:
    metrics = list(dict.fromkeys(mean.metric for mean in result.means))
    of = {(mean.experts, mean.metric): mean for mean in result.means}
    rows = []
    for arm in result.arms:
        found = [of[arm.name, metric] for metric in metrics]
        numbers = [_plus_minus(Number(mean.value, mean.standard_error)) for mean in found]
        rows.append((arm.name, arm.kept, *numbers))
    counts = [of[result.arms[0].name, metric].tasks for metric in metrics]
    names = [
        f"{NAMES[metric]} ({count} task{'s' * (count > 1)})"
        for metric, count in zip(metrics, counts, strict=True)
    ]
    return Table("Mean over tasks, unweighted", ("experts", "kept", *names), tuple(rows), names=2)


def _number(score: Score, metric: str) -> str:
    return _plus_minus(score.metrics.get(metric))


def _plus_minus(number: Number | None) -> str:
    """`0.250 ± 0.019`; a dash where there is none."""
    if number is None:
        return "–"
    return f"{number.value:.3f} ± {plain(number.standard_error, 3)}"


def table_csv(result: TaskEvaluation) -> str:
    """One line a task, choice of experts and metric."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        (
            *("task", "kind", "experts", "chosen_by", "keep", "random_seed", "kept", "questions"),
            *("split", "shots", "seed", "calibration_documents", "metric", "is_headline"),
            *("value", "standard_error"),
        )
    )
    tasks = {task.name: task for task in result.tasks}
    arms = {arm.name: arm for arm in result.arms}
    for score in result.scores:
        task, arm = tasks[score.task], arms[score.experts]
        chose = task.calibration.documents if task.calibration and arm.chosen_by == "task" else 0
        for metric in METRICS[task.kind]:
            number = score.metrics.get(metric)
            writer.writerow(
                (
                    *(task.name, task.kind, arm.name, arm.chosen_by, arm.keep, arm.seed, arm.kept),
                    *(score.questions, task.split, task.shots, result.settings.seed, chose),
                    *(metric, int(metric == task.headline)),
                    *((number.value, number.standard_error) if number else (None, None)),
                )
            )
    return stream.getvalue()


def write_results(result: TaskEvaluation, folder: Path) -> list[Path]:
    """Write tasks.json, .md, .csv and questions.jsonl; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [table.markdown() for table in tables(result)]
    if len(result.tasks) > 1 and result.incomplete:
        parts.append(f"No mean over tasks: {'; '.join(result.incomplete)}.\n")
    texts = {
        "tasks.json": json_text(result.to_json(), indent=1, ensure_ascii=False) + "\n",
        "tasks.md": "\n".join(parts),
        "tasks.csv": table_csv(result),
        "questions.jsonl": "".join(
            json_text(answer.to_json(), ensure_ascii=False) + "\n" for answer in result.answers
        ),
    }
    return [write_whole(folder / name, text.encode()) for name, text in texts.items()]
