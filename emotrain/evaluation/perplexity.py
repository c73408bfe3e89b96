"""The loss of every held-out document, with the experts its domain keeps.

One pass over packed documents gives the loss of each of them; a domain's loss is a sum over its
documents. Nothing a document sees depends on its neighbours in a row, so packing changes no number.
U counts the documents of the whole pass, J their groups (see `emotrain.modular.select`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.batch import IGNORE, PackedBatch
from emotrain.config import ModelConfig, PoolConfig
from emotrain.data.packing import pack_documents
from emotrain.distributed.gathering import gathered_for
from emotrain.distributed.ranks import Ranks
from emotrain.distributed.shares import ALONE, share
from emotrain.model.attention import TokenView
from emotrain.model.router import RoutingRequest, training_request
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
    """For each layer with routed experts, float64 [U, N]: sum of the routing probabilities. Empty
    where it was not asked for."""


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


def document_losses(
    model: Transformer,
    batches: Sequence[PackedBatch],
    document_group_U: Tensor,
    subsets: Subsets | None = None,
    track: Track[PackedBatch] = untracked,
    description: str = "held-out documents",
    precision: torch.dtype | None = None,
) -> DocumentLosses:
    """`losses_of_arms` of one arm."""
    [losses] = losses_of_arms(
        model, batches, document_group_U, [subsets], track, description, precision
    )
    return losses


@torch.no_grad()
def losses_of_arms(
    model: Transformer,
    batches: Sequence[PackedBatch],
    document_group_U: Tensor,
    arms: Sequence[Subsets | None],
    track: Track[PackedBatch] = untracked,
    description: str = "held-out documents",
    precision: torch.dtype | None = None,
    rows_per_pass: int = 0,
    ranks: Ranks = ALONE,
    pool: PoolConfig | None = None,
) -> list[DocumentLosses]:
    """Loss of every document with the subsets of every arm, without a document pool, as at
    inference (spec 2.5), unless there is a `pool`; and the routing with those of the first arm.

    Up to the first experts all arms compute the same: it is computed once. From there on a document
    is in the batch once for each arm, every time with another mask.

    Args:
        batches: of `pack`; `document_ids_G` in [0, U), or -1 for padding.
        document_group_U: int64, the group of each document.
        arms: of each, for each layer the routed experts that each group keeps; None keeps all.
        track, description: show progress.
        precision: run under autocast in this dtype; None means in the model's own.
        rows_per_pass: most rows that go through the experts at once, if a batch has no more; 0 for
            those of all arms.
        ranks: those that have the model between them; all get the losses of all documents.
        pool: the rule by which each document gets its pool, as in training.
    Returns:
        for each arm its losses; `routing` is empty but for the first.
    """
    device, num_documents = model.head.weight.device, len(document_group_U)
    document_group_U = document_group_U.to(device)
    masks = _masks_of_arms(model.config, arms, device)
    loss_XU = torch.zeros(len(arms), num_documents, dtype=torch.float64, device=device)
    targets_U = torch.zeros(num_documents, dtype=torch.int64, device=device)
    routing = [
        torch.zeros(num_documents, routed, dtype=torch.float64, device=device)
        for routed in map(model.config.routed_in_layer, range(model.config.num_layers))
        if routed
    ]
    # The same in every batch, so that all ranks run the model as often.
    rows = max(len(batch.tokens_BS) for batch in batches)
    at_once = max(1, rows_per_pass // rows) if rows_per_pass else len(arms)
    own = track(share(batches, ranks), description)
    for batch in gathered_for(own, model, model.blocks[0]):
        batch = batch.to(device)
        # Padding has no targets and no routing scores: adding it to document 0 adds zeros.
        document_G = batch.document_ids_G.clamp(min=0)
        has_target_T = (batch.targets_BS.reshape(-1) != IGNORE).long()
        targets_U.index_add_(0, document_G[batch.document_T], has_target_T)
        with autocast(device, precision):
            h_BSD = model.blocks[0].attend(*model.embed(batch))
            for first in range(0, len(arms), at_once):
                arm_X = range(first, min(first + at_once, len(arms)))
                copies = _repeated(batch, len(arm_X))
                kept = None
                if masks is not None:
                    group_G = group_of_documents(batch, document_group_U)
                    kept = [
                        mask_XJN[first : arm_X.stop, group_G].flatten(0, 1) for mask_XJN in masks
                    ]
                hidden_TD, scores = _after_first_attention(
                    model, copies, h_BSD.repeat(len(arm_X), 1, 1), kept, pool
                )
                targets_T = copies.targets_BS.reshape(-1)
                loss_T = model.head(hidden_TD, partial(token_losses, targets_T=targets_T))
                for arm, loss_t in zip(arm_X, loss_T.double().chunk(len(arm_X)), strict=True):
                    loss_XU[arm].index_add_(0, document_G[batch.document_T], loss_t)
                if first == 0:
                    for sum_UN, scores_GN in zip(routing, scores, strict=True):
                        sum_UN.index_add_(0, document_G, scores_GN[: len(document_G)].double())
    # Whole numbers of targets are exact in float64.
    columns = [loss_XU.T, targets_U[:, None].double(), *routing]
    widths = [column.shape[1] for column in columns]
    loss_UX, targets_U1, *sums = ranks.sum(torch.cat(columns, 1)).cpu().split(widths, 1)
    return [
        DocumentLosses(loss_U, targets_U1[:, 0].long(), () if arm else tuple(sums))
        for arm, loss_U in enumerate(loss_UX.T)
    ]


def _masks_of_arms(
    config: ModelConfig, arms: Sequence[Subsets | None], device: torch.device
) -> list[Tensor] | None:
    """For each layer bool [X, J, N]: what each group keeps in each arm; None where all keep all."""
    some = next((subsets for subsets in arms if subsets is not None), None)
    if some is None:
        return None
    everything = tuple(torch.ones_like(mask_JN) for mask_JN in some)
    by_layer = zip(*(subsets or everything for subsets in arms), strict=True)
    return [torch.stack([mask_JN.to(device) for mask_JN in of_arms]) for of_arms in by_layer]


def _after_first_attention(
    model: Transformer,
    batch: PackedBatch,
    h_BSD: Tensor,
    kept: Sequence[Tensor] | None,
    pool: PoolConfig | None,
) -> tuple[Tensor, list[Tensor]]:
    """The rest of a forward pass -> normed final hidden states [T, D], and for each layer with
    routed experts [G, N], the routing probabilities summed over each document."""
    asked_for, scores = RoutingRequest(), []
    if pool is not None:
        router = replace(model.config.router, pool=pool)
        asked_for = training_request(replace(model.config, router=router), batch, seed=0, step=0)
    request = replace(asked_for, kept=kept, details=True)
    view = TokenView.of(batch, model.head_dim, model.config)
    x_BSD = h_BSD
    for index, block in enumerate(model.blocks):
        asked = request.layer(index, batch.num_documents)
        x_BSD, statistics = (
            block(x_BSD, batch, view, asked) if index else block.use_experts(x_BSD, batch, asked)
        )
        if statistics is not None:
            assert statistics.details is not None, "asked for above"
            scores.append(statistics.details.document_scores_GN)
    return model.norm(x_BSD.flatten(0, 1)), scores


def _repeated(batch: PackedBatch, copies: int) -> PackedBatch:
    """The rows of a batch so many times, one copy after the other. Documents of a copy are other
    documents, with the same permanent ids."""
    shift_X11 = batch.num_documents * torch.arange(copies, device=batch.document_BS.device)
    return replace(
        batch,
        tokens_BS=batch.tokens_BS.repeat(copies, 1),
        targets_BS=batch.targets_BS.repeat(copies, 1),
        document_BS=(batch.document_BS + shift_X11[:, None, None]).flatten(0, 1),
        document_ids_G=batch.document_ids_G.repeat(copies),
    )


def token_losses(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Cross entropy of each position in nats -> fp32 or wider [T]; 0 where the target is -100.

    Logits are formed for `BLOCK_TOKENS` positions at a time.
    """
    losses = [
        F.cross_entropy(logits_tV, target_t, ignore_index=IGNORE, reduction="none")
        for logits_tV, target_t in logit_blocks(hidden_TD, head_VD, targets_T)
    ]
    return torch.cat(losses)


def logit_blocks(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of `BLOCK_TOKENS` positions at a time, fp32 or wider [t, V], and their targets [t]."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    for hidden_tD, target_t in zip(
        hidden_TD.split(BLOCK_TOKENS), targets_T.split(BLOCK_TOKENS), strict=True
    ):
        yield F.linear(hidden_tD, head_VD).to(dtype), target_t


def autocast(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager:
    """Autocast of a device in a dtype; nothing for None."""
    return nullcontext() if precision is None else torch.autocast(device.type, precision)
