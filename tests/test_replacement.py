"""Proves that sequences in place of bad ones are good, a pure function of seed and position, and
bounded in number, and that nothing else changes."""

import json
import logging

import numpy as np
import pytest
import torch
from test_data_formats import edit, make_dataset

from emotrain.config import RepetitionFilterConfig, config_from_dict
from emotrain.data import replacement
from emotrain.data.filters import is_repetitive
from emotrain.data.opening import open_loader
from emotrain.training.data_source import build_loader
from emotrain.training.run import train
from tests.conftest import tiny_settings

SEQUENCE = 16
FILTER = RepetitionFilterConfig(enabled=True, max_period=2, max_count=1, action="replace")
MASK = RepetitionFilterConfig(enabled=True, max_period=2, max_count=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("replacement") / "data"
    make_dataset(path, shards=(40, 3, 25, 31), valid=0, vocab_size=7)
    return path


@pytest.fixture
def damaged(tmp_path):
    """One of three shards is not one any more."""
    make_dataset(tmp_path / "data", shards=(200, 200, 200), valid=0)
    (tmp_path / "data/train/shard-00001.arrow").write_bytes(b"nothing of it is left")
    return tmp_path / "data"


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("span", [1, 2])
def test_sequences_that_repeat_themselves_are_replaced(folder, span, packing):
    options = {"span": span, "packing": packing}
    plain = open_loader(folder, SEQUENCE, 3, **options)
    loader = open_loader(folder, SEQUENCE, 3, repetition_filter=FILTER, **options)
    positions = range(2 * loader.num_sequences)
    before, after = plain.batch(positions), loader.batch(positions)
    bad_B = is_repetitive(before.tokens_BS.numpy(), FILTER)
    bad_B = np.repeat(bad_B.reshape(-1, span).any(axis=1), span)
    assert 0 < bad_B.sum() < len(bad_B) and loader.replaced == bad_B.sum()
    assert not is_repetitive(after.tokens_BS.numpy(), FILTER).any()
    same_B = (before.tokens_BS == after.tokens_BS).all(dim=1).numpy()
    assert np.array_equal(same_B, ~bad_B)
    # Those that came are sequences of the data, with their documents; those of a span together.
    every = loader.source.rows(np.arange(loader.num_sequences)).tokens_BS
    every = {row.tobytes() for row in every.reshape(-1, span * SEQUENCE)}
    assert {row.tobytes() for row in after.tokens_BS.numpy().reshape(-1, span * SEQUENCE)} <= every
    # One position alone says the same.
    one = [loader.batch([position]) for position in range(0, len(positions), 7)]
    for position, batch in zip(range(0, len(positions), 7), one, strict=True):
        assert torch.equal(batch.tokens_BS[0], after.tokens_BS[position])
        assert torch.equal(batch.targets_BS[0], after.targets_BS[position])
        ids = after.document_ids_G[after.document_BS[position]]
        assert torch.equal(batch.document_ids_G[batch.document_BS[0]], ids)


def test_only_replacing_changes_the_fingerprint(folder):
    def fingerprint(**options):
        return open_loader(folder, SEQUENCE, 3, **options).fingerprint

    plain = fingerprint()
    assert plain == fingerprint(repetition_filter=MASK) == fingerprint(on_bad_data="replace")
    other = RepetitionFilterConfig(enabled=True, max_period=3, max_count=1, action="replace")
    off = RepetitionFilterConfig(action="replace")
    assert plain == fingerprint(repetition_filter=off)
    found = [fingerprint(repetition_filter=filter_) for filter_ in (FILTER, other)]
    assert len({plain, *found, fingerprint(packing="best_fit"), fingerprint(span=2)}) == 5


def test_attempts_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(replacement, "is_repetitive", lambda rows, _: np.ones(len(rows), bool))
    loader = open_loader(folder, SEQUENCE, 3, repetition_filter=FILTER)
    message = "position 5: none of 100 sequences drawn for it is good, 100% of those read"
    with pytest.raises(ValueError, match=message):
        loader.batch([5])
    assert loader.rejected == 101


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_what_cannot_be_read_is_replaced(damaged, caplog, monkeypatch, packing):
    monkeypatch.setattr(replacement, "MAX_LOGGED", 5)
    edit_sizes(damaged)
    plain = open_loader(damaged, SEQUENCE, 0, packing=packing)
    with pytest.raises(ValueError, match=r"shard-00001\.arrow.*is not a readable Arrow file"):
        plain.batch(range(plain.num_sequences))
    loader = open_loader(damaged, SEQUENCE, 0, packing=packing, on_bad_data="replace")
    with caplog.at_level(logging.WARNING, "emotrain"):
        positions = range(loader.num_sequences)
        batch = loader.batch(positions)
    bad = [p for p in positions if fails(plain, p)]
    assert len(bad) == loader.replaced and 0.2 * len(positions) < len(bad) < 0.5 * len(positions)
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 6 and logged[-1].startswith("more positions have bad data")
    for position, line in zip(bad, logged[:-1], strict=False):
        assert line.startswith(f"position {position} of {damaged}: another sequence is read in ")
        assert "shard-00001.arrow" in line and "\n" not in line
    good = [p for p in positions if p not in bad]
    assert torch.equal(plain.batch(good).tokens_BS, batch.tokens_BS[good])
    again = open_loader(damaged, SEQUENCE, 0, packing=packing, on_bad_data="replace")
    parts = [again.step(0, 8, 2, rank, 4) for rank in range(4)]
    tokens = torch.cat([part.tokens_BS for parts_of in parts for part in parts_of])
    assert torch.equal(tokens, batch.tokens_BS[:8])


def test_nothing_readable_stops(damaged):
    for path in damaged.glob("train/*.arrow"):
        path.write_bytes(b"x" * path.stat().st_size)
    edit_sizes(damaged)
    loader = open_loader(damaged, SEQUENCE, 0, on_bad_data="replace")
    with pytest.raises(ValueError, match="none of 100 sequences .* is not a readable Arrow file"):
        loader.batch([0])


def fails(loader, position):
    try:
        loader.batch([position])
    except ValueError:
        return True
    return False


def edit_sizes(folder):
    """The manifest agrees with what lies there, as if files had changed after the start."""

    def change(manifest):
        for shard in manifest["splits"]["train"]["shards"]:
            shard["bytes"] = (folder / shard["file"]).stat().st_size

    edit(folder, change)


def test_a_step_says_how_many_were_replaced_also_after_a_resume(tiny_data, tmp_path):
    """In the metrics, by ranks and steps alike: a function of the step."""
    filters = {"enabled": True, "max_period": 9, "max_count": 1, "action": "replace"}
    lines = []
    for folder, ends in (("whole", [4]), ("resumed", [2, 4])):
        for steps in ends:
            settings = tiny_settings(tiny_data, tmp_path / folder, steps=steps)
            settings["data"]["repetition_filter"] = filters
            train(config_from_dict(settings))
        text = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        lines.append([json.loads(line)["data/replaced_sequences"] for line in text])
    assert lines[0] == lines[1] and len(lines[0]) == 4 and sum(lines[0]) > 0
    config = config_from_dict(settings)
    loader, batch = build_loader(config), config.training.global_batch
    for step, replaced in enumerate(lines[0]):
        shares = [loader.step(step, batch, 1, rank, 4) for rank in range(4)]
        assert len(shares) == 4
        positions = np.arange(step * batch, (step + 1) * batch).reshape(4, -1)
        assert sum(map(loader.replaced_among, positions)) == replaced
