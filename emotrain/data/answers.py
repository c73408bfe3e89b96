"""Prompts and answers as sequences: a JSONL file in, PackedBatch out, with a loss on answers alone.

    {"prompt": "Question: 2 + 2 = ?\nAnswer:", "answer": " 4"}
    {"question": "2 + 2 = ?", "choices": ["3", "4"], "answer": 1}

A line is one sequence and one document: its prompt, its answer and EOS. Where neither side has a
space between the two, one is put there. Positions that predict a token of the prompt have no target
(spec 7.5). A pair that is too long loses the start of its prompt. Rows of a micro-batch are padded
to a multiple of 8 tokens. The order is that of `loader`: a pure function of seed and position.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.batch import IGNORE, PADDING_ID, PackedBatch
from emotrain.data.loader import Loader, keyed, permute
from emotrain.data.packing import packed_rows
from emotrain.data.tokenizer import TextTokenizer, load_tokenizer
from emotrain.errors import UserError

log = logging.getLogger("emotrain")

MULTIPLE = 8
"""Rows are padded to a multiple of so many tokens, as the reference pads."""

MOST_FIRST = 2**24
"""Characters of a first line that are looked at."""


def is_answers(path: str | Path) -> bool:
    """Whether a path is a file of prompts and answers: its first line is such a pair."""
    path = Path(path)
    return path.is_file() and "answer" in first_item(path)


def first_item(path: Path) -> dict[str, Any]:
    """The object in the first line of a file that is not empty; nothing where that is none, or
    longer than MOST_FIRST: a file of tokens may have no line ends at all."""
    with open(path, encoding="utf-8", errors="replace") as stream:
        lines = iter(lambda: stream.readline(MOST_FIRST), "")
        first = next((line for line in lines if line.strip()), "")
    try:
        item = json.loads(first)
    except (ValueError, RecursionError):
        return {}
    return item if isinstance(item, dict) else {}


class AnswerLoader:
    """Sequences of a file of prompts and answers, as `emotrain.data.source.DataSource`.

    Args:
        path: the JSONL file.
        tokenizer: a `tokenizer.json`.
        sequence_length: most tokens of a sequence.
        seed: of the order.
        domain: of all pairs, whose exclusive experts they use; empty for none.
    Raises:
        UserError: no such pairs, or one that cannot be read, with its line.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path,
        sequence_length: int,
        seed: int,
        domain: str = "",
    ):
        if not str(tokenizer):
            raise UserError(
                f"{path}: is a file of prompts and answers, which needs a tokenizer; give "
                f"data.tokenizer=FILE, the tokenizer.json of the model's checkpoint"
            )
        self.path, self.tokenizer_file = Path(path), Path(tokenizer)
        self.sequence_length, self.seed, self.domain = sequence_length, seed, domain
        encoder = load_tokenizer(self.tokenizer_file)
        self.vocab_size = encoder.vocab_size
        self._ids: list[np.ndarray] = []
        self._answers: list[int] = []
        cut = 0
        for prompt, answer in _pairs(self.path):
            ids, of_answer = _encode(encoder, prompt, answer, sequence_length)
            cut += ids.size > sequence_length
            self._ids.append(ids[-sequence_length:])
            self._answers.append(of_answer)
        if not self._ids:
            raise UserError(f"{path}: has no prompts and answers; give at least one")
        if cut:
            log.warning(
                "%s: %d of %d pairs have more than data.sequence_length=%d tokens; the starts of "
                "their prompts are left out",
                path,
                cut,
                len(self._ids),
                sequence_length,
            )
        self.num_sequences = len(self._ids)
        """Pairs: sequences of one epoch."""
        self.num_tokens = sum(map(len, self._ids))

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens, their order and where answers begin."""
        digest = hashlib.sha256(f"answers {self.vocab_size}".encode())
        for ids, answer in zip(self._ids, self._answers, strict=True):
            digest.update(f"{len(ids)} {answer} ".encode() + ids.astype("<u4").tobytes())
        return digest.hexdigest()[:16]

    def batch(self, positions: Sequence[int] | np.ndarray) -> PackedBatch:
        """The pairs at `positions` of the order, a row each. Document ids are lines' numbers,
        from 0, empty ones left out."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_sequences)
        numbers = permute(places, self.num_sequences, keyed(self.seed, epochs)).tolist()
        sizes = [len(self._ids[number]) for number in numbers]
        width = -(-max(sizes) // MULTIPLE) * MULTIPLE
        tokens_BS = np.zeros((len(numbers), width), dtype=np.int64)
        for row, number in enumerate(numbers):
            tokens_BS[row, : sizes[row]] = self._ids[number]
        lengths = [[size, width - size] if size < width else [size] for size in sizes]
        ids = [
            [number, PADDING_ID][: len(parts)]
            for number, parts in zip(numbers, lengths, strict=True)
        ]
        packed = packed_rows(tokens_BS, lengths, ids, cross_document_targets=False)
        for row, number in enumerate(numbers):
            # The position before an answer predicts its first token.
            packed.targets_BS[row, : sizes[row] - self._answers[number] - 1] = IGNORE
        return replace(packed, domain=self.domain)

    def step(
        self,
        step_index: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[PackedBatch]:
        """As `Loader.step`."""
        blocks = Loader.micro_batches(step_index, global_batch, micro_batch, rank, world_size)
        return [self.batch(positions) for positions in blocks]


def spaced(prompt: str, answer: str) -> str:
    """A prompt and its answer, with a space between them where neither side has one."""
    between = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    return f"{prompt}{between}{answer}"


def _encode(encoder: TextTokenizer, prompt: str, answer: str, most: int) -> tuple[np.ndarray, int]:
    """Token ids of a pair with EOS, and how many of them are the answer's; of an answer that fills
    a sequence alone, what does not fit is left out before its EOS."""
    answer = spaced(prompt, answer)[len(prompt) :]
    asked, answered = encoder.encode_batch([prompt, answer])
    if len(answered) > most - 1:
        answered = np.concatenate((answered[: most - 2], answered[-1:]))
    return np.concatenate((asked[:-1], answered)), len(answered)


def _pairs(path: Path) -> list[tuple[str, str]]:
    pairs = []
    with open(path, encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    pairs.append(_pair(json.loads(line)))
                except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise UserError(
                        f"{path}: line {number} is not a prompt with its answer ({reason}); give "
                        f'{{"prompt": TEXT, "answer": TEXT}} or a question with choices'
                    ) from None
    return pairs


def _pair(item: Any) -> tuple[str, str]:
    prompt = item["prompt"] if "prompt" in item else item["question"]
    answer = item["answer"]
    if "choices" in item and type(answer) is int:
        if not 0 <= answer < len(item["choices"]):
            raise UserError(f"there is no choice {answer}")
        answer = item["choices"][answer]
    for name, text in (("prompt", prompt), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"its {name} is no text")
    return prompt, answer
