"""Proves that `emotrain train` runs end to end on every format, stops and goes on, and that a
checkpoint has the tokenizer where somebody knows it. (`test_stores_plain.py` trains by default.)"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_stores_columns import write_ids
from test_stores_mds import simple
from test_stores_megatron import write as write_megatron
from test_stores_plain import write

from emotrain.cli import main
from emotrain.config import config_from_dict, save_config
from emotrain.data.formats import Dataset
from tests.conftest import tiny_settings, write_documents


def plain(folder, documents):
    return write(folder / "a.npy", np.concatenate(documents))


def mixed(folder, documents):
    write(folder / "a.npy", np.concatenate(documents[::2]))
    write(folder / "b.npy", np.concatenate(documents[1::2]))
    (folder / "mix.txt").write_text("wiki,a.npy\ncode,b.npy\n")
    return folder / "mix.txt"


def megatron(folder, documents):
    return write_megatron(folder / "a", [[ids.tolist()] for ids in documents])


def mds(folder, documents):
    return simple(folder / "in", [ids.astype("i4") for ids in documents])


def parquet(folder, documents):
    ids = [ids.tolist() for ids in documents]
    write_ids(folder / "a.parquet", ids, pa.list_(pa.int32()), rows=10)
    return f"{folder}/*.parquet"


def arrow(folder, documents):
    return write_ids(folder / "a.arrow", [ids.tolist() for ids in documents], pa.list_(pa.int32()))


def jsonl(folder, documents):
    return write_ids(folder / "a.jsonl", [ids.tolist() for ids in documents])


def text(folder, _):
    return write_documents(folder / "a.jsonl")


def text_parquet(folder, _):
    lines = write_documents(folder / "a.jsonl").read_text().splitlines()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), folder / "b.parquet")
    return folder / "b.parquet"


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    [plain, mixed, megatron, mds, parquet, arrow, jsonl, text, text_parquet],
    ids=lambda make: make.__name__,
)
def test_training_on_every_format(make, tmp_path, tiny_data, capsys):
    documents = [ids for _, ids, _ in Dataset(tiny_data).documents("train")]
    (tmp_path / "in").mkdir()
    chosen = tiny_settings(make(tmp_path / "in", documents), tmp_path / "run", steps=4)
    chosen["data"]["tokenizer"] = str(tiny_data / "tokenizer.json")
    chosen["training"]["checkpoint_every"] = 2
    save_config(config_from_dict(chosen), tmp_path / "run.yaml")
    losses = []
    for steps in (2, 4):
        words = ["train", str(tmp_path / "run.yaml"), f"training.steps={steps}", "--json"]
        assert main(words) == 0
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["loss"])
    assert all(0 < loss < 7 for loss in losses)
    for saved in (tmp_path / "run/checkpoints").glob("step-*"):
        written = (saved / "tokenizer.json").read_bytes()
        assert written == (tiny_data / "tokenizer.json").read_bytes()
    assert main(["inspect", str(tmp_path / "run.yaml")]) == 0
    assert "training tokens; the run passes over them" in capsys.readouterr().out
