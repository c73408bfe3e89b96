"""Which experts documents and domains use: `emotrain coverage` (spec 9.3).

Held-out documents run through the model once, without pools, as at inference. All that is measured
comes from two tables a layer, one line a document:

    slots         tokens that chose each expert: what experts compute
    probability   routing probability, summed over tokens: what pools and subsets are chosen by

From them: how many experts a document and a domain use; how alike the routing of two domains is;
how far the experts that they would choose for themselves overlap, against chance and against what
two halves of one domain have in common; and which experts are in the pools of the same documents
(`emotrain.analysis.together`).

Domains are in one order everywhere, those of the fewest experts a document first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emotrain.analysis.coverage_numbers import (
    DocumentRouting,
    SubsetOverlap,
    Together,
    Use,
    choose_experts,
    subset_overlap,
    together_of,
    use_of_domains,
)
from emotrain.batch import PackedBatch
from emotrain.config import Config, ModelConfig
from emotrain.errors import UserError
from emotrain.evaluation.measure import group_of_each, precision_on, rows_of
from emotrain.evaluation.perplexity import autocast, pack_groups
from emotrain.evaluation.reading import read_held_out
from emotrain.evaluation.routing import (
    cosine_table,
    entropy_nats,
    mean_of_pairs,
    shares,
    sum_by_group,
)
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Transformer
from emotrain.modular.counts import experts_kept
from emotrain.modular.select import allowed_experts
from emotrain.progress import Track, untracked
from emotrain.training.checkpoint import load_model, load_state

FORMAT = 1
"""Of coverage.json."""


@dataclass(frozen=True)
class CoverageSettings:
    """What to measure."""

    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    """Shares of each layer's experts that a domain chooses for itself, shared ones included."""
    pool: float = 0.25
    """The same share of a document's pool, for experts that go together."""
    documents: int = 64
    """Most held-out documents of a domain."""
    document_tokens: int = 1024
    """Tokens of a document that count, from its start; 0 means all."""
    domains: tuple[str, ...] = ()
    """Names of the domains; none means all of the data's."""

    def __post_init__(self) -> None:
        if not self.keep:
            raise UserError("keep is empty; give at least one share of experts, for example 0.25")
        if self.documents < 1:
            raise UserError(f"documents={self.documents} leaves nothing to measure; give 1 or more")
        if self.document_tokens < 0 or self.document_tokens == 1:
            raise UserError(
                f"document_tokens={self.document_tokens} leaves no text; give at least 2, or 0 for "
                f"whole documents"
            )

    def check(self, model: ModelConfig) -> None:
        """Refuse a dense model, and shares that are none.

        Raises:
            UserError: one of these.
        """
        for fraction in (*self.keep, self.pool):
            experts_kept(model, fraction)


@dataclass(frozen=True)
class PackedDomains:
    """The documents of all domains, read once for any number of checkpoints."""

    names: tuple[str, ...]
    batches: Sequence[PackedBatch]
    group_U: Tensor
    """int64: the domain of each document, ascending."""
    tokens: tuple[int, ...]
    """Of each domain."""
    fingerprint: str
    """sha256 over the domains and the token ids."""


@dataclass(frozen=True)
class Coverage:
    """What was measured of one checkpoint."""

    checkpoint: str
    step: int
    data: str
    settings: CoverageSettings
    layers: tuple[int, ...]
    """Those with routed experts; the L of all arrays."""
    routed_experts_per_layer: tuple[int, ...]
    names: tuple[str, ...]
    """The domains; the J of all arrays."""
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    use: Use
    cosine_LJJ: np.ndarray
    """Of the mean routing probability of two domains."""
    routing: tuple[np.ndarray, ...]
    """For each layer float64 [J, N]: mean routing probability, shares that sum to 1."""
    subsets: dict[str, tuple[np.ndarray, ...]]
    """For each share kept, for each layer bool [J, n]: the common experts that each domain chooses
    by all of its documents."""
    overlap: dict[str, SubsetOverlap]
    together: tuple[Together, ...]

    @property
    def domain_cosine_per_layer(self) -> tuple[float, ...]:
        """Of the mean routing of two domains, mean over pairs; empty with one domain."""
        if len(self.names) < 2:
            return ()
        return tuple(float(mean_of_pairs(torch.from_numpy(t_JJ))) for t_JJ in self.cosine_LJJ)

    @property
    def domain_cosine(self) -> float | None:
        """Mean over layers."""
        per_layer = self.domain_cosine_per_layer
        return float(np.mean(per_layer)) if per_layer else None


def read_packed(
    data: str | Path,
    config: Config,
    checkpoint: Path,
    settings: CoverageSettings,
    micro_batch: int = 0,
) -> PackedDomains:
    """Read and pack held-out documents.

    Args:
        data: a folder written by `emotrain prepare`.
        config, checkpoint: of the model that will read them, or of any other step of its run.
        micro_batch: rows of one forward pass; 0 means as in training.
    Raises:
        UserError: settings or data that cannot be used.
    """
    rows = rows_of(micro_batch, config.training.micro_batch)
    settings.check(config.model)
    found = read_held_out(
        data, config, checkpoint, settings.documents, settings.document_tokens, settings.domains
    )
    groups = list(found.values())
    exclusive = dict(config.model.experts.exclusive)
    longest = max(len(ids) for group in groups for ids in group)
    batches = pack_groups(
        groups,
        [name if name in exclusive else "" for name in found],
        min(config.data.sequence_length, longest),
        rows,
        config.model.attention.document_mask,
    )
    digest = hashlib.sha256()
    for name, group in found.items():
        for ids in group:
            digest.update(f"{len(name)} {name} {len(ids)} ".encode())
            digest.update(np.ascontiguousarray(ids, dtype="<u4").tobytes())
    return PackedDomains(
        tuple(found),
        batches,
        group_of_each(groups),
        tuple(sum(map(len, group)) for group in groups),
        digest.hexdigest(),
    )


def measure(
    folder: Path,
    data: str | Path,
    packed: PackedDomains,
    settings: CoverageSettings,
    device: torch.device,
    track: Track[Any] = untracked,
    description: str = "routing documents",
) -> Coverage:
    """Measure a checkpoint on documents of `read_packed`.

    Raises:
        UserError: a checkpoint that cannot be used, or whose routing is not finite.
    """
    config, model = load_model(folder, device)
    precision = precision_on(config, device)
    routing = document_routing(
        model, packed.batches, len(packed.group_U), precision, track, description
    )
    if not all(sums_UN.isfinite().all() for sums_UN in routing.probability):
        raise UserError(
            f"{folder}: its routing is not finite, as of a model that diverged; give an earlier "
            f"checkpoint"
        )
    measured = coverage_of(routing, config.model, packed, settings)
    step = load_state(folder).step
    return Coverage(str(folder), step, str(data), settings, **measured)


@torch.inference_mode()
def document_routing(
    model: Transformer,
    batches: Sequence[PackedBatch],
    num_documents: int,
    precision: torch.dtype | None = None,
    track: Track[Any] = untracked,
    description: str = "routing documents",
) -> DocumentRouting:
    """The routing of every document, without pools, as at inference (spec 2.5), in one pass.

    Args:
        batches: `document_ids_G` in [0, num_documents), or -1 for padding.
        precision: run under autocast in this dtype; None means in the model's own.
    """
    device, config = model.head.weight.device, model.config
    widths = [n for n in map(config.routed_in_layer, range(config.num_layers)) if n]
    probability = [torch.zeros(num_documents, n, device=device).double() for n in widths]
    # The last column takes the empty slots.
    slots = [torch.zeros(num_documents, n + 1, device=device).long() for n in widths]
    for batch in track(batches, description):
        batch = batch.to(device)
        with autocast(device, precision):
            layers = model(batch, RoutingRequest(details=True)).routing.layers
        # Padding has no scores and only empty slots: adding it to document 0 adds zeros.
        document_G = batch.document_ids_G.clamp(min=0)
        document_T1 = document_G[batch.document_T][:, None]
        for sums_UN, slots_UX, layer in zip(probability, slots, layers, strict=True):
            assert layer.details is not None, "asked for"
            sums_UN.index_add_(0, document_G, layer.details.document_scores_GN.double())
            cells_TK = document_T1 * slots_UX.shape[1] + layer.details.experts_TK
            one = slots_UX.new_ones(1).expand(cells_TK.numel())
            slots_UX.view(-1).index_add_(0, cells_TK.reshape(-1), one)
    return DocumentRouting(
        tuple(sums_UN.cpu() for sums_UN in probability),
        tuple(slots_UX[:, :-1].cpu() for slots_UX in slots),
    )


def coverage_of(
    routing: DocumentRouting, model: ModelConfig, packed: PackedDomains, settings: CoverageSettings
) -> dict[str, Any]:
    """All that the routing of documents says: the fields of `Coverage` from `layers` on."""
    layers = [i for i in range(model.num_layers) if model.routed_in_layer(i)]
    order = _order(routing.slots, packed.group_U)
    rank_J = torch.tensor(order).argsort()
    names, group_U = [packed.names[j] for j in order], rank_J[packed.group_U]
    half_U = _half_of_each(packed.group_U)
    domain_sums = [sum_by_group(sums_UN, group_U) for sums_UN in routing.probability]
    common = [model.common_in_layer(layer) for layer in layers]
    subsets, overlaps = {}, {}
    for keep in sorted(set(settings.keep), reverse=True):
        counts = _routed_kept(model, keep)
        subsets[str(float(keep))] = tuple(
            choose_experts(sums_JN[:, :n], counts[i]).numpy()
            for sums_JN, n, i in zip(domain_sums, common, layers, strict=True)
        )
        overlaps[str(float(keep))] = subset_overlap(
            [sums_UN[:, :n] for sums_UN, n in zip(routing.probability, common, strict=True)],
            group_U,
            half_U,
            [counts[i] for i in layers],
        )
    return {
        "layers": tuple(layers),
        "routed_experts_per_layer": tuple(map(model.routed_in_layer, layers)),
        "names": tuple(names),
        "documents": tuple(torch.bincount(group_U).tolist()),
        "tokens": tuple(packed.tokens[j] for j in order),
        "use": use_of_domains(routing, group_U, _allowed(model, names, layers)),
        "cosine_LJJ": np.stack([cosine_table(sums_JN).numpy() for sums_JN in domain_sums]),
        "routing": tuple(shares(sums_JN).numpy() for sums_JN in domain_sums),
        "subsets": subsets,
        "overlap": overlaps,
        "together": together_of(
            routing, model, group_U, half_U, _routed_kept(model, settings.pool)
        ),
    }


def _order(slots: Sequence[Tensor], group_U: Tensor) -> list[int]:
    """Domains by the experts of one document, the fewest first: mean entropy of its slots."""
    entropy_U = torch.stack([entropy_nats(slots_UN) for slots_UN in slots]).mean(0)
    mean_J = sum_by_group(entropy_U, group_U) / torch.bincount(group_U)
    return mean_J.sort(stable=True).indices.tolist()


def _half_of_each(group_U: Tensor) -> Tensor:
    """int64 [U]: 0 and 1 in turn through the documents of each group, which are ascending."""
    first_J = torch.bincount(group_U).cumsum(0) - torch.bincount(group_U)
    return (torch.arange(len(group_U)) - first_J[group_U]) % 2


def _routed_kept(model: ModelConfig, fraction: float) -> list[int]:
    """Routed experts of each layer that a share of its experts keeps."""
    return [count - model.experts.shared for count in experts_kept(model, fraction)]


def _allowed(model: ModelConfig, names: Sequence[str], layers: Sequence[int]) -> Tensor:
    """int64 [J, L]: experts that documents of each domain may use."""
    masks = [allowed_experts(model, name) for name in names]
    return torch.tensor([[int(of[layer].sum()) for layer in layers] for of in masks])
