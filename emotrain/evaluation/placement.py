"""A placement of experts for a checkpoint, and what it saves: `emotrain placement`.

One pass over the sequences that training reads next, with pools drawn as training draws them. The
documents with even permanent ids place the experts. The others measure what the placement costs:
no document does both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emotrain.batch import PackedBatch
from emotrain.config import Config, ModelConfig
from emotrain.data.loader import Loader
from emotrain.data.opening import open_loader
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, precision_on
from emotrain.evaluation.perplexity import autocast
from emotrain.evaluation.reading import check_vocabulary
from emotrain.model.router import training_request
from emotrain.model.transformer import Transformer
from emotrain.modular.placement import (
    FORMAT,
    MAX_LOAD,
    TOKENS,
    contiguous,
    count_together,
    order_of,
    place,
    rank_sizes,
    traffic,
)
from emotrain.progress import Track, untracked
from emotrain.tables import Table
from emotrain.training.checkpoint import find, load_model, load_state


@dataclass(frozen=True)
class RoutedTokens:
    """The choices of T tokens in every layer with routed experts."""

    experts: dict[int, np.ndarray]
    """For each of these layers, int32 [T, K]: the routed experts of each token; N marks an
    empty slot."""
    document_ids_T: np.ndarray
    """int64: the permanent id of the document of each token."""
    batch_T: np.ndarray
    """int64: the micro-batch of each token, from 0."""


@dataclass(frozen=True)
class LayerPlacement:
    """The placement of one layer, and what it costs on documents that it was not computed from."""

    layer: int
    order: tuple[int, ...]
    """The routed experts of rank 0, then those of rank 1, …"""
    rows_per_token: float
    """Ranks that a token is sent to, its own included."""
    contiguous_rows_per_token: float
    """The same where neighbours in number share a rank."""
    load_max_over_mean: float
    """Slots of the fullest rank over the mean, of all tokens together."""
    contiguous_load_max_over_mean: float
    exchange_load_max_over_mean: float
    """The same of the tokens of one exchange (a micro-batch of each rank), mean over exchanges."""
    contiguous_exchange_load_max_over_mean: float


@dataclass(frozen=True)
class PlacementResult:
    """What `emotrain placement` writes. Rows are means over the layers, loads those of the worst
    layer."""

    checkpoint: str
    step: int
    data: str
    ep: int
    max_load: float
    micro_batch: int
    placing_tokens: int
    measured_tokens: int
    rows_per_token: float
    contiguous_rows_per_token: float
    rows_over_contiguous: float
    load_max_over_mean: float
    contiguous_load_max_over_mean: float
    exchange_load_max_over_mean: float
    contiguous_exchange_load_max_over_mean: float
    layers: tuple[LayerPlacement, ...]

    def to_json(self) -> dict[str, Any]:
        """For `emotrain.files.json_text`."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def table(self) -> Table:
        """One line a layer."""
        rows = [
            (
                str(layer.layer),
                f"{layer.rows_per_token:.2f}",
                f"{layer.contiguous_rows_per_token:.2f}",
                f"{layer.rows_per_token / layer.contiguous_rows_per_token:.2f}",
                f"{layer.load_max_over_mean:.2f}",
                f"{layer.exchange_load_max_over_mean:.2f}",
                f"{layer.contiguous_exchange_load_max_over_mean:.2f}",
            )
            for layer in self.layers
        ]
        return Table(
            f"Rows that a token is sent to over ep={self.ep}, and load of the fullest rank over "
            f"the mean, on documents that did not place the experts",
            (
                "layer",
                "rows",
                "contiguous",
                "ratio",
                "load",
                "load of an exchange",
                "contiguous",
            ),
            tuple(rows),
        )


def compute_placements(
    checkpoint: str | Path,
    data: str | Path,
    eps: Sequence[int],
    *,
    max_tokens: int = TOKENS,
    max_load: float = MAX_LOAD,
    micro_batch: int = 0,
    device: str = "auto",
    track: Track[Any] = untracked,
) -> list[PlacementResult]:
    """A placement for each number of ranks, from one pass over the data.

    Args:
        checkpoint: a checkpoint folder, or a run folder (then its newest).
        data: a folder written by `emotrain prepare`; its train split is read.
        max_tokens: tokens to route, both halves together.
        max_load: slots of the fullest rank over the mean that a placement may have.
        micro_batch: sequences of a rank in one exchange; 0 means as in training.
    Raises:
        UserError: arguments, a checkpoint or data that cannot be used.
    """
    if max_load < 1 or micro_batch < 0 or max_tokens < 1:
        raise UserError(
            f"max_load={max_load:g}, micro_batch={micro_batch}, tokens={max_tokens}: the fullest "
            f"rank has at least the mean, and the others are positive; give for example "
            f"{MAX_LOAD}, 1 and {TOKENS}"
        )
    folder, target = find(checkpoint), choose_device(device)
    config, model = load_model(folder, target)
    _check_ranks(config.model, eps)
    setup, step = config.training, load_state(folder).step
    loader = open_loader(
        data,
        config.data.sequence_length,
        setup.seed,
        cross_document_targets=config.data.cross_document_targets,
        verify_checksums=config.data.verify_checksums,
        packing=config.data.packing,
        span=config.model.router.pool.across_windows,
        tokenizer=config.data.tokenizer,
        raw=config.data.raw,
    )
    check_vocabulary(Path(data), loader.vocab_size, config, folder)
    rows = micro_batch or setup.micro_batch
    first = step * setup.global_batch
    sequences = min(-(-max_tokens // loader.sequence_length), loader.num_sequences)
    starts = range(first, first + sequences, rows)
    batches = [range(start, min(start + rows, first + sequences)) for start in starts]
    tokens = route_tokens(model, config, loader, batches, step, track)
    named = {"checkpoint": str(folder), "step": step, "data": str(data), "micro_batch": rows}
    return [
        place_and_measure(tokens, config.model, ep, max_load, named)
        for ep in track(eps, "placing experts")
    ]


@torch.inference_mode()
def route_tokens(
    model: Transformer,
    config: Config,
    loader: Loader,
    batches: Sequence[range],
    step: int,
    track: Track[Any] = untracked,
) -> RoutedTokens:
    """Route sequences as training does at a step.

    Args:
        batches: positions of the loader's order, for each micro-batch.
    """
    device = model.head.weight.device
    precision = precision_on(config, device)
    layers = [i for i in range(config.model.num_layers) if config.model.routed_in_layer(i)]
    parts: list[list[np.ndarray]] = [[] for _ in layers]
    documents = []
    for positions in track(batches, "routing tokens"):
        batch: PackedBatch = loader.batch(positions).to(device)
        request = training_request(config.model, batch, config.training.seed, step)
        with autocast(device, precision):
            output = model(batch, dataclasses.replace(request, choices=True))
        for part, statistics in zip(parts, output.routing.layers, strict=True):
            part.append(statistics.chosen_TK.cpu().numpy())
        documents.append(batch.document_ids_G[batch.document_T].cpu().numpy())
    return RoutedTokens(
        {layer: np.concatenate(part) for layer, part in zip(layers, parts, strict=True)},
        np.concatenate(documents),
        np.repeat(np.arange(len(documents)), [len(ids_T) for ids_T in documents]),
    )


def place_and_measure(
    tokens: RoutedTokens, model: ModelConfig, ep: int, max_load: float, named: dict[str, Any]
) -> PlacementResult:
    """Place the experts by half of the documents and measure on the others.

    Args:
        named: the fields of the result that say what was placed.
    Raises:
        UserError: one of the halves has no token.
    """
    places_T = tokens.document_ids_T % 2 == 0
    if places_T.all() or not places_T.any():
        raise UserError(
            f"{named['data']}: the {len(places_T):,} tokens are of one half of the documents; give "
            f"more --tokens or more data, so that one half places and the other measures"
        )
    # Layers that share a bank share its placement.
    together: dict[int, np.ndarray] = {}
    for layer, experts_TK in tokens.experts.items():
        counts = count_together(experts_TK[places_T], model.routed_in_layer(layer))
        bank = model.bank_of_layer(layer)
        together[bank] = together[bank] + counts if bank in together else counts
    rank_of_bank = {bank: place(counts, ep, max_load) for bank, counts in together.items()}
    exchange_T = tokens.batch_T[~places_T] // ep
    layers = tuple(
        _measure(
            layer, experts_TK[~places_T], exchange_T, rank_of_bank[model.bank_of_layer(layer)], ep
        )
        for layer, experts_TK in tokens.experts.items()
    )

    def mean(name: str) -> float:
        return float(np.mean([getattr(layer, name) for layer in layers]))

    rows: dict[str, Any] = {
        name: mean(name) for name in ("rows_per_token", "contiguous_rows_per_token")
    }
    loads: dict[str, Any] = {
        name: max(getattr(layer, name) for layer in layers)
        for name in (f.name for f in dataclasses.fields(LayerPlacement))
        if name.endswith("load_max_over_mean")
    }
    return PlacementResult(
        **named,
        ep=ep,
        max_load=max_load,
        placing_tokens=int(places_T.sum()),
        measured_tokens=int((~places_T).sum()),
        rows_over_contiguous=rows["rows_per_token"] / rows["contiguous_rows_per_token"],
        **rows,
        **loads,
        layers=layers,
    )


def _measure(
    layer: int, experts_TK: np.ndarray, exchange_T: np.ndarray, rank_N: np.ndarray, ep: int
) -> LayerPlacement:
    placed = traffic(experts_TK, rank_N, ep, exchange_T)
    before = traffic(experts_TK, contiguous(len(rank_N), ep), ep, exchange_T)
    return LayerPlacement(
        layer,
        tuple(order_of(rank_N).tolist()),
        placed.rows_per_token,
        before.rows_per_token,
        placed.load_max_over_mean,
        before.load_max_over_mean,
        placed.exchange_load_max_over_mean,
        before.exchange_load_max_over_mean,
    )


def _check_ranks(model: ModelConfig, eps: Sequence[int]) -> None:
    """Refuse a dense model, and numbers of ranks that nothing is placed on."""
    counts = {model.routed_in_layer(layer) for layer in range(model.num_layers)} - {0}
    if not counts:
        raise UserError(
            "the model is dense: it has no routed experts to place; use a model with "
            "model.experts.routed above 0"
        )
    for ep in eps:
        if ep < 2:
            raise UserError(f"ep={ep} spreads no experts; give 2 ranks or more")
        # A layer with more experts can leave a rank without any where one with fewer does not.
        for count in sorted(counts):
            rank_sizes(count, ep)
