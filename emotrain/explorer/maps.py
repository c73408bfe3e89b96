"""Where documents lie on a map, by their routing alone, and the labels of its regions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emotrain.errors import MissingPackageError

GRIDS = (5, 12)
"""Cells across the map whose documents get a label of their own when one comes nearer."""
LEAST_DOCUMENTS = 4
"""Of a cell with a label."""

Label = tuple[float, float, str]
"""Where it stands, in [0, 1], and its text."""


def principal_map(components_UP: np.ndarray) -> np.ndarray:
    """The two first principal components, float [U, 2], scaled to [0, 1]."""
    missing = max(0, 2 - components_UP.shape[1])
    return _scaled(np.pad(components_UP[:, :2], ((0, 0), (0, missing))))


def umap_map(unit_UP: np.ndarray, seed: int) -> np.ndarray:
    """UMAP's map by the cosine of documents, float [U, 2], scaled to [0, 1]. Raises: of
    `umap_learn`."""
    neighbours = min(15, len(unit_UP) - 1)
    if neighbours < 2:  # too few documents to have neighbours
        return principal_map(unit_UP)
    reducer = umap_learn().UMAP(
        n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1
    )
    return _scaled(np.asarray(reducer.fit_transform(unit_UP)))


def umap_learn() -> Any:
    """The library of UMAP.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module("umap")
    except ImportError:
        raise MissingPackageError(
            "--umap needs umap-learn, which is not installed; pip install 'emotrain[umap]'"
        ) from None


def map_labels(
    points_U2: np.ndarray,
    cluster_U: np.ndarray,
    clusters: Sequence[str],
    label_groups: Callable[[np.ndarray, int], Sequence[str]],
) -> list[list[Label]]:
    """Labels of a map from coarse to fine: of clusters, each in the middle of its documents, then
    of the cells of finer and finer grids, each in the middle of the cell's. The largest come first.

    Args:
        clusters: the labels of the clusters.
        label_groups: gives labels to groups of documents, from the group of each (int64 [U]) and
            the number of groups.
    """
    levels = [_placed(points_U2, cluster_U, clusters, 1)]
    for across in GRIDS:
        cell_U2 = np.minimum((points_U2 * across).astype(int), across - 1)
        _, group_U = np.unique(cell_U2 @ [across, 1], return_inverse=True)
        labels = label_groups(group_U, int(group_U.max()) + 1)
        levels.append(_placed(points_U2, group_U, labels, LEAST_DOCUMENTS))
    return levels


def _placed(
    points_U2: np.ndarray, group_U: np.ndarray, labels: Sequence[str], least: int
) -> list[Label]:
    """Labels of groups with so many documents, in the median of their points."""
    sizes = np.bincount(group_U, minlength=len(labels))
    placed = []
    for group in np.argsort(-sizes, kind="stable"):
        if sizes[group] >= least and labels[group]:
            x, y = np.median(points_U2[group_U == group], axis=0)
            placed.append((float(x), float(y), labels[group]))
    return placed


def _scaled(points_U2: np.ndarray) -> np.ndarray:
    low, high = points_U2.min(0), points_U2.max(0)
    return (points_U2 - low) / np.maximum(high - low, 1e-12)
