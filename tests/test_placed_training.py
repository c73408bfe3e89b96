"""Proves that a placement of experts stays between the ranks: checkpoints are by number whatever
the order was, `auto` moves what pays, counted over all ranks, and a run that is stopped goes on as
if it had not been. That no placement changes training is in test_layout.py."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import nested, refusal

from emotrain.config import config_from_dict
from emotrain.distributed.parallelize import build_model
from emotrain.distributed.placement import by_number, dispatchers, orders_of, place_experts
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.modular.placement import (
    contiguous,
    count_together,
    place,
    rank_of,
    traffic,
)
from emotrain.training import checkpoint, placement
from emotrain.training import run as run_module
from emotrain.training.checkpoint import CheckpointWriter, TrainingState
from emotrain.training.engine import NativeEngine
from emotrain.training.optimizer import build_optimizer
from tests.conftest import tiny_settings
from tests.layouts import config, random_orders, whole
from tests.processes import run_ranks

pytestmark = pytest.mark.layout


# ---- rows that move


def tensors_of(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Parameters and moments, by number."""
    named = dict(engine.model.named_parameters())
    with by_number(engine.model, engine.optimizer):
        moments = {
            f"{moment}.{name}": engine.optimizer.state[parameter][moment]
            for name, parameter in named.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        return whole((named | moments).items())


def updated(settings, ranks: Ranks, seed: int) -> NativeEngine:
    model = build_model(settings, ranks)
    engine = NativeEngine(model, build_optimizer(model, settings.optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.sin(parameter.detach() * (100 + seed))
    engine.optimizer.step()
    return engine


@pytest.mark.parametrize(
    ("model", "parallel"), [("7 and 4 experts", {"ep": 2}), ("one bank", {"ep": 4})]
)
def test_a_checkpoint_knows_no_placement(model, parallel, tmp_path):
    """Saved from one order, loaded into another and into one process, bit for bit."""
    settings = config(parallel, model)
    state = TrainingState(1, 64, "abc", 0, 4, 1e-3, placement=((1, 0),))

    def save_and_load(ranks: Ranks):
        engine = updated(settings, ranks, seed=0)
        saved = tensors_of(engine)
        orders = random_orders(settings, 1)
        place_experts(engine.model, orders, engine.optimizer)
        held = [
            (list(d.order), experts.gate_up_NFD.full_tensor().detach())
            for d, experts in dispatchers(engine.model)
        ]
        with CheckpointWriter(tmp_path, asynchronous=True) as writer:
            engine.save(writer, settings, state, None)
        assert list(orders_of(engine.model)) == orders
        other = updated(settings, ranks, seed=1)
        place_experts(other.model, random_orders(settings, 2), other.optimizer)
        assert other.restore(checkpoint.find(tmp_path)) == state
        assert list(orders_of(other.model)) == random_orders(settings, 2)
        return saved, tensors_of(engine), tensors_of(other), held

    for saved, *others, held in run_ranks(save_and_load, 4):
        for tensors in others:
            assert tensors.keys() == saved.keys()
            assert all(torch.equal(tensors[name], saved[name]) for name in saved)
        for layer, (order, gate_up) in enumerate(held):
            name = f"blocks.{layer}.moe.experts.gate_up_NFD"
            by_name = saved.get(name, saved["blocks.0.moe.experts.gate_up_NFD"])
            assert order != sorted(order) and torch.equal(gate_up, by_name[order])
    _, model = checkpoint.load_model(tmp_path)
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())


# ---- what `auto` decides


def step_of(rank: int, documents: int = 24, micro_batches: int = 2, tokens: int = 60):
    """Micro-batches and their choices, of 8 experts in two layers: those of a document are of one
    half, which numbers scatter. Layer 1 is placed well by number."""
    random = np.random.default_rng(rank)
    batches, reports = [], []
    for _ in range(micro_batches):
        document_T = torch.from_numpy(random.integers(documents, size=tokens))
        ids_G = torch.arange(documents) + 1000 * rank
        ids_G[-1] = -1
        half_T = (ids_G[document_T] // 2 % 2).numpy()
        within_TK = np.argsort(random.random((tokens, 4)), axis=1)[:, :2]
        scattered_TK, neighbours_TK = (
            2 * within_TK + half_T[:, None],
            within_TK + 4 * half_T[:, None],
        )
        layers = []
        for chosen_TK in (scattered_TK, neighbours_TK):
            chosen_TK[document_T.numpy() == documents - 1] = 8
            layers.append(SimpleNamespace(chosen_TK=torch.from_numpy(chosen_TK.astype(np.int16))))
        batches.append(SimpleNamespace(document_T=document_T, document_ids_G=ids_G))
        reports.append(SimpleNamespace(layers=layers))
    return batches, reports


def auto_settings(**training):
    return config_from_dict(
        {
            "model": {
                "vocab_size": 64,
                "d_model": 16,
                "num_layers": 2,
                "num_heads": 2,
                "experts": {"routed": 8, "top_k": 2, "hidden": 64},
                "router": {"pool": {"min": 2, "max": 8}},
            },
            "parallel": {"ep": 2, "placement": "auto"},
            "training": {"steps": 9, "global_batch": 8, "micro_batch": 1, **training},
            "data": {"sequence_length": 24},
        }
    )


def decide(ranks: Ranks, settings) -> tuple:
    batches, reports = step_of(ranks.rank)
    placed: list = []
    placement.place_experts = lambda model, orders, optimizer: placed.append(orders)
    engine = SimpleNamespace(model=None, optimizer=None)
    every = settings.training.checkpoint_every
    state = TrainingState(every, 64, "abc", 0, 4, 1e-3)
    new, said = placement.reconsider(settings, engine, state, reports, batches, ranks)
    return new.placement, placed, said


def test_the_choices_of_all_ranks_place_and_measure():
    """Against one process that sees all tokens. Two ranks of ep 2, twice."""
    settings = auto_settings(checkpoint_every=1000)
    results = run_ranks(decide, 4, settings)
    assert all(result == results[0] for result in results)
    orders, placed, said = results[0]
    assert placed == [orders] and said["placement_moved_experts"] == [4, 0]
    assert orders[1] == tuple(range(8)), "which has nothing to gain"

    steps = [step_of(rank) for rank in range(4)]
    ids_T = np.concatenate([b.document_ids_G[b.document_T] for bs, _ in steps for b in bs])
    exchange_T = np.repeat([0, 1, 0, 1, 2, 3, 2, 3], 60)
    for layer in range(2):
        chosen = [r.layers[layer].chosen_TK.numpy() for _, reports in steps for r in reports]
        chosen_TK = np.concatenate(chosen)
        places_T, measures_T = (ids_T >= 0) & (ids_T % 2 == 0), ids_T % 2 == 1
        measures_T &= ids_T >= 0
        wanted = place(count_together(chosen_TK[places_T], 8), 2)
        order = np.array(orders[layer])
        assert np.array_equal(rank_of(order, 2) == rank_of(order, 2)[0], wanted == wanted[0])
        for name, rank_N in (("_before", contiguous(8, 2)), ("", rank_of(order, 2))):
            found = traffic(chosen_TK[measures_T], rank_N, 2, exchange_T[measures_T])
            assert said[f"placement_rows{name}"][layer] == pytest.approx(found.rows_per_token)
            load = pytest.approx(found.exchange_load_max_over_mean)
            assert said[f"placement_load{name}"][layer] == load
    assert said["placement_rows"][0] == 1 < said["placement_rows_before"][0]


def test_what_costs_more_than_it_saves_until_the_next_look_stays():
    """The price of four experts, two for each rank: 3 matrices of 64 x 16 and 2 moments of each."""
    _, _, said = run_ranks(decide, 2, auto_settings(checkpoint_every=1000))[0]
    fall = said["placement_rows_before"][0] - said["placement_rows"][0]
    fall += 2 * (said["placement_load_before"][0] - said["placement_load"][0])
    price_bytes, saved_bytes = 2 * 3 * 3 * 64 * 16 * 4, fall * (8 * 24 / 2) * 4 * 16 * 4
    enough = math.ceil(price_bytes / saved_bytes)
    for every, moves in ((enough - 1, False), (enough, True)):
        orders, placed, said = run_ranks(decide, 2, auto_settings(checkpoint_every=every))[0]
        assert bool(placed) == bool(orders) == moves
        assert said["placement_moved_experts"] == [4 * moves, 0]
        assert (said["placement_rows"] == said["placement_rows_before"]) == (not moves)


# ---- runs


def run_settings(data, run_dir, **training):
    settings = tiny_settings(data, run_dir, micro_batch=1, checkpoint_every=2, **training)
    settings["parallel"] = {"ep": 2, "placement": "auto"}
    return settings


def moves_everything(monkeypatch):
    """Whatever tiny runs choose is chance; every bank moves where the search says."""
    monkeypatch.setattr(placement, "_banks_that_pay", lambda config, banks, *_: set(banks))


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_run_moves_the_same_experts_and_ends_where_one_run_would(
    tiny_data, tmp_path, monkeypatch
):
    moves_everything(monkeypatch)
    once = config_from_dict(run_settings(tiny_data, tmp_path / "once", steps=7))
    run_ranks(lambda ranks: run_module.train(once, ranks), 2)
    stopped = config_from_dict(run_settings(tiny_data, tmp_path / "stopped", steps=7))

    def stop_in_step_5(ranks: Ranks):
        asked = iter([False] * 4 + [True])

        class Requests:
            def __enter__(self):
                return lambda: next(asked)

            def __exit__(self, *_):
                pass

        run_module._stop_requests = Requests
        return run_module.train(stopped, ranks)["step"]

    assert run_ranks(stop_in_step_5, 2) == [5, 5]
    state = checkpoint.load_state(checkpoint.find(tmp_path / "stopped"))
    assert state.placement and state.placement != (tuple(range(7)),) * 2
    run_ranks(lambda ranks: run_module.train(stopped, ranks), 2)
    for name in ("once", "stopped"):
        assert sum(
            sum(line.get("placement_moved_experts", [])) for line in metrics(tmp_path / name)
        )
    states, models = [], []
    for name in ("once", "stopped"):
        path = checkpoint.find(tmp_path / name)
        states.append(checkpoint.load_state(path))
        models.append(checkpoint.load_model(path)[1].state_dict())
    assert states[0] == states[1]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def placement_file(path, ep=2, orders=((6, 0, 2, 5, 1, 4, 3),) * 2, **changes):
    layers = [{"order": list(order), "exchange_load_max_over_mean": 1.1} for order in orders]
    values = {"format": 1, "ep": ep, "rows_per_token": 1.2, "layers": layers, **changes}
    path.write_text(json.dumps(values))
    return str(path)


def test_a_file_says_where_experts_lie(tiny_data, tmp_path):
    settings = run_settings(tiny_data, tmp_path / "run", steps=1)
    settings["parallel"]["placement"] = placement_file(tmp_path / "placement.json")
    run_ranks(lambda ranks: run_module.train(config_from_dict(settings), ranks), 2)
    state = checkpoint.load_state(checkpoint.find(tmp_path / "run"))
    assert state.placement == ((6, 0, 2, 5, 1, 4, 3),) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ep": 4}, "is for ep=4, parallel.ep is 2; change it, or compute one"),
        ({"orders": [[0, 1, 2, 3, 4, 5, 6]]}, "places 1 layers, the model has 2 with routed"),
        ({"orders": [[1, 0]] * 2}, "places 2 experts in layer 0, the model has 7; compute one"),
        ({"orders": [[0, 0]] * 2}, "entry 0 of its layers has no permutation of experts"),
        ({"orders": [[0, True]] * 2}, "entry 0 of its layers has no permutation"),
        ({"format": 2}, "its format is 2, not 1"),
        ({"layers": None}, "not a placement of experts"),
        ({"rows_per_token": None}, "not a placement of experts"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(changes, message, tmp_path):
    settings = tiny_settings(tmp_path, tmp_path / "run")
    settings["parallel"] = {"ep": 2, "placement": placement_file(tmp_path / "p.json", **changes)}
    assert_refused(settings, message)


def test_files_that_are_none_are_one_line(tmp_path):
    settings = tiny_settings(tmp_path, tmp_path / "run")
    for name, content, message in (
        ("none.json", None, "No such file"),
        ("text.json", "experts", "not a placement of experts"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        settings["parallel"] = {"ep": 2, "placement": str(tmp_path / name)}
        assert_refused(settings, message)


def test_layers_of_one_bank_have_one_order(tmp_path):
    settings = tiny_settings(tmp_path, tmp_path / "run")
    settings["model"]["experts"]["sharing"] = "all"
    orders = [[0, 1, 2, 3, 4, 5, 6], [1, 0, 2, 3, 4, 5, 6]]
    path = placement_file(tmp_path / "p.json", orders=orders)
    settings["parallel"] = {"ep": 2, "placement": path}
    assert_refused(settings, "places layer 1 otherwise than a layer that shares its experts")


def assert_refused(settings, message):
    from emotrain.training.start import place as place_at_start

    state = TrainingState(1, 64, "abc", 0, 4, 1e-3)
    with pytest.raises(UserError, match=message) as caught:
        place_at_start(config_from_dict(settings), Ranks(), SimpleNamespace(), state)
    assert "\n" not in str(caught.value)


def test_settings_that_place_nothing_are_refused():
    assert "places experts on the ranks of parallel.ep, which is 1" in refusal(
        nested("parallel.placement", "auto")
    )
    settings = {"parallel": {"ep": 2, "placement": "auto"}, "training": {"checkpoint_every": 0}}
    assert "training.checkpoint_every, which is 0" in refusal(settings)


@pytest.mark.parametrize("placement", [[[0, 0]], [0], "auto", [[0.0, 1.0]]])
def test_a_state_whose_placement_is_none_is_refused(placement, tmp_path):
    from emotrain.training.checkpoint_folders import read_state, write_state

    write_state(tmp_path, TrainingState(1, 64, "abc", 0, 4, 1e-3, placement=((1, 0),)), 1)
    assert read_state(tmp_path)[0].placement == ((1, 0),)
    values = json.loads((tmp_path / "state.json").read_text()) | {"placement": placement}
    (tmp_path / "state.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not a list of permutations"):
        read_state(tmp_path)
