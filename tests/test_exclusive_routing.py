"""Proves what exclusive experts compute: their domain always has them in its pool, and for every
other document the model is, to the last bit, the one that it was without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import refusal, tiny_batch, tiny_config, tiny_model

from emotrain.batch import PackedBatch
from emotrain.config import (
    Config,
    PoolConfig,
    RouterConfig,
    load_config,
    save_config,
    warnings_of,
)
from emotrain.generation.engine import Engine, EngineLimits
from emotrain.generation.request import GenerationRequest
from emotrain.generation.sampling import Sampling
from emotrain.kernels.backends import HAS_TRITON
from emotrain.model.losses import load_balance_loss, router_loss
from emotrain.model.router import LayerRequest, RoutingRequest, decide, training_request
from emotrain.model.transformer import Transformer
from emotrain.modular.select import allowed_experts

RUST_AND_HASKELL = {"rust": 2, "haskell": 1}


def with_exclusive(old: Transformer, exclusive: dict[str, int], seed: int = 1) -> Transformer:
    """A model whose common experts, and everything else, are those of an old one."""
    routed = old.config.experts.routed
    new = tiny_model(
        seed,
        model__experts__routed=routed + sum(exclusive.values()),
        model__experts__exclusive=exclusive,
        model__router__pool__kind=old.config.router.pool.kind,
    )
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            values = old.get_parameter(name)
            if name.endswith("router.weight_ED"):
                parameter[:routed], parameter[-1:] = values[:routed], values[routed:]
            elif ".experts." in name:
                parameter[:routed] = values
            else:
                parameter.copy_(values)
    return new


@pytest.fixture(scope="module")
def models() -> tuple[Transformer, Transformer]:
    old = tiny_model()
    return old, with_exclusive(old, RUST_AND_HASKELL)


def of_domain(batch: PackedBatch, name: str) -> PackedBatch:
    return replace(batch, domain=name)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


# ---- what other documents compute


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("domain", ["", "python"])
def test_other_documents_compute_what_they_did_to_the_bit(models, domain, padded):
    old, new = models
    batch = tiny_batch(padded=padded)
    requests = [RoutingRequest(), training_request(old.config, batch, seed=3, step=5)]
    masks = [torch.rand(5, 8) < 0.6 for _ in range(2)]
    for mask in masks:
        mask[:, 0] = True
    requests.append(RoutingRequest(kept=masks))
    for request in requests:
        if request.pool is not None:
            wider = training_request(new.config, batch, seed=3, step=5)
            assert equal(request.pool_sizes_LG, wider.pool_sizes_LG), "pools of the same sizes"
        before = old(batch, replace(request, details=True))
        if request.kept is not None:
            # Whatever a mask says of exclusive experts, others have none.
            kept = [torch.cat([mask, torch.ones(5, 3, dtype=torch.bool)], 1) for mask in masks]
            request = replace(request, kept=kept)
        after = new(of_domain(batch, domain), replace(request, details=True))
        assert equal(old.logits(before), new.logits(after))
        for one, other in zip(before.routing.layers, after.routing.layers, strict=True):
            assert equal(one.counts_N, other.counts_N[:8]) and not other.counts_N[8:].any()
            assert equal(one.details.document_scores_GN, other.details.document_scores_GN[:, :8])
            assert not other.details.document_scores_GN[:, 8:].any()


def test_a_domain_computes_the_same_whatever_other_domains_have(models):
    old, both = models
    batch = of_domain(tiny_batch(), "rust")
    rust = with_exclusive(old, {"rust": 2})
    for name, values in rust.named_parameters():
        source = both.get_parameter(name)
        if name.endswith("router.weight_ED"):
            source = torch.cat([source[:10], source[-1:]])
        values.data.copy_(source[:10] if ".experts." in name else source)
    request = training_request(both.config, batch, seed=3, step=5)
    for asked in (RoutingRequest(), request):
        assert equal(rust.logits(rust(batch, asked)), both.logits(both(batch, asked)))
    assert not equal(both.logits(both(batch)), both.logits(both(of_domain(batch, "haskell"))))


def test_a_domain_computes_what_a_model_of_its_experts_computes(models):
    _, new = models
    batch = tiny_batch()
    haskell = torch.tensor([*range(8), 10])
    as_a_subset = new(batch, RoutingRequest(subset=[haskell] * 2))
    assert equal(new.logits(as_a_subset), new.logits(new(of_domain(batch, "haskell"))))


@pytest.mark.parametrize("domain", ["", "rust"])
def test_generation_uses_the_experts_of_the_domain(models, domain):
    """Against the whole text, read anew for every token."""
    _, model = models
    tokens = [3, 1, 4, 1, 5, 9]
    subset = allowed_experts(model.config, domain) if domain else None
    engine = Engine(model, EngineLimits(1, 64, 64))
    found = engine.submit(GenerationRequest(tokens, Sampling(max_tokens=12), subset))
    while engine.busy:
        engine.step()
    for token in found.tokens:
        with torch.inference_mode():
            output = model(of_domain(PackedBatch.from_rows(torch.tensor([tokens])), domain))
            assert int(model.logits(output)[-1].argmax()) == token
        tokens = [*tokens, token]
    assert len(found.tokens) == 12
    experts = {"": range(8), "rust": range(10)}[domain]
    assert found.experts_kept == [list(experts)] * 2


# ---- pools


@pytest.mark.parametrize(
    "backend",
    ["torch", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton"))],
)
@pytest.mark.parametrize("kept", [False, True])
def test_forced_experts_are_in_every_pool_beyond_its_size(backend, kept):
    """Against a loop over documents."""
    generator = torch.Generator().manual_seed(2)
    logits_TN = torch.randn(40, 9, generator=generator)
    document_T = torch.arange(40) // 10
    sizes_G, forced = torch.tensor([1, 3, 7, 12]), 2
    kept_GN = torch.rand(4, 9, generator=generator) < 0.7
    kept_GN[:, [0, 8]] = True
    batch = PackedBatch(*[document_T[None]] * 3, torch.arange(4))
    request = LayerRequest(PoolConfig(), sizes_G, kept_GN if kept else None, num_forced=forced)
    decision = decide(logits_TN, batch, 3, RouterConfig(), request, backend)
    for document, size in enumerate(sizes_G.tolist()):
        rows = logits_TN[document_T == document]
        if kept:
            rows = rows.masked_fill(~kept_GN[document], -torch.inf)
        scores = rows.softmax(1).sum(0)[: 9 - forced].tolist()
        best = sorted(range(9 - forced), key=lambda i: (-scores[i], i))[:size]
        pool = {*best, 7, 8}
        if kept:
            pool &= set(kept_GN[document].nonzero()[:, 0].tolist())
        assert set(decision.pool_GN[document].nonzero()[:, 0].tolist()) == pool
        chosen = decision.experts_TK[document_T == document]
        assert set(chosen[chosen < 9].tolist()) <= pool


def test_a_domain_has_its_experts_in_every_pool_and_nobody_elses(models):
    _, new = models
    batch = tiny_batch()
    for name, own, others in (("rust", [8, 9], [10]), ("haskell", [10], [8, 9])):
        request = replace(training_request(new.config, batch, seed=0, step=1), details=True)
        assert int(request.pool_sizes_LG.max()) <= 8, "sizes count common experts"
        for layer in new(of_domain(batch, name), request).routing.layers:
            scores = layer.details.document_scores_GN
            assert (scores[:, own] > 0).all() and not scores[:, others].any()
            assert layer.counts_N[own].sum() > 0 and not layer.counts_N[others].any()


# ---- balance


def test_load_is_balanced_among_common_experts_alone(models):
    """Probabilities among common experts, and slots of common experts: exclusive ones neither draw
    load nor push it away."""
    old, new = models
    batch = tiny_batch()
    report = new(of_domain(batch, "rust"), RoutingRequest(details=True)).routing
    counts = [layer.counts_N for layer in report.layers]
    balance, _ = router_loss(report, counts, 32, new.config.experts.exclusive)
    by_hand = []
    for layer in report.layers:
        common = layer.details.logits_TN[:, :8].softmax(1)
        share = layer.counts_N[:8] / layer.counts_N[:8].sum()
        by_hand.append(8 * (share * common.mean(0)).sum())
    torch.testing.assert_close(balance, torch.stack(by_hand).mean())
    new.zero_grad()
    balance.backward()
    # Of the last layer: those of the first move what the last one balances.
    gradient_ED = new.blocks[-1].moe.router.weight_ED.grad
    assert gradient_ED[:8].abs().max() > 1e-4
    assert gradient_ED[8:11].abs().max() < 1e-7
    new.zero_grad()
    # Of other documents it is the loss that it was.
    asked = RoutingRequest(details=True)
    before, after = old(batch, asked).routing, new(batch, asked).routing
    losses = [
        router_loss(report, [layer.counts_N for layer in report.layers], 32, exclusive)
        for report, exclusive in ((before, ()), (after, new.config.experts.exclusive))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    alone = load_balance_loss(torch.ones(1, 8), torch.full((1, 8), 4.0), 32)
    assert float(alone) == pytest.approx(1.0)


# ---- settings


def test_settings_are_read_and_written_in_order(tmp_path):
    config = tiny_config(model__experts__routed=11, model__experts__exclusive={"b": 2, "a": 1})
    assert config.model.experts.exclusive == (("b", 2), ("a", 1))
    assert config.model.common_in_layer(0) == 8 and config.model.pool.max == 8
    save_config(config, tmp_path / "it.yaml")
    assert "exclusive:\n      b: 2\n      a: 1" in (tmp_path / "it.yaml").read_text()
    assert load_config(tmp_path / "it.yaml") == config
    asked = load_config(tmp_path / "it.yaml", ["model.experts.exclusive={c: 3}"])
    assert dict(asked.model.experts.exclusive)["c"] == 3
    assert Config().model.experts.exclusive == ()


@pytest.mark.parametrize(
    ("exclusive", "more", "fault"),
    [
        ({"a": 127}, {}, "leave none for other domains"),
        ({"a": 0}, {}, "has a domain without experts"),
        ({"": 1}, {}, "has a domain without a name"),
        ([["a", 1], ["a", 1]], {}, "without a name or twice"),
        ({"a": 1}, {"sharing": "all"}, "sharing=all shares them"),
        ("rust", {}, "must be whole numbers by name"),
        ({"a": 1.5}, {}, "must be whole numbers by name"),
        ({"a": True}, {}, "must be whole numbers by name"),
        ([1, 2], {}, "must be whole numbers by name"),
    ],
)
def test_experts_that_cannot_be_are_refused(exclusive: Any, more: dict, fault: str):
    assert fault in refusal({"model": {"experts": {"exclusive": exclusive, **more}}})


def test_pools_are_of_common_experts():
    settings = {"experts": {"routed": 10, "top_k": 2, "exclusive": {"a": 2}}}
    pool = {"kind": "fixed", "size": 9}
    fault = refusal({"model": {**settings, "router": {"pool": pool}}})
    assert "pool.size=9 is more than the 8 routed experts of layer 0" in fault


def test_experts_that_would_only_decay_are_warned_of():
    experts = {"model__experts__routed": 11, "model__experts__exclusive": {"a": 2, "b": 1}}
    (warning,) = warnings_of(tiny_config(**experts, data__domain="a", training__steps=9000))
    assert warning.startswith("exclusive experts of b get no tokens with data.domain=a")
    for more in (
        {"finetune__experts": "exclusive:a"},
        {"optimizer__weight_decay": 0},
        {"finetune__train": "shared"},
    ):
        assert not warnings_of(tiny_config(**experts, training__steps=9000, **more))
