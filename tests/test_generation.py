"""Generation: what the cache, the batch, pieces of prompts, subsets and pools leave as it is. The
oracle reads the whole text anew for every token."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.batch import PackedBatch
from emotrain.generation.cache import PAGE
from emotrain.generation.engine import Engine, EngineLimits
from emotrain.generation.request import GenerationRequest, PoolOfText
from emotrain.generation.sampling import Sampling
from emotrain.model.router import LayerRequest, RoutingRequest, select_pool
from emotrain.modular.select import greedy_ranking

# ---- the oracle


def uncached(model, prompt, count, subset=None):
    """Greedy tokens; every one from the whole text, by the model that trains."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            batch = PackedBatch.from_rows(torch.tensor([tokens]))
            kept = None if subset is None else [mask[None] for mask in subset]
            output = model(batch, RoutingRequest(kept=kept))
            tokens.append(int(model.logits(output)[-1].argmax()))
    return tokens[len(prompt) :]


def uncached_pools(model, prompt, count, pool, subset=None):
    """The same with a pool of the text so far: every token keeps the pool of its time. Returns
    tokens, and for each renewal the share of the experts that are new."""
    config, tokens = model.config, list(prompt)
    layers = range(config.num_layers)
    free = [
        torch.zeros(config.routed_in_layer(i)).masked_fill(
            ~(
                torch.ones(config.routed_in_layer(i), dtype=torch.bool)
                if subset is None
                else subset[i]
            ),
            -torch.inf,
        )
        for i in layers
    ]
    pools = [[] for _ in layers]  # of each layer, for each token bool [N]
    switches = []

    def run():
        """Logits of the last token, and each layer's free probabilities [T, N]."""
        together = PackedBatch.from_rows(torch.tensor([tokens]))
        apart = PackedBatch(
            together.tokens_BS,
            together.targets_BS,
            torch.arange(len(tokens))[None],
            torch.arange(len(tokens)),
        )
        x, view = model.embed(together)
        found = []
        for layer, block in enumerate(model.blocks):
            x = block.attend(x, view)
            normed = block.moe_norm(x).flatten(0, 1)
            if block.moe.router is not None:
                logits = (normed @ block.moe.router.weight_ED.t())[:, : len(free[layer])]
                found.append(torch.softmax(logits + free[layer], dim=1))
                if not pools[layer]:
                    choose(layer, found[-1], len(tokens))
            else:
                found.append(None)
            kept = torch.stack(pools[layer]) if pools[layer] else None
            x, _ = block.use_experts(x, apart, LayerRequest(kept_GN=kept))
        return model.head(model.norm(x[0, -1:]))[0], found

    def choose(layer, free_TN, times):
        best = select_pool(free_TN.sum(0)[None], torch.tensor([pool.sizes[layer]]))[0]
        pools[layer] += [best & (free[layer] == 0)] * times

    with torch.inference_mode():
        for number in range(1, count + 1):
            logits, found = run()
            tokens.append(int(logits.argmax()))
            if number == count:
                break
            renew = pool.renew_every and number % pool.renew_every == 0
            shares = []
            for layer in layers:
                if not pools[layer]:
                    continue
                before = pools[layer][-1]
                if renew:
                    choose(layer, found[layer], 1)
                    now = pools[layer][-1]
                    shares.append(float((now & ~before).sum() / now.sum()))
                else:
                    pools[layer].append(before)
            if renew:
                switches.append(sum(shares) / len(shares))
    return tokens[len(prompt) :], switches


def generate(model, *requests, limits=None):
    """Generations of requests that run together."""
    engine = Engine(model, limits or EngineLimits(8, 4096, 512, 64))
    found = [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
    assert engine.cache.pages_in_use == 0 and engine.cache.promised_pages == 0
    return found


def random_prompt(length, seed=0):
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_subset(model, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for layer in range(model.config.num_layers):
        mask_N = torch.rand(model.config.routed_in_layer(layer), generator=generator) < 0.5
        mask_N[seed % len(mask_N)] = True
        masks.append(mask_N)
    return masks


MODELS = {
    "emo": {},
    "grouped heads, several shared experts": {
        "model__num_heads": 4,
        "model__num_kv_heads": 2,
        "model__experts__shared": 2,
        "model__router__shared_weight": "softmax",
    },
    "normalised sigmoid gates": {
        "model__router__gating": "sigmoid",
        "model__router__normalize_weights": True,
    },
    "layers of different sizes": {"model__experts__routed_per_layer": (5, 8)},
    "dense": {
        "model__experts__routed": 0,
        "model__experts__top_k": 0,
        "model__router__pool__kind": "none",
    },
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny_model(**MODELS[request.param])


# ---- what leaves the tokens as they are


def test_cached_tokens_are_those_of_the_whole_text_read_anew(model):
    prompt = random_prompt(7)
    (found,) = generate(model, GenerationRequest(prompt, Sampling(max_tokens=2 * PAGE)))
    assert found.tokens == uncached(model, prompt, 2 * PAGE)
    assert len(set(found.tokens)) > 3, "a model that says one thing would prove nothing"


EMO = tiny_model()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    subsets=st.lists(st.sampled_from([None, 1, 2, 3]), min_size=5, max_size=5),
    step_tokens=st.integers(2, 50),
    seats=st.integers(1, 5),
)
def test_a_sequence_is_what_it_is_alone(lengths, subsets, step_tokens, seats):
    """Whatever runs beside it: other documents, other subsets, prompts in pieces, or in turn."""
    requests = [
        GenerationRequest(
            random_prompt(length, seed),
            Sampling(max_tokens=6 + seed, temperature=0.7 * (seed % 2), seed=seed),
            subset=subsets[seed] and random_subset(EMO, subsets[seed]),
        )
        for seed, length in enumerate(lengths)
    ]
    together = generate(EMO, *requests, limits=EngineLimits(seats, 512, 64, step_tokens))
    for request, found in zip(requests, together, strict=True):
        (alone,) = generate(EMO, request)
        assert found.tokens == alone.tokens


@pytest.mark.parametrize("seed", range(3))
def test_a_subset_is_that_of_the_model_that_trains(seed):
    subset, prompt = random_subset(EMO, seed), random_prompt(9, seed)
    (found,) = generate(EMO, GenerationRequest(prompt, Sampling(max_tokens=20), subset=subset))
    assert found.tokens == uncached(EMO, prompt, 20, subset)
    assert found.experts_kept == [mask_N.nonzero()[:, 0].tolist() for mask_N in subset]
    assert found.tokens != uncached(EMO, prompt, 20)


@pytest.mark.parametrize("renew_every", [0, 1, 5])
@pytest.mark.parametrize("inside", [None, 2])
def test_a_pool_is_chosen_by_the_text_so_far(renew_every, inside):
    pool = PoolOfText((3, 4), renew_every)
    subset = inside and random_subset(EMO, inside)
    requests = [
        GenerationRequest(random_prompt(11, seed), Sampling(max_tokens=24), subset, pool)
        for seed in range(2)
    ]
    for request, found in zip(requests, generate(EMO, *requests), strict=True):
        tokens, switches = uncached_pools(EMO, request.tokens, 24, pool, subset)
        assert found.tokens == tokens
        assert found.pool_renewals == len(switches)
        expected = sum(switches) / len(switches) if switches else None
        assert found.switch_rate == (expected and pytest.approx(expected))


def test_the_experts_that_a_prompt_chooses_are_those_of_select():
    prompt = random_prompt(20)
    request = GenerationRequest(prompt, Sampling(max_tokens=5), pool=PoolOfText((3, 5)))
    (found,) = generate(EMO, request)
    batch = PackedBatch.from_rows(torch.tensor([prompt]))
    masks, _ = greedy_ranking(EMO, [batch], torch.zeros(1, dtype=torch.int64), 1, (4, 6))
    assert found.experts_kept == [mask_JN[0].nonzero()[:, 0].tolist() for mask_JN in masks]
