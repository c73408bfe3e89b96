"""Training: one step (`forward_backward`) and the loop around it (`train`)."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Config, LossConfig, save_config
from emotrain.data.loader import Loader
from emotrain.distributed.faults import collective_errors, report_not_finite
from emotrain.distributed.mesh import Layout
from emotrain.distributed.parallelize import build_model, set_last_backward
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.model.losses import LossSums, language_model_sums, router_loss
from emotrain.model.router import RoutingReport, draw_pool_sizes
from emotrain.model.transformer import Transformer
from emotrain.training import checkpoint
from emotrain.training.metrics import (
    MetricsWriter,
    ProgressBar,
    flops_per_token,
    mean,
    peak_flops,
    peak_memory_gib,
    routing_metrics,
    scalar_sums,
)
from emotrain.training.optimizer import (
    anneal_learning_rate,
    build_optimizer,
    clip_gradients,
    learning_rate,
)
from emotrain.training.profiling import part, profiled_steps

log = logging.getLogger("emotrain")


@dataclass(frozen=True)
class StepResult:
    """Losses of one step over the whole global batch, and this rank's routing."""

    loss: float
    """What was optimised: cross entropy, z-losses and balance, weighted."""
    cross_entropy: float
    """Nats a target token."""
    z: float
    """Mean squared log-normaliser of the logits, unweighted."""
    balance: float
    """Mean over layers of the balance loss, unweighted; 1 is perfect."""
    router_z: float
    """Mean over layers of the router z-loss, unweighted."""
    num_targets: int
    """Positions with a loss."""
    grad_norm: float
    """Global gradient norm before clipping."""
    reports: Sequence[RoutingReport]
    """This rank's routing, one report a micro-batch."""
    micro_batch_losses: Sequence[Tensor]
    """This rank's share of `loss`, one a micro-batch."""
    stop: bool
    """Whether any rank was asked to stop."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine:
    """How a step reaches the parameters: of a plain model, or one under FSDP2.
    `training/deepspeed.py` has DeepSpeed's."""

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer | None = None):
        self.model, self.optimizer = model, optimizer

    @classmethod
    def build(cls, config: Config, ranks: Ranks, fresh: bool) -> Engine:
        """`fresh`: whether the model gets its initial values, or waits for those of a
        checkpoint."""
        model = build_model(config, ranks, fresh)
        return cls(model, build_optimizer(model, config.optimizer))

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def forward(
        self, batch: PackedBatch, pool_sizes_LG: Tensor | None, losses: LossConfig
    ) -> tuple[LossSums, RoutingReport]:
        """Loss sums and routing of one micro-batch."""
        with part("forward"):
            output = self.model(batch, pool_sizes_LG, z_logits=losses.router_z_logits)
        with part("loss"):
            return language_model_sums(output, self.model.head, batch, losses.z), output.routing

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add a micro-batch's gradient to that of the step; after the last one it is the sum
        over ranks."""
        set_last_backward(self.model, is_last)
        loss.backward()

    def clip(self, max_norm: float, ranks: Ranks) -> Tensor | float:
        """Clip the gradient of the step. Returns its norm before."""
        return clip_gradients(list(self.model.parameters()), max_norm, ranks)

    def update(self) -> None:
        """Update the parameters by a clipped gradient that is finite."""
        self.optimizer.step()

    def restore(self, path: Path) -> checkpoint.TrainingState:
        return checkpoint.restore(path, self.model, self.optimizer)

    def save(
        self,
        writer: checkpoint.CheckpointWriter,
        config: Config,
        state: checkpoint.TrainingState,
        tokenizer: Path | None,
    ) -> None:
        writer.save(self.model, self.optimizer, config, state, tokenizer)


def forward_backward(
    model: Transformer,
    micro_batches: Sequence[PackedBatch],
    config: Config,
    step: int,
    ranks: Ranks,
    stop: bool = False,
    engine: Engine | None = None,
) -> StepResult:
    """Put the clipped gradient of the global loss of one step into the parameters.

    `losses.balance_scope=global_batch` balances over every document of the step. The `joint`
    schedule runs all forward passes, sums the counts once, then runs the backward passes: exact.
    The `running` schedule balances each micro-batch against the counts so far.

    Args:
        micro_batches: this rank's part of the global batch.
        step: number of the update, counted from 1; keys the pool sizes.
        engine: takes gradients to the parameters; by default that of a plain model or one under
            FSDP2.
    """
    losses, engine = config.losses, engine or Engine(model)
    num_targets, num_tokens = ranks.sum(
        torch.stack(
            [
                sum((b.targets_BS >= 0).sum() for b in micro_batches),
                sum(
                    b.targets_BS.new_tensor(b.targets_BS.numel())
                    if b.valid_T is None
                    else b.valid_T.sum()
                    for b in micro_batches
                ),
            ]
        )
    )
    num_targets = num_targets.clamp(min=1)
    engine.zero_grad()
    reports: list[RoutingReport] = []
    terms: list[tuple[Tensor, ...]] = []

    def forward(batch: PackedBatch) -> tuple[LossSums, RoutingReport]:
        pool_sizes_LG = draw_pool_sizes(
            config.model.router.pool,
            batch.document_ids_G,
            config.model.num_layers,
            config.training.seed,
            step,
        )
        return engine.forward(batch, pool_sizes_LG, losses)

    def backward(
        sums: LossSums, report: RoutingReport, counts: Sequence[Tensor], is_last: bool
    ) -> None:
        with part("loss"):
            balance, router_z = router_loss(report, counts, num_tokens)
            loss = sums.lm / num_targets + losses.balance * balance + losses.router_z * router_z
        with part("backward"):
            engine.backward(loss, is_last)
        terms.append(
            tuple(
                term.detach()
                for term in (
                    loss,
                    sums.cross_entropy / num_targets,
                    sums.z / num_targets,
                    balance,
                    router_z,
                )
            )
        )
        reports.append(report)

    autocast = (
        torch.autocast(ranks.device.type, torch.bfloat16)
        if config.training.uses_bfloat16(ranks.device.type)
        else nullcontext()
    )
    if losses.balance_scope == "global_batch" and losses.balance_schedule == "joint":
        with autocast:
            passes = [forward(batch) for batch in micro_batches]
        counts = _sum_counts([report for _, report in passes], ranks)
        while passes:
            backward(*passes.pop(0), counts, is_last=not passes)
    else:
        for index, batch in enumerate(micro_batches):
            with autocast:
                sums, report = forward(batch)
            scope = [*reports, report] if losses.balance_scope == "global_batch" else [report]
            counts = _sum_counts(scope, ranks if losses.balance_scope != "micro_batch" else Ranks())
            backward(sums, report, counts, is_last=index == len(micro_batches) - 1)

    with part("clipping"):
        grad_norm = engine.clip(config.optimizer.clip_norm, ranks)
    flags = scalar_sums(
        [*(sum(column) for column in zip(*terms, strict=True)), num_targets.new_tensor(stop)]
    )
    loss, cross_entropy, z, balance, router_z, stops = ranks.sum(flags).tolist()
    return StepResult(
        loss,
        cross_entropy,
        z,
        balance,
        router_z,
        int(num_targets),
        float(grad_norm),
        reports,
        [loss for loss, *_ in terms],
        stops > 0,
    )


def train(
    config: Config,
    ranks: Ranks | None = None,
    build_engine: Callable[[Config, Ranks, bool], Engine] = Engine.build,
) -> dict[str, Any]:
    """Train as configured, from the newest checkpoint of the run if there is one. Returns a summary
    of the run.

    On SIGTERM or SIGINT the step in progress is finished, a checkpoint is written, and the summary
    says `interrupted`.

    Args:
        build_engine: makes the model and what updates it.

    Raises:
        ValueError, FileNotFoundError: settings, data or checkpoint that cannot be used. OSError:
            disk full or not writable.
        RuntimeError: too many updates in a row were not finite.
    """
    ranks = ranks or Ranks.join(config.training.device, config.training.collective_timeout_s)
    setup = config.training
    _check_run(config, ranks)
    run_dir = Path(setup.run_dir)
    loader = Loader(
        config.data.path,
        config.data.sequence_length,
        setup.seed,
        cross_document_targets=config.data.cross_document_targets,
        repetition_filter=config.data.repetition_filter,
        verify_checksums=config.data.verify_checksums,
    )
    if loader.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {loader.vocab_size} "
            f"tokens of {config.data.path}; "
            f"raise it to at least that"
        )
    source, anneals_now = _source(config, ranks)
    engine = build_engine(config, ranks, source is None)
    state = _starting_state(config, loader, engine, source, anneals_now)
    last_step = config.num_steps + max(0, state.anneal_start_step)
    if ranks.is_first:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
    writer = MetricsWriter(run_dir, state.step, setup.tensorboard) if ranks.is_first else None
    bar = ProgressBar(state.step, last_step, shown=ranks.is_first)
    flops, peak = flops_per_token(config), peak_flops(config, ranks.device)
    skipped_in_a_row, tokens_per_second = 0, 0.0
    log_time, log_step, started, first_step = (
        time.perf_counter(),
        state.step,
        time.perf_counter(),
        state.step,
    )
    metrics: dict[str, Any] = {}
    interrupted = False

    batches = loader.prefetch(
        state.step,
        last_step - state.step,
        setup.global_batch,
        setup.micro_batch,
        ranks.rank,
        ranks.world_size,
    )
    checkpoints = checkpoint.CheckpointWriter(
        run_dir,
        setup.keep_checkpoints,
        setup.async_checkpoints,
        setup.on_checkpoint_error,
        setup.collective_timeout_s,
    )
    steps = profiled_steps(batches, state.step + 1, config.profile, ranks, run_dir)
    with (
        _stop_requests() as stop_requested,
        checkpoints,
        batches,
        closing(bar),
        closing(writer) if writer else nullcontext(),
        closing(steps),
        collective_errors(ranks, setup.collective_timeout_s, lambda: state.step + 1),
    ):
        for step, micro_batches in steps:
            if state.anneal_start_step >= 0:
                lr = anneal_learning_rate(
                    state.anneal_start_lr, state.anneal_start_step, step, config.num_steps
                )
            else:
                lr = learning_rate(config.optimizer, step, last_step)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            micro_batches = [batch.to(ranks.device) for batch in micro_batches]
            result = forward_backward(
                engine.model, micro_batches, config, step, ranks, stop_requested(), engine
            )
            if result.finite:
                with part("optimizer"):
                    engine.update()
                skipped_in_a_row = 0
            else:
                skipped_in_a_row += 1
                report_not_finite(
                    step,
                    result.loss,
                    result.grad_norm,
                    [float(loss) for loss in result.micro_batch_losses],
                    [batch.document_ids_G.tolist() for batch in micro_batches],
                    setup.global_batch,
                    setup.micro_batch,
                    ranks,
                )
                if skipped_in_a_row >= setup.max_skipped_steps:
                    raise RuntimeError(
                        f"step {step}: {skipped_in_a_row} updates in a row were not finite "
                        f"(training.max_skipped_steps="
                        f"{setup.max_skipped_steps}); lower optimizer.lr and go on from the last "
                        f"checkpoint"
                    )
            state = checkpoint.TrainingState(
                step,
                state.tokens + config.tokens_per_step,
                loader.fingerprint,
                setup.seed,
                setup.global_batch,
                lr,
                state.skipped_steps + (not result.finite),
                state.anneal_start_step,
                state.anneal_start_lr,
            )
            is_last, interrupted = step == last_step, result.stop and step < last_step
            logged = step % setup.log_every == 0 or is_last or interrupted
            if logged:
                now = time.perf_counter()
                tokens_per_second = (step - log_step) * config.tokens_per_step / (now - log_time)
                log_time, log_step = now, step
                metrics = {
                    "step": step,
                    "tokens": state.tokens,
                    "loss": result.loss,
                    "cross_entropy": result.cross_entropy,
                    "z_loss": result.z,
                    "balance_loss": result.balance,
                    "router_z_loss": result.router_z,
                    "lr": lr,
                    "grad_norm": result.grad_norm,
                    "tokens_per_second": tokens_per_second,
                    "memory_gib": peak_memory_gib(ranks.device),
                    "skipped_steps": state.skipped_steps,
                    **routing_metrics(result.reports, ranks),
                }
                if peak is not None:
                    metrics["mfu"] = tokens_per_second * flops / (peak * ranks.world_size)
                if writer is not None:
                    writer.write(metrics)
            load = (
                f"  load max/mean {mean(metrics['load_imbalance']):.2f}"
                if "load_imbalance" in metrics
                else ""
            )
            bar.update(
                step,
                f"loss {result.cross_entropy:.3f}  {tokens_per_second:,.0f} tokens/s{load}",
                logged,
            )
            if (
                is_last
                or interrupted
                or (setup.checkpoint_every and step % setup.checkpoint_every == 0)
            ):
                with part("checkpoint copy"):
                    engine.save(
                        checkpoints, config, state, Path(config.data.path) / "tokenizer.json"
                    )
            if interrupted:
                break
    seconds = time.perf_counter() - started
    return {
        "run_dir": str(run_dir),
        "step": state.step,
        "last_step": last_step,
        "tokens": state.tokens,
        "interrupted": interrupted,
        "seconds": seconds,
        "mean_tokens_per_second": (state.step - first_step) * config.tokens_per_step / seconds,
        "checkpoint_step": checkpoints.last.step if checkpoints.last else first_step,
        "metrics": metrics,
    }


def _sum_counts(reports: Sequence[RoutingReport], ranks: Ranks) -> Sequence[Tensor]:
    """For each layer, the slots of each expert over these reports and all ranks, in one
    collective."""
    per_layer = [
        sum(report.layers[layer].counts_N for report in reports)
        for layer in range(len(reports[0].layers))
    ]
    if not per_layer:
        return []
    return ranks.sum(torch.cat(per_layer)).split([len(counts_N) for counts_N in per_layer])


def _check_run(config: Config, ranks: Ranks) -> None:
    setup = config.training
    for key, value in (("training.run_dir", setup.run_dir), ("data.path", config.data.path)):
        if not value:
            raise UserError(
                f"{key} is not set; name a folder, for example "
                f"{key}={'runs/first' if 'run' in key else 'data/sample'}"
            )
    if config.num_steps < 1:
        raise UserError(
            "neither training.steps nor training.tokens is set; say how long to train, for example "
            "training.steps=600"
        )
    Layout.of(config, ranks.world_size)


def _source(config: Config, ranks: Ranks) -> tuple[Path | None, bool]:
    """The checkpoint that the run goes on from, if any, and whether it begins to anneal there."""
    setup, run_dir = config.training, Path(config.training.run_dir)
    existing = checkpoint.list_checkpoints(run_dir)
    if setup.resume == "never" and existing:
        raise UserError(
            f"{run_dir} already holds checkpoints and training.resume=never; choose another "
            f"training.run_dir or resume=auto"
        )
    source = existing[-1] if setup.resume == "auto" and existing else None
    if setup.resume not in ("auto", "never"):
        source = checkpoint.find(setup.resume)
    anneals_now = source is None and bool(config.anneal.checkpoint)
    if anneals_now:
        source = checkpoint.find(config.anneal.checkpoint)
    # A shared file system may show the newest one to some processes first.
    return ranks.gather(source)[0], anneals_now


def _starting_state(
    config: Config, loader: Loader, engine: Engine, source: Path | None, anneals_now: bool
) -> checkpoint.TrainingState:
    """Load what the run goes on from into the engine; a fresh state where there is nothing."""
    setup = config.training
    if source is None:
        return checkpoint.TrainingState(
            0, 0, loader.fingerprint, setup.seed, setup.global_batch, 0.0
        )
    state = engine.restore(source)
    if state.data_fingerprint != loader.fingerprint:
        raise UserError(
            f"{source} was trained on other data than {config.data.path} at "
            f"data.sequence_length={config.data.sequence_length} "
            f"(fingerprint {state.data_fingerprint}, here {loader.fingerprint}); give the same "
            f"data, or start in a new run_dir"
        )
    for key, then, now in (
        ("seed", state.seed, setup.seed),
        ("global_batch", state.global_batch, setup.global_batch),
    ):
        if then != now:
            raise UserError(
                f"{source} was trained with training.{key}={then}, here it is {now}: the data "
                f"order would jump; use {then}"
            )
    if anneals_now:
        state = replace(state, anneal_start_step=state.step, anneal_start_lr=state.lr)
    elif (state.anneal_start_step >= 0) != bool(config.anneal.checkpoint):
        raise UserError(
            f"{source} was {'' if state.anneal_start_step >= 0 else 'not '}annealing; use the "
            f"configuration it was written with, "
            f"or another training.run_dir"
        )
    log.info("going on from %s", source)
    return state


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block, the first SIGTERM, SIGINT or SIGUSR1 only sets a flag; the next one acts
    as usual."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        log.warning("%s: finishing the step, then saving a checkpoint", signal.Signals(number).name)
        for name, handler in previous.items():
            signal.signal(name, handler)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {
            name: signal.signal(name, note)
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }
    try:
        yield lambda: bool(received)
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
