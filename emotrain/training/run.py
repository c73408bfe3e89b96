"""A training run: where it starts, its steps, its metrics and checkpoints, how it stops."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emotrain.batch import PackedBatch
from emotrain.config import Config, save_config
from emotrain.data.prefetch import prefetch
from emotrain.data.source import DataSource
from emotrain.distributed.faults import collective_errors, report_not_finite
from emotrain.distributed.joining import join
from emotrain.distributed.ranks import Ranks
from emotrain.errors import DivergedError, RunError
from emotrain.training import checkpoint
from emotrain.training.data_source import build_loader
from emotrain.training.engine import Phase, part
from emotrain.training.engine_protocol import Engine
from emotrain.training.environment import note_start
from emotrain.training.metrics import RunLog
from emotrain.training.numerics import kernels_of_torch
from emotrain.training.placement import reconsider
from emotrain.training.profiling import profiled_steps
from emotrain.training.start import (
    Source,
    check_run,
    check_sources,
    compile_kernels,
    find_source,
    leave_later_ones,
    locked,
    place,
    rate_of,
    starting_state,
)
from emotrain.training.step import train_step
from emotrain.training.step_result import StepResult
from emotrain.training.tuned_engine import build_engine

log = logging.getLogger("emotrain")

NOTHING_TO_LEARN = (
    "step %d: no position of its sequences has a target; see data.cross_document_targets and "
    "data.repetition_filter"
)

Observer = Callable[[Engine, int, bool], dict[str, Any]]
"""Looks at a run after a step and changes nothing of it: (engine, step, whether it is the last) ->
metrics of the step, often none. All ranks call it alike."""


def unobserved(engine: Engine, step: int, is_last: bool) -> dict[str, Any]:
    """No metrics: an `Observer`."""
    return {}


def train(
    config: Config,
    ranks: Ranks | None = None,
    build_engine: Callable[[Config, Ranks, bool], Engine] = build_engine,
    observe: Observer = unobserved,
) -> dict[str, Any]:
    """Train as configured, from the newest checkpoint of the run if there is one. Returns a summary
    of the run.

    On SIGTERM or SIGINT the step in progress is finished, a checkpoint is written, and the summary
    says `interrupted`.

    Args:
        build_engine: makes the model and what updates it.
        observe: is called after every step, before its checkpoint.
    Raises:
        UserError: settings, data or a checkpoint that cannot be used. OSError: disk full or not
            writable. RunError: too many updates in a row were not finite.
    """
    ranks = ranks or join(config.training.device, config.training.collective_timeout_s)
    setup = config.training
    run_dir, under_way = Path(setup.run_dir), Progress()
    check_run(config, ranks)
    with ExitStack() as stack:
        stack.enter_context(kernels_of_torch(config, ranks))
        watch = collective_errors(ranks, setup.collective_timeout_s, lambda: under_way.step)
        stack.enter_context(watch)
        stack.enter_context(locked(run_dir, ranks))
        loader = build_loader(config)
        source = find_source(config, ranks)
        engine = build_engine(config, ranks, source is None)
        compile_kernels(config, ranks)
        state = place(config, ranks, engine, starting_state(config, loader, engine, source))
        first_step, last_step = state.step, config.num_steps + max(0, state.anneal_start_step)
        check_sources(config, loader, state, last_step)
        if ranks.is_first:
            _take_folder(config, source, state, loader, ranks)
        run_log = RunLog(config, ranks, run_dir, first_step, last_step, loader)
        stop_requested = stack.enter_context(_stop_requests())
        checkpoints = stack.enter_context(_checkpoint_writer(config))
        batches = stack.enter_context(_batches(config, loader, state, last_step, ranks))
        stack.enter_context(closing(run_log))
        steps = profiled_steps(batches, first_step + 1, config.profile, ranks, run_dir)
        stack.enter_context(closing(steps))
        for step, micro_batches in steps:
            under_way.step = step
            lr = rate_of(config, state, step, last_step)
            engine.set_learning_rate(lr)
            micro_batches = [batch.to(ranks.device) for batch in micro_batches]
            result = train_step(engine, micro_batches, config, step, ranks, stop_requested())
            if not result.num_targets and ranks.is_first:
                log.warning(NOTHING_TO_LEARN, step)
            under_way.note(result.applied)
            if not result.applied:
                _report_skipped(config, step, result, micro_batches, under_way, ranks)
            state = _next_state(state, config, step, lr, result.applied)
            is_last, stops = step == last_step, result.stop and step < last_step
            state, moved = reconsider(config, engine, state, result.reports, micro_batches, ranks)
            with run_log.aside():
                seen = observe(engine, step, is_last)
            run_log.step(state, result, is_last or stops, moved | seen)
            if _saves(config, step, is_last, stops, under_way, ranks):
                with part(Phase.CHECKPOINT):
                    engine.save(checkpoints, config, state, loader.tokenizer_file)
            under_way.stopped = stops
            if stops:
                break
    saved = checkpoints.last.step if checkpoints.last else first_step
    if under_way.skipped and not under_way.stopped:
        rule = "the run is at its end, and no checkpoint is written of what may be beyond repair"
        raise _diverged(config, state.step, under_way.skipped, rule)
    if state.step > saved and not under_way.skipped:
        raise RunError(
            f"the last checkpoint, of step {state.step}, could not be written; the newest is of "
            f"step {saved}: free space and give the same command again"
        )
    return run_log.summary(state, last_step) | {
        "interrupted": under_way.stopped,
        "checkpoint_step": saved,
    }


def _take_folder(
    config: Config,
    source: Source | None,
    state: checkpoint.TrainingState,
    loader: DataSource,
    ranks: Ranks,
) -> None:
    """Make the run's folder say what is trained from here on, and on what."""
    leave_later_ones(config, source, state)
    save_config(config, Path(config.training.run_dir) / "config.yaml")
    note_start(config, state.step, ranks, loader)


@dataclass
class Progress:
    """Where a run stands, beside what its checkpoints hold."""

    step: int = 0
    """The step under way; 0 before the first."""
    skipped: int = 0
    """Updates skipped in a row, up to now."""
    stopped: bool = False
    """Whether the run was asked to stop before its end."""

    def note(self, applied: bool) -> None:
        self.skipped = 0 if applied else self.skipped + 1


def _saves(
    config: Config, step: int, is_last: bool, stops: bool, under_way: Progress, ranks: Ranks
) -> bool:
    """Whether a checkpoint is written after this step. Not while updates are skipped: the model may
    be beyond repair, and a new checkpoint would take the place of a good one."""
    every = config.training.checkpoint_every
    due = is_last or stops or bool(every and step % every == 0)
    if due and under_way.skipped and ranks.is_first:
        log.warning("step %d: no checkpoint while updates are skipped; the older ones stay", step)
    return due and not under_way.skipped


def _checkpoint_writer(config: Config) -> checkpoint.CheckpointWriter:
    setup = config.training
    return checkpoint.CheckpointWriter(
        Path(setup.run_dir),
        setup.keep_checkpoints,
        setup.async_checkpoints,
        setup.on_checkpoint_error,
        setup.collective_timeout_s,
        permanent_every=setup.permanent_every,
    )


def _batches(
    config: Config,
    loader: DataSource,
    state: checkpoint.TrainingState,
    last_step: int,
    ranks: Ranks,
) -> AbstractContextManager[Iterator[list[PackedBatch]]]:
    """This rank's micro-batches of every step that is left."""
    setup = config.training
    return prefetch(
        loader,
        state.step - state.data_start_step,
        last_step - state.step,
        setup.global_batch,
        setup.micro_batch,
        ranks.rank,
        ranks.world_size,
    )


def _next_state(
    state: checkpoint.TrainingState, config: Config, step: int, lr: float, applied: bool
) -> checkpoint.TrainingState:
    return replace(
        state,
        step=step,
        tokens=state.tokens + config.tokens_per_step,
        lr=lr,
        skipped_steps=state.skipped_steps + (not applied),
    )


def _report_skipped(
    config: Config,
    step: int,
    result: StepResult,
    micro_batches: list[PackedBatch],
    under_way: Progress,
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
    if under_way.skipped >= setup.max_skipped_steps:
        rule = f"training.max_skipped_steps={setup.max_skipped_steps}"
        raise _diverged(config, step, under_way.skipped, rule)


def _diverged(config: Config, step: int, skipped: int, rule: str) -> DivergedError:
    """The error of a run whose last updates were not finite."""
    whole = checkpoint.list_checkpoints(Path(config.training.run_dir))
    last = f"{whole[-1]}, from before that" if whole else "the start: there is no checkpoint"
    return DivergedError(
        f"step {step}: {skipped} updates in a row were not finite ({rule}); lower optimizer.lr "
        f"and go on from {last}"
    )


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
