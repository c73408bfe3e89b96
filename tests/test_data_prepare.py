"""Proves of `emotrain prepare` that every document arrives once and whole, that the result is a
function of inputs and seed alone, that bad documents are counted or refused by name, and that no
interruption leaves a half data set or damages an older one."""

import argparse
import errno
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emotrain.commands.prepare import add_arguments, run
from emotrain.data.documents import DocumentReader, Fields
from emotrain.data.files import find_files
from emotrain.data.formats import Dataset
from emotrain.data.staging import stage_dataset
from emotrain.data.tokenizer import load_tokenizer, train_tokenizer
from emotrain.preparation import encoding, pieces, spill
from emotrain.preparation.prepare import SAMPLE_DIR, prepare

WORDS = [
    "expert",
    "pool",
    "token",
    "router",
    "document",
    "shared",
    "sparse",
    "layer",
    "batch",
    "domain",
]


def make_documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "text": f"{number} " + " ".join(rng.choice(WORDS, rng.integers(1, 60))),
            "domain": f"d{number % 3}",
            "source": f"s{number}",
        }
        for number in range(count)
    ]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer((d["text"] for d in make_documents(300)), 300).to_json())
    return path


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", make_documents(400))


def texts_of(folder):
    """{source: text} of every document, decoded again, and the split of each."""
    dataset = Dataset(folder)
    tokenizer, texts, splits = dataset.tokenizer(), {}, {}
    for split in ("train", "valid"):
        for document_id, tokens, domain in dataset.documents(split):
            where, shard, row = dataset.locate(document_id)
            source = dataset.shard(where, shard).sources[row].as_py()
            assert tokens[-1] == dataset.eos_id and (tokens[:-1] != dataset.eos_id).all()
            assert source not in texts
            texts[source], splits[source] = (tokenizer.decode(tokens), domain), split
    return texts, splits


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def leftovers(folder):
    ways = (".partial-", ".removed-", ".aside-")
    return [path for path in folder.parent.iterdir() if any(way in path.name for way in ways)]


def test_round_trip_through_many_shards(corpus, tokenizer_file, tmp_path):
    report = prepare(
        [corpus], tmp_path / "out", tokenizer=tokenizer_file, shard_tokens=1500, valid_fraction=0.2
    )
    texts, splits = texts_of(tmp_path / "out")
    assert texts == {d["source"]: (d["text"], d["domain"]) for d in make_documents(400)}
    assert report["train_shards"] > 3 and report["valid_shards"] > 1
    assert (
        report["documents"] == 400
        and report["valid_documents"] == sum(s == "valid" for s in splits.values()) > 40
    )
    assert report["tokens"] == sum(
        len(t) for s in ("train", "valid") for _, t, _ in Dataset(tmp_path / "out").documents(s)
    )
    assert report["text_bytes"] == sum(len(d["text"]) for d in make_documents(400))
    assert not leftovers(tmp_path / "out")


def test_shards_are_of_tokens_whatever_the_size_of_the_file(tokenizer_file, tmp_path):
    """A file that is compressed to next to nothing becomes as many shards as its tokens need, with
    the documents of one shard."""
    lines = [json.dumps({"text": f"{i} " + "word " * 60}) for i in range(400)]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(pa.compress("\n".join(lines).encode(), "zstd", asbytes=True))
    found = {}
    for tokens in (2**30, 4000):
        options = {"tokenizer": tokenizer_file, "valid_fraction": 0.1, "workers": 1}
        prepare([path], tmp_path / str(tokens), shard_tokens=tokens, **options)
        found[tokens] = Dataset(tmp_path / str(tokens))
    one, many = found.values()
    infos = many.shards["train"]
    assert len(one.shards["train"]) == 1 and len(infos) > 3
    assert all(info.tokens < 2 * 4000 for info in infos)
    for split in ("train", "valid"):
        pairs = zip(one.documents(split), many.documents(split), strict=True)
        assert all(np.array_equal(a[1], b[1]) for a, b in pairs)


def test_neighbours_are_scattered(corpus, tokenizer_file, tmp_path):
    prepare([corpus], tmp_path / "out", tokenizer=tokenizer_file)
    order = np.array([int(source[1:]) for source in texts_of(tmp_path / "out")[0]])
    assert np.mean(np.abs(np.diff(order)) <= 1) < 0.05


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of some kilobytes."""
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 4000)


def test_bytes_do_not_depend_on_workers_batches_and_segments(
    corpus, tokenizer_file, tmp_path, monkeypatch, small_pieces
):
    options = {"tokenizer": tokenizer_file, "shard_tokens": 3000, "valid_fraction": 0.1}
    prepare([corpus], tmp_path / "one", workers=1, **options)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 500)
    monkeypatch.setattr(spill, "BUFFER_BYTES", 1000)
    prepare([corpus], tmp_path / "small", workers=1, **options)
    for limit in ("work.SMALL_BYTES", "joining.SMALL_TOKENS"):
        monkeypatch.setattr(f"emotrain.preparation.{limit}", 0)
    prepare([corpus], tmp_path / "many", workers=2, **options)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "small") == files_of(tmp_path / "many")


def test_seed_changes_the_order_and_training_is_repeatable(corpus, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare([corpus], tmp_path / name, train_tokenizer=True, vocab_size=300, seed=seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b and a["tokenizer.json"] == c["tokenizer.json"]
    assert a["train/shard-00000.arrow"] != c["train/shard-00000.arrow"]


def test_split_field_is_obeyed(tokenizer_file, tmp_path):
    records = make_documents(40)
    for number, record in enumerate(records):
        record["split"] = ("train", "valid", "validation", "test")[number % 4]
    prepare(
        [write_jsonl(tmp_path / "a.jsonl", records)],
        tmp_path / "out",
        tokenizer=tokenizer_file,
        valid_fraction=0.9,
    )
    _, splits = texts_of(tmp_path / "out")
    assert all(
        splits[f"s{number}"] == ("train" if number % 4 == 0 else "valid") for number in range(40)
    )


def test_a_text_cannot_forge_the_end_of_a_document(tokenizer_file, tmp_path):
    text = "before <|endoftext|> after"
    prepare(
        [write_jsonl(tmp_path / "a.jsonl", [{"text": text}])],
        tmp_path / "out",
        tokenizer=tokenizer_file,
        valid_fraction=0,
    )
    ((_, tokens, domain),) = Dataset(tmp_path / "out").documents("train")
    assert (tokens == load_tokenizer(tokenizer_file).eos_id).sum() == 1
    assert Dataset(tmp_path / "out").tokenizer().decode(tokens) == text and domain == tmp_path.name


def test_another_tokenizer_in_the_folder_is_noticed(corpus, tokenizer_file, tmp_path):
    prepare([corpus], tmp_path / "out", tokenizer=tokenizer_file)
    (tmp_path / "out" / "tokenizer.json").write_text(
        train_tokenizer(["other words"], 270).to_json()
    )
    with pytest.raises(ValueError, match=r"tokenizer.json: its sha256 is not the one in dataset"):
        Dataset(tmp_path / "out")
    # Data sets of before its checksum.
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    del manifest["tokenizer_sha256"]
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError,
        match="tokenizer.json: has .* tokens and EOS 0, dataset.json says 300 and 0; restore",
    ):
        Dataset(tmp_path / "out").tokenizer()


def test_truncation_in_a_tokenizer_file_is_switched_off(tokenizer_file, tmp_path):
    settings = json.loads(tokenizer_file.read_text())
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "cut.json").write_text(json.dumps(settings))
    assert len(load_tokenizer(tmp_path / "cut.json").encode_batch(["expert " * 100])[0]) > 50


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_kind_of_file_reads_the_same(name, tmp_path):
    records, path = make_documents(30), tmp_path / name
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    else:
        compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        with pa.output_stream(str(path), compression=compression) as stream:
            stream.write(lines)
    found = list(DocumentReader().read(path))
    assert [(d.text, d.domain, d.source, d.split) for d in found] == [
        (r["text"], r["domain"], r["source"], None) for r in records
    ]


def test_folders_text_files_and_field_names(tmp_path):
    (tmp_path / "corpus" / "letters").mkdir(parents=True)
    (tmp_path / "corpus" / "letters" / "b.txt").write_text("Dear expert", encoding="utf-8")
    (tmp_path / "corpus" / "letters" / ".hidden.txt").write_text("no", encoding="utf-8")
    (tmp_path / "corpus" / "README.md").write_text("no", encoding="utf-8")
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [{"content": "x", "kind": "k"}])
    files, _ = find_files([tmp_path / "corpus"])
    assert [path.name for path in files] == ["a.jsonl", "b.txt"]
    reader = DocumentReader(Fields(text="content", domain="kind"))
    documents = [document for path in files for document in reader.read(path)]
    assert [(d.text, d.domain, d.source) for d in documents] == [
        ("x", "k", "a.jsonl:line 1"),
        ("Dear expert", "letters", "b.txt"),
    ]


BAD_LINES = [
    ("empty", b'{"text": "  "}', "line 2 is empty"),
    ("bad_json", b'{"text": ', "line 2 is not JSON"),
    ("bad_json", b"[1, 2]", "line 2 holds a JSON list"),
    ("invalid_utf8", b'{"text": "\xff"}', "line 2 is not UTF-8"),
    ("invalid_utf8", b'{"text": "\\ud800"}', "line 2 has half of a surrogate pair"),
    ("missing_text", b'{"body": "x"}', "line 2 has no 'text'"),
    ("wrong_type", b'{"text": 5}', "line 2 'text' is a int"),
    ("wrong_type", b'{"text": "x", "domain": ["y"]}', "line 2 'domain' is a list"),
    ("unknown_split", b'{"text": "x", "split": "dev"}', "line 2 'split' is 'dev'"),
]


@pytest.mark.parametrize(("reason", "line", "message"), BAD_LINES)
def test_bad_lines_are_counted_or_refused(reason, line, message, tokenizer_file, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n\n{"text": "good too"}')
    report = prepare([path], tmp_path / "out", tokenizer=tokenizer_file, valid_fraction=0)
    assert (
        report["documents"] == 2
        and report["skipped_documents"] == report[f"skipped_{reason}_documents"] == 1
    )
    assert Dataset(tmp_path / "out").skipped_documents[reason] == 1
    with pytest.raises(ValueError, match=f"a.jsonl: {message}.*without --strict"):
        prepare([path], tmp_path / "strict", tokenizer=tokenizer_file, strict=True)
    assert not (tmp_path / "strict").exists() and not leftovers(tmp_path / "strict")


def test_bad_parquet_values_are_counted(tmp_path):
    binary = pa.array([b"good", b"\xff\xfe", None, b" "], pa.binary())
    pq.write_table(
        pa.table({"text": binary, "domain": pa.array(["a"] * 4).dictionary_encode()}),
        tmp_path / "a.parquet",
    )
    reader = DocumentReader()
    assert [(d.text, d.domain, d.source) for d in reader.read(tmp_path / "a.parquet")] == [
        ("good", "a", "a.parquet:row 0")
    ]
    assert reader.skipped == {"invalid_utf8": 1, "missing_text": 1, "empty": 1}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_files_are_refused_by_name(name, damage, tokenizer_file, tmp_path):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(make_documents(200)), path)
    else:
        lines = "".join(json.dumps(record) + "\n" for record in make_documents(200)).encode()
        path.write_bytes(
            gzip.compress(lines)
            if name.endswith(".gz")
            else pa.Codec("zstd").compress(lines, asbytes=True)
        )
    path.write_bytes(path.read_bytes()[:-40] if damage == "truncated" else b"garbage" * 100)
    with pytest.raises(
        ValueError, match=rf"{name}: not readable to its end \(.*; restore the file"
    ):
        prepare([path], tmp_path / "out", tokenizer=tokenizer_file)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ["nowhere"]}, "nowhere: no such file or folder"),
        ({"inputs": ["a.csv"]}, "a.csv: unknown kind of file; documents are read from .jsonl"),
        ({"inputs": ["folder"]}, "folder: no document files"),
        ({"inputs": ["a.jsonl", "./a.jsonl"]}, "named twice"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json: no such tokenizer file"),
        ({"tokenizer": "a.csv"}, "a.csv: not a tokenizer.json"),
        ({"tokenizer": None}, "no tokenizer; give either --tokenizer FILE or --train-tokenizer"),
        ({"train_tokenizer": True}, "two tokenizers"),
        ({"eos_token": "</s>"}, r"no token '</s>' .* special tokens are <\|endoftext\|>"),
        (
            {"tokenizer": None, "train_tokenizer": True, "vocab_size": 100},
            "vocab_size=100 cannot hold .* at least 257",
        ),
        ({"fields": Fields(text="body")}, "no train documents in 1 files .*missing_text"),
        ({"out": "a.jsonl/inner"}, "a.jsonl: not a folder; choose another --out"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be positive"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0 must be"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"workers": 0}, "workers=0 must be at least 1"),
    ],
)
def test_mistakes_get_one_line(change, message, corpus, tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", make_documents(3))
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "folder").mkdir()
    options = {"inputs": ["a.jsonl"], "out": "out", "tokenizer": tokenizer_file} | change
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        prepare(**options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path / "out")


def test_an_older_data_set_is_replaced_only_when_asked_and_whole(corpus, tokenizer_file, tmp_path):
    out = tmp_path / "out"
    prepare([corpus], out, tokenizer=tokenizer_file)
    before = files_of(out)
    with pytest.raises(
        ValueError, match="exists; choose another --out, or replace it with --overwrite"
    ):
        prepare([corpus], out, tokenizer=tokenizer_file, seed=1)
    with pytest.raises(ValueError, match="no column 'nothing'"):
        prepare(
            [SAMPLE_DIR / "jargon.parquet"],
            out,
            tokenizer=tokenizer_file,
            overwrite=True,
            fields=Fields(text="nothing"),
        )
    assert files_of(out) == before
    prepare([corpus], out, tokenizer=tokenizer_file, seed=1, overwrite=True)
    assert files_of(out) != before and files_of(out).keys() == before.keys() and not leftovers(out)


def test_overwrite_never_deletes_what_is_not_a_data_set(corpus, tokenizer_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match="mine: is not a prepared data set, and --overwrite replaces nothing else"
    ):
        prepare([corpus], tmp_path / "mine", tokenizer=tokenizer_file, overwrite=True)
    prepare([corpus], tmp_path / "out", tokenizer=tokenizer_file)
    (tmp_path / "out" / "train" / "notes.txt").write_text("keep")
    with pytest.raises(
        ValueError, match="out: holds train/notes.txt, which is not part of the data set"
    ):
        prepare([corpus], tmp_path / "out", tokenizer=tokenizer_file, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists() and (
        tmp_path / "out" / "train" / "notes.txt"
    ).exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("spill.SpillWriter._flush", False),
        ("shuffle.write_shard", True),
        ("joining.write_manifest", True),
    ],
)
def test_a_full_disk_gets_one_line_and_keeps_what_is_done(
    where, kept, overwrite, corpus, tokenizer_file, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    if overwrite:
        prepare([corpus], out, tokenizer=tokenizer_file)
    before = files_of(out)
    options = {"tokenizer": tokenizer_file, "overwrite": overwrite, "seed": 1}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"emotrain.preparation.{where}", full)
        with pytest.raises(
            OSError, match="no space left on the disk of .*out; free some or choose another --out"
        ):
            prepare([corpus], out, **options)
    assert files_of(out) == before and out.exists() == overwrite and bool(leftovers(out)) == kept
    prepare([corpus], out, **options)
    prepare([corpus], tmp_path / "undisturbed", tokenizer=tokenizer_file, seed=1)
    assert files_of(out) == files_of(tmp_path / "undisturbed") and not leftovers(out)


def test_leftovers_of_before_had_a_plain_name_and_go_too(corpus, tokenizer_file, tmp_path):
    (tmp_path / "out.partial-0123abcd").mkdir()
    (tmp_path / "out.partial-0123abcd" / ".lock").write_text("written to by a process\n")
    prepare([corpus], tmp_path / "out.partial-mine", tokenizer=tokenizer_file)
    prepare([corpus], tmp_path / "out", tokenizer=tokenizer_file)
    assert [path.name for path in leftovers(tmp_path / "out")] == ["out.partial-mine"]


def test_a_file_system_that_cannot_swap_names_replaces_all_the_same(
    corpus, tokenizer_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("emotrain.folders.ctypes.CDLL", lambda *_, **__: object())
    for seed in (0, 1):
        prepare([corpus], tmp_path / "out", tokenizer=tokenizer_file, seed=seed, overwrite=True)
    Dataset(tmp_path / "out").verify()
    assert not leftovers(tmp_path / "out")


def test_what_others_write_is_not_cleaned_away(corpus, tokenizer_file, tmp_path):
    with stage_dataset(tmp_path / "out") as running:
        prepare([corpus], tmp_path / "out", tokenizer=tokenizer_file)
        assert running.folder.is_dir()
    Dataset(tmp_path / "out").verify()


def parse(*args):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(arg) for arg in args])


def test_command_prints_its_report(corpus, tokenizer_file, tmp_path, capsys):
    with open(corpus, "a") as file:
        file.write("{broken\n")
    options = [corpus, "--tokenizer", tokenizer_file, "--valid-fraction", 0.1]
    assert run(parse(*options, "--out", tmp_path / "one")) == 0
    assert "held out, 1 bad json skipped, in" in capsys.readouterr().out
    assert run(parse(*options, "--out", tmp_path / "two", "--json")) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["documents"] == 400 and report["skipped_documents"] == 1 and report["seconds"] > 0
    assert set(report["domains"]["train"]) == {"d0", "d1", "d2"}


def test_the_embedded_corpus(tmp_path):
    files, _ = find_files([SAMPLE_DIR])
    assert sum(path.stat().st_size for path in SAMPLE_DIR.iterdir()) < 6e6
    licences, reader = (
        (SAMPLE_DIR / "LICENSES.md").read_text(encoding="utf-8"),
        DocumentReader(strict=True),
    )
    held_out, originals = {}, {}
    for path in files:
        documents = list(reader.read(path))
        assert {document.domain for document in documents} == {
            path.stem
        } and f"`{path.name}`" in licences
        held_out[path.stem] = sum(document.split == "valid" for document in documents)
        for document in documents:
            assert (
                originals.setdefault(document.source.split("#")[0], document.split)
                == document.split
            )
    assert len(files) >= 12 and min(held_out.values()) >= 24


def test_prepare_loads_no_torch():
    code = (
        "import sys, emotrain.preparation.prepare; "
        "sys.exit(bool({'torch', 'pyarrow', 'tokenizers', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
