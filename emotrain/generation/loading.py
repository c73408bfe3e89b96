"""A checkpoint as an engine: its model, its tokenizer, and subsets of its experts."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from emotrain.config import Config
from emotrain.data.tokenizer import TextTokenizer, load_tokenizer
from emotrain.errors import MissingFileError, UserError
from emotrain.evaluation.measure import choose_device
from emotrain.model.transformer import Transformer
from emotrain.modular.artefact import read_subset
from emotrain.modular.select import allowed_experts, masks_of
from emotrain.subsets.lazy_model import load_lazy
from emotrain.subsets.selection import require_same_model
from emotrain.training.checkpoint import find, load_model


def load_generator(
    checkpoint: str | Path, device: str = "auto", memory: int | None = None
) -> tuple[Path, Config, Transformer, TextTokenizer]:
    """Folder, configuration, model and tokenizer of a checkpoint.

    Args:
        memory: bytes that the weights may take, with experts that are read when they are needed
            (`load_lazy`, on the CPU); None loads them all.
    Raises:
        UserError: no usable checkpoint, or one without the tokenizer of its model; or less memory
            than it needs.
    """
    folder = find(checkpoint)
    tokenizer = tokenizer_of(folder)
    if memory is None:
        config, model = load_model(folder, choose_device(device))
    elif device == "cuda":
        raise UserError("--memory keeps experts for the CPU; give --device cpu, or no --memory")
    else:
        lazy = load_lazy(folder, memory)
        config, model = lazy.config, lazy.model
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids and its model "
            f"{config.model.vocab_size}; put the tokenizer of its training there"
        )
    return folder, config, model, tokenizer


def tokenizer_of(folder: Path) -> TextTokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise MissingFileError(
            f"{folder}: has no tokenizer.json, without which it reads no text and writes none; put "
            f"that of its training there"
        )
    return load_tokenizer(file)


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
