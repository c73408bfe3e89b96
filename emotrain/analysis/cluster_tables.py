"""What `emotrain cluster` says: tables, pictures and the numbers of the pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emotrain.analysis.cluster import ClusterResult
from emotrain.data.document_clusters import (
    DOCUMENT_COLUMNS,
    DOCUMENTS,
    TOKEN_COLUMNS,
    TOKENS,
    write_columns,
)
from emotrain.evaluation.figures import COLORS, png
from emotrain.evaluation.tables import plain
from emotrain.files import json_text, write_whole
from emotrain.tables import Table, csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("emotrain")

LABELS = {
    "domain": "domain",
    "token_identity": "token",
    "script": "script",
    "length": "length",
}
"""What a reader calls the known labels."""
SHOWN = 5
"""Words of a cluster in a table."""


def cluster_tables(result: ClusterResult) -> list[Table]:
    """All that is shown; what sums it up comes last."""
    return [
        _clusters_table(result, "token"),
        _clusters_table(result, "document"),
        _quality_table(result),
        agreement_table([("", result.to_json())]),
    ]


def agreement_table(models: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """How far clusters agree with known labels, one line a model, level and label.

    Args:
        models: (label, `ClusterResult.to_json`); one model needs no label.
    """
    several = len(models) > 1
    rows = tuple(
        (
            *([name] if several else []),
            f"{level}s",
            LABELS[label],
            str(of["labels"]),
            *(plain(of[key], 3) for key in ("nmi", "nmi_shuffled", "ami", "purity")),
        )
        for level in ("token", "document")
        for label in LABELS
        for name, numbers in models
        if (of := numbers["levels"][level]["agreement"].get(label))
    )
    return Table(
        "Agreement of clusters with labels that were known before: normalised mutual information "
        "(0 to 1), the same with the labels shuffled, the same adjusted for chance (0 is chance), "
        "and the share of a cluster that has its most frequent label",
        (
            *(["model"] if several else []),
            *("clusters of", "label", "labels", "NMI", "shuffled", "adjusted", "purity"),
        ),
        rows,
        names=2 + several,
    )


def _quality_table(result: ClusterResult) -> Table:
    rows = tuple(
        (
            f"{name}s",
            f"{of['rows']:,}",
            str(of["clusters"]),
            str(of["components"]),
            plain(of["silhouette_cosine"], 3),
            plain(of["davies_bouldin"], 2),
            plain(of["calinski_harabasz"], 0),
            plain(of["inertia"] / of["rows"], 3),
            plain(of["mean_domain_entropy_bits"], 2),
        )
        for name in ("token", "document")
        for of in [getattr(result, name).numbers]
    )
    return Table(
        "How compact and apart the clusters are: silhouette by cosine (−1 to 1, more is better), "
        "Davies-Bouldin (less is better), Calinski-Harabasz (more is better), mean squared "
        "distance to the centre, and mean entropy of the domains in a cluster in bits",
        ("clusters of", "rows", "clusters", "components", "silhouette", "Davies-Bouldin",
         "Calinski-Harabasz", "distance²", "entropy"),
        rows,
    )  # fmt: skip


def _clusters_table(result: ClusterResult, name: str) -> Table:
    of_tokens = name == "token"
    rows = tuple(
        (
            str(of["cluster"]),
            f"{of['rows']:,}",
            *_main_domain(of),
            " ".join(word for word, _ in of.get("words", [])[:SHOWN]),
            *([" ".join(token for token, _ in of.get("tokens", [])[:SHOWN])] if of_tokens else []),
        )
        for of in getattr(result, name).by_cluster
    )
    return Table(
        f"Clusters of {name}s: their most frequent domain and its share, and the words of their "
        f"documents {'and the tokens ' if of_tokens else ''}that set them apart (class-wise "
        f"TF-IDF)",
        ("cluster", f"{name}s", "share", "domain", "words", *(["tokens"] if of_tokens else [])),
        rows,
        notes=2 + of_tokens,
    )


def _main_domain(of: dict[str, Any]) -> tuple[str, str]:
    domain, rows = next(iter(of["domains"].items()))
    return f"{100 * rows / of['rows']:.0f} %", domain


# ---- pictures


def agreement_figure(models: Sequence[tuple[str, dict[str, Any]]]) -> bytes:
    """NMI with each known label, one panel a level, one bar a model; a line across a bar is what
    shuffled labels give. Arguments as of `agreement_table`."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, level in zip(panels, ("token", "document"), strict=True):
            found = [numbers["levels"][level]["agreement"] for _, numbers in models]
            labels = [label for label in LABELS if label in found[0]]
            width = 0.8 / len(models)
            for index, (name, _) in enumerate(models):
                places = [x + width * (index + 0.5) - 0.4 for x in range(len(labels))]
                of_each = [found[index][label] for label in labels]
                axes.bar(
                    places,
                    [of["nmi"] or 0 for of in of_each],
                    0.92 * width,
                    color=COLORS[index],
                    hatch=("", "//")[index % 2],
                    edgecolor="white",
                    label=name,
                )
                for place, of in zip(places, of_each, strict=True):
                    axes.text(place, of["nmi"] or 0, plain(of["nmi"], 2), ha="center", va="bottom")
                    if of["nmi_shuffled"] is not None:
                        level_line = dict(color="black", linewidth=1.6)
                        axes.hlines(
                            of["nmi_shuffled"], place - width / 2, place + width / 2, **level_line
                        )
            axes.set_xticks(range(len(labels)), [LABELS[label] for label in labels])
            axes.set_title(f"clusters of {level}s (line: labels shuffled)")
            axes.grid(False, axis="x")
        panels[0].set_ylabel("normalised mutual information")
        panels[0].margins(y=0.1)
        if len(models) > 1:
            panels[0].legend(fontsize="small", frameon=False)

    return png(draw, (10, 4))


def agreement_csv(models: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The numbers of the picture, and the other ones of agreement."""
    keys = ("labels", "nmi", "nmi_shuffled", "ami", "purity")
    return csv_text(
        ("model", "level", "label", *keys),
        (
            (name, level, label, *(of[key] for key in keys))
            for name, numbers in models
            for level in ("token", "document")
            for label, of in numbers["levels"][level]["agreement"].items()
        ),
    )


def domains_figure(result: ClusterResult) -> bytes:
    """Share of each cluster that each domain has, one panel a level."""
    domains = result.sample.domains

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, 1)
        for axes, name in zip(panels, ("token", "document"), strict=True):
            of_each = getattr(result, name).by_cluster
            # Clusters of one domain stand beside each other.
            order = sorted(of_each, key=lambda of: (_main_domain(of)[1], of["cluster"]))
            share_JY = np.array(
                [[of["domains"].get(domain, 0) / of["rows"] for of in order] for domain in domains]
            )
            image = axes.imshow(share_JY, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            axes.set_yticks(range(len(domains)), domains)
            numbers = [of["cluster"] for of in order]
            axes.set_xticks(range(len(order)), numbers, fontsize="small" if len(order) < 40 else 5)
            axes.set(title=f"clusters of {name}s", xlabel="cluster (0 is the largest)")
            axes.grid(False)
            figure.colorbar(image, label=f"share of the cluster's {name}s")

    clusters = max(len(result.token.by_cluster), len(result.document.by_cluster))
    size = min(40, 4 + 0.28 * clusters), min(40, 3 + 0.5 * len(domains))
    return png(draw, size)


def domains_csv(result: ClusterResult) -> str:
    """The numbers of the picture: one line a level, cluster and domain that is in it."""
    return csv_text(
        ("level", "cluster", "rows", "domain", "rows_of_domain", "share"),
        (
            (name, of["cluster"], of["rows"], domain, rows, rows / of["rows"])
            for name in ("token", "document")
            for of in getattr(result, name).by_cluster
            for domain, rows in of["domains"].items()
        ),
    )


# ---- files


def write_clusters(result: ClusterResult, folder: Path) -> list[Path]:
    """Write clusters.parquet, tokens.parquet, domains.csv, agreement.csv, cluster.md, cluster.json
    and, where matplotlib is installed, domains.png and agreement.png; returns their paths."""
    sample, document, token = result.sample, result.document, result.token
    tokens_U = sample.tokens_U
    of_documents = {
        "index": sample.index_U,
        "domain": [sample.domains[j] for j in sample.domain_U],
        "length": sample.length_U,
        "tokens": tokens_U,
        "cluster": document.clusters.cluster_T,
        "distance": document.clusters.distance_T,
        "x": document.first_T2[:, 0],
        "y": document.first_T2[:, 1],
    }
    first_U = np.cumsum(tokens_U) - tokens_U
    of_tokens = {
        "index": np.repeat(sample.index_U, tokens_U),
        "position": np.arange(tokens_U.sum()) - np.repeat(first_U, tokens_U),
        "token": sample.token_T,
        "cluster": token.clusters.cluster_T,
        "distance": token.clusters.distance_T,
    }
    folder.mkdir(parents=True, exist_ok=True)
    numbers = result.to_json()
    written = [
        write_columns(folder / DOCUMENTS, DOCUMENT_COLUMNS, of_documents, result.origin),
        write_columns(folder / TOKENS, TOKEN_COLUMNS, of_tokens, result.origin),
    ]
    texts = {
        "domains.csv": domains_csv(result),
        "agreement.csv": agreement_csv([("", numbers)]),
        "cluster.md": "\n".join(table.markdown() for table in cluster_tables(result)),
        "cluster.json": json_text(numbers, indent=1, ensure_ascii=False) + "\n",
    }
    pictures: dict[str, Callable[[], bytes]] = {
        "domains.png": lambda: domains_figure(result),
        "agreement.png": lambda: agreement_figure([("", numbers)]),
    }
    for name, drawn in pictures.items():
        try:
            written.append(write_whole(folder / name, drawn()))
        except ModuleNotFoundError as error:
            # A picture from before would now stand beside other numbers.
            (folder / name).unlink(missing_ok=True)
            log.warning("%s was not drawn: %s", name, error)
    for name, text in texts.items():
        written.append(write_whole(folder / name, text.encode()))
    return written
