"""The layout does not change the result: processes, expert parallelism, copies, micro-batches,
recomputation and schedule give the same losses, gradients, gradient norm, clipped update and
routing statistics.

Everything is compared with one process that runs the whole global batch as one micro-batch, in fp64
to 1e-9 and in fp32 to 1e-5, over five steps. Some documents go on in another row, and so in another
micro-batch or process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from emotrain.batch import PackedBatch
from emotrain.config import Config, config_from_dict
from emotrain.distributed.mesh import Layout, build_meshes
from emotrain.distributed.parallelize import materialize, parallelize
from emotrain.distributed.ranks import Ranks
from emotrain.model.transformer import Transformer
from emotrain.training.engine import NativeEngine
from emotrain.training.metrics import routing_metrics
from emotrain.training.optimizer import build_optimizer
from emotrain.training.step import train_step

pytestmark = pytest.mark.layout
ROWS, LENGTH = 8, 24


def config(parallel: dict | None = None, **losses) -> Config:
    """Seven routed experts: they divide by no number of ranks."""
    return config_from_dict(
        {
            "model": {
                "vocab_size": 64,
                "d_model": 16,
                "num_layers": 2,
                "num_heads": 2,
                "init_std": 0.2,
                "experts": {"routed": 7, "shared": 1, "top_k": 2, "hidden": 8},
                "router": {"pool": {"kind": "uniform", "min": 1, "max": 7}},
            },
            "losses": losses,
            "data": {"sequence_length": LENGTH},
            "parallel": parallel or {},
            "optimizer": {"lr": 1e-2, "clip_norm": 0.5},
            "training": {"steps": 1, "global_batch": ROWS, "micro_batch": 1},
        }
    )


def global_batch(step: int) -> tuple[np.ndarray, list[list[int]], list[list[int]]]:
    """Rows of one to three documents; some go on in the next row, some rows end in padding."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 64, (ROWS, LENGTH))
    lengths = [[10, 14], [5, 12, 7], [24], [9, 11, 4]] * 2
    ids = [[100, 101], [101, 7, 8], [8], [8, 55, -1], [200, 201], [201, 17, 18], [18], [18, 65, -1]]
    return tokens, lengths, ids


def micro_batches(step: int, size: int, rank: int, world_size: int) -> list[PackedBatch]:
    tokens, lengths, ids = global_batch(step)
    per_rank = ROWS // world_size
    starts = range(rank * per_rank, (rank + 1) * per_rank, size)
    return [
        PackedBatch.from_segments(
            tokens[s : s + size], lengths[s : s + size], ids[s : s + size], True
        )
        for s in starts
    ]


def build(settings: Config, ranks: Ranks, dtype: torch.dtype) -> Transformer:
    """As `parallelize.build_model`, in any dtype."""
    if not dist.is_initialized():
        return parallelize(Transformer(settings.model).initialize(3).to(dtype), settings)
    with torch.device("meta"):
        model = Transformer(settings.model).to(dtype)
    parallelize(model, settings, build_meshes(Layout.of(settings, ranks.world_size), "cpu"))
    return materialize(model, 3, ranks.device)


def whole(tensors) -> torch.Tensor:
    """All of some tensors, gathered from wherever their parts are."""
    return torch.cat(
        [(t.full_tensor() if isinstance(t, DTensor) else t).detach().flatten() for t in tensors]
    )


def train(
    settings: Config,
    size: int,
    ranks: Ranks,
    steps: int = 5,
    dtype: torch.dtype = torch.float64,
    after_step: Callable[[Transformer], object] = lambda model: None,
) -> list[torch.Tensor]:
    """Losses, clipped gradients and parameters of a few steps."""
    model = build(settings, ranks, dtype)
    optimizer = build_optimizer(model, settings.optimizer)
    record = []
    for step in range(1, steps + 1):
        result = train_step(
            NativeEngine(model),
            micro_batches(step, size, ranks.rank, ranks.world_size),
            settings,
            step,
            ranks,
        )
        routing = routing_metrics(result.reports, ranks)
        record.append(
            torch.tensor(
                [
                    result.loss,
                    result.cross_entropy,
                    result.z,
                    result.balance,
                    result.router_z,
                    result.grad_norm,
                    result.num_targets,
                    *routing["load_imbalance"],
                    *routing["effective_experts"],
                    *routing["token_entropy_nats"],
                    *routing["pool_size_mean"],
                ],
                dtype=torch.float64,
            )
        )
        record.append(whole(p.grad for p in model.parameters()))
        optimizer.step()
        record.append(whole(model.parameters()))
        after_step(model)
    return record


def _worker(rank, world_size, settings, size, folder, options):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    torch.save(train(settings, size, Ranks(rank, world_size), **options), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def run_processes(
    settings: Config, size: int, world_size: int, folder, **options
) -> list[list[torch.Tensor]]:
    """The record of every process."""
    if world_size == 1:
        return [train(settings, size, Ranks(), **options)]
    mp.start_processes(
        _worker,
        (world_size, settings, size, str(folder), options),
        nprocs=world_size,
        start_method="fork",
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


@cache
def expected(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """One process, one micro-batch."""
    return train(config(), ROWS, Ranks(), dtype=dtype)


@dataclass(frozen=True)
class Case:
    world_size: int
    replicate: int
    ep: int
    micro_batches: int
    recompute: str

    @property
    def settings(self) -> Config:
        return config({"replicate": self.replicate, "ep": self.ep, "recompute": self.recompute})

    @property
    def size(self) -> int:
        return ROWS // self.world_size // self.micro_batches

    def __str__(self) -> str:
        return (
            f"{self.world_size}processes-{self.replicate}copies-ep{self.ep}-"
            f"{self.micro_batches}micro-{self.recompute}"
        )


def cases() -> list[Case]:
    """Every layout that fits in four processes."""
    layouts = [
        (world_size, replicate, ep)
        for world_size in (1, 2, 4)
        for replicate in (1, 2, 4)
        for ep in (1, 2, 4)
        if world_size % replicate == 0 and world_size // replicate % ep == 0
    ]
    return [
        Case(*layout, micro, recompute)
        for layout in layouts
        for micro in (1, 2)
        for recompute in ("none", "selective", "full")
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_no_layout_changes_training(case: Case, tmp_path) -> None:
    for record in run_processes(case.settings, case.size, case.world_size, tmp_path):
        for got, wanted in zip(record, expected(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in cases() if case.recompute == "none"], ids=str)
def test_no_layout_changes_training_in_fp32(case: Case, tmp_path) -> None:
    """To 1e-5 of the largest gradient or parameter: rounding is of that size, whatever the
    smaller ones are."""
    for record in run_processes(
        case.settings, case.size, case.world_size, tmp_path, dtype=torch.float32
    ):
        for got, wanted in zip(record, expected(torch.float32), strict=True):
            torch.testing.assert_close(
                got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item()
            )


def test_evaluation_between_steps_changes_nothing() -> None:
    evaluated = train(
        config(), ROWS, Ranks(), after_step=lambda model: model(micro_batches(99, ROWS, 0, 1)[0])
    )
    for got, wanted in zip(evaluated, expected(), strict=True):
        assert torch.equal(got, wanted)


def test_the_running_schedule_is_exact_with_one_micro_batch_and_only_near_with_several():
    joint, running = config(), config(balance_schedule="running")
    one = train(running, ROWS, Ranks(), steps=1)
    several = train(running, 1, Ranks(), steps=1)
    exact = train(joint, 1, Ranks(), steps=1)
    torch.testing.assert_close(one[1], exact[1], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(several[1], exact[1], rtol=1e-6)
    assert torch.dot(several[1], exact[1]) / several[1].norm() / exact[1].norm() > 0.9


def test_scopes_count_what_they_say(tmp_path):
    """data_parallel balances each micro-batch over ranks, micro_batch each one alone."""
    whole = config(balance_scope="data_parallel")
    torch.testing.assert_close(
        train(whole, ROWS, Ranks(), 1)[1], train(config(), ROWS, Ranks(), 1)[1]
    )
    # Two ranks with half of the rows each: one micro-batch a rank is the global batch again.
    for record in run_processes(whole, ROWS // 2, 2, tmp_path):
        torch.testing.assert_close(
            record[1], train(config(), ROWS, Ranks(), 1)[1], rtol=1e-9, atol=1e-12
        )
    # A micro-batch of one row counts itself alone: its experts look less balanced than those of the
    # whole batch do.
    balance = {
        scope: train(config(balance_scope=scope), 1, Ranks(), 1)[0][3]
        for scope in ("micro_batch", "global_batch")
    }
    assert balance["micro_batch"] > balance["global_batch"]


def test_padding_changes_no_loss_gradient_or_statistic():
    """Appending a row of padding to the global batch changes nothing."""
    settings = config()
    tokens, lengths, ids = global_batch(1)
    model = Transformer(settings.model).initialize(3).double()
    results = []
    for rows in (ROWS, ROWS + 1):
        padded = np.concatenate([tokens, np.zeros((1, LENGTH), dtype=tokens.dtype)])[:rows]
        batch = PackedBatch.from_segments(
            padded, [*lengths, [LENGTH]][:rows], [*ids, [-1]][:rows], True
        )
        result = train_step(NativeEngine(model), [batch], settings, 1, Ranks())
        results.append(
            (
                {
                    key: value
                    for key, value in vars(result).items()
                    if key not in ("reports", "micro_batch_losses")
                },
                routing_metrics(result.reports, Ranks()),
                torch.cat([p.grad.flatten() for p in model.parameters()]),
            )
        )
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for key, values in results[0][1].items():
        assert values == pytest.approx(results[1][1][key], rel=1e-12), key
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-9, atol=1e-13)
