"""Text to token ids: a `tokenizer.json` of the Hugging Face `tokenizers` library, given or
trained here."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emotrain.data import long_texts
from emotrain.errors import MissingFileError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS_TOKEN = "<|endoftext|>"
"""The default end-of-document token."""

SHOWN = 8
"""Special tokens that an error names."""

LONGEST_RUN = 1000
"""Characters without a space, or with nothing else, after which a text is cut to train on: the
library takes quadratic time in the length of a word."""

USUAL_EOS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[SEP]",
    "[EOS]",
    "<|im_end|>",
)
"""Tokens that end documents in known vocabularies; the first of them that is there is proposed."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""How a vocabulary spells a single byte, for the characters that it has no token for."""

BYTE_ALPHABET = 256
"""Symbols that a byte-level vocabulary starts from, so that every text has an encoding."""


class TextTokenizer:
    """Encodes documents so that the EOS id stands at the end of each document and nowhere else.

    A text that spells an end-of-document marker, or any other special token, is encoded as ordinary
    characters, also where the vocabulary itself would take it for one; so is a text that spells the
    name of a byte (`<0x0A>`). Truncation, padding and dropout that a tokenizer file brings along
    are switched off: every document arrives whole, and always as the same tokens.
    """

    def __init__(self, backend: Tokenizer, eos_token: str = EOS_TOKEN, allow_special: bool = False):
        """
        Args:
            allow_special: whether special tokens that a text spells become their ids. EOS never
                does.
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
            more = f" and {len(special) - SHOWN} more" if len(special) > SHOWN else ""
            usual = next((t for t in USUAL_EOS if backend.token_to_id(t) is not None), "")
            hint = f", most likely --eos-token '{usual}'" if usual else ""
            raise UserError(
                f"the tokenizer has no token {eos_token!r} to end documents with; name one with "
                f"--eos-token{hint}, its special tokens are "
                f"{', '.join(special[:SHOWN]) or 'none'}{more}"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not allow_special
        if getattr(backend.model, "dropout", None):
            # Drawn anew at every call: the same inputs would give other bytes.
            backend.model.dropout = None
        self.backend = backend
        self.eos_token = eos_token
        self.eos_id = eos_id
        names = (f"<0x{byte:02X}>" for byte in range(256))
        self._byte_ids = {i for name in names if (i := backend.token_to_id(name)) is not None}
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id: the rows that a model's embedding needs."""
        self._forbidden = np.zeros(self.vocab_size, bool)
        self._forbidden[[eos_id, *_special_ids(backend, allow_special)]] = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text followed by EOS, as uint32 arrays [length + 1]. A long text is
        encoded in pieces, where the tokenizer gives the same tokens then.

        Raises:
            UserError: a text that the tokenizer cannot encode, or cannot without its EOS token.
        """
        if max(map(len, texts), default=0) > long_texts.LONG and self.can_be_cut:
            return [self._in_pieces(text) for text in texts]
        return self._encoded(texts)

    def _in_pieces(self, text: str) -> np.ndarray:
        pieces = [self._encoded([piece])[0][:-1] for piece in long_texts.pieces_of(text)]
        return np.concatenate([*pieces, np.array([self.eos_id], np.uint32)])

    @cached_property
    def can_be_cut(self) -> bool:
        """Whether long texts are encoded in pieces, and so in bounded memory."""
        return long_texts.can_be_cut(self.backend)

    def _encoded(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise UserError(self._cannot_encode(texts, error)) from None
        found = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids + [self.eos_id], dtype=np.uint32)
            # A vocabulary may hold a marker as an ordinary token, or a merge may end in it.
            around = self._forbidden[ids[:-1]].any() or (self._byte_ids and "<0x" in text)
            found.append(self._around(text) if around else ids)
        return found

    def _around(self, text: str) -> np.ndarray:
        """As `encode_batch`, of a text that becomes a special token somewhere, or the byte whose
        name it spells: cut inside of each such place, until no piece does."""
        pieces, ids = [text], []
        while pieces:
            piece = pieces.pop()
            encoding = self.backend.encode(piece, add_special_tokens=False)
            spans = [
                (start, end, token)
                for (start, end), token in zip(encoding.offsets, encoding.ids, strict=True)
                if self._forbidden[token]
                or (token in self._byte_ids and BYTE_TOKEN.fullmatch(piece[start:end].strip()))
            ]
            if not spans:
                ids.append(encoding.ids)
                continue
            start, end, token = spans[0]
            cut = (start + end) // 2
            if not start < cut < end:
                name = self.backend.id_to_token(token)
                fix = (
                    "which ends documents; name another token with --eos-token"
                    if token == self.eos_id
                    else "which is a special token; let texts spell such with --allow-special"
                )
                raise UserError(
                    f"the tokenizer turns {piece[start:end] or piece[:20]!r} into {name!r}, {fix}"
                )
            pieces += [piece[cut:], piece[:cut]]
        return np.array([*chain.from_iterable(ids), self.eos_id], dtype=np.uint32)

    def _cannot_encode(self, texts: Sequence[str], error: Exception) -> str:
        """Names the first word (character, where the tokenizer knows no words) at fault."""
        words = self.backend.pre_tokenizer
        for text in texts:
            for word in [w for w, _ in words.pre_tokenize_str(text)] if words else text:
                try:
                    self.backend.encode(word, add_special_tokens=False)
                except Exception:
                    return (
                        f"the tokenizer has no token for {word!r} and none for what it does not "
                        f"know; take one with an unk_token, or a byte-level one"
                    )
        return f"the tokenizer cannot encode a text ({' '.join(str(error).split())})"

    def loses_characters(self) -> bool:
        """Whether characters without a token vanish without a trace."""
        described = json.loads(self.backend.to_str(pretty=False))
        model = described["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("unk_token"):
            return False
        return "ByteLevel" not in json.dumps(described["pre_tokenizer"], allow_nan=False)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, EOS left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`."""
        return self.backend.to_str(pretty=False)


def _special_ids(backend: Tokenizer, allowed: bool) -> set[int]:
    """Ids that no text may become: those of the special tokens, but for the one that stands for
    what the vocabulary does not know."""
    if allowed:
        return set()
    special = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    if not special:
        return set()
    if hasattr(backend.model, "unk_token"):
        unknown = backend.model.unk_token
    else:  # Unigram names it by its id
        number = json.loads(backend.to_str(pretty=False))["model"].get("unk_id")
        unknown = None if number is None else backend.id_to_token(number)
    return {
        i
        for i, token in backend.get_added_tokens_decoder().items()
        if token.special and token.content != unknown
    }


def load_tokenizer(
    path: str | Path, eos_token: str = EOS_TOKEN, allow_special: bool = False
) -> TextTokenizer:
    """Read a `tokenizer.json`.

    Raises:
        FileNotFoundError: no such file. ValueError: not a tokenizer, or it lacks `eos_token`.
    """
    return TextTokenizer(read_tokenizer(path), eos_token, allow_special)


def tokenizer_file(path: str | Path) -> bytes:
    """The content of a `tokenizer.json`. Raises: FileNotFoundError, where there is none."""
    if not Path(path).is_file():
        raise MissingFileError(
            f"{path}: no such tokenizer file; give a tokenizer.json, or train one with "
            f"--train-tokenizer"
        )
    return Path(path).read_bytes()


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the library in a `tokenizer.json`, whatever its tokens.

    Raises:
        FileNotFoundError: no such file. ValueError: not a tokenizer.
    """
    from tokenizers import Tokenizer

    content = tokenizer_file(path)
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise UserError(
            f"{path}: not a tokenizer.json of the tokenizers library: "
            f"{' '.join(str(error).split())}"
        ) from None


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
    _uninterrupted(lambda: backend.train_from_iterator(_cut(texts), trainer))
    return TextTokenizer(backend, eos_token)


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """Texts whose runs without a space, and of spaces alone, are at most LONGEST_RUN characters."""
    run = re.compile(rf"\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}}")
    for text in texts:
        start = 0
        for match in run.finditer(text):
            yield text[start : match.end()]
            start = match.end()
        yield text[start:]


def _uninterrupted(work: Callable[[], None]) -> None:
    """Run `work`, which does not return to Python for minutes, on a thread: Ctrl-C ends the
    command, and the thread with it."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failure:
        raise failure[0]
