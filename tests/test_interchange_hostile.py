"""Proves that an import survives any folder: bytes and JSON of its files are changed at random, and
it ends with a checkpoint that is whole or with one line; nothing else on the disk changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_huggingface import CONFIG, published_tensors, shard, write
from test_interchange import snapshot

from emotrain.errors import UserError
from emotrain.interop.import_folder import import_folder
from emotrain.training.checkpoint import load_model

FILES = (
    "config.json",
    "model.safetensors.index.json",
    "model-1-of-2.safetensors",
    "model-2-of-2.safetensors",
    "tokenizer.json",
    "generation_config.json",
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**20, 2**31, 2**63, 2**70, -(2**63), 10**400]),
    st.floats(),
    st.sampled_from(["", "clean", "published", "softmax", "F64", "I64", "F8_E4M3", "..", "/etc"]),
    st.sampled_from(["../outside.safetensors", "model-1-of-2.safetensors", "a\n\0b", "\ud800"]),
    st.text(max_size=4),
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)
)


def places(value: Any) -> list[Callable[[Any], None]]:
    """Setters of everything in a JSON value."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = []
    for key, item in items:
        found.append(lambda new, key=key: value.__setitem__(key, new))
        if isinstance(item, (dict, list)):
            found += places(item)
    return found


@st.composite
def mutations(
    draw: st.DrawFn, files: tuple[str, ...] = FILES
) -> tuple[str, Callable[[bytes], bytes]]:
    """A file and what happens to it."""
    name = draw(st.sampled_from(files))
    kind = draw(st.sampled_from(["bytes", "cut", "insert", "json", "drop"]))
    at, new = draw(st.integers(0, 1 << 20)), draw(values)
    piece = draw(st.binary(min_size=1, max_size=9))

    def change(content: bytes) -> bytes:
        where = at % (len(content) + 1)
        if kind == "cut":
            return content[:where]
        if kind == "insert":
            return content[:where] + piece + content[where:]
        if kind == "bytes":
            # Mostly in the header, where a byte means more.
            where = where if at % 4 == 0 else where % 600
            return content[:where] + piece + content[where + len(piece) :]
        is_tensors = name.endswith(".safetensors")
        length = int.from_bytes(content[:8], "little") if is_tensors else 0
        text = content[8 : 8 + length] if is_tensors else content
        tree = json.loads(text)
        if kind == "drop":
            key = sorted(tree)[at % len(tree)]
            tree[f"{key}{new}" if at % 2 else "other"] = tree.pop(key)
        else:
            setters = places(tree)
            setters[at % len(setters)](new)
        encoded = json.dumps(tree).encode()
        if not is_tensors:
            return encoded
        return len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]

    return name, change


@pytest.fixture(scope="module")
def good(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything, in two shards."""
    sizes = {"vocab_size": 320, "hidden_size": 8, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("hostile") / "folder"
    write(
        folder, published_tensors({**CONFIG, **sizes}), **sizes,
        eos_token_id=0, max_position_embeddings=32,
        num_experts_per_layer=[6, 6], num_shared_experts_per_layer=[1, 1],
    )  # fmt: skip
    shard(folder)
    shutil.copy(tiny_data / "tokenizer.json", folder)
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    (folder.parent / "outside.safetensors").write_bytes((folder / FILES[2]).read_bytes())
    return folder


def try_import(good: Path, changes: list[tuple[str, Callable[[bytes], bytes]]]) -> bool:
    """Whether the changed folder was imported."""
    folder, out = good.parent / "changed", good.parent / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    for name, change in changes:
        content = (folder / name).read_bytes()
        try:
            (folder / name).write_bytes(change(content))
        except (ValueError, AttributeError, TypeError):
            continue  # what an earlier change left is no JSON any more
    before = snapshot(good.parent)
    try:
        import_folder(folder, out)
    except UserError as error:
        assert str(error)
        assert snapshot(good.parent) == before
        return False
    load_model(out)
    shutil.rmtree(out)
    assert snapshot(good.parent) == before
    return True


def test_the_unchanged_folder_is_imported(good: Path) -> None:
    assert try_import(good, [])


QUIET = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=60, derandomize=True, **QUIET)
@given(changes=st.lists(mutations(), min_size=1, max_size=2))
def test_a_changed_folder_is_imported_whole_or_refused_in_one_line(
    good: Path, changes: list[Any]
) -> None:
    try_import(good, changes)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(max_examples=2500, **QUIET)
@given(changes=st.lists(mutations(), min_size=1, max_size=3))
def test_thousands_of_changed_folders_are_imported_whole_or_refused_in_one_line(
    good: Path, changes: list[Any]
) -> None:
    try_import(good, changes)
