"""Proves the network: against a slow restatement of spec 1.2, one document at a time; that
documents do not see each other; and that a dense model, a standard MoE and EMO are settings of
one code."""

from __future__ import annotations

import cmath
import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import pools_of, tiny_batch, tiny_config, tiny_model
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.kernels import rotate_heads
from emotrain.model.attention import document_mask, rotary_table
from emotrain.model.counts import parameter_counts
from emotrain.model.losses import language_model_sums
from emotrain.model.router import RoutingRequest, draw_pool_sizes, select_pool
from emotrain.model.transformer import Transformer

DENSE = {"model__experts__routed": 0, "model__experts__top_k": 0, "model__experts__hidden": 32}
STANDARD = {"model__router__pool__kind": "none"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pool_sizes(model: Transformer, batch: PackedBatch, step: int = 1) -> Tensor | None:
    return draw_pool_sizes(
        model.config.pool, batch.document_ids_G, model.config.num_layers, seed=0, step=step
    )


def replaced(batch: PackedBatch, row: int, columns: slice) -> PackedBatch:
    """The batch with other tokens there."""
    tokens_BS = batch.tokens_BS.clone()
    tokens_BS[row, columns] = (tokens_BS[row, columns] + 31) % 64
    return PackedBatch(
        tokens_BS, batch.targets_BS, batch.document_BS, batch.document_ids_G, batch.has_padding
    )


def logits_of(
    model: Transformer,
    batch: PackedBatch,
    sizes_LG: Tensor | None = None,
    kept: list[Tensor] | None = None,
) -> Tensor:
    with torch.no_grad():
        return model.logits(model(batch, pools_of(sizes_LG, kept))).view(*batch.tokens_BS.shape, -1)


# ---- the whole forward pass, restated


def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_TD / (x_TD.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight_D


def turned(x_TC: Tensor, positions: list[int], theta: float) -> Tensor:
    """Rotary positions by complex numbers: pair (i, i + C/2) of position p turns by p *
    theta^(-2i/C)."""
    width = x_TC.shape[1]
    rows = x_TC.tolist()
    for row, position in zip(rows, positions, strict=True):
        for i in range(width // 2):
            z = complex(row[i], row[i + width // 2]) * cmath.exp(
                1j * position * theta ** (-2 * i / width)
            )
            row[i], row[i + width // 2] = z.real, z.imag
    return torch.tensor(rows, dtype=x_TC.dtype)


def forward_oracle(
    model: Transformer, tokens: list[int], positions: list[int], size_L: Tensor | None
) -> Tensor:
    """Logits of one document, alone; plain attention, loops over heads, tokens and experts."""
    config = model.config
    x_TD = model.embedding.weight[tokens]
    causal_TT = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for layer, block in enumerate(model.blocks):
        heads = (
            norm(x_TD, block.attention_norm.weight, config.norm_eps) @ block.attention.qkv.weight.T
        ).split(config.head_dim, dim=1)
        keys, values = (
            heads[config.num_heads :][: config.kv_heads],
            heads[config.num_heads + config.kv_heads :],
        )
        mixed = []
        for head in range(config.num_heads):
            shared_with = head * config.kv_heads // config.num_heads
            q_TC, k_TC = (
                turned(h, positions, config.rope_theta) for h in (heads[head], keys[shared_with])
            )
            scores_TT = (q_TC @ k_TC.T / math.sqrt(config.head_dim)).masked_fill(
                ~causal_TT, -math.inf
            )
            mixed.append(scores_TT.softmax(dim=1) @ values[shared_with])
        x_TD = x_TD + torch.cat(mixed, dim=1) @ block.attention.out.weight.T
        x_TD = x_TD + experts_oracle(
            block.moe,
            norm(x_TD, block.moe_norm.weight, config.norm_eps),
            None if size_L is None else int(size_L[layer]),
        )
    return norm(x_TD, model.norm.weight, config.norm_eps) @ model.head.weight.T


def experts_oracle(moe: torch.nn.Module, x_TD: Tensor, pool_size: int | None) -> Tensor:
    def swiglu(x_D: Tensor, gate_up_FD: Tensor, down_HD: Tensor) -> Tensor:
        gate_H, up_H = (gate_up_FD @ x_D).chunk(2)
        return (gate_H * torch.sigmoid(gate_H) * up_H) @ down_HD

    bank, shared = moe.experts, moe.shared
    y_TD = torch.stack(
        [
            sum(
                swiglu(x_D, *expert)
                for expert in zip(shared.gate_up_MFD, shared.down_MHD, strict=True)
            )
            for x_D in x_TD
        ]
    )
    if moe.router is None:
        return y_TD
    logits_TN = x_TD @ moe.router.weight_ED[: moe.router.num_routed].T
    if pool_size is not None:
        best = logits_TN.softmax(dim=1).sum(dim=0).argsort(descending=True)[:pool_size].tolist()
        logits_TN = torch.stack(
            [
                column if e in best else torch.full_like(column, -math.inf)
                for e, column in enumerate(logits_TN.T)
            ],
            dim=1,
        )
    for token, probability_N in enumerate(logits_TN.softmax(dim=1)):
        for expert in probability_N.argsort(descending=True)[: moe.router.num_chosen].tolist():
            y_TD[token] += probability_N[expert] * swiglu(
                x_TD[token], bank.gate_up_NFD[expert], bank.down_NHD[expert]
            )
    return y_TD


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"model__router__pool__min": 1}, id="emo"),
        pytest.param(STANDARD, id="standard"),
        pytest.param(DENSE, id="dense"),
        pytest.param(
            {"model__num_heads": 4, "model__num_kv_heads": 2, "model__experts__shared": 2},
            id="grouped heads, two shared",
        ),
    ],
)
def test_forward_agrees_with_each_document_alone(overrides: dict) -> None:
    model, batch = tiny_model(**overrides).double(), tiny_batch()
    sizes_LG = pool_sizes(model, batch)
    logits_TV = logits_of(model, batch, sizes_LG).flatten(0, 1)
    for document in range(batch.num_documents):
        own_T = batch.document_T == document
        positions = (own_T.nonzero()[:, 0] % batch.tokens_BS.shape[1]).tolist()
        with torch.no_grad():
            expected_TV = forward_oracle(
                model,
                batch.tokens_BS.flatten()[own_T].tolist(),
                positions,
                None if sizes_LG is None else sizes_LG[:, document],
            )
        torch.testing.assert_close(
            logits_TV[own_T], expected_TV, rtol=1e-6, atol=1e-6
        )  # the rotary table is fp32


# ---- attention


def test_rotary_positions_are_turns_of_the_complex_plane() -> None:
    qkv_TAC = torch.randn(30, 3, 8)
    wanted = [turned(qkv_TAC[:, head], list(range(30)), 500.0) for head in range(2)]
    table = rotary_table(30, 8, 500.0, torch.device("cpu"))
    queries, keys, _ = rotate_heads(qkv_TAC.flatten(1)[None], *table, 1, 1)
    for ours, theirs in zip((queries, keys), wanted, strict=True):
        torch.testing.assert_close(ours[0, :, 0], theirs, atol=1e-5, rtol=1e-5)


def test_document_mask_is_causal_inside_documents() -> None:
    document_BS = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])
    mask_B1SS = document_mask(
        PackedBatch(document_BS, document_BS, document_BS, torch.arange(3))
    ).mask_B1SS
    for row, query, key in ((b, q, k) for b in range(2) for q in range(4) for k in range(4)):
        assert mask_B1SS[row, 0, query, key] == (
            key <= query and document_BS[row, query] == document_BS[row, key]
        )


def test_changing_a_document_changes_no_other() -> None:
    model, batch = tiny_model().double(), tiny_batch()
    sizes_LG = pool_sizes(model, batch)
    before, after = (
        logits_of(model, b, sizes_LG) for b in (batch, replaced(batch, row=0, columns=slice(5, 12)))
    )
    changed_BS = batch.document_BS == 1
    torch.testing.assert_close(after[~changed_BS], before[~changed_BS])
    assert not torch.isclose(after[changed_BS], before[changed_BS]).all(dim=1).any()


def test_without_the_mask_later_documents_see_earlier_ones_of_their_row() -> None:
    model, batch = (
        tiny_model(model__attention__document_mask=False, **STANDARD).double(),
        tiny_batch(),
    )
    before, after = (
        logits_of(model, b) for b in (batch, replaced(batch, row=0, columns=slice(5, 12)))
    )
    torch.testing.assert_close(after[0, :5], before[0, :5])
    torch.testing.assert_close(after[1], before[1])
    assert not torch.isclose(after[0, 12:], before[0, 12:]).all(dim=1).any()


def test_without_a_pool_a_token_never_sees_the_future() -> None:
    """With a pool it does, by design: the pool is chosen from the whole document (spec 2.3)."""
    model, batch = tiny_model().double(), tiny_batch(((16,), (16,)))
    later = replaced(batch, row=0, columns=slice(4, 16))
    before, after = logits_of(model, batch), logits_of(model, later)
    torch.testing.assert_close(after[0, :4], before[0, :4])
    sizes_LG = torch.full((2, 2), 3)
    assert not torch.allclose(
        logits_of(model, later, sizes_LG)[0, :4], logits_of(model, batch, sizes_LG)[0, :4]
    )


# ---- one code for three kinds of model


def test_emo_and_the_standard_model_are_the_same_parameters() -> None:
    emo, standard = tiny_model(), tiny_model(**STANDARD)
    assert {n: p.shape for n, p in emo.named_parameters()} == {
        n: p.shape for n, p in standard.named_parameters()
    }
    batch = tiny_batch()
    all_experts_LG = torch.full((2, batch.num_documents), 8)
    assert torch.equal(logits_of(emo, batch, all_experts_LG), logits_of(standard, batch))
    assert not torch.allclose(
        logits_of(emo, batch, torch.full((2, batch.num_documents), 3)), logits_of(standard, batch)
    )
    assert pool_sizes(standard, batch) is None


def test_a_dense_model_has_one_expert_and_no_router() -> None:
    dense = tiny_model(**DENSE)
    assert not [name for name, _ in dense.named_parameters() if "router" in name]
    assert dense(tiny_batch()).routing.layers == ()


def test_parameter_names_shapes_and_types() -> None:
    """Checkpoints and the published format are written in these names."""
    model = tiny_model(model__num_heads=4, model__num_kv_heads=2)
    shapes = {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if not name.startswith("blocks.1.")
    }
    assert shapes == {
        "embedding.weight": (64, 16),
        "norm.weight": (16,),
        "head.weight": (64, 16),
        "blocks.0.attention_norm.weight": (16,),
        "blocks.0.moe_norm.weight": (16,),
        "blocks.0.attention.qkv.weight": (32, 16),
        "blocks.0.attention.out.weight": (16, 16),
        "blocks.0.moe.router.weight_ED": (9, 16),
        "blocks.0.moe.experts.gate_up_NFD": (8, 16, 16),
        "blocks.0.moe.experts.down_NHD": (8, 8, 16),
        "blocks.0.moe.shared.gate_up_MFD": (1, 16, 16),
        "blocks.0.moe.shared.down_MHD": (1, 8, 16),
    }
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not list(model.named_buffers())


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        STANDARD,
        DENSE,
        {"model__experts__routed_per_layer": [4, 8]},
        {"model__experts__shared": 2},
    ],
)
def test_parameter_counts_are_those_of_the_real_model(overrides: dict) -> None:
    model = tiny_model(**overrides)
    counts, experts = parameter_counts(model.config), model.config.experts
    assert counts["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert counts["total_parameters"] == sum(
        v for k, v in counts.items() if k not in ("total_parameters", "active_parameters")
    )
    used = sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".experts." not in name and ".shared." not in name
    )
    assert (
        counts["active_parameters"]
        == used + 2 * (experts.top_k + experts.shared) * 3 * 16 * experts.hidden
    )


def test_initialization_is_a_normal_cut_at_three_deviations() -> None:
    std = 0.02
    model = tiny_model(std=std, model__vocab_size=4096, model__experts__routed=64)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        assert parameter.abs().max() <= 3 * std, name
        # Cutting at three deviations takes the deviation down by 1.34 %; four standard errors of
        # its estimate are allowed.
        assert parameter.std().item() == pytest.approx(
            0.98658 * std, rel=4 / math.sqrt(2 * parameter.numel())
        ), name
        assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name
    assert model.embedding.weight.abs().max() > 2.9 * std


def test_initialization_is_a_function_of_the_seed() -> None:
    first, again, other = (tiny_model(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


# ---- precision, early stop, expert subsets


def test_bfloat16_autocast_is_close_and_keeps_fp32_where_it_matters() -> None:
    batch, model = tiny_batch(), tiny_model(std=0.1)
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch, pools_of(None, details=True))
    assert (
        output.hidden_TD.dtype == torch.bfloat16
        and output.routing.layers[0].details.weights_TK.dtype == torch.float32
    )
    error = (
        output.hidden_TD - exact.hidden_TD
    ).square().mean().sqrt() / exact.hidden_TD.square().mean().sqrt()
    assert 0 < error < 0.03
    output.hidden_TD.square().sum().backward()
    assert all(
        p.grad.dtype == torch.float32
        for name, p in model.named_parameters()
        if name != "head.weight"
    )


def test_blocks_one_by_one_are_the_model() -> None:
    """What selection does: embed, attend, look at the routing, use the experts."""
    model, batch = tiny_model(), tiny_batch()
    request = pools_of(None, details=True)
    output = model(batch, request)
    x_BSD, view = model.embed(batch)
    for index, (block, layer) in enumerate(zip(model.blocks, output.routing.layers, strict=True)):
        h_BSD = block.attend(x_BSD, view)
        of_layer = request.layer(index, batch.num_documents)
        scores_GN = block.moe.document_scores(block.moe_norm(h_BSD).flatten(0, 1), batch, of_layer)
        assert torch.equal(scores_GN, layer.details.document_scores_GN)
        x_BSD, _ = block.use_experts(h_BSD, batch, of_layer)
    assert torch.equal(model.norm(x_BSD.flatten(0, 1)), output.hidden_TD)


def test_kept_experts_for_all_and_for_each_document_agree() -> None:
    model, batch = tiny_model(), tiny_batch()
    kept_LN = [torch.rand(8).argsort() < 4 for _ in range(2)]
    same = logits_of(model, batch, kept=kept_LN)
    assert torch.equal(
        same, logits_of(model, batch, kept=[kept_N.expand(5, 8) for kept_N in kept_LN])
    )
    assert not torch.allclose(same, logits_of(model, batch))
    kept_GN = torch.ones(5, 8, dtype=torch.bool)
    kept_GN[1] = kept_LN[0]
    only_one = logits_of(model, batch, kept=[kept_GN, torch.ones(8, dtype=torch.bool)])
    others_BS = batch.document_BS != 1
    torch.testing.assert_close(only_one[others_BS], logits_of(model, batch)[others_BS])
    assert not torch.allclose(only_one[~others_BS], logits_of(model, batch)[~others_BS])


def test_a_subset_is_as_if_the_others_were_not_there() -> None:
    """Also with pools, statistics and more choices than experts; with the subset's own kernels, so
    that it equals masking to rounding, and to the bit what is extracted (tests/test_subsets.py)."""
    model, batch = tiny_model().double(), tiny_batch()
    subset = [torch.tensor([1, 2, 5, 6]), torch.tensor([0, 7])]
    kept = [torch.zeros(8, dtype=torch.bool).index_fill(0, ids, True) for ids in subset]
    for sizes_LG in (None, pool_sizes(model, batch)):
        masked, alone = (
            model(batch, pools_of(sizes_LG, kept, details=True)),
            model(batch, replace(pools_of(sizes_LG, details=True), subset=subset)),
        )
        torch.testing.assert_close(alone.hidden_TD, masked.hidden_TD)
        for one, other in zip(alone.routing.layers, masked.routing.layers, strict=True):
            for name in ("counts_N", "probability_sum_N", "z_sum", "entropy_sum"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name))
            torch.testing.assert_close(
                one.details.document_scores_GN, other.details.document_scores_GN
            )
    both = [torch.ones(8, dtype=torch.bool).index_fill(0, torch.tensor([2, 7]), False)] * 2
    torch.testing.assert_close(
        model(batch, RoutingRequest(kept=both, subset=subset)).hidden_TD,
        model(batch, pools_of(None, [a & b for a, b in zip(both, kept, strict=True)])).hidden_TD,
    )


def test_keeping_the_pool_is_the_pool() -> None:
    """Spec 12.7: a subset of experts acts as the pool with the same members acted in training."""
    model, batch = tiny_model().double(), tiny_batch()
    sizes_LG = pool_sizes(model, batch)
    layers = model(batch, pools_of(sizes_LG, details=True)).routing.layers
    kept = [
        select_pool(layer.details.document_scores_GN, size_G)
        for layer, size_G in zip(layers, sizes_LG, strict=True)
    ]
    torch.testing.assert_close(
        logits_of(model, batch, kept=kept), logits_of(model, batch, sizes_LG)
    )


def test_padding_changes_no_real_token() -> None:
    model, batch = tiny_model().double(), tiny_batch(padded=True)
    sizes_LG = pool_sizes(model, batch)
    padding_BS = batch.document_ids_G[batch.document_BS] < 0
    before, after = (
        logits_of(model, b, sizes_LG) for b in (batch, replaced(batch, row=1, columns=slice(9, 16)))
    )
    torch.testing.assert_close(after[~padding_BS], before[~padding_BS])
    assert model(batch).routing.num_tokens == 25


@pytest.mark.parametrize("overrides", [{}, STANDARD, DENSE], ids=["emo", "standard", "dense"])
def test_a_tiny_model_learns_a_batch_by_heart(overrides: dict) -> None:
    model = Transformer(tiny_config(model__d_model=32, **overrides).model).initialize(0)
    batch = tiny_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        sums = language_model_sums(
            model(batch, pools_of(pool_sizes(model, batch, step))), model.head, batch, z_weight=0.0
        )
        losses.append(sums.lm.item() / sums.num_targets.item())
        optimizer.zero_grad()
        (sums.lm / sums.num_targets).backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(64), rel=0.02)
    assert losses[-1] < 0.1


def test_a_layer_pruned_below_the_choices_uses_all_it_has() -> None:
    """A pruned model may hold fewer routed experts in a layer than its tokens choose elsewhere."""
    model = tiny_model(model__experts__routed_per_layer=[8, 2], model__router__pool__min=1)
    output = model(tiny_batch(), pools_of(None, details=True))
    assert [layer.details.experts_TK.shape[1] for layer in output.routing.layers] == [3, 2]
    torch.testing.assert_close(
        output.routing.layers[1].details.weights_TK.sum(dim=1), torch.ones(32)
    )


# ---- banks of experts shared by layers


@pytest.mark.parametrize(
    ("sharing", "banks"), [("none", [0, 1, 2, 3]), ("groups", [0, 0, 1, 1]), ("all", [0] * 4)]
)
def test_layers_of_a_bank_use_the_same_experts(sharing: str, banks: list[int]) -> None:
    model = tiny_model(model__num_layers=4, model__experts__sharing=sharing)
    assert [model.config.bank_of_layer(layer) for layer in range(4)] == banks
    assert len(model.expert_banks()) == len(set(banks))
    for first, second in itertools.combinations(range(4), 2):
        one, other = model.blocks[first].moe, model.blocks[second].moe
        assert (one.experts is other.experts) == (banks[first] == banks[second])
        assert one.router is not other.router and one.shared is not other.shared
    counts = parameter_counts(model.config)
    assert counts["total_parameters"] == sum(p.numel() for p in model.parameters())
    private = parameter_counts(tiny_config(model__num_layers=4).model)
    used = "active_parameters"
    assert counts[used] == private[used], "sharing changes what is stored, not what is computed"


def test_a_shared_bank_is_its_layers_with_tied_experts() -> None:
    """Values and gradients of sharing are those of separate banks with equal weights, whose
    gradients are added."""
    shared = tiny_model(model__num_layers=2, model__experts__sharing="all").double()
    apart = tiny_model(model__num_layers=2).double()
    apart.load_state_dict(shared.state_dict())
    batch = tiny_batch()
    for model in (shared, apart):
        output = model(batch, pools_of(pool_sizes(model, batch)))
        output.hidden_TD.square().sum().backward()
    for name, parameter in shared.named_parameters():
        if "moe.experts" in name:
            other = name.replace("blocks.0", "blocks.1")
            expected = apart.get_parameter(name).grad + apart.get_parameter(other).grad
            torch.testing.assert_close(parameter.grad, expected)
        elif name != "head.weight":
            torch.testing.assert_close(parameter.grad, apart.get_parameter(name).grad)
