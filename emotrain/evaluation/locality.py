"""How local a checkpoint's choice of experts is: `emotrain locality`.

Held-out documents run through the model once, and caches of every size are counted on their choices
(`emotrain.modular.locality`). A few training documents say which experts a server would pin.

    static          the experts that all domains use most are pinned
    static_domain   those that the document's own domain uses most
    lru_cold        an LRU cache, empty at the start of each document
    lru_warm        one that the documents of the same domain before it have filled
    lru_mixed       one that serves a document of each domain in turn
    sch             the best that each segment of tokens can have (arXiv 2505.16056)

Y counts domains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emotrain.config import Config, ModelConfig
from emotrain.errors import UserError
from emotrain.evaluation.locality_tally import Order, Tally, curve, summary, tally_layer
from emotrain.evaluation.measure import choose_device, precision_on, rows_of
from emotrain.evaluation.perplexity import autocast, pack
from emotrain.evaluation.reading import DomainDocuments, read_domains
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.files import make_writable
from emotrain.model.router import RoutingRequest, training_request
from emotrain.model.transformer import Transformer
from emotrain.modular.locality import count_slots
from emotrain.progress import Track, untracked
from emotrain.training.checkpoint import find, load_model, load_state
from emotrain.training.checkpoint_folders import read_config

FORMAT = 1
"""Of locality.json."""


@dataclass(frozen=True)
class LocalitySettings:
    """What to measure."""

    cache: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Shares of a layer's routed experts that a cache holds. It holds at least those of a token."""
    segments: tuple[int, ...] = (16, 64)
    """Tokens of a segment, for SRP and SCH."""
    calibration_documents: int = 8
    """Training documents of a domain that say which experts are pinned."""
    documents: int = 16
    """Most held-out documents of a domain."""
    document_tokens: int = 1024
    """Tokens of a document that count, from its start; 0 for all."""
    domains: tuple[str, ...] = ()
    """Names of the domains; none means all of the data's."""
    pool: str = "none"
    """`none` as at inference, `trained` with pools drawn as in training."""

    def __post_init__(self) -> None:
        if not self.cache or not all(0 < share <= 1 for share in self.cache):
            raise UserError(
                f"cache={' '.join(f'{share:g}' for share in self.cache)}: a cache holds a share of "
                f"a layer's experts, above 0 and at most 1; give for example 0.25"
            )
        if not self.segments or min(self.segments) < 2:
            raise UserError(
                f"segments={' '.join(map(str, self.segments))}: a segment has 2 tokens or more; "
                f"give for example 16"
            )
        if self.pool not in ("none", "trained"):
            raise UserError(f"pool={self.pool} is not known; choose one of none, trained")
        self.reading()

    def reading(self) -> EvaluationSettings:
        """Which documents are read."""
        return EvaluationSettings(
            calibration_documents=self.calibration_documents,
            documents=self.documents,
            document_tokens=self.document_tokens,
            domains=self.domains,
        )


@dataclass(frozen=True)
class RoutedDocuments:
    """The choices of T tokens in the order of their documents, in every layer with routed
    experts."""

    experts: dict[int, np.ndarray]
    """For each of these layers, int16 [T, K]; N marks an empty slot."""
    document_T: np.ndarray
    """int64: the document of each token, ascending from 0."""


@dataclass(frozen=True)
class LocalityResult:
    """What `emotrain locality` writes of one model."""

    checkpoint: str
    step: int
    data: str
    settings: LocalitySettings
    routed_experts_per_layer: tuple[int, ...]
    experts_per_token: int
    """The most of a layer."""
    documents: dict[str, int]
    """Held-out documents of each domain."""
    tokens: dict[str, int]
    overall: dict[str, Any]
    """Of `summary`, as are the entries of `domains` and `layers`: mean over layers."""
    domains: dict[str, dict[str, Any]]
    layers: tuple[dict[str, Any], ...]
    curve: tuple[dict[str, Any], ...]
    """Of `cache_numbers`, for caches of every size: mean over layers."""
    pins: tuple[tuple[int, ...], ...]
    """For each layer of the model, how often the training documents chose each routed expert."""

    def to_json(self) -> dict[str, Any]:
        """For `emotrain.files.json_text`; without the pins, which are a file of their own."""
        values = {name: value for name, value in vars(self).items() if name != "pins"}
        return {"format": FORMAT, **values, "settings": dataclasses.asdict(self.settings)}


def measure_locality(
    checkpoint: str | Path,
    data: str | Path,
    settings: LocalitySettings,
    *,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
    out: Path | None = None,
) -> LocalityResult:
    """Measure how local the choices of a checkpoint are on held-out documents.

    Args:
        checkpoint: a checkpoint folder, or a run folder (then its newest), of a model that
            `check_models` takes.
        data: a folder written by `emotrain prepare`.
        micro_batch: rows of one forward pass; 0 means as in training.
        out: where results will be written, found out to be writable before the work.
    Raises:
        UserError: settings, a checkpoint or data that cannot be used.
    """
    rows_of(micro_batch, 1)
    folder, target = find(checkpoint), choose_device(device)
    domains = read_domains(data, read_config(folder), folder, settings.reading())
    if out is not None:
        make_writable(out)
    config, model = load_model(folder, target)
    layers = [i for i in range(config.model.num_layers) if config.model.routed_in_layer(i)]
    step = load_state(folder).step

    def route(documents: Sequence[np.ndarray]) -> RoutedDocuments:
        rows = rows_of(micro_batch, config.training.micro_batch)
        return route_documents(model, config, documents, settings.pool, step, rows, track)

    tallies, counts = tally(route, domains, config.model, settings)
    names = list(domains)
    over_domains = [sum(of_domains[1:], of_domains[0]) for of_domains in tallies]
    held_out = {name: domains[name].held_out for name in names}
    return LocalityResult(
        str(folder),
        step,
        str(data),
        settings,
        tuple(map(config.model.routed_in_layer, layers)),
        max(map(config.model.chosen_in_layer, layers)),
        {name: len(documents) for name, documents in held_out.items()},
        {name: sum(map(len, documents)) for name, documents in held_out.items()},
        summary(over_domains, config.model, layers, settings.cache),
        {
            name: summary([of[y] for of in tallies], config.model, layers, settings.cache)
            for y, name in enumerate(names)
        },
        tuple(
            {"layer": layer, **summary([of_layer], config.model, [layer], settings.cache)}
            for layer, of_layer in zip(layers, over_domains, strict=True)
        ),
        tuple(curve(over_domains, config.model, layers)),
        tuple(
            tuple(counts[i].tolist()) if i in counts else () for i in range(config.model.num_layers)
        ),
    )


@torch.inference_mode()
def route_documents(
    model: Transformer,
    config: Config,
    documents: Sequence[np.ndarray],
    pool: str,
    step: int,
    rows_per_batch: int,
    track: Track[Any] = untracked,
) -> RoutedDocuments:
    """Route documents, each as if it were alone. One that is longer than a row is routed in pieces,
    as in training, which follow one another.

    Args:
        documents: token ids of each.
        pool: of `LocalitySettings`.
        step: of the pools that are drawn as in training.
    """
    device = model.head.weight.device
    length = config.data.sequence_length
    cut = [
        (u, ids[i : i + length])
        for u, ids in enumerate(documents)
        for i in range(0, len(ids), length)
    ]
    pieces = [piece for _, piece in cut]
    row_length = min(length, max(map(len, pieces)))
    layers = [i for i in range(config.model.num_layers) if config.model.routed_in_layer(i)]
    parts: list[list[np.ndarray]] = [[] for _ in layers]
    piece_parts = []
    batches = pack(pieces, row_length, rows_per_batch, config.model.attention.document_mask)
    for batch in track(batches, "routing tokens"):
        batch = batch.to(device)
        request = RoutingRequest()
        if pool == "trained":
            request = training_request(config.model, batch, config.training.seed, step)
        with autocast(device, precision_on(config, device)):
            output = model(batch, dataclasses.replace(request, choices=True))
        piece_T = batch.document_ids_G[batch.document_T].cpu().numpy()
        real_T = piece_T >= 0
        piece_parts.append(piece_T[real_T])
        for part, statistics in zip(parts, output.routing.layers, strict=True):
            part.append(statistics.chosen_TK.cpu().numpy()[real_T].astype(np.int16))
    piece_T = np.concatenate(piece_parts)
    # Pieces lie where a row had room.
    order = np.argsort(piece_T, kind="stable")
    document_of_piece = np.array([u for u, _ in cut])
    return RoutedDocuments(
        {layer: np.concatenate(part)[order] for layer, part in zip(layers, parts, strict=True)},
        document_of_piece[piece_T[order]],
    )


def tally(
    route: Callable[[Sequence[np.ndarray]], RoutedDocuments],
    domains: Mapping[str, DomainDocuments],
    model: ModelConfig,
    settings: LocalitySettings,
) -> tuple[list[list[Tally]], dict[int, np.ndarray]]:
    """Count the choices of all layers with routed experts.

    Args:
        route: gives the choices of documents.
    Returns:
        for each of these layers a tally of each domain; and for each, by its number, the slots of
        each expert in the training documents, int64 [N].
    """
    pinning = route([ids for of in domains.values() for ids in of.calibration])
    routed = route([ids for of in domains.values() for ids in of.held_out])
    pinning_domain_U = np.repeat(
        np.arange(len(domains)), [len(of.calibration) for of in domains.values()]
    )
    per_domain = [len(of.held_out) for of in domains.values()]
    domain_U = np.repeat(np.arange(len(domains)), per_domain)
    # A document of each domain in turn.
    place_U = np.concatenate([np.arange(count) for count in per_domain])
    turn_U = np.empty(len(domain_U), np.int64)
    turn_U[np.lexsort((domain_U, place_U))] = np.arange(len(domain_U))
    order = Order(routed.document_T, domain_U, turn_U)
    tallies, counts = [], {}
    for layer, experts_TK in routed.experts.items():
        num_experts = model.routed_in_layer(layer)
        pinning_TK = pinning.experts[layer]
        counts_YN = np.stack(
            [
                count_slots(pinning_TK[pinning_domain_U[pinning.document_T] == y], num_experts)
                for y in range(len(domains))
            ]
        )
        counts[layer] = counts_YN.sum(0)
        tallies.append(tally_layer(experts_TK, num_experts, order, counts_YN, settings.segments))
    return tallies, counts


def logical_counts(result: LocalityResult) -> dict[str, Any]:
    """What SGLang's and ktransformers' `--init-expert-location` reads: slots of each routed expert
    in each layer of equally many, zeros in a layer without; see `check_models`."""
    width = max(map(len, result.pins))
    return {"logical_count": [list(pins) or [0] * width for pins in result.pins]}


def check_models(folders: Sequence[Path], pins: bool) -> None:
    """Refuse what cannot be measured before anything is loaded.

    Args:
        folders: checkpoints.
        pins: whether those of the first are exported.
    Raises:
        UserError: a dense model, or pins of layers with different numbers of experts.
    """
    for number, folder in enumerate(folders):
        model = read_config(folder).model
        widths = {model.routed_in_layer(layer) for layer in range(model.num_layers)} - {0}
        if not widths:
            raise UserError(f"{folder}: the model is dense and chooses no experts; give an MoE")
        if pins and number == 0 and len(widths) > 1:
            raise UserError(
                f"--export-pins: layers have {', '.join(map(str, sorted(widths)))} experts, and "
                f"the file has one number for all of them; leave it out for this model"
            )
