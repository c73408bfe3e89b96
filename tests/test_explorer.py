"""Proves that the explorer's page holds what the models do: routing against one document at a time,
statistics of experts against plain loops, and a file in which nothing of the data is code. What a
browser makes of it is in test_explorer_page.py."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.batch import PackedBatch
from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.data.document_clusters import DOCUMENT_COLUMNS, Origin, write_columns
from emotrain.data.formats import Dataset
from emotrain.data.tokenizer import TextTokenizer, train_tokenizer
from emotrain.explorer.experts import pool_lifts, pools, router_cosines, typical_tokens
from emotrain.explorer.explore import label_groups_by
from emotrain.explorer.maps import map_labels, principal_map
from emotrain.explorer.page import FOLDER, SCRIPTS
from emotrain.explorer.routing import route, shown_layers
from emotrain.explorer.vocabulary import token_bytes
from emotrain.model.router import RoutingRequest
from emotrain.training.checkpoint import find, load_model
from emotrain.training.checkpoint_folders import identity
from emotrain.training.run import train
from tests.conftest import tiny_settings
from tests.explorer_pages import BYTES, made_documents, made_page, made_view
from tests.test_explorer_page import HOSTILE

# ---- bytes of tokens

TOKENIZER = train_tokenizer(["a naïve text in 日本語", "another one"] * 9, 300)


WORDS = token_bytes(TOKENIZER)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_bytes_of_tokens_are_the_text(text):
    ids = TOKENIZER.encode_batch([text])[0][:-1]
    assert b"".join(WORDS[i] for i in ids) == text.encode()
    assert len(WORDS) == TOKENIZER.vocab_size and WORDS[TOKENIZER.eos_id] == b"<|endoftext|>"


def test_bytes_of_a_vocabulary_of_sentencepiece():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "</s>": 1, "<0xE6>": 2, "▁tea": 3, "pot": 4, "▁": 5, "é": 7}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    found = token_bytes(TextTokenizer(backend, "</s>"))
    assert found == [b"<unk>", b"</s>", b"\xe6", b" tea", b"pot", b" ", b"", "é".encode()]


# ---- statistics of experts


def test_typical_tokens_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    token_T = rng.integers(0, 9, 400)
    first_T = np.where(rng.random(400) < 0.5, token_T % 4, rng.integers(0, 5, 400))
    found = typical_tokens(token_T, first_T, 4)
    for e in range(4):
        scores = {}
        for token in set(token_T[first_T == e].tolist()):
            count = int(((token_T == token) & (first_T == e)).sum())
            p_here = count / (first_T == e).sum()
            p_everywhere = (token_T == token).mean()
            if p_here > p_everywhere:
                share = count / (token_T == token).sum()
                scores[token] = (count * np.log(p_here / p_everywhere), count, share)
        best = sorted(scores, key=lambda token: (-scores[token][0], token))
        assert [token for token, _, _ in found[e]] == best
        for token, count, share in found[e]:
            assert (count, share) == (scores[token][1], pytest.approx(scores[token][2], abs=1e-5))


def test_pools_and_partners_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    mean_UN = rng.dirichlet(np.ones(6), 40).astype(np.float32)
    pool_UX = pools(mean_UN, 3)
    for document, pool in enumerate(pool_UX):
        assert pool.tolist() == sorted(range(6), key=lambda e: -mean_UN[document, e])[:3]
    lift_NN, _ = pool_lifts(pool_UX, 6)
    found = pool_UX.tolist()
    alone = [sum(e in pool for pool in found) for e in range(6)]
    pairs = [(a, b) for a in range(6) for b in range(6) if a != b]
    # Each of 40 pools holds 3 * 2 ordered pairs: by chance they go to two experts in proportion to
    # how often each is in a pool.
    scale = 40 * 6 / sum(alone[a] * alone[b] for a, b in pairs)
    for a, b in pairs:
        together = sum(a in pool and b in pool for pool in found)
        assert lift_NN[a, b] == pytest.approx(together / (scale * alone[a] * alone[b]))
    # A layer with fewer experts than a pool has leaves places empty.
    assert pools(mean_UN, 8)[0, 6:].tolist() == [6, 6]


def test_neighbours_do_not_depend_on_what_all_rows_share():
    rows_ND = np.random.default_rng(2).normal(size=(5, 7))
    cosine_NN = router_cosines(rows_ND)
    assert np.allclose(cosine_NN, router_cosines(3 * rows_ND + np.arange(7)))
    assert np.allclose(np.diag(cosine_NN), 1)


def test_a_map_lies_in_the_square_and_its_labels_in_their_regions():
    rng = np.random.default_rng(3)
    points_U2 = principal_map(rng.normal(size=(300, 5)))
    assert points_U2.min(0).tolist() == [0, 0] and points_U2.max(0).tolist() == [1, 1]
    assert principal_map(np.ones((3, 1))).tolist() == [[0, 0]] * 3
    cluster_U = (points_U2[:, 0] > 0.5).astype(int)
    levels = map_labels(
        points_U2, cluster_U, ["left", "right"], lambda _, count: [str(g) for g in range(count)]
    )
    assert {text: x > 0.5 for x, _, text in levels[0]} == {"left": False, "right": True}
    assert len(levels) == 3 and len(levels[0]) < len(levels[1]) < len(levels[2])


# ---- routing


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory):
    """Runs of an EMO and of a standard MoE with more experts."""
    folder = tmp_path_factory.mktemp("explorer")
    for name, pool in (("emo", {"min": 2, "max": 7}), ("standard", {"kind": "none"})):
        config = tiny_settings(tiny_data, folder / name)
        config["model"]["router"]["pool"] = pool
        train(config_from_dict(config))
    return folder


def test_routing_is_that_of_each_document_alone(runs, tiny_data):
    config, model = load_model(runs / "emo")
    documents = [ids[:32] for _, ids, _ in Dataset(tiny_data).documents("train", limit=9)]
    documents[3] = documents[3][:1]
    found = route(model, config, documents, [1], rows_per_batch=3)
    first = np.split(found.first[0], np.cumsum([len(ids) for ids in documents])[:-1])
    for number, ids in enumerate(documents):
        batch = PackedBatch.from_rows(torch.tensor(ids.astype(np.int64))[None])
        with torch.no_grad():
            details = model(batch, RoutingRequest(details=True)).routing.layers[1].details
        mean_N = torch.softmax(details.logits_TN, 1).mean(0).numpy()
        assert np.allclose(found.mean[0][number], mean_N, atol=1e-6)
        assert first[number].tolist() == details.logits_TN.argmax(1).tolist()
    assert found.router[0].shape == (7, 16)


def test_layers_are_spread_and_checked(tiny_data, tmp_path):
    config = tiny_settings(tiny_data, tmp_path)
    config["model"]["num_layers"] = 16
    model = config_from_dict(config).model
    assert shown_layers(model) == (0, 5, 10, 15) and shown_layers(model, [3, 1]) == (1, 3)
    with pytest.raises(ValueError, match="--layers 16: is not a layer with routed experts"):
        shown_layers(model, [16])


# ---- the file


def blocks_of(page: str) -> dict[str, bytes]:
    found = re.findall(r'<script type="text/plain" id="block-(\w+)">([^<]*)</script>', page)
    return {name: zlib.decompress(base64.b64decode(text)) for name, text in found}


def test_nothing_of_the_data_stands_in_the_file_as_it_is():
    documents = made_documents(HOSTILE, HOSTILE)
    view = made_view(documents, HOSTILE[1], label=lambda c: HOSTILE[c % 6])
    page = made_page(documents, [view]).decode()
    calm = made_documents(["calm"] * 6, ["a"] * 6)
    skeletons = [
        re.sub(r'(id="block-\w+">)[^<]*', r"\1", text)
        for text in (page, made_page(calm, [made_view(calm, "m")]).decode())
    ]
    assert skeletons[0] == skeletons[1] and "__pwned" not in page
    index = json.loads(blocks_of(page)["index"])
    assert index["domains"] == sorted(HOSTILE) and index["models"][0]["name"] == HOSTILE[1]


def test_the_policy_lets_one_script_and_one_style_run():
    documents = made_documents(["abcdef"] * 5, list("abcde"))
    text = made_page(documents, [made_view(documents, "m")]).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_the_page_makes_no_markup_of_text():
    """By the letter: none of what a browser would parse or run is in the sources."""
    assert {path.stem for path in FOLDER.glob("*.js")} == set(SCRIPTS)
    for path in FOLDER.iterdir():
        source = path.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
            assert word not in source, f"{path.name}: {word}"
        assert set(re.findall(r"https?://[\w./]+", source)) <= {"http://www.w3.org/2000/svg"}
    assert sum(p.read_text().count("\n") for p in FOLDER.glob("*.js")) <= 1200


# ---- the command


def explore(*words: object) -> int:
    return main(["explore", *map(str, words)])


def test_the_command_writes_one_page_of_two_models(runs, tiny_data, tmp_path, capsys):
    out = tmp_path / "both.html"
    words = [runs / "emo", runs / "standard", "--data", tiny_data, "--num-clusters", 4]
    words += ["--out", out]
    assert explore(*words, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["documents"] == 96 and result["document_tokens"] == 32
    assert [m["name"] for m in result["models"]] == ["emo", "standard"]
    assert result["size_mib"] == len(out.read_bytes()) / 2**20
    blocks = blocks_of(out.read_text())
    index = json.loads(blocks["index"])
    assert index["domains"] == ["garden", "harbour", "kitchen"]
    assert [model["layers"] for model in index["models"]] == [[0, 1], [0, 1]]
    assert index["models"][0]["pages"] != index["models"][1]["pages"]
    # The tokens of a document are those of the data set, and their bytes its text.
    kind, start, end = index["columns"]["word_end"]
    ends = np.frombuffer(blocks["columns"][start:end], kind)
    document_id, ids, _ = next(Dataset(tiny_data).documents("train"))
    shown = np.frombuffer(blocks["tokens0"], index["token_kind"])[: min(len(ids) - 1, 32)]
    assert shown.tolist() == ids[:-1][:32].tolist()
    text = b"".join(blocks["vocabulary"][(ends[i - 1] if i else 0) : ends[i]] for i in shown)
    assert text.decode() == Dataset(tiny_data).tokenizer().decode(shown)
    # The same command writes the same bytes.
    first = out.read_bytes()
    assert explore(*words) == 0 and out.read_bytes() == first
    assert "96 documents" in capsys.readouterr().out


def clusters_of(
    run: Path, data: Path, path: Path, index=None, cluster=None, **origin: object
) -> Path:
    """A file as `emotrain cluster` writes it: every third document, in two clusters."""
    checkpoint, dataset = find(run), Dataset(data)
    index = np.arange(0, 90, 3) if index is None else index
    about = {
        "data": str(data),
        "split": "train",
        "fingerprint": dataset.fingerprint("train"),
        "checkpoint": str(checkpoint),
        "checkpoint_fingerprint": identity(checkpoint),
        "step": 6,
    }
    zeros = np.zeros(len(index))
    columns: dict[str, Any] = {name: zeros for name in ("length", "tokens", "distance", "x", "y")}
    columns |= {
        "index": index,
        "domain": [""] * len(index),
        "cluster": index % 2 if cluster is None else np.full(len(index), cluster),
    }
    return write_columns(path, DOCUMENT_COLUMNS, columns, Origin(**{**about, **origin}))


def test_clusters_of_files_are_those_of_the_page(runs, tiny_data, tmp_path):
    files = [
        clusters_of(runs / name, tiny_data, tmp_path / f"{name}.parquet")
        for name in ("emo", "standard")
    ]
    out = tmp_path / "page.html"
    words = [runs / "emo", runs / "standard", "--data", tiny_data, "--out", out, "--clusters"]
    assert explore(*words, *files) == 0
    blocks = blocks_of(out.read_text())
    index = json.loads(blocks["index"])
    for name, expected in (("doc", np.arange(0, 90, 3)), ("cluster1", np.arange(0, 90, 3) % 2)):
        kind, start, end = index["columns"][name]
        assert np.frombuffer(blocks["columns"][start:end], kind).tolist() == expected.tolist()
    assert [len(model["clusters"]) for model in index["models"]] == [2, 2]


def test_clusters_of_something_else_are_refused(runs, tiny_data, tmp_path, capsys):
    good = clusters_of(runs / "emo", tiny_data, tmp_path / "good.parquet")
    standard = runs / "standard"
    cases = [
        ([runs / "emo", standard], [good], "1 files for 2 models"),
        ([standard], [good], f"are not of {find(standard)}"),
        ([runs / "emo"], [{"fingerprint": "0" * 16}], "about other documents"),
        ([runs / "emo", standard], [good, {"index": np.arange(5)}], "about different documents"),
        ([runs / "emo"], [{"cluster": 2**31 - 1}], "one has the number 2147483647"),
    ]
    for models, files, told in cases:
        paths = [
            clusters_of(models[-1], tiny_data, tmp_path / "other.parquet", **file)
            if isinstance(file, dict)
            else file
            for file in files
        ]
        words = [*models, "--data", tiny_data, "--out", tmp_path / "page.html", "--clusters"]
        assert explore(*words, *paths) == 2
        printed = capsys.readouterr().err
        assert told in printed and printed.count("\n") == 1


def test_a_map_by_umap_is_a_second_one(runs, tiny_data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "page.html"
    words = [runs / "emo", "--data", tiny_data, "--out", out, "--umap", "--seed", 5]
    monkeypatch.setitem(sys.modules, "umap", None)
    assert explore(*words) == 2
    assert "needs umap-learn, which is not installed" in capsys.readouterr().err

    class Umap:
        def __init__(self, n_neighbors, metric, random_state, n_jobs):
            assert (n_neighbors, metric, random_state, n_jobs) == (15, "cosine", 5, 1)

        def fit_transform(self, unit_UP):
            return np.stack([np.arange(len(unit_UP)), -np.arange(len(unit_UP))], 1)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    assert explore(*words) == 0
    blocks = blocks_of(out.read_text())
    index = json.loads(blocks["index"])
    assert index["maps"] == ["pca", "umap"] and set(index["models"][0]["labels"]) == {"pca", "umap"}
    kind, start, end = index["columns"]["umap_y0"]
    assert np.frombuffer(blocks["columns"][start:end], kind)[[0, -1]].tolist() == [65535, 0]


def test_labels_leave_out_the_words_of_every_document():
    texts = [f"the {'anchor tide' if i % 2 else 'bread oven'} is {'x' * i}" for i in range(20)]
    texts += ["the is"] * 200
    documents = made_documents(texts, ["a"] * len(texts))
    group_U = np.array([i % 2 for i in range(20)] + [2] * 200)
    labels = label_groups_by(documents, BYTES)(group_U, 4)
    assert labels[0].startswith("bread oven") and labels[1].startswith("anchor tide")
    assert labels[2:] == ["", ""]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--documents", "1"], "documents=1: a page shows 2 to 50000 documents"),
        (["--document-tokens", "-1"], "document_tokens=-1: give 1 or more"),
        (["--num-clusters", "0"], "clusters=0: there is 1 cluster or more"),
        (["--layers", "7"], "--layers 7: is not a layer with routed experts; they are 0, 1"),
        (["--clusters", "nowhere.parquet"], "nowhere.parquet: no such file"),
        (["--seed", "-1"], "seed=-1 is not in 0 to 2^32 - 1"),
        (["--micro-batch", "-1"], "micro_batch=-1 must be a positive number of rows"),
        (["--out", "."], ".: is a folder; give the name of a file"),
    ],
)
def test_bad_settings_are_one_line(runs, tiny_data, tmp_path, capsys, words, told):
    out = ["--out", tmp_path / "page.html"]
    assert explore(runs / "emo", "--data", tiny_data, *out, *words) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out
