"""Text to token ids: a `tokenizer.json` of the Hugging Face `tokenizers` library, given or
trained here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emotrain.errors import MissingFileError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS_TOKEN = "<|endoftext|>"
"""The default end-of-document token."""

BYTE_ALPHABET = 256
"""Symbols that a byte-level vocabulary starts from, so that every text has an encoding."""


class TextTokenizer:
    """Encodes documents so that the EOS id stands at the end of each document and nowhere else.

    A text that spells an end-of-document marker is encoded as ordinary characters, and truncation
    or padding that a tokenizer file brings along is switched off: every document arrives whole.
    """

    def __init__(self, backend: Tokenizer, eos_token: str = EOS_TOKEN):
        """
        Raises:
            ValueError: `eos_token` is not in the vocabulary.
        """
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            special = sorted(
                token.content
                for token in backend.get_added_tokens_decoder().values()
                if token.special
            )
            raise UserError(
                f"the tokenizer has no token {eos_token!r} to end documents with; name one with "
                f"--eos-token, "
                f"its special tokens are {', '.join(special) or 'none'}"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.eos_token = eos_token
        self.eos_id = eos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id: the rows that a model's embedding needs."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text followed by EOS, as uint32 arrays [length + 1]."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids + [self.eos_id], dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, EOS left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`."""
        return self.backend.to_str(pretty=False)


def load_tokenizer(path: str | Path, eos_token: str = EOS_TOKEN) -> TextTokenizer:
    """Read a `tokenizer.json`.

    Raises:
        FileNotFoundError: no such file. ValueError: not a tokenizer, or it lacks `eos_token`.
    """
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise MissingFileError(
            f"{path}: no such tokenizer file; give a tokenizer.json, or train one with "
            f"--train-tokenizer"
        )
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise UserError(
            f"{path}: not a tokenizer.json of the tokenizers library: "
            f"{' '.join(str(error).split())}"
        ) from None
    return TextTokenizer(backend, eos_token)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, eos_token: str = EOS_TOKEN
) -> TextTokenizer:
    """Train a byte-level BPE on `texts`; the same texts give the same tokenizer.

    The vocabulary holds `eos_token` as id 0, the 256 bytes, and the most frequent merges. It is
    smaller than asked for when the texts do not have as many merges.

    Raises:
        ValueError: `vocab_size` cannot hold the bytes and EOS.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < BYTE_ALPHABET + 1:
        raise UserError(
            f"vocab_size={vocab_size} cannot hold {BYTE_ALPHABET} bytes and {eos_token}; "
            f"make it at least {BYTE_ALPHABET + 1}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    return TextTokenizer(backend, eos_token)
