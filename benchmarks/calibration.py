"""What `emotrain plan` predicts of two runs that others published, beside what they measured.

    python benchmarks/calibration.py [--json]

    EMO             128 H100, FSDP2, the published reference code (`emotrain.planning.reference`)
    Qwen3-30B-A3B   8 H100, NeMo AutoModel (`emotrain.planning.reference_qwen3`)

No number of the model is fitted to them. Some minutes; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from emotrain.config import load_config
from emotrain.planning import reference, reference_qwen3
from emotrain.planning.cost import StepTime
from emotrain.planning.hardware import Cluster, find_gpu
from emotrain.planning.plan import step_times
from emotrain.planning.search import extrapolated
from emotrain.planning.stand_ins import Routing

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Point:
    """Tokens/s a GPU."""

    name: str
    measured: float
    predicted: float
    pessimistic: float
    optimistic: float
    parts_ms: dict[str, float]

    @classmethod
    def of(cls, name: str, measured: float, times: dict[str, StepTime]) -> Point:
        speed = {view: time.tokens_per_second for view, time in times.items()}
        parts = {part: 1e3 * seconds for part, seconds in times["expected"].parts.items()}
        ends = (speed["pessimistic"], speed["optimistic"])
        return cls(name, measured, speed["expected"], *ends, parts)

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def emo() -> Point:
    """The middle of what was published is taken for measured."""
    config = reference.reference_config(load_config(ROOT / "configs/emo_1b14b_1t.yaml"))
    cluster = Cluster(find_gpu("h100-80gb"), 16, 8)
    measured = extrapolated(config, cluster, Routing(), reference.reference_fsdp2)
    times = step_times(
        measured, cluster, lambda step, view: reference.reference_work(config, step, view)
    )
    return Point.of("EMO, 128 H100", sum(reference.PUBLISHED_TOKENS_PER_SECOND) / 2, times)


def qwen3() -> Point:
    config, cluster = reference_qwen3.qwen3_config(), Cluster(find_gpu("h100-80gb"), 1, 8)
    measured = extrapolated(config, cluster, Routing(), reference.plain_fsdp2)
    times = step_times(measured, cluster, lambda step, _: reference_qwen3.qwen3_work(config, step))
    published = reference_qwen3.PUBLISHED_TOKENS_PER_SECOND
    return Point.of("Qwen3-30B-A3B, NeMo AutoModel, 8 H100", published, times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    points = [emo(), qwen3()]
    if args.json:
        print(json.dumps({"points": [asdict(p) | {"error": p.error} for p in points]}))
        return
    print("| tokens/s a GPU | measured | predicted | range | error |")
    print("|---|---|---|---|---|")
    for p in points:
        print(
            f"| {p.name} | {p.measured:,.0f} | {p.predicted:,.0f} | {p.pessimistic:,.0f} to "
            f"{p.optimistic:,.0f} | {p.error:+.0%} |"
        )


if __name__ == "__main__":
    main()
