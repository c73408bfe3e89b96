"""Selection of expert subsets: all domains at once equals each alone, controls are what they
claim, mistakes get one line."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import pools_of

from emotrain.batch import PackedBatch
from emotrain.config import ExpertsConfig, ModelConfig
from emotrain.evaluation.perplexity import pack
from emotrain.model.router import select_pool, sum_by_document
from emotrain.model.transformer import Transformer
from emotrain.modular import select
from emotrain.modular.counts import experts_kept
from emotrain.modular.select import (
    cross_domain,
    greedy_ranking,
    greedy_rankings,
    greedy_select,
    random_select,
)

TINY = ModelConfig(
    vocab_size=41,
    d_model=16,
    num_layers=3,
    num_heads=2,
    init_std=0.3,
    experts=ExpertsConfig(routed=8, shared=1, top_k=2, hidden=8),
)


def documents_of(num_groups, per_group, seed=0):
    """Random documents of 3 to 30 tokens; every group draws from tokens of its own, so that
    groups route differently."""
    random = np.random.default_rng(seed)
    return [
        [
            np.append(random.integers(1 + 5 * group, 11 + 5 * group, random.integers(2, 30)), 0)
            for _ in range(per_group)
        ]
        for group in range(num_groups)
    ]


def alone(document):
    """A document as a batch of its own."""
    return PackedBatch.from_rows(torch.from_numpy(document)[None])


def greedy_by_hand(model, documents, counts):
    """One domain, one document at a time, with masks for the whole batch: the published
    procedure word for word."""
    kept = []
    for layer, count in enumerate(counts):
        routed = model.config.routed_in_layer(layer)
        total, tokens = torch.zeros(routed, dtype=torch.float64), 0
        for document in documents:
            masks = [
                *kept,
                *(
                    torch.ones(model.config.routed_in_layer(later), dtype=torch.bool)
                    for later in range(layer, model.config.num_layers)
                ),
            ]
            logits_TN = (
                model(alone(document), pools_of(None, masks, details=True))
                .routing.layers[layer]
                .details.logits_TN
            )
            for probability_N in torch.softmax(logits_TN, dim=1):
                total += probability_N.double()
                tokens += 1
        best = sorted(range(routed), key=lambda expert: (-total[expert] / tokens, expert))[
            : count - model.config.experts.shared
        ]
        kept.append(torch.zeros(routed, dtype=torch.bool).index_fill_(0, torch.tensor(best), True))
    return kept


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(
            TINY, experts=dataclasses.replace(TINY.experts, routed_per_layer=(8, 4, 6))
        ),
    ],
    ids=["equal layers", "layers of different size"],
)
def test_all_domains_at_once_equal_each_domain_alone(config):
    model = Transformer(config).initialize(2)
    groups = documents_of(3, 4)
    flat = [document for group in groups for document in group]
    group_U = torch.arange(3).repeat_interleave(4)
    counts = experts_kept(config, 0.5)
    # Several domains share a row, and rows end in padding.
    batches = pack(flat, 32, rows_per_batch=3)
    assert any(batch.has_padding for batch in batches)
    at_once = greedy_select(model, batches, group_U, 3, counts)
    with torch.no_grad():
        for j, documents in enumerate(groups):
            for mask_JN, expected_N in zip(
                at_once, greedy_by_hand(model, documents, counts), strict=True
            ):
                torch.testing.assert_close(mask_JN[j], expected_N)
    assert not all(torch.equal(mask_JN[0], mask_JN[1]) for mask_JN in at_once), (
        "domains must differ for the test to say anything"
    )


def test_mean_routing_is_a_mean_over_a_groups_tokens_and_no_padding():
    model = Transformer(TINY).initialize(1)
    groups = documents_of(2, 3)
    batches = pack([document for group in groups for document in group], 32, 2)
    assert any(batch.has_padding for batch in batches)
    group_U = torch.arange(2).repeat_interleave(3)
    with torch.no_grad():
        carried = [select._Carried.of(model, batch, group_U) for batch in batches]
        for state in carried:
            state.x_BSD = model.blocks[0].attend(state.x_BSD, state.view)
        found_JN = select._mean_routing(model.blocks[0], carried, 2)
        for j, documents in enumerate(groups):
            details = [
                model(alone(document), pools_of(None, details=True)).routing.layers[0].details
                for document in documents
            ]
            logits_TN = torch.cat([detail.logits_TN for detail in details])
            expected_N = torch.softmax(logits_TN, dim=1).mean(dim=0)
            torch.testing.assert_close(found_JN[j].float(), expected_N)


def greedy_from_the_start(model, batches, group_U, num_groups, counts):
    """The same choice by passes of growing depth through the whole model: for layer l, everything
    from the embedding on, with the layers below restricted."""
    subsets = []
    for layer, count in enumerate(counts):
        masks = [
            *subsets,
            *(
                torch.ones(num_groups, model.config.routed_in_layer(later), dtype=torch.bool)
                for later in range(layer, model.config.num_layers)
            ),
        ]
        score_JN, tokens_J1 = 0, 0
        for batch in batches:
            group_G = select.group_of_documents(batch, group_U)
            kept = [mask_JN[group_G] for mask_JN in masks]
            report = model(batch, pools_of(None, kept, details=True)).routing
            scores_GN = report.layers[layer].details.document_scores_GN.double()
            tokens_G1 = (report.document_tokens_G * report.real_G)[:, None].double()
            score_JN += sum_by_document(scores_GN, group_G, num_groups)
            tokens_J1 += sum_by_document(tokens_G1, group_G, num_groups)
        size_J = torch.full((num_groups,), count - model.config.experts.shared)
        subsets.append(select_pool(score_JN / tokens_J1, size_J))
    return subsets


@pytest.mark.parametrize("seed", range(6))
def test_carrying_hidden_states_changes_no_choice(seed):
    """And costs one pass: each block attends once and runs its experts once a batch."""
    model = Transformer(TINY).initialize(seed)
    groups = documents_of(3, 4, seed)
    batches = pack([d for group in groups for d in group], 32, 3)
    group_U, counts = torch.arange(3).repeat_interleave(4), experts_kept(TINY, 0.4)
    with torch.no_grad():
        expected = greedy_from_the_start(model, batches, group_U, 3, counts)
    calls = Counter()
    for name, part in (("attention", "attention"), ("experts", "moe.experts")):
        for block in model.blocks:
            block.get_submodule(part).register_forward_hook(
                lambda *_, name=name: calls.update([name])
            )
    found = greedy_select(model, batches, group_U, 3, counts)
    for ours_JN, theirs_JN in zip(found, expected, strict=True):
        assert torch.equal(ours_JN, theirs_JN)
    layers = TINY.num_layers
    assert calls == {
        "attention": layers * len(batches),
        "experts": (layers - 1) * len(batches),
    }


@pytest.mark.parametrize("routed_per_layer", [(8, 4, 6), (0, 8, 6)])
def test_several_sizes_at_once_are_chosen_as_one_by_one(routed_per_layer):
    """And the first attention is computed once for all of them."""
    experts = dataclasses.replace(TINY.experts, routed_per_layer=routed_per_layer)
    model = Transformer(dataclasses.replace(TINY, experts=experts)).initialize(1)
    groups = documents_of(3, 4)
    batches = pack([d for group in groups for d in group], 32, 3)
    group_U = torch.arange(3).repeat_interleave(4)
    sizes = [experts_kept(model.config, share) for share in (0.3, 0.8, 0.5)]
    alone = [greedy_ranking(model, batches, group_U, 3, counts) for counts in sizes]
    calls = Counter()
    for layer, block in enumerate(model.blocks):
        block.attention.register_forward_hook(lambda *_, layer=layer: calls.update([layer]))
    together = greedy_rankings(model, batches, group_U, 3, sizes)
    for (subsets, scores), (expected, expected_scores) in zip(together, alone, strict=True):
        for mask_JN, expected_JN in zip(subsets, expected, strict=True):
            assert torch.equal(mask_JN, expected_JN)
        for score_JN, expected_JN in zip(scores, expected_scores, strict=True):
            torch.testing.assert_close(score_JN, expected_JN)
    assert calls == {layer: len(batches) * (3 if layer else 1) for layer in range(3)}
    assert not torch.equal(together[0][1][-1], together[1][1][-1]), "sizes must part ways"


def test_later_layers_are_ranked_behind_the_restricted_earlier_ones():
    """A selection from one pass through the full model would be another one: the greedy order is
    not decoration."""
    model = Transformer(TINY).initialize(1)
    groups = documents_of(3, 4)
    counts = experts_kept(TINY, 0.25)
    batches = pack([d for group in groups for d in group], 32, 3)
    group_U = torch.arange(3).repeat_interleave(4)
    greedy = greedy_select(model, batches, group_U, 3, counts)
    first_layers_free = greedy_select(model, batches, group_U, 3, (9, 9, counts[2]))
    assert not torch.equal(greedy[2], first_layers_free[2])


def test_ties_go_to_the_lower_index():
    model = Transformer(TINY).initialize(0)
    for block in model.blocks:
        torch.nn.init.zeros_(block.moe.router.weight_ED)
    subsets = greedy_select(
        model, [alone(np.arange(10))], torch.zeros(1, dtype=torch.int64), 1, (4, 4, 4)
    )
    for mask_JN in subsets:
        assert mask_JN.tolist() == [[True] * 3 + [False] * 5]


def test_neither_order_nor_packing_of_the_documents_matters():
    model = Transformer(TINY).initialize(2)
    first, second = documents_of(2, 1, seed=5)
    counts, group_U = experts_kept(TINY, 0.5), torch.tensor([0, 1])
    packed = greedy_select(model, pack([*first, *second], 64, 1), group_U, 2, counts)
    swapped = greedy_select(model, pack([*second, *first], 64, 2), group_U.flip(0), 2, counts)
    for mask_JN, other_JN in zip(packed, swapped, strict=True):
        torch.testing.assert_close(mask_JN, other_JN)


@pytest.mark.parametrize(
    ("count", "shared", "fraction", "kept"),
    [
        (128, 1, 1.0, 128),
        (128, 1, 0.5, 64),
        (128, 1, 0.25, 32),
        (128, 1, 0.125, 16),
        (128, 1, 0.0625, 8),
        (128, 0, 0.25, 32),
        (9, 1, 0.01, 2),
        (9, 2, 0.01, 3),
        (9, 1, 0.3, 3),
        (9, 1, 1.0, 9),
    ],
)
def test_kept_experts_count_the_shared_ones(count, shared, fraction, kept):
    config = ModelConfig(
        num_layers=2, experts=ExpertsConfig(routed=count - shared, shared=shared, top_k=1)
    )
    assert experts_kept(config, fraction) == (kept, kept)
    for mask_JN in random_select(config, 5, (kept, kept), seed=0):
        assert mask_JN.shape == (5, count - shared)
        assert (mask_JN.sum(dim=1) == kept - shared).all()


def test_layers_without_routed_experts_stay_as_they_are():
    config = ModelConfig(
        num_layers=2, experts=ExpertsConfig(shared=1, top_k=0, routed_per_layer=(0, 7))
    )
    assert experts_kept(config, 0.5) == (1, 4)


def test_random_subsets_come_from_the_seed_alone_and_are_uniform():
    config = dataclasses.replace(TINY, num_layers=1)
    first, again, other = (random_select(config, 4000, (5,), seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Each expert is in half of the subsets: 6 standard deviations of a binomial are 0.047.
    assert (first.float().mean(dim=0) - 0.5).abs().max() < 0.047
    smaller = random_select(config, 4000, (3,), 3)[0]
    assert not (smaller & ~first).any(), "of one seed, the smaller subset lies in the larger"


def test_cross_domain_gives_every_domain_anothers_experts():
    subsets = (torch.eye(4, dtype=torch.bool), torch.eye(4, dtype=torch.bool).flip(1))
    for shift in (1, 2, 3):
        for own_JN, others_JN in zip(subsets, cross_domain(subsets, shift), strict=True):
            for j in range(4):
                assert torch.equal(others_JN[j], own_JN[(j + shift) % 4])
    with pytest.raises(ValueError, match="its own experts"):
        cross_domain(subsets, 4)


@pytest.mark.parametrize("fraction", [0.0, -0.25, 1.5, float("nan")])
def test_an_impossible_share_is_one_line(fraction):
    with pytest.raises(
        ValueError, match=r"keep=.* is not a share of the experts; give numbers above 0 and up to 1"
    ) as error:
        experts_kept(TINY, fraction)
    assert "\n" not in str(error.value)


def test_a_dense_model_has_nothing_to_select():
    with pytest.raises(ValueError, match="the model is dense"):
        experts_kept(ModelConfig(experts=ExpertsConfig(routed=0, shared=1, top_k=0)), 0.5)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((1, 4, 4), "layer 0 cannot keep 1 of its 9 experts; keep 2 to 9, which counts 1 shared"),
        ((4, 10, 4), "layer 1 cannot keep 10"),
        ((4, 4), "2 counts of kept experts for 3 layers"),
    ],
)
def test_impossible_counts_are_one_line(counts, message):
    model = Transformer(TINY).initialize(0)
    with pytest.raises(ValueError, match=message):
        greedy_select(model, [alone(np.arange(5))], torch.zeros(1, dtype=torch.int64), 1, counts)
    with pytest.raises(ValueError, match=message):
        random_select(TINY, 1, counts, 0)


def test_a_domain_without_calibration_tokens_is_one_line():
    model = Transformer(TINY).initialize(0)
    with pytest.raises(ValueError, match="group 1 has no calibration tokens"):
        greedy_select(model, [alone(np.arange(5))], torch.zeros(1, dtype=torch.int64), 2, (4, 4, 4))
