"""One optimizer step: forward, counts over the global batch, losses, backward, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.distributed.ranks import Ranks
from emotrain.model.losses import router_loss
from emotrain.model.report import LossSums, RoutingReport
from emotrain.model.router import training_request
from emotrain.training.choice_bias import move_biases, step_moves
from emotrain.training.engine import Phase, part
from emotrain.training.engine_protocol import Engine
from emotrain.training.step_result import StepResult


def train_step(
    engine: Engine,
    micro_batches: Sequence[PackedBatch],
    config: Config,
    step: int,
    ranks: Ranks,
    stop: bool = False,
) -> StepResult:
    """Update the parameters by the clipped gradient of the global loss of one step.

    `losses.balance_scope=global_batch` balances over every document of the step. The `joint`
    schedule runs all forward passes, sums the counts once, then runs the backward passes: exact.
    The `running` schedule balances each micro-batch against the counts so far. Under
    `balance_method=bias` no loss waits for counts; biases move after the update.

    Args:
        micro_batches: this rank's part of the global batch.
        step: number of the update, counted from 1; keys the pool sizes.
        stop: whether this rank was asked to stop after the step.
    """
    losses, model, seed = config.losses, config.model, config.training.seed
    exclusive = model.experts.exclusive
    counts = global_counts(micro_batches, ranks)
    # What losses are divided by: at least 1, so that a step of padding alone is a step of zeros.
    num_targets, num_tokens = counts.clamp(min=1)
    engine.start_step()
    reports: list[RoutingReport] = []
    terms: list[list[Tensor]] = []
    sources: list[Tensor | None] = []

    def forward(batch: PackedBatch) -> tuple[LossSums, RoutingReport]:
        request = training_request(model, batch, seed, step, losses.router_z_logits)
        choices = config.parallel.placement == "auto"
        return engine.forward(batch, replace(request, choices=choices), losses.z)

    def backward(
        sums: LossSums, report: RoutingReport, loads: Sequence[Tensor] | None, is_last: bool
    ) -> None:
        with part(Phase.LOSS):
            balance, router_z = router_loss(report, loads, num_tokens, exclusive)
            loss = sums.lm / num_targets + losses.balance * balance + losses.router_z * router_z
        with part(Phase.BACKWARD):
            engine.backward(loss, is_last)
        means = (sums.cross_entropy / num_targets, sums.z / num_targets)
        terms.append([term.detach() for term in (loss, *means, balance, router_z)])
        reports.append(detached(report))
        sources.append(sums.by_source)

    loads: Sequence[Tensor]
    moves: Sequence[Tensor] = ()
    if losses.balance_method == "bias":
        for index, batch in enumerate(micro_batches):
            backward(*forward(batch), None, is_last=index == len(micro_batches) - 1)
        loads, moves = step_moves(reports, ranks, exclusive)
        for term, report in zip(terms, reports, strict=True):  # to be reported
            term[3] = router_loss(report, loads, num_tokens, exclusive)[0]
    elif losses.balance_scope == "global_batch" and losses.balance_schedule == "joint":
        passes = [forward(batch) for batch in micro_batches]
        loads = _sum_counts([report for _, report in passes], ranks)
        while passes:
            backward(*passes.pop(0), loads, is_last=not passes)
    else:
        for index, batch in enumerate(micro_batches):
            sums, report = forward(batch)
            scope = [*reports, report] if losses.balance_scope == "global_batch" else [report]
            loads = _sum_counts(scope, ranks if losses.balance_scope != "micro_batch" else Ranks())
            backward(sums, report, loads, is_last=index == len(micro_batches) - 1)

    scalars = [*(sum(column) for column in zip(*terms, strict=True)), counts.new_full((), stop)]
    # One collective for all of them, and one copy to the host, which waits for it.
    step_sums = ranks.sum(torch.stack([scalar.double() for scalar in scalars]))
    update = engine.finish_step(config.optimizer.clip_norm, ranks)
    if moves and update.applied:
        move_biases(engine.model, moves, losses.bias_rate)
    *means, stops, targets = torch.cat([step_sums, counts[:1]]).tolist()
    shares = [term[0] for term in terms]
    ended = (int(targets), update.grad_norm, reports, shares, stops > 0, update.applied, sources)
    return StepResult(*(*means, *ended))


def detached(report: RoutingReport) -> RoutingReport:
    """The same without gradients, so that it holds no activation."""
    layers = tuple(
        replace(of, probability_sum_N=of.probability_sum_N.detach(), z_sum=of.z_sum.detach())
        for of in report.layers
    )
    return replace(report, layers=layers)


def global_counts(micro_batches: Sequence[PackedBatch], ranks: Ranks) -> Tensor:
    """int64 [2]: targets and routed tokens of the whole step, over all ranks."""
    counts = []
    for batch in micro_batches:
        num_targets, valid_T = (batch.targets_BS >= 0).sum(), batch.valid_T
        num_tokens = num_targets.new_full((), batch.targets_BS.numel())
        counts.append(torch.stack([num_targets, num_tokens if valid_T is None else valid_T.sum()]))
    return ranks.sum(torch.stack(counts).sum(dim=0))


def _sum_counts(reports: Sequence[RoutingReport], ranks: Ranks) -> Sequence[Tensor]:
    """For each layer, the slots of each expert over these reports and all ranks, in one
    collective."""
    per_layer = [
        torch.stack([report.layers[layer].counts_N for report in reports]).sum(dim=0)
        for layer in range(len(reports[0].layers))
    ]
    if not per_layer:
        return []
    return ranks.sum(torch.cat(per_layer)).split([len(counts_N) for counts_N in per_layer])
