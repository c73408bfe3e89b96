"""Proves that a staged folder takes its name at once: whatever fails on the way, the name leads to
all of the old folder or to all of the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emotrain import folders
from emotrain.folders import StagedFolder, exchange, read_manifest


def staged(target: Path, text: str) -> StagedFolder:
    folder = StagedFolder(target)
    folder.make()
    (folder.path / "part").mkdir()
    (folder.path / "part" / "file").write_text(text)
    return folder


def content(target: Path) -> str:
    return (target / "part" / "file").read_text()


def test_a_published_folder_is_all_that_is_left(tmp_path: Path) -> None:
    for text in ("old", "new"):
        staged(tmp_path / "target", text).publish()
        assert content(tmp_path / "target") == text and os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("place", ["flush_to_disk", "exchange", "remove", "os.rename"])
def test_the_name_never_leads_to_half_a_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    staged(target, "old").publish()
    folder = staged(target, "new")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"emotrain.folders.{place}", die)
    with pytest.raises(KeyboardInterrupt):
        folder.publish()
    assert content(target) == ("new" if place in ("remove", "os.rename") else "old")


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_link_or_a_file_in_the_place_is_replaced_and_not_followed(
    kind: str, tmp_path: Path
) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    staged(elsewhere, "mine").publish()
    target.symlink_to(elsewhere) if kind == "link" else target.write_text("x")
    staged(target, "new").publish()
    assert content(target) == "new" and content(elsewhere) == "mine" and not target.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "target"]


@pytest.mark.parametrize("swaps", [True, False])
def test_exchange_swaps_names_on_any_file_system(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: object())
    for name in ("one", "other"):
        staged(tmp_path / name, name).publish()
    exchange(tmp_path / "one", tmp_path / "other")
    assert content(tmp_path / "one") == "other" and content(tmp_path / "other") == "one"
    assert sorted(os.listdir(tmp_path)) == ["one", "other"]


def test_every_file_is_flushed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(folders, "flush_to_disk", lambda path: flushed.append(path.name))
    folder = StagedFolder(tmp_path / "target")
    folder.make()
    (folder.path / "file").write_text("x")
    folder.commit(1, {})
    names = [name for name in flushed if not name.startswith(".")]
    assert sorted(names) == sorted(["file", "manifest.json", tmp_path.name])
    assert read_manifest(tmp_path / "target", (1,), ("file",))["file"].bytes == 1
