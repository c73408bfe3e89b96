"""`emotrain explore`: documents and the experts of one or two models, as one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emotrain.analysis.labels import best_terms, count_words
from emotrain.analysis.spherical import principal_components, spherical_k_means, unit
from emotrain.data.document_clusters import DOCUMENT_COLUMNS, ClusterFile, read_columns
from emotrain.data.formats import Dataset
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, rows_of
from emotrain.evaluation.reading import check_vocabulary
from emotrain.explorer.documents import ShownDocuments, read_documents
from emotrain.explorer.experts import expert_pages
from emotrain.explorer.maps import map_labels, principal_map, umap_learn, umap_map
from emotrain.explorer.page import ModelView, build_page
from emotrain.explorer.routing import route, shown_layers
from emotrain.explorer.vocabulary import token_bytes
from emotrain.progress import Track, untracked
from emotrain.tables import short_names
from emotrain.training.checkpoint import find, load_model, load_state
from emotrain.training.checkpoint_folders import identity, read_config

MOST_DOCUMENTS = 50_000
"""A browser draws and filters so many at once."""
VARIANCE = 0.95
"""Share that the components keep by which documents are clustered (spec 9.1)."""
LABEL_WORDS = 3
"""Words of a label."""


@dataclass(frozen=True)
class ExploreSettings:
    """What a page shows."""

    split: str = "train"
    documents: int = 12_000
    """The most."""
    document_tokens: int = 128
    """Tokens of a document, from its start: those that are routed, shown and searched. There are
    at most as many as the models read at once; 0 means so many."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers; none means four, spread evenly."""
    clusters: int = 32
    """The most, where no file has them."""
    umap: bool = False
    """Whether there is a second map, by UMAP."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.documents <= MOST_DOCUMENTS:
            raise UserError(
                f"documents={self.documents}: a page shows 2 to {MOST_DOCUMENTS} documents"
            )
        if self.document_tokens < 0:
            raise UserError(
                f"document_tokens={self.document_tokens}: give 1 or more, or 0 for as many as the "
                f"model reads"
            )
        if self.clusters < 1:
            raise UserError(f"clusters={self.clusters}: there is 1 cluster or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is not in 0 to 2^32 - 1; give for example 0")


@dataclass(frozen=True)
class Explored:
    """A page and what is on it."""

    page: bytes
    result: dict[str, Any]
    """For `emotrain.files.json_text`."""


def explore(
    checkpoints: Sequence[str | Path],
    data: str | Path,
    settings: ExploreSettings,
    *,
    clusters: Sequence[str | Path] = (),
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
) -> Explored:
    """Make the page of one or two models on the same documents. The same arguments give the same
    bytes on one machine.

    Args:
        checkpoints: checkpoint folders, or run folders (then their newest).
        data: a folder written by `emotrain prepare`, with the tokenizer of the models.
        clusters: for each model the clusters.parquet that `emotrain cluster` wrote of it, about the
            same documents; none means that documents are clustered here.
        micro_batch: rows of one forward pass; 0 means as in training.
    Raises:
        UserError: settings, checkpoints, files or data that cannot be used, or not together.
    """
    rows_of(micro_batch, 1)
    if settings.umap:
        umap_learn()  # is it there? before any work
    folders, target = [find(checkpoint) for checkpoint in checkpoints], choose_device(device)
    configs = [read_config(folder) for folder in folders]
    dataset = Dataset(data, verify_checksums=configs[0].data.verify_checksums)
    for config, folder in zip(configs, folders, strict=True):
        check_vocabulary(dataset.path, dataset.vocab_size, config, folder)
        shown_layers(config.model, settings.layers)
    most = min(config.data.sequence_length for config in configs)
    document_tokens = min(settings.document_tokens or most, most)
    files = [read_columns(Path(path), DOCUMENT_COLUMNS) for path in clusters]
    split, ids = _clustered_documents(dataset, files, folders, settings.split)
    documents = read_documents(dataset, split, settings.documents, document_tokens, ids)
    words = token_bytes(dataset.tokenizer())
    label = label_groups_by(documents, words)
    names = short_names(checkpoints)
    views = [
        _view(
            names[m],
            folder,
            documents,
            files[m] if files else None,
            settings,
            label,
            target,
            micro_batch,
            track,
        )
        for m, folder in enumerate(folders)
    ]
    notes = {"pca": "principal components of routing"}
    if settings.umap:
        notes["umap"] = "UMAP of routing"
    about = (
        f"{len(documents.tokens):,} {split} documents of {data}, the first "
        f"{document_tokens} tokens of each. " + " ".join(view.about for view in views)
    )
    page = build_page(documents, words, views, notes, about)
    result = {
        "documents": len(documents.tokens),
        "document_tokens": document_tokens,
        "tokens": int(documents.start_U[-1]),
        "domains": len(documents.domains),
        "models": [
            {
                "name": view.name,
                "checkpoint": str(folder),
                "layers": list(view.routing.layers),
                "routed_experts_per_layer": view.routing.num_experts(),
                "clusters": len(view.clusters),
            }
            for view, folder in zip(views, folders, strict=True)
        ],
        "size_mib": len(page) / 2**20,
    }
    return Explored(page, result)


def label_groups_by(
    documents: ShownDocuments, words: Sequence[bytes]
) -> Callable[[np.ndarray, int], list[str]]:
    """What gives labels to groups of documents: the words that tell them from the other groups, by
    class-wise TF-IDF. Its arguments are those of `map_labels`."""
    texts = [b"".join(words[i] for i in ids).decode(errors="ignore") for ids in documents.tokens]
    counts_UX, terms = count_words(texts)

    def label(group_U: np.ndarray, num_groups: int) -> list[str]:
        counts_YX = np.stack(
            [np.asarray(counts_UX[group_U == y].sum(0)).reshape(-1) for y in range(num_groups)]
        )
        best = best_terms(counts_YX, terms, LABEL_WORDS)
        return [" ".join(term for term, _ in of_group) for of_group in best]

    return label


def _clustered_documents(
    dataset: Dataset, files: Sequence[ClusterFile], folders: Sequence[Path], split: str
) -> tuple[str, np.ndarray | None]:
    """The split and the ids of the documents that the files of clusters are about; without files
    the split asked for, and None.

    Raises:
        UserError: files of other documents or models.
    """
    if not files:
        return split, None
    if len(files) != len(folders):
        raise UserError(
            f"--clusters: {len(files)} files for {len(folders)} models; give one for each, in the "
            f"order of the models, or none"
        )
    for file, folder in zip(files, folders, strict=True):
        origin = file.origin
        if origin.checkpoint_fingerprint != identity(folder):
            raise UserError(
                f"--clusters: the clusters of {origin.checkpoint} are not of {folder}; run "
                f"`emotrain cluster` on it, or leave --clusters out"
            )
        if origin.fingerprint != dataset.fingerprint(origin.split):
            raise UserError(
                f"--clusters: the clusters are about other documents than {dataset.path} has; give "
                f"--data {origin.data}, or leave --clusters out"
            )
        if (number := int(file.columns["cluster"].max(initial=0))) >= MOST_DOCUMENTS:
            raise UserError(
                f"--clusters: a page shows at most {MOST_DOCUMENTS} clusters, and one has the "
                f"number {number}; run `emotrain cluster` again"
            )
        if origin.split != files[0].origin.split or not np.array_equal(
            file.columns["index"], files[0].columns["index"]
        ):
            raise UserError(
                "--clusters: the files are about different documents; run `emotrain cluster` on "
                "both models with the same options"
            )
    return files[0].origin.split, files[0].columns["index"]


def _clusters(
    unit_UP: np.ndarray, documents: ShownDocuments, file: ClusterFile | None, most: int, seed: int
) -> np.ndarray:
    """The cluster of each document, int64 [U]: those of a file, or by k-means of routing."""
    if file is not None:
        places = np.searchsorted(file.columns["index"], documents.id_U)
        return file.columns["cluster"][places].astype(np.int64)
    few = min(most, len(unit_UP) - 1)
    if few < 2:
        return np.zeros(len(unit_UP), np.int64)
    found = spherical_k_means(unit_UP, few, seed, torch.device("cpu"))
    return found.cluster_T.astype(np.int64)


def _view(
    name: str,
    folder: Path,
    documents: ShownDocuments,
    file: ClusterFile | None,
    settings: ExploreSettings,
    label: Callable[[np.ndarray, int], list[str]],
    device: torch.device,
    micro_batch: int,
    track: Track[Any],
) -> ModelView:
    """Route the documents through a model and put together what the page shows of it."""
    config, model = load_model(folder, device)
    routing = route(
        model,
        config,
        documents.tokens,
        shown_layers(config.model, settings.layers),
        rows_of(micro_batch, config.training.micro_batch),
        track,
    )
    features_UX = np.concatenate(routing.mean, axis=1)
    components_UP = principal_components(features_UX, VARIANCE, torch.device("cpu")).of(features_UX)
    unit_UP = unit(components_UP).numpy()
    cluster_U = _clusters(unit_UP, documents, file, settings.clusters, settings.seed)
    clusters = label(cluster_U, int(cluster_U.max()) + 1)
    maps = {"pca": principal_map(components_UP.numpy())}
    if settings.umap:
        maps["umap"] = umap_map(unit_UP, settings.seed)
    return ModelView(
        name,
        f"{name}: step {load_state(folder).step} of {folder}.",
        routing,
        cluster_U,
        clusters,
        [
            expert_pages(documents, routing, place, cluster_U)
            for place in range(len(routing.layers))
        ],
        maps,
        {of: map_labels(points_U2, cluster_U, clusters, label) for of, points_U2 in maps.items()},
    )
