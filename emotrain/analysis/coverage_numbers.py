"""What the routing of documents says about experts: numbers of `emotrain coverage`.

Everything is computed from two tables a layer (`DocumentRouting`), on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emotrain.analysis.together import count_pools, group_experts, modularity
from emotrain.config import ModelConfig
from emotrain.evaluation.routing import entropy_nats, shares, sum_by_group
from emotrain.model.router import select_pool
from emotrain.modular.algebra import jaccard_by_chance, jaccard_table

LEVELS = (50, 90, 99)
"""Per cent of the routing that is carried by so many experts."""


@dataclass(frozen=True)
class DocumentRouting:
    """Sums over the tokens of each document, pieces of a cut document added up, for each layer with
    routed experts."""

    probability: tuple[Tensor, ...]
    """float64 [U, N]: of the routing probabilities."""
    slots: tuple[Tensor, ...]
    """int64 [U, N]: tokens that chose each expert."""


def choose_experts(sums_XN: Tensor, count: int) -> Tensor:
    """The experts of the most routing probability, bool [X, N]: what a domain keeps by
    `router_once`, and the pool of a document."""
    return select_pool(sums_XN, torch.full((len(sums_XN),), count))


# ---- how many experts are used

Use = dict[str, dict[str, dict[str, np.ndarray]]]
"""`slots` or `probability` -> of one `document`, mean over those of a domain, or of the whole
`domain` -> name of a number (`use_of_experts`) -> float64 [domains, layers with routed experts]."""


def use_of_experts(sums_XN: Tensor, allowed_X: Tensor) -> dict[str, Tensor]:
    """How far each row spreads over the experts -> name -> [X].

    Args:
        sums_XN: slots or probabilities; no row is all zeros.
        allowed_X: int64, experts that the row could use.
    """
    share_XN = shares(sums_XN)
    carried_XN = share_XN.sort(dim=1, descending=True).values.cumsum(1)
    entropy_X = entropy_nats(sums_XN)
    return {
        "used_experts": (sums_XN > 0).sum(1),
        "above_uniform_experts": (share_XN * allowed_X[:, None] > 1 + 1e-9).sum(1),
        **{
            f"carry_{level}_experts": 1 + (carried_XN < level / 100 - 1e-9).sum(1)
            for level in LEVELS
        },
        "entropy_nats": entropy_X,
        "effective_experts": entropy_X.exp(),
    }


def use_of_domains(routing: DocumentRouting, group_U: Tensor, allowed_JL: Tensor) -> Use:
    """`use_of_experts` of documents and of domains.

    Args:
        group_U: int64, the domain of each document.
        allowed_JL: int64, experts that each domain may use in each layer.
    """
    documents_J = torch.bincount(group_U)
    use: Use = {}
    for measure_name, layers in (("slots", routing.slots), ("probability", routing.probability)):
        of_document: dict[str, list[np.ndarray]] = {}
        of_domain: dict[str, list[np.ndarray]] = {}
        for sums_UN, allowed_J in zip(layers, allowed_JL.T, strict=True):
            for name, value_U in use_of_experts(sums_UN, allowed_J[group_U]).items():
                mean_J = sum_by_group(value_U.double(), group_U) / documents_J
                of_document.setdefault(name, []).append(mean_J.numpy())
            sums_JN = sum_by_group(sums_UN, group_U)
            for name, value_J in use_of_experts(sums_JN, allowed_J).items():
                of_domain.setdefault(name, []).append(value_J.double().numpy())
        use[measure_name] = {
            scope: {name: np.stack(columns, axis=1) for name, columns in of.items()}
            for scope, of in (("document", of_document), ("domain", of_domain))
        }
    return use


# ---- how far domains overlap


@dataclass(frozen=True)
class SubsetOverlap:
    """How far the experts overlap that domains choose for themselves (`router_once`). Domains are
    compared by halves of their documents, so that what two have in common and what one has with
    itself are of equally many documents. None where a domain has one document, or there is one."""

    routed_kept_per_layer: tuple[int, ...]
    jaccard: np.ndarray
    """float64 [J, J]: Jaccard index of two domains' halves, mean over the four pairs of halves; on
    the diagonal of a domain's own two halves. Mean over layers; NaN for a domain of one
    document."""
    between: float | None
    """Mean over two different domains."""
    within: float | None
    """Mean over domains of their diagonal: what `between` would be if both were one domain."""
    chance: float
    """Mean over random subsets of the same sizes."""
    chance_deviation: float
    """Standard deviation of one random pair, mean over layers."""
    between_per_layer: tuple[float | None, ...]
    within_per_layer: tuple[float | None, ...]
    chance_per_layer: tuple[float, ...]


def subset_overlap(
    probability: Sequence[Tensor], group_U: Tensor, half_U: Tensor, counts: Sequence[int]
) -> SubsetOverlap:
    """Compare what halves of the domains choose.

    Args:
        probability: for each layer float64 [U, n], of the common experts.
        counts: experts that each layer keeps of them.
    """
    num_groups = int(group_U.max()) + 1
    per_layer = []
    for sums_Un, count in zip(probability, counts, strict=True):
        halves_Jn = sum_by_group(sums_Un, 2 * group_U + half_U, 2 * num_groups)
        table = jaccard_table(choose_experts(halves_Jn, count).numpy())
        pairs = table.reshape(num_groups, 2, num_groups, 2)
        jaccard_JJ = pairs.mean(axis=(1, 3))
        np.fill_diagonal(jaccard_JJ, pairs[range(num_groups), 0, range(num_groups), 1])
        single_J = torch.bincount(group_U).numpy() < 2
        jaccard_JJ[single_J], jaccard_JJ[:, single_J] = np.nan, np.nan
        per_layer.append(jaccard_JJ)
    by_chance = [
        jaccard_by_chance(count, count, sums_Un.shape[1])
        for sums_Un, count in zip(probability, counts, strict=True)
    ]
    jaccard_JJ = np.mean(per_layer, axis=0)
    apart_JJ, own_JJ = ~np.eye(num_groups, dtype=bool), np.eye(num_groups, dtype=bool)
    return SubsetOverlap(
        tuple(counts),
        jaccard_JJ,
        _mean(jaccard_JJ[apart_JJ]),
        _mean(jaccard_JJ[own_JJ]),
        float(np.mean([mean for mean, _ in by_chance])),
        float(np.sqrt(sum(variance for _, variance in by_chance)) / len(by_chance)),
        tuple(_mean(table[apart_JJ]) for table in per_layer),
        tuple(_mean(table[own_JJ]) for table in per_layer),
        tuple(mean for mean, _ in by_chance),
    )


def _mean(values: np.ndarray) -> float | None:
    """Mean of what is a number; None where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


# ---- which experts go together


@dataclass(frozen=True)
class Together:
    """Which experts of a bank go together (`emotrain.analysis.together`). Layers that share a bank
    are counted together."""

    bank: int
    layers: tuple[int, ...]
    pool_experts: int
    """Routed experts of a document's pool."""
    pools: int
    """That were counted: documents times layers."""
    counts_NN: np.ndarray
    """int64, of `count_pools`; common experts alone, as exclusive ones are in the pools of a domain
    by rule."""
    group_N: np.ndarray
    """int64: the group of each expert."""
    modularity: float | None
    """Of the groups, on the documents that made them."""
    held_out_modularity: float | None
    """Of groups that every second document of a domain made, on the other documents: about 0 where
    groups are chance."""
    group_share_JX: np.ndarray
    """float64 [domains, groups]: share of the group's experts in a pool, mean over documents."""


def together_of(
    routing: DocumentRouting,
    model: ModelConfig,
    group_U: Tensor,
    half_U: Tensor,
    counts: Sequence[int],
) -> tuple[Together, ...]:
    """Groups of experts for each bank.

    Args:
        half_U: 0 or 1, the half of its domain that each document is in.
        counts: for each layer of the model, experts of a pool; 2 at least, where there are as many.
    """
    layers = [i for i in range(model.num_layers) if model.routed_in_layer(i)]
    banks: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        banks.setdefault(model.bank_of_layer(layer), []).append(index)
    found = []
    for bank, members in banks.items():
        common = model.common_in_layer(layers[members[0]])
        count = min(common, max(2, counts[layers[members[0]]]))
        pools = [choose_experts(routing.probability[i][:, :common], count).numpy() for i in members]
        halves = [
            np.sum([count_pools(pool_UN[half_U.numpy() == half]) for pool_UN in pools], axis=0)
            for half in (0, 1)
        ]
        counts_NN = halves[0] + halves[1]
        group_N = group_experts(counts_NN)
        in_group_NX = group_N[:, None] == np.arange(group_N.max() + 1)
        share_UX = np.mean(pools, axis=0) @ in_group_NX / in_group_NX.sum(0)
        share_JX = sum_by_group(torch.from_numpy(share_UX), group_U)
        found.append(
            Together(
                bank,
                tuple(layers[i] for i in members),
                count,
                len(group_U) * len(members),
                counts_NN,
                group_N,
                _number(modularity(counts_NN, group_N)),
                _number(modularity(halves[1], group_experts(halves[0]))),
                (share_JX / torch.bincount(group_U)[:, None]).numpy(),
            )
        )
    return tuple(found)


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
