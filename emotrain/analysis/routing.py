"""Routing probabilities of every token of many documents, on the disk (spec 9.1, steps 3 and 4)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emotrain.analysis.spherical import row_blocks
from emotrain.config import Config
from emotrain.errors import WriteError
from emotrain.evaluation.measure import precision_on
from emotrain.evaluation.perplexity import autocast, pack
from emotrain.model.router import RoutingRequest, route
from emotrain.model.transformer import Transformer
from emotrain.progress import Track, untracked

DOCUMENTS_AT_ONCE = 512
"""That are packed into rows together."""


@torch.inference_mode()
def token_probabilities(
    model: Transformer,
    config: Config,
    documents: Sequence[np.ndarray],
    layers: Sequence[int],
    rows_per_batch: int,
    folder: Path,
    track: Track[Any] = untracked,
) -> np.ndarray:
    """Run documents through the model once, without pools and without the exclusive experts of any
    domain, and keep how every layer would share out each of their tokens.

    Args:
        documents: token ids of each. One longer than a row is routed in pieces, as in training.
        layers: those that are kept, by their number; all have routed experts.
        folder: where the scratch file lies.
    Returns:
        float16 [T, X], the tokens in the order of the documents and X the experts of all these
        layers one after the other; those of a layer sum to 1. It is mapped from a file without a
        name, which is gone when nothing refers to it.
    Raises:
        WriteError: no room for it.
    """
    device, length = model.head.weight.device, config.data.sequence_length
    place = {layer: i for i, layer in enumerate(routed_layers(config))}
    widths = [config.model.routed_in_layer(layer) for layer in layers]
    first_U = np.cumsum([0, *map(len, documents)])
    found_TX = scratch(folder, (int(first_U[-1]), sum(widths)), np.float16)
    chunks = range(0, len(documents), DOCUMENTS_AT_ONCE)
    for chunk in track(chunks, f"routing {len(documents):,} documents"):
        cut = [
            (first_U[u] + start, documents[u][start : start + length])
            for u in range(chunk, min(chunk + DOCUMENTS_AT_ONCE, len(documents)))
            for start in range(0, len(documents[u]), length)
        ]
        row_of_piece, pieces = np.array([row for row, _ in cut]), [piece for _, piece in cut]
        row_length = min(length, max(map(len, pieces)))
        mask = config.model.attention.document_mask
        for batch in pack(pieces, row_length, rows_per_batch, mask):
            piece_T = batch.document_ids_G[batch.document_T].numpy()
            start_T = np.searchsorted(batch.document_T.numpy(), batch.document_T.numpy())
            row_T = row_of_piece[piece_T] + np.arange(len(piece_T)) - start_T
            with autocast(device, precision_on(config, device)):
                output = model(batch.to(device), RoutingRequest(details=True))
            shares = []
            for layer in layers:
                details = output.routing.layers[place[layer]].details
                assert details is not None, "asked for"
                share_TN = route(details.logits_TN, 1, config.model.router.gating, False)[0]
                shares.append(share_TN / share_TN.sum(1, keepdim=True).clamp(min=1e-30))
            real_T = piece_T >= 0
            found_TX[row_T[real_T]] = torch.cat(shares, 1).half().cpu().numpy()[real_T]
    return found_TX


def document_means(probability_TX: np.ndarray, document_T: np.ndarray) -> np.ndarray:
    """Mean over the tokens of each document, which are numbered from 0 without gaps -> float32
    [U, X]."""
    lengths_U = np.bincount(document_T)
    sum_UX = torch.zeros(len(lengths_U), probability_TX.shape[1])
    for rows in row_blocks(probability_TX):
        block_TX = torch.from_numpy(probability_TX[rows].astype(np.float32))
        sum_UX.index_add_(0, torch.from_numpy(document_T[rows]), block_TX)
    return sum_UX.numpy() / lengths_U[:, None].astype(np.float32)


def scratch(folder: Path, shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """An array in a file without a name: it does not count as memory of the process where that is
    short, and no end of the process leaves it behind.

    Raises:
        WriteError: the disk has no room for it.
    """
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # Writing to a map where the disk is full would kill the process. (macOS cannot ask.)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise WriteError(
                f"{folder}: has no room for {size / 1e9:.1f} GB of routing probabilities "
                f"({error.strerror or error}); free some, or give fewer --documents or --layers"
            ) from error
        return np.memmap(file, dtype, "r+", shape=shape)


def routed_layers(config: Config) -> list[int]:
    return [i for i in range(config.model.num_layers) if config.model.routed_in_layer(i)]
