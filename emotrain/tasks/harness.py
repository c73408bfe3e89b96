"""EleutherAI's evaluation harness, `lm-eval`, on a checkpoint with all experts or with a subset.

The harness asks a model for log probabilities of tokens and for text; here both come from what
`emotrain evaluate --tasks` and `emotrain generate` use. The package is optional and imported where
it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from emotrain.errors import MissingPackageError, UserError
from emotrain.evaluation.tables import plain
from emotrain.files import json_text, make_writable, write_whole
from emotrain.generation.sampling import Sampling
from emotrain.progress import Track, untracked
from emotrain.subsets.selection import tokenizer_fingerprint
from emotrain.tables import Table, csv_text
from emotrain.tasks.arms import Arm, fixed_arms
from emotrain.tasks.evaluation import arm_info
from emotrain.tasks.generating import generate
from emotrain.tasks.results import FORMAT, ArmInfo
from emotrain.tasks.scoring import Pair, encode_texts, log_probabilities, windows
from emotrain.tasks.session import Session, open_session
from emotrain.training.checkpoint import load_state
from emotrain.training.checkpoint_folders import identity

BOOTSTRAPS = 1000
"""Draws for the standard errors that have no formula."""

ANSWER_TOKENS = 256
"""Most tokens of an answer where a task does not say: the harness's own default."""


def harness_model(session: Session, arm: Arm, fingerprint: str) -> Any:
    """A checkpoint as the harness knows models: an instance of `lm_eval.api.model.TemplateLM`.

    Args:
        arm: the experts, those of a single task.
        fingerprint: of the tokenizer, by which the harness tells what it has cached.
    Raises:
        MissingPackageError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ModuleNotFoundError as error:
        raise missing_harness(error) from None

    class CheckpointLM(TemplateLM):
        """Its methods are called by the harness and documented there."""

        @property
        def eot_token_id(self) -> int:
            return session.tokenizer.eos_id

        @property
        def max_length(self) -> int:
            return session.most_tokens

        @property
        def tokenizer_name(self) -> str:
            return fingerprint

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            # The tokenizer of a checkpoint begins no text with a special token.
            return list(encode_texts(session.tokenizer, [string])[0])

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            pairs = [Pair(tuple(context), tuple(after)) for _, context, after in requests]
            logprob_U, greedy_U = _scored(session, arm, pairs)
            return list(zip(logprob_U.tolist(), greedy_U.tolist(), strict=True))

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            texts = [request.args[0] for request in requests]
            pairs = [
                windows(ids, session.tokenizer.eos_id, session.most_tokens)
                for ids in encode_texts(session.tokenizer, texts)
            ]
            logprobs = iter(_scored(session, arm, [p for own in pairs for p in own])[0].tolist())
            return [sum(next(logprobs) for _ in own) for own in pairs]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            arguments = [request.args for request in requests]
            subset = None if arm.masks is None else [mask_JN[0] for mask_JN in arm.masks]
            return generate(
                session.model,
                session.tokenizer,
                [prompt for prompt, _ in arguments],
                [sampling_of(options) for _, options in arguments],
                [subset] * len(arguments),
                session.most_tokens,
                session.track,
                f"{arm.name}: generating",
            )

    return CheckpointLM()


def _scored(session: Session, arm: Arm, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    return log_probabilities(
        session.model,
        pairs,
        session.most_tokens,
        session.rows,
        arm.masks,
        track=session.track,
        description=arm.name,
        precision=session.precision,
    )


def sampling_of(options: dict[str, Any]) -> Sampling:
    """What a task's `generation_kwargs` say, as the harness reads them: without `do_sample` an
    answer is drawn where a temperature above 0 is given, and else greedy.

    Raises:
        UserError: an option that is not known here.
    """
    left = dict(options)
    until = left.pop("until", [])
    most = left.pop("max_gen_toks", ANSWER_TOKENS)
    draw = {name: left.pop(name) for name in ("temperature", "top_p", "top_k") if name in left}
    drawn = left.pop("do_sample", draw.get("temperature", 0) > 0)
    if left:
        raise UserError(
            f"generation_kwargs of the task have {', '.join(sorted(left))}, which is not known "
            f"here; give until, max_gen_toks, do_sample, temperature, top_p, top_k"
        )
    stop = tuple([until] if isinstance(until, str) else until)
    return Sampling(max_tokens=most, stop=stop, **({"temperature": 1.0, **draw} if drawn else {}))


@dataclass(frozen=True)
class HarnessEvaluation:
    """What the harness found."""

    checkpoint: str
    checkpoint_fingerprint: str
    step: int
    tokenizer_fingerprint: str
    sequence_length: int
    include_path: str
    lm_eval_version: str
    shots: int | None
    """That were asked for; None for what each task says."""
    limit: int
    seed: int
    arms: tuple[ArmInfo, ...]
    runs: tuple[dict[str, Any], ...]
    """What `simple_evaluate` returned, for each arm."""

    def numbers(self) -> Iterator[tuple[str, str, str, str, float | None, float | None, int]]:
        """(experts, task, metric, filter, value, standard error, questions) of all that was
        measured."""
        for arm, run in zip(self.arms, self.runs, strict=True):
            for task, values in run["results"].items():
                asked = run["n-samples"].get(task, {}).get("effective", 0)
                for key, value in values.items():
                    metric, _, name = key.partition(",")
                    if name and not metric.endswith("_stderr"):
                        error = values.get(f"{metric}_stderr,{name}")
                        yield arm.name, task, metric, name, _number(value), _number(error), asked

    def to_json(self) -> dict[str, Any]:
        names = ("experts", "task", "metric", "filter", "value", "standard_error", "questions")
        head = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("arms", "runs")
        }
        return {
            "format": FORMAT,
            **head,
            "arms": [dataclasses.asdict(arm) for arm in self.arms],
            "scores": [dict(zip(names, row, strict=True)) for row in self.numbers()],
        }

    def table(self) -> Table:
        kept = {arm.name: arm.kept for arm in self.arms}
        rows = tuple(
            (task, experts, kept[experts], metric, str(asked), plain(value, 4), plain(error, 4))
            for experts, task, metric, _, value, error, asked in self.numbers()
        )
        return Table(
            f"lm-eval {self.lm_eval_version}",
            ("task", "experts", "kept", "metric", "n", "value", "± standard error"),
            rows,
            names=4,
        )

    def write(self, folder: Path) -> list[Path]:
        """Write lm_eval.json, .md, .csv and a line a question; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.to_json()["scores"]
        scores = csv_text(tuple(rows[0]) if rows else (), (tuple(row.values()) for row in rows))
        samples = [
            json_text({"experts": arm.name, "task": task, **_plain(sample)}, ensure_ascii=False)
            for arm, run in zip(self.arms, self.runs, strict=True)
            for task, of_task in run["samples"].items()
            for sample in of_task
        ]
        texts = {
            "lm_eval.json": json_text(self.to_json(), indent=1, ensure_ascii=False) + "\n",
            "lm_eval.md": self.table().markdown(),
            "lm_eval.csv": scores,
            "lm_eval_questions.jsonl": "".join(f"{line}\n" for line in samples),
        }
        return [write_whole(folder / name, text.encode()) for name, text in texts.items()]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _plain(value: Any) -> Any:
    """What a sample holds as JSON can; of anything else its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def evaluate_harness(
    checkpoint: str | Path,
    tasks: Sequence[str],
    include_path: str | Path,
    subsets: Sequence[str] = (),
    shots: int | None = None,
    limit: int = 0,
    seed: int = 0,
    *,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
    out: Path | None = None,
) -> HarnessEvaluation:
    """`lm_eval.simple_evaluate` on a checkpoint, with all experts and with each subset.

    Args:
        tasks: names of tasks whose YAML files are in `include_path`. The harness's own tasks are
            not looked through: that would take longer, and most of them need a network.
        subsets: files of `emotrain select`.
        shots: examples before each question; None as the task says.
        limit: most questions of a task; 0 asks all.
        out: where results will be written, found out to be writable before the work.
    Raises:
        UserError: what cannot be used. MissingPackageError: lm-eval is not installed.
    """
    manager = _task_manager(tasks, include_path)
    import lm_eval

    folder, session = open_session(checkpoint, device, micro_batch, track)
    arms = fixed_arms(subsets, folder, session.config)
    if out is not None:
        make_writable(out)
    fingerprint = tokenizer_fingerprint(folder)
    runs = [
        lm_eval.simple_evaluate(
            model=harness_model(session, arm, fingerprint),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit or None,
            bootstrap_iters=BOOTSTRAPS,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        for arm in arms
    ]
    return HarnessEvaluation(
        checkpoint=str(folder),
        checkpoint_fingerprint=identity(folder),
        step=load_state(folder).step,
        tokenizer_fingerprint=fingerprint,
        sequence_length=session.most_tokens,
        include_path=str(include_path),
        lm_eval_version=lm_eval.__version__,
        shots=shots,
        limit=limit,
        seed=seed,
        arms=tuple(arm_info(arm, session.config) for arm in arms),
        runs=tuple(runs),
    )


def _task_manager(tasks: Sequence[str], include_path: str | Path) -> Any:
    """The harness's view of a folder of tasks.

    Raises:
        UserError: no such folder, or a task that is not there. MissingPackageError: lm-eval is not
            installed.
    """
    if not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path}: no such folder of tasks")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise missing_harness(error) from None
    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    known = sorted(manager.all_tasks)
    for name in tasks:
        if name not in known:
            raise UserError(
                f"--lm-eval {name}: {include_path} has no such task, it has "
                f"{', '.join(known) or 'none'}"
            )
    return manager


def missing_harness(error: ModuleNotFoundError) -> MissingPackageError:
    return MissingPackageError(
        f"--lm-eval needs the package lm-eval ({error}); install it with: pip install "
        f"'emotrain[lm-eval]'"
    )
