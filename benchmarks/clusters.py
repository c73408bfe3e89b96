"""Do clusters of routing read as subjects or as words? `emotrain cluster` on the EMO and the
standard MoE of benchmarks/modularity.py, whose checkpoints it needs:

    python benchmarks/modularity.py --data data/sample --out runs/modularity
    python benchmarks/clusters.py runs/modularity --data data/sample --out benchmarks/results

Both models are clustered with the published settings on the same documents, with several seeds;
then by one layer at a time. Writes clusters.json, clusters.md, clusters.csv and clusters.png.

    domain_nmi          clusters of tokens and the domains of their documents, mean over seeds
    token_identity_nmi  the same clusters and which token it is
    document_domain_nmi clusters of documents and their domains
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.analysis.cluster import ClusterSettings, cluster
from emotrain.analysis.cluster_tables import agreement_csv, agreement_figure, agreement_table
from emotrain.files import json_text
from emotrain.progress import ProgressBar
from emotrain.tables import Table
from emotrain.training.checkpoint import find
from emotrain.training.checkpoint_folders import read_config

MODELS = {"EMO": "emo", "standard MoE": "stdmoe"}
NUMBERS = ("domain_nmi", "domain_ami", "domain_purity", "token_identity_nmi", "token_identity_ami",
           "document_domain_nmi")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    from emotrain.cli import guarded

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pair", metavar="DIR", help="folder of both runs, emo and stdmoe")
    parser.add_argument("--data", default="data/sample", metavar="DIR")
    parser.add_argument("--out", default="runs/clusters", metavar="DIR")
    parser.add_argument("--clusters", type=int, default=32, metavar="N")
    parser.add_argument("--documents", type=int, default=12_000, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON, the last line of stdout")
    args = parser.parse_args(arguments)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = ClusterSettings(clusters=args.clusters, documents=args.documents)
    runs = {label: Path(args.pair) / name for label, name in MODELS.items()}
    variants = variants_of(settings, find(runs["EMO"]))
    models: dict[str, dict[str, Any]] = {}
    with ProgressBar("parts") as bar, tempfile.TemporaryDirectory(dir=out) as scratch:

        def measured(label: str, changed: ClusterSettings) -> dict[str, Any]:
            found = cluster(runs[label], args.data, changed, Path(scratch), track=bar.track)
            return found.to_json()

        for label in MODELS:
            by_seed = [measured(label, replace(settings, seed=i)) for i in range(args.seeds)]
            models[label] = {
                "by_seed": [{name: of[name] for name in NUMBERS} for of in by_seed],
                "variants": {
                    name: {key: of[key] for key in (*NUMBERS, "documents", "tokens")}
                    for name, changed in variants.items()
                    for of in [measured(label, changed)]
                },
                "first": by_seed[0],
            }
    result = summary(models)
    firsts = [(label, of["first"]) for label, of in models.items()]
    tables = [means_table(models), variants_table(models), agreement_table(firsts)]
    (out / "clusters.json").write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
    (out / "clusters.md").write_text(
        "# Clusters of routing: subjects or words\n\n"
        + "\n".join(table.markdown() for table in tables),
        encoding="utf-8",
    )
    (out / "clusters.csv").write_text(agreement_csv(firsts), encoding="utf-8")
    (out / "clusters.png").write_bytes(agreement_figure(firsts))
    print("\n\n".join(table.plain() for table in tables), file=sys.stderr)
    if args.json:
        print(json_text(result))
    return 0


def variants_of(settings: ClusterSettings, checkpoint: Path) -> dict[str, ClusterSettings]:
    """Each layer alone, by what a reader calls it."""
    model = read_config(checkpoint).model
    routed = [i for i in range(model.num_layers) if model.routed_in_layer(i)]
    return {f"layer {i} alone": replace(settings, layers=(i,)) for i in routed}


def summary(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The numbers that the comparison is judged by, and all others below them."""
    result: dict[str, Any] = {}
    for key in ("domain_nmi", "token_identity_nmi", "document_domain_nmi"):
        for name, label in (("emo", "EMO"), ("standard", "standard MoE")):
            result[f"{name}_{key}"] = float(np.mean([of[key] for of in models[label]["by_seed"]]))
        result[f"emo_minus_standard_{key}"] = result[f"emo_{key}"] - result[f"standard_{key}"]
    first = models["EMO"]["first"]
    return {
        **result,
        "steps": {label: of["first"]["step"] for label, of in models.items()},
        "documents": first["documents"],
        "tokens": first["tokens"],
        "settings": first["settings"],
        "models": {
            label: {
                "by_seed": of["by_seed"],
                "variants": of["variants"],
                "levels": {
                    level: {key: value for key, value in numbers.items() if key != "by_cluster"}
                    for level, numbers in of["first"]["levels"].items()
                },
            }
            for label, of in models.items()
        },
    }


def means_table(models: dict[str, dict[str, Any]]) -> Table:
    seeds = len(models["EMO"]["by_seed"])
    return Table(
        f"Clusters of tokens and, in the last column, of documents; mean ± standard deviation over "
        f"{seeds} seeds of the clustering",
        ("model", *NUMBERS),
        tuple(
            (
                label,
                *(
                    f"{np.mean(of_key):.3f} ± {np.std(of_key, ddof=1) if seeds > 1 else 0:.3f}"
                    for key in NUMBERS
                    for of_key in [[of[key] for of in models[label]["by_seed"]]]
                ),
            )
            for label in models
        ),
    )


def variants_table(models: dict[str, dict[str, Any]]) -> Table:
    return Table(
        "The same by the routing of one layer, one seed",
        ("routing of", "model", "documents", *NUMBERS),
        tuple(
            (
                name,
                label,
                f"{of['variants'][name]['documents']:,}",
                *(f"{of['variants'][name][key]:.3f}" for key in NUMBERS),
            )
            for name in models["EMO"]["variants"]
            for label, of in models.items()
        ),
        names=2,
    )


if __name__ == "__main__":
    sys.exit(main())
