"""Proves that tokenizers of every family encode texts as text: no special token, no byte and no end
of a document comes out of what a text spells, and everything that is not special comes back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from emotrain.cli import main
from emotrain.data import long_texts
from emotrain.data.formats import Dataset
from emotrain.data.tokenizer import TextTokenizer, train_tokenizer
from emotrain.errors import UserError
from emotrain.preparation import encoding

TEXTS = ["the experts of a pool route a token", "documents end here and there"] * 20
SPECIAL = ["[PAD]", "[UNK]", "[SEP]", "[CLS]"]


def word_piece() -> Tokenizer:
    """As BERT's: a normaliser, special tokens that are words of the vocabulary, a template that
    adds two of them, and an end that is not the last token."""
    letters = [*"abcdefghijklmnopqrstuvwxyz[]<>|/"]
    pieces = [*SPECIAL, *letters, *(f"##{c}" for c in letters), "the", "expert", "##s"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 2)]
    )
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return backend


def unigram() -> Tokenizer:
    """As Llama 2's and T5's: bytes for what it does not know, special tokens that are pieces."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [(c, -4.0) for c in "▁abcdefghijklmnopqrstuvwxyz<>/0123456789AX"] + [("▁the", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    return backend


def byte_level() -> Tokenizer:
    """As GPT-2's and Llama 3's, with more special tokens after the end, and one that is not."""
    backend = Tokenizer.from_str(train_tokenizer(TEXTS, 300).to_json())
    backend.add_special_tokens(["<|im_start|>", "<|pad|>"])
    backend.add_tokens(["<tool>"])
    return backend


FAMILIES = {
    "word piece": (word_piece, "[SEP]", SPECIAL),
    "unigram": (unigram, "</s>", ["<s>", "</s>"]),
    "byte level": (byte_level, "<|endoftext|>", ["<|endoftext|>", "<|im_start|>", "<|pad|>"]),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def test_special_tokens_that_a_text_spells_are_text(family):
    make, eos, special = family
    tokenizer = TextTokenizer(make(), eos)
    ids = {make().token_to_id(token) for token in special} - {make().token_to_id("[UNK]")}
    texts = [f"the {token} end" for token in special] + [*special, "".join(special), "the experts"]
    for text, found in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert found[-1] == tokenizer.eos_id and not ids & set(found[:-1].tolist()), text
        assert len(found) > 1


def test_they_become_their_ids_where_that_is_asked_for_but_the_end_never_does(family):
    make, eos, special = family
    backend = make()
    tokenizer = TextTokenizer(backend, eos, allow_special=True)
    other = next(token for token in special if token != eos)
    (found,) = tokenizer.encode_batch([f"a {other} b {eos} c"])
    assert backend.token_to_id(other) in found[:-1] and tokenizer.eos_id not in found[:-1]


def test_the_end_may_be_any_token_and_none_is_added(family):
    make, eos, _ = family
    tokenizer = TextTokenizer(make(), eos)
    (found,) = tokenizer.encode_batch(["the"])
    plain = make().encode("the", add_special_tokens=False).ids
    assert found.tolist() == [*plain, make().token_to_id(eos)]
    assert tokenizer.vocab_size == max(make().get_vocab().values()) + 1 > tokenizer.eos_id + 1
    assert found.dtype == np.uint32


def test_a_missing_end_is_one_line_with_the_likely_one(family, tmp_path, capsys):
    make, eos, special = family
    make().save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "the"}\n')
    command = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*command, "--tokenizer", str(tmp_path / "t.json"), "--eos-token", "<end>"]) == 2
    said = capsys.readouterr().err
    assert f"most likely --eos-token '{eos}'" in said and special[0] in said
    assert len(said.strip().splitlines()) == 1


def test_ordinary_added_tokens_stay_tokens():
    tokenizer = TextTokenizer(byte_level())
    (found,) = tokenizer.encode_batch(["a<tool>b"])
    assert tokenizer.backend.token_to_id("<tool>") in found


def test_names_of_bytes_are_text_and_bytes_come_back():
    tokenizer = TextTokenizer(unigram(), "</s>")
    newline, literal = tokenizer.encode_batch(["a\nb", "a<0x0A>b"])
    byte = tokenizer.backend.token_to_id("<0x0A>")
    assert byte in newline and byte not in literal
    assert tokenizer.decode(newline) == "a\nb" and tokenizer.decode(literal).count("0") == 2
    assert tokenizer.decode(tokenizer.encode_batch(["жук ☃"])[0]) == "жук ☃"


def test_unknown_characters_stay_the_unknown_token():
    tokenizer = TextTokenizer(word_piece(), "[SEP]")
    (found,) = tokenizer.encode_batch(["the ☃ EXPERTS"])
    assert found.tolist() == [
        *(tokenizer.backend.token_to_id(t) for t in ("the", "[UNK]", "expert", "##s")),
        tokenizer.eos_id,
    ]


def test_a_special_token_that_cannot_be_cut_is_named():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "#": 1, "@": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["#", "@"])
    with pytest.raises(
        UserError, match="turns '@' into '@', which is a special token; let .*allow"
    ):
        TextTokenizer(backend, "#").encode_batch(["a @ a"])
    assert TextTokenizer(backend, "#", allow_special=True).encode_batch(["a @"])[0][1] == 2


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["<|pad|>", "<|", "|>", "a", " ", "<|endoftext|>", "é"]), max_size=9)
)
def test_a_byte_level_text_comes_back_whatever_it_spells(parts):
    tokenizer, text = TextTokenizer(byte_level()), "".join(parts)
    (found,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(found) == text and (found == tokenizer.eos_id).sum() == 1


def test_the_command_lets_texts_spell_special_tokens(tmp_path, capsys):
    byte_level().save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "<|im_start|>the<|endoftext|>"}) + "\n")
    command = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "t.json")]
    command += ["--valid-fraction", "0", "--out"]
    assert main([*command, str(tmp_path / "text")]) == 0
    assert main([*command, str(tmp_path / "special"), "--allow-special"]) == 0
    im_start = byte_level().token_to_id("<|im_start|>")
    for name, wanted in (("text", 0), ("special", 1)):
        ((_, tokens, _),) = Dataset(tmp_path / name).documents("train")
        assert (tokens == im_start).sum() == wanted and (tokens == 0).sum() == 1


# ---- long texts in pieces

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    *"abcXZ09 \n\t.,'!<>éß中—\u0301\u00a0\u1e9b", "  ", "\n\n", "the", " pool", "'ll", "'S",
    "<0x41>", "<|endoftext|>", "\r\n", "K\u0345", "ﬁ",
]  # fmt: skip


def split_by(pattern: str, behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def piecewise(words=None, normalizer=None, tokens=()) -> TextTokenizer:
    backend = train_tokenizer([*TEXTS, "the pool's 'll a\n b\n\n c  d"] * 3, 320).backend
    if words is not None:
        backend.pre_tokenizer = words
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(tokens))
    return TextTokenizer(backend)


CUTTABLE = {
    "ours": piecewise(),
    "cl100k": piecewise(split_by(CL100K), normalizers.NFC()),
    "Qwen 2": piecewise(split_by(CL100K.replace("{1,3}", "")), normalizers.NFKD()),
    "digits": piecewise(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        ["  ", "\n\n", " a", "the"],
    ),
}


@pytest.mark.parametrize("kind", CUTTABLE)
@given(text=st.lists(st.sampled_from(WORDS), max_size=60).map("".join), size=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_long_texts_in_pieces_have_the_same_tokens(kind, text, size):
    tokenizer = CUTTABLE[kind]
    assert tokenizer.can_be_cut
    with pytest.MonkeyPatch.context() as patch:
        (whole,) = tokenizer.encode_batch([text])
        patch.setattr(long_texts, "LONG", size)
        assert "".join(long_texts.pieces_of(text)) == text
        assert np.array_equal(tokenizer.encode_batch([text])[0], whole)


NOT_CUT = {
    "unigram": TextTokenizer(unigram(), "</s>"),
    "word piece": TextTokenizer(word_piece(), "[SEP]"),
    "a space before": piecewise(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "words with spaces": piecewise(split_by(CL100K + r"|\p{L}+ \p{L}+")),
    "another behaviour": piecewise(split_by(CL100K, "merged_with_next")),
    "another pattern": piecewise(split_by(r"\s+")),
    "a text before": piecewise(None, normalizers.Prepend("x")),
    "a token with a space": piecewise(tokens=["the pool"]),
    "a token of one word": piecewise(tokens=[AddedToken("pool", single_word=True)]),
    "a token that strips": piecewise(tokens=[AddedToken("pool", rstrip=True)]),
}


@pytest.mark.parametrize("tokenizer", NOT_CUT.values(), ids=NOT_CUT)
def test_what_may_depend_on_more_is_not_cut(tokenizer):
    assert not tokenizer.can_be_cut


def test_a_long_text_is_never_encoded_as_one(monkeypatch):
    """Pieces are bounded; so is what the library takes for each."""
    tokenizer, text = CUTTABLE["ours"], "the experts of a pool\n" * 60_000
    sizes, encoded = [], TextTokenizer._encoded
    monkeypatch.setattr(
        TextTokenizer,
        "_encoded",
        lambda self, texts: sizes.extend(map(len, texts)) or encoded(self, texts),
    )
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
    assert len(sizes) == 2 and max(sizes) < long_texts.LONG + 10 and sum(sizes) == len(text)


def test_a_long_text_that_is_encoded_as_one_is_named_with_its_memory(monkeypatch, caplog):
    monkeypatch.setattr(encoding, "MANY_CHARACTERS", 10)
    long = SimpleNamespace(text="the the the the", source="a.txt", size=3 * 10**9)
    for tokenizer in (CUTTABLE["ours"], TextTokenizer(unigram(), "</s>")):
        encoding._encode_batch([long], tokenizer)
    assert [r.getMessage().partition(": this")[0] for r in caplog.records] == [
        "a.txt: its 0 million characters are encoded as one, in some 399 GB of memory"
    ]
