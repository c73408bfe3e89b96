"""Questions of task files, answered with all experts and with few: `emotrain evaluate --tasks`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from emotrain.config import Config
from emotrain.data.answers import spaced
from emotrain.data.tokenizer import TextTokenizer
from emotrain.errors import UserError
from emotrain.evaluation.measure import precision_on, rows_of
from emotrain.files import make_writable
from emotrain.generation.loading import load_weights, open_generator
from emotrain.generation.sampling import Sampling
from emotrain.model.transformer import Transformer
from emotrain.modular.counts import experts_kept
from emotrain.progress import Track, untracked
from emotrain.subsets.calibration import CalibrationText
from emotrain.subsets.selection import provenance, tokenizer_fingerprint
from emotrain.tasks.arms import Arm, calibration_of, chosen_arms, fixed_arms
from emotrain.tasks.generating import generate
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
from emotrain.tasks.settings import TaskSettings, headline
from emotrain.training.checkpoint import load_state
from emotrain.training.checkpoint_folders import identity

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


@dataclass
class Session:
    """A model, and what every pass of it needs."""

    model: Transformer
    tokenizer: TextTokenizer
    config: Config
    rows: int
    """Of one forward pass."""
    precision: torch.dtype | None
    track: Track[Any] = field(default=untracked)

    @property
    def most_tokens(self) -> int:
        """That the model reads at once: as in training."""
        return self.config.data.sequence_length


def open_session(
    checkpoint: str | Path,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
) -> tuple[Path, Session]:
    """Load a checkpoint with its tokenizer -> its folder and what runs it.

    Args:
        micro_batch: rows of one forward pass; 0 means as in training.
    Raises:
        UserError: see `open_generator`, `load_weights`, `rows_of`.
    """
    rows_of(micro_batch, 1)
    folder, config, tokenizer = open_generator(checkpoint)
    rows = rows_of(micro_batch, config.training.micro_batch)
    model = load_weights(folder, device)
    precision = precision_on(config, model.head.weight.device)
    return folder, Session(model, tokenizer, config, rows, precision, track)


def evaluate_tasks(
    checkpoint: str | Path,
    files: Sequence[str | Path],
    settings: TaskSettings,
    *,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
    out: Path | None = None,
) -> TaskEvaluation:
    """Ask a checkpoint the questions of some files.

    Args:
        checkpoint: a checkpoint folder, or a run folder (then its newest).
        files: see `emotrain.tasks.items`.
        micro_batch: rows of one forward pass; 0 means as in training.
        out: where results will be written, found out to be writable before the work.
    Raises:
        UserError: files, settings or a checkpoint that cannot be used.
    """
    tasks = read_tasks(files, settings)
    folder, session = open_session(checkpoint, device, micro_batch, track)
    for keep in settings.keep:
        experts_kept(session.config.model, keep)  # refuses what cannot be kept
    arms = fixed_arms(settings.subsets, folder, session.config, len(tasks))
    questions = [
        q for j, task in enumerate(tasks) for q in questions_of(task, j, session, settings)
    ]
    texts: list[CalibrationText] = []
    if settings.keep:
        texts = calibration_of(tasks, session.tokenizer, settings.calibration_documents)
    if out is not None:
        make_writable(out)
    if texts:
        arms += chosen_arms(
            session.model,
            texts,
            settings,
            session.most_tokens,
            session.rows,
            session.precision,
            track,
        )
    answers: list[Answer] = []
    for arm in arms:
        answers += ask(session, tasks, questions, arm, settings)
    state = load_state(folder)
    shared = session.config.model.experts.shared
    result = TaskEvaluation(
        checkpoint=str(folder),
        checkpoint_fingerprint=identity(folder),
        step=state.step,
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        sequence_length=session.most_tokens,
        settings=settings,
        tasks=tuple(
            _info(task, [q for q in questions if q.task == j], settings, texts[j : j + 1])
            for j, task in enumerate(tasks)
        ),
        arms=tuple(arm_info(arm, session.config) for arm in arms),
        scores=tuple(
            _score(task, arm, arm.kept(j, shared), answers)
            for j, task in enumerate(tasks)
            for arm in arms
        ),
        answers=tuple(answers),
    )
    if len(tasks) > 1:
        for reason in result.incomplete:
            log.warning("no mean over tasks: %s", reason)
    return result


def questions_of(
    task: Task, number: int, session: Session, settings: TaskSettings
) -> list[_Question]:
    """The questions of a task as pairs of tokens.

    Raises:
        UserError: one that the model cannot read, with its line.
    """
    prompts = [task.prompt(item) for item in task.questions]
    most = session.most_tokens
    if task.kind == "text":
        ids = encode_texts(session.tokenizer, [item.answer for item in task.questions])
        pairs = [windows(one, session.tokenizer.eos_id, most) for one in ids]
    else:
        pairs = _encoded(task, prompts, session.tokenizer)
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
    )
    logprobs = iter(logprob_U.tolist())
    asked = [question for question in questions if tasks[question.task].kind == "generation"]
    subsets = [
        None if arm.masks is None else [mask_JN[question.task] for mask_JN in arm.masks]
        for question in asked
    ]
    texts = iter(
        generate(
            session.model,
            session.tokenizer,
            [question.prompt for question in asked],
            [Sampling(max_tokens=settings.answer_tokens, stop=STOP)] * len(asked),
            subsets,
            session.most_tokens,
            session.track,
            f"{arm.name}: generating",
        )
    )
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
