"""Proves that a placement is balanced, that no swap makes it better, that it finds pools, and that
rows are counted as the dispatcher sends them; and `emotrain placement` from the checkpoint to the
file."""

import json
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from helpers import tiny_config

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.evaluation.placement import _check_ranks
from emotrain.kernels.parcels import Spread, destinations
from emotrain.modular.placement import (
    contiguous,
    count_together,
    keep_ranks,
    order_of,
    place,
    rank_of,
    rank_sizes,
    traffic,
)
from emotrain.training.run import train
from tests.conftest import tiny_settings

CASES = [(8, 2, 3), (10, 4, 2), (7, 2, 4), (12, 3, 2), (12, 4, 3)]
"""(experts, ranks, chosen)."""


def choices(num_experts, num_chosen, seed, tokens=200):
    """Tokens of a few documents that like some experts more than others; some slots are empty."""
    random = np.random.default_rng(seed)
    taste = 2 * random.normal(size=(5, num_experts))[random.integers(5, size=tokens)]
    taste += random.gumbel(size=taste.shape)
    chosen_TK = np.argsort(-taste, axis=1)[:, :num_chosen].astype(np.int16)
    chosen_TK[::7, -1] = num_experts
    return chosen_TK


def pairs_on_one_rank(together_NN, rank_N):
    same = rank_N[:, None] == rank_N
    np.fill_diagonal(same, False)
    return together_NN[same].sum() / 2


def excess(together_NN, rank_N, num_ranks, max_load):
    load_W = np.bincount(rank_N, together_NN.diagonal(), num_ranks)
    return np.maximum(load_W / load_W.mean() - max_load, 0).sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_experts", "num_ranks", "num_chosen"), CASES)
def test_counts_are_those_of_a_loop(num_experts, num_ranks, num_chosen, seed):
    chosen_TK = choices(num_experts, num_chosen, seed)
    pairs, rows, slots, in_batch = Counter(), 0, Counter(), Counter()
    rank_N = np.random.default_rng(seed).permutation(contiguous(num_experts, num_ranks))
    for token, row in enumerate(chosen_TK.tolist()):
        used = [expert for expert in row if expert < num_experts]
        pairs.update((a, b) for a in used for b in used)
        rows += len({rank_N[expert] for expert in used})
        slots.update(rank_N[expert] for expert in used)
        in_batch.update((token // 50, rank_N[expert]) for expert in used)
    together_NN = count_together(chosen_TK, num_experts)
    assert all(
        together_NN[a, b] == pairs[a, b] for a in range(num_experts) for b in range(num_experts)
    )
    found = traffic(chosen_TK, rank_N, num_ranks, np.arange(len(chosen_TK)) // 50)
    assert found.rows_per_token == rows / len(chosen_TK)
    mean = sum(slots.values()) / num_ranks
    assert found.load_max_over_mean == pytest.approx(max(slots.values()) / mean)
    ratios = []
    for batch in range(4):
        loads = [in_batch[batch, rank] for rank in range(num_ranks)]
        ratios.append(max(loads) / np.mean(loads))
    assert found.exchange_load_max_over_mean == pytest.approx(np.mean(ratios))


@pytest.mark.parametrize(("num_experts", "num_ranks", "num_chosen"), CASES)
def test_rows_are_those_that_the_dispatcher_sends(num_experts, num_ranks, num_chosen):
    """And without a placement, experts are where the dispatcher looks for them."""
    chosen_TK = choices(num_experts, num_chosen, 0)
    spread = Spread(num_experts, num_ranks, -(-num_experts // num_ranks))
    _, send_W2 = destinations(torch.from_numpy(chosen_TK).long(), spread, "torch")
    found = traffic(chosen_TK, contiguous(num_experts, num_ranks), num_ranks)
    assert found.rows_per_token == int(send_W2[:, 0].sum()) / len(chosen_TK)
    slots_W = send_W2[:, 1].double()
    assert found.load_max_over_mean == pytest.approx(float(slots_W.max() / slots_W.mean()))


@pytest.mark.parametrize("max_load", [1.0, 1.05, 1.2, 99.0])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_experts", "num_ranks", "num_chosen"), CASES)
def test_ranks_are_full_and_no_swap_is_better(num_experts, num_ranks, num_chosen, seed, max_load):
    """Better is less load above the limit, or as much of it and more pairs on one rank."""
    together_NN = count_together(choices(num_experts, num_chosen, seed), num_experts)
    rank_N = place(together_NN, num_ranks, max_load)
    sizes_W = rank_sizes(num_experts, num_ranks)
    assert np.bincount(rank_N, minlength=num_ranks).tolist() == sizes_W.tolist()
    assert (place(together_NN, num_ranks, max_load) == rank_N).all()

    now = pairs_on_one_rank(together_NN, rank_N)
    above = excess(together_NN, rank_N, num_ranks, max_load)
    for a, b in combinations(range(num_experts), 2):
        swapped_N = rank_N.copy()
        swapped_N[[a, b]] = swapped_N[[b, a]]
        over = excess(together_NN, swapped_N, num_ranks, max_load)
        assert over > above - 1e-6
        if over <= above + 1e-12:
            assert pairs_on_one_rank(together_NN, swapped_N) <= now + 1e-6


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 2), (8, 3), (6, 3)])
def test_it_is_close_to_the_best_of_all_placements(num_experts, num_ranks, seed):
    together_NN = count_together(choices(num_experts, 3, seed), num_experts)
    every = set(permutations(contiguous(num_experts, num_ranks).tolist()))
    scores = [
        (
            excess(together_NN, np.array(ranks), num_ranks, 1.2),
            -pairs_on_one_rank(together_NN, np.array(ranks)),
        )
        for ranks in every
    ]
    best_above, best_pairs = min(scores)
    rank_N = place(together_NN, num_ranks, 1.2)
    assert excess(together_NN, rank_N, num_ranks, 1.2) <= best_above + 1e-9
    assert pairs_on_one_rank(together_NN, rank_N) >= 0.95 * -best_pairs
    free_N = place(together_NN, num_ranks, 99)
    best = max(-pairs for _, pairs in scores)
    assert pairs_on_one_rank(together_NN, free_N) >= 0.95 * best


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_pools_that_fit_on_a_rank_are_found(num_ranks):
    """Documents with pools of one rank's size, scattered over the numbers: one row a token."""
    random = np.random.default_rng(num_ranks)
    names_N = random.permutation(64)
    size = 64 // num_ranks
    pool_T = np.arange(4000) % num_ranks
    inside_TK = np.argsort(random.random((4000, size)), axis=1)[:, :5]
    chosen_TK = names_N[pool_T[:, None] * size + inside_TK]
    rank_N = place(count_together(chosen_TK, 64), num_ranks)
    assert traffic(chosen_TK, rank_N, num_ranks).rows_per_token == 1
    assert sorted(order_of(rank_N).tolist()) == list(range(64))


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 4), (7, 4), (127, 8)])
def test_groups_that_were_there_before_keep_their_ranks(num_experts, num_ranks):
    """Whatever a search calls them: only experts that leave their group move."""
    random = np.random.default_rng(num_experts)
    before_N = random.permutation(contiguous(num_experts, num_ranks))
    assert (rank_of(order_of(before_N), num_ranks) == before_N).all()
    # Ranks of one size may be called otherwise.
    sizes_W = rank_sizes(num_experts, num_ranks)
    name_W, full = np.arange(num_ranks), np.flatnonzero(sizes_W == sizes_W[0])
    name_W[full] = random.permutation(full)
    after_N = name_W[before_N]
    assert (keep_ranks(after_N, before_N, num_ranks) == before_N).all()
    one, other = np.flatnonzero(before_N == 0)[0], np.flatnonzero(before_N == 1)[0]
    after_N[[one, other]] = after_N[[other, one]]
    kept_N = keep_ranks(after_N, before_N, num_ranks)
    assert np.bincount(kept_N).tolist() == sizes_W.tolist()
    if num_experts // num_ranks > 2:
        assert np.flatnonzero(kept_N != before_N).tolist() == sorted([one, other])


def test_experts_that_nobody_chooses_are_placed_too():
    assert sorted(place(np.zeros((7, 7)), 3).tolist()) == [0, 0, 0, 1, 1, 1, 2]


def test_a_rank_without_experts_is_refused():
    assert rank_sizes(127, 8).tolist() == [16] * 7 + [15]
    for num_experts, num_ranks in ((4, 3), (2, 3), (5, 0)):
        with pytest.raises(ValueError, match=f"ep={num_ranks} leaves a rank without any of"):
            rank_sizes(num_experts, num_ranks)


def test_every_layer_is_asked_whether_its_experts_go_round():
    """Before a token is routed: over 4 ranks 7 experts are 2, 2, 2, 1, and 9 are 3, 3, 3, 0."""
    config = tiny_config(model__experts__routed_per_layer=[7, 9])
    with pytest.raises(ValueError, match="ep=4 leaves a rank without any of the 9 experts"):
        _check_ranks(config.model, [4])


@pytest.fixture(scope="module")
def run_dir(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement") / "run"
    settings = tiny_settings(tiny_data, folder)
    settings["model"]["experts"]["routed"] = 8
    train(config_from_dict(settings))
    return folder


def arguments(run_dir, data, out, *more):
    words = ["placement", run_dir, "--data", data, "--ep", 4, "--out", out, "--tokens", 2000]
    return [*map(str, words), *more]


def test_the_file_has_the_placement_and_what_it_costs(run_dir, tiny_data, tmp_path, capsys):
    out = tmp_path / "new" / "placement.json"
    assert main(arguments(run_dir, tiny_data, out)) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["format"] == 1 and result["step"] == 6 and result["ep"] == 4
    assert result["checkpoint"] == str(run_dir / "checkpoints/step-00000006")
    assert [layer["layer"] for layer in result["layers"]] == [0, 1]
    for layer in result["layers"]:
        assert sorted(layer["order"]) == list(range(8))
        assert 1 <= layer["rows_per_token"] <= 2
        assert f"{layer['rows_per_token']:.2f}" in printed
    assert result["placing_tokens"] + result["measured_tokens"] >= 2000
    assert f"wrote {out}" in printed
    first = out.read_bytes()
    assert main(arguments(run_dir, tiny_data, out, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == result and out.read_bytes() == first


def test_layers_of_one_bank_have_one_placement(tiny_data, tmp_path, capsys):
    settings = tiny_settings(tiny_data, tmp_path / "run")
    settings["model"]["experts"] |= {"routed": 8, "sharing": "all"}
    train(config_from_dict(settings))
    assert main(arguments(tmp_path / "run", tiny_data, tmp_path / "p.json", "--json")) == 0
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["layers"]
    assert first["order"] == second["order"] and first["layer"] != second["layer"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ep", "1"), "ep=1 spreads no experts"),
        (("--ep", "7"), "ep=7 leaves a rank without any of the 8 experts"),
        (("--max-load", "0.9"), "max_load=0.9"),
        (("--tokens", "0"), "tokens=0"),
        (("--tokens", "1", "--micro-batch", "-1"), "micro_batch=-1"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(run_dir, tiny_data, tmp_path, capsys, more, message):
    out = tmp_path / "placement.json"
    assert_refused(arguments(run_dir, tiny_data, out, *more), message, capsys)
    assert not out.exists()


def test_missing_or_foreign_inputs_are_one_line(run_dir, tiny_data, tmp_path, capsys):
    out = tmp_path / "placement.json"
    assert_refused(arguments(tmp_path, tiny_data, out), "no checkpoint here", capsys)
    assert_refused(arguments(run_dir, tmp_path / "nothing", out), "nothing", capsys)
    assert_refused(arguments(run_dir, tiny_data, tmp_path), "is a folder", capsys)
    (tmp_path / "file").write_text("")
    assert_refused(arguments(run_dir, tiny_data, tmp_path / "file/p.json"), "not a folder", capsys)
    settings = tiny_settings(tiny_data, tmp_path / "dense")
    settings["model"]["experts"] |= {"routed": 0, "top_k": 0}
    settings["model"]["router"] = {"pool": {"kind": "none"}}
    train(config_from_dict(settings))
    assert_refused(arguments(tmp_path / "dense", tiny_data, out), "the model is dense", capsys)


def assert_refused(words, message, capsys):
    capsys.readouterr()
    assert main(words) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and not printed.out
