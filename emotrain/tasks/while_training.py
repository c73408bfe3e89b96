"""Task files inside a training run (`evaluation.tasks`)."""

from __future__ import annotations

import re

from emotrain.config import Config
from emotrain.data.tokenizer import load_tokenizer
from emotrain.distributed.agreement import of_first_rank, on_every_rank
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.measure import precision_on
from emotrain.evaluation.while_training import TrainingEvaluation, tokenizer_of_training
from emotrain.model.transformer import Transformer
from emotrain.tasks.arms import ALL, Arm
from emotrain.tasks.evaluation import Asked
from emotrain.tasks.results import METRICS
from emotrain.tasks.session import Session
from emotrain.tasks.settings import TaskSettings
from emotrain.training.run import Observer, unobserved


def observer(config: Config, ranks: Ranks) -> Observer:
    """What `evaluation.*` asks of a run, as its `observe`: nothing where `evaluation.every` is 0.

    Raises:
        UserError: see `TrainingEvaluation` and `TrainingTasks`.
    """
    if not config.evaluation.every:
        return unobserved
    tasks = [TrainingTasks(config, ranks)] if config.evaluation.tasks else []
    return TrainingEvaluation(config, ranks, tasks)


def _in_settings(message: str) -> str:
    """A message of `emotrain evaluate --tasks`, with the names of settings for its options."""
    message = message.replace(" or with --shots-from FILE", "")
    options = "--(shots|answer-tokens|calibration-documents)"
    return re.sub(options, lambda m: f"evaluation.{m[1].replace('-', '_')}", message)


class TrainingTasks:
    """What `TrainingEvaluation` measures besides losses: the metrics of each task, as `emotrain
    evaluate --tasks` finds them on a checkpoint of the same step."""

    def __init__(self, config: Config, ranks: Ranks):
        """
        Raises:
            UserError: files that cannot be used, or shares that the model cannot keep: before
                training starts, on all ranks.
        """
        setup, self.config, self.ranks = config.evaluation, config, ranks
        file = tokenizer_of_training(config.data)
        self.tokenizer = on_every_rank(lambda: load_tokenizer(file), ranks)
        settings = TaskSettings(
            shots=setup.shots,
            limit=setup.questions,
            answer_tokens=setup.answer_tokens,
            keep=setup.task_keep,
            calibration_documents=setup.calibration_documents,
            random_seeds=0,
        )

        def read() -> Asked:
            try:
                return Asked.read(setup.tasks, settings, self.tokenizer, config)
            except UserError as error:
                raise UserError(f"evaluation.tasks: {_in_settings(str(error))}") from None

        self.asked = of_first_rank(read, ranks)

    def __call__(self, model: Transformer) -> dict[str, float | None]:
        """`tasks/NAME/METRIC` with all experts, `tasks/NAME/METRIC/SHARE` with those that the task
        chose. None where the model's numbers are not finite."""
        rows = self.config.training.micro_batch
        precision = precision_on(self.config, self.ranks.device)
        session = Session(model, self.tokenizer, self.config, rows, precision, ranks=self.ranks)
        arms, answers = self.asked.answers(session, [Arm(ALL, "all")])
        ends = {arm.name: "" if arm.keep is None else f"/{arm.keep}" for arm in arms}
        found: dict[str, float | None] = {}
        for score in self.asked.scores(arms, answers, self.config.model.experts.shared):
            kind = next(task.kind for task in self.asked.tasks if task.name == score.task)
            for metric in METRICS[kind]:
                number = score.metrics.get(metric)
                name = f"tasks/{score.task}/{metric}{ends[score.experts]}"
                found[name] = None if number is None else number.value
        return found
