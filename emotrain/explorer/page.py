"""The page as one file: data packed into blocks, and the page's own code and style around them.

A block is base64 of zlib in a script element of type `text/plain`, which no browser runs and which
no data can end early: base64 has no `<`. The page's policy lets the browser run and load nothing
but the one script and the one style sheet that it names by their hashes. `page/data.js` reads the
blocks:

    index        JSON: models, domains, pages of experts, and where each column lies
    columns      arrays with a value for each document, one after the other
    vocabulary   bytes of all tokens, one after the other; the column `word_end` divides them
    tokensN      documents N * BLOCK to (N + 1) * BLOCK: token ids, then for each model and layer
                 the first expert of each token

The first three stand before the script, so that it starts before the rest of the file is read.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.explorer.documents import ShownDocuments
from emotrain.explorer.experts import POOL, pools
from emotrain.explorer.routing import DocumentRouting
from emotrain.files import json_text

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("data", "state", "marks", "map", "filters", "search", "panel", "app")
"""Files of the script, in the order in which they use one another."""
BLOCK = 256
"""Documents of a block of tokens."""
KINDS = {1: "u1", 2: "u2", 4: "u4"}


@dataclass(frozen=True)
class ModelView:
    """What the page shows of a model."""

    name: str
    about: str
    """Its checkpoint and step, in words."""
    routing: DocumentRouting
    cluster_U: np.ndarray
    """The cluster of each document, from 0."""
    clusters: Sequence[str]
    """Labels of the clusters."""
    pages: Sequence[Sequence[Mapping[str, Any]]]
    """For each layer the pages of its experts, see `expert_pages`."""
    maps: Mapping[str, np.ndarray]
    """By name, float [U, 2] in [0, 1]; the same names for every model."""
    labels: Mapping[str, Sequence[Sequence[tuple[float, float, str]]]]
    """For each map, levels of labels from coarse to fine: where they stand, and their text."""


def build_page(
    documents: ShownDocuments,
    words: Sequence[bytes],
    models: Sequence[ModelView],
    map_notes: Mapping[str, str],
    about: str,
) -> bytes:
    """The page, UTF-8.

    Args:
        words: the bytes of each token id.
        models: one or two.
        map_notes: what each map is, in a few words, by its name.
        about: where the data comes from, for the page's help.
    """
    columns = _columns(documents, words, models)
    places, at = {}, 0
    for name, values in columns.items():
        places[name] = (KINDS[values.itemsize], at, at + values.nbytes)
        at += values.nbytes
    index = {
        "domains": documents.domains,
        "pool": POOL,
        "block_documents": BLOCK,
        "token_kind": KINDS[_unsigned(len(words)).itemsize],
        "columns": places,
        "maps": list(map_notes),
        "map_notes": dict(map_notes),
        "about": about,
        "models": [
            {
                "name": model.name,
                "about": model.about,
                "layers": model.routing.layers,
                "experts": model.routing.num_experts(),
                "expert_kind": KINDS[_expert_dtype(model).itemsize],
                "clusters": list(model.clusters),
                "pages": model.pages,
                "labels": {name: _rounded(levels) for name, levels in model.labels.items()},
            }
            for model in models
        ],
    }
    blocks = {
        "index": json_text(index, ensure_ascii=False).encode(),
        "columns": b"".join(values.tobytes() for values in columns.values()),
        "vocabulary": b"".join(words),
    }
    return render(blocks, _token_blocks(documents, len(words), models)).encode()


def render(blocks: Mapping[str, bytes], lazy_blocks: Mapping[str, bytes]) -> str:
    """The page around its blocks; the lazy ones stand behind the script."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    sources = [(FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    script = '"use strict";\n' + "\n".join(sources)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        f"img-src data:; base-uri 'none'; form-action 'none'"
    )
    values = {
        "policy": policy,
        "style": style,
        "script": script,
        "blocks": _elements(blocks),
        "lazy_blocks": _elements(lazy_blocks),
    }
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: values[found[1]], template)


def _elements(blocks: Mapping[str, bytes]) -> str:
    return "\n".join(
        f'<script type="text/plain" id="block-{name}">'
        f"{base64.b64encode(zlib.compress(content, 9)).decode('ascii')}</script>"
        for name, content in blocks.items()
    )


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what stands inside of a page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _columns(
    documents: ShownDocuments, words: Sequence[bytes], models: Sequence[ModelView]
) -> dict[str, np.ndarray]:
    """Arrays of unsigned integers, which JavaScript reads in place (little-endian)."""
    columns = {
        "word_end": np.cumsum([len(word) for word in words]).astype("<u4"),
        "start": documents.start_U.astype("<u4"),
        "doc": documents.id_U.astype("<u4"),
        "domain": documents.domain_U.astype("<u2"),
    }
    for m, model in enumerate(models):
        pool_LUX = np.stack([pools(mean_UN) for mean_UN in model.routing.mean])
        shares = [
            np.take_along_axis(np.pad(mean_UN, ((0, 0), (0, POOL))), pool_UX, axis=1)
            for mean_UN, pool_UX in zip(model.routing.mean, pool_LUX, strict=True)
        ]
        columns[f"cluster{m}"] = model.cluster_U.astype("<u2")
        columns[f"pool{m}"] = pool_LUX.astype(_expert_dtype(model))
        columns[f"share{m}"] = (255 * np.stack(shares)).round().astype("u1")
        for name, points_U2 in model.maps.items():
            for axis, letter in enumerate("xy"):
                points_U = (65535 * points_U2[:, axis]).round()
                columns[f"{name}_{letter}{m}"] = points_U.astype("<u2")
    return columns


def _token_blocks(
    documents: ShownDocuments, vocab_size: int, models: Sequence[ModelView]
) -> dict[str, bytes]:
    start_U = documents.start_U
    token_T = np.concatenate(documents.tokens).astype(_unsigned(vocab_size))
    arrays = [token_T] + [
        first_T.astype(_expert_dtype(model)) for model in models for first_T in model.routing.first
    ]
    blocks = {}
    for number, first in enumerate(range(0, len(documents.tokens), BLOCK)):
        last = min(first + BLOCK, len(documents.tokens))
        part = slice(start_U[first], start_U[last])
        blocks[f"tokens{number}"] = b"".join(array[part].tobytes() for array in arrays)
    return blocks


def _expert_dtype(model: ModelView) -> np.dtype:
    """Of the numbers of experts; the number of experts itself stands for none."""
    return _unsigned(max(model.routing.num_experts()) + 1)


def _unsigned(count: int) -> np.dtype:
    """The smallest unsigned integers that tell so many values apart."""
    return np.dtype("u1" if count <= 2**8 else "<u2" if count <= 2**16 else "<u4")


def _rounded(levels: Sequence[Sequence[tuple[float, float, str]]]) -> list[list[Any]]:
    return [[(round(x, 4), round(y, 4), text) for x, y, text in level] for level in levels]
