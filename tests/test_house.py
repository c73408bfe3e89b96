"""Proves the laws of the house that are about files: what may import what, and how far it is
from the disk to the loss."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_batch, tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("emotrain", "kernels", "launch") for path in (ROOT / folder).rglob("*.py")
)
LONGEST_WALK = 8


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, at its top or inside functions; `from a import
    b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def project_files(path: Path) -> set[str]:
    """Files of the project that a file imports, as paths from the root; the kernels count as
    one, their folder."""
    found = set()
    for name in imported(path):
        if name.startswith("emotrain.kernels"):
            found.add("kernels")
        elif (module := ROOT / (name.replace(".", "/") + ".py")).is_file():
            found.add(module.relative_to(ROOT).as_posix())
    return found


def links(text: str) -> list[str]:
    return [target.rstrip("/") for target in re.findall(r"\]\(\.\./([^)]+)\)", text)]


WALK, BELOW, AFTER = (
    links(part) for part in (ROOT / "docs/walk.md").read_text(encoding="utf-8").split("\n## ")
)


# ---- imports


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in SOURCES
        if p.is_relative_to(ROOT / "emotrain/model") or p.is_relative_to(ROOT / "kernels")
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_models_and_kernels_import_nothing_distributed(path: Path) -> None:
    """Nor the trainer or the data: parallelism is applied to a plain model from outside."""
    forbidden = re.compile(
        r"torch\.distributed|deepspeed|emotrain\.(?!batch|config|errors|kernels|model)"
    )
    assert not [name for name in imported(path) if forbidden.match(name)]


def test_importing_the_package_imports_no_torch() -> None:
    program = (
        "import sys, emotrain, emotrain.cli, emotrain.config; "
        "print(sorted({'torch', 'numpy', 'pyarrow', 'omegaconf'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_optional_packages_are_imported_where_they_are_used() -> None:
    """Only what pyproject.toml always installs may be imported at the top of a file; Triton
    kernels are such a use."""
    optional = {
        "matplotlib",
        "tensorboard",
        "transformers",
        "triton",
        "deepspeed",
        "vllm",
        "sklearn",
        "scipy",
    }
    for path in SOURCES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
        if path.name.startswith("triton_"):
            continue
        assert not {name.split(".")[0] for name in top} & optional, path
        assert not [name for name in top if ".triton_" in name], (
            f"{path}: import Triton kernels where they are used"
        )


# ---- the walk


def test_the_walk_is_short_and_every_file_is_reached_from_one_before_it() -> None:
    assert (
        len(WALK) <= LONGEST_WALK
        and WALK[0] == "launch/pretrain.py"
        and WALK[-1] == "emotrain/model/losses.py"
    )
    for position, file in enumerate(WALK[1:], start=1):
        assert any(file in project_files(ROOT / earlier) for earlier in WALK[:position]), (
            f"nothing before {file} imports it"
        )


def test_what_lies_below_the_walk_calls_nothing_of_it() -> None:
    for target in BELOW:
        assert (ROOT / target).exists(), target
        for path in [ROOT / target] if target.endswith(".py") else (ROOT / target).glob("*.py"):
            # A kernel's readable twin may be the router's own functions.
            allowed = (
                {"emotrain/batch.py", "emotrain/model/router.py"}
                if target == "kernels"
                else {"emotrain/batch.py"}
            )
            assert not project_files(path) & {*WALK} - allowed, path


def test_the_loader_reads_nothing_that_the_page_leaves_out() -> None:
    assert project_files(ROOT / "emotrain/data/loader.py") <= {*WALK, *BELOW}


def test_a_training_step_enters_no_file_that_the_page_leaves_out() -> None:
    from emotrain.distributed.ranks import Ranks
    from emotrain.training.engine import NativeEngine
    from emotrain.training.step import train_step

    entered = set()

    def note(frame, event, _argument) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path in known:
            entered.add(known[path])

    known = {
        path: "kernels"
        if path.is_relative_to(ROOT / "kernels")
        else path.relative_to(ROOT).as_posix()
        for path in SOURCES
    }
    config, model, batch = tiny_config(), tiny_model(), tiny_batch()
    sys.setprofile(note)
    try:
        train_step(NativeEngine(model), [batch, batch], config, 1, Ranks())
    finally:
        sys.setprofile(None)
    assert entered <= {*WALK, *BELOW, *AFTER}
    assert {*WALK} - entered == {"launch/pretrain.py", "emotrain/data/loader.py"}
