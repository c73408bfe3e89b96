"""Proves that clusters are those of the published steps, each against a slow oracle: routing of
each document alone, principal components, spherical k-means, agreement, words. And `emotrain
cluster` from a checkpoint to its files."""

import csv
import json
import math
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.analysis import levels, routing, spherical
from emotrain.analysis.agreement import (
    agreement,
    contingency,
    entropy_bits,
    main_script,
    numbered,
    script_of,
)
from emotrain.analysis.cluster import ClusterSettings, cluster
from emotrain.analysis.cluster_tables import cluster_tables
from emotrain.analysis.labels import best_terms, class_tf_idf, count_words, words_in
from emotrain.analysis.levels import find_level, nearest_rows
from emotrain.analysis.routing import document_means, scratch, token_probabilities
from emotrain.analysis.spherical import (
    Clusters,
    internal_metrics,
    principal_components,
    spherical_k_means,
)
from emotrain.batch import PackedBatch
from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.data.document_clusters import DOCUMENT_COLUMNS, TOKEN_COLUMNS, read_columns
from emotrain.data.formats import Dataset
from emotrain.errors import UserError, WriteError
from emotrain.model.router import RoutingRequest
from emotrain.training.run import train
from tests.conftest import tiny_settings
from tests.helpers import tiny_config, tiny_model

sklearn = pytest.importorskip("sklearn")
CPU = torch.device("cpu")


# ---- routing


def alone(model, ids, layers, gating):
    """The routing of a document in a batch of its own, by the definition."""
    batch = PackedBatch.from_rows(torch.from_numpy(ids.astype(np.int64))[None])
    output = model(batch, RoutingRequest(details=True))
    shares = []
    for layer in layers:
        logits_TN = output.routing.layers[layer].details.logits_TN
        share_TN = logits_TN.softmax(1) if gating == "softmax" else logits_TN.sigmoid()
        shares.append(share_TN / share_TN.sum(1, keepdim=True))
    return torch.cat(shares, 1).numpy()


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
@pytest.mark.parametrize("mask", [True, False])
def test_each_token_is_routed_as_in_its_document_alone(gating, layers, mask, tmp_path, monkeypatch):
    """Whatever is packed with it. Rows have 16 tokens: a longer document is routed in pieces."""
    monkeypatch.setattr(routing, "DOCUMENTS_AT_ONCE", 3)
    changes = {"model__router__gating": gating, "model__attention__document_mask": mask}
    config, model = tiny_config(**changes), tiny_model(**changes)
    random = np.random.default_rng(0)
    documents = [random.integers(0, 64, n).astype(np.uint16) for n in (5, 16, 3, 40, 7, 2, 11)]
    found_TX = token_probabilities(model, config, documents, layers, 2, tmp_path)
    pieces = [ids[i : i + 16] for ids in documents for i in range(0, len(ids), 16)]
    with torch.inference_mode():
        expected_TX = np.concatenate([alone(model, ids, layers, gating) for ids in pieces])
    assert found_TX.dtype == np.float16 and found_TX.shape == (84, 8 * len(layers))
    np.testing.assert_allclose(found_TX, expected_TX, rtol=2e-3, atol=1e-6)
    assert list(tmp_path.iterdir()) == []

    lengths = np.array(list(map(len, documents)))
    monkeypatch.setattr(spherical, "BLOCK_BYTES", 16 * 4 * 9)  # blocks cut documents
    mean_UX = document_means(found_TX, np.repeat(np.arange(7), lengths))
    rows = np.split(found_TX.astype(np.float64), np.cumsum(lengths)[:-1])
    np.testing.assert_allclose(mean_UX, [part.mean(0) for part in rows], rtol=1e-5)


def test_exclusive_experts_of_a_domain_have_no_part(tmp_path):
    """Else clusters would know the domain from them."""
    changes = {"model__experts__exclusive": {"rust": 2}}
    config, model = tiny_config(**changes), tiny_model(**changes)
    found_TX = token_probabilities(model, config, [np.arange(9)], (0, 1), 2, tmp_path)
    assert not found_TX[:, [6, 7, 14, 15]].any()
    np.testing.assert_allclose(found_TX[:, :8].astype(float).sum(1), 1, atol=2e-3)


def test_no_room_for_scratch_is_one_line(tmp_path):
    with pytest.raises(WriteError, match=r"has no room for 1000000000\.0 GB"):
        scratch(tmp_path, (10**9, 10**9), np.uint8)
    assert list(tmp_path.iterdir()) == []


# ---- principal components and k-means


def planted(sizes, width=12, spread=0.1, seed=0):
    """Rows around a random direction for each group, in any order, and the group of each."""
    random = np.random.default_rng(seed)
    middle_YX = random.normal(size=(len(sizes), width))
    group_T = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    noise_TX = spread * random.normal(size=(len(group_T), width))
    return (middle_YX[group_T] + noise_TX).astype(np.float32), group_T


@pytest.mark.parametrize("share", [0.5, 0.95, 0.999999])
@pytest.mark.parametrize("block", [64, 10**7])
def test_components_are_those_of_the_library(share, block, monkeypatch):
    from sklearn.decomposition import PCA

    monkeypatch.setattr(spherical, "BLOCK_BYTES", block)
    rows_TX = planted([40, 30, 20], spread=0.5)[0] + 7  # far from the origin
    found = principal_components(rows_TX, share, CPU)
    expected = PCA(share, svd_solver="full").fit(rows_TX.astype(np.float64))
    assert found.axes_XP.shape[1] == expected.n_components_
    np.testing.assert_allclose(found.share_P, expected.explained_variance_ratio_, rtol=1e-4)
    ours, theirs = found.of(rows_TX).numpy(), expected.transform(rows_TX)
    theirs *= np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    largest = found.axes_XP.abs().argmax(0)
    assert (found.axes_XP.gather(0, largest[None]) > 0).all(), "signs are a matter of rule"


def test_half_precision_far_from_zero_keeps_its_variance():
    """Probabilities of one expert are near one number, and differ little."""
    rows_TX = (0.3 + planted([300, 200])[0] * 1e-3).astype(np.float16)
    variance = rows_TX.astype(np.float64).var(0).sum()
    components = principal_components(rows_TX, 0.999999, CPU)
    assert components.of(rows_TX).double().var(0, correction=0).sum() == pytest.approx(
        variance, rel=1e-3
    )


@pytest.mark.parametrize("value", [0.25, math.nan, math.inf])
def test_rows_that_tell_nothing_are_one_line(value):
    said = "routed alike" if math.isfinite(value) else "not finite"
    with pytest.raises(UserError, match=said):
        principal_components(np.full((50, 4), value, np.float32), 0.95, CPU)


def unit(rows_TX):
    return rows_TX / np.linalg.norm(rows_TX, axis=1, keepdims=True)


@pytest.mark.parametrize("block", [200, 10**7])
def test_k_means_finds_what_is_there_and_stops_where_nothing_moves(block, monkeypatch):
    monkeypatch.setattr(spherical, "BLOCK_BYTES", block)
    rows_TX, group_T = planted([50, 90, 20, 70])
    unit_TX = unit(rows_TX)
    found = spherical_k_means(unit_TX, 4, 0, CPU)
    assert found.sizes_Y.tolist() == [90, 70, 50, 20]
    # The largest group is number 1, the next 3, and so on.
    assert np.array_equal(found.cluster_T, np.array([2, 0, 3, 1])[group_T])
    # By the definition of what spherical k-means rests at:
    for y in range(4):
        centre_X = unit_TX[found.cluster_T == y].sum(0)
        np.testing.assert_allclose(
            found.centre_YP[y], centre_X / np.linalg.norm(centre_X), atol=1e-5
        )
    cosine_TY = unit_TX @ found.centre_YP.T
    assert np.array_equal(cosine_TY.argmax(1), found.cluster_T)
    np.testing.assert_allclose(found.distance_T, 1 - cosine_TY.max(1), atol=1e-6)
    assert found.rounds < spherical.REFINEMENTS


def test_a_round_is_that_of_a_loop(monkeypatch):
    """From the same start, on rows without clear groups, where every round matters."""
    monkeypatch.setattr(spherical, "REFINEMENTS", 3)
    unit_TX = unit(np.random.default_rng(1).normal(size=(300, 5)).astype(np.float32))
    start = sklearn.cluster.MiniBatchKMeans(
        6, n_init=10, max_iter=500, batch_size=4096, random_state=3, compute_labels=False
    ).fit(unit_TX)
    centres = unit(start.cluster_centers_)
    for _ in range(3):
        nearest = [max(range(6), key=lambda y, x=x: float(x @ centres[y])) for x in unit_TX]
        centres = unit(
            np.stack([sum(x for x, of in zip(unit_TX, nearest, strict=True) if of == y)
                      for y in range(6)])
        )  # fmt: skip
    found = spherical_k_means(unit_TX, 6, 3, CPU)
    assert found.rounds == 3
    ours, theirs = found.centre_YP, centres
    best = (ours @ theirs.T).max(1)
    np.testing.assert_allclose(best, 1, atol=1e-5)


def test_rows_that_are_alike_leave_no_empty_cluster():
    unit_TX = np.repeat(np.eye(3, dtype=np.float32), [5, 4, 3], axis=0)
    found = spherical_k_means(unit_TX, 6, 0, CPU)
    assert found.sizes_Y.tolist() == [5, 4, 3] and found.centre_YP.shape == (3, 3)
    assert found.distance_T.max() < 1e-6


def test_the_same_seed_gives_the_same_clusters():
    rows_TX = unit(planted([60, 60, 60], spread=1)[0])
    first, again, other = (spherical_k_means(rows_TX, 8, seed, CPU) for seed in (0, 0, 1))
    assert np.array_equal(first.cluster_T, again.cluster_T)
    assert not np.array_equal(first.cluster_T, other.cluster_T)


def test_internal_metrics_are_those_of_the_definitions(monkeypatch):
    rows_TX, group_T = planted([30, 20, 10], width=4, spread=0.4)
    unit_TX = unit(rows_TX)
    clusters = spherical_k_means(unit_TX, 3, 0, CPU)
    found = internal_metrics(unit_TX, clusters, 0)
    centre = clusters.centre_YP[clusters.cluster_T]
    assert found["inertia"] == pytest.approx(((unit_TX - centre) ** 2).sum(), rel=1e-4)
    of_T = clusters.cluster_T
    distance_TT = np.linalg.norm(unit_TX[:, None] - unit_TX[None], axis=2)
    silhouettes = []
    for t, y in enumerate(of_T):
        others = [distance_TT[t][of_T == z].mean() for z in range(3) if z != y]
        own = distance_TT[t][of_T == y].sum() / max(1, (of_T == y).sum() - 1)
        silhouettes.append((min(others) - own) / max(min(others), own))
    assert found["silhouette_euclidean"] == pytest.approx(np.mean(silhouettes), abs=1e-4)
    monkeypatch.setattr(spherical, "SILHOUETTE_ROWS", 40)
    sampled = internal_metrics(unit_TX, clusters, 0)
    assert sampled["silhouette_cosine"] != found["silhouette_cosine"]
    assert sampled["davies_bouldin"] == found["davies_bouldin"]
    one = Clusters(clusters.centre_YP[:1], np.zeros(60, np.int32), clusters.distance_T, 1)
    assert internal_metrics(unit_TX, one, 0)["silhouette_cosine"] is None


# ---- agreement


@st.composite
def labelled(draw):
    size = draw(st.integers(2, 40))
    of = st.lists(st.integers(0, 4), min_size=size, max_size=size)
    clusters = np.unique(draw(of), return_inverse=True)[1]
    return clusters, np.array(draw(of))


@settings(max_examples=60, deadline=None)
@given(labelled())
def test_agreement_is_that_of_the_definitions(given_labels):
    cluster_X, label_X = given_labels
    found = agreement(cluster_X, label_X, label_X[::-1])
    pairs = Counter(zip(cluster_X.tolist(), label_X.tolist(), strict=True))
    counts_YX = contingency(cluster_X, label_X)
    assert {(y, x): counts_YX[y, x] for y, x in np.argwhere(counts_YX).tolist()} == pairs
    total, clusters, labels = len(label_X), Counter(cluster_X.tolist()), Counter(label_X.tolist())
    assert found["labels"] == len(labels)
    if len(labels) == 1:
        assert found["nmi"] is found["ami"] is found["purity"] is None
        return
    purity = sum(max(pairs[y, x] for x in labels) for y in clusters) / total
    assert found["purity"] == pytest.approx(purity)

    def entropy(counts):
        return -sum(n / total * math.log(n / total) for n in counts.values())

    mutual = sum(
        n / total * math.log(n * total / (clusters[y] * labels[x])) for (y, x), n in pairs.items()
    )
    nmi = mutual / ((entropy(clusters) + entropy(labels)) / 2)
    assert found["nmi"] == pytest.approx(nmi, abs=1e-9)
    shuffled = agreement(cluster_X, label_X[::-1], label_X)
    assert found["nmi_shuffled"] == shuffled["nmi"]
    bits = [-sum(n / row.sum() * math.log2(n / row.sum()) for n in row if n) for row in counts_YX]
    np.testing.assert_allclose(entropy_bits(counts_YX), bits, atol=1e-12)


def test_chance_is_seen_as_chance():
    """Many labels agree with anything by NMI; the adjusted one and the shuffled one say so."""
    random = np.random.default_rng(0)
    label_X, cluster_X = random.integers(0, 400, 2000), random.integers(0, 20, 2000)
    found = agreement(cluster_X, label_X, random.permutation(label_X))
    assert found["nmi"] > 0.3 and abs(found["nmi"] - found["nmi_shuffled"]) < 0.03
    assert abs(found["ami"]) < 0.03


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("word", "LATIN"),
        (" Ünder", "LATIN"),
        ("слово", "CYRILLIC"),
        ("λόγος", "GREEK"),
        ("漢字", "CJK"),
        ("ひら", "HIRAGANA"),
        ("كلمة", "ARABIC"),
        ("3 words", "LATIN"),
        (" 42", "number"),
        (" (", "punctuation"),
        ("+=", "symbol"),
        ("\n\n  ", "space"),
        ("\ufffd", "part of a character"),
        ("", "none"),
        ("\U00013000", "EGYPTIAN"),
        ("\u378d", "CJK"),
        ("\U000e0001", "space"),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script


def test_the_script_of_a_document_is_that_of_its_words():
    numbers_T, names = numbered(["LATIN", "space", "space", "CJK", "number", "number", "space"])
    document_T = np.array([0, 0, 0, 1, 1, 1, 2])
    main = main_script(numbers_T, names, document_T)
    assert [names[x] for x in main] == ["LATIN", "CJK", "space"]


def test_rows_that_mean_something_and_rows_that_are_words():
    """The two ends of the scale: routing by the document's domain, and by the token."""
    random = np.random.default_rng(0)
    document_T, token_T = np.repeat(np.arange(60), 20), random.integers(0, 30, 1200)
    domain_T = document_T % 4
    labels = {
        "domain": (domain_T, (random.permutation(60) % 4)[document_T]),
        "token_identity": (token_T, random.permutation(token_T)),
    }
    noise_TX = random.normal(size=(1200, 16)) * 0.02

    def found(of_T, num_clusters):
        rows_TX = np.eye(40)[of_T] @ np.random.default_rng(1).normal(size=(40, 16)) + noise_TX
        columns = [(i // 8, i % 8) for i in range(16)]
        return find_level(rows_TX.astype(np.float32), columns, labels, list("abcd"), num_clusters,
                          0, levels.Path("."), CPU).numbers["agreement"]  # fmt: skip

    by_domain, by_token = found(domain_T, 4), found(token_T, 30)
    assert by_domain["domain"]["nmi"] == pytest.approx(1) == by_domain["domain"]["purity"]
    assert by_domain["token_identity"]["ami"] < 0.02
    assert by_token["domain"]["ami"] < 0.02 and by_token["token_identity"]["nmi"] > 0.9
    assert by_domain["domain"]["nmi_shuffled"] < 0.1


# ---- words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, the CAT's whiskers!", ["the", "cat", "the", "cat's", "whiskers"]),
        ("a b2c x_y f(oo) 42", ["oo"]),
        ("Straße größer", ["straße", "größer"]),
        ("слово за слово", ["слово", "за", "слово"]),
        ("機械学習", ["機械", "械学", "学習"]),
        ("ภาษา", ["ภา", "าษ", "ษา"]),
        ("GPU上的训练 run", ["gpu", "上的", "的训", "训练", "run"]),
        ("字", []),
        ("", []),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_words(text, expected):
    assert words_in(text) == expected


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_words_of_two_letters_or_more(text):
    assert all(len(word) > 1 and word == word.lower() for word in words_in(text))


def test_words_that_set_classes_apart():
    texts = ["salt bread the the", "bread oven the", "sail the rope the", "mast the"]
    counts_UX, words = count_words(texts)
    assert list(words) == ["bread", "mast", "oven", "rope", "sail", "salt", "the"]
    share_YU = np.array([[1, 1, 0, 0], [0, 0, 1, 1]])
    counts_YX = (counts_UX.T @ share_YU.T).T
    found_YX = class_tf_idf(counts_YX)
    for y, classed in enumerate([texts[:2], texts[2:]]):
        in_class = Counter(" ".join(classed).split())
        everywhere = Counter(" ".join(texts).split())
        for x, word in enumerate(words):
            share = in_class[word] / in_class.total()
            expected = math.sqrt(share) * math.log((6.5 + 1) / (everywhere[word] + 0.5))
            assert found_YX[y, x] == pytest.approx(expected)
    best = best_terms(counts_YX, words, 2)
    assert [word for word, _ in best[0]] == ["oven", "salt"]
    assert [word for word, _ in best[1]] == ["mast", "rope"]
    assert best_terms(np.zeros((2, 3)), ["a", "b", "c"], 2) == [[], []]
    everywhere = best_terms(np.array([[5, 1], [5, 0], [5, 0]]), ["the", "salt"], 2)
    assert [[word for word, _ in of] for of in everywhere] == [["salt"], [], []]
    assert count_words(["1 2", ""])[0].shape == (2, 0)


def test_nearest_rows_are_the_nearest():
    random = np.random.default_rng(0)
    of_T, distance_T = random.permutation(np.repeat([0, 1, 2], [20, 9, 3])), random.random(32)
    clusters = Clusters(np.zeros((3, 2)), of_T.astype(np.int32), distance_T, 1)
    for y, rows in enumerate(nearest_rows(clusters)):
        expected = sorted(np.flatnonzero(of_T == y), key=lambda t: distance_T[t])[:5]
        assert rows.tolist() == expected


# ---- the command


@pytest.fixture(scope="module")
def run_dir(tiny_data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(config_from_dict(tiny_settings(tiny_data, run_dir, steps=40)))
    return run_dir


FEW = ["--clusters", "4"]
FILES = {
    "clusters.parquet",
    "tokens.parquet",
    "cluster.json",
    "cluster.md",
    "domains.png",
    "domains.csv",
    "agreement.png",
    "agreement.csv",
}


@pytest.fixture(scope="module")
def written(run_dir, tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("clusters") / "it"
    command = ["cluster", str(run_dir), "--data", str(tiny_data), "--out", str(out)]
    assert main([*command, *FEW]) == 0
    return out


def test_files_agree_with_each_other_and_with_the_data(written, tiny_data, run_dir):
    assert {path.name for path in written.iterdir()} == FILES
    result = json.loads((written / "cluster.json").read_text())
    documents = read_columns(written / "clusters.parquet", DOCUMENT_COLUMNS)
    tokens = read_columns(written / "tokens.parquet", TOKEN_COLUMNS)
    assert documents.origin == tokens.origin and documents.origin.data == str(tiny_data.resolve())
    documents.origin.open()
    known = {number: (ids, domain) for number, ids, domain in Dataset(tiny_data).documents("train")}
    long_enough = [number for number, (ids, _) in known.items() if len(ids) >= 32]
    assert documents.columns["index"].tolist() == long_enough
    assert result["documents_too_short"] == len(known) - len(long_enough)
    columns = documents.columns
    assert columns["domain"].tolist() == [known[number][1] for number in long_enough]
    assert columns["length"].tolist() == [len(known[number][0]) for number in long_enough]
    assert columns["tokens"].tolist() == [min(100, len(known[n][0])) for n in long_enough]
    assert np.isfinite(columns["x"]).all() and columns["x"].std() > columns["y"].std() > 0
    for row, number in enumerate(tokens.columns["index"].tolist()):
        position = tokens.columns["position"][row]
        assert tokens.columns["token"][row] == known[number][0][position]
    for level, file in (("document", documents), ("token", tokens)):
        of = result["levels"][level]
        sizes = np.bincount(file.columns["cluster"]).tolist()
        assert [each["rows"] for each in of["by_cluster"]] == sizes == sorted(sizes, reverse=True)
        assert of["rows"] == sum(sizes) and of["clusters"] == len(sizes) <= 4
        assert [each["cluster"] for each in of["by_cluster"]] == list(range(len(sizes)))
        domain_X = np.array([known[number][1] for number in file.columns["index"].tolist()])
        for each in of["by_cluster"]:
            inside = domain_X[file.columns["cluster"] == each["cluster"]]
            assert each["domains"] == dict(Counter(inside.tolist()))
            assert list(each["domains"].values()) == sorted(each["domains"].values())[::-1]
            assert len(each["experts"]) == 10 and 0 < len(each["words"]) <= 10
        assert of["agreement"]["domain"]["purity"] == pytest.approx(
            sum(max(each["domains"].values()) for each in of["by_cluster"]) / of["rows"]
        )
    assert result["domain_nmi"] == result["levels"]["token"]["agreement"]["domain"]["nmi"]
    assert (
        result["document_domain_nmi"] == result["levels"]["document"]["agreement"]["domain"]["nmi"]
    )
    assert "words" in result["levels"]["document"]["by_cluster"][0]
    assert "tokens" in result["levels"]["token"]["by_cluster"][0]


def test_experts_of_a_cluster_are_its_mean_routing(written, run_dir, tiny_data, tmp_path):
    from emotrain.training.checkpoint import find, load_model

    config, model = load_model(find(run_dir))
    file = read_columns(written / "clusters.parquet", DOCUMENT_COLUMNS).columns
    known = {number: ids for number, ids, _ in Dataset(tiny_data).documents("train")}
    documents = [known[number][:100] for number in file["index"].tolist()]
    routed_TX = token_probabilities(model, config, documents, (0, 1), 4, tmp_path)
    mean_UX = document_means(routed_TX, np.repeat(np.arange(len(documents)), file["tokens"]))
    result = json.loads((written / "cluster.json").read_text())
    for of in result["levels"]["document"]["by_cluster"]:
        mean_X = mean_UX[file["cluster"] == of["cluster"]].mean(0)
        order = np.argsort(-mean_X)[:10]
        assert [(each["layer"], each["expert"]) for each in of["experts"]] == [
            (x // 7, x % 7) for x in order
        ]
        probabilities = [each["mean_probability"] for each in of["experts"]]
        np.testing.assert_allclose(probabilities, mean_X[order], rtol=1e-3)
        distances = file["distance"][file["cluster"] == of["cluster"]]
        nearest = dict(zip(file["index"].tolist(), file["distance"].tolist(), strict=True))
        assert nearest[of["nearest"][0]] == distances.min()


def test_pictures_have_their_numbers_beside_them(written):
    result = json.loads((written / "cluster.json").read_text())
    agreements = list(csv.DictReader((written / "agreement.csv").open()))
    assert [(row["level"], row["label"]) for row in agreements] == [
        *(("token", label) for label in ("domain", "token_identity", "script", "length")),
        *(("document", label) for label in ("domain", "length", "script")),
    ]
    for row in agreements:
        of = result["levels"][row["level"]]["agreement"][row["label"]]
        assert row["nmi"] == ("" if of["nmi"] is None else str(of["nmi"]))
    shares = list(csv.DictReader((written / "domains.csv").open()))
    for level in ("token", "document"):
        of = [row for row in shares if row["level"] == level]
        assert sum(int(row["rows_of_domain"]) for row in of) == result["levels"][level]["rows"]
    for name in ("domains.png", "agreement.png"):
        assert (written / name).read_bytes().startswith(b"\x89PNG")
    page = (written / "cluster.md").read_text(encoding="utf-8")
    assert page.count("|\n") > 15 and "kitchen" in page


def test_the_same_command_writes_the_same_files(written, run_dir, tiny_data, tmp_path, capsys):
    command = ["cluster", str(run_dir), "--data", str(tiny_data), *FEW]
    assert main([*command, "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((written / "cluster.json").read_text())
    for name in FILES:
        assert (written / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    other = cluster(run_dir, tiny_data, ClusterSettings(4, layers=(1,), seed=1), tmp_path)
    assert other.settings.layers == (1,)
    experts = other.token.by_cluster[0]["experts"]
    assert len(experts) == 7 and {each["layer"] for each in experts} == {1}


def test_the_default_folder_is_the_runs(run_dir, tiny_data, capsys):
    command = ["cluster", str(run_dir), "--data", str(tiny_data), *FEW, "--split", "valid"]
    assert main([*command, "--clusters", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {run_dir / 'clusters/clusters.parquet'}" in printed
    assert "Agreement of clusters" in printed and "kitchen" in printed
    origin = read_columns(run_dir / "clusters/clusters.parquet", DOCUMENT_COLUMNS).origin
    assert origin.split == "valid"


def test_data_without_a_tokenizer_has_clusters_without_words(run_dir, tiny_data, tmp_path, caplog):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "tokenizer.json").unlink()
    result = cluster(run_dir, data, ClusterSettings(4), tmp_path)
    assert "clusters get no words" in caplog.text
    assert set(result.token.numbers["agreement"]) == {"domain", "token_identity"}
    assert "words" not in result.token.by_cluster[0]
    assert len(cluster_tables(result)) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clusters", "1"], "clusters=1 tells nothing apart"),
        (["--clusters", "96"], "are too few for 96 clusters"),
        (["--documents", "32"], "documents=32 are too few for 32 clusters"),
        (["--document-tokens", "31"], "document_tokens=31 is too few"),
        (["--document-tokens", "-1"], "document_tokens=-1 is too few"),
        (["--layers", "2"], "layers=2: is no layer with routed experts; those are 0, 1"),
        (["--layers", "-1"], "layers=-1: is no layer"),
        (["--seed", "-1"], "seed=-1 is not in"),
        (["--seed", str(2**32)], "is not in 0 to 2^32 - 1"),
        (["--micro-batch", "-1"], "micro_batch=-1 must be a positive"),
        (["--data", "nowhere"], "nowhere"),
        (["--out", "{file}"], "is not a folder"),
    ],
)
def test_what_cannot_be_clustered_is_one_line(words, said, run_dir, tiny_data, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    command = ["cluster", str(run_dir), "--data", str(tiny_data), "--out", str(tmp_path / "out")]
    assert main([*command, *(word.format(file=file) for word in words)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out/cluster.json").exists()


def test_a_dense_model_is_one_line(tiny_data, tmp_path, capsys):
    config = tiny_settings(tiny_data, tmp_path / "dense", steps=1)
    config["model"]["experts"] |= {"routed": 0, "shared": 1, "top_k": 0}
    config["model"]["router"] = {"pool": {"kind": "none"}}
    train(config_from_dict(config))
    capsys.readouterr()
    assert main(["cluster", str(tmp_path / "dense"), "--data", str(tiny_data), *FEW]) == 2
    assert "the model is dense and routes nothing" in capsys.readouterr().err


def test_without_scikit_learn_it_is_one_line(run_dir, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    command = ["cluster", str(run_dir), "--data", str(tiny_data), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "pip install 'emotrain[analysis]'" in error and error.count("\n") == 1


def test_settings_have_the_published_defaults():
    assert ClusterSettings() == ClusterSettings(32, 12_000, 100, "train", (), 0)
