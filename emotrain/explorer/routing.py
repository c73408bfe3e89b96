"""One pass of documents through a model: what the page shows of its routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from emotrain.batch import PackedBatch
from emotrain.config import Config, ModelConfig
from emotrain.errors import UserError
from emotrain.evaluation.measure import precision_on
from emotrain.evaluation.perplexity import autocast, pack
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Transformer
from emotrain.progress import Track, untracked

SHOWN_LAYERS = 4
"""Layers of a page where none are named."""


@dataclass(frozen=True)
class DocumentRouting:
    """The routing of U documents, T tokens in all, in some layers of a model."""

    layers: tuple[int, ...]
    mean: tuple[np.ndarray, ...]
    """For each layer float32 [U, N]: mean routing probability over a document's tokens. They sum to
    1, also where gates do not."""
    first: tuple[np.ndarray, ...]
    """For each layer uint16 [T]: the expert of the largest weight of each token, documents one
    after the other; N where a token has none."""
    router: tuple[np.ndarray, ...]
    """For each layer float32 [N, D]: the router's rows of the routed experts."""

    def num_experts(self) -> list[int]:
        return [mean_UN.shape[1] for mean_UN in self.mean]


def shown_layers(model: ModelConfig, asked: Sequence[int] = ()) -> tuple[int, ...]:
    """The layers that a page shows: those asked for, or four spread evenly over those with routed
    experts.

    Raises:
        UserError: a dense model, or a layer that it has not or that has no routed experts.
    """
    routed = [layer for layer in range(model.num_layers) if model.routed_in_layer(layer)]
    if not routed:
        raise UserError("the model is dense and chooses no experts; give an MoE")
    if unknown := sorted(set(asked) - set(routed)):
        raise UserError(
            f"--layers {unknown[0]}: is not a layer with routed experts; they are "
            f"{', '.join(map(str, routed))}"
        )
    places = np.linspace(0, len(routed) - 1, min(SHOWN_LAYERS, len(routed))).round().astype(int)
    return tuple(sorted(set(asked))) or tuple(routed[place] for place in places)


@torch.inference_mode()
def route(
    model: Transformer,
    config: Config,
    documents: Sequence[np.ndarray],
    layers: Sequence[int],
    rows_per_batch: int,
    track: Track[Any] = untracked,
) -> DocumentRouting:
    """Route documents without document pools, as at inference (spec 2.5).

    Args:
        documents: token ids of each, at most a row of the model.
        layers: with routed experts.
        rows_per_batch: rows of one forward pass.
    Raises:
        UserError: the model has diverged.
    """
    device = model.head.weight.device
    lengths_U = np.array([len(ids) for ids in documents])
    start_U = np.cumsum(lengths_U) - lengths_U
    with_experts = [i for i in range(config.model.num_layers) if config.model.routed_in_layer(i)]
    places = [with_experts.index(layer) for layer in layers]
    widths = [config.model.routed_in_layer(layer) for layer in layers]
    sums = [torch.zeros(len(documents), width, device=device) for width in widths]
    first = [np.zeros(lengths_U.sum(), np.uint16) for _ in layers]
    row_length = min(config.data.sequence_length, int(lengths_U.max()))
    mask = config.model.attention.document_mask
    for batch in track(pack(documents, row_length, rows_per_batch, mask), "routing documents"):
        real_T, place_T = _places(batch, start_U)
        batch = batch.to(device)
        with autocast(device, precision_on(config, device)):
            output = model(batch, RoutingRequest(details=True))
        # Padding has no probabilities: adding it to document 0 adds zeros.
        document_G = batch.document_ids_G.clamp(min=0)
        for sum_UN, first_T, place in zip(sums, first, places, strict=True):
            details = output.routing.layers[place].details
            assert details is not None
            sum_UN.index_add_(0, document_G, details.document_scores_GN.float())
            first_T[place_T] = details.experts_TK[:, 0].cpu().numpy()[real_T]
    mean = tuple((sum_UN / sum_UN.sum(1, keepdim=True)).cpu().numpy() for sum_UN in sums)
    if not all(np.isfinite(mean_UN).all() for mean_UN in mean):
        raise UserError(
            "the routing probabilities are not finite: the model has diverged; give an earlier "
            "checkpoint"
        )
    return DocumentRouting(
        tuple(layers),
        mean,
        tuple(first),
        tuple(_router_rows(model, layer) for layer in layers),
    )


def _places(batch: PackedBatch, start_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of a batch are not padding, bool [T], and the place of each of these where all
    documents follow one another."""
    document_T = batch.document_T.numpy()
    begins = np.flatnonzero(np.diff(document_T, prepend=-1))
    within_T = np.arange(len(document_T)) - np.repeat(
        begins, np.diff(begins, append=len(document_T))
    )
    id_T = batch.document_ids_G.numpy()[document_T]
    real_T = id_T >= 0
    return real_T, start_U[id_T[real_T]] + within_T[real_T]


def _router_rows(model: Transformer, layer: int) -> np.ndarray:
    router = model.blocks[layer].moe.router
    assert router is not None, "a layer with routed experts has a router"
    return router.weight_ED[: router.num_routed].float().cpu().numpy()
