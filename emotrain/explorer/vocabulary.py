"""The bytes that each token of a vocabulary stands for.

A token may hold a part of a character, which no text can show. The page therefore gets bytes, and
puts the characters of a document together itself.
"""

from __future__ import annotations

import json
import re

from emotrain.data.tokenizer import TextTokenizer
from emotrain.files import json_text

BLANK = "\u2581"
"""What vocabularies of SentencePiece write for a blank."""


def token_bytes(tokenizer: TextTokenizer) -> list[bytes]:
    """The bytes of every token id; together, those of a document's tokens are its text in UTF-8.

    That holds for byte-level vocabularies and those of SentencePiece. For others a token is shown
    as the vocabulary writes it. An id without a token has no bytes.
    """
    backend = tokenizer.backend
    decoder = json.loads(backend.to_str(pretty=False))["decoder"]
    described = json_text(decoder, ensure_ascii=False)
    byte_of = _byte_alphabet() if "ByteLevel" in described else {}
    added = backend.get_added_tokens_decoder()
    found = []
    for token_id in range(tokenizer.vocab_size):
        text = backend.id_to_token(token_id)
        if text is None:
            found.append(b"")
        elif token_id in added:
            found.append(added[token_id].content.encode())
        elif byte_of:
            found.append(bytes(byte_of[letter] for letter in text if letter in byte_of))
        elif piece := re.fullmatch("<0x([0-9A-F]{2})>", text):
            found.append(bytes.fromhex(piece[1]))
        else:
            found.append((text.replace(BLANK, " ") if BLANK in described else text).encode())
    return found


def _byte_alphabet() -> dict[str, int]:
    """The letter that byte-level vocabularies write for each byte -> the byte. Bytes that are
    printable in Latin-1 stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
