"""Where a run starts: its folder is its own, and it goes on from the right checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emotrain.config import Config
from emotrain.data.mixture import Mixture
from emotrain.data.mixture_changes import difference
from emotrain.data.source import DataSource
from emotrain.distributed.mesh import Layout, experts_of_rank
from emotrain.distributed.placement import place_experts
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.folders import MANIFEST, exclusive_lock
from emotrain.modular.placement import check_orders, read_fitting
from emotrain.training.checkpoint_folders import (
    TrainingState,
    descendants,
    find,
    identity,
    list_checkpoints,
    newest,
    read_config,
    read_state,
    set_aside_after,
)
from emotrain.training.engine_protocol import Engine
from emotrain.training.optimizer import anneal_learning_rate, learning_rate

log = logging.getLogger("emotrain")

LOCK = ".lock"
"""File in the run folder that the run holds while it lasts."""


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run goes on from."""

    path: Path
    begins_here: bool = False
    """Whether the run leaves the checkpoint's own run here (`training.resume=PATH`)."""
    anneals_here: bool = False
    """Whether the run begins to anneal here."""
    weights_only: bool = False
    """Whether the run takes the weights and begins anew with them (`finetune.start=PATH`)."""


def compile_kernels(config: Config, ranks: Ranks) -> None:
    """Compile what the steps of this run launch, where it trains on a GPU: no step does it, while
    other ranks wait."""
    if ranks.device.type != "cuda":
        return
    from emotrain.kernels.warm_up import compile_launches

    started = time.monotonic()
    dtype = torch.bfloat16 if config.training.uses_bfloat16("cuda") else torch.float32
    layers = layer_shapes(config, ranks.rank)
    compiled = compile_launches(ranks.device, dtype, layers, config.model.experts.backend)
    if ranks.is_first:
        log.info("%d kernels ready after %.0f s", compiled, time.monotonic() - started)


def layer_shapes(config: Config, rank: int) -> list[dict[str, int]]:
    """What `emotrain.kernels.warm_up` needs to know of each layer."""
    model, ep = config.model, config.parallel.ep
    return [
        {
            "tokens": config.training.micro_batch * config.data.sequence_length,
            "width": model.d_model,
            "hidden": model.experts.hidden,
            "heads": model.num_heads,
            "kv_heads": model.kv_heads,
            "head_width": model.head_dim,
            "num_experts": (routed := model.routed_in_layer(layer)),
            "num_chosen": model.chosen_in_layer(layer),
            "shared": model.experts.shared,
            "ranks": ep,
            "vocab": model.vocab_size,
            "held": experts_of_rank(routed, ep, rank % ep),
            "choice_bias": int(model.router.choice_bias),
        }
        for layer in range(model.num_layers)
    ]


def check_run(config: Config, ranks: Ranks) -> None:
    """Refuse a run that cannot begin.

    Raises:
        UserError: no run folder, no data, no length, or a layout that cannot be.
    """
    for key, value in (
        ("training.run_dir", config.training.run_dir),
        ("data.path", config.data.path),
    ):
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


@contextmanager
def locked(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Within the block no other run writes to this folder. The first rank holds the lock, which
    ends with its process, however that ends.

    Raises:
        UserError: another run holds it, or it is a checkpoint. On all ranks.
    """
    problem = None
    with ExitStack() as stack:
        if ranks.is_first and (run_dir / MANIFEST).is_file():
            problem = f"{run_dir}: is a checkpoint, which a run would spoil; choose another folder"
        elif ranks.is_first:
            run_dir.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(exclusive_lock(run_dir / LOCK)):
                problem = (
                    f"{run_dir}: another process trains in this folder; wait for its end or choose "
                    f"another training.run_dir"
                )
        if problem := next(filter(None, ranks.gather(problem)), None):
            raise UserError(problem)
        yield


def find_source(config: Config, ranks: Ranks) -> Source | None:
    """The checkpoint that the run goes on from; None for a fresh start.

    `training.resume=PATH` says where the run begins. Once the run has written a checkpoint of its
    own since, it goes on from the newest of those: the same command goes on, however often it is
    stopped.
    """
    source, problem = None, None
    if ranks.is_first:
        try:
            source = _find_source(config)
        except (UserError, OSError) as error:
            problem = str(error)
    # A shared file system may show the newest one to some processes first.
    source, problem = ranks.gather((source, problem))[0]
    if problem:
        raise UserError(problem)
    return source


def _find_source(config: Config) -> Source | None:
    setup, run_dir = config.training, Path(config.training.run_dir)
    if setup.resume == "never" and list_checkpoints(run_dir):
        raise UserError(
            f"{run_dir} already holds checkpoints and training.resume=never; choose another "
            f"training.run_dir or resume=auto"
        )
    if setup.resume not in ("auto", "never"):
        start = find(setup.resume)
        if own := descendants(run_dir, identity(start)):
            log.info(
                "%s has gone on from %s since: it is what this run goes on from", own[-1], start
            )
            return Source(own[-1])
        return Source(start, begins_here=True)
    if last := newest(run_dir):
        return Source(last)
    if config.anneal.checkpoint:
        return Source(find(config.anneal.checkpoint), anneals_here=True)
    if config.finetune.start:
        return Source(find(config.finetune.start), weights_only=True)
    return None


def starting_state(
    config: Config, loader: DataSource, engine: Engine, source: Source | None
) -> TrainingState:
    """Load what the run goes on from into the engine; a fresh state where there is nothing.

    Raises:
        UserError: a checkpoint that is damaged or of another run; `data.allow_change` permits other
            data, another batch or another seed.
    """
    setup = config.training
    if source is None or source.weights_only:
        if source is not None:
            engine.restore(source.path, weights_only=True)
            log.info("beginning with the weights of %s", source.path)
        return TrainingState(0, 0, loader.fingerprint, setup.seed, setup.global_batch, 0.0)
    _check_trained(config, source.path)
    state = _restored(engine, source.path)
    state = _with_data(config, loader, source.path, state)
    if source.anneals_here:
        state = replace(state, anneal_start_step=state.step, anneal_start_lr=state.lr)
    elif (state.anneal_start_step >= 0) != bool(config.anneal.checkpoint):
        raise UserError(
            f"{source.path} was {'' if state.anneal_start_step >= 0 else 'not '}annealing; use the "
            f"configuration it was written with, or another training.run_dir"
        )
    last_step = config.num_steps + max(0, state.anneal_start_step)
    if last_step < state.step:
        raise UserError(
            f"{source.path} has {state.step} steps, training.steps={last_step}: nothing is left to "
            f"do; raise training.steps, or go on from an earlier checkpoint"
        )
    if source.begins_here:
        state = replace(state, origins=(*state.origins, identity(source.path)))
    if not source.anneals_here:
        _say_jump(config, source.path, state, last_step)
    log.info("going on from %s", source.path)
    return state


def place(config: Config, ranks: Ranks, engine: Engine, state: TrainingState) -> TrainingState:
    """Put routed experts where `parallel.placement` says. Returns the state with their order.

    Raises:
        UserError: a placement of another model or another number of ranks. On all ranks.
    """
    orders: tuple[tuple[int, ...], ...] = ()
    problem = None
    if ranks.is_first:
        try:
            orders = _orders(config, state)
        except UserError as error:
            problem = str(error)
    orders, problem = ranks.gather((orders, problem))[0]
    if problem:
        raise UserError(problem)
    place_experts(engine.model, orders, engine.optimizer)
    return replace(state, placement=orders)


def _orders(config: Config, state: TrainingState) -> tuple[tuple[int, ...], ...]:
    choice = config.parallel.placement
    if choice == "contiguous":
        return ()
    if choice == "auto":
        if state.placement:
            check_orders("the placement of the checkpoint", state.placement, config.model)
        return state.placement
    return read_fitting(config).orders


def check_sources(config: Config, loader: DataSource, state: TrainingState, last_step: int) -> None:
    """Say of a mixture what the run repeats and what it does not measure.

    Raises:
        UserError: it would read a source more often than its `max_epochs`.
    """
    if not isinstance(loader, Mixture):
        return
    start, end = (
        (step - state.data_start_step) * config.training.global_batch
        for step in (state.step, last_step)
    )
    loader.check_length(end, start)
    if config.finetune.teacher:
        log.info("finetune.teacher: the loss of each source of %s is not logged", config.data.path)


def leave_later_ones(config: Config, source: Source | None, state: TrainingState) -> None:
    """Set aside what the run's folder holds of steps after the one it goes back to."""
    if source is None or not source.begins_here:
        return
    for path in set_aside_after(Path(config.training.run_dir), state.step):
        log.warning(
            "the run goes back to step %d: %s is kept, and no longer part of it", state.step, path
        )


def _check_trained(config: Config, path: Path) -> None:
    """Refuse to go on with the moments of other parameters than those that are trained."""
    then = read_config(path).finetune
    if read_state(path)[1] and then.parts != config.finetune.parts:
        raise UserError(
            f"{path} was written with finetune.train={then.train}, here it is "
            f"{config.finetune.train}: some parameters have no optimizer state; give the same, or "
            f"begin anew with the weights alone: finetune.start={path}"
        )


def _restored(engine: Engine, path: Path) -> TrainingState:
    try:
        return engine.restore(path)
    except UserError as error:
        older = [other for other in list_checkpoints(path.parents[1]) if other.name < path.name]
        if path.parent.name != "checkpoints" or not older:
            raise
        raise UserError(
            f"{error}; training.resume={older[-1]} goes back to the one before it"
        ) from error


def _with_data(
    config: Config, loader: DataSource, path: Path, state: TrainingState
) -> TrainingState:
    """The state with this run's data: as it was, or changed on purpose and read from the start. A
    checkpoint of step 0, such as an import, has read none, and takes any."""
    setup = config.training
    data: dict[str, Any] = {
        "data_fingerprint": loader.fingerprint,
        "seed": setup.seed,
        "global_batch": setup.global_batch,
        "data_start_step": state.step,
    }
    if state.step == 0:
        return replace(state, **data)
    changes = [
        f"with training.{key}={then}, here it is {now}"
        for key, then, now in (
            ("seed", state.seed, setup.seed),
            ("global_batch", state.global_batch, setup.global_batch),
        )
        if then != now
    ]
    read = (state.step - state.data_start_step) * state.global_batch
    if change := difference(state.data_fingerprint, loader.fingerprint, read):
        changes.append(
            f"on other data than {config.data.path} at "
            f"data.sequence_length={config.data.sequence_length} ({change})"
        )
    if not changes:
        return replace(state, data_fingerprint=loader.fingerprint)
    if not config.data.allow_change:
        raise UserError(
            f"{path} was trained {' and '.join(changes)}: the data order would jump; give the "
            f"same, or data.allow_change=true to read the data from their start"
        )
    log.warning(
        "%s was trained %s; the data are read from their start, at step %d",
        path,
        " and ".join(changes),
        state.step,
    )
    return replace(state, **data)


def _say_jump(config: Config, path: Path, state: TrainingState, last_step: int) -> None:
    """Say when the schedule as configured does not go on where the checkpoint stood."""
    if not state.step:
        return
    expected = rate_of(config, state, state.step, last_step)
    if abs(expected - state.lr) > 0.01 * max(expected, state.lr):
        log.warning(
            "the learning rate was %.3g at step %d of %s; the schedule of training.steps=%d would "
            "have had %.3g there and goes on from that",
            state.lr,
            state.step,
            path,
            last_step,
            expected,
        )


def rate_of(config: Config, state: TrainingState, step: int, last_step: int) -> float:
    """Learning rate of a step of the run."""
    if state.anneal_start_step >= 0:
        return anneal_learning_rate(
            state.anneal_start_lr, state.anneal_start_step, step, config.num_steps
        )
    return learning_rate(config.optimizer, step, last_step)
