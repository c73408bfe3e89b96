"""An evaluation gives the same numbers on any number of processes and any layout, and from a
checkpoint of any: the model is loaded into its parts, documents are divided over ranks, and the
greedy choice of experts runs on parts of the model as its forward pass does.

One process is the oracle (tests/test_evaluation.py compares it with loops). Its numbers and those
of other layouts differ by rounding alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_config
from test_evaluation_run import write_data

from emotrain.distributed.parallelize import build_model
from emotrain.distributed.ranks import Ranks
from emotrain.distributed.shares import share
from emotrain.errors import UserError
from emotrain.evaluation.measure import evaluate
from emotrain.evaluation.perplexity import pack
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.training.checkpoint import CheckpointWriter, TrainingState, find
from emotrain.training.optimizer import build_optimizer
from tests.conftest import run_command
from tests.processes import run_ranks

SETTINGS = EvaluationSettings(keep=(1.0, 0.5), calibration_documents=2, documents=3)
LAYOUTS: dict[int, list[tuple[str, ...]]] = {
    2: [("parallel.ep=2",)],
    4: [("parallel.ep=2",)],
}
MORE_LAYOUTS: dict[int, list[tuple[str, ...]]] = {
    2: [(), ("parallel.replicate=2",)],
    3: [(), ("parallel.ep=3",)],
    4: [
        (),
        ("parallel.ep=4",),
        ("parallel.replicate=2", "parallel.ep=2"),
        ("parallel.replicate=4",),
        ("parallel.replicate=2", "parallel.shard=2"),
    ],
}


def write_checkpoint(run_dir: Path, ranks: Ranks, **overrides: Any) -> Path:
    """A checkpoint of a model as these ranks have it, with weights in which differences show."""
    config = tiny_config(model__init_std=0.3, training__micro_batch=1, **overrides)
    model = build_model(config, ranks)
    with CheckpointWriter(run_dir) as writer:
        writer.save(
            model,
            build_optimizer(model, config.optimizer),
            config,
            TrainingState(7, 448, "data", 0, 4, 1e-3),
        )
    return find(run_dir)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process. One domain has an expert of its own: its documents are alone in batches."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, Ranks(), model__experts__exclusive={"law": 1})
    return folder


@pytest.fixture(scope="module")
def alone(run_dir: Path, data: Path) -> dict[str, float]:
    return numbers(evaluate(run_dir, data, SETTINGS, micro_batch=1).to_json())


def numbers(value: Any, where: str = "") -> dict[str, float]:
    """Every number of a result, by the keys that lead to it."""
    found = {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, (dict, list, tuple)):
            found |= numbers(item, f"{where}.{key}")
        elif isinstance(item, (int, float)):
            found[f"{where}.{key}"] = float(item)
    return found


def on_layouts(
    ranks: Ranks, run_dir: Path, data: Path, layouts: list[tuple[str, ...]]
) -> list[dict[str, float]]:
    return [
        numbers(evaluate(run_dir, data, SETTINGS, ranks=ranks, layout=layout).to_json())
        for layout in layouts
    ]


def assert_same_as_alone(
    world_size: int, layouts: list[tuple[str, ...]], run_dir: Path, data: Path, alone: dict
) -> None:
    assert len(alone) > 50
    for of_rank in run_ranks(on_layouts, world_size, run_dir, data, layouts):
        for layout, found in zip(layouts, of_rank, strict=True):
            assert found == pytest.approx(alone, rel=1e-6, abs=1e-6), layout


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_numbers_are_those_of_one_process(world_size, run_dir, data, alone) -> None:
    assert_same_as_alone(world_size, LAYOUTS[world_size], run_dir, data, alone)


@pytest.mark.long
@pytest.mark.parametrize("world_size", MORE_LAYOUTS)
def test_numbers_are_those_of_one_process_on_more_layouts(world_size, run_dir, data, alone) -> None:
    assert_same_as_alone(world_size, MORE_LAYOUTS[world_size], run_dir, data, alone)


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        {"model__experts__sharing": "all"},
        {"model__attention__document_mask": False},
        {"model__experts__routed_per_layer": [8, 3]},
        {"training__precision": "bfloat16"},
    ],
    ids=str,
)
def test_from_a_checkpoint_of_another_layout(overrides, data, tmp_path) -> None:
    """Four processes write it, two evaluate; in bf16 rounding is coarse."""
    parallel = {"parallel__ep": 2, "parallel__replicate": 2}
    run_ranks(lambda ranks: write_checkpoint(tmp_path, ranks, **overrides, **parallel) and None, 4)
    alone = numbers(evaluate(tmp_path, data, SETTINGS).to_json())
    both = run_ranks(on_layouts, 2, tmp_path, data, [("parallel.ep=2",)])
    tolerance = 3e-2 if "training__precision" in overrides else 1e-6
    for [found] in both:
        assert found == pytest.approx(alone, rel=tolerance, abs=tolerance)


def test_every_rank_runs_the_model_as_often() -> None:
    documents = [np.arange(1, 9)] * 5
    batches = pack(documents, 8, 1)
    for world_size in (1, 2, 3, 4, 7):
        shares = [share(batches, Ranks(rank, world_size)) for rank in range(world_size)]
        assert {len(own) for own in shares} == {-(-5 // world_size)}
        ids = torch.cat([batch.document_ids_G for own in shares for batch in own])
        assert sorted(ids[ids >= 0].tolist()) == list(range(5))
        for batch in (batch for own in shares for batch in own):
            assert batch.has_padding == bool((batch.document_ids_G < 0).any())
            assert batch.tokens_BS.shape == batches[0].tokens_BS.shape


def refused(ranks: Ranks, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(*arguments, ranks=ranks, **options)
    return str(caught.value)


def test_a_mistake_ends_all_ranks_in_one_line(run_dir, data, tmp_path) -> None:
    """Also one that only the first of them can meet, which alone reads the data."""

    def body(ranks: Ranks) -> list[str]:
        return [
            refused(ranks, run_dir, tmp_path / "nothing"),
            refused(ranks, run_dir, data, EvaluationSettings(domains=("no",))),
            refused(ranks, run_dir, data, SETTINGS, layout=["parallel.ep=3"]),
            refused(ranks, run_dir, data, SETTINGS, layout=["parallel.placement=auto"]),
            refused(ranks, run_dir, data, SETTINGS, layout=["optimizer.lr=1"]),
        ]

    for messages in run_ranks(body, 2):
        for message, words in zip(
            messages,
            [
                "nothing",
                "no held-out documents of domain 'no'",
                "parallel.ep=3 does not divide shard=2",
                "parallel.placement=auto: an evaluation takes parallel.replicate",
                "optimizer.lr=1: an evaluation takes parallel.replicate",
            ],
            strict=True,
        ):
            assert words in message and "\n" not in message


@pytest.mark.long
def test_the_command_under_torchrun(run_dir, data, alone, tmp_path) -> None:
    done = run_command(
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *("-m", "emotrain", "evaluate", run_dir, "parallel.ep=2", "--data", data),
        *("--keep", "1.0", "0.5", "--calibration-documents", "2", "--documents", "3"),
        *("--json", "--out", tmp_path / "out"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert numbers(json.loads(line)) == pytest.approx(alone, rel=1e-6, abs=1e-6)
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == json.loads(line)
