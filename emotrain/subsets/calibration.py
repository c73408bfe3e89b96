"""The text that chooses experts: documents of a prepared data set, of one of its clusters, of a
file, or a prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.config import Config
from emotrain.data.answers import first_item
from emotrain.data.document_clusters import DOCUMENTS, documents_of_cluster
from emotrain.data.documents import DocumentReader
from emotrain.data.formats import Dataset
from emotrain.data.tokenizer import TextTokenizer
from emotrain.errors import MissingFileError, UserError
from emotrain.evaluation.reading import check_vocabulary, tokenizer_of

HELD_BACK = 4
"""One of so many documents measures the choice and has no part in it."""

CLUSTER = re.compile(r"(.*\.parquet):([0-9]{1,9})", re.DOTALL)
"""A cluster of documents: the file of `emotrain cluster` and a number."""


@dataclass(frozen=True)
class CalibrationText:
    """Token ids of documents, each ending in EOS."""

    source: str
    domain: str
    choose: Sequence[np.ndarray]
    """Score the experts."""
    measure: Sequence[np.ndarray]
    """Measure the subset; those of `choose` where there is a single one."""
    held_back: bool
    """Whether `measure` had no part in the choice."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.choose))

    @property
    def fingerprint(self) -> str:
        """sha256 over the ids of the documents that choose."""
        digest = hashlib.sha256()
        for ids in self.choose:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, dtype="<u4").tobytes())
        return digest.hexdigest()


def read_calibration(
    source: str | Path | None,
    prompts: Sequence[str],
    config: Config,
    checkpoint: Path,
    domain: str = "",
    most_documents: int = 64,
    document_tokens: int = 0,
) -> CalibrationText:
    """Read calibration text, in the order in which it lies; a prepared data set is shuffled.

    Args:
        source: a folder written by `emotrain prepare` (its train split); a cluster of its
            documents, as `clusters.parquet:7` (`emotrain cluster`); or a JSONL file of documents
            (`text`) or of questions (`question` or `prompt`, which alone is read: no choices and no
            answer).
        prompts: texts given instead.
        domain: of a data set, or of a file's documents that name theirs; empty takes all. Prompts
            and questions have none, but may have the exclusive experts of one.
        document_tokens: tokens of a document that count, from its start; 0 for all.
    Raises:
        UserError: nothing to read, another tokenizer than the model's, or ids that it lacks.
    """
    if most_documents < 1:
        raise UserError(f"documents={most_documents} leaves nothing to choose by; give 1 or more")
    if document_tokens < 0 or document_tokens == 1:
        raise UserError(
            f"document_tokens={document_tokens} leaves nothing to predict; give at least 2, or 0 "
            f"for whole documents"
        )
    if (source is None) == (not prompts):
        raise UserError("give calibration text once: --calibration DATA or --prompt TEXT")
    is_file = source is not None and Path(source).is_file()
    of_no_domain = bool(prompts) or (is_file and _asks_questions(Path(source or "")))
    if of_no_domain and domain and domain not in dict(config.model.experts.exclusive):
        raise UserError(
            f"--domain {domain}: prompts and questions are of no domain, and the model has no "
            f"exclusive experts of it; leave it out"
        )
    if prompts:
        texts: Iterator[str] = iter(prompts)
        documents = _encoded(texts, tokenizer_of(checkpoint, config))
        name = "prompt"
    elif Path(source or "").is_dir():
        documents, name = _of_dataset(Path(source or ""), domain, config, checkpoint), str(source)
    elif not is_file and (named := CLUSTER.fullmatch(str(source))):
        documents, name = _of_cluster(named, domain, config, checkpoint), str(source)
    elif is_file and Path(source or "").name == DOCUMENTS:
        raise UserError(f"{source}: say which cluster chooses experts, for example {source}:7")
    else:
        path = Path(source or "")
        if not is_file:
            raise MissingFileError(
                f"{path}: no such calibration data; give a folder of emotrain prepare or a JSONL "
                f"file"
            )
        documents = _encoded(_texts(path, domain), tokenizer_of(checkpoint, config))
        name = str(path)
    cut = (ids[: document_tokens or None] for ids in documents if len(ids) > 1)
    found = list(islice(cut, most_documents))
    if not found:
        of_domain = f" of domain {domain!r}" if domain else ""
        raise UserError(f"{name}: has no text{of_domain} to choose experts by; give at least one")
    held_back = len(found) > 1
    measure = found[HELD_BACK - 1 :: HELD_BACK] or found[-1:]
    taken = {id(ids) for ids in measure} if held_back else set()
    choose = [ids for ids in found if id(ids) not in taken]
    return CalibrationText(name, domain, choose, measure, held_back)


def _of_dataset(data: Path, domain: str, config: Config, checkpoint: Path) -> Iterator[np.ndarray]:
    dataset = Dataset(data, verify_checksums=config.data.verify_checksums)
    check_vocabulary(dataset.path, dataset.vocab_size, config, checkpoint)
    if domain and domain not in dataset.domains["train"]:
        raise UserError(
            f"{data}: has no training documents of domain {domain!r}; its domains are "
            f"{', '.join(sorted(dataset.domains['train']))}"
        )
    return (ids for _, ids, _ in dataset.documents("train", domain or None))


def _of_cluster(
    named: re.Match[str], domain: str, config: Config, checkpoint: Path
) -> Iterator[np.ndarray]:
    path, cluster = named.groups()
    dataset, split, documents = documents_of_cluster(
        Path(path), int(cluster), domain, config.data.verify_checksums
    )
    check_vocabulary(dataset.path, dataset.vocab_size, config, checkpoint)
    if split != "train":
        raise UserError(
            f"{path}: clusters of {split} documents choose no experts, which are measured on them; "
            f"run `emotrain cluster` with --split train"
        )
    return documents


def _encoded(texts: Iterator[str], tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    for text in texts:
        yield tokenizer.encode_batch([text])[0]


def _texts(path: Path, domain: str) -> Iterator[str]:
    """Texts of a file of documents, or prompts of a file of questions."""
    if _asks_questions(path):
        yield from _prompts(path)
        return
    for document in DocumentReader(strict=True).read(path):
        if not domain or document.domain == domain:
            yield document.text


def _asks_questions(path: Path) -> bool:
    """Whether the first line of a file is a task's item.

    Raises:
        UserError: it is a document, too: whether its text has the answer nobody can tell.
    """
    if path.suffix not in (".jsonl", ".json"):
        return False
    item = first_item(path)
    if not {"question", "prompt"} & item.keys():
        return False
    if "text" in item:
        raise UserError(
            f"{path}: line 1 has a text and a question; leave one, so that it is a document or a "
            f"question"
        )
    return True


def _prompts(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                item: Any = json.loads(line)
                question = item["prompt"] if "prompt" in item else item["question"]
                if not isinstance(question, str) or not question.strip():
                    raise ValueError("what it asks is not a text")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path}: line {number} is not a question ({error}); repair it"
                ) from None
            yield question
