"""The loss of every held-out document, with the experts its domain keeps.

One pass over packed documents gives the loss of each of them; a domain's loss is a sum over its
documents. Nothing a document sees depends on its neighbours in a row, so packing changes no number.
U counts the documents of the whole pass, J their groups (see `emotrain.modular.select`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.batch import IGNORE, PackedBatch
from emotrain.data.packing import pack_documents
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Transformer
from emotrain.modular.select import Subsets, group_of_documents
from emotrain.progress import Track, untracked

BLOCK_TOKENS = 256
"""Tokens whose logits exist at once: rows enough for a full-speed GEMM, 100 MB of fp32 at a
vocabulary of 100k."""


@dataclass(frozen=True)
class DocumentLosses:
    """Sums over the tokens of each document, pieces of a cut document added up."""

    loss_U: Tensor
    """float64: sum of the cross entropy of its targets, in nats."""
    targets_U: Tensor
    """int64: positions with a target."""
    routing: tuple[Tensor, ...]
    """For each layer with routed experts, float64 [U, N]: sum of the routing probabilities."""


def pack(
    documents: Sequence[np.ndarray],
    row_length: int,
    rows_per_batch: int,
    document_mask: bool = True,
) -> list[PackedBatch]:
    """Pack documents into rows and rows into batches. `document_ids_G` counts the documents as
    given, from 0.

    A document longer than a row is cut into pieces, as in training, and loses the target at each
    cut.

    Args:
        documents: token ids of each, ending in EOS.
        document_mask: False for a model whose tokens see other documents of their row: each
            document then gets rows of its own.
    """
    ids = range(len(documents))
    if not document_mask:
        alone = (pack_documents([documents[i]], [i], row_length) for i in ids)
        return [part for batch in alone for part in _split_rows(batch, rows_per_batch)]
    return _split_rows(pack_documents(list(documents), list(ids), row_length), rows_per_batch)


def pack_groups(
    groups: Sequence[Sequence[np.ndarray]],
    domains: Sequence[str],
    row_length: int,
    rows_per_batch: int,
    document_mask: bool = True,
) -> list[PackedBatch]:
    """`pack` of the documents of all groups, numbered through them from 0. Only groups of one
    domain are together in a batch.

    Args:
        domains: of each group, where the model has exclusive experts for it, else empty.
    """
    documents = [document for group in groups for document in group]
    domain_of = [name for name, group in zip(domains, groups, strict=True) for _ in group]
    batches: list[PackedBatch] = []
    for name in sorted(set(domains)):
        numbers = torch.tensor([i for i, of in enumerate(domain_of) if of == name])
        chosen = [documents[i] for i in numbers]
        for batch in pack(chosen, row_length, rows_per_batch, document_mask):
            ids_G = batch.document_ids_G
            ids_G = torch.where(ids_G < 0, ids_G, numbers[ids_G.clamp(min=0)])
            batches.append(replace(batch, document_ids_G=ids_G, domain=name))
    return batches


def _split_rows(batch: PackedBatch, rows_per_batch: int) -> list[PackedBatch]:
    parts = []
    for start in range(0, len(batch.tokens_BS), rows_per_batch):
        rows = slice(start, start + rows_per_batch)
        present_G, document_BS = torch.unique(batch.document_BS[rows], return_inverse=True)
        ids_G = batch.document_ids_G[present_G]
        parts.append(
            PackedBatch(
                batch.tokens_BS[rows],
                batch.targets_BS[rows],
                document_BS,
                ids_G,
                bool((ids_G < 0).any()),
            )
        )
    return parts


@torch.inference_mode()
def document_losses(
    model: Transformer,
    batches: Sequence[PackedBatch],
    document_group_U: Tensor,
    subsets: Subsets | None = None,
    track: Track[PackedBatch] = untracked,
    description: str = "held-out documents",
    precision: torch.dtype | None = None,
) -> DocumentLosses:
    """Loss and routing of every document, without a document pool, as at inference (spec 2.5).

    Args:
        batches: of `pack`; `document_ids_G` in [0, U), or -1 for padding.
        document_group_U: int64, the group of each document.
        subsets: for each layer, the routed experts that each group keeps; None keeps all.
        track, description: show progress.
        precision: run under autocast in this dtype; None means in the model's own.
    """
    device, num_documents = model.head.weight.device, len(document_group_U)
    document_group_U = document_group_U.to(device)
    subsets = None if subsets is None else tuple(mask_JN.to(device) for mask_JN in subsets)
    loss_U = torch.zeros(num_documents, dtype=torch.float64, device=device)
    targets_U = torch.zeros(num_documents, dtype=torch.int64, device=device)
    routing = [
        torch.zeros(
            num_documents, model.config.routed_in_layer(layer), dtype=torch.float64, device=device
        )
        for layer in range(model.config.num_layers)
        if model.config.routed_in_layer(layer)
    ]
    for batch in track(batches, description):
        batch = batch.to(device)
        group_G = group_of_documents(batch, document_group_U)
        with autocast(device, precision):
            kept = None if subsets is None else [mask_JN[group_G] for mask_JN in subsets]
            output = model(batch, RoutingRequest(kept=kept, details=True))
            loss_T = token_losses(output.hidden_TD, model.head.weight, batch.targets_BS.reshape(-1))
        # Padding has no targets and no routing scores: adding it to document 0 adds zeros.
        document_G = batch.document_ids_G.clamp(min=0)
        document_T = document_G[batch.document_T]
        loss_U.index_add_(0, document_T, loss_T.double())
        targets_U.index_add_(0, document_T, (batch.targets_BS.reshape(-1) != IGNORE).long())
        for sum_UN, layer in zip(routing, output.routing.layers, strict=True):
            sum_UN.index_add_(0, document_G, layer.details.document_scores_GN.double())
    return DocumentLosses(loss_U.cpu(), targets_U.cpu(), tuple(sum_UN.cpu() for sum_UN in routing))


def token_losses(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Cross entropy of each position in nats -> fp32 or wider [T]; 0 where the target is -100.

    Logits are formed for `BLOCK_TOKENS` positions at a time.
    """
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    losses = [
        F.cross_entropy(
            F.linear(hidden_tD, head_VD).to(dtype), target_t, ignore_index=IGNORE, reduction="none"
        )
        for hidden_tD, target_t in zip(
            hidden_TD.split(BLOCK_TOKENS), targets_T.split(BLOCK_TOKENS), strict=True
        )
    ]
    return torch.cat(losses)


def autocast(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager:
    """Autocast of a device in a dtype; nothing for None."""
    return nullcontext() if precision is None else torch.autocast(device.type, precision)
