"""Proves what `emotrain coverage` writes of a checkpoint and of the steps of a run, that it goes on
where it was interrupted, and what it does with checkpoints and data that are not as they should
be."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest

from emotrain.analysis import coverage_steps
from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.preparation.prepare import prepare
from emotrain.training.run import train
from tests.conftest import ROOT, tiny_settings

STEPS = ("step-00000002", "step-00000004", "step-00000006")


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A run with three checkpoints; copied by tests that damage it."""
    folder = tmp_path_factory.mktemp("coverage") / "run"
    training = {"checkpoint_every": 2, "keep_checkpoints": 0}
    train(config_from_dict(tiny_settings(tiny_data, folder, **training)))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == list(STEPS)
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Pictures take longer than all else: only the tests that are about them draw any."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def drawn():
    """Asks for pictures."""


@pytest.fixture
def passes(monkeypatch):
    """Names of the checkpoints that are measured from now on."""
    names, measure = [], coverage_steps.measure

    def counted(folder, *rest):
        names.append(folder.name)
        return measure(folder, *rest)

    monkeypatch.setattr(coverage_steps, "measure", counted)
    return names


def command(run_dir, data, *words):
    return main(["coverage", str(run_dir), "--data", str(data), *map(str, words)])


def found(capsys):
    """The JSON of a command that went well."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def lines(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_command_measures_and_writes(trained, tiny_data, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(trained, tiny_data, "--out", out, "--keep", "0.5", "0.25") == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "coverage.json").read_text())
    pictures = ("cosine", "experts", "overlap", "together")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["coverage.json", "coverage.md", *(f"{picture}.csv" for picture in pictures)]
    )
    names = result["domain_order"]
    assert sorted(names) == ["garden", "harbour", "kitchen"] == sorted(result["domains"])
    assert all(name in printed for name in names) and "halves of one" in printed
    for domain in result["domains"].values():
        assert domain["documents"] == 8 and domain["tokens"] > 100
        for measure in ("slots", "probability"):
            for scope in ("document", "domain"):
                numbers = domain[measure][scope]
                assert 1 <= numbers["effective_experts"] <= 7
                per_layer = numbers["effective_experts_per_layer"]
                assert np.mean(per_layer) == pytest.approx(numbers["effective_experts"])
        assert domain["slots"]["document"]["used_experts"] <= 7
        assert [len(experts) for experts in domain["subsets"]["0.5"]] == [3, 3]
    for keep, overlap in result["overlap"].items():
        matrix = np.array(overlap["jaccard_matrix"])
        assert overlap["within"] == pytest.approx(np.diag(matrix).mean())
        assert overlap["between"] == pytest.approx(matrix[np.triu_indices(3, 1)].mean())
        assert overlap["routed_kept_per_layer"] == ([3, 3] if keep == "0.5" else [1, 1])
    for bank in result["together"]:
        grouped = [expert for group in bank["groups"] for expert in group["experts"]]
        assert sorted(grouped + bank["experts_in_no_pool"]) == list(range(7))
        assert bank["pool_experts"] == 2 and bank["pools"] == 24
        assert len(bank["partners_per_expert"]) == 7
    assert result["steps"] == [] and result["settled_step"] is None
    assert len(lines(out / "experts.csv")) == 3 * 2 * 2 * 2
    assert len(lines(out / "cosine.csv")) == 2 * 3 * 3 == len(lines(out / "overlap.csv"))
    pairs = lines(out / "together.csv")
    assert len(pairs) == 2 * 21 and sum(int(pair["pools"]) for pair in pairs) == 2 * 24
    assert (out / "coverage.md").read_text().count("**") == 2 * 5


def test_what_evaluate_says_too_is_the_same(trained, tiny_data, tmp_path, capsys):
    """Cosine of domains, and effective experts of a document by probability."""
    same = ["--documents", "5", "--document-tokens", "0", "--json"]
    assert command(trained, tiny_data, "--out", tmp_path / "coverage", *same) == 0
    result = found(capsys)
    words = ["evaluate", str(trained), "--data", str(tiny_data), "--out", str(tmp_path / "e")]
    assert main([*words, "--keep", "1.0", "--random-seeds", "0", *same]) == 0
    routing = found(capsys)["routing"]
    assert result["domain_cosine"] == pytest.approx(routing["domain_cosine"], rel=1e-6)
    assert result["domain_cosine_per_layer"] == pytest.approx(
        routing["domain_cosine_per_layer"], rel=1e-6
    )
    effective = [
        domain["probability"]["document"]["effective_experts"]
        for domain in result["domains"].values()
    ]
    # As many documents of each domain: their mean is that of the domains.
    assert np.mean(effective) == pytest.approx(routing["effective_experts"], rel=1e-6)


def test_steps_are_compared_with_the_last_and_kept(trained, tiny_data, tmp_path, capsys, passes):
    words = ["--out", tmp_path / "out", "--checkpoints", "all", "--json"]
    assert command(trained, tiny_data, *words) == 0
    result = found(capsys)
    assert passes == [STEPS[2], STEPS[0], STEPS[1]]
    assert [step["step"] for step in result["steps"]] == [2, 4, 6] and result["step"] == 6
    last = result["steps"][-1]
    assert set(last["subset_jaccard_mean"].values()) == {1.0}
    assert last["routing_cosine_mean"] == pytest.approx(1)
    assert last["domain_cosine"] == result["domain_cosine"]
    assert last["within"]["0.25"] == result["overlap"]["0.25"]["within"]
    for step in result["steps"]:
        for keep, by_domain in step["subset_jaccard"].items():
            assert np.mean(list(by_domain.values())) == pytest.approx(
                step["subset_jaccard_mean"][keep]
            )
            for name, jaccard in by_domain.items():
                record = json.loads(
                    (tmp_path / f"out/steps/step-{step['step']:08d}.json").read_text()
                )
                one = record["record"]["subsets"][keep][name]
                other = result["domains"][name]["subsets"][keep]
                by_layer = [
                    len(set(a) & set(b)) / len(set(a) | set(b))
                    for a, b in zip(one, other, strict=True)
                ]
                assert jaccard == pytest.approx(np.mean(by_layer))
    numbers = lines(tmp_path / "out/steps.csv")
    assert {line["step"] for line in numbers} == {"2", "4", "6"}
    assert {line["domain"] for line in numbers} == {"", "garden", "harbour", "kitchen"}

    # The second time, and with fewer steps, only the last one is measured again.
    passes.clear()
    assert command(trained, tiny_data, *words) == 0
    assert found(capsys) == result and passes == [STEPS[2]]
    passes.clear()
    some = ["--out", tmp_path / "out", "--checkpoints", "4", "6", "4", "--json"]
    assert command(trained, tiny_data, *some) == 0
    assert [step["step"] for step in found(capsys)["steps"]] == [4, 6] and passes == [STEPS[2]]
    # One checkpoint alone leaves no numbers of steps from before.
    assert command(trained, tiny_data, "--out", tmp_path / "out", "--json") == 0
    assert not (tmp_path / "out/steps.csv").exists() and not found(capsys)["steps"]


def test_it_goes_on_where_it_was_killed(trained, tiny_data, tmp_path, capsys, monkeypatch):
    alone, out = tmp_path / "alone", tmp_path / "out"
    words = ["--checkpoints", "all", "--json"]
    assert command(trained, tiny_data, "--out", alone, *words) == 0
    expected = found(capsys)
    measure, done = coverage_steps.measure, []

    def killed(folder, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(folder.name)
        return measure(folder, *rest)

    monkeypatch.setattr(coverage_steps, "measure", killed)
    assert command(trained, tiny_data, "--out", out, *words) == 130
    assert not (out / "coverage.json").exists() and (out / f"steps/{STEPS[0]}.json").is_file()
    capsys.readouterr()
    done.clear()
    assert command(trained, tiny_data, "--out", out, *words) == 0
    assert found(capsys) == expected and done == [STEPS[2], STEPS[1]]


def test_a_record_that_is_not_one_is_measured_again(
    trained, tiny_data, tmp_path, capsys, passes, caplog
):
    words = ["--out", tmp_path, "--documents", "2", "--checkpoints", "2", "6", "--json"]
    assert command(trained, tiny_data, *words) == 0
    expected, file = found(capsys), tmp_path / f"steps/{STEPS[0]}.json"
    whole = json.loads(file.read_text())

    def other(**values):
        return json.dumps({**whole, **values}).encode()

    def inside(**values):
        return other(record={**whole["record"], **values})

    far = {
        keep: {name: [[99] * len(experts) for experts in layers] for name, layers in of.items()}
        for keep, of in whole["record"]["subsets"].items()
    }
    told = {
        b"{": "is not a record",
        b"\xff\xfe": "is not a record",
        other(record={}): "step is missing",
        inside(routing={}): "its domains, layers or experts are others",
        inside(domain_cosine="1"): "domain_cosine is '1', not a number",
        inside(subsets=far): "its domains, layers or experts are others",
        other(documents="others"): "",
        other(weights="others"): "",
    }
    for content, reason in told.items():
        file.write_bytes(content)
        passes.clear()
        caplog.clear()
        assert command(trained, tiny_data, *words) == 0
        assert found(capsys) == expected and passes == [STEPS[2], STEPS[0]], content
        assert reason in caplog.text and bool(reason) == ("is not a record" in caplog.text)
        assert json.loads(file.read_text()) == whole


@pytest.mark.parametrize("how", ["damaged", "not whole", "not finite", "of another model"])
def test_a_broken_checkpoint_is_named_and_left_out_only_on_request(
    copied, tiny_data, capsys, caplog, how
):
    broken = copied / "checkpoints" / STEPS[1]
    if how == "not whole":
        (broken / "manifest.json").unlink()
    elif how == "of another model":
        settings = tiny_settings(tiny_data, copied.parent / "other", steps=4)
        settings["model"]["experts"]["routed"] = settings["model"]["router"]["pool"]["max"] = 6
        train(config_from_dict(settings))
        shutil.rmtree(broken)
        shutil.copytree(copied.parent / "other/checkpoints" / STEPS[1], broken)
    else:
        file, manifest = broken / "model-00000.safetensors", broken / "manifest.json"
        content = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        if how == "damaged":  # of the same size: only reading all of it finds that out
            content[-1] ^= 1
        else:
            content[header:] = b"\xff" * (len(content) - header)
            entries = json.loads(manifest.read_text())
            entries["files"][file.name]["sha256"] = hashlib.sha256(content).hexdigest()
            manifest.write_text(json.dumps(entries))
        file.write_bytes(content)
    words = ["--checkpoints", "all", "--documents", "2", "--json"]
    capsys.readouterr()
    assert command(copied, tiny_data, *words) == 2
    printed = capsys.readouterr()
    assert str(broken) in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (copied / "coverage/coverage.json").exists()
    if how == "of another model":
        assert "of another model" in printed.err
        return
    assert "--skip-broken" in printed.err
    assert command(copied, tiny_data, *words, "--skip-broken") == 0
    result = found(capsys)
    assert [step["step"] for step in result["steps"]] == [2, 6]
    assert result["skipped_checkpoints"] == [str(broken)]
    assert f"{broken} is left out" in caplog.text


def test_the_last_checkpoint_may_be_the_broken_one(copied, tiny_data, capsys):
    (copied / "checkpoints" / STEPS[2] / "manifest.json").unlink()
    words = ["--checkpoints", "all", "--skip-broken", "--documents", "2", "--json"]
    assert command(copied, tiny_data, *words) == 0
    result = found(capsys)
    assert result["step"] == 4 and [step["step"] for step in result["steps"]] == [2, 4]


def test_a_run_with_one_checkpoint(copied, tiny_data, capsys, caplog):
    for name in STEPS[:2]:
        shutil.rmtree(copied / "checkpoints" / name)
    assert command(copied, tiny_data, "--checkpoints", "all", "--json") == 0
    result = found(capsys)
    assert len(result["steps"]) == 1 and result["settled_step"] is None
    assert "has one checkpoint to measure" in caplog.text
    assert (copied / "coverage/experts.csv").is_file()
    assert not (copied / "coverage/steps.csv").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--checkpoints", "5"], "--checkpoints 5: the run has no such step; give `all`, or some"),
        (["--checkpoints", "all", "2"], "--checkpoints all: the run has no such step"),
        (["--checkpoints", "\u00b2"], "the run has no such step"),
        (["--keep", "0"], "keep=0 is not a share of the experts"),
        (["--pool", "nan"], "keep=nan is not a share of the experts"),
        (["--documents", "0"], "documents=0 leaves nothing to measure"),
        (["--document-tokens", "1"], "document_tokens=1 leaves no text"),
        (["--domains", "rust"], "no held-out documents of domain 'rust'"),
        (["--micro-batch", "-1"], "micro_batch=-1 must be a positive number of rows"),
    ],
)
def test_bad_settings_are_one_line(trained, tiny_data, tmp_path, capsys, words, told):
    assert command(trained, tiny_data, "--out", tmp_path / "out", *words) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_steps_are_of_a_run_and_not_of_a_checkpoint(trained, tiny_data, tmp_path, capsys):
    checkpoint = trained / "checkpoints" / STEPS[0]
    assert command(checkpoint, tiny_data, "--out", tmp_path / "o", "--checkpoints", "all") == 2
    assert "give a run folder" in capsys.readouterr().err
    assert command(tmp_path, tiny_data, "--out", tmp_path / "o") == 2
    assert "no checkpoint here" in capsys.readouterr().err


def test_one_domain_and_a_domain_of_one_document(trained, tiny_data, tmp_path, capsys):
    assert command(trained, tiny_data, "--domains", "garden", "--out", tmp_path / "one") == 0
    capsys.readouterr()
    result = json.loads((tmp_path / "one/coverage.json").read_text())
    assert result["domain_cosine"] is None and result["domain_order"] == ["garden"]
    overlap = result["overlap"]["0.25"]
    assert overlap["between"] is None and 0 <= overlap["within"] <= 1
    assert sorted(path.stem for path in (tmp_path / "one").glob("*.csv")) == ["experts", "together"]

    texts = [("many", f"salt and bread {i} " * 9, "valid") for i in range(4)]
    texts += [
        ("many", "a loaf of bread " * 9, "train"),
        ("single", "anchor and tide " * 9, "valid"),
    ]
    texts += [("empty", "", "valid")]
    file = tmp_path / "documents.jsonl"
    file.write_text(
        "".join(
            json.dumps({"text": text, "domain": domain, "split": split}) + "\n"
            for domain, text, split in texts
        )
    )
    prepare([file], tmp_path / "data", tokenizer=tiny_data / "tokenizer.json", workers=1)
    assert command(trained, tmp_path / "data", "--out", tmp_path / "two", "--json") == 0
    result = found(capsys)
    assert {name: of["documents"] for name, of in result["domains"].items()} == {
        "many": 4,
        "single": 1,
    }
    overlap, single = result["overlap"]["0.25"], result["domain_order"].index("single")
    assert overlap["between"] is None and overlap["within"] is not None
    assert overlap["jaccard_matrix"][single] == [None, None]
    lacking = [line["jaccard"] for line in lines(tmp_path / "two/overlap.csv")]
    assert lacking.count("") == 3 * 3 and len(lacking) == 3 * 4


def test_pictures_of_one_document_and_of_steps(trained, tiny_data, tmp_path, drawn):
    """Numbers that are not known leave gaps."""
    words = ["--domains", "garden", "kitchen", "--documents", "1", "--checkpoints", "2", "6"]
    assert command(trained, tiny_data, "--out", tmp_path, *words) == 0
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.stem for p in pictures] == ["cosine", "experts", "overlap", "steps", "together"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert "–" in (tmp_path / "coverage.md").read_text()


def test_a_dense_model_is_refused(tiny_data, tmp_path, capsys):
    config = tiny_settings(tiny_data, tmp_path / "dense", steps=1)
    config["model"]["experts"] |= {"routed": 0, "shared": 1, "top_k": 0}
    config["model"]["router"] = {"pool": {"kind": "none"}}
    train(config_from_dict(config))
    capsys.readouterr()
    assert command(tmp_path / "dense", tiny_data) == 2
    printed = capsys.readouterr()
    assert "the model is dense" in printed.err and not printed.out


def test_without_matplotlib_numbers_stay(trained, tiny_data, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "experts.png").write_bytes(b"of another result")
    assert command(trained, tiny_data, "--out", out, "--json") == 0
    assert "pip install 'emotrain[report]'" in caplog.text
    assert not list(out.glob("*.png")) and len(list(out.glob("*.csv"))) == 4


def test_the_page_names_what_there_is(trained, tiny_data, tmp_path, capsys):
    """Its commands are run by tests/test_analysis_page.py."""
    assert command(trained, tiny_data, "--out", tmp_path, "--checkpoints", "2", "6", "--json") == 0
    page = (ROOT / "docs/analysis.md").read_text(encoding="utf-8")
    section = page.split("\n## Coverage\n")[1].split("\n## ")[0]
    pictures = set(re.findall(r"^\| `(\w+)\.png`", section, re.MULTILINE))
    assert pictures == {path.stem for path in tmp_path.glob("*.csv")}
    table = section.split("| name in `coverage.json` |")[1].split("\n\n")[0]
    numbers = found(capsys)["domains"]["garden"]["slots"]["document"]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == {name for name in numbers if not name.endswith("_per_layer")}
