"""A few training steps of a small model on any layout, and the layouts that tests compare.

Three things make a case: how the run is laid out, which model it trains, and how documents lie in
its batch. Whatever the layout, a step gives a `Step` of whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from emotrain.batch import PackedBatch
from emotrain.config import Config, config_from_dict
from emotrain.data.packing import packed_rows
from emotrain.distributed.mesh import Layout, build_meshes
from emotrain.distributed.parallelize import materialize, parallelize
from emotrain.distributed.placement import place_experts
from emotrain.distributed.ranks import Ranks
from emotrain.model.parts import CHOICE_BIAS, stored_tensors
from emotrain.model.transformer import Transformer
from emotrain.training.engine import NativeEngine
from emotrain.training.metrics import routing_metrics
from emotrain.training.optimizer import build_optimizer
from emotrain.training.step import train_step
from tests.processes import run_ranks

ROWS, LENGTH = 8, 24


# ---- what is trained

MODELS: dict[str, dict[str, Any]] = {
    "published": {},
    "sigmoid": {"router": {"gating": "sigmoid", "normalize_weights": True}},
    "pools of one": {"router": {"pool": {"kind": "fixed", "size": 1}}},
    "pools below top_k": {
        "experts": {"top_k": 4},
        "router": {"pool": {"kind": "uniform", "min": 1, "max": 3}},
    },
    "no pool": {"router": {"pool": {"kind": "none"}}},
    "7 and 4 experts": {
        "experts": {"routed_per_layer": [7, 4]},
        "router": {"pool": {"kind": "uniform", "min": 1, "max": 4}},
    },
    "one bank": {"experts": {"sharing": "all"}},
    "pools of parts": {
        "router": {
            "pool": {
                **{"kind": "uniform", "min": 1, "max": 7, "unit": "segment:5"},
                **{"chosen_by": "other_part", "scores": "unmasked"},
            }
        }
    },
    "pools across windows": {
        "router": {"pool": {"kind": "uniform", "min": 1, "max": 7, "across_windows": 2}}
    },
    "pools by a prefix": {
        "router": {
            "pool": {
                **{"kind": "fixed", "size": 3, "chosen_by": "prefix:4"},
                **{"none_share": 0.2, "warmup_steps": 2},
            }
        }
    },
    "biased": {},
    "biased bank": {"experts": {"sharing": "all"}, "router": {"gating": "sigmoid"}},
}
"""What differs from `config()`, whose pools have one to seven experts for two choices."""

BIASED = {"balance_method": "bias", "balance": 0.0, "bias_rate": 0.05}
"""Losses of the models whose name begins so: a step of a bias changes choices."""

ROUTING = (
    "load_imbalance",
    "dead_experts",
    "effective_experts",
    "token_entropy_nats",
    "pool_size_mean",
    "pool_size_min",
    "pool_size_max",
)
"""Statistics of each layer, of pools only where there are some."""

DOCUMENTS = ("mixed", "uneven", "length one")


def config(
    parallel: dict | None = None, model: str = "published", rows: int = ROWS, **losses: Any
) -> Config:
    """Seven routed experts: they divide by no number of ranks. `rows` make a global batch."""
    changes = MODELS[model]
    experts = {"routed": 7, "shared": 1, "top_k": 2, "hidden": 8, **changes.get("experts", {})}
    router = {"pool": {"kind": "uniform", "min": 1, "max": 7}, **changes.get("router", {})}
    windows = router["pool"].get("across_windows", 1)
    return config_from_dict(
        {
            "model": {
                "vocab_size": 64,
                "d_model": 16,
                "num_layers": 2,
                "num_heads": 2,
                "init_std": 0.2,
                "experts": experts,
                "router": router,
            },
            "losses": {**(BIASED if model.startswith("biased") else {}), **losses},
            "data": {"sequence_length": LENGTH},
            "parallel": parallel or {},
            "optimizer": {"lr": 1e-2, "clip_norm": 0.5},
            # Rows of a micro-batch are a case's own.
            "training": {"steps": 1, "global_batch": rows, "micro_batch": windows},
        }
    )


def global_batch(
    step: int, documents: str = "mixed"
) -> tuple[np.ndarray, list[list[int]], list[list[int]]]:
    """Tokens, and for each row the lengths and permanent ids of its documents.

    `mixed`: one to three documents a row; some go on in the next row, some rows end in padding.
    `uneven`: two rows of padding, two of documents of one token, four of `mixed`: with four ranks
    the first has nothing, and targets within documents alone would leave the second nothing to
    learn. `length one`: every token is a document.
    """
    tokens = np.random.default_rng(step).integers(0, 64, (ROWS, LENGTH))
    lengths = [[10, 14], [5, 12, 7], [24], [9, 11, 4]] * 2
    ids = [[100, 101], [101, 7, 8], [8], [8, 55, -1], [200, 201], [201, 17, 18], [18], [18, 65, -1]]
    ones = [[1] * LENGTH] * ROWS
    numbers = [[1000 + LENGTH * row + column for column in range(LENGTH)] for row in range(ROWS)]
    if documents == "length one":
        lengths, ids = ones, numbers
    elif documents == "uneven":
        lengths = [[LENGTH], [LENGTH], *ones[2:4], *lengths[4:]]
        ids = [[-1], [-1], *numbers[2:4], *ids[4:]]
    return tokens, lengths, ids


def micro_batches(
    step: int,
    size: int,
    rank: int,
    world_size: int,
    documents: str = "mixed",
    rows: int = ROWS,
) -> list[PackedBatch]:
    """This rank's micro-batches of `size` rows, out of the first `rows` of the global batch."""
    tokens, lengths, ids = global_batch(step, documents)
    per_rank = rows // world_size
    starts = range(rank * per_rank, (rank + 1) * per_rank, size)
    return [
        packed_rows(
            tokens[s : s + size], lengths[s : s + size], ids[s : s + size], documents != "uneven"
        )
        for s in starts
    ]


# ---- how it is trained


class Model(Transformer):
    """Starts from norm gains that are not 1: those would be the same in every precision."""

    @torch.no_grad()
    def fill(self, part, name, seed, *box):
        super().fill(part, name, seed, *box)
        if part.ndim == 1 and not name.endswith(CHOICE_BIAS):
            offsets, shape = box or ([0], part.shape)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
            gains, first = 1 + 0.3 * noise, offsets[0]
            part.copy_(gains[first : first + len(part)])


@dataclass(frozen=True)
class Step:
    """What one step gave, over all ranks."""

    numbers: Tensor
    """Losses, the gradient norm before clipping and the routing statistics, fp64."""
    gradients: dict[str, Tensor]
    """After clipping, by the parameter's name."""
    parameters: dict[str, Tensor]
    """After the update, and the biases of routers."""


def build(settings: Config, ranks: Ranks, dtype: torch.dtype) -> Transformer:
    """As `parallelize.build_model`, in any dtype."""
    if not dist.is_initialized():
        return parallelize(Model(settings.model).initialize(3).to(dtype), settings)
    with torch.device("meta"):
        model = Model(settings.model).to(dtype)
    parallelize(model, settings, build_meshes(Layout.of(settings, ranks.world_size), "cpu"))
    return materialize(model, 3, ranks.device)


def whole(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """All of some tensors, gathered from wherever their parts are."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors
    }


def back_by_number(gradients: dict[str, Tensor], model: Transformer) -> None:
    """Put the gradients of placed experts into the order of their numbers."""
    for index, block in enumerate(model.blocks):
        for name in ("gate_up_NFD", "down_NHD"):
            # Layers of one bank name its parameters once.
            if (key := f"blocks.{index}.moe.experts.{name}") in gradients:
                order_N = torch.tensor(block.moe.dispatcher.order)
                gradients[key] = gradients[key][order_N.argsort()]


def random_orders(settings: Config, seed: int = 0) -> list[tuple[int, ...]]:
    """An order of the experts of each layer, the same for layers of one bank."""
    model, random = settings.model, np.random.default_rng(seed)
    of_bank = {
        model.bank_of_layer(layer): tuple(random.permutation(model.routed_in_layer(layer)).tolist())
        for layer in range(model.num_layers)
    }
    return [of_bank[model.bank_of_layer(layer)] for layer in range(model.num_layers)]


def train(
    settings: Config,
    size: int,
    ranks: Ranks,
    steps: int = 5,
    dtype: torch.dtype = torch.float64,
    documents: str = "mixed",
    after_step: Callable[[Transformer], object] = lambda model: None,
    placed: bool = False,
) -> list[Step]:
    """A few steps with micro-batches of `size` rows. `placed` experts lie in another random order
    in each of them."""
    model = build(settings, ranks, dtype)
    optimizer = build_optimizer(model, settings.optimizer)
    engine = NativeEngine(model, optimizer, settings.training.uses_bfloat16("cpu"))
    rows = settings.training.global_batch
    record = []
    for step in range(1, steps + 1):
        if placed:
            place_experts(model, random_orders(settings, step), optimizer)
        batches = micro_batches(step, size, ranks.rank, ranks.world_size, documents, rows)
        result = train_step(engine, batches, settings, step, ranks)
        numbers = [
            result.loss,
            result.cross_entropy,
            result.z,
            result.balance,
            result.router_z,
            result.grad_norm,
            result.num_targets,
        ]
        routing = routing_metrics(result.reports, ranks)
        for name in ROUTING:
            numbers += routing.get(name, ())
        gradients = whole((name, p.grad) for name, p in model.named_parameters())
        if placed:
            back_by_number(gradients, model)
        place_experts(model, (), optimizer)
        record.append(
            Step(
                torch.tensor(numbers, dtype=torch.float64),
                gradients,
                whole(stored_tensors(model).items()),
            )
        )
        after_step(model)
    return record


def train_on(world_size: int, settings: Config, size: int, **options: Any) -> list[list[Step]]:
    """The record of every rank."""
    if world_size == 1:
        return [train(settings, size, Ranks(), **options)]
    return run_ranks(lambda ranks: train(settings, size, ranks, **options), world_size)


# ---- the cases


@dataclass(frozen=True)
class Case:
    """A run and its layout."""

    world_size: int
    replicate: int
    ep: int
    micro_batches: int = 1
    recompute: str = "none"
    reshard: bool = True
    explicit_shard: bool = False
    """Whether `parallel.shard` is written out."""
    model: str = "published"
    documents: str = "mixed"
    placed: bool = False
    """Whether experts move to other ranks before each step."""

    @property
    def layout(self) -> tuple[int, int, int]:
        """Processes, copies and ranks of experts."""
        return self.world_size, self.replicate, self.ep

    @property
    def rows(self) -> int:
        """Rows of the global batch: three ranks share six."""
        return ROWS - ROWS % self.world_size

    @property
    def size(self) -> int:
        """Rows of a micro-batch."""
        return self.rows // self.world_size // self.micro_batches

    def settings(self, **training: Any) -> Config:
        parallel = {
            "replicate": self.replicate,
            "shard": self.world_size // self.replicate if self.explicit_shard else 0,
            "ep": self.ep,
            "recompute": self.recompute,
            "reshard_after_forward": self.reshard,
        }
        return with_training(config(parallel, self.model, self.rows), **training)

    def train_as(
        self, ranks: Ranks, steps: int, dtype: torch.dtype = torch.float64, **training: Any
    ) -> list[Step]:
        """The record of one of its ranks."""
        settings = self.settings(**training)
        return train(settings, self.size, ranks, steps, dtype, self.documents, placed=self.placed)

    def train(
        self, steps: int, dtype: torch.dtype = torch.float64, **training: Any
    ) -> list[list[Step]]:
        """The record of every rank."""
        if self.world_size == 1:
            return [self.train_as(Ranks(), steps, dtype, **training)]
        return run_ranks(
            lambda ranks: self.train_as(ranks, steps, dtype, **training), self.world_size
        )

    def __str__(self) -> str:
        words = [
            f"{self.world_size}processes",
            f"{self.replicate}copies",
            f"ep{self.ep}",
            f"{self.micro_batches}micro",
            self.recompute,
            "" if self.reshard else "gathered",
            "shard" if self.explicit_shard else "",
            "" if self.model == "published" else self.model,
            "" if self.documents == "mixed" else self.documents,
            "placed" if self.placed else "",
        ]
        return "-".join(word.replace(" ", "_") for word in words if word)


def with_training(settings: Config, **training: Any) -> Config:
    return replace(settings, training=replace(settings.training, **training))


@cache
def one_process(
    model: str,
    documents: str,
    rows: int,
    steps: int,
    dtype: torch.dtype = torch.float64,
    precision: str = "float32",
) -> list[Step]:
    """One process, one micro-batch of all rows."""
    settings = with_training(config(None, model, rows), precision=precision)
    return train(settings, rows, Ranks(), steps, dtype, documents)


def layouts(*sizes: int) -> list[tuple[int, int, int]]:
    """(processes, copies, ep) of every layout of so many processes."""
    return [
        (world_size, replicate, ep)
        for world_size in sizes
        for replicate in (1, 2, 3, 4)
        for ep in (1, 2, 3, 4)
        if world_size % replicate == 0 and world_size // replicate % ep == 0
    ]
