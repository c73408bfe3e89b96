"""One clustering, of documents or of tokens: from routing probabilities to what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emotrain.analysis.agreement import agreement, contingency, entropy_bits
from emotrain.analysis.routing import scratch
from emotrain.analysis.spherical import (
    Clusters,
    internal_metrics,
    principal_components,
    row_blocks,
    spherical_k_means,
    unit,
)

VARIANCE = 0.95
"""Share of it that the principal components have."""
EXPERTS, NEAREST = 10, 5
"""Of each cluster that are named."""


@dataclass(frozen=True)
class Level:
    """Clusters of documents, or of tokens."""

    clusters: Clusters
    first_T2: np.ndarray
    """float32: the two first principal components of each; zeros where there is one."""
    numbers: dict[str, Any]
    """What cluster.json says of all of them."""
    by_cluster: tuple[dict[str, Any], ...]
    """What it says of each."""

    def to_json(self) -> dict[str, Any]:
        return {**self.numbers, "by_cluster": list(self.by_cluster)}


def find_level(
    routed_TX: np.ndarray,
    columns: Sequence[tuple[int, int]],
    labels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    domains: Sequence[str],
    num_clusters: int,
    seed: int,
    folder: Path,
    device: torch.device,
) -> Level:
    """Cluster the rows of `routed_TX` by their directions from the mean.

    Args:
        routed_TX: routing probabilities, float16 or float32.
        columns: layer and expert of each of its columns.
        labels: by their name the known labels of the rows, and the same shuffled; `domain` is one.
        domains: names of the domains, by number.
        folder: where a scratch file lies.
    """
    components = principal_components(routed_TX, VARIANCE, device)
    unit_TP = scratch(folder, (len(routed_TX), components.axes_XP.shape[1]), np.float32)
    first_T2 = np.zeros((len(routed_TX), 2), np.float32)
    for rows in row_blocks(routed_TX):
        block_TP = components.of(routed_TX[rows])
        unit_TP[rows] = unit(block_TP).cpu().numpy()
        first_T2[rows, : block_TP.shape[1]] = block_TP[:, :2].cpu().numpy()
    clusters = spherical_k_means(unit_TP, num_clusters, seed, device)
    sizes_Y = clusters.sizes_Y
    domains_YJ = contingency(clusters.cluster_T, labels["domain"][0])
    numbers = {
        "rows": len(routed_TX),
        "components": unit_TP.shape[1],
        "variance_share": float(components.share_P.sum()),
        "clusters": len(sizes_Y),
        "refinement_rounds": clusters.rounds,
        **internal_metrics(unit_TP, clusters, seed),
        "rows_per_cluster": {
            "min": int(sizes_Y.min()),
            "median": float(np.median(sizes_Y)),
            "max": int(sizes_Y.max()),
            "standard_deviation": float(sizes_Y.std()),
        },
        "mean_domain_entropy_bits": float(entropy_bits(domains_YJ).mean()),
        "agreement": {
            name: agreement(clusters.cluster_T, label_T, shuffled_T)
            for name, (label_T, shuffled_T) in labels.items()
        },
    }
    mean_YX = _cluster_means(routed_TX, clusters, device)
    by_cluster = tuple(
        {
            "cluster": y,
            "rows": int(size),
            "domains": {
                domains[j]: int(domains_YJ[y, j])
                for j in np.argsort(-domains_YJ[y], kind="stable")
                if domains_YJ[y, j]
            },
            "experts": [
                {**dict(zip(("layer", "expert"), columns[x], strict=True)),
                 "mean_probability": float(mean_YX[y, x])}
                for x in np.argsort(-mean_YX[y], kind="stable")[:EXPERTS]
            ],
        }
        for y, size in enumerate(sizes_Y)
    )  # fmt: skip
    return Level(clusters, first_T2, numbers, by_cluster)


def nearest_rows(clusters: Clusters) -> list[np.ndarray]:
    """For each cluster the rows nearest to its centre, nearest first."""
    order_T = np.lexsort((clusters.distance_T, clusters.cluster_T))
    first_Y = np.cumsum([0, *clusters.sizes_Y])
    return [
        order_T[first : min(first + NEAREST, end)]
        for first, end in zip(first_Y[:-1], first_Y[1:], strict=True)
    ]


def _cluster_means(routed_TX: np.ndarray, clusters: Clusters, device: torch.device) -> np.ndarray:
    """Mean routing probabilities of each cluster -> float64 [Y, X]."""
    num_clusters = len(clusters.sizes_Y)
    sum_YX = torch.zeros(num_clusters, routed_TX.shape[1], dtype=torch.float64, device=device)
    for rows in row_blocks(routed_TX):
        cluster_T = torch.from_numpy(clusters.cluster_T[rows]).to(device).long()
        member_TY = torch.nn.functional.one_hot(cluster_T, num_clusters).float()
        sum_YX += (member_TY.T @ torch.from_numpy(routed_TX[rows]).to(device).float()).double()
    return sum_YX.cpu().numpy() / clusters.sizes_Y[:, None]
