"""Questions of task files, answered with all experts and with few: `emotrain evaluate --tasks`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.config import Config
from emotrain.data.answers import spaced
from emotrain.data.tokenizer import TextTokenizer
from emotrain.distributed.agreement import of_first_rank
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, precision_on, rows_of
from emotrain.evaluation.reading import tokenizer_of
from emotrain.files import make_writable
from emotrain.generation.loading import open_generator
from emotrain.generation.sampling import Sampling
from emotrain.modular.counts import experts_kept
from emotrain.progress import Track, untracked
from emotrain.subsets.calibration import CalibrationText
from emotrain.subsets.selection import provenance, tokenizer_fingerprint
from emotrain.tasks.arms import Arm, calibration_of, chosen_arms, fixed_arms
from emotrain.tasks.generating import generate, generate_together
from emotrain.tasks.items import Item
from emotrain.tasks.metrics import choose, exact_match, f1
from emotrain.tasks.prompts import Task, read_tasks
from emotrain.tasks.results import (
    Answer,
    ArmInfo,
    Score,
    TaskEvaluation,
    TaskInfo,
    numbers_of,
)
from emotrain.tasks.scoring import Pair, encode_pairs, encode_texts, fit, log_probabilities, windows
from emotrain.tasks.session import Session
from emotrain.tasks.settings import TaskSettings, headline
from emotrain.training.checkpoint import load_state
from emotrain.training.checkpoint_folders import identity
from emotrain.training.spread_model import layout_of, load_to_predict

log = logging.getLogger("emotrain")

UNCONDITIONAL = "Answer:"
"""What a choice's unconditional log probability is taken after."""
STOP = ("\n",)
"""Where a generated answer ends."""


@dataclass(frozen=True)
class _Question:
    """An item as it is asked."""

    task: int
    item: Item
    prompt: str
    pairs: tuple[Pair, ...]
    """Choices: each after the prompt, then each after "Answer:". Else the gold answer, or the
    windows of a text."""
    gold_bytes: int
    cut: bool


@dataclass(frozen=True)
class Asked:
    """Files, as a model is asked their questions."""

    settings: TaskSettings
    tasks: tuple[Task, ...]
    questions: tuple[_Question, ...]
    """Of all tasks."""
    texts: tuple[CalibrationText, ...]
    """That choose the experts of each task; none where none are chosen."""

    @classmethod
    def read(
        cls,
        files: Sequence[str | Path],
        settings: TaskSettings,
        tokenizer: TextTokenizer,
        config: Config,
    ) -> Asked:
        """
        Raises:
            UserError: files or settings that the model of `config` cannot be asked with.
        """
        tasks = read_tasks(files, settings)
        for keep in settings.keep:
            experts_kept(config.model, keep)  # refuses what cannot be kept
        most = config.data.sequence_length
        questions = [
            question
            for j, task in enumerate(tasks)
            for question in questions_of(task, j, tokenizer, most, settings)
        ]
        texts: list[CalibrationText] = []
        if settings.keep:
            texts = calibration_of(tasks, tokenizer, settings.calibration_documents)
        return cls(settings, tuple(tasks), tuple(questions), tuple(texts))

    def answers(self, session: Session, arms: Sequence[Arm]) -> tuple[list[Arm], list[Answer]]:
        """The answers with the experts of these arms, and with those that the tasks choose."""
        arms = list(arms)
        if self.texts:
            arms += chosen_arms(
                session.model,
                self.texts,
                self.settings,
                session.most_tokens,
                session.rows,
                session.precision,
                session.track,
                session.ranks,
            )
        return arms, [
            answer
            for arm in arms
            for answer in ask(session, self.tasks, self.questions, arm, self.settings)
        ]

    def scores(self, arms: Sequence[Arm], answers: Sequence[Answer], shared: int) -> list[Score]:
        """Of each task with each of the arms.

        Args:
            shared: experts of a layer.
        """
        return [
            _score(task, arm, arm.kept(j, shared), answers)
            for j, task in enumerate(self.tasks)
            for arm in arms
        ]


def evaluate_tasks(
    checkpoint: str | Path,
    files: Sequence[str | Path],
    settings: TaskSettings,
    *,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
    out: Path | None = None,
    ranks: Ranks | None = None,
    layout: Sequence[str] = (),
) -> TaskEvaluation:
    """Ask a checkpoint the questions of some files.

    Args:
        checkpoint: a checkpoint folder, or a run folder (then its newest).
        files: see `emotrain.tasks.items`.
        micro_batch: rows of one forward pass; 0 means as in training.
        out: where results will be written, found out to be writable before the work.
        ranks: processes that evaluate together, each with a part of the model and some of the
            questions; by default this one alone, on `device`. All get the same result.
        layout: `parallel.*` settings that say how those share the model (`layout_of`).
    Raises:
        UserError: files, settings or a checkpoint that cannot be used. On all ranks.
    """
    rows_of(micro_batch, 1)
    ranks = ranks or Ranks(device=choose_device(device))

    def read() -> tuple[Path, Config, list[Arm], Asked]:
        folder, config, tokenizer = open_generator(checkpoint)
        config = layout_of(config, layout)
        asked = Asked.read(files, settings, tokenizer, config)
        arms = fixed_arms(settings.subsets, folder, config, len(asked.tasks))
        if out is not None:
            make_writable(out)
        return folder, config, arms, asked

    folder, config, fixed, asked = of_first_rank(read, ranks)
    session = Session(
        load_to_predict(folder, config, ranks),
        tokenizer_of(folder, config),
        config,
        rows_of(micro_batch, config.training.micro_batch),
        precision_on(config, ranks.device),
        track,
        ranks,
    )
    arms, answers = asked.answers(session, fixed)
    result = TaskEvaluation(
        checkpoint=str(folder),
        checkpoint_fingerprint=identity(folder),
        step=load_state(folder).step,
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        sequence_length=session.most_tokens,
        settings=settings,
        tasks=tuple(
            _info(
                task,
                [q for q in asked.questions if q.task == j],
                settings,
                asked.texts[j : j + 1],
            )
            for j, task in enumerate(asked.tasks)
        ),
        arms=tuple(arm_info(arm, config) for arm in arms),
        scores=tuple(asked.scores(arms, answers, config.model.experts.shared)),
        answers=tuple(answers),
    )
    if len(asked.tasks) > 1 and ranks.is_first:
        for reason in result.incomplete:
            log.warning("no mean over tasks: %s", reason)
    return result


def questions_of(
    task: Task, number: int, tokenizer: TextTokenizer, most: int, settings: TaskSettings
) -> list[_Question]:
    """The questions of a task as pairs of tokens.

    Args:
        most: tokens that the model reads at once.
    Raises:
        UserError: one that the model cannot read, with its line.
    """
    prompts = [task.prompt(item) for item in task.questions]
    if task.kind == "text":
        ids = encode_texts(tokenizer, [item.answer for item in task.questions])
        pairs = [windows(one, tokenizer.eos_id, most) for one in ids]
    else:
        pairs = _encoded(task, prompts, tokenizer)
    if task.kind == "generation" and settings.answer_tokens >= most:
        raise UserError(
            f"--answer-tokens {settings.answer_tokens} leaves no room for a question in the "
            f"{most} tokens that the model reads; lower it"
        )
    found = []
    for item, prompt, of_item in zip(task.questions, prompts, pairs, strict=True):
        try:
            fitted = tuple(fit(pair, most) for pair in of_item)
        except UserError as error:
            raise UserError(f"{task.file.path}: line {item.line}: {error}") from None
        gold = item.answer
        if task.kind != "text":
            gold = spaced(prompt, gold)[len(prompt) :]
        cut = fitted != tuple(of_item)
        if task.kind == "generation":
            cut = cut or len(of_item[0].context) + settings.answer_tokens > most
        found.append(_Question(number, item, prompt, fitted, len(gold.encode()), cut))
    if cuts := sum(question.cut for question in found):
        log.warning(
            "%s: %d of %d questions are longer than the %d tokens that the model reads; the "
            "starts of their prompts are left out",
            task.file.path,
            cuts,
            len(found),
            most,
        )
    return found


def _encoded(task: Task, prompts: Sequence[str], tokenizer: TextTokenizer) -> list[list[Pair]]:
    texts: list[tuple[str, str]] = []
    counts = []
    for item, prompt in zip(task.questions, prompts, strict=True):
        of_item = item.answers if task.kind == "choice" else (item.answer,)
        contexts = (prompt, UNCONDITIONAL) if task.kind == "choice" else (prompt,)
        for context in contexts:
            texts += [(context, spaced(context, text)[len(context) :]) for text in of_item]
        counts.append(len(of_item) * len(contexts))
    pairs = iter(encode_pairs(tokenizer, texts))
    return [[next(pairs) for _ in range(count)] for count in counts]


def ask(
    session: Session,
    tasks: Sequence[Task],
    questions: Sequence[_Question],
    arm: Arm,
    settings: TaskSettings,
) -> list[Answer]:
    """All questions with the experts of an arm."""
    logprob_U, _ = log_probabilities(
        session.model,
        [pair for question in questions for pair in question.pairs],
        session.most_tokens,
        session.rows,
        arm.masks,
        [question.task for question in questions for _ in question.pairs],
        session.track,
        arm.name,
        session.precision,
        session.ranks,
    )
    logprobs = iter(logprob_U.tolist())
    asked = [question for question in questions if tasks[question.task].kind == "generation"]
    texts = iter(_generated(session, asked, arm, settings))
    found = []
    for question in questions:
        own = [next(logprobs) for _ in question.pairs]
        kind, item = tasks[question.task].kind, question.item
        details: dict[str, Any] = {}
        scores: dict[str, float] = {}
        nats = -sum(own)
        if kind == "choice":
            count = len(item.answers)
            given, alone = own[:count], own[count:]
            nats = -given[item.gold]
            chosen = choose(given, item.answers, alone)
            scores = {f"accuracy_{name}": float(i == item.gold) for name, i in chosen.items()}
            details = {
                "gold": item.gold,
                "chosen": chosen,
                "logprobs_nats": given,
                "unconditional_logprobs_nats": alone,
            }
        elif kind == "generation":
            answer = next(texts).strip()
            scores = {
                "exact_match": exact_match(answer, item.answers),
                "f1": f1(answer, item.answers),
            }
            details = {"answer": answer}
        found.append(
            Answer(
                tasks[question.task].name,
                arm.name,
                item.line,
                scores,
                nats,
                question.gold_bytes,
                question.cut,
                details,
            )
        )
    return found


def _generated(
    session: Session, asked: Sequence[_Question], arm: Arm, settings: TaskSettings
) -> list[str]:
    """Answers in words."""
    prompts, groups = [one.prompt for one in asked], [one.task for one in asked]
    if session.ranks.world_size > 1:
        return generate_together(
            session.model,
            session.tokenizer,
            prompts,
            settings.answer_tokens,
            STOP,
            session.most_tokens,
            session.rows,
            arm.masks,
            groups,
            session.precision,
            session.ranks,
        )
    return generate(
        session.model,
        session.tokenizer,
        prompts,
        [Sampling(max_tokens=settings.answer_tokens, stop=STOP)] * len(asked),
        [None if arm.masks is None else [mask_JN[j] for mask_JN in arm.masks] for j in groups],
        session.most_tokens,
        session.track,
        f"{arm.name}: generating",
    )


def _score(
    task: Task,
    arm: Arm,
    kept: tuple[tuple[int, ...], ...] | None,
    answers: Sequence[Answer],
) -> Score:
    own = [one for one in answers if (one.task, one.experts) == (task.name, arm.name)]
    return Score(task.name, arm.name, len(own), numbers_of(task.kind, own), kept)


def _info(
    task: Task,
    questions: Sequence[_Question],
    settings: TaskSettings,
    texts: Sequence[CalibrationText],
) -> TaskInfo:
    return TaskInfo(
        name=task.name,
        kind=task.kind,
        file=str(task.file.path),
        fingerprint=task.file.fingerprint,
        split=settings.split,
        questions=len(questions),
        available=task.available,
        shots=task.num_shots,
        examples=len(task.examples),
        examples_from=str(task.examples_from),
        cut_prompts=sum(question.cut for question in questions),
        headline=headline(task.kind, settings),
        calibration=provenance(texts[0]) if texts else None,
    )


def arm_info(arm: Arm, config: Config) -> ArmInfo:
    """What is recorded of a choice of experts."""
    layers = range(config.model.num_layers)
    most = [config.model.experts_in_layer(layer) for layer in layers]
    kept = arm.kept(0, config.model.experts.shared)
    counts = most if kept is None else [len(of_layer) for of_layer in kept]
    words = {f"{count} of {of}": None for count, of in zip(counts, most, strict=True)}
    return ArmInfo(
        arm.name,
        arm.chosen_by,
        arm.keep,
        arm.seed,
        arm.file,
        arm.file_fingerprint,
        " or ".join(words),
    )
