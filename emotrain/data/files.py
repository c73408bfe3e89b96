"""Which files of the inputs hold documents. Nothing is passed over without being counted."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from emotrain.data.manifest import MANIFEST
from emotrain.errors import MissingFileError, UserError

log = logging.getLogger("emotrain")

EXTENSIONS = {
    ".jsonl": "lines",
    ".json": "lines",
    ".jsonl.gz": "lines",
    ".json.gz": "lines",
    ".jsonl.zst": "lines",
    ".json.zst": "lines",
    ".parquet": "parquet",
    ".txt": "text",
}
"""How each kind of file is read."""

COMPRESSED = {ending for ending in EXTENSIONS if ending.endswith((".gz", ".zst"))}


def extension_of(path: Path) -> str | None:
    """The extension of a file that can be read, such as `.jsonl.zst`; None for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next(
        (
            ending
            for ending in ("".join(suffixes[-2:]), "".join(suffixes[-1:]))
            if ending in EXTENSIONS
        ),
        None,
    )


def shown(name: str) -> str:
    """A file's name as text: bytes of it that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find_files(
    inputs: Sequence[str | Path], out: str | Path | None = None
) -> tuple[list[Path], dict[str, int]]:
    """The document files among `inputs`: files as given, folders searched to any depth, in sorted
    order; and how many files were passed over, by kind.

    Links to folders are followed, each real folder once. Inside of a folder, files of other kinds
    (a README beside the data), hidden files, prepared data sets and the folder `out` are passed
    over.

    Raises:
        MissingFileError: an input that does not exist, or a link to a file or folder that is not
            there. UserError: a folder that may not be read, a file of an unknown kind, a folder
            without a document file, or a file that is named twice.
    """
    known = ", ".join(EXTENSIONS)
    files: dict[Path, Path] = {}
    passed_over: Counter[str] = Counter()
    for item in map(Path, inputs):
        if item.is_dir():
            skip = None if out is None else Path(out).resolve()
            found = sorted(_search(item, skip, passed_over))
            if not found:
                raise UserError(f"{item}: no document files in this folder; they end in {known}")
        elif not item.exists():
            raise MissingFileError(
                f"{item}: no such file or folder; `sample` names the embedded corpus"
            )
        elif extension_of(item) is None:
            raise UserError(f"{item}: unknown kind of file; documents are read from {known}")
        else:
            found = [item]
        for path in found:
            if path.resolve() in files:
                raise UserError(
                    f"{path}: named twice, its documents would count double; give each file once"
                )
            files[path.resolve()] = path
    if passed_over:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(passed_over.items()))
        log.info("passed over %s files: %s", f"{passed_over.total():,}", kinds)
    return list(files.values()), dict(sorted(passed_over.items()))


def _search(folder: Path, out: Path | None, passed_over: Counter[str]) -> Iterator[Path]:
    """The document files below a folder, in any order."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: this folder may not be read ({error.strerror}); give the right, or "
            f"leave it out"
        ) from None

    seen: set[Path] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(root).resolve()
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        if MANIFEST in names or here == out:
            passed_over["in prepared data sets"] += len(names)
            folders.clear()
            continue
        hidden = [name for name in folders if name.startswith(".")]
        passed_over["in hidden folders"] += len(hidden)
        folders[:] = [name for name in folders if name not in hidden]
        for name in names:
            path = Path(root, name)
            if name.startswith("."):
                passed_over["hidden"] += 1
            elif path.is_symlink() and not path.exists():
                raise MissingFileError(
                    f"{path}: a link to {os.readlink(path)}, which is not there; fetch it, or "
                    f"remove the link"
                )
            elif extension_of(path) and path.is_file():
                yield path
            else:
                passed_over[f"with ending {path.suffix or 'none'}"] += 1
    for kind in [kind for kind, count in passed_over.items() if not count]:
        del passed_over[kind]
