"""How the threads of a CPU wait for each other.

OpenMP splits an operation into one part a thread; a thread that is done spins until the last one
is. By default libgomp spins for milliseconds before it sleeps. On an idle machine this is right.
Beside another busy process a spinning thread takes the time that the thread it waits for needs,
and the system's scheduler sees no core to move it to. A thread that sleeps at once has the opposite
fault: an idle machine then pays for a wake-up at each operation. Between the two lies a spin that
is longer than the gap between two operations and shorter than a time slice of the scheduler.
`benchmarks/contention.py` measures both ends.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = 5000  # times round libgomp's loop, about 0.1 ms; its default is 300,000
CHOSEN_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def share_the_cores(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let threads spin only shortly. libgomp reads this once, when torch is first imported: call it
    before. Whoever has set one of CHOSEN_BY_USER is obeyed."""
    if not any(name in environ for name in CHOSEN_BY_USER):
        environ["GOMP_SPINCOUNT"] = str(SPINS)
