"""Set algebra on subsets of one model's experts.

The files say all that is needed: neither the model nor torch is loaded. Sets are of routed experts,
layer by layer; shared experts are in every subset, and in every result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from math import comb, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.config import ExpertsConfig, ModelConfig
from emotrain.errors import UserError
from emotrain.files import sha256_of
from emotrain.modular.artefact import Calibration, Parent, Subset, kept_of, read_subset
from emotrain.modular.budget import Budget, share_out

Set = frozenset[int]

OPERATIONS: dict[str, Callable[[Set, Set], Set]] = {
    "union": lambda one, other: one | other,
    "intersection": lambda one, other: one & other,
    "difference": lambda one, other: one - other,
}
"""What an operation makes of the experts that two subsets keep in a layer. Of more than two, the
first two come first."""


@dataclass(frozen=True)
class Operand:
    """A subset and the file it was read from."""

    file: str
    fingerprint: str
    """sha256 of the file."""
    subset: Subset

    @property
    def num_layers(self) -> int:
        return len(self.subset.experts_per_layer)

    def routed(self, layer: int) -> Set:
        return frozenset(self.subset.routed(layer))

    def num_routed(self, layer: int) -> int:
        """N: routed experts of a layer of the full model."""
        return self.subset.experts_per_layer[layer] - self.subset.num_shared_experts


def read_operands(files: Sequence[str | Path], least: int = 2) -> list[Operand]:
    """Read subsets of one model.

    Raises:
        UserError: fewer than `least`, a file that is no subset, or subsets of different models or
            tokenizers.
    """
    if len(files) < least:
        raise UserError(f"{len(files)} subset is too few; give {least} or more")
    operands = [_read_operand(Path(file)) for file in files]
    first = operands[0]
    for other in operands[1:]:
        for what, value in (
            ("other weights", "checkpoint_fingerprint"),
            ("another tokenizer", "tokenizer_fingerprint"),
            ("another number of experts", "experts_per_layer"),
            ("another number of shared experts", "num_shared_experts"),
        ):
            if getattr(first.subset, value) != getattr(other.subset, value):
                raise UserError(
                    f"{other.file}: is of a model with {what} than {first.file} "
                    f"({other.subset.checkpoint}, {first.subset.checkpoint}); give subsets of one "
                    f"checkpoint"
                )
    return operands


def _read_operand(file: Path) -> Operand:
    subset = read_subset(file)
    return Operand(str(file), sha256_of(file), subset)


def combine(operation: str, operands: Sequence[Operand]) -> Subset:
    """The union, the intersection or the difference (the first without all others) of subsets.

    Raises:
        UserError: a layer would keep no routed expert.
    """
    apply = OPERATIONS[operation]
    kept = [
        reduce(apply, (operand.routed(layer) for operand in operands))
        for layer in range(operands[0].num_layers)
    ]
    _require_experts(operation, operands, kept)
    # What is left of the first is as good as it was there.
    scored = operands[:1] if operation == "difference" else operands
    return _composed(operation, operands, kept, _weighted_scores(scored, [1.0] * len(scored)))


def merge(operands: Sequence[Operand], weights: Sequence[float], budget: Budget) -> Subset:
    """Of the experts in the union, those with the highest weighted scores, as many as a budget
    allows: all of them where it allows more. Ties go to the lower number.

    A score counts as a share of the sum of its layer's scores in its subset. So subsets weigh
    alike whatever their methods and the length of their texts.

    Args:
        weights: one for each subset, positive.
    Raises:
        UserError: weights that cannot be, or a subset without scores.
    """
    if len(weights) != len(operands):
        raise UserError(
            f"--weights {_shown(weights)}: has {len(weights)} numbers for {len(operands)} subsets; "
            f"give one for each"
        )
    if not all(isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(
            f"--weights {_shown(weights)}: must be above 0; leave a subset out instead of 0"
        )
    for operand in operands:
        if not operand.subset.scores_per_layer:
            raise UserError(
                f"{operand.file}: has no scores (method {operand.subset.method}), by which a merge "
                f"chooses; select it with another --method"
            )
    scores = _weighted_scores(operands, weights)
    union = [
        sorted(frozenset().union(*(operand.routed(layer) for operand in operands)))
        for layer in range(operands[0].num_layers)
    ]
    counts = _counts(budget, union, scores, operands[0].subset)
    kept = [
        frozenset(_best(experts, score_N, count))
        for experts, score_N, count in zip(union, scores, counts, strict=True)
    ]
    return _composed("merge", operands, kept, scores, weights, budget.text)


def _best(experts: Sequence[int], score_N: np.ndarray, count: int) -> list[int]:
    return sorted(experts, key=lambda expert: (-score_N[expert], expert))[:count]


def _counts(
    budget: Budget, union: Sequence[Sequence[int]], scores: Sequence[np.ndarray], subset: Subset
) -> list[int]:
    """Routed experts that each layer of a merge keeps."""
    shared = subset.num_shared_experts
    if budget.counts:
        return [count - shared for count in budget.counts]
    total = min(budget.total, sum(len(experts) + shared for experts in union))
    found = [of_layer[experts] for of_layer, experts in zip(scores, union, strict=True)]
    return [count - shared for count in share_out(total, found, counted_model(subset))]


def counted_model(subset: Subset) -> ModelConfig:
    """A model with as many experts as that of a subset, of which budgets need no more."""
    shared = subset.num_shared_experts
    routed = tuple(experts - shared for experts in subset.experts_per_layer)
    experts = ExpertsConfig(routed=max(routed), shared=shared, routed_per_layer=routed)
    return ModelConfig(num_layers=len(routed), experts=experts)


def _weighted_scores(operands: Sequence[Operand], weights: Sequence[float]) -> list[np.ndarray]:
    """For each layer float64 [N], the weighted mean of the subsets' shares; none where one has no
    scores."""
    if not all(operand.subset.scores_per_layer for operand in operands):
        return []
    layers = []
    for layer in range(operands[0].num_layers):
        score_N = np.zeros(operands[0].num_routed(layer))
        for operand, weight in zip(operands, weights, strict=True):
            # A score of zero can be slightly less, by rounding.
            part_N = np.maximum(operand.subset.scores_per_layer[layer], 0)
            score_N += weight / sum(weights) * _shares(part_N)
        layers.append(score_N)
    return layers


def _shares(score_N: np.ndarray) -> np.ndarray:
    largest = score_N.max(initial=0.0)
    # Divided first: a sum of large scores would overflow, one of tiny scores vanish.
    scaled_N = score_N / largest if largest > 0 else score_N
    return scaled_N / scaled_N.sum() if largest > 0 else scaled_N


def _require_experts(operation: str, operands: Sequence[Operand], kept: Sequence[Set]) -> None:
    empty = [
        layer for layer, experts in enumerate(kept) if not experts and operands[0].num_routed(layer)
    ]
    if empty:
        files = ", ".join(operand.file for operand in operands)
        others = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"{operation} of {files}: layer {empty[0]}{others} would keep no routed expert, and "
            f"every layer needs one; give larger or other subsets, or merge them"
        )


def _composed(
    operation: str,
    operands: Sequence[Operand],
    kept: Sequence[Set],
    scores: Sequence[np.ndarray],
    weights: Sequence[float] = (),
    budget: str = "",
) -> Subset:
    first = operands[0].subset
    subsets = [operand.subset for operand in operands]
    precisions = {subset.precision for subset in subsets}
    return Subset(
        experts_kept_per_layer=tuple(
            kept_of(sorted(experts), operands[0].num_routed(layer), first.num_shared_experts)
            for layer, experts in enumerate(kept)
        ),
        experts_per_layer=first.experts_per_layer,
        num_shared_experts=first.num_shared_experts,
        method=operation,
        precision=precisions.pop() if len(precisions) == 1 else "mixed",
        budget=budget,
        checkpoint=first.checkpoint,
        checkpoint_fingerprint=first.checkpoint_fingerprint,
        tokenizer_fingerprint=first.tokenizer_fingerprint,
        calibration=_calibration([subset.calibration for subset in subsets]),
        scores_per_layer=tuple(tuple(score_N.tolist()) for score_N in scores),
        parents=tuple(
            Parent(
                operand.file,
                operand.fingerprint,
                operand.subset.method,
                operand.subset.calibration.domain,
                weight,
            )
            for operand, weight in zip(operands, weights or [1.0] * len(operands), strict=True)
        ),
    )


def _calibration(parts: Sequence[Calibration]) -> Calibration:
    """What all parents were chosen by, together."""
    digest = hashlib.sha256("\n".join(part.fingerprint for part in parts).encode())
    return Calibration(
        source=", ".join(dict.fromkeys(part.source for part in parts)),
        domain=", ".join(dict.fromkeys(part.domain for part in parts if part.domain)),
        documents=sum(part.documents for part in parts),
        tokens=sum(part.tokens for part in parts),
        fingerprint=digest.hexdigest(),
    )


def _shown(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:g}" for weight in weights)


# ---- overlap


@dataclass(frozen=True)
class Overlap:
    """How many experts subsets have in common, against subsets of the same sizes by chance. Lists
    of lists are [subset][subset], with a list of layers around them where they say so."""

    files: tuple[str, ...]
    domains: tuple[str, ...]
    routed_kept_per_layer: tuple[tuple[int, ...], ...]
    """For each subset, experts of each layer without the shared ones."""
    routed_per_layer: tuple[int, ...]
    """N of each layer."""
    common_per_layer: tuple[int, ...]
    """Experts of each layer that all subsets keep."""
    union_per_layer: tuple[int, ...]
    """Experts of each layer that any subset keeps."""
    jaccard: list[list[float]]
    """Share of their experts together that two subsets have in common, mean over layers."""
    chance: list[list[float]]
    """What it would be, on average, for random subsets of the same sizes."""
    deviations: list[list[float | None]]
    """How many standard deviations the number of common experts of all layers lies from that of
    random subsets; null where no other number is possible."""
    jaccard_per_layer: list[list[list[float]]]
    chance_per_layer: list[list[list[float]]]

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def overlap(operands: Sequence[Operand]) -> Overlap:
    """Compare every two subsets. Layers without routed experts are left out of all means."""
    first = operands[0]
    layers = [layer for layer in range(first.num_layers) if first.num_routed(layer)]
    sets = [[operand.routed(layer) for operand in operands] for layer in layers]
    totals = [first.num_routed(layer) for layer in layers]

    jaccard = [
        jaccard_table(np.array([[i in kept for i in range(total)] for kept in of_layer])).tolist()
        for of_layer, total in zip(sets, totals, strict=True)
    ]
    chance = [
        _table(lambda *sizes, n=total: jaccard_by_chance(*sizes, n)[0], list(map(len, of_layer)))
        for of_layer, total in zip(sets, totals, strict=True)
    ]
    by_subset = list(zip(*sets, strict=True))
    return Overlap(
        files=tuple(operand.file for operand in operands),
        domains=tuple(operand.subset.calibration.domain for operand in operands),
        routed_kept_per_layer=tuple(tuple(map(len, of_subset)) for of_subset in by_subset),
        routed_per_layer=tuple(totals),
        common_per_layer=tuple(len(frozenset.intersection(*of_layer)) for of_layer in sets),
        union_per_layer=tuple(len(frozenset.union(*of_layer)) for of_layer in sets),
        jaccard=np.mean(jaccard, axis=0).tolist(),
        chance=np.mean(chance, axis=0).tolist(),
        deviations=_table(partial(_deviations, totals=totals), by_subset),
        jaccard_per_layer=jaccard,
        chance_per_layer=chance,
    )


def _table(value: Callable[[Any, Any], Any], of: Sequence[Any]) -> list[list[Any]]:
    """The value of every two."""
    return [[value(one, other) for other in of] for one in of]


def jaccard_table(kept_XN: np.ndarray) -> np.ndarray:
    """Jaccard index of every two sets of experts, none of them empty -> float64 [X, X].

    Args:
        kept_XN: bool, the experts of each set.
    """
    common_XX = kept_XN.astype(np.float64) @ kept_XN.T
    size_X = common_XX.diagonal()
    return common_XX / (size_X[:, None] + size_X - common_XX)


@cache
def jaccard_by_chance(one: int, other: int, total: int) -> tuple[float, float]:
    """Mean and variance of the Jaccard index of two random subsets with these sizes of a set of
    `total`, at least one of them not empty: the number in common is hypergeometric."""
    ways = comb(total, other)
    points = [
        (
            comb(one, common) * comb(total - one, other - common) / ways,
            common / (one + other - common),
        )
        for common in range(max(0, one + other - total), min(one, other) + 1)
    ]
    mean = sum(chance * index for chance, index in points)
    return mean, sum(chance * (index - mean) ** 2 for chance, index in points)


def _deviations(ones: Sequence[Set], others: Sequence[Set], totals: Sequence[int]) -> float | None:
    difference = variance = 0.0
    for one, other, total in zip(ones, others, totals, strict=True):
        a, b = len(one), len(other)
        difference += len(one & other) - a * b / total
        if total > 1:
            variance += a * b * (total - a) * (total - b) / (total**2 * (total - 1))
    return difference / sqrt(variance) if variance else None
