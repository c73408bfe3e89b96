"""Proves that rules make the documents they say, with every character once, however records are
read; that boundaries which mean nothing are named with their numbers, and ordinary ones are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotrain.data.boundaries import parse_boundary, regroup
from emotrain.data.documents import DocumentReader
from emotrain.data.formats import Dataset
from emotrain.data.records import Document
from emotrain.data.tokenizer import train_tokenizer
from emotrain.errors import UserError
from emotrain.preparation.diagnostics import LESSON, Sampled, measure, warnings
from emotrain.preparation.prepare import prepare


def cut(rule: str, *texts: str, join: str = "", limit: int = 10**6) -> list[str]:
    lost: list[str] = []
    records = (Document(t, "d", "s", None, len(t.encode()), joined_by=join) for t in texts)
    found = list(
        regroup(records, parse_boundary(rule, join), limit, lambda why, _: lost.append(why))
    )
    assert [d.part for d in found if len(texts) == 1] == list(range(len(found) * (len(texts) == 1)))
    return [d.text for d in found] + [why for why in lost if why != "empty"]


@pytest.mark.parametrize(
    ("rule", "texts", "wanted"),
    [
        ("field", ["a\n# b", "c"], ["a\n# b", "c"]),
        ("none", ["a", "b\n", "", "c"], ["a\nb\n\nc"]),
        ("heading", ["# A\nx\n## B\ny\n# C\n\n#no"], ["# A\nx\n## B\ny", "# C\n\n#no"]),
        ("heading:2", ["pre\n# A\nx\n## B\ny\n### C"], ["pre", "# A\nx", "## B\ny\n### C"]),
        # A row a line, as WikiText has them.
        (
            "none+heading",
            [
                "",
                " = One = \n",
                "",
                " text \n",
                " = = Sub = = \n",
                " = Two = \n",
                " more = less = \n",
            ],
            [" = One = \n\n text \n = = Sub = = ", " = Two = \n more = less = "],
        ),
        ("blank:1", ["a\nb\n\nc\n \n\nd"], ["a\nb", "c", "d"]),
        ("blank:2", ["a\nb\n\nc\n \n\nd"], ["a\nb\n\nc", "d"]),
        ("none+blank:1", ["a", "b", "", "c"], ["a\nb", "c"]),
        ("none+blank:1", ["a\n", "b\n", " \n", "c\n"], ["a\nb", "c"]),
        ("fixed:4", ["abcdefgh ij"], ["abcd", "efgh", " ij"]),
        ("fixed:8", ["one two three four"], ["one two", " three f", "our"]),
        ("none+fixed:5", ["abc", "defg"], ["abc\nd", "efg"]),
        ("marker:<|endoftext|>", ["a<|endoftext|>b<|endoftext|>"], ["a", "b"]),
        ("none+marker:--", ["a", "b--c", "--", "d"], ["a\nb", "c", "d"]),
    ],
)
def test_each_rule(rule, texts, wanted):
    assert cut(rule, *texts) == wanted


@given(
    st.sampled_from(["none", "none+heading:2", "none+blank:1", "none+fixed:7", "none+marker:|"]),
    st.lists(st.text("ab|#= \n", max_size=30), max_size=6),
)
def test_no_character_is_lost_or_made(rule, texts):
    """But line ends and marks between documents; and it does not matter how a text arrives."""

    def ink(parts):
        return "".join("".join(parts).split()).replace("|", "")

    assert ink(cut(rule, *texts)) == ink(texts)
    whole = "\n".join(texts)
    if not any(text.endswith("\n") for text in texts):
        assert cut(rule, whole) == cut(rule, *whole.split("\n"))


def test_fields_join_neighbours_and_a_long_document_is_lost_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [
        ("x", "1"),
        ("y", "1"),
        ("z", "2"),
        ("long " * 10, "3"),
        ("lo " * 15, "3"),
        ("n", None),
    ]
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for t, i in records))
    rule = parse_boundary("field", "id")
    reader = DocumentReader(boundary=rule, join_field="id", max_bytes=90)
    assert [(d.text, d.source) for d in reader.read(path)] == [
        ("x\ny", "a.jsonl:line 1"),
        ("z", "a.jsonl:line 3"),
        ("n", "a.jsonl:line 6"),
    ]
    assert reader.skipped == {"too_long": 1}
    reader = DocumentReader(boundary=rule, join_field="nothing")
    list(reader.read(path))
    with pytest.raises(UserError, match="no document has a field 'nothing'; name .* --join-field"):
        reader.check_fields()


@pytest.mark.parametrize("rule", ["page", "blank", "blank:0", "heading:x", "marker:", "none+none"])
def test_rules_that_are_none(rule):
    with pytest.raises(UserError, match=r"--boundary .* is no rule; give field, none, heading"):
        parse_boundary(rule)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(["the experts of a pool route a token"] * 9, 270).to_json())
    return path


def test_documents_of_a_rule_have_sources_of_their_own(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("# One\nfirst\n# Two\nsecond\n# Three\nthird")
    out = tmp_path / "out"
    prepare([tmp_path / "book.txt"], out, tokenizer=tokenizer, boundary="heading", valid_fraction=0)
    shard = Dataset(out).shard("train", 0)
    assert sorted(shard.sources.to_pylist()) == ["book.txt", "book.txt#1", "book.txt#2"]


def test_a_text_file_is_cut_without_being_held(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"chapter {i}\n{'words ' * 50}\n\n\n" for i in range(100)))
    reader = DocumentReader(boundary=parse_boundary("blank:2"), max_bytes=1000)
    assert len(list(reader.read(path))) == 100 and not reader.skipped
    assert not list(DocumentReader(max_bytes=1000).read(path))


# ---- diagnostics


def sampled(count: int = 400, **columns) -> Sampled:
    rng = np.random.default_rng(0)
    given = {
        "tokens": rng.integers(20, 3000, count),
        "characters": rng.integers(100, 12000, count),
        "first_line": rng.integers(1, 2**60, count).astype(np.uint64),
        "last_line": rng.integers(1, 2**60, count).astype(np.uint64),
        "marked": np.zeros(count, np.uint8),
    }
    return Sampled(**(given | columns))


def test_ordinary_documents_are_not_called_artificial():
    found = measure(sampled(), 1024)
    assert not warnings(found)
    lengths = sampled().tokens
    assert found["longer_than_window"] == round(float((lengths > 1024).mean()), 4)
    assert found["tokens_quantiles"]["0.5"] == sorted(lengths)[(len(lengths) - 1) // 2 + 1] or (
        abs(found["tokens_quantiles"]["0.5"] - np.median(lengths)) < 20
    )
    assert found["tokens_max"] == lengths.max()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"tokens": np.full(400, 513)},
            "100% of the documents have the very same length of 513 tok",
        ),
        (
            {"tokens": np.tile([129, 257, 385, 129], 100)},
            "50% of the documents have the very same length of 129 tokens, 100% a multiple",
        ),
        ({"characters": np.full(400, 2000)}, "the very same length of 2,000 characters"),
        ({"tokens": np.full(400, 7)}, "half of the documents have 7 tokens or fewer"),
        ({"first_line": np.full(400, 9, np.uint64)}, "100% of the documents of several lines have"),
        ({"last_line": np.full(400, 9, np.uint64)}, "have the very same last line"),
        ({"marked": np.tile([1, 0], 200).astype(np.uint8)}, "50.0% of the texts hold a mark"),
        ({"marked": np.tile([2, 0], 200).astype(np.uint8)}, "50.0% of the texts end in a mark"),
    ],
)
def test_artificial_boundaries_are_named_with_their_numbers(columns, said):
    (line,) = warnings(measure(sampled(**columns), 4096))
    assert said in line and line.endswith(LESSON) and "\n" not in line
    few = Sampled(**{name: values[:20] for name, values in vars(sampled(**columns)).items()})
    assert not warnings(measure(few, 4096)), "a handful of documents says nothing"


def test_prepare_warns_of_texts_that_were_cut_and_of_texts_put_together(
    tmp_path, tokenizer, caplog
):
    book = " ".join(f"chapter {i} of a book on experts" for i in range(3000))
    path = tmp_path / "cut.jsonl"
    pieces = [book[start : start + 400] for start in range(0, len(book), 400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in pieces))
    report = prepare([path], tmp_path / "cut", tokenizer=tokenizer, window=100)
    assert report["boundaries"]["commonest_characters_share"] > 0.9
    assert report["boundaries"]["longer_than_window"] > 0.9
    assert "the very same length of 400 characters" in caplog.text and LESSON in caplog.text
    card = json.loads((tmp_path / "cut/dataset.json").read_text())["card"]
    assert card["warnings"] == report["warnings"] and card["boundaries"] == report["boundaries"]
    path = tmp_path / "packed.jsonl"
    texts = [f"{'one ' * i}<|endoftext|>{'two ' * i}" for i in range(1, 80)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = prepare([path], tmp_path / "packed", tokenizer=tokenizer)
    assert report["boundaries"]["end_mark_inside"] == 1.0
    rule = "marker:<|endoftext|>"
    report = prepare([path], tmp_path / "unpacked", tokenizer=tokenizer, boundary=rule)
    assert report["boundaries"]["end_mark_inside"] == 0 and report["documents"] == 2 * len(texts)
