"""Data sets and runs that several test files share."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = Path(__file__).resolve().parent / "gpu"
WORDS = {
    "kitchen": [
        "bread",
        "salt",
        "oven",
        "butter",
        "knead",
        "rise",
        "flour",
        "crust",
        "bake",
        "slice",
        "warm",
        "yeast",
    ],
    "harbour": [
        "anchor",
        "tide",
        "sail",
        "rope",
        "storm",
        "deck",
        "mast",
        "gull",
        "wave",
        "hull",
        "drift",
        "chart",
    ],
    "garden": [
        "seed",
        "soil",
        "rain",
        "root",
        "leaf",
        "prune",
        "bloom",
        "hedge",
        "moss",
        "vine",
        "shade",
        "bee",
    ],
}


# No test depends on a clock.
hypothesis.settings.register_profile("emotrain", deadline=None)
hypothesis.settings.load_profile("emotrain")

# Forked ranks must not collect the garbage of the process that forked them: a process group in it
# would wait for threads that did not come along, and the rank would hang for ever.
os.register_at_fork(after_in_child=gc.freeze)

# Modules of torch, of the project and of its tests are some 700,000 objects, which the collector of
# garbage would go through again and again: half of the time of the collection of tests, and a
# seventh of theirs. Nobody collects before all are imported, and nobody looks at those that stay.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _what_stays_is_not_looked_through() -> None:
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """Tests of tests/gpu run by themselves, on a GPU with compiled kernels; all others on a CPU
    with interpreted ones, also where there is a GPU, and so do the processes that they start."""
    paths = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    if all(path.is_relative_to(GPU_TESTS) for path in paths):
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Autograd starts its threads at the first backward. If that were one on fake tensors, a build
    # for CUDA would start one for a GPU, and ranks that fork later could not use autograd.
    torch.ones(1, requires_grad=True).backward()
    if importlib.util.find_spec("triton") is not None:
        # Before a test imports Triton, by way of DeepSpeed for one.
        import triton_interpreter  # noqa: F401


def write_documents(path: Path, documents_per_domain: int = 40, seed: int = 0) -> Path:
    """A JSONL file of documents that use the words of their own domain; every fifth is held out."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents_per_domain):
            for domain, words in WORDS.items():
                text = " ".join(rng.choice(words) for _ in range(rng.randint(10, 60)))
                split = "valid" if number % 5 == 4 else "train"
                file.write(
                    json.dumps(
                        {"text": text, "domain": domain, "source": "made up", "split": split}
                    )
                    + "\n"
                )
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of three domains, some 4,000 training tokens."""
    from emotrain.preparation.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    prepare(
        [write_documents(folder / "documents.jsonl")],
        folder / "tiny",
        train_tokenizer=True,
        vocab_size=300,
        workers=1,
    )
    return folder / "tiny"


def tiny_settings(data: Path, run_dir: Path, **training) -> dict:
    """Settings of a run that takes well under a second."""
    return {
        "model": {
            "vocab_size": 320,
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "experts": {"routed": 7, "shared": 1, "top_k": 2, "hidden": 8},
            "router": {"pool": {"min": 2, "max": 7}},
        },
        "data": {"path": str(data), "sequence_length": 32},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "training": {
            "run_dir": str(run_dir),
            "steps": 6,
            "global_batch": 4,
            "micro_batch": 4,
            "log_every": 1,
            "checkpoint_every": 0,
            "tensorboard": False,
            **training,
        },
    }


def run_command(*command: str, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    """Run a project's script or `-m module` with this Python, from the repository's root."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
