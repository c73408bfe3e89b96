"""Generation: what the cache, the batch, pieces of prompts, subsets and pools leave as it is. The
oracle reads the whole text anew for every token."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lazy_experts import checkpoint_of, copied, cut_short, lazy_of

from emotrain.batch import PackedBatch
from emotrain.errors import UserError
from emotrain.generation.cache import PAGE, KVCache
from emotrain.generation.engine import Engine, EngineLimits
from emotrain.generation.request import GenerationRequest, PoolOfText
from emotrain.generation.sampling import Sampling
from emotrain.kernels import cpu_rows
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


@settings(max_examples=8, deadline=None)
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
            subset=random_subset(EMO, subsets[seed]) if subsets[seed] else None,
        )
        for seed, length in enumerate(lengths)
    ]
    together = generate(EMO, *requests, limits=EngineLimits(seats, 512, 64, step_tokens))
    for request, found in zip(requests, together, strict=True):
        (alone,) = generate(EMO, request)
        assert found.tokens == alone.tokens


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@needs_compiler
@pytest.mark.parametrize("pieces", [64, 3])
def test_log_probabilities_are_the_same_to_the_bit_in_every_batch(pieces):
    """Where the kernel for few tokens runs; a prompt cut elsewhere too."""
    asked = Sampling(max_tokens=12, logprobs=3, prompt_logprobs=True)
    requests = [
        GenerationRequest(
            random_prompt(length, seed), asked, random_subset(EMO, seed) if seed else None
        )
        for seed, length in enumerate((7, 1, 23, 40))
    ]
    together = generate(EMO, *requests, limits=EngineLimits(8, 512, 64, pieces))
    for request, found in zip(requests, together, strict=True):
        (alone,) = generate(EMO, request)
        assert (found.tokens, found.logprobs) == (alone.tokens, alone.logprobs)
        assert found.prompt_logprobs == alone.prompt_logprobs


@needs_compiler
def test_the_kernel_for_few_tokens_computes_what_torch_does(model, monkeypatch):
    prompt = random_prompt(37)
    request = GenerationRequest(prompt, Sampling(max_tokens=9, logprobs=1, prompt_logprobs=True))
    (by_rows,) = generate(model, request)
    monkeypatch.setattr(cpu_rows, "library", lambda: None)
    (in_torch,) = generate(model, request)
    assert by_rows.tokens == in_torch.tokens
    for one, other in zip(
        [*by_rows.prompt_logprobs[1:], *by_rows.logprobs],
        [*in_torch.prompt_logprobs[1:], *in_torch.logprobs],
        strict=True,
    ):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-5)


@needs_compiler
def test_the_number_of_threads_changes_no_bit(monkeypatch):
    """Of widths that are whole vectors, and that are not."""
    model = tiny_model(model__d_model=54, model__num_heads=3, model__experts__hidden=35)
    request = GenerationRequest(random_prompt(13), Sampling(max_tokens=4, logprobs=1))
    (one,) = generate(model, request)
    monkeypatch.setattr(cpu_rows, "_threads", lambda work: 3)
    (three,) = generate(model, request)
    assert one.logprobs == three.logprobs


@pytest.mark.parametrize("compiled", [True, False])
def test_without_the_kernel_batches_leave_tokens_as_they_are(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(cpu_rows, "library", lambda: None)
    requests = [
        GenerationRequest(random_prompt(length, length), Sampling(max_tokens=40))
        for length in (1, 9, 33)
    ]
    together = generate(EMO, *requests, limits=EngineLimits(3, 512, 128, 10))
    assert [found.tokens for found in together] == [
        uncached(EMO, request.tokens, 40) for request in requests
    ]


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
    subset = random_subset(EMO, inside) if inside else None
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


# ---- experts that come when they are needed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_of(tmp_path_factory.mktemp("lazy"))


def test_experts_that_come_and_go_change_no_bit(checkpoint):
    path, model = checkpoint
    asked = Sampling(max_tokens=15, logprobs=1)
    requests = [
        GenerationRequest(random_prompt(length, length), asked, random_subset(model, length))
        for length in (3, 70)  # one through the kernel for few tokens, one through torch
    ]
    limits = EngineLimits(2, 512, 128)
    loaded = generate(model, *requests, limits=limits)
    evicting = generate(lazy_of(path, slots=2).model, *requests, limits=limits)
    assert [found.logprobs for found in loaded] == [found.logprobs for found in evicting]


def test_a_file_that_was_cut_short_ends_those_who_need_it_and_nobody_else(checkpoint, tmp_path):
    copy = copied(checkpoint[0], tmp_path)
    model = lazy_of(copy).model
    num_layers, routed = model.config.num_layers, model.config.routed_in_layer(0)

    def only(expert):
        return [torch.arange(routed) == expert for _ in range(num_layers)]

    request, other = (
        GenerationRequest(random_prompt(5), Sampling(max_tokens=8), only(expert))
        for expert in (1, 2)
    )
    (whole,) = generate(model, request)
    for file in copy.glob("model-*.safetensors"):
        cut_short(file)
    found, lost = generate(model, request, other)
    assert found.tokens == whole.tokens and found.finish_reason == "length"
    assert lost.finish_reason == "error" and not lost.tokens
    assert "\n" not in str(lost.error)


# ---- sequences come and go


def test_a_cancelled_sequence_frees_what_it_holds_and_the_next_takes_its_place():
    engine = Engine(EMO, EngineLimits(1, 2 * PAGE, 64))
    first, second, third = (
        engine.submit(GenerationRequest(random_prompt(4, seed), Sampling(max_tokens=30)))
        for seed in range(3)
    )
    for _ in range(3):
        engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 2)
    assert engine.cancel(first) and engine.cancel(second)
    assert not engine.cancel(first)
    assert len(first.tokens) == 3 and (first.finish_reason, second.tokens) == ("cancelled", [])
    while engine.busy:
        engine.step()
    (alone,) = generate(EMO, third.request)
    assert third.tokens == alone.tokens
    assert engine.cache.pages_in_use == engine.cache.promised_pages == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.booleans()), max_size=30))
def test_pages_are_promised_given_and_taken_back(steps):
    """Against a count: never more than the limit, no page of two sequences, none lost."""
    cache, held, promised = KVCache(EMO.config, 20 * PAGE), [], 0
    for tokens, leaves in steps:
        need = -(-tokens // PAGE)
        if leaves and held:
            pages, length = held.pop(0)
            promised -= -(-length // PAGE)
            cache.release(pages, length)
            assert pages == []
        elif cache.promise(tokens):
            assert promised + need <= 20
            promised += need
            held.append(([], tokens))
            cache.extend(held[-1][0], tokens)
        else:
            assert promised + need > 20
        in_use = [page for pages, _ in held for page in pages]
        assert len(set(in_use)) == len(in_use) == cache.pages_in_use == promised
        assert cache.promised_pages == promised
        assert all(layer.shape[0] <= 20 for layer in cache.layers)


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (lambda: GenerationRequest([]), "the prompt has no tokens"),
        (lambda: GenerationRequest([64]), "the model has 0 to 63"),
        (lambda: GenerationRequest([1] * 60), "together more than the 64 of a sequence"),
        (lambda: GenerationRequest([1], Sampling(5, stop=("x",))), "stop texts need a tokenizer"),
        (
            lambda: GenerationRequest([1], Sampling(5), [torch.zeros(8, dtype=torch.bool)] * 2),
            "at least one of",
        ),
        (lambda: GenerationRequest([1], Sampling(5), None, PoolOfText((3,))), "1 sizes for 2"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(request_, line):
    engine = Engine(EMO, EngineLimits(2, 512, 64))
    with pytest.raises(UserError, match=line) as caught:
        engine.submit(request_())
    assert "\n" not in str(caught.value) and not engine.busy


def test_the_last_of_max_tokens_zero_is_the_prompt():
    request = GenerationRequest([5, 6, 7], Sampling(0, logprobs=1, prompt_logprobs=True))
    (found,) = generate(EMO, request)
    assert (found.tokens, found.finish_reason) == ([], "length")
    assert [one and one.token for one in found.prompt_logprobs] == [None, 6, 7]


def test_an_echoed_token_is_greedy_where_its_float_heads_the_top():
    (greedy,) = generate(EMO, GenerationRequest(random_prompt(6), Sampling(10, logprobs=0)))
    echoed = [*random_prompt(6), *greedy.tokens]
    request = GenerationRequest(echoed, Sampling(0, logprobs=4, prompt_logprobs=True))
    (found,) = generate(EMO, request)
    tail = found.prompt_logprobs[6:]
    assert all(one.logprob == one.top[0][1] and one.top[0][0] == one.token for one in tail)
    others = [one for one in found.prompt_logprobs[1:6] if one.token != one.top[0][0]]
    assert others and all(one.logprob < one.top[0][1] for one in others)
    assert all(len(one.top) == 4 for one in tail)
