"""What strangers' files bring along: nothing of the input is passed over without being counted or
named, one odd item never ends a preparation without a name, and EOS is never inside a document."""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.data.formats import Dataset
from emotrain.data.loader import Loader
from emotrain.data.tokenizer import (
    EOS_TOKEN,
    LONGEST_RUN,
    TextTokenizer,
    _cut,
    train_tokenizer,
)
from emotrain.errors import UserError
from emotrain.preparation.prepare import prepare
from emotrain.training import run as run_module
from tests.conftest import ROOT, tiny_settings

TEXTS = [f"number {i}: the experts of a pool route token {i % 7}" for i in range(40)]


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="emotrain")
    return caplog


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, 300).to_json())
    return path


def write_lines(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def plain(path: Path, count: int = 20, **values) -> Path:
    return write_lines(path, [{"text": text, **values} for text in TEXTS[:count]])


def documents_of(folder: Path) -> list[np.ndarray]:
    dataset, found = Dataset(folder), []
    for split in ("train", "valid"):
        for index in range(len(dataset.shards[split])):
            shard = dataset.shard(split, index)
            edges = shard.offsets.tolist()
            found += [shard.tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return found


# ---- which files


def test_linked_folders_are_followed_each_real_one_once(tmp_path, tokenizer):
    plain(tmp_path / "elsewhere/a.jsonl")
    plain(tmp_path / "in/b.jsonl")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "in")
    report = prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tokenizer)
    assert report["documents"] == 40 and report["files"] == 2


@pytest.mark.parametrize("name", ["gone.jsonl", "gone"])
def test_a_link_to_nothing_is_refused_by_name(name, tmp_path, tokenizer):
    plain(tmp_path / "in/b.jsonl")
    (tmp_path / "in" / name).symlink_to(tmp_path / "annex/object")
    with pytest.raises(UserError, match=f"in/{name}: a link to .*annex/object, which is not there"):
        prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tokenizer)


def test_an_unreadable_folder_is_refused_by_name(tmp_path, tokenizer, monkeypatch):
    plain(tmp_path / "in/b.jsonl")
    plain(tmp_path / "in/shut/c.jsonl")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="in/shut: this folder may not be read"):
        prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tokenizer)


def test_what_is_passed_over_is_counted(tmp_path, tokenizer, said):
    plain(tmp_path / "in/b.jsonl")
    for name in ("notes.csv", "more.csv", "README", ".hidden.jsonl", ".git/config.json"):
        plain(tmp_path / "in" / name)
    report = prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tokenizer)
    assert report["passed_over"] == {
        "hidden": 1,
        "in hidden folders": 1,
        "with ending .csv": 2,
        "with ending none": 1,
    }
    assert "passed over 5 files: 1 hidden, 1 in hidden folders, 2 with ending .csv" in said.text


def test_prepared_data_inside_the_input_are_no_documents(tmp_path, tokenizer):
    plain(tmp_path / "in/b.jsonl")
    first = prepare([tmp_path / "in"], tmp_path / "in/tokens", tokenizer=tokenizer)
    again = prepare([tmp_path / "in"], tmp_path / "in/tokens", tokenizer=tokenizer, overwrite=True)
    assert (first["documents"], again["documents"]) == (20, 20)
    assert again["skipped_documents"] == 0 and again["passed_over_files"] > 0
    prepare([tmp_path / "in"], tmp_path / "other", tokenizer=tokenizer, strict=True)


def test_files_of_json_that_is_not_lines_are_named(tmp_path, tokenizer, said):
    plain(tmp_path / "in/b.jsonl")
    (tmp_path / "in/array.json").write_text(json.dumps([{"text": t} for t in TEXTS[:3]]))
    (tmp_path / "in/pretty.json").write_text(json.dumps({"text": TEXTS[0]}, indent=2))
    report = prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tokenizer)
    assert report["documents"] == 20
    for name in ("array.json", "pretty.json"):
        assert f"in/{name}: gives no document" in said.text
    assert "b.jsonl" not in said.text


# ---- odd items


def test_one_odd_item_is_skipped_and_counted(tmp_path, tokenizer):
    path = plain(tmp_path / "a.jsonl")
    with open(path, "a") as file:
        file.write('{"text": "fine", "score": ' + "9" * 5000 + "}\n")
    report = prepare([path], tmp_path / "out", tokenizer=tokenizer)
    assert report["documents"] == 20 and report["skipped_bad_json_documents"] == 1
    with pytest.raises(UserError, match=r"a\.jsonl: line 21 is not JSON"):
        prepare([path], tmp_path / "strict", tokenizer=tokenizer, strict=True)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_names_that_are_not_utf8(kind, tmp_path, tokenizer):
    """They become labels with their bytes spelt out."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/na\xefve." + kind.encode()))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:5]).encode()
    if kind == "txt":
        path.write_text(TEXTS[0])
    elif kind == "parquet":
        with open(path, "wb") as file:
            pq.write_table(pa.table({"text": TEXTS[:5]}), file)
    elif kind == "jsonl.zst":
        path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
    else:
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    prepare([folder], tmp_path / "out", tokenizer=tokenizer, valid_fraction=0)
    assert set(Dataset(tmp_path / "out").domains["train"]) == {"caf\\xe9"}


@pytest.mark.parametrize("column", ["text", "domain"])
def test_doubled_columns_are_refused_by_name(column, tmp_path, tokenizer):
    names = ["text", "domain", column]
    table = pa.table([TEXTS[:3], ["a", "b", "c"], ["x", "y", "z"]], names=names)
    pq.write_table(table, tmp_path / "join.parquet")
    with pytest.raises(UserError, match=rf"join\.parquet: has the column '{column}' twice"):
        prepare([tmp_path / "join.parquet"], tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["string_view", "binary_view", "large_string", "dictionary"])
def test_columns_of_every_kind_of_text_are_read(kind, tmp_path, tokenizer):
    text = pa.array(TEXTS[:10])
    if kind == "dictionary":
        text = text.dictionary_encode()
    else:
        text = text.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": text, "domain": text}), tmp_path / "t.parquet")
    report = prepare([tmp_path / "t.parquet"], tmp_path / "out", tokenizer=tokenizer)
    assert report["documents"] == 10 and report["skipped_documents"] == 0


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_labels_of_integers_are_text(ending, tmp_path, tokenizer):
    path = tmp_path / f"in.{ending}"
    if ending == "jsonl":
        write_lines(path, [{"text": text, "domain": i % 2} for i, text in enumerate(TEXTS)])
    else:
        pq.write_table(pa.table({"text": TEXTS, "domain": [i % 2 for i in range(40)]}), path)
    prepare([path], tmp_path / "out", tokenizer=tokenizer, valid_fraction=0)
    assert set(Dataset(tmp_path / "out").domains["train"]) == {"0", "1"}


# ---- fields


@pytest.mark.parametrize("field", ["domain", "split", "source"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_field_that_nothing_has_is_refused(field, ending, tmp_path, tokenizer, capsys):
    path = tmp_path / f"in.{ending}"
    if ending == "jsonl":
        plain(path, domain="a")
    else:
        pq.write_table(pa.table({"text": TEXTS, "domain": ["a"] * 40}), path)
    options = [f"--{field}-field", "topicc", "--out", str(tmp_path / "out")]
    assert main(["prepare", str(path), "--tokenizer", str(tokenizer), *options]) == 2
    assert "no document has a field 'topicc'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_names_with_dots_reach_inside(ending, tmp_path, tokenizer):
    path = tmp_path / f"in.{ending}"
    records = [{"body": {"text": t}, "meta": {"topic": {"name": "law"}}} for t in TEXTS]
    if ending == "jsonl":
        write_lines(path, records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    options = ["--text-field", "body.text", "--domain-field", "meta.topic.name"]
    command = ["prepare", str(path), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")]
    assert main([*command, *options]) == 0
    assert set(Dataset(tmp_path / "out").domains["train"]) == {"law"}


# ---- compressed and encoded files


def test_empty_compressed_files_are_truncated_ones(tmp_path, tokenizer):
    for ending in ("jsonl.gz", "jsonl.zst"):
        path = tmp_path / f"empty.{ending}"
        path.write_bytes(b"")
        with pytest.raises(UserError, match=rf"empty\.{ending}: not readable to its end"):
            prepare([path], tmp_path / "out", tokenizer=tokenizer)


def test_zeros_after_a_gzip_file_are_padding(tmp_path, tokenizer):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = tmp_path / "tape.jsonl.gz"
    path.write_bytes(gzip.compress(lines[:500]) + gzip.compress(lines[500:]) + b"\0" * 10_000)
    assert prepare([path], tmp_path / "out", tokenizer=tokenizer)["documents"] == 40
    for damage in (gzip.compress(lines)[:-20], gzip.compress(lines) + b"trailing"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"tape\.jsonl\.gz: not readable to its end"):
            prepare([path], tmp_path / "other", tokenizer=tokenizer)


def test_byte_order_marks_and_utf16(tmp_path, tokenizer):
    record = json.dumps({"text": TEXTS[0]}) + "\n"
    (tmp_path / "a.jsonl").write_bytes(3 * ("\ufeff" + record).encode())
    report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer)
    assert report["documents"] == 3 and report["skipped_documents"] == 0
    (tmp_path / "b.jsonl").write_bytes(record.encode("utf-16"))
    with pytest.raises(UserError, match=r"b\.jsonl: is UTF-16"):
        prepare([tmp_path / "b.jsonl"], tmp_path / "other", tokenizer=tokenizer)


# ---- tokenizers


def marked(backend: Tokenizer, special: bool) -> Tokenizer:
    backend.add_tokens([AddedToken(EOS_TOKEN, special=special, normalized=False)])
    return backend


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), (EOS_TOKEN, -1.0), *[(c, -3.0) for c in "abcdefghilnoprstuwx<|>: "]]
    return Tokenizer(models.Unigram(pieces, 0))


def word_level() -> Tokenizer:
    words = {"<unk>": 0, EOS_TOKEN: 1, "ends": 2, "here": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def byte_level(special: bool) -> Tokenizer:
    backend = Tokenizer.from_str(train_tokenizer(TEXTS, 300, "<end>").to_json())
    return marked(backend, special)


def lower_case() -> Tokenizer:
    backend = word_level()
    backend.normalizer = normalizers.Lowercase()
    return backend


@pytest.mark.parametrize(
    "backend",
    [unigram, word_level, lower_case, lambda: byte_level(True), lambda: byte_level(False)],
    ids=["unigram", "word level", "lower case", "special", "not special"],
)
def test_eos_is_never_inside_a_document(backend):
    """Whatever the tokenizer makes of a text that spells its marker."""
    tokenizer = TextTokenizer(backend(), EOS_TOKEN)
    texts = [
        f"it {EOS_TOKEN} ends",
        EOS_TOKEN,
        f"{EOS_TOKEN}{EOS_TOKEN} {EOS_TOKEN} here",
        EOS_TOKEN.upper(),
        "plain here",
    ]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1], text
        assert len(ids) > 1


def test_a_marker_that_merges_make_is_never_inside_a_document():
    texts = ["### heading ### and #### more", "####", "a#b##c###d"] * 20
    tokenizer = train_tokenizer(texts, 300, "###")
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.eos_id not in ids[:-1] and tokenizer.decode(ids) == text


def test_a_marker_of_one_character_that_texts_hold_is_refused(tmp_path, tokenizer):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "#": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="turns '#' into '#', which ends documents"):
        TextTokenizer(backend, "#").encode_batch(["a # a"])


def test_a_tokenizer_that_raises_names_the_document_and_the_character(tmp_path):
    backend = Tokenizer(models.WordLevel({"the": 0, EOS_TOKEN: 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "t.json"))
    records = [{"text": "the", "source": "fine"}, {"text": "the ☃", "source": "snow"}]
    path = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match="snow: the tokenizer has no token for '☃'"):
        prepare([path], tmp_path / "out", tokenizer=tmp_path / "t.json")


def test_documents_that_become_nothing_are_skipped_and_said(tmp_path, said):
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, EOS_TOKEN: 2}, []))
    backend.save(str(tmp_path / "t.json"))
    path = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in ("ab", "жук", "ba")])
    report = prepare([path], tmp_path / "out", tokenizer=tmp_path / "t.json", valid_fraction=0)
    assert report["documents"] == 2 and report["skipped_empty_documents"] == 1
    assert "they vanish" in said.text
    assert min(map(len, documents_of(tmp_path / "out"))) > 1
    with pytest.raises(UserError, match="gives no tokens"):
        prepare([path], tmp_path / "strict", tokenizer=tmp_path / "t.json", strict=True)


def test_dropout_is_off():
    backend = Tokenizer.from_str(train_tokenizer(TEXTS, 300).to_json())
    backend.model.dropout = 0.5
    tokenizer = TextTokenizer(backend)
    once, again = (np.concatenate(tokenizer.encode_batch(TEXTS)) for _ in range(2))
    assert np.array_equal(once, again)
    assert json.loads(tokenizer.to_json())["model"]["dropout"] is None


def test_a_long_list_of_special_tokens_is_cut():
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.add_special_tokens([f"<reserved-{i:03d}>" for i in range(251)])
    with pytest.raises(UserError, match="and 243 more") as error:
        TextTokenizer(backend)
    assert len(str(error.value)) < 400


def test_training_takes_a_run_of_letters_in_pieces():
    """The library is given no word longer than a limit: its time is quadratic in that."""
    text = "x" * 12_345 + " short " + " " * 3000 + "end"
    pieces = list(_cut([text, TEXTS[0]]))
    assert "".join(pieces) == text + TEXTS[0]
    assert max(len(word) for piece in pieces for word in piece.split()) <= LONGEST_RUN
    assert max(len(piece) - len(piece.strip()) for piece in pieces) <= LONGEST_RUN + 1
    assert pieces[-1] == TEXTS[0], "ordinary text is left whole"


def test_ctrl_c_ends_the_training_of_a_tokenizer(tmp_path):
    program = (
        "import signal, time\n"
        "from emotrain.data.tokenizer import _uninterrupted\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('begun', flush=True)\n"
        "_uninterrupted(lambda: time.sleep(600))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"begun\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert b"KeyboardInterrupt" in process.stderr.read()


# ---- the data set


def test_a_damaged_tokenizer_is_found(tmp_path, tokenizer):
    prepare([plain(tmp_path / "a.jsonl", 40)], tmp_path / "out", tokenizer=tokenizer)
    Dataset(tmp_path / "out")
    file = tmp_path / "out/tokenizer.json"
    file.write_text(file.read_text().replace("token", "tokem", 1))
    with pytest.raises(UserError, match=r"tokenizer\.json: its sha256 is not the one in dataset"):
        Dataset(tmp_path / "out")


def test_data_sets_without_that_checksum_are_read(tmp_path, tokenizer):
    """As they were written before."""
    prepare([plain(tmp_path / "a.jsonl", 40)], tmp_path / "out", tokenizer=tokenizer)
    manifest = json.loads((tmp_path / "out/dataset.json").read_text())
    del manifest["tokenizer_sha256"]
    (tmp_path / "out/dataset.json").write_text(json.dumps(manifest))
    assert Dataset(tmp_path / "out").num_documents("train") > 30


def test_tokens_that_no_sequence_takes_are_said(tmp_path, tokenizer, said):
    path = plain(tmp_path / "a.jsonl", 40)
    prepare([path], tmp_path / "data", tokenizer=tokenizer, shard_tokens=200, valid_fraction=0)
    settings = tiny_settings(tmp_path / "data", tmp_path / "run", steps=1)
    settings["data"]["sequence_length"] = 64
    run_module.train(config_from_dict(settings))
    assert "data.sequence_length=64 leaves out" in said.text


def test_a_step_without_targets_is_said(tmp_path, tokenizer, said, monkeypatch):
    prepare([plain(tmp_path / "a.jsonl", 40)], tmp_path / "data", tokenizer=tokenizer)
    real = Loader.batch

    def without_targets(loader, positions):
        batch = real(loader, positions)
        batch.targets_BS.fill_(-100)
        return batch

    monkeypatch.setattr(Loader, "batch", without_targets)
    run_module.train(config_from_dict(tiny_settings(tmp_path / "data", tmp_path / "run", steps=1)))
    assert "step 1: no position of its sequences has a target" in said.text
    assert torch.isfinite(
        torch.tensor(json.loads((tmp_path / "run/metrics.jsonl").read_text())["loss"])
    )
