"""A training run: where it starts, its steps, its metrics and checkpoints, how it stops."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from emotrain.batch import PackedBatch
from emotrain.config import Config, save_config
from emotrain.data.loader import Loader
from emotrain.distributed.faults import collective_errors, report_not_finite
from emotrain.distributed.mesh import Layout
from emotrain.distributed.ranks import Ranks
from emotrain.errors import RunError, UserError
from emotrain.training import checkpoint
from emotrain.training.engine import Engine, NativeEngine
from emotrain.training.metrics import RunLog
from emotrain.training.optimizer import anneal_learning_rate, learning_rate
from emotrain.training.profiling import part, profiled_steps
from emotrain.training.step import StepResult, train_step

log = logging.getLogger("emotrain")


def train(
    config: Config,
    ranks: Ranks | None = None,
    build_engine: Callable[[Config, Ranks, bool], Engine] = NativeEngine.build,
) -> dict[str, Any]:
    """Train as configured, from the newest checkpoint of the run if there is one. Returns a summary
    of the run.

    On SIGTERM or SIGINT the step in progress is finished, a checkpoint is written, and the summary
    says `interrupted`.

    Args:
        build_engine: makes the model and what updates it.
    Raises:
        UserError: settings, data or a checkpoint that cannot be used. OSError: disk full or not
            writable. RunError: too many updates in a row were not finite.
    """
    ranks = ranks or Ranks.join(config.training.device, config.training.collective_timeout_s)
    setup = config.training
    _check_run(config, ranks)
    run_dir, loader = Path(setup.run_dir), _build_loader(config)
    source, anneals_now = _source(config, ranks)
    engine = build_engine(config, ranks, source is None)
    state = _starting_state(config, loader, engine, source, anneals_now)
    first_step, last_step = state.step, config.num_steps + max(0, state.anneal_start_step)
    if ranks.is_first:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
    run_log = RunLog(config, ranks, run_dir, first_step, last_step)
    skipped_in_a_row, interrupted = 0, False
    tokenizer = Path(config.data.path) / "tokenizer.json"
    with ExitStack() as stack:
        stop_requested = stack.enter_context(_stop_requests())
        checkpoints = stack.enter_context(
            checkpoint.CheckpointWriter(
                run_dir,
                setup.keep_checkpoints,
                setup.async_checkpoints,
                setup.on_checkpoint_error,
                setup.collective_timeout_s,
            )
        )
        batches = stack.enter_context(
            loader.prefetch(
                first_step,
                last_step - first_step,
                setup.global_batch,
                setup.micro_batch,
                ranks.rank,
                ranks.world_size,
            )
        )
        stack.enter_context(closing(run_log))
        steps = profiled_steps(batches, first_step + 1, config.profile, ranks, run_dir)
        stack.enter_context(closing(steps))
        stack.enter_context(
            collective_errors(ranks, setup.collective_timeout_s, lambda: state.step + 1)
        )
        for step, micro_batches in steps:
            lr = _rate(config, state, step, last_step)
            engine.set_learning_rate(lr)
            micro_batches = [batch.to(ranks.device) for batch in micro_batches]
            result = train_step(engine, micro_batches, config, step, ranks, stop_requested())
            skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
            if not result.applied:
                _report_skipped(config, step, result, micro_batches, skipped_in_a_row, ranks)
            state = _next_state(config, loader, state, step, lr, result)
            is_last, interrupted = step == last_step, result.stop and step < last_step
            run_log.step(state, result, is_last or interrupted)
            every = setup.checkpoint_every
            if is_last or interrupted or (every and step % every == 0):
                with part("checkpoint copy"):
                    engine.save(checkpoints, config, state, tokenizer)
            if interrupted:
                break
    saved = checkpoints.last.step if checkpoints.last else first_step
    return run_log.summary(state, last_step) | {
        "interrupted": interrupted,
        "checkpoint_step": saved,
    }


def _build_loader(config: Config) -> Loader:
    loader = Loader(
        config.data.path,
        config.data.sequence_length,
        config.training.seed,
        cross_document_targets=config.data.cross_document_targets,
        repetition_filter=config.data.repetition_filter,
        verify_checksums=config.data.verify_checksums,
    )
    if loader.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the "
            f"{loader.vocab_size} tokens of {config.data.path}; raise it to at least that"
        )
    return loader


def _rate(config: Config, state: checkpoint.TrainingState, step: int, last_step: int) -> float:
    """Learning rate of a step."""
    if state.anneal_start_step >= 0:
        return anneal_learning_rate(
            state.anneal_start_lr, state.anneal_start_step, step, config.num_steps
        )
    return learning_rate(config.optimizer, step, last_step)


def _next_state(
    config: Config,
    loader: Loader,
    state: checkpoint.TrainingState,
    step: int,
    lr: float,
    result: StepResult,
) -> checkpoint.TrainingState:
    return checkpoint.TrainingState(
        step,
        state.tokens + config.tokens_per_step,
        loader.fingerprint,
        config.training.seed,
        config.training.global_batch,
        lr,
        state.skipped_steps + (not result.applied),
        state.anneal_start_step,
        state.anneal_start_lr,
    )


def _report_skipped(
    config: Config,
    step: int,
    result: StepResult,
    micro_batches: list[PackedBatch],
    skipped_in_a_row: int,
    ranks: Ranks,
) -> None:
    """Name the documents of an update that was not finite, and end the run after too many."""
    setup = config.training
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
        raise RunError(
            f"step {step}: {skipped_in_a_row} updates in a row were not finite "
            f"(training.max_skipped_steps={setup.max_skipped_steps}); lower optimizer.lr and go on "
            f"from the last checkpoint"
        )


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
    Layout.check(config, ranks.world_size)


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
