"""Proves that a wheel is whole: every package folder is in it, with the files it reads."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "setuptools"
]


def test_every_package_folder_is_in_the_wheel() -> None:
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "emotrain").rglob("__init__.py")
    }
    folders.add("emotrain.kernels")  # a link to kernels/
    assert set(SETUPTOOLS["packages"]) == folders
    assert SETUPTOOLS["package-dir"]["emotrain.kernels"] == "kernels"


def test_every_folder_with_python_in_it_is_a_package() -> None:
    for path in (ROOT / "emotrain").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), path


def test_files_that_are_no_python_are_in_the_wheel() -> None:
    folders = {"emotrain": ROOT / "emotrain", "emotrain.kernels": ROOT / "kernels"}
    listed = {
        path.resolve()
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (folders.get(package) or ROOT.joinpath(*package.split("."))).glob(pattern)
    }
    for folder in folders.values():
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert path.resolve() in listed, f"{path} is not in package-data"
