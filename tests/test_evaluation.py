"""Evaluation: losses of documents and of expert subsets are what a slow loop finds, and
extraction changes nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import pools_of, tiny_model
from torch.nn import functional as F

from emotrain.batch import PackedBatch
from emotrain.evaluation.measure import mean_increase, measure, routing_summary
from emotrain.evaluation.perplexity import (
    DocumentLosses,
    document_losses,
    losses_of_arms,
    pack,
    token_losses,
)
from emotrain.evaluation.reading import DomainDocuments
from emotrain.evaluation.results import ARMS, ByArm
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.model.transformer import Transformer
from emotrain.modular.counts import experts_kept
from emotrain.modular.select import greedy_select, random_select

ROW = 16


def documents_of(num_documents, seed, low=1, high=60, longest=40):
    """Random documents of 3 to `longest` tokens from a range of the vocabulary, EOS (0) last."""
    random = np.random.default_rng(seed)
    return [
        np.append(random.integers(low, high, random.integers(2, longest)), 0)
        for _ in range(num_documents)
    ]


def loss_alone(model, document, kept=None):
    """Sum of cross entropy of a document in pieces of ROW tokens, each a batch of its own, token
    by token."""
    total, targets = 0.0, 0
    for start in range(0, len(document), ROW):
        piece = torch.from_numpy(document[start : start + ROW])
        with torch.no_grad():
            logits_TV = model.logits(
                model(PackedBatch.from_rows(piece[None]), pools_of(None, kept))
            )
        for logits_V, target in zip(logits_TV[:-1], piece[1:], strict=True):
            total += float(torch.logsumexp(logits_V, 0) - logits_V[target])
            targets += 1
    return total, targets


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_documents_loss_is_that_of_the_document_alone(document_mask):
    """With attention across documents too: each document then gets rows of its own."""
    model = tiny_model(model__attention__document_mask=document_mask)
    documents = documents_of(9, seed=0)
    batches = pack(documents, ROW, 2, document_mask)
    assert any(len(document) > ROW for document in documents) and any(
        batch.has_padding for batch in batches
    )
    found = document_losses(model, batches, torch.zeros(9, dtype=torch.int64))
    for i, document in enumerate(documents):
        total, targets = loss_alone(model, document)
        assert int(found.targets_U[i]) == targets
        assert float(found.loss_U[i]) == pytest.approx(total, rel=1e-5)


def test_each_group_is_measured_with_its_own_experts():
    model = tiny_model()
    documents, group_U = documents_of(8, seed=1), torch.tensor([0, 1, 2, 0, 1, 2, 2, 0])
    subsets = random_select(model.config, 3, experts_kept(model.config, 0.5), seed=0)
    found = document_losses(model, pack(documents, ROW, 3), group_U, subsets)
    for i, document in enumerate(documents):
        total, _ = loss_alone(model, document, kept=[mask_JN[group_U[i]] for mask_JN in subsets])
        assert float(found.loss_U[i]) == pytest.approx(total, rel=1e-5)
        assert total != pytest.approx(loss_alone(model, document)[0], rel=1e-4), (
            "the subset must matter"
        )


def test_routing_sums_are_those_of_the_documents_tokens():
    model = tiny_model()
    documents = documents_of(4, seed=2, longest=ROW - 1)
    found = document_losses(model, pack(documents, ROW, 2), torch.zeros(4, dtype=torch.int64))
    for i, document in enumerate(documents):
        with torch.no_grad():
            batch = PackedBatch.from_rows(torch.from_numpy(document)[None])
            report = model(batch, pools_of(None, details=True)).routing
        for sum_UN, layer in zip(found.routing, report.layers, strict=True):
            torch.testing.assert_close(
                sum_UN[i].float(),
                torch.softmax(layer.details.logits_TN, 1).sum(0),
                rtol=1e-5,
                atol=1e-6,
            )
            assert float(sum_UN[i].sum()) == pytest.approx(len(document), rel=1e-5)


def test_all_experts_kept_is_the_full_model():
    model = tiny_model()
    batches, group_U = pack(documents_of(6, seed=3), ROW, 2), torch.tensor([0, 0, 1, 1, 1, 0])
    everything = random_select(model.config, 2, experts_kept(model.config, 1.0), seed=0)
    full, kept = (
        document_losses(model, batches, group_U),
        document_losses(model, batches, group_U, everything),
    )
    assert torch.equal(full.loss_U, kept.loss_U)


def one_pass_an_arm(model, batches, group_U, subsets):
    """Losses and routing of each document by a forward pass of the whole model: what
    `losses_of_arms` shares between arms is computed anew."""
    loss_U = torch.zeros(len(group_U), dtype=torch.float64)
    routing = []
    for batch in batches:
        ids_G = batch.document_ids_G.clamp(min=0)
        kept = None if subsets is None else [mask_JN[group_U[ids_G]] for mask_JN in subsets]
        with torch.no_grad():
            output = model(batch, pools_of(None, kept, details=True))
            loss_T = F.cross_entropy(
                model.logits(output), batch.targets_BS.reshape(-1), reduction="none"
            )
        loss_U.index_add_(0, ids_G[batch.document_T], loss_T.double())
        for layer, found in enumerate(output.routing.layers):
            if len(routing) == layer:
                routing.append(torch.zeros(len(group_U), found.details.logits_TN.shape[1]).double())
            routing[layer].index_add_(0, ids_G, found.details.document_scores_GN.double())
    return loss_U, routing


@pytest.mark.parametrize("rows_per_pass", [0, 1, 5])
@pytest.mark.parametrize("mask", [True, False])
def test_arms_that_share_a_pass_lose_what_each_loses_alone(mask, rows_per_pass):
    """And up to the first experts nothing is computed twice."""
    model = tiny_model(model__attention__document_mask=mask, model__num_layers=3)
    documents, group_U = documents_of(9, seed=1), torch.tensor([0, 1, 2, 0, 1, 2, 2, 0, 1])
    some, few = (
        random_select(model.config, 3, experts_kept(model.config, share), seed=0)
        for share in (0.6, 0.3)
    )
    arms = [few, None, some]
    batches = pack(documents, ROW, 2, mask)
    assert any(batch.has_padding for batch in batches)
    rows = [0, 0, 0]
    for layer, block in enumerate(model.blocks):

        def count(_module, inputs, _output, layer=layer):
            rows[layer] += len(inputs[0])

        block.attention.register_forward_hook(count)
    found = losses_of_arms(model, batches, group_U, arms, rows_per_pass=rows_per_pass)
    one = sum(len(batch.tokens_BS) for batch in batches)
    assert rows == [one, 3 * one, 3 * one]
    for index, (losses, subsets) in enumerate(zip(found, arms, strict=True)):
        loss_U, routing = one_pass_an_arm(model, batches, group_U, subsets)
        torch.testing.assert_close(losses.loss_U, loss_U, rtol=1e-6, atol=1e-6)
        assert losses.targets_U.tolist() == [len(d) - -(-len(d) // ROW) for d in documents]
        assert len(losses.routing) == (0 if index else len(routing))
        for sum_UN, expected_UN in zip(losses.routing, routing, strict=index == 0):
            torch.testing.assert_close(sum_UN, expected_UN, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0].loss_U, found[2].loss_U, rtol=1e-3), "arms must differ"


def sliced(model, kept):
    """A model that holds only the kept routed experts and the shared ones."""
    config, shared = model.config, model.config.experts.shared
    counts = tuple(int(mask_N.sum()) for mask_N in kept)
    small = Transformer(
        dataclasses.replace(
            config,
            experts=dataclasses.replace(
                config.experts,
                routed=max(counts),
                routed_per_layer=counts,
                top_k=min(config.experts.top_k, *counts),
            ),
        )
    )
    state = model.state_dict()
    for layer, mask_N in enumerate(kept):
        kept_of = {
            "moe.router.weight_ED": torch.cat([mask_N, torch.ones(shared, dtype=torch.bool)]),
            "moe.experts.gate_up_NFD": mask_N,
            "moe.experts.down_NHD": mask_N,
        }
        for name, rows in kept_of.items():
            state[f"blocks.{layer}.{name}"] = state[f"blocks.{layer}.{name}"][rows]
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize(
    "counts", [(5, 5), (6, 4), (3, 3)], ids=["half", "layers differ", "fewer than a token chooses"]
)
def test_extraction_is_exact(counts):
    """The full model under a mask and a model without the other experts' weights have the same
    losses."""
    model = tiny_model()
    batches, group_U = pack(documents_of(6, seed=4), ROW, 3), torch.zeros(6, dtype=torch.int64)
    subsets = greedy_select(model, batches, group_U, 1, counts)
    masked = document_losses(model, batches, group_U, subsets)
    extracted = document_losses(
        sliced(model, [mask_JN[0] for mask_JN in subsets]), batches, group_U
    )
    torch.testing.assert_close(masked.loss_U, extracted.loss_U, rtol=1e-6, atol=0)
    assert not torch.allclose(
        masked.loss_U, document_losses(model, batches, group_U).loss_U, rtol=1e-4
    )


@pytest.mark.parametrize("num_tokens", [1, 255, 256, 600])
def test_token_losses_in_blocks_equal_one_cross_entropy(num_tokens):
    generator = torch.Generator().manual_seed(0)
    hidden_TD, head_VD = (
        torch.randn(num_tokens, 8, generator=generator),
        torch.randn(50, 8, generator=generator),
    )
    targets_T = torch.randint(50, (num_tokens,), generator=generator)
    targets_T[::3] = -100
    expected = F.cross_entropy(
        hidden_TD @ head_VD.T, targets_T, reduction="none", ignore_index=-100
    )
    torch.testing.assert_close(token_losses(hidden_TD, head_VD, targets_T), expected)
    assert (token_losses(hidden_TD, head_VD, targets_T)[::3] == 0).all()


def domains_of(num_domains, held_out=5):
    """Domains with vocabularies of their own, in no alphabetical order of vocabulary."""
    return {
        name: DomainDocuments(
            documents_of(3, 10 + j, 1 + 12 * j, 13 + 12 * j),
            documents_of(held_out, 20 + j, 1 + 12 * j, 13 + 12 * j),
        )
        for j, name in enumerate(("law", "code", "prose", "maths")[:num_domains])
    }


def domain_loss(model, documents, kept=None):
    sums = [loss_alone(model, document, kept) for document in documents]
    return sum(loss for loss, _ in sums) / sum(targets for _, targets in sums)


@pytest.mark.parametrize("controls", [0, 2])
def test_the_evaluation_is_what_its_words_say(controls):
    """Every number of an evaluation, from one domain at a time; its controls on all held-out
    documents or on some."""
    model, domains = tiny_model(), domains_of(3)
    settings = EvaluationSettings(
        keep=(1.0, 0.5), random_seeds=2, seed=5, cross_domain="all", control_documents=controls
    )
    result = measure(model, domains, settings, ROW, 2)
    names, counts = sorted(domains), experts_kept(model.config, 0.5)
    chosen = {
        name: [
            mask_JN[0]
            for mask_JN in greedy_select(
                model,
                pack(domains[name].calibration, ROW, 1),
                torch.zeros(3, dtype=torch.int64),
                1,
                counts,
            )
        ]
        for name in names
    }
    random = [random_select(model.config, 3, counts, seed) for seed in (5, 6)]
    for j, name in enumerate(names):
        held_out, found = domains[name].held_out, result.domains[name]
        full, fewer = domain_loss(model, held_out), held_out[: controls or None]
        full_of_controls = domain_loss(model, fewer)
        assert not controls or len(fewer) < len(held_out)
        expected = {
            "selected": domain_loss(model, held_out, chosen[name]) - full,
            "random": np.mean(
                [
                    domain_loss(model, fewer, [mask_JN[j] for mask_JN in subsets])
                    for subsets in random
                ]
            )
            - full_of_controls,
            "cross_domain": np.mean(
                [domain_loss(model, fewer, chosen[other]) for other in names if other != name]
            )
            - full_of_controls,
        }
        assert found.loss_nats == pytest.approx(full, rel=1e-5)
        assert found.increase_nats["1.0"] == ByArm(0.0, 0.0, 0.0)
        for arm in ARMS:
            assert found.increase(keep="0.5", arm=arm)[0] == pytest.approx(expected[arm], abs=1e-5)
            assert getattr(found.subset_loss_nats["0.5"], arm) == pytest.approx(
                expected[arm] + full, abs=1e-5
            )
    mean = {arm: result.mean.increase("0.5", arm) for arm in ARMS}
    for arm in ARMS:
        by_domain = [result.domains[name].increase("0.5", arm) for name in names]
        assert mean[arm][0] == pytest.approx(np.mean([increase for increase, _ in by_domain]))
        errors = [error for _, error in by_domain]
        assert mean[arm][1] == pytest.approx(math.hypot(*errors) / 3)
    assert len({round(increase, 4) for increase, _ in mean.values()}) == 3, "the arms must differ"


def test_cross_domain_next_uses_the_next_name():
    model, domains = tiny_model(), domains_of(3)
    result = measure(model, domains, EvaluationSettings(keep=(0.5,), random_seeds=0), ROW, 2)
    counts = experts_kept(model.config, 0.5)
    code = [
        mask_JN[0]
        for mask_JN in greedy_select(
            model,
            pack(domains["code"].calibration, ROW, 1),
            torch.zeros(3, dtype=torch.int64),
            1,
            counts,
        )
    ]
    # Sorted: code, law, prose; the last one takes the first one's.
    prose = result.domains["prose"]
    assert prose.subset_loss_nats["0.5"].cross_domain == pytest.approx(
        domain_loss(model, domains["prose"].held_out, code), rel=1e-5
    )
    assert prose.increase_nats["0.5"].random is None


def test_standard_error_covers_the_spread_over_samples():
    """Over many samples of documents, the reported error is the standard deviation of the
    reported increase."""
    random = np.random.default_rng(0)
    increases, errors = [], []
    for _ in range(800):
        targets = random.integers(5, 200, 40)
        change = targets * (0.1 + 0.3 * random.standard_normal(40))
        increase_J, error_J = mean_increase(
            torch.tensor(change), torch.tensor(targets), torch.zeros(40, dtype=torch.int64)
        )
        increases.append(float(increase_J))
        errors.append(float(error_J))
    assert np.mean(increases) == pytest.approx(0.1, abs=4 * np.std(increases) / math.sqrt(800))
    assert np.mean(errors) == pytest.approx(np.std(increases), rel=0.1)


def test_routing_summary_of_domains_that_share_all_or_nothing():
    same_UN, apart_UN = (
        torch.full((4, 6), 2.0, dtype=torch.float64),
        torch.eye(2, 6, dtype=torch.float64).repeat_interleave(2, 0),
    )
    found = routing_summary(
        DocumentLosses(torch.zeros(4), torch.ones(4), (same_UN, apart_UN)),
        torch.tensor([0, 0, 1, 1]),
        2,
    )
    assert found.domain_cosine_per_layer == pytest.approx([1.0, 0.0])
    assert found.effective_experts_per_layer == pytest.approx([6.0, 1.0])
    assert found.domain_cosine == pytest.approx(0.5) and found.effective_experts == pytest.approx(
        3.5
    )


def test_one_domain_has_no_cross_domain_control():
    result = measure(tiny_model(), domains_of(1), EvaluationSettings(keep=(1.0, 0.5)), ROW, 2)
    for keep in ("1.0", "0.5"):
        assert result.mean.increase_nats[keep].cross_domain is None
    assert result.routing.domain_cosine is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": ()}, "keep is empty"),
        ({"calibration_documents": 0}, "calibration_documents=0"),
        ({"control_documents": 1}, "control_documents=1 gives no standard error; give at least 2"),
        ({"documents": 1}, "documents=1 gives no standard error"),
        ({"random_seeds": -1}, "random_seeds=-1"),
        ({"cross_domain": "none"}, "cross_domain=none is not known"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings)
