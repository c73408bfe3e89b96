"""How many experts a subset keeps: what `--keep` and `--memory` say, as counts a layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emotrain.config import ModelConfig
from emotrain.errors import UserError
from emotrain.modular.counts import check_counts, counted_experts, experts_kept

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Bytes of a unit of memory."""


@dataclass(frozen=True)
class Budget:
    """One of: experts of each layer; experts of all layers together, shared out by score."""

    text: str
    """As it was asked for."""
    counts: tuple[int, ...] = ()
    """Experts that each layer keeps, shared ones included; empty for a total."""
    total: int = 0
    """Experts that all layers keep together, shared ones included."""


def read_keep(text: str, config: ModelConfig) -> Budget:
    """`32`: experts a layer; `0.25`: share of each layer's; `32,32,16`: of each layer; `total:512`:
    of all layers together. Shared experts count.

    Raises:
        UserError: none of these, or counts that the model cannot keep.
    """
    if match := re.fullmatch(r"total:(\d+)", text):
        total = int(match[1])
        least, most = _bounds(config)
        if not sum(least) <= total <= sum(most):
            raise UserError(
                f"--keep {text}: {config.num_layers} layers keep {sum(least)} to {sum(most)} "
                f"experts together, which counts {config.experts.shared} shared one(s) a layer"
            )
        return Budget(text, total=total)
    if re.fullmatch(r"\d+", text):
        most = _bounds(config)[1]
        # A layer that has fewer keeps what it has; without routed experts it stays as it is.
        counts = tuple(
            count if count == config.experts.shared else min(int(text), count) for count in most
        )
        if max(most) < int(text):
            raise UserError(f"--keep {text}: the largest layer has {max(most)} experts")
    elif re.fullmatch(r"\d+(,\d+)+", text):
        counts = tuple(map(int, text.split(",")))
    elif re.fullmatch(r"\d*\.\d+", text):
        counts = experts_kept(config, float(text))
        _check_share(text, config)
    else:
        raise UserError(
            f"--keep {text}: give a number of experts a layer (32), a share (0.25), a number for "
            f"each layer (32,32,16) or one for all together (total:512)"
        )
    check_counts(config, counts)
    return Budget(text, counts)


def _check_share(text: str, config: ModelConfig) -> None:
    """Refuse a share below the smallest subset in every layer: none has so little."""
    least, most = config.experts.shared + 1, max(counted_experts(config))
    if float(text) * most < least - 0.5:
        raise UserError(
            f"--keep {text}: is {float(text) * most:.2g} of the {most} experts of the largest "
            f"layer, which keeps at least {least}, {least - 1} of them shared; give "
            f"{least / most:.2g} or more"
        )


def read_size(text: str) -> int:
    """Bytes of a size: `4GB`, `500MiB`, `1.5gb`, or a bare number.

    Raises:
        UserError: none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", text, re.IGNORECASE)
    if match is None:
        raise UserError(f"--memory {text}: give a size such as 4GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def read_memory(text: str, config: ModelConfig, bytes_a_value: int = 4) -> Budget:
    """The most experts a layer, as many in each, of which an extracted checkpoint takes at most
    this much: `4GB`, `500MiB`.

    Args:
        bytes_a_value: of a parameter as the checkpoint stores it.
    Raises:
        UserError: not a size, or less than the smallest subset takes.
    """
    limit = read_size(text)
    least, most = _bounds(config)
    counts, needed = least, parameters_kept(config, least) * bytes_a_value
    one_expert = _expert_parameters(config) * bytes_a_value
    if needed > limit:
        raise UserError(
            f"--memory {text}: the smallest subset, {config.experts.shared} shared and 1 routed "
            f"expert a layer, takes {needed / 1e6:,.1f} MB; give at least that"
        )
    for count in range(config.experts.shared + 2, max(most) + 1):
        larger = tuple(min(max(count, low), high) for low, high in zip(least, most, strict=True))
        if needed + (sum(larger) - sum(least)) * one_expert > limit:
            break
        counts = larger
    return Budget(text, counts)


def parameters_kept(config: ModelConfig, counts: Sequence[int]) -> int:
    """Parameters of the model with `counts` experts a layer, shared ones included."""
    from emotrain.model.counts import parameter_counts

    total = parameter_counts(config)["total_parameters"]
    dropped = sum(config.experts_in_layer(layer) - count for layer, count in enumerate(counts))
    return total - dropped * _expert_parameters(config)


def _expert_parameters(config: ModelConfig) -> int:
    """Of an expert: its matrices and its row of the router."""
    return 3 * config.d_model * config.experts.hidden + config.d_model


def share_out(total: int, scores: Sequence[np.ndarray], config: ModelConfig) -> tuple[int, ...]:
    """Experts of each layer where all layers keep `total` together: the highest scores anywhere,
    each as a share of its layer's sum, and at least one routed expert a layer.

    Args:
        scores: for each layer, [N], at least 0.
    """
    least, _ = _bounds(config)
    candidates = []
    for layer, score_N in enumerate(scores):
        share_N = np.sort(score_N / max(score_N.sum(), 1e-30))[::-1]
        # The best expert of a layer is kept in any case.
        candidates += [(-share, layer) for share in share_N[1:]]
    chosen = sorted(candidates)[: total - sum(least)]
    return tuple(low + sum(layer == of for _, of in chosen) for layer, low in enumerate(least))


def _bounds(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The fewest and the most experts that each layer can keep."""
    most = tuple(map(config.experts_in_layer, range(config.num_layers)))
    return tuple(min(count, config.experts.shared + 1) for count in most), most
