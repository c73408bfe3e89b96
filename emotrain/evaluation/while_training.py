"""Evaluation inside a training run (`evaluation.*`): held-out losses of the full model and of the
experts that domains choose, in the run's metrics under `evaluation/`.

It runs between two steps on the layout of the run, without gradients and without a random draw, and
leaves model, optimizer and data order as they were: the run computes the same bits with it as
without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from emotrain.config import Config
from emotrain.data.answers import is_answers
from emotrain.data.mixture_file import first_path, is_mixture
from emotrain.distributed.agreement import of_first_rank
from emotrain.distributed.gathering import let_go
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.measure import counts_of, measure, precision_on
from emotrain.evaluation.reading import DomainDocuments, read_domains
from emotrain.evaluation.results import ARMS, Measurement, SubsetLosses
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.training.engine import Phase, part
from emotrain.training.engine_protocol import Engine


class TrainingEvaluation:
    """What `training.run.train` calls after every step, as its `observe`."""

    def __init__(self, config: Config, ranks: Ranks):
        """
        Raises:
            UserError: data that cannot be used, or shares that the model cannot keep: before
                training starts, on all ranks.
        """
        setup = config.evaluation
        self.config, self.ranks = config, ranks
        self.settings = EvaluationSettings(
            # Without subsets, all experts: that is the full model once more, and is not run.
            keep=setup.keep or (1.0,),
            calibration_documents=setup.calibration_documents,
            documents=setup.documents,
            document_tokens=setup.document_tokens,
            domains=setup.domains,
            random_seeds=0,
        )
        counts_of(self.settings, config.model)
        self.domains = of_first_rank(self._read, ranks)

    def _read(self) -> dict[str, DomainDocuments]:
        setup, trained_on = self.config.evaluation, self.config.data
        data = setup.data or trained_on.path
        if is_answers(data) or is_mixture(data):
            what = "is a mixture" if is_mixture(data) else "holds prompts and answers"
            raise UserError(
                f"evaluation.every={setup.every} measures documents of one data set, and {data} "
                f"{what}; name a folder of `emotrain prepare`: evaluation.data=DIR"
            )
        # Where the tokenizer lies that the model is trained with.
        folder = first_path(trained_on.path) if is_mixture(trained_on.path) else trained_on.path
        tokenizer = Path(trained_on.tokenizer or f"{folder}/tokenizer.json")
        return read_domains(data, self.config, tokenizer.parent, self.settings)

    def __call__(self, engine: Engine, step: int, is_last: bool) -> dict[str, Any]:
        """The metrics of this step: none between evaluations."""
        if not is_last and step % self.config.evaluation.every:
            return {}
        started = perf_counter()
        # The gradients of the step are of no use any more, and need not lie beside this.
        engine.start_step()
        with part(Phase.EVALUATION), self._eager():
            result = measure(
                engine.model,
                self.domains,
                self.settings,
                self.config.data.sequence_length,
                self.config.training.micro_batch,
                precision_on(self.config, self.ranks.device),
                ranks=self.ranks,
            )
            let_go(engine.model)
        values = dict(_metrics(result, bool(self.config.evaluation.keep)))
        values["seconds"] = perf_counter() - started
        return {f"evaluation/{key}": value for key, value in values.items()}

    def _eager(self) -> AbstractContextManager:
        """Without compiled blocks: training's are not compiled for what is asked of them here, and
        torch keeps few variants of a function."""
        if not self.config.training.compile:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")


def _metrics(result: Measurement, subsets: bool) -> Iterator[tuple[str, float | None]]:
    """Name and value of each number, means over domains first."""
    yield from _losses(result.mean, subsets)
    yield "domain_cosine", result.routing.domain_cosine
    yield "effective_experts", result.routing.effective_experts
    for name, domain in result.domains.items():
        for key, value in _losses(domain, subsets):
            yield f"domains/{name}/{key}", value


def _losses(losses: SubsetLosses, subsets: bool) -> Iterator[tuple[str, float | None]]:
    yield "loss_nats", losses.loss_nats
    for keep, by_arm in losses.increase_nats.items() if subsets else ():
        for arm in ARMS:
            if (value := getattr(by_arm, arm)) is not None:
                yield f"increase_nats/{keep}/{arm}", value
