"""Pages of the explorer of made-up documents and routing, and a browser to open them in."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from emotrain.explorer.documents import ShownDocuments
from emotrain.explorer.experts import expert_pages
from emotrain.explorer.maps import map_labels
from emotrain.explorer.page import ModelView, build_page
from emotrain.explorer.routing import DocumentRouting

BYTES = [bytes([value]) for value in range(256)]
"""A vocabulary of single bytes: every character of more than one is split over tokens."""


def made_documents(texts: Sequence[str], domains: Sequence[str]) -> ShownDocuments:
    names, domain_U = np.unique(np.array(domains), return_inverse=True)
    tokens = [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]
    return ShownDocuments(100 + np.arange(len(texts)), tokens, names.tolist(), domain_U)


def made_view(
    documents: ShownDocuments,
    name: str,
    num_experts: int = 12,
    label: Callable[[int], str] = "label of {}".format,
    seed: int = 0,
) -> ModelView:
    """A model with two layers whose experts prefer domains, and three clusters."""
    rng = np.random.default_rng(seed)
    count, total = len(documents.tokens), int(documents.start_U[-1])
    mean, first = [], []
    for _ in range(2):
        taste_YN = rng.dirichlet(np.full(num_experts, 0.5), len(documents.domains))
        mean_UN = taste_YN[documents.domain_U] + rng.uniform(0, 0.3, (count, num_experts))
        mean.append((mean_UN / mean_UN.sum(1, keepdims=True)).astype(np.float32))
        first.append(rng.integers(0, num_experts + 1, total).astype(np.uint16))
    routing = DocumentRouting(
        (0, 3), tuple(mean), tuple(first), tuple(rng.normal(size=(2, num_experts, 4)))
    )
    cluster_U, points_U2 = rng.integers(0, 3, count), rng.uniform(0, 1, (count, 2))
    cluster_U[:3] = range(3)
    clusters = [label(c) for c in range(3)]
    labels = map_labels(
        points_U2, cluster_U, clusters, lambda _, groups: [label(g) for g in range(groups)]
    )
    pages = [expert_pages(documents, routing, place, cluster_U) for place in range(2)]
    return ModelView(
        name, "made up", routing, cluster_U, clusters, pages, {"pca": points_U2}, {"pca": labels}
    )


def made_page(documents: ShownDocuments, views: Sequence[ModelView]) -> bytes:
    return build_page(documents, BYTES, views, {"pca": "made up"}, "made-up documents")


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """Headless Chromium of the system. The test is skipped where there is none, but fails where
    continuous integration has promised one."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    missing = [
        *([] if chromium else ["a browser (apt-get install chromium)"]),
        *([] if importlib.util.find_spec("playwright") else ["playwright (the extra `test`)"]),
    ]
    if missing:
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say(f"needs {' and '.join(missing)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()
