"""Principal components, and k-means of unit vectors (spec 9.1, steps 5 and 6). Rows may be mapped
from a file: they are read in blocks."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emotrain.errors import MissingPackageError, UserError

BLOCK_BYTES = 64 << 20
"""Of rows in fp32 that are in memory at a time."""
MINI_BATCH, STARTS, MOST_EPOCHS = 4096, 10, 500
"""Rows of a step of mini-batch k-means, starts of which the best goes on, passes over the rows."""
REFINEMENTS, STILL = 20, 1e-6
"""Most rounds of spherical k-means after it, and the move of a centre that ends them."""
SILHOUETTE_ROWS = 10_000
"""Their distances are computed pair by pair, WORKING_MB of them at a time."""
WORKING_MB = 64


@dataclass(frozen=True)
class Components:
    """The first principal components of rows."""

    mean_X: Tensor
    axes_XP: Tensor
    """float32, orthonormal, the one of most variance first; the largest entry of each is
    positive."""
    share_P: Tensor
    """Share of the variance of each."""

    def of(self, rows_TX: np.ndarray) -> Tensor:
        """Rows in these components, float32 [T, P]."""
        device = self.mean_X.device
        wide_TX = torch.from_numpy(rows_TX).to(device).float()
        return (wide_TX - self.mean_X) @ self.axes_XP


@dataclass(frozen=True)
class Clusters:
    """Rows in Y clusters, none empty, the largest first."""

    centre_YP: np.ndarray
    """float32, unit vectors."""
    cluster_T: np.ndarray
    """int32."""
    distance_T: np.ndarray
    """float32: 1 - cosine to the centre."""
    rounds: int
    """Of refinement."""

    @property
    def sizes_Y(self) -> np.ndarray:
        return np.bincount(self.cluster_T)


def row_blocks(rows_TX: np.ndarray) -> Iterator[slice]:
    """Slices of rows of at most BLOCK_BYTES in fp32."""
    step = max(1, BLOCK_BYTES // (4 * rows_TX.shape[1]))
    for start in range(0, len(rows_TX), step):
        yield slice(start, min(start + step, len(rows_TX)))


def principal_components(rows_TX: np.ndarray, share: float, device: torch.device) -> Components:
    """The fewest components that have more than a share of the variance. Exact: eigenvectors of the
    covariance.

    Args:
        rows_TX: float16 or float32, 2 rows or more.
    Raises:
        UserError: rows that are not finite, or all equal.
    """
    width = rows_TX.shape[1]
    # Around the first rows' mean, so that the variance is no small difference of large numbers.
    around_X = torch.from_numpy(rows_TX[:4096].astype(np.float32).mean(0)).to(device)
    sum_X = torch.zeros(width, dtype=torch.float64, device=device)
    square_XX = torch.zeros(width, width, dtype=torch.float64, device=device)
    for rows in row_blocks(rows_TX):
        block_TX = torch.from_numpy(rows_TX[rows]).to(device).float() - around_X
        sum_X += block_TX.sum(0, dtype=torch.float64)
        square_XX += (block_TX.T @ block_TX).double()
    mean_X = sum_X / len(rows_TX)
    covariance_XX = (square_XX / len(rows_TX) - mean_X.outer(mean_X)).cpu()
    if not covariance_XX.isfinite().all():
        raise UserError(
            "the routing probabilities are not finite: the model has diverged; give an earlier "
            "checkpoint"
        )
    variance_X, axes_XX = torch.linalg.eigh(covariance_XX)
    variance_X, axes_XX = variance_X.flip(0).clamp(min=0), axes_XX.flip(1)
    if variance_X[0] < 1e-12:
        raise UserError(
            "all tokens are routed alike, so that nothing tells them apart; give a model with more "
            "experts, or one that has been trained"
        )
    share_X = variance_X / variance_X.sum()
    count = min(width, 1 + int((share_X.cumsum(0) <= share).sum()))
    axes_XP = axes_XX[:, :count]
    largest_1P = axes_XP.abs().argmax(0, keepdim=True)
    axes_XP = axes_XP * axes_XP.gather(0, largest_1P).sign()
    return Components(
        (mean_X + around_X.double()).float(), axes_XP.float().to(device), share_X[:count].float()
    )


def spherical_k_means(
    unit_TP: np.ndarray, num_clusters: int, seed: int, device: torch.device
) -> Clusters:
    """k-means of unit vectors by cosine: mini-batch k-means, then rounds in which each centre
    becomes the direction of the sum of its rows.

    Args:
        unit_TP: float32, contiguous; more rows than clusters.
    Returns:
        at most `num_clusters` clusters, fewer where rows are alike.
    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    start = (
        scikit_learn("cluster")
        .MiniBatchKMeans(
            num_clusters,
            n_init=STARTS,
            max_iter=MOST_EPOCHS,
            batch_size=MINI_BATCH,
            compute_labels=False,
            random_state=seed,
        )
        .fit(unit_TP)
    )
    centre_YP = unit(torch.from_numpy(start.cluster_centers_).float().to(device))
    rounds = 0
    for _ in range(REFINEMENTS):
        rounds += 1
        sum_YP = torch.zeros_like(centre_YP, dtype=torch.float64)
        for rows in row_blocks(unit_TP):
            block_TP = torch.from_numpy(unit_TP[rows]).to(device)
            member_TY = torch.nn.functional.one_hot(_nearest(block_TP, centre_YP)[1], num_clusters)
            # Not index_add, which sums in any order on a GPU.
            sum_YP += (member_TY.T.float() @ block_TP).double()
        # A centre without rows stays where it is.
        moved_YP = torch.where(sum_YP.any(1, keepdim=True), unit(sum_YP.float()), centre_YP)
        move = (moved_YP - centre_YP).abs().max()
        centre_YP = moved_YP
        if move < STILL:
            break
    found = [
        _nearest(torch.from_numpy(unit_TP[rows]).to(device), centre_YP)
        for rows in row_blocks(unit_TP)
    ]
    cosine_T, cluster_T = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    sizes_Y = np.bincount(cluster_T, minlength=num_clusters)
    order_Y = np.argsort(-sizes_Y, kind="stable")
    rank_Y = np.argsort(order_Y)
    return Clusters(
        centre_YP.cpu().numpy()[order_Y[sizes_Y[order_Y] > 0]],
        rank_Y[cluster_T].astype(np.int32),
        (1 - cosine_T).clip(0, 2),
        rounds,
    )


def unit(rows_XP: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays one."""
    return torch.nn.functional.normalize(rows_XP, dim=1)


def internal_metrics(unit_TP: np.ndarray, clusters: Clusters, seed: int) -> dict[str, Any]:
    """How compact and apart clusters are, without labels (spec 9.1, step 7).

    Returns:
        `silhouette_cosine` and `silhouette_euclidean` in [-1, 1] on a sample of at most 10,000
        rows, more is better; `davies_bouldin`, less is better, and `calinski_harabasz`, more is
        better, on all rows; `inertia`: sum of the squared distances to the centres, which are
        2 (1 - cosine). None where there is one cluster, or each row is one.
    """
    metrics, sklearn = scikit_learn("metrics"), scikit_learn()
    rows_t = np.arange(len(unit_TP))
    if len(rows_t) > SILHOUETTE_ROWS:
        random = np.random.default_rng(seed)
        rows_t = np.sort(random.choice(len(unit_TP), SILHOUETTE_ROWS, replace=False))
    sample_tP, sampled_t = unit_TP[rows_t], clusters.cluster_T[rows_t]

    def scored(score: Any, rows_XP: np.ndarray, of_X: np.ndarray, **more: Any) -> float | None:
        if not 1 < len(np.unique(of_X)) < len(of_X):
            return None
        with sklearn.config_context(working_memory=WORKING_MB):
            return float(score(rows_XP, of_X, **more))

    return {
        **{
            f"silhouette_{metric}": scored(
                metrics.silhouette_score, sample_tP, sampled_t, metric=metric
            )
            for metric in ("cosine", "euclidean")
        },
        "davies_bouldin": scored(metrics.davies_bouldin_score, unit_TP, clusters.cluster_T),
        "calinski_harabasz": scored(metrics.calinski_harabasz_score, unit_TP, clusters.cluster_T),
        "inertia": float(2 * clusters.distance_T.sum(dtype=np.float64)),
    }


def scikit_learn(module: str = "") -> Any:
    """scikit-learn, or a module of it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(f"sklearn.{module}".rstrip("."))
    except ImportError:
        raise MissingPackageError(
            "clusters need scikit-learn, which is not installed; pip install 'emotrain[analysis]'"
        ) from None


def _nearest(block_TP: Tensor, centre_YP: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the nearest centre and its number, [T] each."""
    best = (block_TP @ centre_YP.T).max(1)
    return best.values, best.indices
