"""Groups of documents and of tokens that a model gives the same experts: `emotrain cluster`.

As published (spec 9.1): routing probabilities of the first tokens of many documents → principal
components with 95 % of the variance → unit vectors → spherical k-means. Once of tokens, and once of
documents, which are the mean of their tokens. Then: what are these groups? The domains of the
documents, which the model was never told, or the surface of the text: which token it is?
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.analysis.agreement import SURFACES, contingency, main_script, numbered
from emotrain.analysis.labels import Texts
from emotrain.analysis.levels import Level, find_level, nearest_rows
from emotrain.analysis.routing import document_means, routed_layers, token_probabilities
from emotrain.analysis.spherical import scikit_learn
from emotrain.config import Config
from emotrain.data.document_clusters import Origin
from emotrain.data.formats import Dataset
from emotrain.data.manifest import TOKENIZER
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, rows_of
from emotrain.evaluation.reading import check_vocabulary
from emotrain.progress import Track, untracked
from emotrain.training.checkpoint import find, load_model, load_state
from emotrain.training.checkpoint_folders import identity, read_config

log = logging.getLogger("emotrain")

FORMAT = 1
"""Of cluster.json."""
SHORTEST = 32
"""Tokens of a document that counts (spec 9.1, step 2)."""
TERMS = 10
"""Of each cluster that are named."""

Labels = dict[str, tuple[np.ndarray, np.ndarray]]
"""Known labels by their name, and the same shuffled."""


@dataclass(frozen=True)
class ClusterSettings:
    """What to cluster."""

    clusters: int = 32
    documents: int = 12_000
    """Most documents."""
    document_tokens: int = 100
    """Tokens of a document that count, from its start; 0 for all. The model sees no others."""
    split: str = "train"
    layers: tuple[int, ...] = ()
    """Numbers of the layers whose routing counts; none means all with routed experts."""
    seed: int = 0
    """Of k-means, of samples and of shuffled labels."""

    def __post_init__(self) -> None:
        if self.clusters < 2:
            raise UserError(f"clusters={self.clusters} tells nothing apart; give 2 or more")
        if self.documents <= self.clusters:
            raise UserError(
                f"documents={self.documents} are too few for {self.clusters} clusters; give more "
                f"documents than clusters"
            )
        if self.document_tokens < 0 or self.document_tokens in range(1, SHORTEST):
            raise UserError(
                f"document_tokens={self.document_tokens} is too few; give {SHORTEST} or more, or 0 "
                f"for whole documents"
            )
        if self.split not in ("train", "valid"):
            raise UserError(f"split={self.split} is not known; choose one of train, valid")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is not in 0 to 2^32 - 1; give for example 0")


@dataclass(frozen=True)
class Sample:
    """The documents that are clustered, in the order of the data set."""

    index_U: np.ndarray
    """int64: their ids."""
    tokens: Sequence[np.ndarray]
    """Token ids of each that are read."""
    length_U: np.ndarray
    """int64: tokens of the whole document."""
    domain_U: np.ndarray
    """int64: the domain of each, by its number in `domains`."""
    domains: list[str]
    too_short: int
    """Documents that were passed over."""

    @property
    def document_T(self) -> np.ndarray:
        """int64: the place of each token's document in the sample."""
        return np.repeat(np.arange(len(self.tokens)), self.tokens_U)

    @property
    def token_T(self) -> np.ndarray:
        """int64: ids."""
        return np.concatenate(self.tokens).astype(np.int64)

    @property
    def tokens_U(self) -> np.ndarray:
        return np.array(list(map(len, self.tokens)))


@dataclass(frozen=True)
class ClusterResult:
    """What `emotrain cluster` writes."""

    origin: Origin
    settings: ClusterSettings
    sample: Sample
    token: Level
    document: Level

    def to_json(self) -> dict[str, Any]:
        """For `emotrain.files.json_text`. The first numbers are of the clusters of tokens, which
        have both kinds of labels; those of documents say so."""
        of_tokens, of_documents = (
            level.numbers["agreement"] for level in (self.token, self.document)
        )
        keys = ("nmi", "ami", "nmi_shuffled", "purity")
        return {
            "format": FORMAT,
            **{f"domain_{key}": of_tokens["domain"][key] for key in keys},
            **{f"token_identity_{key}": of_tokens["token_identity"][key] for key in keys},
            **{f"document_domain_{key}": of_documents["domain"][key] for key in keys},
            **dataclasses.asdict(self.origin),
            "settings": dataclasses.asdict(self.settings),
            "documents": len(self.sample.tokens),
            "documents_too_short": self.sample.too_short,
            "tokens": int(self.sample.tokens_U.sum()),
            "documents_per_domain": dict(
                zip(self.sample.domains, np.bincount(self.sample.domain_U).tolist(), strict=True)
            ),
            "levels": {"token": self.token.to_json(), "document": self.document.to_json()},
        }


def cluster(
    checkpoint: str | Path,
    data: str | Path,
    settings: ClusterSettings,
    folder: Path,
    *,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
) -> ClusterResult:
    """Cluster documents of a data set, and their tokens, by the routing of a checkpoint.

    Args:
        checkpoint: a checkpoint folder, or a run folder (then its newest).
        data: a folder written by `emotrain prepare`.
        folder: where scratch files lie meanwhile: two bytes for each token and expert of a layer,
            and at most twice that for principal components.
        micro_batch: rows of one forward pass; 0 means as in training.
    Raises:
        UserError: a checkpoint, data or settings that cannot be used. MissingPackageError:
        scikit-learn is not installed. WriteError: no room in `folder`.
    """
    scikit_learn()  # is it there? before any work
    checkpoint_folder, target = find(checkpoint), choose_device(device)
    config = read_config(checkpoint_folder)
    layers = _layers(config, settings, checkpoint_folder)
    rows = rows_of(micro_batch, config.training.micro_batch)
    dataset = Dataset(data, verify_checksums=config.data.verify_checksums)
    check_vocabulary(dataset.path, dataset.vocab_size, config, checkpoint_folder)
    sample = _read(dataset, settings)
    _, model = load_model(checkpoint_folder, target)
    routed_TX = token_probabilities(model, config, sample.tokens, layers, rows, folder, track)
    del model
    columns = [(i, n) for i in layers for n in range(config.model.routed_in_layer(i))]
    texts = _texts(dataset, sample)
    by_token, by_document = _labels(sample, texts, settings.seed)
    tasks = [
        ("document", document_means(routed_TX, sample.document_T), by_document),
        ("token", routed_TX, by_token),
    ]
    levels = {
        name: find_level(
            rows_TX,
            columns,
            labels,
            sample.domains,
            settings.clusters,
            settings.seed,
            folder,
            target,
        )
        for name, rows_TX, labels in track(tasks, "clusters of documents, then of tokens")
    }
    return ClusterResult(
        Origin(
            str(dataset.path.resolve()),
            settings.split,
            dataset.fingerprint(settings.split),
            str(checkpoint_folder),
            identity(checkpoint_folder),
            load_state(checkpoint_folder).step,
        ),
        dataclasses.replace(settings, layers=tuple(layers)),
        sample,
        token=_described(levels["token"], "token", sample, texts),
        document=_described(levels["document"], "document", sample, texts),
    )


def _layers(config: Config, settings: ClusterSettings, checkpoint: Path) -> list[int]:
    """Those asked for, ascending, each once.

    Raises:
        UserError: one that the model lacks, or a dense one.
    """
    routed = routed_layers(config)
    if not routed:
        raise UserError(f"{checkpoint}: the model is dense and routes nothing; give an MoE")
    if unknown := sorted(set(settings.layers) - set(routed)):
        raise UserError(
            f"layers={unknown[0]}: is no layer with routed experts; those are "
            f"{', '.join(map(str, routed))}"
        )
    return sorted(set(settings.layers)) or routed


def _read(dataset: Dataset, settings: ClusterSettings) -> Sample:
    """The first documents of the split, which `prepare` shuffled; too short ones are passed over.

    Raises:
        UserError: not more documents than clusters.
    """
    too_short = 0

    def long_enough() -> Any:
        nonlocal too_short
        for number, ids, domain in dataset.documents(settings.split):
            if len(ids) < SHORTEST:
                too_short += 1
            else:
                # A copy: the shard need not stay in memory for it.
                yield number, ids[: settings.document_tokens or None].copy(), len(ids), domain

    found = list(islice(long_enough(), settings.documents))
    if len(found) <= settings.clusters:
        raise UserError(
            f"{dataset.path}: has {len(found)} {settings.split} documents of {SHORTEST} tokens or "
            f"more, which are too few for {settings.clusters} clusters; lower --clusters, or "
            f"prepare more of them"
        )
    index, tokens, lengths, names = zip(*found, strict=True)
    domain_U, domains = numbered(names)
    return Sample(np.array(index), tokens, np.array(lengths), domain_U, domains, too_short)


def _texts(dataset: Dataset, sample: Sample) -> Texts | None:
    if (dataset.path / TOKENIZER).is_file():
        return Texts.read(dataset.tokenizer(), dataset.vocab_size, sample.tokens)
    log.warning(
        "%s has no %s: clusters get no words, and are compared with no script and no length of "
        "tokens; put the tokenizer there",
        dataset.path,
        TOKENIZER,
    )
    return None


def _labels(sample: Sample, texts: Texts | None, seed: int) -> tuple[Labels, Labels]:
    """What is known of each token, and of each document."""
    random = np.random.default_rng(seed)
    document_T, token_T = sample.document_T, sample.token_T
    # All tokens of a document have one domain, also when domains are shuffled.
    domain_U, other_U = sample.domain_U, random.permutation(sample.domain_U)
    other_T = random.permutation(token_T)
    length_U = np.log2(sample.length_U).astype(np.int64)
    by_token = {
        "domain": (domain_U[document_T], other_U[document_T]),
        "token_identity": (token_T, other_T),
    }
    by_document = {
        "domain": (domain_U, other_U),
        "length": (length_U, random.permutation(length_U)),
    }
    if texts is not None:
        for name, label_of in SURFACES.items():
            label_V, names = numbered(list(map(label_of, texts.tokens)))
            by_token[name] = label_V[token_T], label_V[other_T]
            if name == "script":
                script_U = main_script(label_V[token_T], names, document_T)
                by_document[name] = script_U, random.permutation(script_U)
    return by_token, by_document


def _described(level: Level, name: str, sample: Sample, texts: Texts | None) -> Level:
    """The level with the words, the tokens and the nearest rows of each cluster."""
    cluster_X, document_T = level.clusters.cluster_T, sample.document_T
    of_tokens = name == "token"
    terms: dict[str, Any] = {}
    if texts is not None:
        # A document with few of its tokens in a cluster gives it little of its words.
        row_of_U = document_T if of_tokens else np.arange(len(cluster_X))
        counts_YU = contingency(cluster_X, row_of_U)
        terms["words"] = texts.words_of(counts_YU / counts_YU.sum(0), TERMS)
        if of_tokens:
            terms["tokens"] = texts.tokens_of(contingency(cluster_X, sample.token_T), TERMS)
    first_U = np.cumsum(sample.tokens_U) - sample.tokens_U

    def named(row: int) -> int | list[int]:
        u = document_T[row] if of_tokens else row
        index = int(sample.index_U[u])
        return [index, int(row - first_U[u])] if of_tokens else index

    return dataclasses.replace(
        level,
        by_cluster=tuple(
            {
                **of,
                **{kind: of_each[y] for kind, of_each in terms.items()},
                "nearest": list(map(named, rows)),
            }
            for y, (of, rows) in enumerate(
                zip(level.by_cluster, nearest_rows(level.clusters), strict=True)
            )
        ),
    )
