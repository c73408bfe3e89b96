"""Proves that filters keep what they say, by reason, whoever encodes; that duplicates are found as
an exact comparison finds them, and near ones with the chance that is printed; and that the card
says all of it and shows strangers' text as text."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emotrain.cli import main
from emotrain.data.document_filters import _identifier, parse_condition, parse_language
from emotrain.data.formats import Dataset
from emotrain.data.tokenizer import load_tokenizer, train_tokenizer
from emotrain.errors import UserError
from emotrain.preparation import deduplicate, pieces
from emotrain.preparation.card import escaped
from emotrain.preparation.deduplicate import find_duplicates, key_maker, parse_deduplication
from emotrain.preparation.prepare import prepare

PLAIN = "the experts of a pool route a token to a document"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer([PLAIN] * 9, 290).to_json())
    return path


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts_of(folder: Path) -> list[str]:
    """Sorted."""
    dataset = Dataset(folder)
    decode = dataset.tokenizer().decode
    return sorted(decode(t) for s in ("train", "valid") for _, t, _ in dataset.documents(s))


# ---- fields


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        ("lang=en", "en", True),
        ("lang=en,de", "de", True),
        ("lang=en", "english", False),
        ("lang=en", None, False),
        ("lang!=en", "de", True),
        ("lang!=en", None, False),
        ("tags=a", ["b", "a"], True),
        ("tags!=a", ["b", "a"], False),
        ("ok=true", True, True),
        ("year=1999", 1999, True),
        ("score>=2.5", 2.5, True),
        ("score>=2.5", "2.6", True),
        ("score>=2.5", 2.4, False),
        ("score<=3", [4, 2], True),
        ("score>=1", "much", False),
        ("score>=1", float("nan"), False),
        ("url=a=b", "a=b", True),
    ],
)
def test_conditions(condition, value, holds):
    assert parse_condition(condition).holds(value) is holds


@pytest.mark.parametrize("condition", ["lang", "=en", "score>=much"])
def test_conditions_that_are_none(condition):
    with pytest.raises(UserError, match="--where"):
        parse_condition(condition)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_documents_are_kept_by_fields_and_length_and_counted_by_reason(ending, tokenizer, tmp_path):
    records = [
        {
            "text": f"{PLAIN} {i}" * (1 + i % 5),
            "meta": {"lang": "en" if i % 2 else "de", "score": i},
        }
        for i in range(40)
    ]
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        write(path, records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    lengths = [
        len(i) - 1 for i in load_tokenizer(tokenizer).encode_batch([r["text"] for r in records])
    ]
    least, most = sorted(lengths)[8], sorted(lengths)[30]
    where = ("meta.lang=en", "meta.score>=10")
    report = prepare(
        [path],
        tmp_path / "out",
        tokenizer=tokenizer,
        where=where,
        min_tokens=least,
        max_tokens=most,
        strict=True,
    )
    held = [i for i in range(40) if i % 2 and i >= 10]
    wanted = [records[i]["text"] for i in held if least <= lengths[i] <= most]
    assert texts_of(tmp_path / "out") == sorted(wanted)
    assert report["filtered_where_documents"] == 25
    assert report["filtered_min_tokens_documents"] == sum(lengths[i] < least for i in held)
    assert report["filtered_max_tokens_documents"] == sum(lengths[i] > most for i in held)
    assert report["filtered_documents"] == 40 - report["documents"]
    card = json.loads((tmp_path / "out/dataset.json").read_text())["card"]
    assert [(f["name"], f["removed"]) for f in card["filters"][:2]] == [("where", 20), ("where", 5)]
    with pytest.raises(UserError, match="no document has a field 'langue'; .* --where, or leave"):
        prepare([path], tmp_path / "no", tokenizer=tokenizer, where=("langue=en",))


def test_languages(tokenizer, tmp_path):
    pytest.importorskip("py3langid")
    texts = [
        "The committee has published its report on the state of the rivers of this country.",
        "Der Ausschuss hat seinen Bericht über den Zustand der Flüsse dieses Landes vorgelegt.",
        "Le comité a publié son rapport sur l'état des rivières de ce pays pour cette année.",
    ]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    options = {"tokenizer": tokenizer, "valid_fraction": 0}
    report = prepare([path], tmp_path / "out", language="en,fr:0.5", **options)
    assert report["filtered_language_documents"] == 1
    assert texts_of(tmp_path / "out") == sorted([texts[0], texts[2]])
    with pytest.raises(
        UserError, match="--language 'klingon' is not known to py3langid; choose am"
    ):
        prepare([path], tmp_path / "no", language="klingon", **options)
    for wrong in ("en:2", ":0.5", "en:much"):
        with pytest.raises(UserError, match="--language .* is none; give codes"):
            parse_language(wrong)


@pytest.mark.parametrize(
    ("options", "package", "extra"),
    [({"language": "en"}, "py3langid", "language"), ({"deduplicate": "near"}, "rensa", "dedup")],
)
def test_a_package_that_is_missing_is_named_before_anything_is_done(
    options, package, extra, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.langid", None)
    _identifier.cache_clear()
    with pytest.raises(
        UserError, match=rf"needs {package}; install it with: .*emotrain\[{extra}\]"
    ):
        prepare([tmp_path / "nowhere"], tmp_path / "out", tokenizer=tokenizer, **options)


# ---- duplicates


def oracle(keys: np.ndarray, bands: int) -> list[bool]:
    """A document is left out if an earlier one agrees with it in a band: written as it is said."""
    width = keys.shape[1] // bands
    cut = [[tuple(row[b * width : (b + 1) * width]) for b in range(bands)] for row in keys.tolist()]
    return [
        any(a == b for e in cut[:i] for a, b in zip(e, d, strict=True)) for i, d in enumerate(cut)
    ]


@pytest.mark.parametrize("pass_keys", [10, 10**6])
@pytest.mark.parametrize("kind", ["exact", "near:0.8"])
def test_the_first_of_equal_ones_stays_whatever_the_order_of_reading(kind, pass_keys, monkeypatch):
    monkeypatch.setattr(deduplicate, "PASS_KEYS", pass_keys)
    wanted, rng = parse_deduplication(kind), np.random.default_rng(1)
    keys = rng.integers(0, 12, (60, wanted.key_width)).astype(np.uint64)
    if kind != "exact":
        keys += (np.arange(60) % 3 > 0)[:, None] * np.arange(60, dtype=np.uint64)[:, None] * 50
    order = rng.permutation(60)
    parts = [(order[:25], keys[order[:25]]), (order[25:], keys[order[25:]])]
    found = find_duplicates(wanted, 60, lambda: parts)
    bands = 1 if kind == "exact" else wanted.bands
    assert found.tolist() == oracle(keys, bands) and 0 < found.sum() < 60


def test_equal_texts_are_found_across_pieces_and_parts(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 600)
    texts = [f"{PLAIN} {i % 30}" for i in range(90)]
    texts[40], texts[70] = texts[40].upper() + "  ", texts[70].replace(" ", "\n")
    path = write(tmp_path / "a.jsonl", [{"text": t, "source": f"{i}"} for i, t in enumerate(texts)])
    options = {"tokenizer": tokenizer, "deduplicate": "exact", "shard_tokens": 200}
    for which in (2, 1):
        prepare([path], tmp_path / "out", part=(which, 2), **options)
    report = prepare([path], tmp_path / "out", join=True, **options)
    assert report["filtered_duplicate_documents"] == 60
    assert texts_of(tmp_path / "out") == sorted(texts[:30])
    assert report["documents"] == sum(
        c["documents"] for d in report["domains"].values() for c in d.values()
    )


def test_near_duplicates_are_found_with_the_chance_that_is_printed():
    """Pairs of a known similarity, through the whole of it: the share that is found is the curve's,
    within four standard errors."""
    pytest.importorskip("rensa")
    wanted, rng = parse_deduplication("near:0.8"), np.random.default_rng(0)
    assert wanted.half == pytest.approx(0.8, abs=0.005)
    described = wanted.described()
    assert (
        described["chance_by_similarity"]["0.95"] > 0.98
        and described["bands"] * described["rows"] <= 128
    )
    make = key_maker(wanted)
    for shared in (0.65, 0.8, 0.9):
        pairs, size = 300, 400
        unlike = round(size * (1 - shared) / (1 + shared))  # runs that only one of them has
        texts, similarity = [], (size - unlike) / (size + unlike)
        for _ in range(pairs):
            words = [f"w{n}" for n in rng.integers(0, 10**9, size + 4)]
            # A change of the last words changes that many runs of five.
            other = words[: size + 4 - unlike] + [f"x{n}" for n in rng.integers(0, 10**9, unlike)]
            texts += [" ".join(words), " ".join(other)]
        keys = np.array(make(texts), np.uint64)
        found = np.mean((keys[0::2] == keys[1::2]).any(axis=1))
        chance = wanted.chance(similarity)
        assert abs(found - chance) <= 4 * np.sqrt(chance * (1 - chance) / pairs) + 0.01, shared
    assert len(set(map(tuple, keys.tolist()))) > len(keys) // 2, "different texts differ"


@pytest.mark.parametrize("wrong", ["fuzzy", "near:2", "near:x", "exact:1"])
def test_deduplication_that_is_none(wrong):
    with pytest.raises(UserError, match="--deduplicate .* is not known; give exact, or near:S"):
        parse_deduplication(wrong)


def test_near_prints_its_curve(tokenizer, tmp_path, capsys):
    pytest.importorskip("rensa")
    text = " ".join(f"word{i}" for i in range(100))
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in (text, text + " more", PLAIN)])
    command = ["prepare", str(path), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")]
    assert main([*command, "--deduplicate", "near:0.8", "--valid-fraction", "0"]) == 0
    said = capsys.readouterr().out
    assert "2 documents" in said and "1 duplicate left out" in said
    assert re.search(
        r"similarity 0\.798 the later is left out with a chance of 50 %; 0\.5: 0%", said
    )
    page = (tmp_path / "out/README.md").read_text()
    assert "rensa" in page and "similarity\\_at\\_chance\\_half 0.7983" in page


# ---- the card


def test_the_card_says_where_it_all_came_from_and_shows_text_as_text(tokenizer, tmp_path):
    evil = "<script>alert(1)</script> | [x](http://e.vil) `a` **b**\n# c"
    records = [
        {"text": f"{PLAIN} {i}", "domain": evil, "license": ["mit", "CC-BY 4.0"][i % 2]}
        for i in range(20)
    ]
    write(tmp_path / "a.jsonl", [*records, {"text": PLAIN, "domain": "d"}])
    for place in ("one", "two/deeper"):
        folder = tmp_path / place / "corpus"
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
        prepare([folder], tmp_path / place / "out", tokenizer=tokenizer)
    one, two = (tmp_path / place / "out" for place in ("one", "two/deeper"))
    for name in ("README.md", "dataset.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), "the card has no place"
    card = json.loads((one / "dataset.json").read_text())["card"]
    (source,) = card["sources"]
    digest = hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert source["name"] == "corpus/a.jsonl" and source["sha256"] == digest
    assert {n: c["documents"] for n, c in card["licenses"].items()} == {"mit": 10, "CC-BY 4.0": 10}
    page = (one / "README.md").read_text()
    assert digest in page and "1 documents name none" in page and "CC-BY 4.0" in page
    assert "<script>" not in page and "[x](http" not in page and "\n# c" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\| \\[x\\](http\\://e.vil)" in page
    assert escaped("a\x1b[31m\u202eb") == r"a\\x1b\[31m\\x202eb"


def test_ranges_of_a_file_are_summed_and_its_lines_are_numbered(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 500)
    path = write(tmp_path / "a.jsonl", [{"text": f"{PLAIN} {i}"} for i in range(50)])
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))
    prepare([path], tmp_path / "out", tokenizer=tokenizer, valid_fraction=0)
    card = json.loads((tmp_path / "out/dataset.json").read_text())["card"]
    assert card["sources"][0]["ranges"] > 5
    shard = Dataset(tmp_path / "out").shard("train", 0)
    decode = Dataset(tmp_path / "out").tokenizer().decode
    for row, source in enumerate(shard.sources.to_pylist()):
        text = decode(shard.tokens[shard.offsets[row] : shard.offsets[row + 1]])
        assert source == f"a.jsonl:line {2 + 2 * int(text.split()[-1])}"
