"""What a run reports: one JSON object a line in RUN_DIR/metrics.jsonl, the same to TensorBoard and
trackers, the load of every expert, and a progress bar."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from emotrain.config import Config
from emotrain.data.mixture import Mixture
from emotrain.data.replacement import ReplacingLoader
from emotrain.data.source import DataSource
from emotrain.distributed.ranks import Ranks
from emotrain.errors import WriteError
from emotrain.files import json_text, write_whole
from emotrain.model.counts import parameter_counts
from emotrain.model.report import RoutingReport
from emotrain.progress import ProgressBar
from emotrain.training.expert_loads import ExpertLoads
from emotrain.training.sinks import Sink, numbers_of, open_sinks

if TYPE_CHECKING:
    from emotrain.training.checkpoint import TrainingState
    from emotrain.training.step_result import StepResult

log = logging.getLogger("emotrain")

PEAK_TFLOPS_BF16 = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "A100": 312.0}
"""Dense bf16 peak by a part of the device's name (vendor data sheets)."""


@torch.no_grad()
def routing_metrics(reports: Sequence[RoutingReport], ranks: Ranks) -> dict[str, Any]:
    """Routing statistics of one step over all its micro-batches and ranks (a reader of
    `RoutingReport`, spec 6.2).

    Per layer: `load_imbalance` = max / mean load, `dead_experts` without a single slot,
    `token_entropy_nats`, `effective_experts` = exp(entropy of a document's mean routing), mean over
    documents, pool sizes, `choice_bias_spread` = max - min of the routers' biases, where they have
    some, and `expert_slots`, the slots of each expert.
    """
    num_layers = len(reports[0].layers)
    if not num_layers:
        return {}
    sums, lows_highs = [], []
    for layer in range(num_layers):
        parts = [report.layers[layer] for report in reports]
        document_sums = torch.zeros(3, dtype=torch.float64, device=parts[0].counts_N.device)
        extremes = document_sums.new_tensor([-torch.inf, -torch.inf])
        for part, report in zip(parts, reports, strict=True):
            real_G = report.real_G
            document_sums[0] += torch.where(real_G, part.effective_experts_G, 0).sum()
            document_sums[1] += real_G.sum()
            if part.pool_size_G is not None:
                size_G = part.pool_size_G.clamp(max=part.counts_N.shape[0]).double()
                document_sums[2] += torch.where(real_G, size_G, 0).sum()
                spread = torch.stack(
                    [
                        torch.where(real_G, -size_G, -torch.inf).max(),
                        torch.where(real_G, size_G, -torch.inf).max(),
                    ]
                )
                extremes = torch.maximum(extremes, spread)
        entropy = torch.stack([part.entropy_sum.double() for part in parts]).sum()[None]
        tokens = torch.stack([report.num_tokens.double() for report in reports]).sum()[None]
        counts_N = torch.stack([part.counts_N for part in parts]).sum(dim=0).double()
        sums.append(torch.cat([counts_N, entropy, tokens, document_sums]))
        lows_highs.append(extremes)
    flat = ranks.sum(torch.cat(sums)).cpu()
    extremes_L2 = ranks.maximum(torch.stack(lows_highs)).cpu()
    metrics: dict[str, Any] = {
        key: []
        for key in (
            "expert_slots",
            "load_imbalance",
            "dead_experts",
            "token_entropy_nats",
            "effective_experts",
            "pool_size_mean",
            "pool_size_min",
            "pool_size_max",
        )
    }
    for layer, values in enumerate(flat.split([len(s) for s in sums])):
        counts_N, (entropy, tokens, effective, documents, pool) = values[:-5], values[-5:].tolist()
        metrics["expert_slots"].append(counts_N.long().tolist())
        metrics["load_imbalance"].append((counts_N.max() / counts_N.mean().clamp(min=1e-30)).item())
        metrics["dead_experts"].append(int((counts_N == 0).sum()))
        metrics["token_entropy_nats"].append(entropy / tokens)
        metrics["effective_experts"].append(effective / documents)
        if extremes_L2[layer, 1] > -torch.inf:
            metrics["pool_size_mean"].append(pool / documents)
            metrics["pool_size_min"].append(int(-extremes_L2[layer, 0]))
            metrics["pool_size_max"].append(int(extremes_L2[layer, 1]))
    spreads = [layer.choice_bias_spread for layer in reports[0].layers]
    if biased := [spread for spread in spreads if spread is not None]:
        metrics["choice_bias_spread"] = torch.stack(biased).tolist()
    return {key: value for key, value in metrics.items() if value}


def source_metrics(
    mixture: Mixture, steps: int, config: Config, result: StepResult, ranks: Ranks
) -> dict[str, float]:
    """Of each source of a mixture: `tokens` read so far, passes over the source (`epochs`), and the
    mean loss of its targets in this step (`loss_nats`), where it has any.

    Args:
        steps: of this mixture up to now.
    """
    read = steps * config.training.global_batch
    metrics: dict[str, float] = {}
    for name, sequences, epochs in zip(
        mixture.names, mixture.order.counts(read), mixture.epochs(read), strict=True
    ):
        metrics[f"data/{name}/tokens"] = sequences * mixture.sequence_length
        metrics[f"data/{name}/epochs"] = epochs
    own = [sums_X2 for sums_X2 in result.by_source if sums_X2 is not None]
    if own:
        sums_X2 = ranks.sum(torch.stack(own).sum(dim=0)).tolist()
        for name, (loss, targets) in zip(mixture.names, sums_X2, strict=True):
            if targets:
                metrics[f"data/{name}/loss_nats"] = loss / targets
    return metrics


def replaced_sequences(data: DataSource, step: int, config: Config, ranks: Ranks) -> dict[str, int]:
    """`data/replaced_sequences`: how many sequences of a step were read in the place of others;
    nothing where none ever is.

    Args:
        step: of these data, from 0.
    """
    share = config.training.global_batch // ranks.world_size
    first = step * config.training.global_batch + ranks.rank * share
    positions = np.arange(first, first + share)
    parts: list[tuple[DataSource, np.ndarray]]
    if isinstance(data, Mixture):
        source_B, place_B = data.order.locate(positions)
        parts = [(s.loader, place_B[source_B == i]) for i, s in enumerate(data.sources)]
    else:
        parts = [(data, positions)]
    found = [d.replaced_among(p) for d, p in parts if isinstance(d, ReplacingLoader)]
    if not found:
        return {}
    total = ranks.sum(torch.tensor([float(sum(found))], device=ranks.device))
    return {"data/replaced_sequences": int(total.item())}


def flops_per_token(config: Config) -> float:
    """FLOPs of forward and backward for one token: 6 per active parameter outside the input
    embedding, and 12 * L * D * S / 2 for causal attention over a whole sequence (documents cut
    it shorter; not subtracted)."""
    counts = parameter_counts(config.model)
    matmul = counts["active_parameters"] - counts["embedding_parameters"]
    return (
        6.0 * matmul
        + 6.0 * config.model.num_layers * config.model.d_model * config.data.sequence_length
    )


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s of one device, where it is known."""
    if config.training.peak_tflops:
        return config.training.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS_BF16.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory held so far: of the GPU's allocator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsWriter:
    """Appends metrics to RUN_DIR/metrics.jsonl and expert loads to their own file, and hands the
    metrics to sinks. Only the first rank writes.

    A resumed run goes on from the checkpoint's step: lines after it are removed, so that each step
    stands once.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        sinks: Sequence[Sink] = (),
        log_every: int = 0,
        on_error: str = "stop",
    ):
        """
        Args:
            log_every: steps between lines, where a gap before `start_step` is to be said.
            on_error: what a line that cannot be written does: `stop`, or `warn` and go on.
        """
        self.path, self.on_error, self.sinks = run_dir / "metrics.jsonl", on_error, sinks
        kept, last = [], 0
        if self.path.is_file():
            # A disk block gone bad is no reason to lose the run.
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    step = json.loads(line)["step"]
                    if step <= start_step:
                        kept.append(line + "\n")
                        last = max(last, step)
                except (ValueError, KeyError, TypeError):
                    log.warning(
                        "%s: dropped a line that is not a metrics record: %.60s", self.path, line
                    )
        if log_every and start_step - last > log_every:
            log.warning(
                "%s: nothing of steps %d to %d, which the checkpoint has seen",
                self.path,
                last + 1,
                start_step,
            )
        write_whole(self.path, "".join(kept).encode("utf-8"))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (until close)
        self.loads = ExpertLoads(run_dir, start_step, log_every or 1)

    def write(self, metrics: dict[str, Any], expert_slots: Sequence[Sequence[int]] = ()) -> None:
        """
        Args:
            metrics: a line of metrics.jsonl, with its `step`.
            expert_slots: for each layer with routed experts the slots of each expert.
        """
        step = metrics["step"]
        try:
            self._file.write(json_text(metrics) + "\n")
            self._file.flush()
            self.loads.write(step, expert_slots)
        except OSError as error:
            message = f"{self.path}: could not be written ({error.strerror or error})"
            if self.on_error == "stop":
                raise WriteError(
                    f"{message}; free space and give the same command again"
                ) from error
            log.warning("%s; training goes on (training.on_checkpoint_error=warn)", message)
        numbers = numbers_of(metrics)
        for sink in self.sinks:
            sink.write(step, numbers)

    def close(self) -> None:
        for file in (self._file, self.loads):
            try:
                file.close()
            except OSError as error:
                # `write` has said or raised it before.
                log.warning("%s: not complete (%s)", self.path, error.strerror or error)
        for sink in self.sinks:
            sink.close()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class RunLog:
    """What a run says of itself: metrics to files and a line or a bar to stderr."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        run_dir: Path,
        first_step: int,
        last_step: int,
        data: DataSource | None = None,
    ):
        """`data`: of the run; of a mixture each source has metrics of its own."""
        self.config, self.ranks, self.run_dir, self.data = config, ranks, run_dir, data
        self.writer = (
            MetricsWriter(
                run_dir,
                first_step,
                open_sinks(config, run_dir, first_step),
                config.training.log_every,
                config.training.on_checkpoint_error,
            )
            if ranks.is_first
            else None
        )
        self.bar = ProgressBar("steps", shown=ranks.is_first, stays=True)
        self.bar.start("training", last_step, first_step)
        self.flops, self.peak = flops_per_token(config), peak_flops(config, ranks.device)
        self.first_step = self.logged_step = first_step
        self.started = self.logged_time = time.perf_counter()
        self.tokens_per_second = self.seconds_aside = 0.0
        self.metrics: dict[str, Any] = {}

    def step(
        self, state: TrainingState, result: StepResult, is_end: bool, more: Mapping[str, Any]
    ) -> None:
        """Note a finished step; at every `log_every`-th one, the last and those with `more` to
        say, write its metrics."""
        logged = state.step % self.config.training.log_every == 0 or is_end or bool(more)
        if logged:
            expert_slots = self._measure(state, result)
            self.metrics |= more
            if self.writer is not None:
                self.writer.write(self.metrics, expert_slots)
        note = f"loss {result.cross_entropy:.3f}  {self.tokens_per_second:,.0f} tokens/s"
        if "load_imbalance" in self.metrics:
            note += f"  load max/mean {mean(self.metrics['load_imbalance']):.2f}"
        self.bar.update(state.step, note, line=logged)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The time of the block is no time of training: rates do not count it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.logged_time += spent
            self.seconds_aside += spent

    def _measure(self, state: TrainingState, result: StepResult) -> list[list[int]]:
        """Take the metrics of a step; returns the slots of each expert, which are too many for a
        line of metrics."""
        routing = routing_metrics(result.reports, self.ranks)
        expert_slots: list[list[int]] = routing.pop("expert_slots", [])
        now = time.perf_counter()
        num_tokens = (state.step - self.logged_step) * self.config.tokens_per_step
        self.tokens_per_second = num_tokens / (now - self.logged_time)
        self.logged_time, self.logged_step = now, state.step
        self.metrics = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": result.loss,
            "cross_entropy": result.cross_entropy,
            "z_loss": result.z,
            "balance_loss": result.balance,
            "router_z_loss": result.router_z,
            "lr": state.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": self.tokens_per_second,
            "memory_gib": peak_memory_gib(self.ranks.device),
            "skipped_steps": state.skipped_steps,
            **routing,
        }
        steps = state.step - state.data_start_step
        if self.data is not None:
            self.metrics |= replaced_sequences(self.data, steps - 1, self.config, self.ranks)
        if isinstance(self.data, Mixture):
            self.metrics |= source_metrics(self.data, steps, self.config, result, self.ranks)
        if self.peak is not None:
            rate = self.tokens_per_second * self.flops
            self.metrics["mfu"] = rate / (self.peak * self.ranks.world_size)
        return expert_slots

    def summary(self, state: TrainingState, last_step: int) -> dict[str, Any]:
        """What `emotrain train --json` prints."""
        seconds = time.perf_counter() - self.started
        num_tokens = (state.step - self.first_step) * self.config.tokens_per_step
        return {
            "run_dir": str(self.run_dir),
            "step": state.step,
            "last_step": last_step,
            "tokens": state.tokens,
            "seconds": seconds,
            "mean_tokens_per_second": num_tokens / (seconds - self.seconds_aside),
            "metrics": self.metrics,
        }

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
