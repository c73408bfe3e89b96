"""Several sequences of one prompt: each is what it would be as a request of its own, and the prompt
is read once."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import generate, random_prompt, random_subset

from emotrain.generation.engine import FEW, Engine, EngineLimits
from emotrain.generation.request import GenerationRequest, PoolOfText
from emotrain.generation.sampling import Sampling

EMO = tiny_model()
DRAWN = Sampling(max_tokens=9, temperature=1.0, seed=3, logprobs=2)
LONG = FEW + 36
REQUESTS = {
    "one token": GenerationRequest([7], DRAWN),
    "a short prompt": GenerationRequest(random_prompt(11), DRAWN),
    "in pieces": GenerationRequest(random_prompt(40), DRAWN),
    "a long one": GenerationRequest(random_prompt(LONG), DRAWN),
    "of a subset": GenerationRequest(random_prompt(11), DRAWN, random_subset(EMO, 2)),
    "with a pool": GenerationRequest(random_prompt(11), DRAWN, pool=PoolOfText((3, 4), 4)),
    "a scored prompt": GenerationRequest(random_prompt(11), replace(DRAWN, prompt_logprobs=True)),
    "nothing to generate": GenerationRequest(random_prompt(11), replace(DRAWN, max_tokens=0)),
    "a single token": GenerationRequest(random_prompt(11), replace(DRAWN, max_tokens=1)),
}


def with_seed(request: GenerationRequest, index: int) -> GenerationRequest:
    sampling = replace(request.sampling, seed=request.sampling.seed + index)
    return replace(request, sampling=sampling)


def counted(engine: Engine) -> list[int]:
    """Grows by the tokens of prompts that the engine's model reads."""
    run, found = engine._run, []

    def counting(batch):
        for sequence, part in batch:
            left = len(sequence.generation.request.tokens) - part.start
            found.append(max(0, min(left, len(part.tokens))))
        return run(batch)

    engine._run = counting
    return found


def ended(engine: Engine) -> None:
    while engine.busy:
        engine.step()
    assert engine.cache.pages_in_use == engine.cache.promised_pages == 0


def same(found, alone) -> bool:
    """To the bit where the kernel makes a token the same in every batch."""
    names = ["tokens", "experts_kept", "switch_rate", "finish_reason"]
    if shutil.which("g++"):
        names += ["logprobs", "prompt_logprobs"]
    return all(getattr(found, name) == getattr(alone, name) for name in names)


@pytest.mark.parametrize("name", REQUESTS)
def test_each_is_what_it_would_be_alone_and_the_prompt_is_read_once(name):
    request, limits = REQUESTS[name], EngineLimits(8, 4096, 128, 16 if "pieces" in name else 512)
    engine = Engine(EMO, limits)
    read = counted(engine)
    found = engine.submit_several(request, 4)
    ended(engine)
    assert sum(read) == len(request.tokens)
    for index, generation in enumerate(found):
        (alone,) = generate(EMO, with_seed(request, index), limits=limits)
        assert same(generation, alone)
    if request.sampling.max_tokens > 1:
        assert len({tuple(generation.tokens) for generation in found}) == 4


def test_who_comes_later_takes_what_an_earlier_one_has_read():
    """With room for two, the third takes the place of the one that leaves."""
    request = replace(REQUESTS["with a pool"], sampling=replace(DRAWN, max_tokens=20))
    engine = Engine(EMO, EngineLimits(2, 512, 64))
    read = counted(engine)
    found = engine.submit_several(request, 3)
    for _ in range(7):
        engine.step()
    engine.cancel(found[0])
    ended(engine)
    assert sum(read) == len(request.tokens)
    for index in (1, 2):
        (alone,) = generate(EMO, with_seed(request, index))
        assert same(found[index], alone)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(REQUESTS)),
    count=st.integers(1, 5),
    seats=st.integers(1, 5),
    cancelled=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=3),
)
def test_whoever_leaves_and_whenever_the_others_are_what_they_are_alone(
    name, count, seats, cancelled
):
    """Also the one that reads the prompt; beside another sequence."""
    limits = EngineLimits(seats, 512, 128, 16)
    engine, request = Engine(EMO, limits), REQUESTS[name]
    found = engine.submit_several(request, count)
    other = engine.submit(REQUESTS["of a subset"])
    left = set()
    for step in range(7):
        for at, index in cancelled:
            if at == step and index < count and engine.cancel(found[index]):
                left.add(index)
        engine.step()
    ended(engine)
    for index, generation in enumerate(found):
        (alone,) = generate(EMO, with_seed(request, index), limits=limits)
        if index in left:
            assert generation.tokens == alone.tokens[: len(generation.tokens)]
        else:
            assert same(generation, alone)
    (alone,) = generate(EMO, REQUESTS["of a subset"], limits=limits)
    assert same(other, alone)
