"""Evaluation inside a training run (`evaluation.*`): held-out losses of the full model, with
document pools of one size, and of the experts that domains choose, in the run's metrics under
`evaluation/`.

It runs between two steps on the layout of the run, without gradients and without a random draw, and
leaves model, optimizer and data order as they were: the run computes the same bits with it as
without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from emotrain.config import Config, DataConfig
from emotrain.data.answers import is_answers
from emotrain.data.mixture_file import first_path, is_mixture
from emotrain.distributed.agreement import of_first_rank
from emotrain.distributed.gathering import let_go
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.evaluation.measure import counts_of, measure, precision_on
from emotrain.evaluation.pooled import pool_losses, pool_of
from emotrain.evaluation.reading import DomainDocuments, read_domains
from emotrain.evaluation.results import ARMS, Measurement, SubsetLosses
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.model.transformer import Transformer
from emotrain.training.engine import Phase, part
from emotrain.training.engine_protocol import Engine

Measure = Callable[[Transformer], dict[str, float | None]]
"""Measures a model between two steps, on its layout: name and value of each number. All ranks call
it alike."""


class TrainingEvaluation:
    """What `training.run.train` calls after every step, as its `observe`."""

    def __init__(self, config: Config, ranks: Ranks, others: Sequence[Measure] = ()):
        """
        Args:
            others: what else is measured of the model.
        Raises:
            UserError: data that cannot be used, or shares that the model cannot keep: before
                training starts, on all ranks.
        """
        setup = config.evaluation
        self.config, self.ranks, self.others = config, ranks, others
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
        self.pool = pool_of(config.model, setup.pool_size) if setup.pool_size else None
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
        return read_domains(
            data, self.config, tokenizer_of_training(trained_on).parent, self.settings
        )

    def __call__(self, engine: Engine, step: int, is_last: bool) -> dict[str, Any]:
        """The metrics of this step: none between evaluations."""
        if not is_last and step % self.config.evaluation.every:
            return {}
        started = perf_counter()
        # The gradients of the step are of no use any more, and need not lie beside this.
        engine.start_step()
        row_length, rows = self.config.data.sequence_length, self.config.training.micro_batch
        precision, ranks = precision_on(self.config, self.ranks.device), self.ranks
        with part(Phase.EVALUATION), self._eager():
            model, domains = engine.model, self.domains
            result = measure(
                model, domains, self.settings, row_length, rows, precision, ranks=ranks
            )
            values = dict(_metrics(result, bool(self.config.evaluation.keep)))
            if self.pool is not None:
                of_pool = f"loss_nats/pool_{self.pool.size}"
                losses = pool_losses(model, domains, self.pool, row_length, rows, precision, ranks)
                for name, loss in losses.items():
                    values[f"domains/{name}/{of_pool}" if name else of_pool] = loss
            for other in self.others:
                values |= other(model)
            let_go(model)
        values["seconds"] = perf_counter() - started
        return {f"evaluation/{key}": value for key, value in values.items()}

    def _eager(self) -> AbstractContextManager:
        """Without compiled blocks: training's are not compiled for what is asked of them here, and
        torch keeps few variants of a function."""
        if not self.config.training.compile:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")


def tokenizer_of_training(data: DataConfig) -> Path:
    """The file of the tokenizer that a model is trained with."""
    folder = first_path(data.path) if is_mixture(data.path) else data.path
    return Path(data.tokenizer or f"{folder}/tokenizer.json")


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
