"""How far clusters agree with labels that were known before: of meaning (the domain of a document)
and of surface (which token it is, its script, its length).

    nmi           normalised mutual information, by the mean of both entropies: 0 to 1
    ami           the same, less what chance gives (Vinh et al. 2010): 0 is chance
    nmi_shuffled  nmi with the labels shuffled: what chance gives, counted
    purity        share of what is in a cluster whose label is the most frequent one there

`nmi` of many labels is above 0 by chance alone, as `nmi_shuffled` shows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from emotrain.analysis.spherical import scikit_learn


def agreement(
    cluster_X: np.ndarray, label_X: np.ndarray, shuffled_X: np.ndarray
) -> dict[str, float | None]:
    """`nmi`, `ami`, `nmi_shuffled` and `purity` as above, and `labels`, how many there are; None
    where all labels are one, with which nothing can agree.

    Args:
        cluster_X, label_X: integers.
        shuffled_X: the labels in another order.
    """
    metrics = scikit_learn("metrics")
    counts_YX = contingency(cluster_X, label_X)
    labels = int((counts_YX.sum(0) > 0).sum())
    if labels < 2:
        return {"labels": labels, **dict.fromkeys(("nmi", "ami", "nmi_shuffled", "purity"))}
    return {
        "labels": labels,
        "nmi": float(metrics.normalized_mutual_info_score(label_X, cluster_X)),
        "ami": float(metrics.adjusted_mutual_info_score(label_X, cluster_X)),
        "nmi_shuffled": float(metrics.normalized_mutual_info_score(shuffled_X, cluster_X)),
        "purity": float(counts_YX.max(1).sum() / len(cluster_X)),
    }


def contingency(cluster_X: np.ndarray, label_X: np.ndarray) -> np.ndarray:
    """int64 [clusters, labels]: how many of each pair there are."""
    width = int(label_X.max()) + 1
    shape = int(cluster_X.max()) + 1, width
    pairs = np.bincount(cluster_X.astype(np.int64) * width + label_X, minlength=np.prod(shape))
    return pairs.reshape(shape)


def entropy_bits(counts_YX: np.ndarray) -> np.ndarray:
    """Entropy of the labels in each cluster, float64 [Y]."""
    share_YX = counts_YX / counts_YX.sum(1, keepdims=True)
    return -(share_YX * np.log2(share_YX, where=share_YX > 0, out=np.zeros_like(share_YX))).sum(1)


# ---- surface


def numbered(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The number of each name, int64, and the names by number, sorted."""
    distinct, numbers = np.unique(np.array(names, dtype=object), return_inverse=True)
    return numbers.astype(np.int64), [str(name) for name in distinct]


def script_of(text: str) -> str:
    """Script of the first letter of a text, by the first word of its Unicode name (`LATIN`, `CJK`);
    without letters what its first sign is, `number`, `punctuation`, `symbol` or `space`; or `part
    of a character`; `none` of nothing."""
    if not text:
        return "none"
    letters = [c for c in text if c.isalpha()]
    if letters:
        return unicodedata.name(letters[0], "letter").split()[0].split("-")[0]
    if "\ufffd" in text:
        return "part of a character"
    kinds = {"N": "number", "P": "punctuation", "S": "symbol"}
    of_each = (kinds.get(unicodedata.category(c)[0]) for c in text)
    return next((kind for kind in of_each if kind), "space")


SURFACES = {
    "script": script_of,
    "length": lambda text: f"{len(text.strip()):03d}",
}
"""Labels of a token by its text alone; its length is in characters, spaces around it left out."""


def main_script(script_T: np.ndarray, names: Sequence[str], document_T: np.ndarray) -> np.ndarray:
    """The script of most tokens of each document, int64 [U]; those of no script count only where a
    document has nothing else."""
    counts_UX = contingency(document_T, script_T).astype(np.float64)
    no_script_X = np.array([name != name.upper() for name in names])[: counts_UX.shape[1]]
    return (counts_UX * np.where(no_script_X, 1e-9, 1)).argmax(1)
