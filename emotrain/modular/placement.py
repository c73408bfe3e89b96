"""Which experts live on the same rank under expert parallelism.

A token goes once to each rank that holds at least one of its experts
(`emotrain.distributed.dispatch`). So experts that tokens choose together should share a rank: fewer
rows travel, and nothing that is computed changes. Documents of EMO choose from pools, and experts
of one pool come together.

    tokens' choices --count--> together_NN --spectral bisection--> a start --swaps--> rank_N

What is counted is how often one token chooses two experts. How often one document does says less:
a long document uses most of its pool, and which part of it a token uses is lost.

Every rank holds as many experts as without a placement, and no rank has more than `max_load` times
the mean of the chosen slots, where that can be. Arrays are numpy's, with `rank_N` int64 in [0, W).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.config import Config, ModelConfig
from emotrain.errors import MissingFileError, UserError

MAX_LOAD = 1.05
"""Slots of the fullest rank over the mean that a placement allows itself, on the tokens it is
computed from. On others it is more: documents differ, and experts of a rank serve the same ones."""

TOKENS = 1 << 20
"""Tokens that place and measure, unless said otherwise: with fewer, chance decides which rank the
documents of a half fill (docs/parallel.md)."""

LOAD_WEIGHTS = (0.0, 0.03, 0.3, 3.0, 1e4)
"""What load above the limit costs, in shares of all pairs. It grows from nothing to more than any
pair is worth, so that good swaps come first and the limit holds at the end."""

SHAKES = 40
"""How often a quarter of the experts is mixed and swapped again, to leave a local optimum."""


FORMAT = 1
"""Of the file that `emotrain placement` writes."""


@dataclass(frozen=True)
class PlacementFile:
    """What training and planning read of a file that `emotrain placement` wrote."""

    ep: int
    orders: tuple[tuple[int, ...], ...]
    """For each layer with routed experts, the experts of rank 0, then those of rank 1, …"""
    rows_per_token: float
    """Ranks that a token is sent to, measured: mean over layers."""
    exchange_load: float
    """Load of the fullest rank over the mean, among the tokens of one exchange, measured: mean over
    layers."""


def read_fitting(config: Config) -> PlacementFile:
    """Read the file that `parallel.placement` names.

    Raises:
        UserError: not such a file, or one of another model or another number of ranks.
    """
    path, ep = config.parallel.placement, config.parallel.ep
    placement = read_placement(path)
    if placement.ep != ep:
        raise UserError(
            f"parallel.placement={path} is for ep={placement.ep}, parallel.ep is {ep}; change "
            f"it, or compute one with `emotrain placement --ep {ep}`"
        )
    check_orders(path, placement.orders, config.model)
    return placement


def read_placement(path: str | Path) -> PlacementFile:
    """Read a file that `emotrain placement` wrote.

    Raises:
        UserError: not such a file, or an order that is not one.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(f"its format is {values['format']!r}, not {FORMAT}")
        orders = [layer["order"] for layer in values["layers"]]
        for layer, order in enumerate(orders):
            if not is_permutation(order):
                raise UserError(f"entry {layer} of its layers has no permutation of experts")
        return PlacementFile(
            int(values["ep"]),
            tuple(map(tuple, orders)),
            float(values["rows_per_token"]),
            float(np.mean([layer["exchange_load_max_over_mean"] for layer in values["layers"]])),
        )
    except OSError as error:
        raise MissingFileError(
            f"{path}: {error.strerror or error}; write one with `emotrain placement`"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a placement of experts ({error}); write one with `emotrain placement`"
        ) from None


def check_orders(name: str, orders: Sequence[Sequence[int]], model: ModelConfig) -> None:
    """Refuse orders that are of another model.

    Args:
        name: where they come from, for the error.
    Raises:
        UserError: another number of layers or experts, or layers of one bank that differ.
    """
    layers = [i for i in range(model.num_layers) if model.routed_in_layer(i)]
    if len(orders) != len(layers):
        raise UserError(
            f"{name} places {len(orders)} layers, the model has {len(layers)} with routed experts; "
            f"compute one from a checkpoint of this model"
        )
    of_bank: dict[int, tuple[int, ...]] = {}
    for layer, order in zip(layers, orders, strict=True):
        if len(order) != model.routed_in_layer(layer):
            raise UserError(
                f"{name} places {len(order)} experts in layer {layer}, the model has "
                f"{model.routed_in_layer(layer)}; compute one from a checkpoint of this model"
            )
        if of_bank.setdefault(model.bank_of_layer(layer), tuple(order)) != tuple(order):
            raise UserError(
                f"{name} places layer {layer} otherwise than a layer that shares its experts; "
                f"compute one from a checkpoint of this model"
            )


def is_permutation(order: Any) -> bool:
    """Whether a value is a list of the numbers from 0, each once."""
    whole = isinstance(order, list) and all(type(expert) is int for expert in order)
    return whole and sorted(order) == list(range(len(order)))


@dataclass(frozen=True)
class Traffic:
    """What a placement costs the tokens it is measured on. Load is slots over their mean, so that 1
    is balanced."""

    rows_per_token: float
    """Ranks that a token is sent to, its own included: mean over tokens."""
    load_max_over_mean: float
    """Load of the fullest rank, over all tokens."""
    exchange_load_max_over_mean: float
    """Load of the fullest rank among the tokens of one exchange, mean over exchanges: the others
    wait for it. Experts that serve few documents are busy in few exchanges, so that this is larger
    than the load over all tokens."""


def rank_sizes(num_experts: int, num_ranks: int) -> np.ndarray:
    """Experts that each rank holds -> int64 [W]: ceil(N / W), and fewer on the last.

    Raises:
        UserError: a rank would hold none.
    """
    # It needs torch, and the help of `emotrain placement` does not wait for torch.
    from emotrain.distributed.mesh import experts_of_rank

    sizes = [experts_of_rank(num_experts, num_ranks, rank) for rank in range(num_ranks)]
    if not sizes or sizes[-1] == 0:
        raise UserError(
            f"ep={num_ranks} leaves a rank without any of the {num_experts} experts of a layer; "
            f"choose a smaller one, for example {max(1, min(num_ranks, num_experts) // 2)}"
        )
    return np.array(sizes)


def contiguous(num_experts: int, num_ranks: int) -> np.ndarray:
    """The rank of each expert without a placement: neighbours in number share one -> int64 [N]."""
    return np.repeat(np.arange(num_ranks), rank_sizes(num_experts, num_ranks))


def order_of(rank_N: np.ndarray) -> np.ndarray:
    """The permutation that a file stores: the experts of rank 0, then those of rank 1, …; of one
    rank by number -> int64 [N]."""
    return np.argsort(rank_N, kind="stable")


def rank_of(order: np.ndarray, num_ranks: int) -> np.ndarray:
    """The rank of each expert of an order, which need not be one of `order_of` -> int64 [N]."""
    return contiguous(len(order), num_ranks)[np.argsort(order)]


def keep_ranks(rank_N: np.ndarray, before_N: np.ndarray, num_ranks: int) -> np.ndarray:
    """The same groups of experts, each on the rank where most of it was before, as far as ranks
    hold as many experts -> int64 [N]."""
    sizes_W = rank_sizes(len(rank_N), num_ranks)
    stay_WW = np.zeros((num_ranks, num_ranks), np.int64)
    np.add.at(stay_WW, (rank_N, before_N), 1)
    stay_WW[sizes_W[:, None] != sizes_W] = -1
    new_W = np.zeros(num_ranks, np.int64)
    for _ in range(num_ranks):
        group, rank = np.unravel_index(stay_WW.argmax(), stay_WW.shape)
        new_W[group] = rank
        stay_WW[group], stay_WW[:, rank] = -2, -2
    return new_W[rank_N]


def traffic(
    experts_TK: np.ndarray, rank_N: np.ndarray, num_ranks: int, exchange_T: np.ndarray | None = None
) -> Traffic:
    """What tokens with these choices cost under a placement.

    Args:
        experts_TK: int, the routed experts of each token; N marks an empty slot. At least one is
            not empty.
        exchange_T: int, the exchange that each token is part of, from 0; None means one for all.
    """
    if exchange_T is None:
        exchange_T = np.zeros(len(experts_TK), np.int64)
    rows, slots_XW = rows_and_slots(
        experts_TK, rank_N, num_ranks, exchange_T, int(exchange_T.max()) + 1
    )
    return traffic_of(rows, len(experts_TK), slots_XW)


def rows_and_slots(
    experts_TK: np.ndarray,
    rank_N: np.ndarray,
    num_ranks: int,
    exchange_T: np.ndarray,
    num_exchanges: int,
) -> tuple[int, np.ndarray]:
    """The counts that `traffic` is made of, which add up over parts of the tokens: rows, and slots
    of each rank in each exchange, int64 [X, W]."""
    owner_TK = np.append(rank_N, num_ranks)[experts_TK]
    goes_TW = np.zeros((len(experts_TK), num_ranks + 1), bool)
    goes_TW[np.arange(len(experts_TK))[:, None], owner_TK] = True
    keys_TK = exchange_T[:, None] * (num_ranks + 1) + owner_TK
    num_keys = num_exchanges * (num_ranks + 1)
    slots_XW = np.bincount(keys_TK.reshape(-1), minlength=num_keys).reshape(-1, num_ranks + 1)
    return int(goes_TW[:, :-1].sum()), slots_XW[:, :-1]


def traffic_of(rows: float, num_tokens: float, slots_XW: np.ndarray) -> Traffic:
    """What counts of `rows_and_slots` say. Exchanges without a slot are left out."""
    slots_XW = slots_XW[slots_XW.any(axis=1)]
    if not len(slots_XW):
        return Traffic(0.0, 1.0, 1.0)
    slots_W = slots_XW.sum(0)
    return Traffic(
        float(rows / num_tokens),
        float(slots_W.max() / slots_W.mean()),
        float((slots_XW.max(1) / slots_XW.mean(1)).mean()),
    )


def count_together(experts_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """How many tokens choose both of two experts -> float64 [N, N]; the diagonal has the slots of
    each expert. Empty slots (N) count nothing."""
    pairs = experts_TK[:, :, None].astype(np.int64) * (num_experts + 1) + experts_TK[:, None, :]
    counts = np.bincount(pairs.reshape(-1), minlength=(num_experts + 1) ** 2)
    return counts.reshape(num_experts + 1, -1)[:-1, :-1].astype(np.float64)


def place(together_NN: np.ndarray, num_ranks: int, max_load: float = MAX_LOAD) -> np.ndarray:
    """The rank of each expert, so that experts chosen together share one -> int64 [N].

    Args:
        together_NN: of `count_together`.
        max_load: slots of the fullest rank over the mean. Where no swap reaches it, load comes as
            close as swaps bring it.
    Raises:
        UserError: a rank would hold no expert.
    """
    sizes_W = rank_sizes(len(together_NN), num_ranks)
    slots_N = together_NN.diagonal()
    load_N = slots_N * num_ranks / max(slots_N.sum(), 1e-30)
    pairs_NN = together_NN - np.diag(slots_N)
    pairs_NN = pairs_NN / max(pairs_NN.sum() / 2, 1e-30)
    best_N, random = _bisect(pairs_NN, sizes_W), np.random.default_rng(0)
    for weight in LOAD_WEIGHTS:
        best_N, best = _swap(best_N, pairs_NN, load_N, num_ranks, max_load, weight)
    for _ in range(SHAKES):
        # Swaps stop where no pair of experts gains; three that go round may still.
        shaken_N, some = best_N.copy(), random.permutation(len(best_N))[: len(best_N) // 4 + 3]
        shaken_N[some] = shaken_N[random.permutation(some)]
        shaken_N, value = _swap(shaken_N, pairs_NN, load_N, num_ranks, max_load, LOAD_WEIGHTS[-1])
        if value > best:
            best_N, best = shaken_N, value
    return best_N


def _bisect(pairs_NN: np.ndarray, sizes_W: np.ndarray) -> np.ndarray:
    """A start: cut the experts in two along the second eigenvector of the normalized Laplacian,
    and each part again, down to one rank a part -> int64 [N]."""
    rank_N = np.zeros(len(pairs_NN), np.int64)
    parts = [(np.arange(len(pairs_NN)), 0, len(sizes_W))]
    while parts:
        members, first, last = parts.pop()
        if last - first == 1:
            rank_N[members] = first
            continue
        # Each pair counts a little, so that experts that nobody chooses are part of one graph.
        weights = pairs_NN[np.ix_(members, members)]
        weights = weights + (weights.mean() + 1e-30) * 1e-3
        scale = 1 / np.sqrt(weights.sum(1))
        vectors = np.linalg.eigh(weights * scale[:, None] * scale)[1]
        order = members[np.argsort(vectors[:, -2] * scale, kind="stable")]
        middle = (first + last) // 2
        cut = int(sizes_W[first:middle].sum())
        parts += [(order[:cut], first, middle), (order[cut:], middle, last)]
    return rank_N


def _swap(
    rank_N: np.ndarray,
    pairs_NN: np.ndarray,
    load_N: np.ndarray,
    num_ranks: int,
    max_load: float,
    weight: float,
) -> tuple[np.ndarray, float]:
    """Swap the two experts that gain most, until no two gain anything -> int64 [N] and its value.

    The value of a placement is the share of pairs that are on one rank, less `weight` times the
    load above the limit.
    """
    rank_N = rank_N.copy()
    while True:
        near_NW = pairs_NN @ np.eye(num_ranks)[rank_N]
        own_N = np.take_along_axis(near_NW, rank_N[:, None], 1)[:, 0]
        # What an expert gains on the other's rank; the other one will not be there.
        moved_NN = near_NW[:, rank_N] - own_N[:, None] - pairs_NN
        load_W = np.bincount(rank_N, load_N, num_ranks)
        excess_N = np.maximum(load_W - max_load, 0)[rank_N]
        after_NN = load_W[rank_N][:, None] - load_N[:, None] + load_N
        after_NN = np.maximum(after_NN - max_load, 0)
        excess_NN = after_NN + after_NN.T - excess_N[:, None] - excess_N
        gain_NN = moved_NN + moved_NN.T - weight * excess_NN
        gain_NN[rank_N[:, None] == rank_N] = 0
        a, b = np.unravel_index(gain_NN.argmax(), gain_NN.shape)
        if gain_NN[a, b] <= 1e-9:
            value = own_N.sum() / 2 - weight * np.maximum(load_W - max_load, 0).sum()
            return rank_N, float(value)
        rank_N[[a, b]] = rank_N[[b, a]]
