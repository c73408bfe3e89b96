"""Log probabilities of many pairs at once: against one pair at a time, at any packing, with the
experts of each pair's group; and the rules for borders, lengths and windows."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.batch import IGNORE, PackedBatch
from emotrain.data.tokenizer import load_tokenizer, train_tokenizer
from emotrain.errors import UserError
from emotrain.model.router import RoutingRequest
from emotrain.modular.select import random_select
from emotrain.tasks.scoring import Pair, encode_pairs, fit, log_probabilities, pack_pairs, windows

MOST = 16
MODEL = tiny_model()
MASKLESS = tiny_model(model__attention__document_mask=False)
SUBSETS = random_select(MODEL.config, 2, [5, 5], seed=0)

tokens = st.lists(st.integers(0, 63), min_size=1, max_size=9).map(tuple)
pairs_ = st.builds(Pair, tokens, st.lists(st.integers(0, 63), min_size=1, max_size=8).map(tuple))


@torch.inference_mode()
def one_at_a_time(model, pair, kept=None):
    """The oracle: a row of its own, and the log softmax at each position."""
    ids = torch.tensor([pair.context + pair.continuation])
    output = model(PackedBatch.from_rows(ids), RoutingRequest(kept=kept))
    logprobs_TV = torch.log_softmax(model.logits(output).double(), dim=1)
    total, greedy = 0.0, True
    for place, token in enumerate(pair.continuation, start=len(pair.context)):
        total += float(logprobs_TV[place - 1, token])
        greedy &= int(logprobs_TV[place - 1].argmax()) == token
    return total, greedy


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(pairs_, st.integers(0, 1)), min_size=1, max_size=12), st.integers(1, 3))
@pytest.mark.parametrize("model", [MODEL, MASKLESS], ids=["masked", "maskless"])
def test_many_pairs_score_as_one_at_a_time_with_the_experts_of_their_group(model, asked, rows):
    pairs, groups = [pair for pair, _ in asked], [group for _, group in asked]
    logprob_U, greedy_U = log_probabilities(model, pairs, MOST, rows, SUBSETS, groups)
    for pair, group, logprob, greedy in zip(pairs, groups, logprob_U, greedy_U, strict=True):
        kept = [mask_JN[group] for mask_JN in SUBSETS]
        expected = one_at_a_time(model, pair, kept)
        assert float(logprob) == pytest.approx(expected[0], abs=1e-4)
        assert bool(greedy) == expected[1]


def test_the_likeliest_tokens_are_greedy_and_others_not():
    context = (3, 1, 4)
    with torch.inference_mode():
        logits_TV = MODEL.logits(MODEL(PackedBatch.from_rows(torch.tensor([context]))))
    best, worst = int(logits_TV[-1].argmax()), int(logits_TV[-1].argmin())
    pairs = [Pair(context, (best,)), Pair(context, (worst,)), Pair(context, (best, worst))]
    logprob_U, greedy_U = log_probabilities(MODEL, pairs, MOST, 2)
    assert greedy_U.tolist() == [one_at_a_time(MODEL, pair)[1] for pair in pairs]
    assert greedy_U[:2].tolist() == [True, False] and logprob_U[0] > logprob_U[1]


def test_equal_pairs_have_equal_numbers_to_the_bit():
    twice = [Pair((1, 2), (3, 4)), Pair((5,) * 8, (6,) * 8), Pair((1, 2), (3, 4))]
    logprob_U, _ = log_probabilities(MODEL, twice, MOST, 1)
    assert logprob_U[0] == logprob_U[2]


@settings(max_examples=30, deadline=None)
@given(st.lists(pairs_, min_size=1, max_size=12), st.integers(1, 3), st.booleans())
def test_rows_hold_every_pair_whole_with_targets_on_its_continuation(pairs, rows, mask):
    seen = set()
    for batch in pack_pairs(pairs, MOST, rows, mask):
        assert len(batch.tokens_BS) <= rows
        for number, pair_number in enumerate(batch.document_ids_G.tolist()):
            of_document = batch.document_BS == number
            targets = batch.targets_BS[of_document].tolist()
            if pair_number < 0:
                assert set(targets) == {IGNORE}
                continue
            pair = pairs[pair_number]
            assert pair_number not in seen
            seen.add(pair_number)
            assert (
                tuple(batch.tokens_BS[of_document].tolist())
                == ((pair.context + pair.continuation)[:-1])
            )
            assert targets == [IGNORE] * (len(pair.context) - 1) + list(pair.continuation)
    assert seen == set(range(len(pairs)))


def test_rows_have_little_padding():
    pairs = [Pair(tuple(range(1, 2 + n % 7)), (1, 2)) for n in range(200)]
    batches = pack_pairs(pairs, MOST, 4)
    held = sum(batch.tokens_BS.numel() for batch in batches)
    assert sum(len(pair.context) + 1 for pair in pairs) / held > 0.95
    (alone,) = pack_pairs(pairs[:1], MOST, 4)
    assert alone.tokens_BS.numel() == 2


# ---- lengths


@settings(max_examples=50)
@given(pairs_, st.integers(8, 20))
def test_what_does_not_fit_is_cut_from_the_start_of_a_context(pair, most):
    fitted = fit(pair, most)
    whole = pair.context + pair.continuation
    assert fitted.context + fitted.continuation == whole[-most - 1 :]
    assert fitted.continuation == pair.continuation and fitted.context


def test_a_continuation_that_does_not_fit_or_has_no_token_is_refused():
    with pytest.raises(UserError, match="an answer has 9 tokens, the model reads 8"):
        fit(Pair((1,), (2,) * 9), 8)
    with pytest.raises(UserError, match="adds no token"):
        fit(Pair((1,), ()), 8)


def test_windows_are_those_of_the_harness():
    """The example in the docstring of its `loglikelihood_rolling`."""
    assert windows(range(10), 99, 4) == [
        Pair((99,), (0, 1, 2, 3)),
        Pair((3,), (4, 5, 6, 7)),
        Pair((5, 6, 7), (8, 9)),
    ]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 63), max_size=40), st.integers(1, 9))
def test_windows_predict_each_token_once_after_those_before_it(ids, most):
    predicted = 0
    for pair in windows(ids, 99, most):
        start, end = predicted, predicted + len(pair.continuation)
        assert list(pair.continuation) == ids[start:end]
        assert list(pair.context) == (ids[start - len(pair.context) : start] if start else [99])
        assert len(pair.context) + len(pair.continuation) <= most + 1
        predicted = end
    assert predicted == len(ids)


# ---- borders


@pytest.fixture(scope="module")
def tokenizer():
    """One that has merged over spaces and over the ends of words."""
    texts = ["the answer: bread and butter, the butter and the bread"] * 50
    return train_tokenizer(texts, 300)


@given(
    st.text("abdehnrtu :,", min_size=1, max_size=12).filter(str.strip),
    st.text("abdehnrtu :,", min_size=1, max_size=8),
)
def test_a_continuation_is_what_the_whole_has_beyond_its_context(tokenizer, context, continuation):
    """The rule of the harness (`TemplateLM._encode_pair`), said again."""
    (pair,) = encode_pairs(tokenizer, [(context, continuation)])
    before, moved = context.rstrip(), context[len(context.rstrip()) :]
    alone = tokenizer.encode_batch([before])[0][:-1].tolist()
    whole = tokenizer.encode_batch([before + moved + continuation])[0][:-1].tolist()
    assert list(pair.context) == alone
    assert list(pair.continuation) == whole[len(alone) :]


def test_the_end_of_a_document_in_a_text_is_ordinary_text(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    (pair,) = encode_pairs(load_tokenizer(tmp_path / "tokenizer.json"), [("a", " <|endoftext|>")])
    assert tokenizer.eos_id not in pair.continuation and len(pair.continuation) > 1
