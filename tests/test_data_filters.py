"""Proves that the fast repetition filter finds exactly the sequences that a literal reading of
spec 4.4 finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.config import RepetitionFilterConfig
from emotrain.data.filters import is_repetitive


def repetitions(tokens, period):
    """Steps 1 to 4 of the spec for one period: (start, end, times) of every reported run."""
    pad = period - len(tokens) % period
    rows = np.concatenate([tokens, [-1] * pad]).reshape(-1, period)
    equal = rows == np.roll(rows, 1, axis=0)
    whole = equal.all(axis=1)
    assert not whole[0] and not whole[-1]
    found, row = [], 1
    while row < len(rows):
        if not whole[row]:
            row += 1
            continue
        first = row
        while whole[row]:
            row += 1
        trailing = leading = 0
        while equal[first - 1][period - 1 - trailing]:
            trailing += 1
        while equal[row][leading]:
            leading += 1
        start, end = (first - 1) * period - trailing, row * period + leading
        if (times := (end - start) // period) > 2:
            found.append((start, end, times))
    return found


def is_repetitive_oracle(tokens, config):
    periods = range(config.min_period, min(config.max_period, len(tokens) // 3) + 1)
    return any(
        times >= config.max_count
        for period in periods
        for _, _, times in repetitions(tokens, period)
    )


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_agrees_with_the_spec(data):
    config = RepetitionFilterConfig(
        True,
        min_period=data.draw(st.integers(1, 3)),
        max_period=data.draw(st.integers(3, 6)),
        max_count=data.draw(st.integers(1, 6)),
    )
    length = data.draw(st.integers(2, 40))
    row = st.lists(st.integers(0, data.draw(st.integers(0, 2))), min_size=length, max_size=length)
    tokens_BS = np.array(data.draw(st.lists(row, min_size=1, max_size=4)))
    assert is_repetitive(tokens_BS, config).tolist() == [
        is_repetitive_oracle(tokens, config) for tokens in tokens_BS
    ]


@pytest.mark.parametrize("period", [1, 2, 7, 13])
@pytest.mark.parametrize("missing", [0, 1])
def test_the_published_setting_at_its_edge(period, missing):
    """32 repetitions anywhere in a sequence are too many; one token less is not."""
    rng = np.random.default_rng(period)
    tokens_BS = rng.permutation(4096)[None] + 1000
    pattern = np.arange(period)
    repeated = np.tile(pattern, 32)[: 32 * period - missing]
    start = int(rng.integers(0, 4096 - len(repeated)))
    tokens_BS[0, start : start + len(repeated)] = repeated
    config = RepetitionFilterConfig(enabled=True)
    assert (
        is_repetitive(tokens_BS, config).tolist()
        == [not missing]
        == [is_repetitive_oracle(tokens_BS[0], config)]
    )


def test_longer_periods_are_left_alone():
    tokens_BS = np.tile(np.arange(14), 300)[None, :4096]
    assert not is_repetitive(tokens_BS, RepetitionFilterConfig(enabled=True))[0]
