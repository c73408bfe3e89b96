"""A checkpoint as an engine: its model, its tokenizer, and subsets of its experts."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from emotrain.config import Config
from emotrain.data.tokenizer import TextTokenizer
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device
from emotrain.evaluation.reading import tokenizer_of
from emotrain.model.transformer import Transformer
from emotrain.modular.artefact import read_subset
from emotrain.modular.select import allowed_experts, masks_of
from emotrain.subsets.lazy_model import load_lazy
from emotrain.subsets.selection import require_same_model
from emotrain.training.checkpoint import find, load_model
from emotrain.training.checkpoint_folders import read_config


def open_generator(checkpoint: str | Path) -> tuple[Path, Config, TextTokenizer]:
    """Folder, configuration and tokenizer of a checkpoint: what a request can be checked by before
    weights are read.

    Raises:
        UserError: no usable checkpoint, or one without the tokenizer of its model.
    """
    folder = find(checkpoint)
    config = read_config(folder)
    return folder, config, tokenizer_of(folder, config)


def load_weights(folder: Path, device: str = "auto", memory: int | None = None) -> Transformer:
    """The model of a checkpoint.

    Args:
        memory: bytes that the weights may take, with experts that are read when they are needed
            (`load_lazy`, on the CPU); None loads them all.
    Raises:
        UserError: damaged, or less memory than it needs.
    """
    if memory is None:
        return load_model(folder, choose_device(device))[1]
    if device == "cuda":
        raise UserError("--memory keeps experts for the CPU; give --device cpu, or no --memory")
    return load_lazy(folder, memory).model


def load_subset(file: str | Path, folder: Path, config: Config) -> list[Tensor]:
    """For each layer bool [N]: the experts of a subset of this checkpoint.

    Raises:
        UserError: not a subset, or one of another checkpoint.
    """
    subset = read_subset(file)
    require_same_model(subset, folder, config)
    return masks_of(subset)


def experts_of_domain(domain: str, config: Config) -> list[Tensor]:
    """For each layer bool [N]: the experts of a domain that has exclusive ones.

    Raises:
        UserError: it has none.
    """
    exclusive = dict(config.model.experts.exclusive)
    if domain not in exclusive:
        raise UserError(
            f"--domain {domain}: the model has exclusive experts for "
            f"{', '.join(exclusive) or 'no domain'}; leave out --domain"
        )
    return allowed_experts(config.model, domain)


def encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on: without an end-of-document token."""
    return tokenizer.encode_batch([text])[0][:-1].tolist()
