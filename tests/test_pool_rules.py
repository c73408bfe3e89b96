"""Proves the pool rules beside the published one against loops over tokens: what has a pool, which
tokens choose it, which documents have none, and what the losses read."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_batch, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.cli import main
from emotrain.config import PoolConfig, RouterConfig
from emotrain.data.formats import Dataset
from emotrain.data.packing import packed_rows
from emotrain.distributed.parallelize import parallelize
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.model.pool_units import joined, pool_units
from emotrain.model.router import NO_POOL, LayerRequest, decide, draw_pool_sizes
from emotrain.model.transformer import Transformer
from emotrain.planning.dry_run import dry_run
from emotrain.training.data_source import build_loader
from emotrain.training.engine import NativeEngine
from emotrain.training.step import train_step
from tests.test_router import pool_oracle, route_oracle

ROUTED, CHOSEN = 8, 2
UNITS = ("document", "segment:1", "segment:3", "segment:100")
CHOOSERS = ("document", "prefix:1", "prefix:4", "other_part")

many = settings(max_examples=40, deadline=None)


def choosers(pool: PoolConfig, documents: list[int]) -> list[list[int]]:
    """By loops: for each token of a stream of documents, the tokens that choose its pool."""
    found: list[list[int]] = []
    start = 0
    for length in documents:
        size = length if pool.unit == "document" else int(pool.unit.split(":")[1])
        for first in range(start, start + length, size):
            unit = list(range(first, min(first + size, start + length)))
            for place, _ in enumerate(unit):
                if pool.chosen_by == "document":
                    choose = unit
                elif pool.chosen_by == "other_part":
                    half = (len(unit) + 1) // 2
                    choose = unit[half:] if place < half else unit[:half]
                else:
                    choose = unit[: int(pool.chosen_by.split(":")[1])]
                found.append(choose or unit)
        start += length
    return found


def batch_of(lengths: list[list[int]], padded: bool = False) -> PackedBatch:
    return tiny_batch(lengths, padded)


rows = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@many
@given(
    st.lists(rows, min_size=1, max_size=3),
    st.sampled_from(UNITS),
    st.sampled_from(CHOOSERS),
    st.sampled_from(("masked", "unmasked")),
    st.integers(0, 2**31),
)
def test_a_token_is_routed_in_the_pool_that_its_choosers_choose(
    lengths: list[list[int]], unit: str, chosen_by: str, scores: str, seed: int
) -> None:
    most = max(map(sum, lengths))
    lengths = [[*row, most - sum(row)] if sum(row) < most else row for row in lengths]
    batch = batch_of(lengths)
    pool = PoolConfig(kind="fixed", size=3, unit=unit, chosen_by=chosen_by, scores=scores)
    generator = torch.Generator().manual_seed(seed)
    num_tokens = len(batch.document_T)
    logits_TN = torch.randn(num_tokens, ROUTED, dtype=torch.float64, generator=generator) * 2
    size_G = torch.randint(1, ROUTED + 2, (batch.num_documents,), generator=generator)
    request = LayerRequest(pool, size_G, units=pool_units(pool, batch))
    decision = decide(logits_TN, batch, CHOSEN, RouterConfig(), request)
    free_TN = logits_TN.softmax(dim=1)
    for token, choose in enumerate(choosers(pool, [n for row in lengths for n in row])):
        allowed = pool_oracle(
            free_TN[choose].sum(dim=0).tolist(), int(size_G[batch.document_T[token]])
        )
        inside_N = torch.tensor(allowed)
        masked_N = logits_TN[token].masked_fill(~inside_N, -torch.inf)
        probability_N = masked_N.softmax(0) if scores == "masked" else free_TN[token]
        torch.testing.assert_close(decision.probabilities_TN[token], probability_N)
        read_N = masked_N if scores == "masked" else logits_TN[token]
        torch.testing.assert_close(decision.lse_T[token], read_N.logsumexp(0))
        chosen = decision.experts_TK[token]
        used = chosen[chosen < ROUTED].tolist()
        assert used == list(route_oracle(masked_N.tolist(), CHOSEN, "softmax", False))
        assert decision.weights_TK[token, : len(used)].tolist() == pytest.approx(
            probability_N[used].tolist()
        )
        assert not decision.weights_TK[token, len(used) :].any()
    assert int(decision.counts_N.sum()) == int((decision.experts_TK < ROUTED).sum())
    torch.testing.assert_close(
        decision.scores_GN,
        torch.stack([free_TN[batch.document_T == g].sum(0) for g in range(batch.num_documents)]),
    )


def test_units_of_whole_documents_are_the_published_rule() -> None:
    batch = batch_of([[5, 7, 4], [9, 7]], padded=True)
    pool = PoolConfig(kind="fixed", size=3)
    logits_TN = torch.randn(32, ROUTED, generator=torch.Generator().manual_seed(0))
    sizes_G = torch.tensor([1, 3, 5, 4, 8])
    published, by_units = (
        decide(logits_TN, batch, CHOSEN, RouterConfig(), LayerRequest(pool, sizes_G, units=units))
        for units in (None, pool_units(pool, batch))
    )
    for name in ("probabilities_TN", "weights_TK", "experts_TK", "lse_T", "counts_N", "scores_GN"):
        assert torch.equal(getattr(published, name), getattr(by_units, name)), name


def cut(documents: list[tuple[int, int]], row: int) -> tuple[list[list[int]], list[list[int]]]:
    """By a loop: lengths and ids of the pieces in each row of a stream of (id, length)."""
    tokens = [number for number, length in documents for _ in range(length)]
    lengths, ids = [], []
    for start in range(0, len(tokens), row):
        pieces = [(number, len(list(run))) for number, run in groupby(tokens[start : start + row])]
        ids.append([number for number, _ in pieces])
        lengths.append([length for _, length in pieces])
    return lengths, ids


@many
@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=12),
    st.integers(2, 6),
    st.sampled_from((2, 3, 4)),
    st.sampled_from(UNITS),
    st.sampled_from(CHOOSERS),
    st.integers(0, 2**31),
)
def test_a_pool_across_windows_is_that_of_one_long_window(
    sizes: list[int], row: int, across: int, unit: str, chosen_by: str, seed: int
) -> None:
    left = -sum(sizes) % (row * across)
    documents = [(7 * i + 3, size) for i, size in enumerate(sizes)]
    documents += [(-1, left)] if left else []
    total = sum(size for _, size in documents)
    generator = torch.Generator().manual_seed(seed)
    logits_TN = torch.randn(total, ROUTED, dtype=torch.float64, generator=generator)
    pool = PoolConfig(kind="uniform", min=1, max=7, unit=unit, chosen_by=chosen_by)
    decisions = []
    for length, rows in ((row, across), (row * across, 1)):
        batch = packed_rows(
            np.zeros((total // length, length), dtype=np.int64), *cut(documents, length), False
        )
        rule = replace(pool, across_windows=rows)
        sizes_LG = draw_pool_sizes(rule, batch.document_ids_G, 1, seed=0, step=seed)
        request = LayerRequest(rule, sizes_LG[0], units=pool_units(rule, batch))
        decisions.append(decide(logits_TN, batch, CHOSEN, RouterConfig(), request))
    for name in ("probabilities_TN", "weights_TK", "experts_TK", "lse_T", "counts_N"):
        assert torch.equal(*(getattr(of, name) for of in decisions)), name


def test_windows_of_other_groups_and_other_documents_are_not_joined() -> None:
    ids = [[5], [5], [5], [6], [6], [5]]
    batch = packed_rows(np.zeros((6, 2), int), [[2]] * 6, ids, False)
    document_T, piece_G = joined(batch, 2)
    assert document_T[::2].tolist() == [0, 0, 1, 2, 3, 4]
    assert piece_G.tolist() == [0, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("kind", ["shards", "arrays"])
def test_training_data_lie_as_pools_across_windows_need_them(
    tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "arrays":
        documents = [ids for _, ids, _ in Dataset(tiny_data).documents("train")]
        np.concatenate(documents).astype("<u2").tofile(tmp_path / "part.npy")
        (tmp_path / "tokenizer.json").write_bytes((tiny_data / "tokenizer.json").read_bytes())
        tiny_data = tmp_path
    config = tiny_config(
        model__vocab_size=512,
        model__router__pool__across_windows=2,
        data__path=str(tiny_data),
        data__sequence_length=32,
        training__global_batch=8,
        training__micro_batch=4,
    )
    cut = 0
    for batch in build_loader(config).step(0, 8, 4):
        document_T, _ = joined(batch, 2)
        first, second = document_T.view(2, 2, 32)[:, 0, -1], document_T.view(2, 2, 32)[:, 1, 0]
        ids = batch.document_ids_G[batch.document_BS]
        assert torch.equal(first == second, ids[::2, -1] == ids[1::2, 0])
        cut += int((first == second).sum())
    assert cut > 0


# ---- documents without a pool


def drawn(step: int = 1, ids: Tensor | None = None, **pool: float) -> Tensor:
    config = PoolConfig(kind="uniform", min=4, max=16, **pool)
    return draw_pool_sizes(config, torch.arange(20_000) if ids is None else ids, 2, 0, step)


def test_a_share_of_documents_has_no_pool() -> None:
    plain, some, more = drawn(), drawn(none_share=0.3), drawn(none_share=0.6)
    without, without_more = some == NO_POOL, more == NO_POOL
    assert torch.equal(without[0], without[1]), "in all layers alike"
    assert without[0].double().mean().item() == pytest.approx(0.3, abs=0.013), "four deviations"
    assert not (without & ~without_more).any(), "a larger share holds a smaller one"
    assert torch.equal(some[~without], plain[~without]), "the others draw as they did"
    again = drawn(step=2, none_share=0.3)[0] == NO_POOL
    both = (again & without[0]).double().mean().item()
    assert both == pytest.approx(0.09, abs=0.008), "each step draws anew"
    one = torch.tensor([17])
    assert torch.equal(drawn(ids=one, none_share=0.3), some[:, 17:18])
    correlation = torch.corrcoef(torch.stack([without[0].double(), plain[0].double()]))[0, 1]
    assert abs(correlation) < 0.03, "the draw has nothing to do with that of sizes"


def test_pools_begin_with_none_and_come_document_by_document() -> None:
    shares = [
        (drawn(step, none_share=0.2, warmup_steps=10) == NO_POOL).double().mean().item()
        for step in (0, 5, 10, 15)
    ]
    assert shares == pytest.approx([1, 0.6, 0.2, 0.2], abs=0.015)
    assert torch.equal(drawn(7, warmup_steps=7), drawn(7)), "as without, once it is over"


# ---- the rules in training


RULES = {
    "segments": {"unit": "segment:3"},
    "prefix": {"chosen_by": "prefix:2"},
    "other part": {"chosen_by": "other_part"},
    "some without": {"none_share": 0.4, "warmup_steps": 3},
    "unmasked": {"scores": "unmasked"},
    "all": {
        **{"unit": "segment:4", "chosen_by": "other_part"},
        **{"none_share": 0.2, "scores": "unmasked"},
    },
}


def gradients(rule: dict, recompute: str, backend: str = "torch") -> list[Tensor]:
    pool = {f"model__router__pool__{name}": value for name, value in rule.items()}
    config = tiny_config(
        parallel__recompute=recompute, model__init_std=0.3, model__experts__backend=backend, **pool
    )
    model = parallelize(Transformer(config.model).initialize(0), config)
    train_step(NativeEngine(model), [tiny_batch(padded=True)], config, 1, Ranks())
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains_otherwise_and_recomputes_alike(name: str) -> None:
    plain, ruled, again = (
        gradients({}, "none"),
        gradients(RULES[name], "none"),
        gradients(RULES[name], "full"),
    )
    assert any(not torch.equal(a, b) for a, b in zip(plain, ruled, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ruled, again, strict=True))


@pytest.mark.parametrize("name", ["segments", "prefix", "other part", "unmasked"])
def test_triton_refuses_what_it_does_not_know(name: str) -> None:
    with pytest.raises(UserError, match="triton does not route with .*and scores"):
        gradients(RULES[name], "none", "triton")


def test_unmasked_weights_teach_experts_outside_of_the_pool() -> None:
    """The gradient of the router: a weight inside of a pool moves logits of that pool alone."""
    batch, logits_TN = batch_of([[6]]), torch.randn(6, ROUTED, dtype=torch.float64)
    for scores, taught in (("masked", 3), ("unmasked", ROUTED)):
        pool = PoolConfig(kind="fixed", size=3, scores=scores)
        leaf_TN = logits_TN.clone().requires_grad_()
        request = LayerRequest(pool, torch.tensor([3]))
        decide(leaf_TN, batch, CHOSEN, RouterConfig(), request).weights_TK.sum().backward()
        assert ((leaf_TN.grad != 0).sum(dim=1) == taught).all()


def test_a_plan_follows_every_rule() -> None:
    """Also of a GPU, where such a router runs in PyTorch, and waits for the host no more often."""
    rule = {f"model__router__pool__{name}": value for name, value in RULES["all"].items()}
    plain, ruled = (dry_run(tiny_config(**pool), 2) for pool in ({}, rule))
    assert ruled.waits == plain.waits
    assert ruled.peak_bytes > 0


def test_inference_has_no_rule() -> None:
    """A model that was trained by another rule is read, extracted and served as any other."""
    batch = tiny_batch()
    outputs = [
        tiny_model(**{f"model__router__pool__{name}": v for name, v in rule.items()})(batch)
        for rule in ({}, RULES["all"])
    ]
    assert torch.equal(outputs[0].hidden_TD, outputs[1].hidden_TD)


# ---- mistakes


@pytest.mark.parametrize(
    "setting, message",
    [
        ("unit=word", "unit=word is not known; give document or segment:N"),
        ("unit=segment", "unit=segment is not known"),
        ("unit=segment:0", "unit=segment:0 is not known"),
        ("unit=segment:-3", "unit=segment:-3 is not known"),
        ("unit=segment:1e3", "unit=segment:1e3 is not known"),
        ("unit=document:3", "unit=document:3 is not known"),
        ("chosen_by=prefix:", "chosen_by=prefix: is not known"),
        ("chosen_by=other_part:2", "chosen_by=other_part:2 is not known"),
        ("chosen_by=prefix:9999999999", "chosen_by=prefix:9999999999 is not known"),
        ("none_share=1", "none_share=1 leaves no document with a pool"),
        ("none_share=-0.1", "none_share=-0.1 must be at least 0"),
        ("none_share=.nan", "none_share=nan is not finite"),
        ("warmup_steps=-1", "warmup_steps=-1 must be at least 0"),
        ("across_windows=0", "across_windows=0 must be positive"),
        ("across_windows=3", "training.micro_batch=16 is no multiple of them"),
        ("scores=free", "scores=free is not known; choose one of masked, unmasked"),
    ],
)
def test_mistakes_get_one_line(
    setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "configs/quickstart.yaml", f"model.router.pool.{setting}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
