"""`emotrain prepare`: text documents in, a data set of shuffled token shards out, in little memory,
on any number of processes and machines.

1. The files are found, put in order, and cut into pieces (`pieces`); with `train_tokenizer`, a
  first pass over their starts trains a tokenizer.
2. Pieces are encoded, in any order, by whoever has time (`encoding`, `workers`). A hash of (seed,
  file, record) decides to which shard a document goes, and where in it, so that nothing depends on
  other pieces. Each piece is a file of its own (`spill`), whole or not there.
3. Duplicates are found, among all pieces (`deduplicate`).
4. Shard by shard, documents are put in the order of their places and written (`shuffle`).
5. The card and the manifest are written, everything is flushed, and the folder takes its name.

So documents that were neighbours in a file end up far apart, and the same inputs, tokenizer and
options give the same bytes. Until the last step all lies in a hidden folder (`half_done`): a
process that is killed leaves no data set rather than half of one, and the same command goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emotrain.data
from emotrain.data.document_filters import language_filter
from emotrain.data.documents import FIELDS, Fields
from emotrain.data.files import find_files
from emotrain.data.tokenizer import EOS_TOKEN
from emotrain.errors import UserError
from emotrain.preparation.deduplicate import key_maker
from emotrain.preparation.half_done import HalfDone
from emotrain.preparation.joining import join_pieces
from emotrain.preparation.recipe import SHARD_TOKENS, Recipe
from emotrain.preparation.work import TokenizerChoice, Work
from emotrain.progress import ProgressBar

SAMPLE = "sample"
"""The input that names the embedded corpus (a folder of that name is `./sample`)."""

SAMPLE_DIR = Path(emotrain.data.__file__).parent / "sample"
"""The embedded corpus: one Parquet file a domain."""


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: bool = False,
    vocab_size: int = 4096,
    eos_token: str = EOS_TOKEN,
    allow_special: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    valid_fraction: float = 0.01,
    seed: int = 0,
    workers: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    fields: Fields = FIELDS,
    bar: ProgressBar | None = None,
    part: tuple[int, int] | None = None,
    join: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Make a data set out of documents, or go on with one that is half done.

    Args:
        inputs: files and folders (see `documents`), or `sample`.
        out: folder to make.
        tokenizer: a `tokenizer.json`; or else `train_tokenizer`, of at most `vocab_size` tokens.
        eos_token, allow_special: see `TextTokenizer`.
        shard_tokens: tokens of a shard, about.
        valid_fraction: share of documents held out, among those whose file does not say.
        seed: of the shuffle and of the held-out share.
        workers: processes; all usable cores by default. The result does not depend on it.
        strict: refuse the first bad document instead of skipping and counting it.
        overwrite: replace an older data set at `out`, once the new one is complete, and begin
            anew where another one is half done.
        fields: names of the keys or columns that hold a document.
        bar: where progress is shown, if anywhere.
        part: (which, of how many), from 1: encode these pieces alone.
        join: make the data set of the parts, all of which must be done.
        options: the others of `Recipe`.
    Returns:
        The report that `--json` prints: counts, sizes in bytes and `seconds`.
    Raises:
        ValueError: bad arguments, unreadable inputs, a bad document if strict, no document to train
            on, `out` exists, is made by another process, or half of it by another command.
        FileNotFoundError: a missing input or tokenizer. OSError: the disk is full.
    """
    started = time.perf_counter()
    sample = tokenizer is None and [str(item) for item in inputs] == [SAMPLE]
    choice = TokenizerChoice(tokenizer, train_tokenizer or sample, vocab_size)
    recipe = Recipe(
        eos_token=eos_token,
        allow_special=allow_special,
        shard_tokens=shard_tokens,
        valid_fraction=valid_fraction,
        seed=seed,
        strict=strict,
        fields=fields,
        **options,
    )
    _check_arguments(workers, part, join)
    _check_packages(recipe)
    named = [SAMPLE_DIR if str(item) == SAMPLE else Path(item) for item in inputs]
    files, passed_over = find_files(named, out)
    bar = bar or ProgressBar(shown=False)
    with HalfDone(out, overwrite, part, keep=join) as staging:
        work = Work(staging, named, files, recipe, choice, workers or _usable_cores(), bar)
        done = work.begin()
        if done is None:
            if not join:
                work.encode(part)
            if part:
                done = work.part_report(part)
            else:
                done = join_pieces(work)
                staging.publish(done)
    passed = {"passed_over_files": sum(passed_over.values()), "passed_over": passed_over}
    return (
        done | passed | {"out": str(Path(out)), "seconds": round(time.perf_counter() - started, 3)}
    )


def _check_arguments(workers: int | None, part: tuple[int, int] | None, join: bool) -> None:
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1; leave it out for one a core")
    if part and join:
        raise UserError("--part and --join are two commands; join when all parts are done")
    if part and not 1 <= part[0] <= part[1]:
        raise UserError(f"--part {part[0]}/{part[1]} is none; parts are 1/{part[1]} and so on")


def _check_packages(recipe: Recipe) -> None:
    """Refuse filters that need a package which is not there, before anything is done."""
    if recipe.parsed_language:
        language_filter(recipe.parsed_language)
    if recipe.deduplication:
        key_maker(recipe.deduplication)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
