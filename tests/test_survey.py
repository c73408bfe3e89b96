"""Proves what `emotrain inspect DATA` counts against loops, and that its page holds text as
text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.cli import main
from emotrain.data.formats import Dataset
from emotrain.data.packing_shares import packing_shares
from emotrain.data.survey import cuts_of, lengths_of, round_trip, survey
from emotrain.errors import UserError
from emotrain.preparation.prepare import prepare
from emotrain.report.data_page import findings

shards = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=20), min_size=1, max_size=4)


@given(shards, st.integers(2, 30))
@settings(max_examples=60, deadline=None)
def test_cuts_are_those_of_a_loop(of_shards: list[list[int]], window: int) -> None:
    pieces, owners, tokens = [], [], 0
    for shard, lengths in enumerate(of_shards):
        stream = [(shard, i) for i, length in enumerate(lengths) for _ in range(length)]
        tokens += len(stream)
        for start in range(0, len(stream), window):
            held = set(stream[start : start + window])
            pieces.append(held)
        owners += [
            (owner, length) for owner, length in zip(dict.fromkeys(stream), lengths, strict=True)
        ]
    touched = {owner: sum(owner in held for held in pieces) for owner, _ in owners}
    whole = [length for owner, length in owners if touched[owner] == 1]
    found = cuts_of([np.cumsum([0, *lengths]) for lengths in of_shards], window)
    assert found.longer == pytest.approx(np.mean([length > window for _, length in owners]))
    assert found.cut == pytest.approx(1 - len(whole) / len(owners))
    assert found.one_pool_documents == pytest.approx(len(whole) / len(owners))
    assert found.one_pool_tokens == pytest.approx(sum(whole) / tokens)
    assert found.documents_per_window * tokens / window == pytest.approx(
        sum(touched.values()), rel=1e-9, abs=window
    )


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_lengths_are_those_of_a_loop(lengths: list[int]) -> None:
    found = lengths_of(np.array(lengths))
    assert (found.documents, found.tokens, found.largest) == (
        len(lengths),
        sum(lengths),
        max(lengths),
    )
    for least, count in found.histogram:
        assert count == sum(least <= length < 2 * least for length in lengths)
    assert sum(count for _, count in found.histogram) == len(lengths)
    for share, value in found.quantiles.items():
        assert sum(length <= value for length in lengths) >= float(share) * len(lengths) - 1e-9
        assert sum(length < value for length in lengths) < float(share) * len(lengths) + 1e-9
    assert lengths.count(found.most_common) == max(map(lengths.count, lengths))
    assert found.most_common_share == lengths.count(found.most_common) / len(lengths)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose texts and domains are markup."""
    folder = tmp_path_factory.mktemp("survey")
    lines = [
        {"text": f"<script>alert({i})</script> &amp; {'word ' * (i % 7)}", "domain": "<b>d</b>"}
        for i in range(60)
    ]
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([file], folder / "data", train_tokenizer=True, vocab_size=300)
    return folder / "data"


def test_the_command_tells_and_writes_a_page(
    marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "data.html"
    asked = ["inspect", str(marked), "--window", "32", "--sequences", "3", "--html", str(page)]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    dataset = Dataset(marked)
    lengths = [len(ids) for _, ids, _ in dataset.documents("train")]
    assert found["tokens"] == found["read_tokens"] == found["lengths"]["tokens"] == sum(lengths)
    assert found["lengths"]["documents"] == len(lengths)
    assert found["domains"] == dataset.domains["train"]
    assert [sum(piece["tokens"] for piece in pieces) for pieces in found["windows"]] == [32] * 3
    shares = packing_shares(dataset.store(), 32, "best_fit")
    assert found["best_fit"] == shares
    assert shares["one_pool"] >= found["cuts"]["one_pool_documents"]
    assert found["round_trip"]["same_text"] == found["round_trip"]["documents"] > 0
    written = page.read_text()
    assert "<script" not in written and "<b>" not in written and "&lt;script&gt;" in written
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert "Sequence 3" in text and "<b>d</b>" in text and f"page: {page}" in text


def test_tokens_of_others_are_looked_at(
    marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [ids for _, ids, _ in Dataset(marked).documents("train")]
    np.concatenate(documents).astype("<u2").tofile(tmp_path / "part.npy")
    tokenizer = f"data.tokenizer={marked / 'tokenizer.json'}"
    assert main(["inspect", str(tmp_path), tokenizer, "--window", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"]["documents"] == len(documents)
    assert found["domains"] == {}
    assert any("script" in piece["text"] for piece in found["windows"][0])
    unknown = ["data.raw.vocab_size=300", "data.raw.eos_id=0", "--window", "32", "--json"]
    assert main(["inspect", str(tmp_path), *unknown]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["round_trip"] is None and found["windows"][0][0]["text"].split()[0].isdigit()


@pytest.mark.parametrize("tokens", [1, 7, 64, 10**6])
def test_reading_in_parts_changes_nothing(
    marked: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Dataset(marked).store()
    whole = survey(store, 16, tokens=10**6, windows=0)
    monkeypatch.setattr("emotrain.data.survey.READ_TOKENS", tokens)
    assert survey(store, 16, tokens=10**6, windows=0) == whole


def test_a_part_stands_for_a_large_set(marked: Path) -> None:
    store = Dataset(marked).store()
    part = survey(store, 16, tokens=100, windows=0)
    assert 100 <= part.read_tokens < part.tokens and part.round_trip is None
    assert any("--tokens reads more" in text for _, text in findings(part))


def test_documents_of_one_length_are_to_be_looked_at(marked: Path) -> None:
    class Cut:
        path, split, vocab_size, eos_id, shard_tokens = "cut", "train", 9, 0, [6400]

        def edges(self, shard: int, start: int, stop: int) -> np.ndarray:
            return np.append(np.arange(start, stop, 64), stop)

    found = survey(Cut(), 8192, tokens=10**6, windows=0)
    assert any(look and "the very same length of 64" in text for look, text in findings(found))
    assert not any(
        "very same length" in text
        for _, text in findings(survey(Dataset(marked).store(), 16, tokens=10**6, windows=0))
    )


def test_a_text_that_the_tokenizer_changes_is_shown(marked: Path) -> None:
    class Lower:
        eos_id = 0

        def decode(self, ids: np.ndarray) -> str:
            return "".join(chr(i) for i in ids)

        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            return [np.array([*map(ord, text.lower()), 0]) for text in texts]

    documents = [np.array([*map(ord, text), 0]) for text in ("kept", "some Text")]
    found = round_trip(documents, Lower())
    assert (found.documents, found.same_ids, found.same_text) == (2, 1, 1)
    assert found.first_difference == "'some Text' becomes 'some text'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "1"], "window=1"),
        (["--tokens", "0"], "tokens=0"),
        (["--sequences", "-1"], "windows=-1"),
        (["training.steps=3"], "training.steps=3: is no setting of data"),
        (["--split", "valid", "--window", "16", "--html", "."], "is a folder"),
    ],
)
def test_mistakes_get_one_line(
    marked: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(marked), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_page_is_of_a_data_set_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "configs/quickstart.yaml", "--html", "x.html"]) == 2
    assert "configs/quickstart.yaml is none" in capsys.readouterr().err


def test_an_empty_split_is_refused() -> None:
    class Empty:
        path, split, shard_tokens = "empty", "valid", [0]

    with pytest.raises(UserError, match="has no valid tokens"):
        survey(Empty(), 16, tokens=1, windows=0)
