"""Loss-free load balancing: biases choose experts and weigh nothing, move by the counts of the
whole step and by nothing else, even out a skewed load, and go wherever the model goes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decision_of, random_document_T, refusal, tiny_batch, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import generate, uncached
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.cli import main
from emotrain.config import Config, config_from_dict, load_config, save_config, with_settings
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.generation.request import GenerationRequest
from emotrain.generation.sampling import Sampling
from emotrain.interop.export_folder import export_checkpoint
from emotrain.model.parts import stored_tensors
from emotrain.model.router import route, training_request
from emotrain.model.transformer import FULL, Transformer
from emotrain.modular.artefact import read_subset
from emotrain.planning.dry_run import dry_run
from emotrain.subsets.exclusive import add_experts, remove_experts
from emotrain.subsets.extraction import extract, taken_from
from emotrain.subsets.lazy_model import load_lazy
from emotrain.subsets.reinsertion import reinsert
from emotrain.subsets.selection import SelectSettings, select
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from emotrain.training.choice_bias import bias_moves
from emotrain.training.deepspeed_options import read_options
from emotrain.training.engine import NativeEngine
from emotrain.training.metrics import routing_metrics
from emotrain.training.optimizer import build_optimizer
from emotrain.training.step import train_step
from tests.conftest import tiny_settings
from tests.processes import run_ranks

BIAS: dict[str, Any] = {"balance_method": "bias", "balance": 0.0, "bias_rate": 0.05}


def biased(**overrides: Any) -> Config:
    losses = {f"losses__{key}": value for key, value in BIAS.items()}
    return tiny_config(**{"model__init_std": 0.3, **losses, **overrides})


def biases(model: Transformer) -> list[Tensor]:
    found = [block.moe.router.choice_bias_N for block in model.blocks if block.moe.router]
    assert all(bias_N is not None for bias_N in found)
    return [bias_N.clone() for bias_N in found if bias_N is not None]


def with_biases(config: Config, scale: float = 0.2) -> Transformer:
    """A model whose biases decide."""
    model, generator = Transformer(config.model).initialize(0), torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        buffer.copy_(scale * torch.randn(buffer.shape, generator=generator))
        assert name.endswith("choice_bias_N")
    return model


# ---- the choice


@given(st.integers(0, 10_000), st.sampled_from(["softmax", "sigmoid"]), st.booleans())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_bias_chooses_and_weighs_nothing(seed: int, gating: str, unmasked: bool) -> None:
    """Choices are those of a loop over tokens; weights, and gradients, those of the chosen experts
    without a bias."""
    torch.manual_seed(seed)
    logits_TN = torch.randn(12, 7, dtype=torch.float64).requires_grad_()
    pool_TN, bias_N = torch.rand(12, 7) < 0.6, torch.randn(7, dtype=torch.float64)
    pool_TN[:, 2] = True
    inside_TN = logits_TN if unmasked else logits_TN.masked_fill(~pool_TN, -torch.inf)
    probabilities_TN, weights_TK, experts_TK = route(
        inside_TN, 3, gating, False, pool_TN if unmasked else None, bias_N
    )
    plain_TN, _, _ = route(inside_TN, 3, gating, False, pool_TN if unmasked else None)
    assert torch.equal(probabilities_TN, plain_TN)
    of_chosen = []
    for token in range(12):
        score = {n: (plain_TN[token, n] + bias_N[n]).item() for n in range(7) if pool_TN[token, n]}
        best = sorted(score, key=lambda n: -score[n])[:3]
        assert experts_TK[token].tolist() == best + [7] * (3 - len(best))
        assert torch.equal(weights_TK[token, : len(best)], plain_TN[token, best])
        assert (weights_TK[token, len(best) :] == 0).all()
        of_chosen.append(plain_TN[token, best].square().sum())
    got, wanted = (
        torch.autograd.grad(value, logits_TN, retain_graph=True)[0]
        for value in (weights_TK.square().sum(), torch.stack(of_chosen).sum())
    )
    torch.testing.assert_close(got, wanted)


def test_pools_and_scores_are_chosen_without_it() -> None:
    """And an expert that underflowed stays an empty slot."""
    logits_TN, document_T = torch.randn(40, 9), random_document_T(40, 4, seed=1)
    sizes_G, bias_N = torch.tensor([3, 4, 5, 9]), torch.randn(9)
    plain, with_bias = (
        decision_of(logits_TN, document_T, 4, 2, sizes_G, choice_bias_N=bias)
        for bias in (None, bias_N)
    )
    assert torch.equal(plain.pool_GN, with_bias.pool_GN)
    assert torch.equal(plain.scores_GN, with_bias.scores_GN)
    assert torch.equal(plain.lse_T, with_bias.lse_T)
    assert not torch.equal(plain.experts_TK, with_bias.experts_TK)
    far = decision_of(logits_TN * 1e4, document_T, 4, 2, sizes_G, choice_bias_N=100 * bias_N)
    assert (far.experts_TK == 9).any() and (far.weights_TK[far.experts_TK == 9] == 0).all()


# ---- how it moves


def oracle(model: Transformer, batches: list[PackedBatch], config: Config, step: int):
    """For each layer how biases move, by a loop over tokens."""
    num_layers, num_routed = config.model.num_layers, config.model.routed_in_layer(0)
    counts = [[0] * num_routed for _ in range(num_layers)]
    reached = [[False] * num_routed for _ in range(num_layers)]
    for batch in batches:
        request = training_request(config.model, batch, config.training.seed, step)
        with torch.no_grad():
            report = model(batch, replace(request, details=True)).routing
        valid_T = [True] * len(batch.document_T) if batch.valid_T is None else batch.valid_T
        for layer, statistics in enumerate(report.layers):
            details = statistics.details
            assert details is not None
            for token, document in enumerate(batch.document_T.tolist()):
                if not valid_T[token]:
                    continue
                for expert in details.experts_TK[token].tolist():
                    if expert < num_routed:
                        counts[layer][expert] += 1
                scores = details.document_scores_GN[document].tolist()
                size = int(statistics.pool_size_G[document])
                best = sorted(range(num_routed), key=lambda n: (-scores[n], n))[:size]
                for expert in best:
                    reached[layer][expert] = True
    moves = []
    for layer in range(num_layers):
        bank = config.model.bank_of_layer(layer)
        of_bank = [i for i in range(num_layers) if config.model.bank_of_layer(i) == bank]
        load = [sum(counts[i][n] for i in of_bank) for n in range(num_routed)]
        mean = sum(load) / num_routed
        moves.append(
            [
                (1 if load[n] < mean else -1 if load[n] > mean else 0) * reached[layer][n]
                for n in range(num_routed)
            ]
        )
    return moves


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model__experts__sharing": "all"},
        {"model__router__pool__kind": "fixed", "model__router__pool__size": 2},
    ],
    ids=["published", "one bank", "pools of 2"],
)
def test_a_step_moves_biases_as_a_loop_over_tokens_says(overrides: dict[str, Any]) -> None:
    config = biased(**overrides)
    model = Transformer(config.model).initialize(0)
    engine = NativeEngine(model, build_optimizer(model, config.optimizer))
    still = 0
    for step in range(1, 5):
        batches = [
            tiny_batch(seed=step),
            tiny_batch(((16,), (6, 10)), padded=True, seed=-step % 99),
        ]
        wanted = oracle(model, batches, config, step)
        before = biases(model)
        assert train_step(engine, batches, config, step, Ranks()).applied
        for bias_N, old_N, moves in zip(biases(model), before, wanted, strict=True):
            assert torch.equal(bias_N, old_N.add(torch.tensor(moves).float(), alpha=0.05))
            still += moves.count(0)
    assert any(bias_N.ne(0).any() for bias_N in biases(model))
    assert still or "model__router__pool__kind" not in overrides


def test_moves_by_hand() -> None:
    """Toward the mean; an even load, an expert that no pool had, and exclusive ones stay."""
    ones = torch.ones(4, dtype=torch.int64)
    moves = bias_moves([[0]], [torch.tensor([1, 2, 3, 2])], [ones])
    assert moves[0].tolist() == [1, 0, -1, 0]
    moves = bias_moves([[0]], [torch.tensor([0, 0, 3, 5])], [torch.tensor([9, 0, 1, 1])])
    assert moves[0].tolist() == [1, 0, -1, -1]
    moves = bias_moves([[0]], [torch.tensor([1, 3, 50, 0])], [ones], exclusive=(("rust", 2),))
    assert moves[0].tolist() == [1, -1, 0, 0]
    # Of one bank: layer 0 alone would say otherwise. Each moves what its own tokens could choose.
    counts = [torch.tensor([5, 1]), torch.tensor([0, 8])]
    found = bias_moves([[0, 1]], counts, [torch.tensor([1, 1]), torch.tensor([0, 1])])
    assert [moves_N.tolist() for moves_N in found] == [[1, -1], [0, -1]]


def test_an_update_that_is_skipped_moves_no_bias_and_no_optimizer_has_it() -> None:
    config = biased(optimizer__weight_decay=0.5)
    model = with_biases(config)
    optimizer = build_optimizer(model, config.optimizer)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(buffer) for buffer in model.buffers()}
    before = biases(model)
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan
    batch = tiny_batch()
    batch.tokens_BS[0, 0] = 0
    assert not train_step(NativeEngine(model, optimizer), [batch], config, 1, Ranks()).applied
    assert all(map(torch.equal, biases(model), before))


def test_a_skewed_load_becomes_even() -> None:
    """Two experts that every token chooses lose some of them, with weights that do not move. The
    balance is that of the balance loss, over the global batch."""
    config = biased(losses__bias_rate=0.01, optimizer__lr=1e-12, model__router__pool__kind="none")
    model = Transformer(config.model).initialize(0)
    with torch.no_grad():
        model.embedding.weight += 1
        for block in model.blocks:
            block.moe.router.weight_ED[:2] += 0.03
    engine = NativeEngine(model, build_optimizer(model, config.optimizer))
    batches = [tiny_batch(((16,),) * 6, seed=seed) for seed in (0, 1)]
    balances, loads = [], []
    for step in range(1, 45):
        before = biases(model)
        result = train_step(engine, batches, config, step, Ranks())
        metrics = routing_metrics(result.reports, Ranks())
        spread = [float(bias_N.max() - bias_N.min()) for bias_N in before]
        assert metrics["choice_bias_spread"] == spread
        balances.append(result.balance)
        loads.append(sum(metrics["load_imbalance"]) / 2)
    assert loads[0] > 2.6 and sum(loads[-4:]) / 4 < 2
    assert balances[0] > 1.8 and sum(balances[-4:]) / 4 < 1.25


def test_the_balance_that_is_reported_is_that_of_the_loss_and_has_no_gradient() -> None:
    """A first step, whose biases are zero, is one of `loss` with weight 0."""
    results, gradients = [], []
    for changes in ({}, {"losses__balance_method": "loss"}):
        config = biased(**changes)
        model = Transformer(config.model).initialize(0)
        batches = [tiny_batch(seed=1), tiny_batch(seed=2, padded=True)]
        result = train_step(NativeEngine(model), batches, config, 1, Ranks())
        results.append([result.loss, result.balance, result.router_z, result.grad_norm])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert results[0] == pytest.approx(results[1], rel=1e-6) and results[0][1] > 1
    torch.testing.assert_close(*gradients)


# ---- settings


def test_settings_that_mean_nothing_are_refused_in_one_line() -> None:
    def said(**settings: Any) -> str:
        return refusal({"losses": {**BIAS, **settings.pop("losses", {})}, **settings})

    assert "losses.balance=0.1 is the weight of the loss" in said(losses={"balance": 0.1})
    assert "set losses.balance=0" in refusal({"losses": {"balance_method": "bias"}})
    for key, value in (("balance_scope", "micro_batch"), ("balance_schedule", "running")):
        assert f"remove losses.{key}" in said(losses={key: value})
    dense = {"experts": {"routed": 0, "top_k": 0}, "router": {"pool": {"kind": "none"}}}
    assert "a dense model has none" in said(model=dense)
    assert "keeps some as they are" in said(finetune={"train": "routed"})
    assert "keeps some as they are" in said(finetune={"experts": "last:2"})
    assert "losses.bias_rate=0.0 must be positive" in said(losses={"bias_rate": 0.0})


def test_a_model_has_biases_where_a_run_moves_them_and_keeps_them_afterwards(tmp_path: Path):
    config = biased()
    assert config.model.router.choice_bias and not tiny_config().model.router.choice_bias
    assert not list(Transformer(tiny_config().model).named_buffers())
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    after = with_settings(config, {}, ["losses.balance_method=loss"])
    assert after.model == config.model
    model = with_biases(after)
    before = biases(model)
    engine = NativeEngine(model, build_optimizer(model, after.optimizer))
    assert train_step(engine, [tiny_batch()], after, 1, Ranks()).applied
    assert all(map(torch.equal, biases(model), before))


def test_deepspeed_refuses_biases(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    with pytest.raises(UserError, match=r"DeepSpeed rounds buffers.*train without --deepspeed$"):
        read_options(tmp_path / "zero.json", biased(), 1)


@pytest.mark.long
def test_a_plan_knows_that_no_loss_balances_and_no_pass_waits() -> None:
    """The biases of 2 layers of 8 experts are all that is more: by turns, the activations of one
    micro-batch are there at a time."""
    plain, other = (
        dry_run(
            biased(training__precision="bfloat16", training__global_batch=8, **changes), 2, "sm_90"
        )
        for changes in ({"losses__balance_method": "loss"}, {})
    )
    assert other.state_bytes["parameters"] == plain.state_bytes["parameters"] + 2 * 8 * 4
    assert other.state_bytes["optimizer"] == plain.state_bytes["optimizer"]
    assert other.peak_bytes < plain.peak_bytes


# ---- where the model goes


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """A trained run with large biases: without them it is another model."""
    folder = tmp_path_factory.mktemp("run")
    run_module.train(settings_of(tiny_data, folder, steps=8), Ranks())
    _, model = load_model(folder)
    assert all(bias_N.abs().max() >= 0.15 for bias_N in biases(model))
    return folder


def settings_of(data: Path, folder: Path, **training: Any) -> Config:
    settings = tiny_settings(data, folder, **training)
    settings["model"]["init_std"] = 0.3
    settings["losses"] = {**settings.get("losses", {}), **BIAS}
    return config_from_dict(settings)


def everything(folder: Path) -> dict[str, Tensor]:
    return stored_tensors(load_model(folder)[1])


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(got[name], values), name


def test_a_run_that_was_stopped_goes_on_bit_for_bit(run, tiny_data, tmp_path, monkeypatch) -> None:
    config, stop_at = settings_of(tiny_data, tmp_path / "two", steps=8), iter([False] * 2 + [True])
    with monkeypatch.context() as patch:
        stops = nullcontext(lambda: next(stop_at))
        patch.setattr(run_module, "_stop_requests", lambda: stops)
        assert run_module.train(config, Ranks())["step"] == 3
    assert run_module.train(config, Ranks())["step"] == 8
    assert_equal(everything(tmp_path / "two"), everything(run))


def test_a_checkpoint_of_one_layout_goes_on_on_another(run, tiny_data, tmp_path) -> None:
    """Two processes load what one saved, and one what two saved, biases and all."""
    config = settings_of(tiny_data, tmp_path, steps=9, micro_batch=2, resume=str(find(run)))

    def going_on(ranks: Ranks) -> None:
        run_module.train(config, ranks)

    run_ranks(going_on, 2)
    alone = settings_of(tiny_data, tmp_path / "one", steps=9, resume=str(find(run)))
    run_module.train(alone, Ranks())
    got, wanted = everything(tmp_path), everything(tmp_path / "one")
    for name, values in wanted.items():
        if name.endswith("choice_bias_N"):
            assert torch.equal(got[name], values), name
        else:
            torch.testing.assert_close(got[name], values, rtol=1e-3, atol=1e-4)


def test_a_subset_has_the_biases_of_its_experts(run, tiny_data, tmp_path) -> None:
    """Extracted, taken from memory, masked, tuned and put back."""
    subset_file = select(run, tiny_data, SelectSettings(keep="3", domain="kitchen", documents=4))
    file = subset_file.save(tmp_path / "subset.json")
    small = extract(run, file, tmp_path / "small", check=True)
    assert small.max_difference is not None and small.max_difference < 1e-6
    config, full = load_model(run)
    subset, extracted = read_subset(file), everything(tmp_path / "small")
    assert_equal(stored_tensors(taken_from(full, config, subset)), extracted)
    for layer, bias_N in enumerate(biases(full)):
        kept = torch.tensor(subset.routed(layer))
        assert torch.equal(extracted[f"blocks.{layer}.moe.router.choice_bias_N"], bias_N[kept])
    back = reinsert(run, tmp_path / "small", file, tmp_path / "back", parts="router")
    assert back.changed_parameters == 0
    assert small.parameters == sum(
        p.numel() for p in load_model(tmp_path / "small")[1].parameters()
    )
    assert_equal(everything(tmp_path / "back"), everything(run))


def test_exclusive_experts_leave_biases_as_they_are(run, tmp_path) -> None:
    for sources in (lambda: None, lambda: [[[0]], [[1, 2]]]):
        out = tmp_path / f"added{sources() is None}"
        changed = add_experts(run, out, "rust", 1, sources=sources, check=True)
        assert changed.max_difference == 0.0
        before = everything(run)["blocks.1.moe.router.choice_bias_N"]
        after = everything(out)["blocks.1.moe.router.choice_bias_N"]
        assert torch.equal(after[:7], before)
        assert after[7] == (0 if sources() is None else before[1:3].double().mean().float())
        assert remove_experts(out, tmp_path / f"{out.name}-", "rust").parameters == sum(
            p.numel() for p in load_model(run)[1].parameters()
        )
        assert_equal(everything(tmp_path / f"{out.name}-"), everything(run))


def test_experts_that_come_when_needed_and_generation_choose_by_them(run) -> None:
    _, model = load_model(run)
    batch = PackedBatch.from_rows(torch.arange(24).view(2, 12))
    with torch.inference_mode():
        wanted = model.logits(model(batch, FULL))
        lazy = load_lazy(run).model
        assert torch.equal(lazy.logits(lazy(batch, FULL)), wanted)
        half = load_lazy(run, dtype=torch.bfloat16).model
    assert all(map(torch.equal, biases(half), biases(model)))
    model, prompt = with_biases(biased(), scale=1.0), list(range(5, 12))
    without = {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
    for backend in ("auto", "torch"):
        own = replace(model.config, experts=replace(model.config.experts, backend=backend))
        again = Transformer(own)
        again.load_state_dict(model.state_dict())
        (found,) = generate(again, GenerationRequest(prompt, Sampling(max_tokens=20)))
        assert found.tokens == uncached(model, prompt, 20)
        again.load_state_dict(model.state_dict() | without)
        (other,) = generate(again, GenerationRequest(prompt, Sampling(max_tokens=20)))
        assert other.tokens != found.tokens, "biases that change nothing would prove nothing"


def test_an_export_refuses_biases(run, tmp_path, capsys) -> None:
    with pytest.raises(
        UserError, match=r"^model\.router\.choice_bias=true: the format has no bias"
    ):
        export_checkpoint(run, tmp_path / "out", "published")
    words = ["export", str(run), "--out", str(tmp_path / "out"), "--layout", "published"]
    assert main(words) == 2
    assert "losses.balance_method=loss" in capsys.readouterr().err


def test_a_run_without_biases_is_not_gone_on_with(run, tiny_data, tmp_path) -> None:
    settings = tiny_settings(tiny_data, tmp_path, steps=9, resume=str(find(run)))
    settings["model"]["init_std"] = 0.3
    with pytest.raises(UserError, match=r"choice_bias_N is not in the model; use the config"):
        run_module.train(config_from_dict(settings), Ranks())
