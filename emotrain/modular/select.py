"""Which experts a domain keeps: a few of its documents in, a subset of each layer's experts out
(spec 7.3).

A subset is a bool mask over routed experts, one a layer; shared experts always stay. Every function
here works on all groups of documents (domains) at once: since `Transformer.forward` takes a mask
for each document, one pass serves them all. Two letters besides those of the package:

    U  documents of a data set, numbered by the `document_ids_G` of its batches
    J  groups of documents, here domains
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig
from emotrain.distributed.gathering import gathered, gathered_in_turn
from emotrain.distributed.ranks import Ranks
from emotrain.distributed.shares import ALONE, share
from emotrain.errors import UserError
from emotrain.model.attention import TokenView
from emotrain.model.router import LayerRequest, select_pool, sum_by_document
from emotrain.model.subset import own_range
from emotrain.model.transformer import Block, Transformer
from emotrain.modular.artefact import Subset
from emotrain.modular.counts import check_counts
from emotrain.progress import Track, untracked

Subsets = tuple[Tensor, ...]
"""For each layer, bool [J, N]: the routed experts that each group keeps."""


def own_experts(config: ModelConfig, domains: Sequence[str]) -> Subsets:
    """For each layer bool [J, N]: the exclusive experts of each group's domain. They are in every
    subset of it."""
    masks = []
    for layer in range(config.num_layers):
        own_JN = torch.zeros(len(domains), config.routed_in_layer(layer), dtype=torch.bool)
        for group, domain in enumerate(domains):
            own_JN[group, list(own_range(config.experts.exclusive, own_JN.shape[1], domain))] = True
        masks.append(own_JN)
    return tuple(masks)


def allowed_experts(config: ModelConfig, domain: str = "") -> list[Tensor]:
    """For each layer bool [N]: the experts that documents of a domain may use, the common ones and
    its own; of any other document by default."""
    masks = [mask_JN[0] for mask_JN in own_experts(config, [domain])]
    for layer, mask_N in enumerate(masks):
        mask_N[: config.common_in_layer(layer)] = True
    return masks


def masks_of(subset: Subset) -> list[Tensor]:
    """For each layer bool [N]: the routed experts of a subset."""
    masks = []
    for layer, count in enumerate(subset.experts_per_layer):
        mask_N = torch.zeros(count - subset.num_shared_experts, dtype=torch.bool)
        mask_N[list(subset.routed(layer))] = True
        masks.append(mask_N)
    return masks


def best_experts(score_JN: Tensor, own_JN: Tensor, count: int) -> Tensor:
    """The `count` best routed experts of each group, bool [J, N], its own exclusive ones first,
    and at least one that is not."""
    ranked_JN = score_JN.masked_fill(own_JN, torch.inf)
    return select_pool(ranked_JN, (own_JN.sum(1) + 1).clamp(min=count))


def greedy_select(
    model: Transformer,
    batches: Sequence[PackedBatch],
    document_group_U: Tensor,
    num_groups: int,
    counts: Sequence[int],
    track: Track[Any] = untracked,
    domains: Sequence[str] = (),
) -> Subsets:
    """The experts of `greedy_ranking`, without their scores."""
    return greedy_ranking(model, batches, document_group_U, num_groups, counts, track, domains)[0]


Ranking = tuple[Subsets, tuple[Tensor, ...]]
"""Subsets, and for each layer the mean routing probabilities that chose them, float64 [J, N]."""


def greedy_ranking(
    model: Transformer,
    batches: Sequence[PackedBatch],
    document_group_U: Tensor,
    num_groups: int,
    counts: Sequence[int],
    track: Track[Any] = untracked,
    domains: Sequence[str] = (),
) -> Ranking:
    """`greedy_rankings` of one size."""
    sizes = [counts]
    [found] = greedy_rankings(model, batches, document_group_U, num_groups, sizes, track, domains)
    return found


@torch.no_grad()
def greedy_rankings(
    model: Transformer,
    batches: Sequence[PackedBatch],
    document_group_U: Tensor,
    num_groups: int,
    sizes: Sequence[Sequence[int]],
    track: Track[Any] = untracked,
    domains: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> list[Ranking]:
    """The published selection, for several sizes at once: layer by layer, keep the experts that a
    group's tokens give the most routing probability.

    While a layer is ranked, the layers below it already run with the experts that each group keeps,
    so that it is ranked on the hidden states it will see. Ties go to the lower index. Hidden states
    of all documents are carried from layer to layer: one pass for any depth. The sizes part ways at
    the first experts; what is below them is computed once for all.

    Args:
        batches: calibration documents; padding is left out of the scores.
        document_group_U: int64, the group of each document.
        sizes: of each, for each layer experts to keep, shared ones included (`experts_kept`).
        track: shows progress.
        domains: of each group, whose exclusive experts stay; none by default.
        ranks: those that have the model between them. Each runs a share of the batches.
    Raises:
        UserError: counts that the model cannot keep, or a group without tokens.
    """
    for counts in sizes:
        check_counts(model.config, counts)
    device, shared = model.head.weight.device, model.config.experts.shared
    document_group_U = document_group_U.to(device)
    with gathered(model):
        carried = [
            _Carried.of(model, batch.to(device), document_group_U)
            for batch in track(share(batches, ranks), "reading calibration documents")
        ]
    own = own_experts(model.config, domains or [""] * num_groups)
    # Groups of each size, [X, J, N] a layer.
    subsets: list[Tensor] = []
    scores: list[Tensor] = []
    num_layers = model.config.num_layers
    for layer, block in enumerate(gathered_in_turn(model.blocks)):
        for state in track(carried, f"ranking experts of layer {layer + 1}/{num_layers}"):
            state.x_BSD = block.attend(state.x_BSD, state.view)
        num_routed = model.config.routed_in_layer(layer)
        score_XJN = torch.zeros(len(sizes), num_groups, 0, dtype=torch.float64, device=device)
        chosen_XJN = score_XJN.bool()
        if num_routed:
            groups = num_groups * (len(sizes) if layer else 1)
            score_JN = _mean_routing(block, carried, groups, ranks)
            score_XJN = score_JN.unflatten(0, (-1, num_groups)).expand(len(sizes), -1, -1)
            own_JN = own[layer].to(device)
            chosen_XJN = torch.stack(
                [
                    best_experts(of_size_JN, own_JN, counts[layer] - shared)
                    for of_size_JN, counts in zip(score_XJN, sizes, strict=True)
                ]
            )
        if layer == 0:
            carried = [
                replace(state, group_G=state.group_G + size * num_groups)
                for size in range(len(sizes))
                for state in carried
            ]
        subsets.append(chosen_XJN)
        scores.append(score_XJN)
        if layer + 1 < num_layers:
            for state in carried:
                kept_GN = chosen_XJN.flatten(0, 1)[state.group_G] if num_routed else None
                request = LayerRequest(kept_GN=kept_GN)
                state.x_BSD, _ = block.use_experts(state.x_BSD, state.batch, request)
    return [
        (tuple(mask_XJN[x] for mask_XJN in subsets), tuple(score_XJN[x] for score_XJN in scores))
        for x in range(len(sizes))
    ]


@dataclass
class _Carried:
    """A batch of documents on its way through the layers."""

    batch: PackedBatch
    view: TokenView
    group_G: Tensor
    """int64: the group of each document; those of the second size follow those of the first."""
    x_BSD: Tensor
    """Hidden states, as far as the layers have run."""

    @classmethod
    def of(cls, model: Transformer, batch: PackedBatch, document_group_U: Tensor) -> _Carried:
        x_BSD, view = model.embed(batch)
        return cls(batch, view, group_of_documents(batch, document_group_U), x_BSD)


def _mean_routing(
    block: Block, carried: Sequence[_Carried], num_groups: int, ranks: Ranks = ALONE
) -> Tensor:
    """Mean routing probability of each group's tokens, over all ranks, in a layer that has all of
    its experts -> float64 [J, N].

    Raises:
        UserError: a group without tokens.
    """
    scores, tokens = [], []
    for state in carried:
        x_TD = block.moe_norm(state.x_BSD).flatten(0, 1)
        scores_GN = block.moe.document_scores(x_TD, state.batch, LayerRequest()).double()
        scores.append(sum_by_document(scores_GN, state.group_G, num_groups))
        document_T = state.batch.document_T
        valid_T1 = (state.batch.document_ids_G >= 0)[document_T][:, None].double()
        tokens.append(sum_by_document(valid_T1, state.group_G[document_T], num_groups))
    sums = torch.cat([torch.stack(scores).sum(0), torch.stack(tokens).sum(0)], 1)
    score_JN, tokens_J1 = ranks.sum(sums).tensor_split([-1], 1)
    empty = (tokens_J1[:, 0] == 0).nonzero()[:, 0].tolist()
    if empty:
        raise UserError(
            f"group {empty[0]} has no calibration tokens; give at least one document of each group"
        )
    return score_JN / tokens_J1


def random_select(
    config: ModelConfig, num_groups: int, counts: Sequence[int], seed: int
) -> Subsets:
    """Control: for each group and layer a subset of the common experts drawn uniformly, on the CPU.
    Of one seed, the smaller lies in the larger.

    Raises:
        ValueError: counts that the model cannot keep.
    """
    check_counts(config, counts)
    generator = torch.Generator().manual_seed(seed)
    subsets = []
    for layer, count in enumerate(counts):
        drawn_JN = torch.rand(num_groups, config.common_in_layer(layer), generator=generator)
        chosen_JN = select_pool(drawn_JN, torch.full((num_groups,), count - config.experts.shared))
        subsets.append(nn.functional.pad(chosen_JN, (0, config.experts.num_exclusive)))
    return tuple(subsets)


def cross_domain(subsets: Subsets, shift: int = 1) -> Subsets:
    """Control: each group gets the experts chosen for the group `shift` places after it, round the
    end.

    Raises:
        ValueError: a shift that gives groups their own experts.
    """
    num_groups = len(subsets[0])
    if shift % num_groups == 0:
        raise UserError(
            f"shift={shift} gives each of {num_groups} groups its own experts; use 1 to "
            f"{num_groups - 1}, with two groups "
            f"or more"
        )
    return tuple(mask_JN.roll(-shift, 0) for mask_JN in subsets)


def group_of_documents(batch: PackedBatch, document_group_U: Tensor) -> Tensor:
    """int64 [G]: the group of each document of a batch. Padding, which scores nothing, counts to
    that of document 0."""
    return document_group_U[batch.document_ids_G.clamp(min=0)]
