"""What training keeps of its rate beside another busy process, and what that costs when alone.

    python benchmarks/contention.py --data data/sample [--config configs/quickstart.yaml]
    [--steps 16] [--repeats 3] [--spins 1000 5000] [--json] [key=value ...]

Each run is `launch/pretrain.py` in a process of its own; its rate is the median of its steps but
the first quarter. Runs take turns: `before` (libgomp's own spin count, 300,000), `now` (what
emotrain sets), each alone (`quiet`) and beside one process that computes without end (`busy`).

    quiet_over_before      now, alone, over before, alone; 1 is no cost
    contended_over_quiet   now, beside the busy process, over now, alone
    contended_over_before  now over before, both beside the busy process

Ratios are of medians over rounds. With --spins, other spin counts are measured as well.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _measure import arguments, machine
from rich.console import Console
from rich.table import Table

from emotrain.threads import CHOSEN_BY_USER

ROOT = Path(__file__).resolve().parents[1]
BEFORE = 300_000  # libgomp's spin count where nothing is set


def run(settings: list[str], steps: int, threads: int, spins: int | None, busy: bool) -> float:
    """Tokens/s of one training run of `steps` steps."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = str(spins)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(sys.executable, str(ROOT / "launch/pretrain.py"), *settings),
                f"training.run_dir={folder}/run",
                f"training.steps={steps}",
                "training.log_every=1",
                f"training.checkpoint_every={steps + 1}",
            ]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise SystemExit(done.stderr)
            lines = Path(folder, "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    rates = [row["tokens_per_second"] for row in map(json.loads, lines) if "lr" in row]
    return statistics.median(rates[steps // 4 :])


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--config", default="configs/quickstart.yaml", help="default: %(default)s")
    parser.add_argument("--data", default="data/sample", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=16, help="a run (default: %(default)s)")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="other spin counts")
    parser.add_argument("settings", nargs="*", help="key=value settings of the configuration")
    args = parser.parse_args()
    settings = [args.config, f"data.path={args.data}", *args.settings]
    arms: dict[str, int | None] = {"before": BEFORE, "now": None}
    arms |= {f"spins_{spins}": spins for spins in args.spins}
    rates: dict[str, list[float]] = {}
    for number in range(args.repeats):
        names = [(name, busy) for name in arms for busy in (False, True)]
        for name, busy in names if number % 2 == 0 else reversed(names):
            key = f"{name}_{'busy' if busy else 'quiet'}"
            rate = run(settings, args.steps, args.threads, arms[name], busy)
            rates.setdefault(key, []).append(rate)
            print(
                f"round {number + 1}/{args.repeats}  {key}: {rate:,.0f} tokens/s", file=sys.stderr
            )
    median = {key: statistics.median(values) for key, values in rates.items()}
    results = {
        "quiet_over_before": median["now_quiet"] / median["before_quiet"],
        "contended_over_quiet": median["now_busy"] / median["now_quiet"],
        "contended_over_before": median["now_busy"] / median["before_busy"],
    }
    show(median, results)
    if args.json:
        print(
            json.dumps(
                {
                    **results,
                    "tokens_per_second": median,
                    "tokens_per_second_of_rounds": rates,
                    "machine": machine(),
                }
            )
        )


def show(median: dict[str, float], results: dict[str, float]) -> None:
    console = Console(file=sys.stderr)
    table = Table("threads wait", "alone tokens/s", "beside a busy process", "busy / alone")
    for name in dict.fromkeys(key.rpartition("_")[0] for key in median):
        quiet, busy = median[f"{name}_quiet"], median[f"{name}_busy"]
        table.add_row(name, f"{quiet:,.0f}", f"{busy:,.0f}", f"{busy / quiet:.2f}")
    console.print(table)
    for key, value in results.items():
        console.print(f"{key}: {value:.3f}", highlight=False)


if __name__ == "__main__":
    main()
