"""Which files a path means.

    tokens/part-00.npy        a file
    tokens/                   a folder: the files in it to any depth, in sorted order
    tokens/*/part-*.npy       a pattern: sorted
    files.txt                 a list: a path a line
    mix.txt                   a mix, as OLMo-core has them: `label,path` a line
    s3://bucket/tokens/       any of these of an object store or web server; a folder ends in `/`

Lines of a list that are empty or begin with `#` do not count. Paths in it are relative to
`data.raw.root`, or else to the folder of the list, and `{TOKENIZER}` in them stands for
`data.raw.tokenizer_name`. A label is the domain of a file's documents.
"""

from __future__ import annotations

import glob
import logging
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from emotrain.config import RawTokensConfig
from emotrain.data.checks import STAT_THREADS
from emotrain.data.stores import remote
from emotrain.data.stores.content import Content, LocalContent, OpenFiles
from emotrain.errors import MissingFileError, UserError

log = logging.getLogger("emotrain")

LIST = ".txt"
"""What lists end in that do not lie on this machine."""
MOST_LIST_BYTES = 2**28
"""A list of a million files is smaller; what is larger is no list."""


class Listed(NamedTuple):
    """A file of a store."""

    content: Content
    label: str
    """The domain of its documents; empty where nobody says."""


def list_files(
    path: str,
    endings: Sequence[str],
    raw: RawTokensConfig,
    domain: str = "",
    meant: Callable[[str], str] = str,
) -> list[Listed]:
    """The files that `path` means, in order; see the top of this file.

    Args:
        endings: how the names of such files end. A file with another name is a list.
        domain: only files with this label; empty for all.
        meant: the file that a name stands for, where formats have names for several.
    Raises:
        UserError: none, one that is not there or not a file, or one that is named twice.
    """
    labels: Iterable[tuple[str, str]]
    if "://" in path:
        labels, what = _remote(path, endings, raw, meant), "such files at this address"
    elif os.path.isdir(path):
        labels = [(name, "") for name in _files_below(path, endings)]
        what = f"files that end in {' or '.join(endings)} below this folder"
    elif meant(path).endswith(tuple(endings)) and os.path.lexists(meant(path)):
        labels, what = [(meant(path), "")], ""
    elif glob.has_magic(path) and not os.path.exists(path):
        names = sorted(n for n in glob.iglob(path, recursive=True) if n.endswith(tuple(endings)))
        labels, what = [(name, "") for name in names], f"files that end in {' or '.join(endings)}"
    elif os.path.isfile(path):
        labels = [(meant(name), label) for name, label in read_list(path, raw)]
        what = "paths in this list"
    else:
        raise MissingFileError(
            f"{path}: no such file, folder or pattern; give files that end in "
            f"{' or '.join(endings)}, or a list of them"
        )
    if domain:
        known = sorted({label for _, label in labels if label})
        labels = [(name, label) for name, label in labels if label == domain]
        what = f"files of domain {domain!r}; its labels are {', '.join(known) or 'none'}"
    if not labels:
        raise UserError(f"{path}: there are no {what}")
    if twice := _first_twice(name for name, _ in labels):
        raise UserError(
            f"{path}: names {twice} twice, its documents would count double; name each file once"
        )
    return _with_sizes(path, list(labels))


def read_list(path: str, raw: RawTokensConfig) -> list[tuple[str, str]]:
    """(path, label) of every line of a list or mix."""
    if "://" in path:
        content = remote.text_at(path)
    else:
        large = os.stat(path).st_size > MOST_LIST_BYTES
        content = b"\0" if large else Path(path).read_bytes()
    if b"\0" in content:
        raise UserError(
            f"{path}: is no list of files (a path, or label,path, a line); say what it is with "
            f"data.raw.format"
        )
    root = raw.root or os.path.dirname(path)
    found = []
    for number, line in enumerate(content.decode("utf-8", "surrogateescape").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        label, comma, name = line.partition(",")
        # Only of a mix the part before the first comma is no path.
        label, name = (label.strip(), name.strip()) if comma and "/" not in label else ("", line)
        if not name or (comma and "/" not in line.partition(",")[0] and not label):
            raise UserError(f"{path}: line {number} is not `label,path`: {line[:80]!r}; mend it")
        if "{TOKENIZER}" in name:
            if not raw.tokenizer_name:
                raise UserError(
                    f"{path}: line {number} names {{TOKENIZER}}; say what stands for it with "
                    f"data.raw.tokenizer_name, such as allenai/dolma2-tokenizer"
                )
            name = name.replace("{TOKENIZER}", raw.tokenizer_name)
        if "://" not in name and not os.path.isabs(name):
            name = f"{root.rstrip('/')}/{name}" if root else name
        found.append((name, label))
    return found


def _remote(
    address: str, endings: Sequence[str], raw: RawTokensConfig, meant: Callable[[str], str]
) -> list[tuple[str, str]]:
    """As `list_files`, of an object store: a list ends in `.txt`, a folder in `/`."""
    if address.endswith(LIST):
        return [(meant(name), label) for name, label in read_list(address, raw)]
    if glob.has_magic(address) or address.endswith("/"):
        return [(name, "") for name in remote.names_at(address, endings)]
    return [(meant(address), "")]


def beside(content: Content, name: str, files: OpenFiles) -> Content:
    """Another file that belongs to one."""
    return _look(name, content.name, files)


def _files_below(folder: str, endings: Sequence[str]) -> list[str]:
    """Files with one of the endings, to any depth, sorted; hidden ones are left out, and links
    to folders are followed, each real folder once."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: this folder may not be read ({error.strerror})")

    found: list[str] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (here := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(root, name)
            for name in names
            if name.endswith(tuple(endings)) and not name.startswith(".")
        ]
    return sorted(found)


def _with_sizes(path: str, labels: list[tuple[str, str]]) -> list[Listed]:
    """Files with their sizes, without empty ones: the tool that writes Dolma's makes some."""
    files = OpenFiles()

    def look(item: tuple[str, str]) -> Listed:
        return Listed(_look(item[0], path, files), item[1])

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        listed = list(pool.map(look, labels))
    kept = [file for file in listed if file.content.size]
    if not kept:
        raise UserError(f"{path}: its {len(listed)} files are empty; give files with tokens")
    if len(kept) < len(listed):
        empty = next(file.content.name for file in listed if not file.content.size)
        log.warning(
            "%s: %d of %d files are empty and left out, such as %s",
            path, len(listed) - len(kept), len(listed), empty,
        )  # fmt: skip
    return kept


def _look(name: str, named_by: str, files: OpenFiles) -> Content:
    if "://" in name:
        return remote.look(name)
    try:
        found = os.stat(name)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise MissingFileError(f"{name}: cannot be read ({said}), {named_by} names it") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{name}: is no file; name files alone")
    return LocalContent(name, found.st_size, files)


def _first_twice(names: Iterable[str]) -> str:
    """The first name that comes twice; empty if none does."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""
