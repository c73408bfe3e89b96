"""RUN_DIR/expert_loads.jsonl: the load of every expert over the steps of a run.

    {"step": 20, "slots": [[812, 64, ...], ...]}

`slots` has a list for each layer with routed experts: how many slots each expert got, by number, in
the whole global batch of that step. At most `MOST_RECORDS` steps are kept, so that the file stays
small however long the run is: once it would hold more, every second record goes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from emotrain.files import write_whole

log = logging.getLogger("emotrain")

FILE = "expert_loads.jsonl"
MOST_RECORDS = 512


def stride(step: int, log_every: int) -> int:
    """Steps between the records that are kept when a run is at `step`: `log_every`, doubled until
    at most `MOST_RECORDS` of them fit. It depends on nothing else, so that a run which goes on
    keeps the same steps as one that was never stopped."""
    steps = log_every
    while step > MOST_RECORDS * steps:
        steps *= 2
    return steps


class ExpertLoads:
    """Writes the file. A run that goes on removes what lies after its checkpoint."""

    def __init__(self, run_dir: Path, start_step: int, log_every: int):
        self.path, self.log_every = run_dir / FILE, log_every
        self._every = stride(start_step, log_every)
        self._file: TextIO | None = None
        if self.path.is_file():
            self._keep(start_step)

    def write(self, step: int, slots: Sequence[Sequence[int]]) -> None:
        """Add the record of a step, if it is one of those that are kept.

        Raises:
            OSError: it cannot be written.
        """
        if not slots:
            return
        if (every := stride(step, self.log_every)) != self._every:
            self._every = every
            self._keep(step)
        if step % self._every == 0:
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (until close)
            record = {"step": step, "slots": slots}
            self._file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
            self._file.flush()

    def _keep(self, last_step: int) -> None:
        """Leave the records up to a step that fit the present stride."""
        self.close()
        kept = [
            line
            for step, line in read_lines(self.path)
            if step <= last_step and step % self._every == 0
        ]
        write_whole(self.path, "".join(kept).encode("utf-8"))

    def close(self) -> None:
        """Raises OSError where what was written is not on the disk."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Step and text of each line of a file of records; lines that are none are left out (a run
    that is killed leaves half a line)."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record: Any = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if type(step) is int and step >= 0:
            lines.append((step, line + "\n"))
    return lines
