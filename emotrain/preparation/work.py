"""The first half of `prepare`: the plan, the tokenizer, and the pieces that are not encoded yet."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emotrain
from emotrain.data.files import shown
from emotrain.data.manifest import TOKENIZER
from emotrain.data.tokenizer import TextTokenizer, load_tokenizer, tokenizer_file
from emotrain.data.tokenizer import train_tokenizer as train_bpe
from emotrain.errors import UserError
from emotrain.preparation.half_done import HalfDone
from emotrain.preparation.pieces import cut_into_pieces, expected_tokens, text_bytes
from emotrain.preparation.recipe import Recipe
from emotrain.preparation.spill import read_piece, write_durably
from emotrain.preparation.workers import Job, do_all
from emotrain.progress import ProgressBar

log = logging.getLogger("emotrain")

TOKENIZER_BYTES = 2**28
"""Bytes of text a tokenizer is trained on, at most: the start of each file, as much of one as of
another."""

SMALL_BYTES = 2**22
"""Bytes of text, about, up to which no worker is started."""

CHECKERS = 8
"""Threads that check what an earlier process left."""


@dataclass(frozen=True)
class TokenizerChoice:
    """A file, or one to be trained."""

    path: str | Path | None
    train: bool
    vocab_size: int

    def __post_init__(self) -> None:
        if (self.path is None) != self.train:
            raise UserError(
                f"{'no tokenizer' if self.path is None else 'two tokenizers'}; give either "
                f"--tokenizer FILE or --train-tokenizer"
            )

    @property
    def origin(self) -> str:
        """What the card says of it."""
        if self.path is None:
            return f"trained on these documents, {self.vocab_size} tokens wanted"
        return shown(Path(self.path).name)

    def identity(self) -> str:
        """What the plan says of it: another one is another plan. Raises: FileNotFoundError."""
        if self.path is None:
            return f"trained, {self.vocab_size} tokens"
        return f"sha256 {hashlib.sha256(tokenizer_file(self.path)).hexdigest()}"


class Work:
    """What is to be done for one data set."""

    def __init__(
        self,
        staging: HalfDone,
        inputs: Sequence[Path],
        files: list[Path],
        recipe: Recipe,
        choice: TokenizerChoice,
        workers: int,
        bar: ProgressBar,
    ):
        self.staging, self.files, self.recipe = staging, files, recipe
        self.choice, self.workers, self.bar = choice, workers, bar
        self.names = _names(inputs, files)
        self.pieces = cut_into_pieces(files, whole_files=recipe.parsed_boundary.joins)
        expected = expected_tokens(files)
        held_out = int(expected * recipe.valid_fraction)
        self.buckets = {
            "train": 1 + expected // recipe.shard_tokens,
            "valid": 1 + held_out // recipe.shard_tokens,
        }
        self.encoder: TextTokenizer
        self.resumed = False
        """Whether an earlier process began this."""

    def begin(self) -> dict[str, Any] | None:
        """Agree on the plan and have the tokenizer. Returns the report, if all is done already."""
        plan = self._plan()
        report = self.staging.published()
        try:
            self.resumed = self.staging.agree(plan, loose=self.staging.kept)
        except UserError:
            if report is not None:  # nothing is half done: `out` is there, made by another command
                self.staging.check_target()
            raise
        if report is not None and self.resumed:
            self.staging.kept = False
            return report
        self.staging.check_target()
        self.encoder = self._tokenizer()
        return None

    def encode(self, part: tuple[int, int] | None) -> None:
        """Encode the pieces, or those of a part, that are not there."""
        numbers = list(self.numbers(part))
        missing = [number for number, known in self.known(numbers).items() if known is None]
        sizes = {number: sum(p.size for p in self.pieces[number]) for number in numbers}
        done = sum(sizes.values()) - sum(sizes[number] for number in missing)
        if done and missing:
            log.info("%d of %d pieces are there", len(numbers) - len(missing), len(numbers))
        pace = Pace(self.bar, sum(sizes.values()), done)
        small = self._text_bytes(missing) <= SMALL_BYTES
        do_all(self.orders(), [self._job(n) for n in missing], 1 if small else self.workers, pace)

    def numbers(self, part: tuple[int, int] | None) -> range:
        """The pieces of a part: as many as of another, about."""
        which, count = part or (1, 1)
        edges = [len(self.pieces) * i // count for i in (which - 1, which)]
        return range(*edges)

    def known(self, numbers: Sequence[int]) -> dict[int, dict[str, Any] | None]:
        """What is known of pieces, None of those that are not whole; what an earlier process left
        is compared with its checksum."""

        def read(number: int) -> dict[str, Any] | None:
            return read_piece(self.staging.folder, number, hashed=self.resumed)

        with ThreadPoolExecutor(CHECKERS) as pool:
            return dict(zip(numbers, pool.map(read, numbers), strict=True))

    def orders(self) -> dict[str, Any]:
        return {
            "folder": str(self.staging.folder),
            "data": str(self.staging.data),
            "files": [str(path.absolute()) for path in self.files],
            "recipe": self.recipe.to_json(),
            "buckets": self.buckets,
            "pieces": len(self.pieces),
        }

    def part_report(self, part: tuple[int, int]) -> dict[str, Any]:
        """What `--part` prints."""
        known = [piece for piece in self.known(self.numbers(part)).values() if piece]
        return {
            "out": str(self.staging.out),
            "part": list(part),
            "pieces": len(known),
            "all_pieces": len(self.pieces),
            "files": len(self.files),
            "vocab_size": self.encoder.vocab_size,
            **{
                total: sum(piece[total] for piece in known)
                for total in ("documents", "tokens", "text_bytes")
            },
            "skipped_documents": sum(sum(piece["skipped"].values()) for piece in known),
            "filtered_documents": sum(sum(piece["filtered"].values()) for piece in known),
        }

    def _plan(self) -> dict[str, Any]:
        import tokenizers

        stats = [path.stat() for path in self.files]
        identity = self.choice.identity()
        return {
            "emotrain": emotrain.__version__,
            "tokenizers": tokenizers.__version__,
            "recipe": self.recipe.to_json() | {"tokenizer": identity},
            "files": [
                {"name": name, "bytes": stat.st_size, "modified": stat.st_mtime_ns}
                for name, stat in zip(self.names, stats, strict=True)
            ],
            "buckets": self.buckets,
        }

    def _job(self, number: int) -> Job:
        parts = [
            [part.file, part.span.start, part.span.stop, part.byte_start, part.byte_stop]
            for part in self.pieces[number]
        ]
        return {"piece": number, "parts": parts}

    def _text_bytes(self, numbers: Sequence[int]) -> int:
        parts = [part for number in numbers for part in self.pieces[number]]
        return sum(text_bytes(self.files[part.file], part.size) for part in parts)

    def _tokenizer(self) -> TextTokenizer:
        """The tokenizer of the data set, as it is in its folder."""
        path, recipe = self.staging.data / TOKENIZER, self.recipe
        if not path.exists():
            with self.staging.alone("tokenizer"):
                if not path.exists():
                    encoder = self._first_tokenizer()
                    write_durably(path, encoder.to_json())
                    return encoder
        return load_tokenizer(path, recipe.eos_token, recipe.allow_special)

    def _first_tokenizer(self) -> TextTokenizer:
        if self.choice.path is None:
            return train_bpe(self._training_texts(), self.choice.vocab_size, self.recipe.eos_token)
        encoder = load_tokenizer(self.choice.path, self.recipe.eos_token, self.recipe.allow_special)
        if encoder.loses_characters():
            log.warning(
                "%s: has no token for unknown characters and no bytes to spell them: they vanish; "
                "take a byte-level tokenizer if that matters",
                self.choice.path,
            )
        return encoder

    def _training_texts(self) -> Iterator[str]:
        """Documents to train a tokenizer on: none that is marked held-out, about as many bytes of
        each file."""
        self.bar.start("training the tokenizer", len(self.files))
        reader = self.recipe.reader()
        for path in self.files:
            left = TOKENIZER_BYTES // len(self.files)
            for document in reader.read_span(path):
                if document.split != "valid":
                    yield document.text
                    left -= document.size
                if left <= 0:
                    break
            self.bar.advance(1)


class Pace:
    """Shows how fast documents are encoded, and how long it will take."""

    def __init__(self, bar: ProgressBar, total: int, done: int):
        self.bar, self.total, self.done = bar, total, done
        self.began, self.at_first, self.tokens = time.monotonic(), done, 0
        bar.start("encoding", total, done)

    def __call__(self, size: int, tokens: int) -> None:
        """So many bytes of input more are done, and gave so many tokens."""
        self.done += size
        self.tokens += tokens
        seconds = max(1e-3, time.monotonic() - self.began)
        speed = (self.done - self.at_first) / seconds
        left = (self.total - self.done) / speed if speed else 0.0
        self.bar.update(
            self.done,
            f"{self.tokens / seconds / 1e6:.2f} M tokens/s, {speed / 1e6:.1f} MB/s, "
            f"{_duration(left)} left",
        )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _names(inputs: Sequence[Path], files: Sequence[Path]) -> list[str]:
    """Names of files that do not depend on where the inputs lie, each once."""
    folders = [item for item in inputs if item.is_dir()]
    names: list[str] = []
    taken: dict[str, int] = {}
    for path in files:
        above = next((f for f in folders if path != f and path.is_relative_to(f)), path.parent)
        name = shown(
            str(
                Path(above.name, path.relative_to(above))
                if above != path.parent or above in folders
                else path.name
            )
        )
        taken[name] = taken.get(name, 0) + 1
        names.append(name if taken[name] == 1 else f"{name} ({taken[name]})")
    return names
