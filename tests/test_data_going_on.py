"""Proves that `prepare` goes on where it was killed, on any number of processes and parts, and
ends with the bytes of an undisturbed run; and that nobody writes into another one's half-done data
set."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emotrain.cli import main
from emotrain.data.formats import Dataset
from emotrain.data.staging import stage_dataset
from emotrain.data.tokenizer import train_tokenizer
from emotrain.errors import UserError
from emotrain.preparation import half_done, pieces
from emotrain.preparation.half_done import HalfDone
from emotrain.preparation.prepare import SAMPLE_DIR, prepare
from tests.test_data_prepare import files_of, leftovers, make_documents, write_jsonl


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 4000)
    monkeypatch.setattr(half_done, "PATIENCE", 0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of 19 pieces, a tokenizer, and what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("made")
    corpus = write_jsonl(folder / "corpus.jsonl", make_documents(300))
    options = {
        "tokenizer": folder / "tokenizer.json",
        "shard_tokens": 3000,
        "valid_fraction": 0.1,
        "deduplicate": "exact",
    }
    texts = [document["text"] for document in make_documents(300)]
    options["tokenizer"].write_text(train_tokenizer(texts, 300).to_json())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pieces, "MIN_PIECE_BYTES", 4000)
        prepare([corpus], folder / "out", **options)
    assert len(Dataset(folder / "out").shards["train"]) > 2
    return corpus, options, files_of(folder / "out")


def but_locks(folder):
    return {name: content for name, content in files_of(folder).items() if ".lock" not in name}


class Killed(BaseException):
    """As good as SIGKILL: nothing that comes after runs."""


def kill_at(monkeypatch, ending: str, count: int, after: bool) -> None:
    """Die when the count-th file of this ending gets its name, before or after it has it."""
    real, seen = os.replace, 0

    def replace(source, target):
        nonlocal seen
        seen += str(target).endswith(ending)
        if seen == count and str(target).endswith(ending) and not after:
            raise Killed
        real(source, target)
        if seen == count and str(target).endswith(ending):
            raise Killed

    monkeypatch.setattr(os, "replace", replace)
    # Whatever a killed process would do on its way out.
    monkeypatch.setattr(HalfDone, "__exit__", lambda staging, *_: staging._release())


@pytest.mark.parametrize(
    ("ending", "count", "after"),
    [
        ("pieces/000003.json", 1, True),
        ("pieces/000003.json", 1, False),
        (".arrow", 14, False),
        ("shards/train-00001.json", 1, True),
        ("report.json", 1, True),
    ],
)
def test_killed_anywhere_it_goes_on_and_ends_alike(
    ending, count, after, made, tmp_path, monkeypatch
):
    corpus, options, undisturbed = made
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, ending, count, after)
        prepare([corpus], out, **options)
    assert not out.exists() and len(leftovers(out)) == 1
    there = {path.name: path.stat().st_mtime_ns for path in leftovers(out)[0].rglob("*.arrow")}
    prepare([corpus], out, **options)
    assert files_of(out) == undisturbed and not leftovers(out)
    assert there.keys(), "what was there was used, which the next test shows"


def test_what_is_whole_is_not_done_again_and_what_is_not_is(made, tmp_path, monkeypatch):
    from emotrain.preparation.encoding import PieceEncoder

    corpus, options, undisturbed = made
    out, encode, done = tmp_path / "out", PieceEncoder.encode, []

    def noted(encoder, number, *rest):
        done.append(number)
        encode(encoder, number, *rest)

    monkeypatch.setattr(PieceEncoder, "encode", noted)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, "pieces/000005.json", 1, after=True)
        prepare([corpus], out, **options)
    assert done == [0, 1, 2, 3, 4, 5]
    (folder,) = leftovers(out)
    cut, changed = folder / "pieces/000001.arrow", folder / "pieces/000004.arrow"
    cut.write_bytes(cut.read_bytes()[:-1])
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    done.clear()
    prepare([corpus], out, **options)
    assert done[:3] == [1, 4, 6] and files_of(out) == undisturbed


def test_parts_on_any_machine_make_what_one_makes(made, tmp_path):
    corpus, options, undisturbed = made
    out = tmp_path / "out"
    first = prepare([corpus], out, part=(3, 3), **options)
    assert first["part"] == [3, 3] and not out.exists()
    assert (first["pieces"], first["all_pieces"]) == (7, 19)
    prepare([corpus], out, part=(1, 3), **options)
    with pytest.raises(UserError, match=r"out: 6 of 19 pieces are missing, of the parts 2/3; make"):
        prepare([corpus], out, join=True, **options)
    with pytest.raises(UserError, match=r"--part 1/2: .* is made in 3 parts; give the same number"):
        prepare([corpus], out, part=(1, 2), **options)
    second = prepare([corpus], out, part=(2, 3), **options)
    report = prepare([corpus], out, join=True, **options)
    assert files_of(out) == undisturbed and not leftovers(out)
    assert first["tokens"] + second["tokens"] < report["tokens"]


def test_one_command_ends_what_parts_began(made, tmp_path):
    corpus, options, undisturbed = made
    prepare([corpus], tmp_path / "out", part=(2, 4), **options)
    prepare([corpus], tmp_path / "out", **options)
    assert files_of(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed 0, now 5"),
        ({"deduplicate": ""}, "deduplicate 'exact', now ''"),
        ({"tokenizer": None, "train_tokenizer": True}, "tokenizer 'sha256 .*', now 'trained"),
        ({"inputs": 2}, "inputs differ: more.jsonl is new"),
        ({"inputs": 0}, "the input corpus.jsonl has changed since"),
    ],
)
def test_another_command_is_refused_with_the_difference(change, named, made, tmp_path):
    corpus, options, _ = made
    inputs, out = [tmp_path / "corpus.jsonl"], tmp_path / "out"
    inputs[0].write_bytes(corpus.read_bytes())
    prepare(inputs, out, part=(1, 4), **options)
    before = but_locks(leftovers(out)[0])
    change = dict(change)
    if change.pop("inputs", 1) == 2:
        inputs.append(write_jsonl(tmp_path / "more.jsonl", make_documents(3)))
    elif not change:
        write_jsonl(inputs[0], make_documents(301))
    with pytest.raises(UserError, match=f"half of it is made by another command .*{named}"):
        prepare(inputs, out, **(options | change))
    assert but_locks(leftovers(out)[0]) == before
    prepare(inputs, out, overwrite=True, **(options | change))
    assert not leftovers(out)


def test_two_writers_do_not_share_a_folder_but_parts_do(made, tmp_path):
    corpus, options, _ = made
    out = tmp_path / "out"
    with HalfDone(out):
        with pytest.raises(
            UserError, match=rf"is being made by another process \(process {os.getpid()} on"
        ):
            prepare([corpus], out, **options)
        with pytest.raises(UserError, match="out: is being made by another process"):
            prepare([corpus], out, part=(1, 2), **options)
    with HalfDone(out, part=(1, 2)):
        with pytest.raises(UserError, match="part 1/2 is being made by another process"):
            prepare([corpus], out, part=(1, 2), **options)
        with pytest.raises(UserError, match="made by another process, or parts of it"):
            prepare([corpus], out, join=True, **options)
        prepare([corpus], out, part=(2, 2), **options)
    prepare([corpus], out, part=(1, 2), **options)
    prepare([corpus], out, join=True, **options)


def test_killed_after_it_had_its_name_it_says_what_it_made(made, tmp_path, monkeypatch):
    corpus, options, undisturbed = made
    out = tmp_path / "out"

    def die(_folder):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(half_done, "remove", die)
        patched.setattr(HalfDone, "__exit__", lambda staging, *_: staging._release())
        prepare([corpus], out, **options)
    assert files_of(out) == undisturbed and leftovers(out)
    report = prepare([corpus], out, **options)
    assert report["documents"] == 300 and not leftovers(out) and files_of(out) == undisturbed
    with pytest.raises(UserError, match="out: exists; choose another --out"):
        prepare([corpus], out, **options)


def test_killed_there_another_command_is_told_that_it_exists(made, tmp_path, monkeypatch):
    corpus, options, _ = made

    def die(_folder):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(half_done, "remove", die)
        patched.setattr(HalfDone, "__exit__", lambda staging, *_: staging._release())
        prepare([corpus], tmp_path / "out", **options)
    with pytest.raises(UserError, match="out: exists; choose another --out"):
        prepare([corpus], tmp_path / "out", **(options | {"seed": 8}))


def test_a_worker_that_dies_is_named_and_its_piece_done_again(made, tmp_path, monkeypatch):
    from emotrain.preparation import work, workers

    corpus, options, undisturbed = made
    monkeypatch.setattr(work, "SMALL_BYTES", 0)
    out = tmp_path / "out"
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with monkeypatch.context() as patched:
        patched.setattr(workers, "PROGRAM", dies)
        with pytest.raises(
            RuntimeError, match="a worker ended by signal 9; it may have needed more"
        ):
            prepare([corpus], out, workers=2, **options)
    prepare([corpus], out, workers=2, **options)
    assert files_of(out) == undisturbed


def test_workers_name_what_is_wrong(made, tmp_path, monkeypatch, capsys):
    """As one process does: the first of the pieces, in one line."""
    corpus, options, _ = made
    monkeypatch.setattr("emotrain.preparation.work.SMALL_BYTES", 0)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus.read_bytes() + b'{"text": 5}\n')
    command = ["prepare", str(bad), "--tokenizer", str(options["tokenizer"]), "--workers", "2"]
    assert main([*command, "--strict", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "bad.jsonl: line " in said and "'text' is a int, not text" in said


@pytest.mark.parametrize("where", ["encoding.PieceEncoder._encode_part", "shuffle.write_shard"])
def test_ctrl_c_keeps_what_is_done(where, made, tmp_path, monkeypatch, caplog):
    corpus, options, undisturbed = made
    out = tmp_path / "out"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"emotrain.preparation.{where}", interrupt)
        prepare([corpus], out, **options)
    kept = where.startswith("shuffle")
    assert not out.exists() and bool(leftovers(out)) == kept
    assert ("the same command goes on from there" in caplog.text) == kept
    with stage_dataset(out):
        assert bool(leftovers(out)), "another command's folder leaves this one alone"
    prepare([corpus], out, **options)
    assert files_of(out) == undisturbed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--part", "3"], "--part '3' is none; give which of how many, as 3/16"),
        (["--part", "5/4"], "--part 5/4 is none; parts are 1/4 and so on"),
        (["--part", "1/2", "--join"], "--part and --join are two commands"),
        (["--join"], "pieces are missing, of the parts 1/1; make them with --part, then join"),
        (["--max-document-mb", "0"], "max_document_mb=0 must be positive"),
        (["--min-tokens", "9", "--max-tokens", "5"], "max_tokens=5 is below min_tokens=9"),
        (["--window", "0"], "window=0 must be at least 1"),
    ],
)
def test_mistakes_of_the_command_line_get_one_line(options, said, made, tmp_path, capsys):
    corpus, others, _ = made
    command = ["prepare", str(corpus), "--tokenizer", str(others["tokenizer"])]
    assert main([*command, "--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_50_times_at_random_moments_it_ends_alike(tmp_path):
    """With SIGKILL, its workers too, and no piece made small by hand."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(2):
        for file in SAMPLE_DIR.glob("*.parquet"):
            shutil.copy(file, corpus / f"{number}-{file.name}")
    tokenizer = tmp_path / "tokenizer.json"
    texts = [document["text"] for document in make_documents(300)]
    tokenizer.write_text(train_tokenizer(texts, 300).to_json())
    command = [sys.executable, "-m", "emotrain.cli", "prepare", str(corpus), "--workers", "2"]
    command += ["--tokenizer", str(tokenizer), "--deduplicate", "exact"]
    command += ["--shard-tokens", "1000000", "--valid-fraction", "0.1"]
    began = time.monotonic()
    subprocess.run([*command, "--out", str(tmp_path / "one")], check=True, capture_output=True)
    seconds = time.monotonic() - began
    rng, killed, out = random.Random(0), 0, tmp_path / "out"
    while killed < 50:
        with subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE) as process:
            try:
                process.wait(rng.uniform(0.5, max(3.0, seconds / 5)))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
                continue
            assert process.returncode == 0, process.stderr.read()
        assert files_of(out) == files_of(tmp_path / "one")
        shutil.rmtree(out)
    if not out.exists():
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    assert files_of(out) == files_of(tmp_path / "one") and not leftovers(out)
    assert json.loads((out / "dataset.json").read_text())["card"]["filters"][0]["removed"] > 5000
    Dataset(Path(out)).verify()
