"""How local the choice of experts is: counts over tokens, for caches of every size at once.

A server that has room for C of N experts in a layer either pins them, or keeps those that were used
last (LRU). A hit is a slot whose expert is there when its token comes. An LRU cache of C experts
holds what one of C - 1 holds and one more (Mattson et al. 1970), so that one number a slot says for
every C whether it hits: how many other experts were used since its expert was.

All K experts of a token are needed at once: they are looked up together, and then they are the K
that were used last. Of these the one of a larger weight counts as used later, so that the one of
the smallest weight leaves first. A cache holds at least K experts.

Curves are int64 [N]: entry C - 1 has the hits of a cache of C experts. Choices are int [T, K] in
order of weight, and N marks an empty slot, which is no slot.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 20
"""Entries of a table of tokens and experts that exist at once."""


def reuse_distances(experts_TK: np.ndarray, num_experts: int, start_T: np.ndarray) -> np.ndarray:
    """How many other experts were used since each slot's expert was -> int64 [T, K]; N where it was
    not used before, or the slot is empty. A cache of C experts has those below C.

    Args:
        start_T: bool, the tokens before which the cache is emptied.
    """
    num_tokens, num_slots = experts_TK.shape
    distances_TK = np.full((num_tokens, num_slots), num_experts, np.int64)
    # When each expert was used last: the token from 1, and in it the slots from the last.
    used_N = np.zeros(num_experts, np.int64)
    emptied = 0
    slots_K = np.arange(num_slots)[::-1]
    step = max(1, CHUNK // num_experts)
    for first in range(0, num_tokens, step):
        chunk = slice(first, min(first + step, num_tokens))
        experts_tK = experts_TK[chunk].astype(np.int64)
        tokens_t = np.arange(chunk.start, chunk.stop)
        used_tN = np.zeros((len(tokens_t) + 1, num_experts + 1), np.int64)
        used_tN[0, :-1] = used_N
        used_tN[1:][np.arange(len(tokens_t))[:, None], experts_tK] = (tokens_t + 1)[
            :, None
        ] * num_slots + slots_K
        used_tN = np.maximum.accumulate(used_tN[:, :-1], axis=0)
        used_N = used_tN[-1]
        # What was used before the cache was emptied last is gone.
        emptied_t = np.maximum.accumulate(np.where(start_T[chunk], (tokens_t + 1) * num_slots, 0))
        emptied_t = np.maximum(emptied_t, emptied)
        emptied = int(emptied_t[-1])
        for slot in range(num_slots):
            expert_t = experts_tK[:, slot]
            real_t = expert_t < num_experts
            own_t = np.take_along_axis(
                used_tN[:-1], np.where(real_t, expert_t, 0)[:, None], axis=1
            )[:, 0]
            later_t = (used_tN[:-1] > own_t[:, None]).sum(1)
            seen_t = real_t & (own_t >= emptied_t) & (own_t > 0)
            distances_TK[chunk, slot] = np.where(seen_t, later_t, num_experts)
    return distances_TK


def hits_by_group(
    distances_TK: np.ndarray, num_experts: int, group_T: np.ndarray, num_groups: int
) -> np.ndarray:
    """Hits of LRU caches of each size, for the tokens of each group -> int64 [Y, N].

    Args:
        distances_TK: of `reuse_distances`.
    """
    keys_TK = group_T[:, None] * (num_experts + 1) + distances_TK
    counts = np.bincount(keys_TK.reshape(-1), minlength=num_groups * (num_experts + 1))
    return counts.reshape(num_groups, -1)[:, :-1].cumsum(1)


def static_curve(counts_N: np.ndarray, pinned_by_N: np.ndarray) -> np.ndarray:
    """Slots that go to the C experts that are used most elsewhere -> int64 [N]. Ties go to the
    lower number.

    Args:
        counts_N: slots of each expert.
        pinned_by_N: those in other text, by which experts are pinned.
    """
    return counts_N[np.argsort(-pinned_by_N, kind="stable")].cumsum()


def count_slots(experts_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Slots of each expert -> int64 [N]."""
    return np.bincount(experts_TK.reshape(-1), minlength=num_experts + 1)[:-1]


def count_segments(
    experts_TK: np.ndarray, num_experts: int, start_T: np.ndarray, length: int
) -> np.ndarray:
    """Slots of each expert in each segment of `length` tokens -> int64 [Y, N]. Segments begin with
    documents; what is left at the end of a document is no segment.

    Args:
        start_T: bool, the first token of each document.
    """
    starts = np.flatnonzero(start_T)
    lengths = np.diff(np.append(starts, len(start_T)))
    place_T = np.arange(len(start_T)) - np.repeat(starts, lengths)
    whole_T = place_T < np.repeat(lengths // length * length, lengths)
    per_document = lengths // length
    first_segment = np.cumsum(per_document) - per_document
    segment_T = np.repeat(first_segment, lengths) + place_T // length
    keys_TK = segment_T[whole_T, None] * (num_experts + 1) + experts_TK[whole_T]
    counts = np.bincount(keys_TK.reshape(-1), minlength=int(per_document.sum()) * (num_experts + 1))
    return counts.reshape(-1, num_experts + 1)[:, :-1]


def segment_cache_curve(counts_YN: np.ndarray) -> np.ndarray:
    """Hits where each segment has the C experts that it uses most -> int64 [N]: no cache that is
    filled once a segment has more. Over all slots of the segments it is SCH, the segment cache best
    hit rate of arXiv 2505.16056, with segments that follow one another as in SRP. (The code that
    came with the paper moves the segment on by one token at a time.)"""
    return np.sort(counts_YN, axis=1)[:, ::-1].sum(0).cumsum()


def segment_histogram(counts_YN: np.ndarray, length: int) -> np.ndarray:
    """How many experts a segment uses c times, c from 0 to `length`, over all segments -> int64
    [length + 1]. `best_segment_routing` reads it; histograms add up."""
    return np.bincount(counts_YN.reshape(-1), minlength=length + 1)


def best_segment_routing(histogram: np.ndarray) -> float | None:
    """SRP, the segment routing best performance of arXiv 2505.16056: how well a routing that is one
    for a whole segment can be that of its tokens.

    Each expert is on for all tokens of a segment, or off. The best such routing turns on what is
    used at least p times. SRP is its F1 against the choices of the tokens, at the best p:
    2 * hits / (length * experts on + slots).

    Args:
        histogram: of `segment_histogram`.
    Returns:
        in [0, 1]; None without a slot.
    """
    length = len(histogram) - 1
    uses = np.arange(length + 1) * histogram
    if not uses.any():
        return None
    hits, on = uses[::-1].cumsum(), histogram[::-1].cumsum()
    # From p = length down to 1: to turn on what nobody uses gains nothing.
    return float((2 * hits[:-1] / (length * on[:-1] + uses.sum())).max())


def count_switches(
    experts_TK: np.ndarray, num_experts: int, start_T: np.ndarray
) -> tuple[int, int]:
    """Slots whose expert the token before did not use, and all slots that have a token before in
    their document."""
    follows_T = ~start_T[1:]
    after_TK, before_TK = experts_TK[1:][follows_T], experts_TK[:-1][follows_T]
    real_TK = after_TK < num_experts
    new_TK = real_TK & ~(after_TK[:, :, None] == before_TK[:, None, :]).any(2)
    return int(new_TK.sum()), int(real_TK.sum())
