"""Proves that clusters.parquet names documents of a data set: they come back token by token, choose
experts, and nothing of another data set, split or file is taken for them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.data.document_clusters import (
    DOCUMENT_COLUMNS,
    FORMAT,
    METADATA,
    TOKEN_COLUMNS,
    Origin,
    documents_of_cluster,
    read_columns,
    write_columns,
)
from emotrain.data.formats import Dataset
from emotrain.errors import UserError
from emotrain.training.run import train
from tests.conftest import tiny_settings


def columns_of(data, split="train"):
    """Every document of a split, in turn in clusters 0, 1 and 2."""
    found = list(Dataset(data).documents(split))
    lengths = np.array([len(ids) for _, ids, _ in found])
    return {
        "index": np.array([number for number, _, _ in found]),
        "domain": [domain for _, _, domain in found],
        "length": lengths,
        "tokens": np.minimum(lengths, 20),
        "cluster": np.arange(len(found)) % 3,
        **{name: np.linspace(0, 1, len(found)) for name in ("distance", "x", "y")},
    }


def origin_of(data, split="train"):
    return Origin(str(data), split, Dataset(data).fingerprint(split), "runs/it", "ab" * 32, 7)


@pytest.fixture(scope="module")
def file(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("clusters") / "clusters.parquet"
    return write_columns(path, DOCUMENT_COLUMNS, columns_of(tiny_data), origin_of(tiny_data))


def test_a_file_comes_back_and_names_documents(file, tiny_data):
    written, found = columns_of(tiny_data), read_columns(file, DOCUMENT_COLUMNS)
    assert found.origin == origin_of(tiny_data)
    for name, values in found.columns.items():
        expected = np.asarray(written[name])
        if expected.dtype == np.float64:
            expected = expected.astype(np.float32)
        assert values.tolist() == expected.tolist(), name
    everything = [ids for _, ids, _ in Dataset(tiny_data).documents("train")]
    dataset, split, documents = documents_of_cluster(file, 1)
    assert dataset.path == tiny_data and split == "train"
    documents = list(documents)
    assert len(documents) > 10
    for ids, expected in zip(documents, everything[1::3], strict=True):
        assert ids.tolist() == expected.tolist()
    *_, in_kitchen = documents_of_cluster(file, 1, "kitchen")
    of_kitchen = [
        ids for i, (_, ids, name) in enumerate(Dataset(tiny_data).documents("train"))
        if i % 3 == 1 and name == "kitchen"
    ]  # fmt: skip
    assert [ids.tolist() for ids in in_kitchen] == [ids.tolist() for ids in of_kitchen]


def test_a_token_is_a_row_and_a_document_many(tiny_data, tmp_path):
    columns = {
        "index": [0, 0, 3],
        "position": [0, 1, 0],
        "token": [5, 6, 7],
        "cluster": [0, 1, 0],
        "distance": [0.1, 0.2, 0.3],
    }
    path = write_columns(tmp_path / "t.parquet", TOKEN_COLUMNS, columns, origin_of(tiny_data))
    found = read_columns(path, TOKEN_COLUMNS).columns
    assert [found[name].tolist() for name in ("index", "position", "token", "cluster")] == [
        columns[name] for name in ("index", "position", "token", "cluster")
    ]
    with pytest.raises(UserError, match="its columns are not index, domain"):
        read_columns(path, DOCUMENT_COLUMNS)


def test_any_arrow_library_reads_the_columns(file, tiny_data):
    """Others read the files without this code: names and types are a promise."""
    table = pq.read_table(file)
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        **DOCUMENT_COLUMNS,
        **dict.fromkeys(("distance", "x", "y"), "float"),
    }
    about = json.loads(table.schema.metadata[METADATA])
    assert about == {"format": FORMAT, **vars(origin_of(tiny_data))}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.drop(["x"]), "its columns are not"),
        (lambda t: t.replace_schema_metadata(None), "not a file of `emotrain cluster`"),
        (lambda t: changed(t, "index", lambda v: v[::-1]), "not in order"),
        (lambda t: changed(t, "index", lambda v: np.maximum(v, 1)), "not in order"),
        (lambda t: changed(t, "index", lambda v: v - 1), "not in order"),
        (lambda t: changed(t, "cluster", lambda v: v - 1), "a cluster below 0"),
        (lambda t: changed(t, "cluster", lambda v: [None, *v[1:]]), "null values"),
        (lambda t: about(t, "[]"), "not of format 1"),
        (lambda t: about(t, "{"), "not a file of `emotrain cluster`"),
        (lambda t: about(t, "[" * 100_000), "does not say what was clustered"),
        (lambda t: about(t, b"\xff\xfe"), "not a file of `emotrain cluster`"),
        (lambda t: about(t, format=2), "not of format 1"),
        (lambda t: about(t, step="7"), "does not say what was clustered"),
        (lambda t: about(t, step=True), "does not say what was clustered"),
        (lambda t: about(t, data=None), "does not say what was clustered"),
        (lambda t: about(t, more=1), "does not say what was clustered"),
        (lambda t: about(t, split="test"), "split 'test' is not known"),
    ],
)
def test_a_file_that_is_none_of_ours_is_one_line(change, said, file, tmp_path):
    path = tmp_path / "clusters.parquet"
    pq.write_table(change(pq.read_table(file)), path)
    with pytest.raises(UserError) as caught:
        read_columns(path, DOCUMENT_COLUMNS)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def changed(table, name, values):
    field = table.schema.field(name)
    column = pa.array(values(table[name].to_numpy()), type=field.type)
    return table.set_column(table.column_names.index(name), field, column)


def about(table, text=None, **changes):
    known = json.loads(table.schema.metadata[METADATA])
    text = json.dumps({**known, **changes}) if text is None else text
    return table.replace_schema_metadata({METADATA: text})


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_bytes_that_are_no_file_are_one_line(keep, file, tmp_path):
    path = tmp_path / "clusters.parquet"
    path.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a file of `emotrain cluster`"):
        read_columns(path, DOCUMENT_COLUMNS)
    with pytest.raises(UserError, match="no such file"):
        read_columns(tmp_path / "nowhere.parquet", DOCUMENT_COLUMNS)


def test_other_documents_are_refused(file, tiny_data, tmp_path):
    found = read_columns(file, DOCUMENT_COLUMNS)
    with pytest.raises(UserError, match="not those that were clustered"):
        replace(found.origin, split="valid").open()
    with pytest.raises(UserError, match=r"has no cluster 3; its clusters are 0 to 2"):
        documents_of_cluster(file, 3)
    beyond = {**columns_of(tiny_data), "cluster": np.zeros(len(found.columns["index"]))}
    beyond["index"] = beyond["index"] + 10_000
    path = tmp_path / "clusters.parquet"
    write_columns(path, DOCUMENT_COLUMNS, beyond, found.origin)
    with pytest.raises(UserError, match="document 10000 is not in"):
        list(documents_of_cluster(path, 0)[2])


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    train(config_from_dict(tiny_settings(tiny_data, run_dir, steps=1)))
    return run_dir


def test_a_cluster_chooses_experts(file, run, tiny_data, tmp_path, capsys):
    """It chooses what its documents choose when they are given as a file of text."""
    texts = [Dataset(tiny_data).tokenizer().decode(ids) for ids in documents_of_cluster(file, 2)[2]]
    lines = tmp_path / "same.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chosen = []
    for source in (f"{file}:2", lines):
        out = tmp_path / f"{len(chosen)}.json"
        assert main(["select", str(run), "--calibration", str(source), "--keep", "4", "--out",
                     str(out), "--json"]) == 0  # fmt: skip
        chosen.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    by_cluster, by_file = chosen
    assert by_cluster["calibration"]["fingerprint"] == by_file["calibration"]["fingerprint"]
    assert by_cluster["experts_kept_per_layer"] == by_file["experts_kept_per_layer"]
    assert by_cluster["calibration"]["source"] == f"{file}:2"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{file}", "say which cluster chooses experts"),
        ("{file}:9", "has no cluster 9"),
        ("{file}:-1", "no such calibration data"),
        ("{file}x:1", "no such calibration data"),
        ("nowhere.parquet:1", "nowhere.parquet: no such file"),
        ("{held_out}:0", "clusters of valid documents choose no experts"),
        ("{moved}:0", "the data set that was clustered is not there"),
    ],
)
def test_a_cluster_that_chooses_nothing_is_one_line(
    source, said, file, run, tiny_data, tmp_path, capsys
):
    columns, origin = columns_of(tiny_data, "valid"), origin_of(tiny_data, "valid")
    held_out = write_columns(tmp_path / "v.parquet", DOCUMENT_COLUMNS, columns, origin)
    elsewhere = shutil.copytree(tiny_data, tmp_path / "elsewhere")
    origin = origin_of(elsewhere)
    moved = write_columns(tmp_path / "m.parquet", DOCUMENT_COLUMNS, columns_of(elsewhere), origin)
    shutil.rmtree(elsewhere)
    source = source.format(file=file, held_out=held_out, moved=moved)
    out = tmp_path / "it.json"
    command = ["select", str(run), "--calibration", source, "--keep", "4", "--out", str(out)]
    assert main(command) == 2 and not out.exists()
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
