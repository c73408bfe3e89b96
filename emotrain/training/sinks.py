"""Where metrics are seen while a run goes on, beside its metrics.jsonl: TensorBoard, and trackers
with the interface of wandb (trackio, wandb). All of them get the same names.

A sink is looked at and not relied on: one that fails is said once and closed, and training goes on.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from emotrain.config import Config, config_to_dict

log = logging.getLogger("emotrain")


class Sink(Protocol):
    """Takes numbers by name, a step at a time."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """RUN_DIR/tensorboard. What it holds of steps after the checkpoint is hidden when a run goes
    on."""

    def __init__(self, run_dir: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)

    def close(self) -> None:
        self._board.close()


class Tracker:
    """A module with wandb's `init`, `log` and `finish`. The run has the name of its folder, in a
    project with the name of the folder around it, and goes on under this name."""

    def __init__(self, module: str, config: Config, run_dir: Path):
        self._module = importlib.import_module(module)
        run_dir = run_dir.resolve()
        # wandb finds a run to go on with by its id, trackio by its name.
        identity = {"id": run_dir.name} if module == "wandb" else {}
        with redirect_stdout(sys.stderr):  # stdout is the command's own
            self._module.init(
                project=run_dir.parent.name or "emotrain",
                name=run_dir.name,
                config=config_to_dict(config),
                resume="allow",
                **identity,
            )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._module.finish()


class Guarded:
    """A sink whose first failure, of whatever kind, is said and is its end."""

    def __init__(self, name: str, build: Callable[[], Sink]):
        self.name, self._sink = name, None
        self._sink = self._try(build)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if (sink := self._sink) is not None:
            self._try(lambda: sink.write(step, numbers))

    def close(self) -> None:
        if (sink := self._sink) is not None:
            self._try(sink.close)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except ModuleNotFoundError as error:
            reason = f"{error.name} is not installed; pip install {self.name}"
        except Exception as error:  # whatever a package of others raises: it is no reason to stop
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning("%s gets no metrics from here on, metrics.jsonl does (%s)", self.name, reason)
        self._sink = None
        return None


def open_sinks(config: Config, run_dir: Path, start_step: int) -> list[Sink]:
    """The sinks that `training.tensorboard` and `training.tracker` name."""
    sinks: list[Sink] = []
    if config.training.tensorboard:
        sinks.append(Guarded("tensorboard", lambda: TensorBoard(run_dir, start_step)))
    if (tracker := config.training.tracker) != "none":
        sinks.append(Guarded(tracker, lambda: Tracker(tracker, config, run_dir)))
    return sinks


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by the name that sinks show: `lr`, and of a list with
    one entry a layer `load_imbalance/layer_00`."""
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        entries = (
            {f"{key}/layer_{layer:02d}": entry for layer, entry in enumerate(value)}
            if isinstance(value, list)
            else {key: value}
        )
        numbers |= {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, (int, float)) and key != "step"
        }
    return numbers
