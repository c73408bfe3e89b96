"""Proves `emotrain inspect` and the published configurations to the last digit of spec 1.6 and
5."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emotrain.cli import main
from emotrain.config import load_config
from emotrain.inspection import describe, pool_text, run_costs
from emotrain.report.facts import headline

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EMO = (13_568_641_024, 1_489_045_504)
"""Total and active parameters."""

PUBLISHED = {
    "emo_1b14b_130b": (*EMO, 30_995),
    "emo_1b14b_1t": (*EMO, 238_419),
    "emo_1b14b_anneal": (*EMO, 11_920),
    "stdmoe_1b14b_130b": (*EMO, 30_995),
    "stdmoe_1b14b_1t": (*EMO, 238_419),
    "stdmoe_1b4b_130b": (3_901_818_880, 1_485_899_776, 30_995),
    "dense_1b_130b": (1_484_851_200, 1_484_851_200, 30_995),
}


def costs_of(name: str, *overrides: str) -> dict:
    return run_costs(load_config(CONFIGS / f"{name}.yaml", overrides))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs(name: str) -> None:
    costs = costs_of(name)
    assert (costs["total_parameters"], costs["active_parameters"], costs["steps"]) == PUBLISHED[
        name
    ]
    assert costs["tokens_per_step"] == 4_194_304
    assert costs["embedding_parameters"] == costs["head_parameters"] == 205_520_896


def test_parts_of_the_released_model() -> None:
    costs = costs_of("emo_1b14b_1t")
    assert costs["experts_parameters"] == 12_884_901_888
    assert costs["attention_parameters"] == 268_435_456
    assert costs["routers_parameters"] == 4_194_304
    assert costs["norms_parameters"] == 67_584
    assert costs["total_parameters"] - costs["embedding_parameters"] == 13_363_120_128
    assert costs["active_parameters"] - costs["embedding_parameters"] == 1_283_524_608
    assert costs["active_parameters"] - 2 * costs["embedding_parameters"] == 1_078_003_712
    dense = costs_of("dense_1b_130b")
    assert dense["total_parameters"] - dense["embedding_parameters"] == 1_279_330_304


@pytest.mark.parametrize(
    "kept, total, exported",
    [
        (8, 1_485_113_344, 1_484_810_240),
        (16, 2_290_681_856, 2_290_378_752),
        (32, 3_901_818_880, 3_901_515_776),
        (64, 7_124_092_928, 7_123_789_824),
        (128, 13_568_641_024, 13_568_337_920),
    ],
)
def test_banks_of_k_experts(kept: int, total: int, exported: int) -> None:
    assert costs_of("emo_1b14b_1t", f"model.experts.routed={kept - 1}")["total_parameters"] == total
    assert (
        costs_of("emo_1b14b_1t", f"model.experts.routed={kept - 1}", "model.vocab_size=100278")[
            "total_parameters"
        ]
        == exported
    )


def test_flops_memory_and_learning_rates() -> None:
    costs = costs_of("emo_1b14b_1t")
    assert costs["flops_per_token"] == 6 * 1_283_524_608 + 6 * 16 * 2048 * 4096
    assert costs["flops"] == costs["flops_per_token"] * 238_419 * 4_194_304
    assert (
        costs["weights_bytes"]
        == costs["gradients_bytes"]
        == costs["optimizer_bytes"] // 2
        == 4 * 13_568_641_024
    )
    assert (costs["peak_lr"], costs["warmup_steps"]) == (4e-3, 2000)
    assert costs["final_lr"] == pytest.approx(4e-4)
    anneal = costs_of("emo_1b14b_anneal")
    assert (anneal["peak_lr"], anneal["final_lr"], anneal["warmup_steps"]) == (None, 0, 0)


def test_published_runs_differ_only_where_the_method_does() -> None:
    """Spec 1.7: EMO and its baseline share everything but the pool."""
    from emotrain.config import flatten

    for length in ("130b", "1t"):
        emo, standard = (
            dict(flatten(load_config(CONFIGS / f"{kind}_1b14b_{length}.yaml")))
            for kind in ("emo", "stdmoe")
        )
        assert {key for key in emo if emo[key] != standard[key]} == {
            "model.router.pool.kind",
            "training.run_dir",
        }
    emo, dense = (
        dict(flatten(load_config(CONFIGS / f"{kind}_130b.yaml")))
        for kind in ("emo_1b14b", "dense_1b")
    )
    assert {key for key in emo if emo[key] != dense[key]} == {
        "model.router.pool.kind",
        "model.experts.routed",
        "model.experts.top_k",
        "model.experts.hidden",
        "optimizer.weight_decay",
        "training.run_dir",
    }
    released = load_config(CONFIGS / "emo_1b14b_1t.yaml")
    assert (
        released.model.router.pool.kind,
        released.model.router.pool.min,
        released.model.router.pool.max,
    ) == ("uniform", 8, 128)
    assert released.data.repetition_filter.enabled and released.model.attention.document_mask
    assert released.training.permanent_every == 20_000


def test_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["inspect", str(CONFIGS / "emo_1b14b_1t.yaml"), "training.global_batch=512", "--json"])
        == 0
    )
    costs = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert costs["tokens_per_step"] == 512 * 4096
    assert main(["inspect", str(CONFIGS / "emo_1b14b_1t.yaml")]) == 0
    text = capsys.readouterr().out
    for shown in ("13,568,641,024", "1,489,045,504", "238,419", "0.004", "50.55 GiB", "101.09 GiB"):
        assert shown in text
    assert main(["inspect", str(CONFIGS / "emo_1b14b_1t.yaml"), "model.expert.routed=3"]) == 2
    assert "did you mean model.experts?" in capsys.readouterr().err


def shown(name: str, *overrides: str) -> dict[str, str]:
    """Lines of `emotrain inspect`: name -> value and note."""
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    text = describe(config, run_costs(config))
    assert max(map(len, text.splitlines())) <= 100
    lines = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines())
    return {line[0]: re.sub(r"\s{2,}", "  ", line[1]) for line in lines if len(line) == 2}


def test_experts_and_pool_are_said_in_one_unit() -> None:
    lines = shown("quickstart")
    assert lines["routed experts, N"].startswith("31  ")
    assert lines["shared experts, M"].startswith("1  ")
    assert lines["top-k, K"].startswith("3  ")
    assert (
        lines["document pool"] == "4 to 31 routed experts  a size drawn for each document and layer"
    )
    assert lines["backend"].startswith("auto  ")
    assert (lines["shard"][:3], lines["ep"][:1], lines["replicate"][:1]) == ("all", "1", "1")
    assert lines["sequence length"] == "256  tokens" and lines["path"] == "data/sample"


@pytest.mark.parametrize(
    ("name", "overrides", "pool"),
    [
        ("emo_1b14b_1t", (), "8 to 128 routed experts"),
        ("quickstart", ("model.router.pool.max=0",), "4 to 31 routed experts"),
        (
            "quickstart",
            ("model.router.pool.kind=fixed", "model.router.pool.size=9"),
            "9 routed experts",
        ),
        ("stdmoe_1b14b_1t", (), "none: a standard MoE"),
        ("dense_1b_130b", (), "none: a dense model"),
    ],
)
def test_the_pool_in_words(name: str, overrides: tuple[str, ...], pool: str) -> None:
    assert shown(name, *overrides)["document pool"].split("  ")[0] == pool
    assert costs_of(name, *overrides)["pool"]["text"] == pool


def test_the_data_set_is_named_with_the_passes_over_it(tiny_data: Path, tmp_path: Path) -> None:
    data = costs_of("quickstart", f"data.path={tiny_data}", "training.steps=10")["data"]
    assert data["passes"] == pytest.approx(10 * 16 * 256 / data["tokens"])
    assert costs_of("quickstart", "data.path=")["data"]["note"] == "data.path is not set"
    nothing = costs_of("quickstart", f"data.path={tmp_path / 'none'}")["data"]
    assert nothing["tokens"] is None and "emotrain prepare" in nothing["note"]
    (tmp_path / "dataset.json").write_text("{}")
    assert "dataset.json" in costs_of("quickstart", f"data.path={tmp_path}")["data"]["note"]


def test_what_is_most_likely_not_meant_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(CONFIGS / "quickstart.yaml"), "training.steps=20"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: optimizer.warmup_steps=60 is not less than the 20 steps")


class BytesMade(TorchDispatchMode):
    """Adds up the bytes of all tensors with data that operators make."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.total += sum(
            tensor.nbytes
            for tensor in tree_leaves(made)
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta
        )
        return made


def test_counting_the_largest_model_allocates_nothing() -> None:
    """54 GB of parameters, of which not one is made."""
    config = load_config(CONFIGS / "emo_1b14b_1t.yaml")
    with BytesMade() as made:
        costs = run_costs(config)
    assert costs["weights_bytes"] > 50e9 and made.total == 0


def test_a_rule_of_pools_that_is_new_has_its_name_said() -> None:
    """Whoever adds a kind of pool need not touch what reports it."""
    config = load_config(CONFIGS / "quickstart.yaml")
    pool = dataclasses.replace(config.model.router.pool, kind="above_mean")
    router = dataclasses.replace(config.model.router, pool=pool)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, router=router))
    assert pool_text(config.model) == "above_mean"
    assert headline(config).startswith("EMO with document pools of kind above_mean:")
