"""Proves that `extract`, `reinsert`, the algebra and the server's reader survive any artefact:
bytes and JSON of a subset's file, of an extracted folder and of a tuned one are changed at random,
found by checksums or with checksums that were made to fit. It ends with a checkpoint that is whole
or with one line; nothing else on the disk changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_interchange import snapshot
from test_interchange_hostile import mutations

from emotrain.config import config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.files import sha256_of
from emotrain.folders import MANIFEST, FileEntry
from emotrain.generation.loading import load_subset
from emotrain.modular.algebra import combine, overlap, read_operands
from emotrain.subsets.extraction import extract
from emotrain.subsets.reinsertion import reinsert
from emotrain.subsets.selection import SelectSettings, select
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from emotrain.training.checkpoint_folders import read_config
from tests.conftest import tiny_settings

Change = tuple[str, Callable[[bytes], bytes]]
QUIET: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
SUBSET = ("it.json",)


@pytest.fixture(scope="module")
def good(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model (`full`), a subset of it, the extracted model, and one that was tuned from it."""
    folder = tmp_path_factory.mktemp("hostile")
    made = tiny_settings(tiny_data, folder / "run", steps=1)
    run_module.train(config_from_dict(made), Ranks())
    shutil.copytree(find(folder / "run"), folder / "full")
    shutil.rmtree(folder / "run")
    chosen = SelectSettings(keep="3,4", domain="kitchen", documents=4)
    select(folder / "full", tiny_data, chosen).save(folder / "it.json")
    small = extract(folder / "full", folder / "it.json", folder / "small").path
    made = tiny_settings(tiny_data, folder / "tuned-run", steps=1)
    made["model"]["experts"] |= {"routed": 3, "routed_per_layer": [2, 3]}
    made["model"]["router"] = {"pool": {"kind": "none"}}
    made["finetune"] = {"start": str(small)}
    run_module.train(config_from_dict(made), Ranks())
    shutil.copytree(find(folder / "tuned-run"), folder / "tuned")
    shutil.rmtree(folder / "tuned-run")
    return folder


def files_of(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_file()))


def apply(place: Path, changes: list[Change], fits: bool) -> None:
    """Change files of a folder; `fits`: their checksums are made to fit."""
    for name, change in changes:
        try:
            (place / name).write_bytes(change((place / name).read_bytes()))
        except (ValueError, AttributeError, TypeError):
            continue  # what an earlier change left is no JSON any more, or it never was
        if fits and name != MANIFEST and (place / MANIFEST).is_file():
            try:
                content = json.loads((place / MANIFEST).read_text())
                entry = FileEntry((place / name).stat().st_size, sha256_of(place / name))
                content["files"][name] = vars(entry)
                (place / MANIFEST).write_text(json.dumps(content))
            except (ValueError, KeyError, TypeError):
                continue


def outcome(good: Path, do: Callable[[], Any], out: Path | None = None) -> bool:
    """Whether it was done; refused in one line otherwise, and nothing written."""
    before = snapshot(good)
    try:
        do()
    except UserError as error:
        assert str(error)
        assert snapshot(good) == before
        return False
    if out is not None:
        load_model(out)
        shutil.rmtree(out)
    assert snapshot(good) == before
    return True


def try_subset(good: Path, changes: list[Change]) -> bool:
    """Everybody who reads a subset's file reads a changed one."""
    place, out = good / "changed", good / "out"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copy(good / "it.json", place)
    apply(place, changes, fits=False)
    file, full = place / "it.json", good / "full"
    outcome(good, lambda: combine("union", read_operands([good / "it.json", file])))
    outcome(good, lambda: overlap(read_operands([file, good / "it.json"])))
    outcome(good, lambda: load_subset(file, full, read_config(full)))
    outcome(good, lambda: reinsert(full, good / "tuned", file, out=out), out)
    return outcome(good, lambda: extract(full, file, out), out)


def try_folder(good: Path, name: str, changes: list[Change], fits: bool) -> bool:
    """A changed folder is put back, and loaded."""
    place, out = good / "changed", good / "out"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good / name, place)
    apply(place, changes, fits)
    outcome(good, lambda: load_model(place))
    return outcome(good, lambda: reinsert(good / "full", place, good / "it.json", out=out), out)


CHECKPOINT = (
    "config.yaml",
    "manifest.json",
    "model-00000.safetensors",
    "state.json",
    "tensors.json",
)
"""Files of a checkpoint that a change can harm."""


def test_what_is_changed_is_what_there_is(good: Path) -> None:
    for name in ("small", "tuned"):
        assert set(CHECKPOINT) <= set(files_of(good / name))
        assert try_folder(good, name, [], fits=False)
    assert try_subset(good, [])


@settings(max_examples=30, derandomize=True, **QUIET)
@given(changes=st.lists(mutations(SUBSET), min_size=1, max_size=2))
def test_a_changed_subset_is_used_whole_or_refused(good: Path, changes: list[Change]) -> None:
    try_subset(good, changes)


@settings(max_examples=30, derandomize=True, **QUIET)
@given(
    name=st.sampled_from(["small", "tuned"]),
    changes=st.lists(mutations(CHECKPOINT), min_size=1, max_size=2),
    fits=st.booleans(),
)
def test_a_changed_checkpoint_is_put_back_whole_or_refused(
    good: Path, name: str, changes: list[Change], fits: bool
) -> None:
    try_folder(good, name, changes, fits)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=2000, **QUIET)
@given(changes=st.lists(mutations(SUBSET), min_size=1, max_size=3))
def test_thousands_of_changed_subsets(good: Path, changes: list[Change]) -> None:
    try_subset(good, changes)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=2000, **QUIET)
@given(
    name=st.sampled_from(["small", "tuned"]),
    changes=st.lists(mutations(CHECKPOINT), min_size=1, max_size=3),
    fits=st.booleans(),
)
def test_thousands_of_changed_checkpoints(
    good: Path, name: str, changes: list[Change], fits: bool
) -> None:
    try_folder(good, name, changes, fits)
