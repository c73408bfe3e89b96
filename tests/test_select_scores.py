"""The criteria of expert selection against their formulas, token by token; budgets against counting
by hand; the artefact against whatever a file may hold."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from emotrain.config import ExpertsConfig, ModelConfig
from emotrain.errors import UserError
from emotrain.evaluation.perplexity import pack
from emotrain.model.counts import parameter_counts
from emotrain.model.router import LayerRequest
from emotrain.model.transformer import Transformer
from emotrain.modular.artefact import Calibration, Fidelity, Subset, kept_of, read_subset
from emotrain.modular.budget import parameters_kept, read_keep, read_memory, share_out
from emotrain.modular.scores import CRITERIA, collect_scores
from emotrain.modular.select import greedy_ranking
from tests.test_select import TINY, documents_of

UNEQUAL = ModelConfig(
    vocab_size=41,
    d_model=16,
    num_layers=3,
    num_heads=2,
    init_std=0.3,
    experts=ExpertsConfig(routed=8, shared=1, top_k=3, hidden=8, routed_per_layer=(8, 2, 5)),
)


def scores_by_hand(model, document, layer):
    """One document alone, one token and one expert at a time, from the formulas of the papers."""
    (batch,) = pack([document], 64, 1)
    x_BSD, view = model.embed(batch)
    for before in model.blocks[:layer]:
        x_BSD, _ = before(x_BSD, batch, view, LayerRequest())
    block = model.blocks[layer]
    residual = block.attend(x_BSD, view)
    after_norm = block.moe_norm(residual)
    num_routed = block.moe.router.num_routed
    found = {name: torch.zeros(num_routed, dtype=torch.float64) for name in CRITERIA}
    slots = torch.zeros(num_routed)
    length = len(document)
    for x, h in zip(residual[0, :length].double(), after_norm[0, :length].double(), strict=True):
        logits = block.moe.router.weight_ED.double() @ h
        probability = logits[:num_routed].softmax(0)
        chosen = probability.topk(block.moe.router.num_chosen).indices.tolist()
        outputs = {i: one_expert(block.moe.experts, i, h) for i in chosen}
        routed = sum(probability[i] * outputs[i] for i in chosen)
        shared = one_expert(block.moe.shared, 0, h, "M")
        for i in chosen:
            weighted = probability[i] * outputs[i].norm()
            slots[i] += 1
            found["frequency"][i] += 1 / length
            found["reap"][i] += weighted
            found["easy_ep"][i] += weighted * (1 - F.cosine_similarity(x, x + routed, dim=0))
            turn = 1 - F.cosine_similarity(h, h + routed + shared, dim=0)
            found["easy_ep_reference"][i] += weighted * max(turn, torch.zeros_like(turn))
        found["router_once"] += probability / length
    found["reap"] /= slots.clamp(min=1)
    return found


def one_expert(bank, index, h, letter="N"):
    gate_up, down = (
        getattr(bank, name.replace("?", letter))[index].double()
        for name in ("gate_up_?FD", "down_?HD")
    )
    gate, up = (gate_up @ h).chunk(2)
    return (F.silu(gate) * up) @ down


@pytest.mark.parametrize("config", [TINY, UNEQUAL], ids=["equal layers", "unequal layers"])
def test_every_criterion_is_its_formula(config):
    model = Transformer(config).double().initialize(3)
    documents = [document for group in documents_of(2, 2) for document in group]
    group_U = torch.tensor([0, 0, 1, 1])
    batches = pack(documents, 64, 1)
    assert len(batches) > 1 and any((batch.document_ids_G < 0).any() for batch in batches)
    found = collect_scores(model, batches, group_U, 2)
    for layer in range(config.num_layers):
        for group in (0, 1):
            alone = [scores_by_hand(model, d, layer) for d in documents[2 * group :][:2]]
            lengths = torch.tensor([len(d) for d in documents[2 * group :][:2]]).double()
            chosen = torch.stack([s["frequency"] * n for s, n in zip(alone, lengths, strict=True)])
            for name in CRITERIA:
                parts = torch.stack([scores[name] for scores in alone])
                expected = parts.sum(0)
                if name in ("router_once", "frequency"):
                    expected = (parts * lengths[:, None]).sum(0) / lengths.sum()
                if name == "reap":
                    expected = (parts * chosen).sum(0) / chosen.sum(0).clamp(min=1)
                torch.testing.assert_close(found[layer][name][group], expected)


def test_scoring_leaves_the_hidden_states_those_of_the_model():
    """The last layer's scores would not agree else; here a model in single precision, to
    rounding."""
    model = Transformer(TINY).initialize(3)
    documents = documents_of(1, 3)[0]
    batches, group_U = pack(documents, 64, 1), torch.zeros(3, dtype=torch.int64)
    # Counts of a full model: what is ranked is ranked on the hidden states of the full model.
    _, ranking = greedy_ranking(model, batches, group_U, 1, (9, 9, 9))
    for scores, ranked_JN in zip(collect_scores(model, batches, group_U, 1), ranking, strict=True):
        torch.testing.assert_close(scores["router_once"], ranked_JN, rtol=1e-5, atol=1e-7)


# ---- budgets


def test_budgets_are_counted_as_written():
    assert read_keep("4", TINY).counts == (4, 4, 4)
    assert read_keep("0.5", TINY).counts == (4, 4, 4)  # 4.5 experts, rounded to even
    assert read_keep("0.17", TINY).counts == (2, 2, 2)  # 1.53 experts
    assert read_keep("9,2,3", TINY).counts == (9, 2, 3)
    assert read_keep("4", UNEQUAL).counts == (4, 3, 4), "a layer with fewer keeps what it has"
    assert read_keep("total:10", TINY).total == 10


@pytest.mark.parametrize(
    ("keep", "fault"),
    [
        ("1", "layer 0 cannot keep 1 of its 9 experts; keep 2 to 9"),
        ("10", "the largest layer has 9 experts"),
        ("0", "layer 0 cannot keep 0"),
        ("9,9", "2 counts of kept experts for 3 layers"),
        ("total:5", "3 layers keep 6 to 27 experts together"),
        ("total:28", "3 layers keep 6 to 27 experts together"),
        ("1.5", "keep=1.5 is not a share"),
        ("0.16", "is 1.4 of the 9 experts of the largest layer, which keeps at least 2"),
        ("-3", "give a number of experts a layer (32), a share (0.25)"),
        ("many", "give a number of experts a layer (32), a share (0.25)"),
    ],
)
def test_a_budget_that_cannot_be_is_one_line(keep, fault):
    with pytest.raises(UserError) as caught:
        read_keep(keep, TINY)
    assert fault in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("counts", [(9, 9, 9), (2, 5, 9), (2, 2, 2)])
def test_parameters_of_a_subset_are_those_of_the_smaller_model(counts):
    smaller = ExpertsConfig(
        routed=8, shared=1, top_k=2, hidden=8, routed_per_layer=tuple(c - 1 for c in counts)
    )
    config = ModelConfig(vocab_size=41, d_model=16, num_layers=3, num_heads=2, experts=smaller)
    assert parameters_kept(TINY, counts) == parameter_counts(config)["total_parameters"]


def test_memory_buys_the_most_experts_that_fit():
    for count in (2, 5, 9):
        exactly = 4 * parameters_kept(TINY, (count,) * 3)
        assert read_memory(str(exactly), TINY).counts == (count,) * 3
        if count > 2:
            assert read_memory(str(exactly - 1), TINY).counts == (count - 1,) * 3
    assert read_memory("1GB", TINY).counts == (9, 9, 9)
    assert read_memory("40 KiB", TINY).counts == read_memory(str(40 * 1024), TINY).counts
    with pytest.raises(UserError, match="the smallest subset, 1 shared and 1 routed expert a"):
        read_memory("10KB", TINY)
    with pytest.raises(UserError, match="give a size such as 4GB"):
        read_memory("plenty", TINY)


def test_a_total_goes_where_the_scores_are():
    even, peaked = torch.full((8,), 0.125).numpy(), torch.tensor([1.0] + [0.0] * 7).numpy()
    assert share_out(6, [even, even, even], TINY) == (2, 2, 2)
    assert share_out(12, [even, peaked, peaked], TINY) == (8, 2, 2)
    assert share_out(27, [even, peaked, peaked], TINY) == (9, 9, 9)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), min_size=3, max_size=3),
    st.integers(6, 27),
)
def test_a_total_is_spent_and_every_layer_keeps_a_routed_expert(scores, total):
    counts = share_out(total, [torch.tensor(of_layer).numpy() for of_layer in scores], TINY)
    assert sum(counts) == total and all(2 <= count <= 9 for count in counts)


# ---- the artefact


SUBSET = Subset(
    experts_kept_per_layer=((0, 3, 8), (7, 8)),
    experts_per_layer=(9, 9),
    num_shared_experts=1,
    method="router",
    precision="fp32",
    budget="3,2",
    checkpoint="runs/it/checkpoints/step-00000006",
    checkpoint_fingerprint="ab" * 32,
    tokenizer_fingerprint="",
    calibration=Calibration("data", "rust", 6, 700, "cd" * 32),
    scores_per_layer=((0.5, 0.0, 0.1, 0.4, 0.0, 0.0, 0.0, 0.0),) * 2,
    forward_passes=1,
    fidelity=Fidelity(0.1, 0.9, 2, 300, True),
)


def test_what_is_written_is_read_again_and_has_the_published_keys(tmp_path):
    path = SUBSET.save(tmp_path / "it.json")
    assert read_subset(path) == SUBSET
    published = json.loads(path.read_text())
    assert published["pruning_method"] == "greedy_layerwise" and published["task"] == "rust"
    assert published["prune_keep_k"] == 2 and published["num_calibration"] == 6
    assert published["experts_kept_per_layer"] == [[0, 3, 8], [7, 8]]
    assert SUBSET.routed(0) == (0, 3) and SUBSET.routed(1) == (7,)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"experts_kept_per_layer": [[3, 0, 8], [7, 8]]}, "layer 0 keeps experts [3, 0, 8]"),
        ({"experts_kept_per_layer": [[0, 0, 8], [7, 8]]}, "layer 0 keeps experts [0, 0, 8]"),
        ({"experts_kept_per_layer": [[0, 9], [7, 8]]}, "between 0 and 8"),
        ({"experts_kept_per_layer": [[-1, 8], [7, 8]]}, "between 0 and 8"),
        ({"experts_kept_per_layer": [[0, 3], [7, 8]]}, "layer 0 leaves out a shared expert of 8"),
        ({"experts_kept_per_layer": [[8], [7, 8]]}, "layer 0 keeps no routed expert"),
        ({"experts_kept_per_layer": [[0, 8]]}, "has 1 layers, experts_per_layer 2"),
        ({"experts_kept_per_layer": [[True, 8], [7, 8]]}, "experts_kept_per_layer holds True"),
        ({"experts_kept_per_layer": "all"}, "experts_kept_per_layer holds 'all'"),
        ({"scores_per_layer": [[0.5], [0.5]]}, "layer 0 has 1 scores for 8 routed experts"),
        ({"scores_per_layer": [[0.5]]}, "scores_per_layer has 1 layers of 2"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 is negative"),
        ({"num_shared_experts": 10}, "leaves out a shared expert"),
        ({"format": 2}, "format 2 is not 1"),
        ({"calibration": 3}, "calibration holds 3"),
        ({"method": None}, "method holds None"),
    ],
)
def test_a_subset_that_cannot_be_is_one_line(tmp_path, change, fault):
    path = tmp_path / "it.json"
    path.write_text(json.dumps({**SUBSET.to_json(), **change}))
    with pytest.raises(UserError) as caught:
        read_subset(path)
    assert fault in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def paths_of(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(inner, (*path, key))


def mutated(content, path, value):
    if not path:
        return value
    content = copy.deepcopy(content)
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return content


CONTENT = json.loads(json.dumps(SUBSET.to_json()))


@given(st.sampled_from([p for p in paths_of(CONTENT) if len(p) < 3 or p[-1] < 2]), JSON)
def test_no_content_of_a_subset_ends_in_a_traceback(tmp_path_factory, path, value):
    file = tmp_path_factory.getbasetemp() / "mutated.json"
    file.write_text(json.dumps(mutated(CONTENT, path, value)))
    try:
        found = read_subset(file)
    except UserError as error:
        assert "\n" not in str(error)
        return
    # What is accepted is a subset: it can be written, and read as itself.
    assert all(math.isfinite(score) for layer in found.scores_per_layer for score in layer)
    found.save(file)
    assert read_subset(file) == found


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_no_bytes_of_a_subset_end_in_a_traceback(tmp_path_factory, noise, at):
    file = tmp_path_factory.getbasetemp() / "noise.json"
    good = json.dumps(SUBSET.to_json()).encode()
    file.write_bytes(good[:at] + noise + good[at + len(noise) :])
    try:
        read_subset(file)
    except UserError as error:
        assert "\n" not in str(error)


def test_shared_experts_come_last():
    assert kept_of([5, 1], 8, 2) == (1, 5, 8, 9)
