"""The proof in small: EMO against the architecture-matched standard MoE on the same data, order,
seed and tokens.

Trains both (in parallel, one core each by default), evaluates both with the same held-out documents
and the same subset sizes, and prints both curves: loss increase by share of experts kept, for each
domain and on average, with two controls (random experts, and the experts of another domain). Writes
modularity.json, modularity.md, modularity.png and its numbers as modularity.csv. Interrupted, it
goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _pair import EMO, ROOT, STANDARD, pair_parser

from emotrain.errors import RunError
from emotrain.evaluation.results import Evaluation, read_evaluation
from emotrain.files import json_text

MODELS = {
    "EMO": ("emo", EMO),
    "standard MoE": ("stdmoe", STANDARD),
}
KEEP = (1.0, 0.5, 0.25, 0.125, 0.0625)


def main(arguments: list[str] | None = None) -> int:
    from emotrain.cli import guarded

    parser = pair_parser(__doc__.splitlines()[0], "runs/modularity", "the results")
    parser.add_argument(
        "--keep",
        type=float,
        nargs="+",
        default=KEEP,
        help="shares of experts to keep (default: %(default)s)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=64,
        help="most held-out documents of a domain (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="models trained at a time, on one thread each (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    from emotrain.evaluation.plots import subset_figure
    from emotrain.evaluation.tables import domain_table, mean_table, subset_csv

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            label: pool.submit(_train_and_evaluate, name, config, args)
            for label, (name, config) in MODELS.items()
        }
        evaluations = [(label, future.result()) for label, future in futures.items()]
    results = summary(dict(evaluations))
    whole = {
        **results,
        "evaluations": {label: result.to_json() for label, result in evaluations},
    }
    tables = [mean_table(evaluations), *(domain_table(result) for _, result in evaluations)]
    titles = ["", *(f"### {label}\n\n" for label, _ in evaluations)]
    (out / "modularity.md").write_text(
        "# The proof in small\n\n"
        + describe(results, dict(evaluations))
        + "\n"
        + "\n".join(title + table.markdown() for title, table in zip(titles, tables, strict=True)),
        encoding="utf-8",
    )
    (out / "modularity.png").write_bytes(subset_figure(evaluations))
    (out / "modularity.csv").write_text(subset_csv(evaluations), encoding="utf-8")
    (out / "modularity.json").write_text(json_text(whole, indent=1), encoding="utf-8")
    print((out / "modularity.md").read_text(encoding="utf-8"), file=sys.stderr)
    print(f"results in {out}/modularity.md, .png, .csv and .json", file=sys.stderr)
    if args.json:
        print(json_text(whole))
    return 0


def summary(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """The numbers the comparison is judged by; increases are nats a token, means over domains."""
    emo, standard = evaluations["EMO"], evaluations["standard MoE"]
    emo_loss, standard_loss = emo.mean.loss_nats, standard.mean.loss_nats
    if emo_loss is None or standard_loss is None:
        raise RunError("a model has diverged: its loss is not finite")
    results: dict[str, Any] = {
        "emo_full_loss_nats": emo_loss,
        "standard_full_loss_nats": standard_loss,
        "emo_full_loss_over_standard": emo_loss / standard_loss,
        "emo_domain_cosine_last_layer": emo.routing.domain_cosine_per_layer[-1],
        "standard_domain_cosine_last_layer": standard.routing.domain_cosine_per_layer[-1],
    }
    for keep in emo.keeps:
        for name, result in (("emo", emo), ("standard", standard)):
            for arm, increase in vars(result.mean.increase_nats[keep]).items():
                results[f"{name}_increase_nats_{arm}_{keep}"] = increase
        ours, theirs = (result.mean.increase_nats[keep].selected for result in (emo, standard))
        # Where a subset costs EMO nothing, no ratio says by how much it is better.
        results[f"standard_increase_over_emo_{keep}"] = (
            theirs / ours if theirs is not None and ours is not None and ours > 0 else None
        )
    return results


def describe(results: dict[str, Any], evaluations: dict[str, Evaluation]) -> str:
    """What was compared and how it came out, in a few lines of Markdown."""
    emo = evaluations["EMO"]
    lines = [
        f"- {emo.step:,} steps each; {emo.experts.per_layer[0]} experts a layer "
        f"({emo.experts.shared} shared), "
        f"{emo.experts.per_token} a token; {len(emo.domains)} domains.",
        f"- Full model, nats a token: EMO {results['emo_full_loss_nats']:.3f}, standard "
        f"{results['standard_full_loss_nats']:.3f} "
        f"({100 * (results['emo_full_loss_over_standard'] - 1):+.2f} %).",
        f"- Mean cosine between the domains' routing in the last layer: EMO "
        f"{results['emo_domain_cosine_last_layer']:.2f}, "
        f"standard {results['standard_domain_cosine_last_layer']:.2f}.",
    ]
    for keep in emo.keeps:
        if float(keep) < 1:
            ratio = results[f"standard_increase_over_emo_{keep}"]
            lines.append(
                f"- {100 * float(keep):g} % of the experts: EMO "
                f"{results[f'emo_increase_nats_selected_{keep}']:+.3f} nats, standard "
                f"{results[f'standard_increase_nats_selected_{keep}']:+.3f}"
                + (f" ({ratio:.1f} times as much)." if ratio else ".")
            )
    return "\n".join(lines) + "\n"


def _train_and_evaluate(name: str, config: Path, args: argparse.Namespace) -> Evaluation:
    run_dir = Path(args.out) / name
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if args.jobs > 1 else dict(os.environ)
    _call(
        [
            str(ROOT / "launch/pretrain.py"),
            str(config),
            f"data.path={args.data}",
            f"training.run_dir={run_dir}",
            *args.settings,
        ],
        environment,
    )
    _call(
        [
            "-m",
            "emotrain.cli",
            "evaluate",
            str(run_dir),
            "--data",
            args.data,
            "--out",
            str(run_dir / "evaluation"),
            "--keep",
            *map(str, args.keep),
            "--documents",
            str(args.documents),
        ],
        environment,
    )
    return read_evaluation(run_dir / "evaluation" / "evaluation.json")


def _call(command: list[str], environment: dict[str, str]) -> None:
    # Only results belong on stdout.
    code = subprocess.run(
        [sys.executable, *command], env=environment, stdout=sys.stderr, check=False
    ).returncode
    if code:
        raise RuntimeError(
            f"{' '.join(command)} ended with exit code {code}; its message stands above"
        )


if __name__ == "__main__":
    sys.exit(main())
