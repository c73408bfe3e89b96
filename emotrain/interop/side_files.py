"""What lies beside the weights of a Hugging Face folder: the tokenizer, the settings of generation,
and settings of config.json that our configuration has no place for. A checkpoint keeps them as they
came, and an export writes them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotrain.data.tokenizer import EOS_TOKEN, read_tokenizer
from emotrain.errors import UserError
from emotrain.files import json_text
from emotrain.interop.config_json import kept_settings
from emotrain.interop.folder_tensors import LARGEST_JSON, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
KEPT = "huggingface.json"
"""In a checkpoint: the settings of config.json that an export writes again."""

TEXTS = (
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files that are kept as they are, beside tokenizer.json."""


def read_texts(folder: Path) -> dict[str, bytes]:
    """Those of `TEXTS` that a folder has.

    Raises:
        UserError: one is too large.
    """
    found = {}
    for name in TEXTS:
        if (file := folder / name).is_file():
            _require_small(file)
            found[name] = file.read_bytes()
    return found


def check_tokenizer(file: Path, vocab_size: int) -> int:
    """Check that a tokenizer fits a model. Returns the rows of the vocabulary that no token has:
    padding.

    Raises:
        UserError: not a tokenizer, or with ids that the model has no rows for.
    """
    _require_small(file)
    tokens = max(read_tokenizer(file).get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if tokens > vocab_size:
        raise UserError(
            f"{file}: has token ids up to {tokens - 1}, and the model {vocab_size} rows of "
            f"embedding; they belong to different checkpoints"
        )
    return vocab_size - tokens


def write_kept(folder: Path, published: dict[str, Any]) -> None:
    """Write the settings of a config.json that an export writes again into a checkpoint."""
    (folder / KEPT).write_text(json_text(kept_settings(published), indent=1), "utf-8")


def read_kept(checkpoint: Path) -> dict[str, Any]:
    """The same from a checkpoint, with what its tokenizer says where they say nothing.

    Raises:
        UserError: they cannot be read.
    """
    kept = kept_settings(read_json(checkpoint / KEPT)) if (checkpoint / KEPT).is_file() else {}
    if "eos_token_id" not in kept and (checkpoint / TOKENIZER).is_file():
        eos_id = read_tokenizer(checkpoint / TOKENIZER).token_to_id(EOS_TOKEN)
        kept |= {} if eos_id is None else {"eos_token_id": eos_id}
    return kept


def write_side_files(folder: Path, checkpoint: Path, config: dict[str, Any]) -> None:
    """Write what lies beside the weights of an export: from the checkpoint where it has it, else
    the least that makes the folder load."""
    texts = read_texts(checkpoint)
    if GENERATION not in texts:
        ids = {name: config[name] for name in TOKEN_IDS if name in config}
        texts[GENERATION] = json_text(ids, indent=2).encode()
    if (checkpoint / TOKENIZER).is_file():
        tokenizer = read_tokenizer(checkpoint / TOKENIZER)
        texts[TOKENIZER] = (checkpoint / TOKENIZER).read_bytes()
        if "tokenizer_config.json" not in texts:
            texts["tokenizer_config.json"] = json_text(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "model_max_length": config["max_position_embeddings"],
                    **_special_tokens(tokenizer, config),
                },
                indent=2,
            ).encode()
    for name, content in texts.items():
        (folder / name).write_bytes(content)


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _special_tokens(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, str]:
    """The tokens of `TOKEN_IDS`, by the names that transformers' tokenizers have for them."""
    ids = {name: config[name] for name in TOKEN_IDS if type(config.get(name)) is int}
    tokens = {name: tokenizer.id_to_token(token_id) for name, token_id in ids.items()}
    return {name.removesuffix("_id"): token for name, token in tokens.items() if token is not None}


def _require_small(file: Path) -> None:
    if (size := file.stat().st_size) > LARGEST_JSON:
        raise UserError(
            f"{file}: has {size:,} bytes, and at most {LARGEST_JSON:,} are read; download it again"
        )
