"""Proves that the pictures of the README are what docs/pictures.py draws, and that the house it
draws is the one whose law tests/test_house.py holds."""

from __future__ import annotations

import importlib.util
from xml.etree import ElementTree

import pytest
import test_house

from tests.conftest import ROOT

SCRIPT = ROOT / "docs/pictures.py"
SPEC = importlib.util.spec_from_file_location("pictures", SCRIPT)
assert SPEC is not None and SPEC.loader is not None
pictures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pictures)
DRAWN = pictures.pictures()


@pytest.mark.parametrize("name", DRAWN)
def test_the_files_are_what_the_script_draws(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == DRAWN[name], "run: python docs/pictures.py"


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_whole_in_itself(name: str) -> None:
    """Well-formed, with a title, and nothing that a page would have to fetch."""
    root = ElementTree.fromstring(DRAWN[name])
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert "href" not in DRAWN[name] and "url(http" not in DRAWN[name]


def test_the_readme_shows_every_picture() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in DRAWN:
        assert f"](docs/{name})" in readme, name


def test_the_house_is_drawn_as_its_law_is() -> None:
    """The same rooms in the same order; and what a room imports in the sources, it may."""
    rooms = [name for name, _ in pictures.ROOMS]
    assert rooms == list(test_house.ROOMS)
    for path in test_house.SOURCES:
        parts = path.resolve().relative_to(ROOT).parts
        room = parts[0] if parts[0] == "kernels" else parts[1] if len(parts) > 2 else ""
        if room in rooms:
            used = {
                name.split(".")[1]
                for name in test_house.imported(path)
                if name.startswith("emotrain.")
            } & set(rooms)
            assert used <= pictures.may_import(room) | {room}, path
        if room in ("model", "kernels"):
            ground = set(pictures.GROUND_OF_MOST.split(" · "))
            assert not {f"emotrain.{name}" for name in ground} & test_house.imported(path), path


def test_the_layer_is_drawn_as_the_method_is() -> None:
    """Every token's choices lie inside of its document's pool; the two pools differ."""
    pools = []
    for index, (_, tokens, size, _) in enumerate(pictures.DOCUMENTS):
        rows = pictures.probabilities(index)
        assert len(rows) == len(tokens)
        scores = [sum(column) for column in zip(*rows, strict=True)]
        pool = pictures.best(scores, size, range(pictures.EXPERTS))
        assert len(pool) == size
        for row in rows:
            chosen = pictures.best(row, pictures.CHOSEN, pool)
            assert set(chosen) <= set(pool) and len(chosen) == pictures.CHOSEN
        pools.append(set(pool))
    assert not pools[0] & pools[1]
