"""What clusters are about, in a few words: class-wise TF-IDF."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emotrain.analysis.spherical import scikit_learn
from emotrain.data.tokenizer import TextTokenizer

WORDS = re.compile(r"[^\W\d_]{2,}(?:['’][^\W\d_]+)?")
"""Two letters or more, of any script."""
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]+"
)
"""Runs of scripts that set no spaces between words: Thai, Lao, Burmese, Khmer, Japanese and
Chinese."""

Terms = list[tuple[str, float]]
"""Words or tokens and their weights, the largest first."""


@dataclass(frozen=True)
class Texts:
    """The text of documents and of tokens."""

    tokens: list[str]
    """Text of every token of the vocabulary alone; U+FFFD stands for a part of a character, and
    the end-of-document token has none."""
    names: list[str]
    """What tokens are called: their text, or where it is not to be seen the tokenizer's name."""
    counts_UX: Any
    """float64, sparse: how often each document has each word."""
    words: Sequence[str]

    @classmethod
    def read(
        cls, tokenizer: TextTokenizer, vocab_size: int, documents: Sequence[np.ndarray]
    ) -> Texts:
        backend = tokenizer.backend
        tokens = backend.decode_batch([[i] for i in range(vocab_size)])
        names = [
            text.strip() if text.strip().isprintable() and text.strip() else backend.id_to_token(i)
            for i, text in enumerate(tokens)
        ]
        counts_UX, words = count_words(backend.decode_batch([ids.tolist() for ids in documents]))
        return cls(tokens, [str(name) for name in names], counts_UX, words)

    def words_of(self, share_YU: np.ndarray, count: int) -> list[Terms]:
        """The words that set classes apart.

        Args:
            share_YU: how much of each document is in each class.
        """
        return best_terms((self.counts_UX.T @ share_YU.T).T, self.words, count)

    def tokens_of(self, counts_YX: np.ndarray, count: int) -> list[Terms]:
        """The tokens that set classes apart.

        Args:
            counts_YX: how often each class has each token.
        """
        return best_terms(counts_YX, self.names, count)


def words_in(text: str) -> list[str]:
    """Words in small letters. Of a script without spaces every two neighbouring characters are
    one: no list of words tells where they end."""
    found = []
    for word in WORDS.findall(text.lower()):
        end = 0
        for run in UNSPACED.finditer(word):
            found += [word[end : run.start()], *(run[0][i : i + 2] for i in range(len(run[0]) - 1))]
            end = run.end()
        found.append(word[end:])
    return [word for word in found if len(word) > 1]


def count_words(texts: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """How often each text has each word, float64, and the words; none where there is none."""
    vectorizer = scikit_learn("feature_extraction.text").CountVectorizer(
        analyzer=words_in, dtype=np.float64
    )
    try:
        counts_UX = vectorizer.fit_transform(texts)
    except ValueError:  # of an empty vocabulary
        return np.zeros((len(texts), 0)), []
    return counts_UX, vectorizer.get_feature_names_out()


def class_tf_idf(counts_YX: np.ndarray) -> np.ndarray:
    """Weight of each term in each class (Grootendorst 2022, arXiv 2203.05794, with the weights of
    BM25 and the root that his BERTopic offers): the root of its share of the class's terms, times
    log((A + 1) / (f + 1/2)), where f is how often it is in all classes and A the mean number of
    terms of a class -> float64 [Y, X]. Words that are everywhere, as `the` is, weigh nothing or
    less, without a list of them."""
    of_class_Y1 = counts_YX.sum(1, keepdims=True)
    share_YX = counts_YX / np.maximum(of_class_Y1, 1e-30)
    return np.sqrt(share_YX) * np.log((of_class_Y1.mean() + 1) / (counts_YX.sum(0) + 0.5))


def best_terms(counts_YX: np.ndarray, names: Sequence[str], count: int) -> list[Terms]:
    """For each class its terms of most weight."""
    weight_YX = class_tf_idf(counts_YX)
    order_YX = np.argsort(-weight_YX, axis=1, kind="stable")[:, :count]
    return [
        [(str(names[x]), float(weight_X[x])) for x in order_X if weight_X[x] > 0]
        for weight_X, order_X in zip(weight_YX, order_YX, strict=True)
    ]
