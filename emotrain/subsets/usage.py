"""What new experts begin as: the experts that a domain's text uses most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emotrain.config import ModelConfig
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, rows_of
from emotrain.evaluation.perplexity import pack
from emotrain.modular.scores import collect_scores
from emotrain.progress import Track, untracked
from emotrain.subsets.calibration import read_calibration
from emotrain.subsets.exclusive import INITS, Sources
from emotrain.training.checkpoint import load_model
from emotrain.training.checkpoint_folders import find, read_config


def sources_of(
    init: str,
    count: int,
    checkpoint: str | Path,
    calibration: str | Path | None,
    domain: str,
    *,
    documents: int = 64,
    document_tokens: int = 0,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
) -> Sources | None:
    """The experts that each of `count` new ones begins as, for each layer; None for random values.

    `nearest` gives each a copy of its own: of the expert to which the text gives the most routing
    probability, of the second, and so on. `mean` gives all the mean of the K that have the most;
    of all common experts where there is no text.

    Args:
        calibration: a data set, of which the documents of `domain` are read, or a JSONL file, of
            which all are.
        documents, document_tokens: at most so many, and so much of each (0: all).
    Raises:
        UserError: another `init`, text that is missing or has no use, or a dense model.
    """
    if init not in INITS:
        raise UserError(f"--init {init} is not known; choose one of {', '.join(INITS)}")
    if init == "random":
        if calibration is not None:
            raise UserError("--init random reads no text; leave out --calibration")
        return None
    config = read_config(find(checkpoint)).model
    if init == "mean" and calibration is None:
        return [
            [range(config.common_in_layer(layer))] * count for layer in range(config.num_layers)
        ]
    if calibration is None:
        raise UserError(
            f"--init {init} copies the experts that the text of {domain} uses most; give some: "
            f"--calibration DATA"
        )
    ranked = _most_used(
        checkpoint, calibration, domain, documents, document_tokens, device, micro_batch, track
    )
    if init == "nearest":
        return [[[of_layer[i % len(of_layer)]] for i in range(count)] for of_layer in ranked]
    return [
        [sorted(of_layer[: config.chosen_in_layer(layer)])] * count
        for layer, of_layer in enumerate(ranked)
    ]


def _most_used(
    checkpoint: str | Path,
    calibration: str | Path,
    domain: str,
    documents: int,
    document_tokens: int,
    device: str,
    micro_batch: int,
    track: Track[Any],
) -> list[list[int]]:
    """For each layer, its common experts by the routing probability that the text gives them, the
    most first."""
    folder, target = find(checkpoint), choose_device(device)
    config = read_config(folder)
    rows = rows_of(micro_batch, config.training.micro_batch)
    of_domain = domain if Path(calibration).is_dir() else ""
    text = read_calibration(calibration, (), config, folder, of_domain, documents, document_tokens)
    found = [*text.choose, *(text.measure if text.held_back else ())]
    length = min(config.data.sequence_length, max(map(len, found)))
    batches = pack(found, length, rows, config.model.attention.document_mask)
    _, model = load_model(folder, target)
    group_U = torch.zeros(len(found), dtype=torch.int64)
    scores = collect_scores(model, batches, group_U, 1, track)
    return [
        _ranked(of_layer["router_once"][0], config.model, layer)
        for layer, of_layer in enumerate(scores)
    ]


def _ranked(score_N: torch.Tensor, config: ModelConfig, layer: int) -> list[int]:
    common_n = score_N[: config.common_in_layer(layer)]
    return torch.sort(common_n, descending=True, stable=True).indices.tolist()
