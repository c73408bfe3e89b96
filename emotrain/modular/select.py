"""Which experts a domain keeps: a few of its documents in, a subset of each layer's experts out
(spec 7.3).

A subset is a bool mask over routed experts, one a layer; shared experts always stay. Every function
here works on all groups of documents (domains) at once: since `Transformer.forward` takes a mask
for each document, one pass serves them all. Two letters besides those of the package:

    U  documents of a data set, numbered by the `document_ids_G` of its batches
    J  groups of documents, here domains
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig
from emotrain.errors import UserError
from emotrain.model.router import RoutingRequest, select_pool, sum_by_document
from emotrain.model.transformer import Transformer
from emotrain.progress import Track, untracked

Subsets = tuple[Tensor, ...]
"""For each layer, bool [J, N]: the routed experts that each group keeps."""


def experts_kept(config: ModelConfig, fraction: float) -> tuple[int, ...]:
    """Experts that a layer keeps, for each layer, shared ones included: the fraction of its
    experts, rounded.

    Never fewer than the shared experts and one routed one. Layers without routed experts stay as
    they are.

    Raises:
        ValueError: a fraction outside (0, 1], or a dense model.
    """
    if not 0 < fraction <= 1:
        raise UserError(
            f"keep={fraction:g} is not a share of the experts; give numbers above 0 and up to 1, "
            f"for example 0.25"
        )
    shared, all_experts = (
        config.experts.shared,
        [config.experts_in_layer(layer) for layer in range(config.num_layers)],
    )
    if all(count == shared for count in all_experts):
        raise UserError(
            "the model is dense: it has no routed experts to choose from; use a model with "
            "model.experts.routed above 0"
        )
    return tuple(
        count if count == shared else max(shared + 1, round(fraction * count))
        for count in all_experts
    )


@torch.no_grad()
def greedy_select(
    model: Transformer,
    batches: Sequence[PackedBatch],
    document_group_U: Tensor,
    num_groups: int,
    counts: Sequence[int],
    track: Track[PackedBatch] = untracked,
) -> Subsets:
    """The published selection: layer by layer, keep the experts that a group's tokens give the most
    routing probability.

    While a layer is ranked, the layers below it already run with the experts that each group keeps,
    so that it is ranked on the hidden states it will see. Ties go to the lower index.

    Args:
        batches: calibration documents; padding is left out of the scores.
        document_group_U: int64, the group of each document.
        counts: for each layer, experts to keep, shared ones included (`experts_kept`).
        track: shows progress.
    Raises:
        ValueError: counts that the model cannot keep, or a group without tokens.
    """
    check_counts(model.config, counts)
    device, shared = model.head.weight.device, model.config.experts.shared
    subsets: list[Tensor] = []
    for layer, count in enumerate(counts):
        chosen_JN = torch.ones(
            num_groups, model.config.routed_in_layer(layer), dtype=torch.bool, device=device
        )
        if count < model.config.experts_in_layer(layer):
            tracked = track(batches, f"ranking experts of layer {layer + 1}/{len(counts)}")
            probability_JN = mean_routing(model, tracked, document_group_U, (*subsets, chosen_JN))
            chosen_JN = select_pool(
                probability_JN, torch.full((num_groups,), count - shared, device=device)
            )
        subsets.append(chosen_JN)
    return tuple(subsets)


@torch.no_grad()
def mean_routing(
    model: Transformer, batches: Iterable[PackedBatch], document_group_U: Tensor, subsets: Subsets
) -> Tensor:
    """Mean routing probability of each group's tokens in the layer of the last mask -> float64 [J,
    N].

    Only as many layers run as there are masks.

    Raises:
        ValueError: a group without tokens.
    """
    device = subsets[-1].device
    document_group_U = document_group_U.to(device)
    score_JN = torch.zeros(subsets[-1].shape, dtype=torch.float64, device=device)
    tokens_J1 = torch.zeros(len(score_JN), 1, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        group_G = group_of_documents(batch, document_group_U)
        routing = model(
            batch,
            RoutingRequest(kept=[mask_JN[group_G] for mask_JN in subsets], details=True),
            num_layers=len(subsets),
        ).routing
        # Padding scores nothing already; its tokens must not count either.
        tokens_G1 = (routing.document_tokens_G * routing.real_G)[:, None].double()
        score_JN += sum_by_document(
            routing.layers[-1].details.document_scores_GN.double(), group_G, len(score_JN)
        )
        tokens_J1 += sum_by_document(tokens_G1, group_G, len(score_JN))
    empty = (tokens_J1[:, 0] == 0).nonzero()[:, 0].tolist()
    if empty:
        raise UserError(
            f"group {empty[0]} has no calibration tokens; give at least one document of each group"
        )
    return score_JN / tokens_J1


def random_select(
    config: ModelConfig, num_groups: int, counts: Sequence[int], seed: int
) -> Subsets:
    """Control: for each group and layer a subset drawn uniformly, on the CPU. Of one seed, the
    smaller lies in the larger.

    Raises:
        ValueError: counts that the model cannot keep.
    """
    check_counts(config, counts)
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        select_pool(
            torch.rand(num_groups, config.routed_in_layer(layer), generator=generator),
            torch.full((num_groups,), count - config.experts.shared),
        )
        for layer, count in enumerate(counts)
    )


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


def check_counts(config: ModelConfig, counts: Sequence[int]) -> None:
    """Refuse counts of kept experts (shared ones included) that the model cannot have."""
    if len(counts) != config.num_layers:
        raise UserError(
            f"{len(counts)} counts of kept experts for {config.num_layers} layers; give one a layer"
        )
    for layer, count in enumerate(counts):
        most = config.experts_in_layer(layer)
        least = min(most, config.experts.shared + 1)
        if not least <= count <= most:
            raise UserError(
                f"layer {layer} cannot keep {count} of its {most} experts; keep {least} to {most}, "
                f"which counts "
                f"{config.experts.shared} shared"
            )
