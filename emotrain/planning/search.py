"""Other settings of the same model, global batch and cluster: the least change that makes a run
fit, and the fastest layout.

A first pass measures each candidate on two sizes of the model and of the step, a layer and a
micro-batch apart, and extrapolates: what a step does, keeps and takes is linear in both. The best
few are then measured whole.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from emotrain.config import Config
from emotrain.distributed.mesh import Layout, Meshes
from emotrain.model.counts import parameter_counts
from emotrain.model.transformer import Transformer
from emotrain.planning.dry_run import Measured, dry_run
from emotrain.planning.hardware import Cluster, Reserve
from emotrain.planning.plan import Plan, make_plan
from emotrain.planning.stand_ins import Routing
from emotrain.progress import ProgressBar

WHOLE = 3
"""Layouts of the first pass that are measured whole."""
STATE_BYTES = 16
"""Of a parameter: itself, its gradient and two moments in fp32."""
LAYERS = 3
"""Layers from which on a further one takes as long as any: one between the first and the last."""


@dataclass(frozen=True)
class Change:
    """Settings, and what they make of a plan."""

    settings: tuple[tuple[str, Any], ...]
    fits: bool
    peak_gib: float
    tokens_per_second: float
    step_seconds: float
    spare_gib: float
    """Usable memory less the peak."""
    plan: Plan | None = None
    """The whole plan, where it was made."""

    @classmethod
    def of(cls, settings: Sequence[tuple[str, Any]], plan: Plan, whole: bool) -> Change:
        return cls(
            tuple(settings),
            plan.fits,
            plan.peak_gib,
            plan.tokens_per_second,
            plan.times["expected"].step,
            plan.usable_gib - plan.peak_gib,
            plan if whole else None,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "fits": self.fits,
            "peak_gib": self.peak_gib,
            "step_seconds": self.step_seconds,
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "measured_whole": self.plan is not None,
        }


def with_settings(config: Config, settings: Sequence[tuple[str, Any]]) -> Config:
    """The configuration with `section.key` settings changed."""
    for key, value in settings:
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def extrapolated(
    config: Config,
    cluster: Cluster,
    routing: Routing,
    shard: Callable[[Transformer, Config, Meshes], None] | None = None,
) -> Measured:
    """A step measured with few layers, one more, and with few micro-batches, extrapolated to those
    of the configuration. `shard` is that of `dry_run`."""
    layers = config.model.num_layers
    micro_batches = config.training.global_batch // (
        config.training.micro_batch * cluster.world_size
    )
    if layers <= LAYERS + 1 or config.model.experts.routed_per_layer:
        return dry_run(config, cluster.world_size, cluster.gpu.target, routing, shard)

    def small(num_layers: int, count: int) -> Measured:
        training = replace(
            config.training, global_batch=count * config.training.micro_batch * cluster.world_size
        )
        model = replace(config.model, num_layers=num_layers)
        smaller = replace(config, model=model, training=training)
        return dry_run(smaller, cluster.world_size, cluster.gpu.target, routing, shard)

    # From the second micro-batch on, gradients are there and parameters still gathered when memory
    # is at its peak: it grows from there.
    fewest = min(micro_batches, 2)
    more_layers, more_steps = layers - LAYERS, micro_batches - fewest
    corners = {
        (a, b): small(LAYERS + a, fewest + b)
        for a in (0, 1)
        for b in ((0, 1) if more_steps else (0,))
    }
    weights = {
        (a, b): (more_layers if a else 1 - more_layers) * (more_steps if b else 1 - more_steps)
        for a, b in corners
    }

    def blend(name: str) -> dict[Any, int]:
        total: Counter[Any] = Counter()
        for corner, measured in corners.items():
            for key, number in getattr(measured, name).items():
                total[key] += weights[corner] * number
        return {key: number for key, number in total.items() if number}

    last = corners[max(corners)]
    at_peak = blend("at_peak")
    return replace(
        last,
        at_peak=at_peak,
        peak_bytes=sum(at_peak.values()),
        state_bytes=blend("state_bytes"),
        kernels=blend("kernels"),
        collectives=blend("collectives"),
        tasks=(),
        micro_batches=micro_batches,
        tokens=micro_batches * (last.tokens // last.micro_batches),
        waits=sum(weights[corner] * measured.waits for corner, measured in corners.items()),
        seconds=sum(measured.seconds for measured in corners.values()),
        small=[(weights[corner], measured) for corner, measured in corners.items()],
    )


def search(config: Config, cluster: Cluster, routing: Routing) -> list[Change]:
    """Layouts that fit, fastest first; the best of them measured whole."""
    families = list(_families(config, cluster))
    found: list[Change] = []
    with _workers(len(families)) as workers, ProgressBar("families of layouts") as bar:
        bar.start("planning", len(families))
        pending = [
            workers.submit(_best_of_family, config, cluster, routing, family) for family in families
        ]
        for done in as_completed(pending):
            found += done.result()
            bar.advance()
    found.sort(key=lambda change: -change.tokens_per_second)
    whole: list[Change] = []
    for change in found:
        if sum(entry.fits for entry in whole) == WHOLE:
            break
        changed = with_settings(config, change.settings)
        whole.append(Change.of(change.settings, make_plan(changed, cluster, routing), whole=True))
    rest = found[len(whole) :]
    return (
        sorted(
            (change for change in whole if change.fits),
            key=lambda change: -change.tokens_per_second,
        )
        + rest
    )


def advice(
    config: Config, cluster: Cluster, routing: Routing, deepspeed: str | None = None
) -> list[Change]:
    """Changes that make a configuration fit, the one that costs the least time first; each was
    planned, with DeepSpeed's options where they are given."""
    if deepspeed is None:
        remedies = _remedies(config, cluster)
        tried = [_change(config, cluster, routing, settings) for settings in remedies]
    else:
        from emotrain.planning.zero import remedies_of_zero, zero_plan

        tried = [
            Change.of(
                settings,
                zero_plan(deepspeed, with_settings(config, settings), cluster, routing),
                whole=False,
            )
            for settings in remedies_of_zero(config, cluster, deepspeed)
        ]
    return sorted(
        (change for change in tried if change.fits), key=lambda change: -change.tokens_per_second
    )


def _remedies(config: Config, cluster: Cluster) -> Iterator[list[tuple[str, Any]]]:
    """One change each, then pairs of them."""
    parallel = config.parallel
    single: list[tuple[str, Any]] = []
    if not parallel.reshard_after_forward:
        single.append(("parallel.reshard_after_forward", True))
    if config.losses.balance_schedule == "joint" and _waits_for_counts(config):
        single.append(("losses.balance_schedule", "running"))
    kinds = ("none", "selective", "full")
    single += [
        ("parallel.recompute", kind) for kind in kinds[kinds.index(parallel.recompute) + 1 :]
    ]
    if config.training.micro_batch % 2 == 0:
        single.append(("training.micro_batch", config.training.micro_batch // 2))
    if parallel.replicate > 1:
        single.append(("parallel.replicate", 1))
    if parallel.ep == 1 and cluster.gpus_per_node > 1:
        single.append(("parallel.ep", cluster.gpus_per_node))
    for size in (1, 2):
        for settings in itertools.combinations(single, size):
            if len({key for key, _ in settings}) == size and _is_valid(
                with_settings(config, settings), cluster
            ):
                yield [
                    *settings,
                    *([("parallel.shard", 0)] if ("parallel.replicate", 1) in settings else []),
                ]


def _families(config: Config, cluster: Cluster) -> Iterator[list[list[tuple[str, Any]]]]:
    """What decides a layout: expert parallelism inside a node and copies of the model make a
    family, whose members differ in the sequences of a micro-batch, most first. One whose state
    alone is too much is left out."""
    a_rank = config.training.global_batch // cluster.world_size
    state = STATE_BYTES * parameter_counts(config.model)["total_parameters"]
    room = Reserve().usable_gib(cluster.gpu, 0) * 2**30
    for ep in _divisors(cluster.gpus_per_node):
        for replicate in _divisors(cluster.world_size // ep):
            if state * replicate / cluster.world_size > room:
                continue
            family = [
                [
                    ("parallel.ep", ep),
                    ("parallel.replicate", replicate),
                    ("parallel.shard", 0),
                    ("training.micro_batch", micro_batch),
                ]
                for micro_batch in reversed(_divisors(a_rank))
            ]
            family = [one for one in family if _is_valid(with_settings(config, one), cluster)]
            if family:
                yield family


def _waits_for_counts(config: Config) -> bool:
    """Whether `losses.balance_schedule` makes a difference."""
    losses = config.losses
    return losses.balance_scope == "global_batch" and losses.balance_method == "loss"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _best_of_family(
    config: Config, cluster: Cluster, routing: Routing, family: list[list[tuple[str, Any]]]
) -> list[Change]:
    """The best of each micro-batch that fits, until one recomputes nothing: a smaller one does the
    same arithmetic in smaller pieces, and gathers and reduces for each of them. All it can win is
    memory."""
    found, gathers = [], _Gathers(config, cluster, routing)
    for settings in family:
        best = _best_choice(config, cluster, gathers, settings)
        if best is not None:
            found.append(best)
            if dict(best.settings)["parallel.recompute"] == "none":
                break
    return found


def _best_choice(
    config: Config, cluster: Cluster, gathers: _Gathers, family: list[tuple[str, Any]]
) -> Change | None:
    """The fastest choice of the rest that fits. Recomputing more never makes a step faster, so that
    of each schedule the first that fits is its best."""
    changed = with_settings(config, family)
    several = config.training.global_batch > changed.training.micro_batch * cluster.world_size
    schedules = (
        ("joint", "running")
        if several and _waits_for_counts(config)
        else (config.losses.balance_schedule,)
    )
    best = None
    for schedule in schedules:
        for recompute in ("none", "selective", "full"):
            change = gathers.best(
                [
                    *family,
                    ("losses.balance_schedule", schedule),
                    ("parallel.recompute", recompute),
                ]
            )
            if not change.fits:
                continue
            if best is None or change.tokens_per_second > 1.001 * best.tokens_per_second:
                best = change
            break
        if best is not None and dict(best.settings)["parallel.recompute"] == "none":
            # The exact schedule needs no recomputation: the approximate one has nothing to win.
            break
    return best


@dataclass
class _Gathers:
    """Whether parameters are gathered again in backward. That they stay gathered never makes a step
    slower, and takes memory: in one family of layouts about as much each time."""

    config: Config
    cluster: Cluster
    routing: Routing
    kept_gib: float | None = None
    """How much memory, once it was seen not to fit."""

    def best(self, settings: Sequence[tuple[str, Any]]) -> Change:
        """The faster one of those that fit, or one that does not."""
        if self.kept_gib is None:
            kept = self._change(settings, False)
            if kept.fits:
                return kept
            again = self._change(settings, True)
            self.kept_gib = kept.peak_gib - again.peak_gib
            return again
        again = self._change(settings, True)
        if again.fits and again.spare_gib > 0.9 * self.kept_gib:
            kept = self._change(settings, False)
            return kept if kept.fits else again
        return again

    def _change(self, settings: Sequence[tuple[str, Any]], again: bool) -> Change:
        whole = [*settings, ("parallel.reshard_after_forward", again)]
        return _compiled_or_not(self.config, self.cluster, self.routing, whole)


def _change(
    config: Config, cluster: Cluster, routing: Routing, settings: Sequence[tuple[str, Any]]
) -> Change:
    changed = with_settings(config, settings)
    measured = extrapolated(changed, cluster, routing)
    return Change.of(settings, make_plan(changed, cluster, routing, measured), whole=False)


def _compiled_or_not(
    config: Config, cluster: Cluster, routing: Routing, settings: Sequence[tuple[str, Any]]
) -> Change:
    """The faster of both. They are measured alike: compiled blocks compute the same."""
    changed = with_settings(config, settings)
    measured = extrapolated(changed, cluster, routing)
    found = []
    for compiled in (False, True):
        key = [("training.compile", compiled)]
        plan = make_plan(with_settings(changed, key), cluster, routing, measured)
        found.append(Change.of([*settings, *key], plan, whole=False))
    return max(found, key=lambda change: change.tokens_per_second)


def _is_valid(config: Config, cluster: Cluster) -> bool:
    try:
        Layout.check(config, cluster.world_size)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _workers(tasks: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for dry runs, which share nothing: a process has one process group."""
    with ProcessPoolExecutor(
        max(1, min(tasks, os.cpu_count() or 1)), mp_context=get_context("spawn")
    ) as workers:
        yield workers
