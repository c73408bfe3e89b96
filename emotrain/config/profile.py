"""Settings of the profile of a run."""

from __future__ import annotations

from dataclasses import dataclass

from emotrain.config.kinds import NonNegativeInt


@dataclass(frozen=True)
class ProfileConfig:
    """A profile of a few steps: a Chrome trace of each rank and a table of the step's parts, in
    RUN_DIR/profile."""

    start: NonNegativeInt = 0
    """First step profiled; 0 means no profile."""
    steps: int = 3
    """Steps profiled."""
