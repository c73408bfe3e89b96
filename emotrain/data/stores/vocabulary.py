"""The tokens of files that do not say which they hold, and the check that they hold no others."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from emotrain.config import RawTokensConfig
from emotrain.data.manifest import TOKENIZER
from emotrain.data.tokenizer import EOS_TOKEN, load_tokenizer
from emotrain.errors import UserError


class Vocabulary(NamedTuple):
    """Which token ids there are."""

    size: int
    """One more than the largest."""
    eos_id: int
    eos_token: str
    """The text of EOS; empty without a tokenizer."""
    tokenizer_file: Path
    """No file where nobody knows it."""


def vocabulary_of(path: str, tokenizer: str, raw: RawTokensConfig) -> Vocabulary:
    """The vocabulary of the tokens at `path`: that of the tokenizer, or of the one that lies in
    the folder, or what the settings say.

    Raises:
        UserError: neither is known, or they contradict each other.
    """
    beside = Path(path) / TOKENIZER
    file = Path(tokenizer) if tokenizer else beside
    if not tokenizer and ("://" in path or not beside.is_file()):
        if not raw.vocab_size:
            raise UserError(
                f"{path}: does not say which tokens it holds; give data.tokenizer=FILE, or "
                f"data.raw.vocab_size=N with data.raw.eos_id=N"
            )
        if raw.eos_id >= raw.vocab_size or raw.vocab_size > 2**32:
            raise UserError(
                f"data.raw.eos_id={raw.eos_id}, data.raw.vocab_size={raw.vocab_size}: EOS is a "
                f"token of the vocabulary, which has at most 2^32"
            )
        return Vocabulary(raw.vocab_size, raw.eos_id, "", beside)
    encoder = load_tokenizer(file, raw.eos_token or EOS_TOKEN)
    if raw.vocab_size and raw.vocab_size < encoder.vocab_size:
        raise UserError(
            f"data.raw.vocab_size={raw.vocab_size} is less than the {encoder.vocab_size} tokens of "
            f"{file}; leave it out, or give another tokenizer"
        )
    if raw.eos_id and raw.eos_id != encoder.eos_id:
        raise UserError(
            f"data.raw.eos_id={raw.eos_id}, and {encoder.eos_token} is token {encoder.eos_id} of "
            f"{file}; name the token that ends documents with data.raw.eos_token"
        )
    size = raw.vocab_size or encoder.vocab_size
    return Vocabulary(size, encoder.eos_id, encoder.eos_token, file)


def check_tokens(where: str, tokens: np.ndarray, start: int, vocab_size: int) -> None:
    """Refuse token ids that the vocabulary does not have.

    Args:
        tokens: integers [n], at positions `start` and on of `where`.
    """
    if not tokens.size:
        return
    wrong = int(tokens.max()) >= vocab_size or (tokens.dtype.kind == "i" and tokens.min() < 0)
    if wrong:
        at = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
        raise UserError(
            f"{where}: token {start + at} is {tokens[at]}, the vocabulary has {vocab_size}; give "
            f"the tokenizer and the data.raw.dtype that it was written with, or copy it again"
        )
