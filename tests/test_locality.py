"""Proves that caches of every size hit what a plain LRU cache hits, that segments, pins and
switches are those of loops; and `emotrain locality` from the checkpoint to its files."""

import csv
import json
from collections import Counter, OrderedDict
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.modular import locality
from emotrain.modular.locality import (
    best_segment_routing,
    count_segments,
    count_slots,
    count_switches,
    hits_by_group,
    reuse_distances,
    segment_cache_curve,
    segment_histogram,
    static_curve,
)
from emotrain.training.run import train
from tests.conftest import tiny_settings


@st.composite
def routed(draw):
    """Choices of a few documents: (experts_TK, N, K, start_T), some slots empty."""
    num_experts = draw(st.integers(2, 7))
    num_slots = draw(st.integers(1, num_experts))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    taste = random.normal(size=(sum(lengths), num_experts)) + 2 * random.normal(size=num_experts)
    chosen_TK = np.argsort(-taste, axis=1)[:, :num_slots].astype(np.int16)
    chosen_TK[random.random(chosen_TK.shape) < 0.1] = num_experts
    start_T = np.zeros(sum(lengths), bool)
    start_T[np.cumsum([0, *lengths[:-1]])] = True
    return chosen_TK, num_experts, num_slots, start_T


def lru_hits(chosen_TK, num_experts, start_T, size):
    """One cache, token by token, the expert of the largest weight used last -> hit bool [T, K]."""
    cache, hit_TK = OrderedDict(), np.zeros(chosen_TK.shape, bool)
    for token, row in enumerate(chosen_TK.tolist()):
        if start_T[token]:
            cache.clear()
        hit_TK[token] = [expert in cache for expert in row]
        for expert in reversed(row):
            if expert < num_experts:
                cache[expert] = True
                cache.move_to_end(expert)
        while len(cache) > size:
            cache.popitem(last=False)
    return hit_TK


@settings(deadline=None, max_examples=150)
@given(routed(), st.booleans(), st.sampled_from([1, 20, 1 << 20]))
def test_distances_are_those_of_an_lru_cache_of_every_size(case, cold, chunk):
    """Also where a table is computed in parts."""
    chosen_TK, num_experts, num_slots, start_T = case
    start_T = start_T if cold else np.zeros_like(start_T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locality, "CHUNK", chunk)
        distances_TK = reuse_distances(chosen_TK, num_experts, start_T)
    group_T = np.arange(len(chosen_TK)) % 2
    hits_YN = hits_by_group(distances_TK, num_experts, group_T, 2)
    for size in range(num_slots, num_experts + 1):
        hit_TK = lru_hits(chosen_TK, num_experts, start_T, size)
        assert ((distances_TK < size) == hit_TK).all()
        assert hits_YN[:, size - 1].tolist() == [hit_TK[group_T == y].sum() for y in (0, 1)]


@settings(deadline=None, max_examples=80)
@given(routed(), st.integers(1, 4))
def test_segments_are_those_of_a_loop(case, length):
    chosen_TK, num_experts, _, start_T = case
    segments, open_rows = [], []
    for token, row in enumerate(chosen_TK.tolist()):
        open_rows = [row] if start_T[token] else [*open_rows, row]
        if len(open_rows) == length:
            segments.append(open_rows)
            open_rows = []
    uses = [Counter(e for row in rows for e in row if e < num_experts) for rows in segments]
    counts_YN = count_segments(chosen_TK, num_experts, start_T, length)
    assert counts_YN.tolist() == [[of[e] for e in range(num_experts)] for of in uses]

    curve = segment_cache_curve(counts_YN)
    for size in range(1, num_experts + 1):
        best = [
            max(sum(of[e] for e in kept) for kept in combinations(range(num_experts), size))
            for of in uses
        ]
        assert curve[size - 1] == sum(best)

    # F1 of the experts that a threshold turns on, against the choices, pair by pair.
    found = best_segment_routing(segment_histogram(counts_YN, length))
    scores = []
    for least in range(1, length + 1):
        true, on, chosen = 0, 0, sum(sum(of.values()) for of in uses)
        for rows, of in zip(segments, uses, strict=True):
            kept = {e for e in of if of[e] >= least}
            true += sum(e in kept for row in rows for e in row)
            on += length * len(kept)
        scores.append(2 * true / (on + chosen) if on + chosen else 0)
    assert found == (pytest.approx(max(scores)) if any(map(len, uses)) else None)


@settings(deadline=None, max_examples=60)
@given(routed())
def test_switches_and_pins_are_those_of_a_loop(case):
    chosen_TK, num_experts, _, start_T = case
    new = followed = 0
    for token in range(1, len(chosen_TK)):
        if not start_T[token]:
            now = [e for e in chosen_TK[token].tolist() if e < num_experts]
            followed += len(now)
            new += sum(e not in chosen_TK[token - 1].tolist() for e in now)
    assert count_switches(chosen_TK, num_experts, start_T) == (new, followed)

    half = len(chosen_TK) // 2
    pinned_by_N = count_slots(chosen_TK[:half], num_experts)
    curve = static_curve(count_slots(chosen_TK[half:], num_experts), pinned_by_N)
    ranked = sorted(range(num_experts), key=lambda e: (-pinned_by_N[e], e))
    for size in range(1, num_experts + 1):
        assert curve[size - 1] == np.isin(chosen_TK[half:], ranked[:size]).sum()


def test_documents_of_one_pool_and_tokens_by_chance_are_told_apart():
    """Documents that keep to their own pool: an LRU cache of its size misses each expert once. By
    chance every measure is what chance gives."""
    random = np.random.default_rng(0)
    start_T = np.arange(8000) % 500 == 0
    pool_T = np.arange(8000) // 500
    inside_TK = np.argsort(random.random((8000, 8)), axis=1)[:, :4]
    local_TK = (pool_T[:, None] % 8) * 8 + inside_TK
    chance_TK = np.argsort(random.random((8000, 64)), axis=1)[:, :4]
    group_T = np.zeros(8000, np.int64)
    rates = {}
    for name, chosen_TK in (("local", local_TK), ("chance", chance_TK)):
        distances_TK = reuse_distances(chosen_TK, 64, start_T)
        hits = hits_by_group(distances_TK, 64, group_T, 1)[0]
        rates[name] = hits[8 - 1] / chosen_TK.size
    assert rates["local"] == 1 - 16 * 8 / 32000 and rates["chance"] == pytest.approx(1 / 8, rel=0.1)
    histogram = segment_histogram(count_segments(local_TK, 64, start_T, 100), 100)
    # On for 8 of 64 experts, of which a token uses 4: half of them right, none missed.
    assert best_segment_routing(histogram) == pytest.approx(2 / 3)
    new, followed = count_switches(chance_TK, 64, start_T)
    assert new / followed == pytest.approx(1 - 4 / 64, rel=0.01)


# ---- the command


@pytest.fixture(scope="module")
def run_dir(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("locality") / "run"
    train(config_from_dict(tiny_settings(tiny_data, folder)))
    return folder


FEW = ["--documents", "2", "--calibration-documents", "2", "--segments", "4"]


def test_the_command_measures_and_writes(run_dir, tiny_data, tmp_path, capsys):
    out, pins = tmp_path / "out", tmp_path / "pins.json"
    words = ["locality", str(run_dir), "--data", str(tiny_data), "--out", str(out), *FEW]
    words += ["--compare", str(run_dir / "checkpoints/step-00000006"), "--export-pins", str(pins)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "locality.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "locality.csv", "locality.json", "locality.md", "locality.png",
    ]  # fmt: skip
    assert sorted(result["domains"]) == ["garden", "harbour", "kitchen"]
    assert [layer["layer"] for layer in result["layers"]] == [0, 1]
    assert result["documents"] == dict.fromkeys(result["domains"], 2)
    # A model is as local as itself.
    other = result["compared_with"]
    assert other["overall"] == result["overall"] and "LRU, mixed" in printed
    # A cache holds at least the experts of a token; one of all experts only misses first uses.
    assert result["overall"]["cache"]["0.125"]["experts"] == 2
    for numbers in (result["overall"], *result["domains"].values(), *result["layers"]):
        for cache in numbers["cache"].values():
            assert cache["lru_cold_hit_rate"] <= cache["lru_warm_hit_rate"] + 0.2
            assert 0 < cache["static_hit_rate"] < 1 >= cache["sch_4_hit_rate"] > 0
        assert 0 < numbers["switch_rate"] < 1 and 0 < numbers["srp"]["4"] < 1
    assert result["curve"][-1]["static_hit_rate"] == result["curve"][-1]["sch_4_hit_rate"] == 1
    assert result["curve"][-1]["share"] == 1 > result["curve"][-1]["lru_cold_hit_rate"] > 0.5
    with open(out / "locality.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 6 * 6 and {line["model"] for line in lines} == {"run", "step-00000006"}
    counts = json.loads(pins.read_text())
    assert list(counts) == ["logical_count"] and np.shape(counts["logical_count"]) == (2, 7)


def test_choices_are_those_of_each_document_alone(run_dir, tiny_data, tmp_path, capsys):
    """In the order of its tokens, also where it is longer than a row: what is measured of one
    document depends on no other that is packed with it, nor on the rows of a batch."""
    arms = {}
    for rows in ("1", "3"):
        words = ["locality", str(run_dir), "--data", str(tiny_data), "--out", str(tmp_path / rows)]
        assert main([*words, *FEW, "--micro-batch", rows, "--json"]) == 0
        arms[rows] = json.loads(capsys.readouterr().out)
    assert arms["1"] == arms["3"] and max(arms["1"]["tokens"].values()) > 32


def test_pools_of_training_make_choices_more_local(tiny_data, tmp_path, capsys):
    """Pools of 2 experts, of which a token uses 2: nothing ever changes within a piece."""
    config = tiny_settings(tiny_data, tmp_path / "run")
    config["model"]["router"]["pool"] = {"kind": "fixed", "size": 2}
    config["data"]["sequence_length"] = 256
    train(config_from_dict(config))
    words = ["locality", str(tmp_path / "run"), "--data", str(tiny_data), *FEW, "--json"]
    assert main([*words, "--pool", "trained"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    free = json.loads(capsys.readouterr().out)
    assert trained["overall"]["switch_rate"] == 0 < free["overall"]["switch_rate"]
    assert (
        trained["overall"]["srp"]["4"] == trained["overall"]["cache"]["0.25"]["sch_4_hit_rate"] == 1
    )
    assert (tmp_path / "run/locality/locality.json").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cache", "0"], "cache=0: a cache holds a share"),
        (["--cache", "1.5"], "cache=1.5: a cache holds a share"),
        (["--segments", "1"], "segments=1: a segment has 2 tokens or more"),
        (["--documents", "1"], "documents=1 gives no standard error"),
        (["--domains", "rust"], "no held-out documents of domain 'rust'"),
        (["--micro-batch", "-1"], "micro_batch=-1 must be a positive number of rows"),
        (["--compare", "nowhere"], "nowhere"),
    ],
)
def test_bad_settings_are_one_line(run_dir, tiny_data, tmp_path, capsys, words, told):
    arguments = ["locality", str(run_dir), "--data", str(tiny_data), "--out", str(tmp_path / "out")]
    assert main([*arguments, *words]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not any(tmp_path.iterdir())


def test_a_dense_model_and_pins_of_unequal_layers_are_refused(tiny_data, tmp_path, capsys):
    for name, experts in (
        ("dense", {"routed": 0, "shared": 1, "top_k": 0}),
        ("unequal", {"routed_per_layer": [4, 6]}),
    ):
        config = tiny_settings(tiny_data, tmp_path / name, steps=1)
        config["model"]["experts"] |= experts
        if name == "dense":
            config["model"]["router"] = {"pool": {"kind": "none"}}
        else:
            config["model"]["router"] = {"pool": {"min": 2, "max": 4}}
        train(config_from_dict(config))
        capsys.readouterr()
        words = ["locality", str(tmp_path / name), "--data", str(tiny_data), *FEW]
        assert main([*words, "--export-pins", str(tmp_path / "pins.json")]) == 2
        printed = capsys.readouterr()
        assert ("is dense" if name == "dense" else "4, 6 experts") in printed.err
        assert not printed.out and not (tmp_path / "pins.json").exists()
