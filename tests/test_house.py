"""Proves the laws of the house that are about files: what may import what, and how far it is
from the disk to the loss."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import threading
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import tiny_config, tiny_model

import emotrain
from emotrain.data.opening import open_loader
from emotrain.distributed.ranks import Ranks
from emotrain.preparation.prepare import prepare
from emotrain.training.engine import NativeEngine
from emotrain.training.optimizer import build_optimizer
from emotrain.training.step import train_step

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("emotrain", "kernels", "launch") for path in (ROOT / folder).rglob("*.py")
)
PUBLISHED = sorted((ROOT / "emotrain/interop/modeling").glob("*_emotrain.py"))
"""Code that folders carry which are exported: it runs without emotrain."""


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, at its top or inside functions; `from a import
    b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if path in PUBLISHED and node.level == 1:  # of a file beside it, wherever that lies
                continue
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def links(text: str) -> list[str]:
    return [target.rstrip("/") for target in re.findall(r"\]\(\.\./([^)]+)\)", text)]


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
    kernels are such a use, and the classes that vLLM loads."""
    optional = {
        "matplotlib",
        "tensorboard",
        "transformers",
        "triton",
        "deepspeed",
        "vllm",
        "sklearn",
        "umap",
        "playwright",
        "scipy",
        "prometheus_client",
        "jinja2",
        "trackio",
        "wandb",
        "lm_eval",
        "fsspec",
        "s3fs",
        "gcsfs",
        "aiohttp",
        "rensa",
        "py3langid",
    }
    for path in sorted(set(SOURCES) - set(PUBLISHED)):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
        if path.name.startswith(("triton_", "vllm_")):
            continue
        assert not {name.split(".")[0] for name in top} & optional, path
        assert not [name for name in top if ".triton_" in name or ".vllm_" in name], (
            f"{path}: import Triton kernels and classes for vLLM where they are used"
        )


def test_published_code_stands_alone() -> None:
    """It imports torch, transformers and the files beside it, and nothing of ours imports it."""
    assert len(PUBLISHED) == 3
    for path in PUBLISHED:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# Copyright") and "Apache License, Version 2.0" in text, path
        assert {name.split(".")[0] for name in imported(path)} <= {"torch", "transformers"}, path
        beside = {
            f"{node.module}.py"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom) and node.level
        }
        assert beside <= {other.name for other in PUBLISHED}, path
    for path in SOURCES:
        assert not [name for name in imported(path) if name.startswith("emotrain.interop.modeling")]


# ---- the walk


def entered_by_a_step(folder: Path) -> set[str]:
    """Files of the project whose code runs in one step of the loader and one of training."""
    path = folder / "documents.jsonl"
    path.write_text("".join(f'{{"text": "document {i} of a tiny corpus"}}\n' for i in range(200)))
    prepare([path], folder / "data", train_tokenizer=True, vocab_size=300)
    loader = open_loader(folder / "data", 16, seed=0)
    config = tiny_config(model__vocab_size=512)
    model = tiny_model(model__vocab_size=512)
    engine = NativeEngine(model, build_optimizer(model, config.optimizer))
    known = {str(source): source for source in SOURCES}
    # Kernels are also found where they install.
    known |= {
        str(ROOT / "emotrain" / source.relative_to(ROOT)): source
        for source in SOURCES
        if source.is_relative_to(ROOT / "kernels")
    }
    entered: set[str] = set()

    def note(frame, event, _argument) -> None:
        source = known.get(frame.f_code.co_filename)
        # What generators, comprehensions and lambdas run is their function's.
        if event == "call" and source is not None and not frame.f_code.co_name.startswith("<"):
            entered.add(source.resolve().relative_to(ROOT).as_posix())

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        batches = loader.step(0, config.training.global_batch, config.training.micro_batch)
        train_step(engine, batches, config, 1, Ranks())
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return entered


def test_disk_to_loss_is_short_and_the_page_says_it_all(tmp_path: Path) -> None:
    entered = entered_by_a_step(tmp_path)
    lines = sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in entered)
    assert len(entered) <= 16 and lines <= 3000, f"{len(entered)} files, {lines} lines: {entered}"
    page = (ROOT / "docs/walk.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert {file for file in links(page) if file.endswith(".py")} == entered


# ---- sizes and order


def test_functions_and_files_are_of_a_size_that_a_person_can_hold() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path}: {node.name} has {length} lines"


def module_of(path: Path) -> str:
    """Name that a file is imported by: kernels/ installs as emotrain.kernels."""
    parts = path.resolve().relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "emotrain" else ("emotrain", *parts))
    return name.removesuffix(".__init__")


def test_no_two_files_import_each_other() -> None:
    """Nor any circle, also by imports inside of functions; those for types alone do not count."""
    modules = {module_of(path): path for path in SOURCES if path.parts[-2] != "launch"}

    def runtime_imports(path: Path) -> set[str]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                node.body = []
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                found |= inner or {node.module} & modules.keys()
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names} & modules.keys()
        return found

    graph = {name: runtime_imports(path) - {name} for name, path in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


ROOMS = (
    "kernels",
    "data",
    "model",
    "distributed",
    "modular",
    "training",
    "interop",
    "evaluation",
    "subsets",
    "analysis",
    "report",
    "explorer",
    "generation",
    "tasks",
    "serving",
    "sweeps",
    "planning",
    "commands",
)
"""Rooms from the ground up: a file imports from its own room and those before it."""


def test_no_room_imports_from_one_above_it() -> None:
    below = {"kernels": set(), "data": set(), "model": {"kernels"}}
    for path in SOURCES:
        parts = path.resolve().relative_to(ROOT).parts
        room = parts[0] if parts[0] == "kernels" else parts[1] if len(parts) > 2 else None
        if room not in ROOMS:
            continue
        allowed = below.get(room, set(ROOMS[: ROOMS.index(room)])) | {room}
        used = {
            name.split(".")[1] for name in imported(path) if name.startswith("emotrain.")
        } & set(ROOMS)
        assert used <= allowed, f"{path}: imports from {used - allowed}"


def test_only_data_and_batches_know_the_end_of_a_document() -> None:
    """`PackedBatch` is the one truth about documents."""
    for path in SOURCES:
        if path.parent.name not in ("model", "training", "kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "id", getattr(node, "arg", None)))
            assert not (isinstance(name, str) and "eos" in name.split("_")), f"{path}: {name}"


def test_argparse_stays_at_the_door() -> None:
    for path in SOURCES:
        if "argparse" in imported(path):
            where = path.resolve().relative_to(ROOT).as_posix()
            assert where.startswith("emotrain/commands/") or where == "emotrain/cli.py", where


def test_every_letter_of_a_shape_is_in_the_legend() -> None:
    assert emotrain.__doc__
    legend = set(re.findall(r"(?:^ {4}| {2}|, )([A-Z])  (?=\S)", emotrain.__doc__, re.MULTILINE))
    assert {"B", "G", "W", "Y"} <= legend
    suffix = re.compile(r"_?[a-z][a-z0-9_]*_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)")
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in (getattr(node, field, None) for field in ("id", "attr", "arg")):
                if isinstance(name, str) and (found := suffix.fullmatch(name)):
                    letters = set(re.sub("[0-9]", "", found[1]).upper())
                    assert letters <= legend, f"{path}: {name} has {letters - legend}"
