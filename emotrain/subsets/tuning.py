"""A checkpoint and data in, the configuration of a run that tunes it: `emotrain finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.config import Config, read_settings, with_settings
from emotrain.data.answers import is_answers
from emotrain.data.files import find_files
from emotrain.data.manifest import MANIFEST
from emotrain.data.mixture_file import first_path, is_mixture
from emotrain.errors import MissingFileError, UserError
from emotrain.evaluation.reading import check_vocabulary, tokenizer_file
from emotrain.modular.artefact import read_subset
from emotrain.preparation.prepare import prepare
from emotrain.progress import ProgressBar
from emotrain.subsets.selection import require_same_model, tokenizer_fingerprint
from emotrain.training.checkpoint_folders import find, read_config
from emotrain.training.data_source import build_loader
from emotrain.training.rows import is_file, trained_experts

RECIPE: dict[str, Any] = {
    "losses": {"balance": 0.01, "router_z": 0.0, "z": 0.0},
    "optimizer": {
        "lr": 5e-5,
        "beta2": 0.999,
        "weight_decay": 0.0,
        "schedule": "linear",
        "warmup_share": 0.1,
        "final_ratio": 0.0,
    },
    "training": {"global_batch": 32, "micro_batch": 8, "checkpoint_every": 0},
}
"""The published recipe (spec 7.5), as configs/finetune.yaml has it."""


@dataclass(frozen=True)
class TuneSettings:
    """What to tune, on what."""

    data: str
    """A folder of `emotrain prepare`, a JSONL file of prompts and answers, or documents."""
    domain: str = ""
    train: str = ""
    """As `finetune.train`; empty: `routed` with `experts`, and `router` too where these are
    exclusive to a domain, else all."""
    experts: str = ""
    """As `finetune.experts`."""
    teacher: str = ""
    """A checkpoint."""
    teacher_weight: float = 1.0
    temperature: float = 1.0
    steps: int = 0
    """Optimizer steps; 0 means `epochs`."""
    epochs: float = 1.0
    recipe: str = ""
    """A YAML file of settings in place of `RECIPE`."""


def tuning_config(
    checkpoint: str | Path,
    run_dir: str | Path,
    settings: TuneSettings,
    overrides: Sequence[str],
    prepares: bool = True,
) -> Config:
    """The whole configuration of a run in `run_dir` that begins with a checkpoint's weights.

    Documents that are not prepared yet are prepared into `run_dir`/data.

    Args:
        overrides: `key=value` settings over all others.
        prepares: whether it may; one of several processes may not.
    Raises:
        UserError: a checkpoint, data, a teacher or a setting that cannot be used.
    """
    if settings.epochs <= 0 or settings.steps < 0:
        raise UserError(
            f"epochs={settings.epochs}, steps={settings.steps}: give a positive number of epochs, "
            f"or of steps"
        )
    folder = find(checkpoint)
    origin = read_config(folder)
    _check_others(settings, folder, origin)
    data, tokenizer = _data(settings.data, Path(run_dir), folder, origin, prepares)
    chosen: dict[str, Any] = {
        "training": {"run_dir": str(run_dir), "steps": max(settings.steps, 1)},
        "data": {"path": str(data), "domain": settings.domain, "tokenizer": tokenizer},
        "finetune": {
            "start": str(folder),
            "train": settings.train or _trained(settings.experts),
            "experts": settings.experts,
            "teacher": settings.teacher,
            "teacher_weight": settings.teacher_weight,
            "temperature": settings.temperature,
        },
    }
    base = with_settings(Config(model=origin.model), _of_data(origin))
    recipe = read_settings(settings.recipe) if settings.recipe else RECIPE
    tuned = with_settings(with_settings(base, recipe), chosen, overrides)
    if tuned.finetune.experts:
        trained_experts(tuned.finetune.experts, tuned.model)  # refused before a folder is made
    if settings.steps:
        return tuned
    sequences = settings.epochs * build_loader(tuned).num_sequences
    steps = max(1, -int(-sequences // tuned.training.global_batch))
    return with_settings(tuned, {"training": {"steps": steps}}, overrides)


def _trained(experts: str) -> str:
    """What is trained where nothing is said. New experts need their rows of the router: no token
    comes to them by those that they began with."""
    if experts.startswith("exclusive:"):
        return "routed,router"
    return "routed" if experts else "all"


def _of_data(origin: Config) -> dict[str, Any]:
    """How the model has read documents so far."""
    data = origin.data
    return {
        "data": {
            "sequence_length": data.sequence_length,
            "cross_document_targets": data.cross_document_targets,
        }
    }


def _check_others(settings: TuneSettings, folder: Path, origin: Config) -> None:
    """Refuse a subset of another model, and a teacher of other tokens."""
    if settings.experts and is_file(settings.experts):
        require_same_model(read_subset(settings.experts), folder, origin)
    if settings.teacher:
        teacher = find(settings.teacher)
        if tokenizer_fingerprint(teacher) != tokenizer_fingerprint(folder):
            raise UserError(
                f"{teacher}: has another tokenizer than {folder}, so that it predicts other "
                f"tokens; give a teacher with the same one"
            )


def _data(
    data: str, run_dir: Path, folder: Path, origin: Config, prepares: bool
) -> tuple[Path, str]:
    """Where the run reads its data, and the tokenizer that they need to be read with."""
    path = Path(data)
    if not path.exists():
        raise MissingFileError(
            f"{data}: no such data; give a folder of emotrain prepare, or a JSONL file of "
            f"documents or of prompts and answers"
        )
    mixed = is_mixture(path)
    store = Path(first_path(path)) if mixed else path
    if (store / MANIFEST).is_file():
        from emotrain.data.formats import Dataset

        dataset = Dataset(store, verify_checksums=False)
        check_vocabulary(store, dataset.vocab_size, origin, folder)
        return path, str(tokenizer_file(folder)) if mixed else ""
    tokenizer = tokenizer_file(folder)
    if is_answers(path) or mixed:
        return path, str(tokenizer)
    prepared = run_dir / "data"
    if not (prepared / MANIFEST).is_file():
        if not prepares:
            raise UserError(
                f"{data}: documents are prepared by one process; give the command with "
                f"--only-config first, without a launcher, or give a folder of emotrain prepare"
            )
        find_files([path], prepared)  # says what is wrong with the input before a folder is made
        made = not run_dir.exists()
        try:
            with ProgressBar("documents") as bar:
                prepare([path], prepared, tokenizer=tokenizer, valid_fraction=0.0, bar=bar)
        except UserError:
            if made and run_dir.is_dir() and not any(run_dir.iterdir()):
                run_dir.rmdir()
            raise
    return prepared, ""
