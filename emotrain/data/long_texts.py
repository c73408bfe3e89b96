"""Long texts in pieces, where that provably gives the same tokens.

The tokenizers library takes some hundred times the size of a text to encode it. A text is cut
between an ASCII letter and the space or line feed behind it, if the tokenizer encodes what lies
before and what lies behind by themselves, each as it would in the whole:

- Its model encodes words, and one of the patterns that make them ends a word there whatever lies
  around it: no alternative of the pattern takes a letter and white space after it, none looks
  behind, and what looks ahead does so behind white space alone.
- Its normalizers change a letter and a space by nothing that lies beyond the cut.
- No added token has a letter with white space behind it, or looks at what lies beside it.

Patterns are known by their alternatives: those of GPT-2, cl100k, Llama 3, Qwen 2 and the like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONG = 2**20
"""Characters of a piece, about: some 150 MB while it is encoded."""
CUT = re.compile(r"[A-Za-z](?=[ \n])")

LETTERS = {
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
}
SPACES = {r"\s+(?!\S)", r"\s+", r"\s*[\r\n]+", r"\s*[\r\n]"}
OTHERS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r"'(?i:[sdmt]|ll|ve|re)"),
    *(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"(?:'s|'t|'re|'ve|'m|'ll|'d)"),
    *(r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,3}", r"\p{N}{1,3}+"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"),
}
"""Alternatives of patterns: words of letters, white space, and what holds neither a letter with
white space behind it. An apostrophe's letters end where they are, whatever comes."""
LOCAL_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")


def can_be_cut(backend: Tokenizer) -> bool:
    """Whether texts may be cut as above."""
    normalizer, words = _described(backend.normalizer), _described(backend.pre_tokenizer)
    if any(step["type"] not in LOCAL_NORMALIZERS for step in normalizer):
        return False
    for token in backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or CUT.search(token.content):
            return False
    return all(map(_is_local, words)) and any(map(_ends_words, words))


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of LONG characters or some more, up to the next place where it may be cut;
    the last may be shorter, and is longer where there is no such place."""
    start = 0
    while len(text) - start > LONG and (cut := CUT.search(text, start + LONG)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _described(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer as its file has them; none where there is none."""
    if part is None:
        return []
    found = json.loads(part.__getstate__())
    if found["type"] == "Sequence":
        steps: list[dict[str, Any]] = found.get("normalizers") or found["pretokenizers"]
        return steps
    return [found]


def _is_local(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    return step["type"] == "Digits" or _ends_words(step)


def _ends_words(step: dict[str, Any]) -> bool:
    """Whether a step cuts between a letter and white space, whatever lies around."""
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"])
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return False
    found = set(_alternatives(step["pattern"].get("Regex", "")))
    return bool(found & LETTERS and found & SPACES) and found <= LETTERS | SPACES | OTHERS


def _alternatives(pattern: str) -> Iterator[str]:
    """What stands between the bars of a pattern that lie in no brackets."""
    depth, begin, escaped = 0, 0, False
    for at, letter in enumerate(pattern):
        if escaped or letter == "\\":
            escaped = not escaped
        elif letter in "([":
            depth += 1
        elif letter in ")]":
            depth -= 1
        elif letter == "|" and not depth:
            yield pattern[begin:at]
            begin = at + 1
    yield pattern[begin:]
