"""What lies in the folder of a run, as the page reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.config import Config, load_config
from emotrain.errors import MissingFileError, UserError
from emotrain.evaluation.figures import MOST_LINES
from emotrain.evaluation.results import Evaluation, read_evaluation
from emotrain.report.history import History, Loads, read_history, read_loads
from emotrain.tables import short_names
from emotrain.training import environment, expert_loads
from emotrain.training.engine import Phase


@dataclass(frozen=True)
class Run:
    """A run's folder. What is not there yet, or was not written by an older version, is empty or
    None."""

    folder: Path
    label: str
    """What the page calls it: the end of its path that no other run of the page has."""
    config: Config
    history: History
    loads: Loads | None
    evaluation: Evaluation | None
    starts: list[dict[str, Any]]
    """The entries of environment.json."""
    phases: list[tuple[str, float, float]]
    """Parts of a step by the profile: name, milliseconds, of them in collectives."""

    @property
    def moe_layers(self) -> list[int]:
        """Layers with routed experts, counted from 0: what the lists of metrics have entries of."""
        model = self.config.model
        return [i for i in range(model.num_layers) if model.routed_in_layer(i)]

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Tokens seen at each of these steps, as the run counted them."""
        if (known := self.history.series.get("tokens")) is not None:
            tokens = known.values[:, 0]
            if (finite := np.isfinite(tokens)).any():
                return np.interp(steps, known.steps[finite], tokens[finite])
        return steps * float(self.config.tokens_per_step)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders.

    Raises:
        FileNotFoundError: not a run folder. UserError: a folder twice, more runs than lines can be
            told apart, or a file of a run that is not readable.
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for path, whole in zip(paths, resolved, strict=True):
        if resolved.count(whole) > 1:
            raise UserError(f"{path}: is named twice; name each run once")
    if len(paths) > MOST_LINES:
        raise UserError(f"{len(paths)} runs: a page tells at most {MOST_LINES} apart; name fewer")
    return [
        _read_run(path, label) for path, label in zip(paths, short_names(resolved), strict=True)
    ]


def _read_run(folder: Path, label: str) -> Run:
    if not (folder / "config.yaml").is_file():
        raise MissingFileError(
            f"{folder}: no config.yaml here; give the training.run_dir of a training run"
        )
    evaluated = folder / "evaluation" / "evaluation.json"
    return Run(
        folder,
        label,
        load_config(folder / "config.yaml"),
        read_history(folder / "metrics.jsonl"),
        read_loads(folder / expert_loads.FILE),
        read_evaluation(evaluated) if evaluated.is_file() else None,
        environment.read_starts(folder),
        _read_phases(folder / "profile" / "summary.json"),
    )


def _read_phases(path: Path) -> list[tuple[str, float, float]]:
    """The parts of rank 0's step, in order; none without a profile that can be read."""
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["ranks"][0]["parts"]
        phases = [
            (str(name), 1e3 * float(part["seconds"]), 1e3 * float(part["collective_seconds"]))
            for name, part in sorted(parts.items(), key=lambda item: item[0] == Phase.OTHER)
        ]
        return phases if np.isfinite([phase[1:] for phase in phases]).all() else []
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return []
