"""Counts of `emotrain locality` for each layer and domain, which add up over domains, and the rates
that they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emotrain.config import ModelConfig
from emotrain.modular.locality import (
    best_segment_routing,
    count_segments,
    count_slots,
    count_switches,
    hits_by_group,
    reuse_distances,
    segment_cache_curve,
    segment_histogram,
    static_curve,
)


@dataclass(frozen=True)
class Tally:
    """Counts of one layer on some documents; they add up over documents."""

    hits: dict[str, np.ndarray]
    """Arm -> int64 [N], hits of a cache of each size."""
    slots: dict[str, int]
    """Arm -> the slots that could have hit."""
    segments: dict[int, np.ndarray]
    """Length of a segment -> its `segment_histogram`."""
    switched: int
    followed: int
    """Slots of `count_switches`: with a new expert, and all."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            {arm: curve + other.hits[arm] for arm, curve in self.hits.items()},
            {arm: slots + other.slots[arm] for arm, slots in self.slots.items()},
            {length: counts + other.segments[length] for length, counts in self.segments.items()},
            self.switched + other.switched,
            self.followed + other.followed,
        )


class Order:
    """In which order tokens come, and where caches are emptied."""

    def __init__(self, document_T: np.ndarray, domain_U: np.ndarray, turn_U: np.ndarray):
        """
        Args:
            document_T: int64, ascending; domain_U: of each document, ascending; turn_U: the place
                of each document where all domains are served in turn.
        """
        self.num_domains = int(domain_U[-1]) + 1
        self.domain_T = domain_U[document_T]
        self.document_starts_T = np.diff(document_T, prepend=-1) > 0
        self.domain_starts_T = np.diff(self.domain_T, prepend=-1) > 0
        self.mixed_T = np.argsort(turn_U[document_T], kind="stable")
        """The tokens, in turn."""


def tally_layer(
    experts_TK: np.ndarray,
    num_experts: int,
    order: Order,
    counts_YN: np.ndarray,
    segments: Sequence[int],
) -> list[Tally]:
    """Count the choices of one layer -> a tally of each domain.

    Args:
        counts_YN: slots of each expert in the training documents of each domain, which pin.
        segments: tokens of a segment.
    """
    never_T = np.zeros(len(experts_TK), bool)
    lru = {}
    for arm, tokens, start_T in (
        ("lru_cold", slice(None), order.document_starts_T),
        ("lru_warm", slice(None), order.domain_starts_T),
        ("lru_mixed", order.mixed_T, never_T),
    ):
        distances_TK = reuse_distances(experts_TK[tokens], num_experts, start_T)
        lru[arm] = hits_by_group(
            distances_TK, num_experts, order.domain_T[tokens], order.num_domains
        )
    tallies = []
    for y in range(order.num_domains):
        own_T = order.domain_T == y
        own_TK, start_T = experts_TK[own_T], order.document_starts_T[own_T]
        slots_N = count_slots(own_TK, num_experts)
        hits = {
            "static": static_curve(slots_N, counts_YN.sum(0)),
            "static_domain": static_curve(slots_N, counts_YN[y]),
            **{arm: hits_YN[y] for arm, hits_YN in lru.items()},
        }
        slots = dict.fromkeys(hits, int(slots_N.sum()))
        histograms = {}
        for length in segments:
            of_segments_YN = count_segments(own_TK, num_experts, start_T, length)
            hits[f"sch_{length}"] = segment_cache_curve(of_segments_YN)
            slots[f"sch_{length}"] = int(of_segments_YN.sum())
            histograms[length] = segment_histogram(of_segments_YN, length)
        tallies.append(
            Tally(hits, slots, histograms, *count_switches(own_TK, num_experts, start_T))
        )
    return tallies


def cache_size(model: ModelConfig, layer: int, share: float) -> int:
    """Experts that a cache of a layer holds: the share, rounded, but those of a token at least."""
    return max(model.chosen_in_layer(layer), round(share * model.routed_in_layer(layer)))


def cache_numbers(
    tallies: Sequence[Tally], model: ModelConfig, layers: Sequence[int], share: float
) -> dict[str, Any]:
    """Hit rates of one size of cache by arm, mean over layers; None without a slot."""
    sizes = [cache_size(model, layer, share) for layer in layers]

    def rate(arm: str) -> float | None:
        if not all(of.slots[arm] for of in tallies):
            return None
        rates = [
            of.hits[arm][size - 1] / of.slots[arm] for of, size in zip(tallies, sizes, strict=True)
        ]
        return float(np.mean(rates))

    return {
        "experts": float(np.mean(sizes)),
        "share": float(
            np.mean([c / model.routed_in_layer(i) for c, i in zip(sizes, layers, strict=True)])
        ),
        **{f"{arm}_hit_rate": rate(arm) for arm in tallies[0].hits},
    }


def summary(
    tallies: Sequence[Tally], model: ModelConfig, layers: Sequence[int], shares: Sequence[float]
) -> dict[str, Any]:
    """What a tally of each layer says, mean over the layers: the share of a token's experts that
    the token before did not use, SRP by length of segment, and hit rates by size of cache. A number
    without anything to count is None."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    return {
        "switch_rate": mean([of.switched / of.followed if of.followed else None for of in tallies]),
        "srp": {
            str(length): mean([best_segment_routing(of.segments[length]) for of in tallies])
            for length in tallies[0].segments
        },
        "cache": {str(share): cache_numbers(tallies, model, layers, share) for share in shares},
    }


def curve(
    tallies: Sequence[Tally], model: ModelConfig, layers: Sequence[int]
) -> list[dict[str, Any]]:
    """Hit rates of caches of every size that the layer of most experts can have."""
    widest = max(layers, key=model.routed_in_layer)
    most = model.routed_in_layer(widest)
    return [
        cache_numbers(tallies, model, layers, size / most)
        for size in range(model.chosen_in_layer(widest), most + 1)
    ]
