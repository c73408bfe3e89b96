"""Proves the losses: the blockwise head against torch's cross entropy, balance and router losses
against spec 2.6 and 2.7, and that the sums of micro-batches add up to the loss of the step."""

from __future__ import annotations

import pytest
import torch
from helpers import pools_of, tiny_batch, tiny_config, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from emotrain.batch import IGNORE
from emotrain.distributed.ranks import Ranks
from emotrain.kernels import HeadGradient, linear_cross_entropy
from emotrain.kernels.linear_cross_entropy import add_product
from emotrain.model.losses import language_model_sums, load_balance_loss, router_loss
from emotrain.model.router import draw_pool_sizes
from emotrain.model.transformer import Transformer
from emotrain.planning.meter import Meter
from emotrain.training.engine import NativeEngine
from emotrain.training.optimizer import build_optimizer
from emotrain.training.step import train_step

WIDTH, VOCAB = 7, 33


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def head_arguments(
    num_tokens: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets, every third of them ignored."""
    targets_T = torch.randint(VOCAB, (num_tokens,))
    targets_T[::3] = IGNORE
    return (
        torch.randn(num_tokens, WIDTH, dtype=dtype, requires_grad=True),
        torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=True),
        targets_T,
    )


def cross_entropy_oracle(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits_TV = (hidden_TD @ head_VD.T).to(torch.promote_types(hidden_TD.dtype, torch.float32))
    cross_entropy = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")
    z = logits_TV[targets_T != IGNORE].logsumexp(dim=1).square().sum()
    return cross_entropy + z_weight * z, cross_entropy, z


# ---- linear_cross_entropy


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("num_tokens, block_tokens", [(1, 4), (8, 4), (9, 4), (10, 1), (10, 1000)])
def test_value_and_gradients(
    dtype: torch.dtype,
    tolerance: float,
    z_weight: float,
    num_tokens: int,
    block_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In blocks that divide the tokens, that leave a rest, and of all tokens at once."""
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    monkeypatch.setitem(
        linear_cross_entropy.__globals__, "BLOCK_BYTES", block_tokens * VOCAB * itemsize
    )
    *leaves, targets_T = head_arguments(num_tokens, dtype)
    ours, theirs = (
        loss(*leaves, targets_T, z_weight) for loss in (linear_cross_entropy, cross_entropy_oracle)
    )
    assert not ours[1].requires_grad and not ours[2].requires_grad
    scale = 0.25  # a gradient from above other than 1
    pairs = [
        *zip(ours, theirs, strict=True),
        *zip(
            torch.autograd.grad(scale * ours[0], leaves),
            torch.autograd.grad(scale * theirs[0], leaves),
            strict=True,
        ),
    ]
    for our_value, their_value in pairs:
        assert our_value.dtype == their_value.dtype
        torch.testing.assert_close(
            our_value,
            their_value,
            rtol=tolerance,
            atol=tolerance * max(1.0, their_value.abs().max().item()),
        )


def test_gradcheck() -> None:
    *leaves, targets_T = head_arguments(5)
    assert torch.autograd.gradcheck(
        lambda hidden, head: linear_cross_entropy(hidden, head, targets_T, 0.1)[0], leaves
    )


def test_ignored_positions_count_nothing_and_get_no_gradient() -> None:
    hidden_TD, head_VD, targets_T = head_arguments(6)
    loss, _, _ = linear_cross_entropy(hidden_TD, head_VD, targets_T, 0.1)
    (grad_TD,) = torch.autograd.grad(loss, [hidden_TD])
    assert (grad_TD[targets_T == IGNORE] == 0).all() and (grad_TD[targets_T != IGNORE] != 0).any(
        dim=1
    ).all()
    all_ignored = linear_cross_entropy(hidden_TD, head_VD, torch.full_like(targets_T, IGNORE), 0.1)
    assert [value.item() for value in all_ignored] == [0, 0, 0]
    assert not torch.autograd.grad(all_ignored[0], [head_VD])[0].any()


def test_large_logits_stay_finite_and_no_gradient_is_formed_without_need() -> None:
    hidden_TD, head_VD, targets_T = head_arguments(6, torch.float32)
    with torch.no_grad():
        loss, cross_entropy, z = linear_cross_entropy(1e4 * hidden_TD, head_VD, targets_T, 0.0)
    assert loss.isfinite() and z.isfinite() and not loss.requires_grad
    expected = F.cross_entropy(
        1e4 * hidden_TD @ head_VD.T, targets_T, ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(cross_entropy, expected.detach())


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    *leaves, targets_T = head_arguments(6)
    expected = torch.autograd.grad(cross_entropy_oracle(*leaves, targets_T, 0.1)[0], leaves)
    leaves[frozen].requires_grad_(False)
    linear_cross_entropy(*leaves, targets_T, 0.1)[0].backward()
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, expected[1 - frozen])


# ---- the head's gradient over micro-batches


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("schedule", ["joint", "running"])
def test_micro_batches_that_share_a_head_gradient_add_up(schedule: str, is_last: bool) -> None:
    """All forward passes before the first backward, or by turns; the last micro-batch has no
    targets. The first backward after a forward brings the head's gradient, or the last one of the
    step, and the others none."""
    hidden_TD, head_VD, targets_T = head_arguments(12)
    targets_T[8:] = IGNORE
    parts = [slice(0, 5), slice(5, 8), slice(8, 12)]
    expected = torch.autograd.grad(
        cross_entropy_oracle(hidden_TD, head_VD, targets_T, 0.1)[0] / 7, [hidden_TD, head_VD]
    )
    shared, losses, brought = HeadGradient(), [], []
    head_VD.register_hook(lambda grad_VD: brought.append(_is_something(grad_VD)))
    for part in parts:
        loss = linear_cross_entropy(
            hidden_TD[part], head_VD, targets_T[part], 0.1, head_gradient=shared
        )[0]
        losses.append(loss / 7)
        if schedule == "running":
            shared.is_due = part == parts[-1] or not is_last
            losses.pop().backward()
    for loss in losses:
        shared.is_due = loss is losses[-1] or not is_last
        loss.backward()
    torch.testing.assert_close([hidden_TD.grad, head_VD.grad], list(expected))
    first = [True, schedule == "running", False]
    assert brought == ([False, False, True] if is_last else first)
    assert shared.take() is None


def _is_something(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def test_a_shared_head_gradient_is_there_once() -> None:
    """However many forward passes wait for their backward."""
    hidden_TD, head_VD, targets_T = head_arguments(4)
    live = []
    for micro_batches in (1, 5):
        with Meter() as meter:
            shared = HeadGradient()
            kept = [
                linear_cross_entropy(hidden_TD, head_VD, targets_T, 0.1, head_gradient=shared)
                for _ in range(micro_batches)
            ]
            live.append(meter.live_bytes)
        del kept
    of_hidden = hidden_TD.nbytes + 3 * 8  # and three scalars
    assert live[1] - live[0] == 4 * of_hidden


def test_the_gemm_of_a_gpu_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data, for want of a GPU; tests/gpu multiplies."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    a, b = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((6, 4), (4, 5)))
    total = torch.empty(6, 5, device="meta")
    for beta in (0, 1):
        add_product(total, a, b, beta)
    with pytest.raises(RuntimeError):
        add_product(total, b, a, 1)


def test_language_model_sums_count_targets() -> None:
    batch, model = tiny_batch(padded=True), tiny_model()
    output = model(batch)
    sums = language_model_sums(output, model.head, batch, z_weight=0.01)
    expected = cross_entropy_oracle(
        output.hidden_TD, model.head.weight, batch.targets_BS.flatten(), 0.01
    )
    torch.testing.assert_close(
        torch.stack([sums.lm, sums.cross_entropy, sums.z]), torch.stack(expected)
    )
    assert sums.num_targets.item() == (batch.targets_BS != IGNORE).sum().item() == 15 + 8


def test_under_autocast_the_head_runs_in_bfloat16_and_gradients_are_fp32() -> None:
    batch, model = tiny_batch(), tiny_model()
    head: nn.Linear = model.head
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = language_model_sums(model(batch), head, batch, z_weight=0.0)
    sums.lm.backward()
    exact = language_model_sums(model(batch), head, batch, z_weight=0.0)
    assert sums.lm.dtype == head.weight.grad.dtype == torch.float32
    assert sums.lm.item() != exact.lm.item()
    assert sums.lm.item() == pytest.approx(exact.lm.item(), rel=2e-2)


# ---- balance and z


def test_balance_is_one_when_balanced_and_n_when_all_go_to_one() -> None:
    even, one = torch.full((8,), 30), torch.zeros(8, dtype=torch.int64)
    one[3] = 240
    assert load_balance_loss(even[None], torch.full((1, 8), 10.0), 80).item() == pytest.approx(1)
    assert load_balance_loss(one[None], one[None] / 3.0, 80).item() == pytest.approx(8)
    assert (
        load_balance_loss(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8), 80).item() == 0
    )


def test_balance_and_its_gradient_follow_the_formula() -> None:
    """Spec 2.6: N/k * sum_i C_i P_i / T with P_i a mean over the T tokens; its gradient is
    constant in each P_i."""
    num_tokens, chosen = 40, 3
    counts_N = torch.bincount(torch.randint(8, (num_tokens * chosen,)), minlength=8)
    probability_TN = torch.randn(num_tokens, 8, dtype=torch.float64).softmax(dim=1).requires_grad_()
    loss = load_balance_loss(counts_N[None], probability_TN.sum(dim=0)[None], num_tokens)
    mean_N = probability_TN.mean(dim=0)
    assert loss.item() == pytest.approx(
        8
        / chosen
        * sum(c * p for c, p in zip(counts_N.tolist(), mean_N.tolist(), strict=True))
        / num_tokens
    )
    loss.backward()
    expected_N = 8 / chosen * counts_N / num_tokens / num_tokens
    torch.testing.assert_close(probability_TN.grad, expected_N.double().expand(num_tokens, 8))


def test_router_loss_is_the_mean_over_layers_and_parts_of_a_step_add_up() -> None:
    """Two micro-batches with the step's counts and token number sum to the loss of one batch
    that holds both."""
    model, whole = tiny_model(), tiny_batch(((5, 7, 4), (9, 7)))
    model.double()
    sizes_LG = draw_pool_sizes(model.config.pool, whole.document_ids_G, 2, seed=0, step=1)
    report = model(whole, pools_of(sizes_LG)).routing
    counts = [layer.counts_N for layer in report.layers]
    balance, z = router_loss(report, counts, report.num_tokens)
    by_layer = [
        load_balance_loss(c[None], layer.probability_sum_N[None], 32)
        for c, layer in zip(counts, report.layers, strict=True)
    ]
    assert balance.item() == pytest.approx(sum(by_layer).item() / 2)
    assert z.item() == pytest.approx(sum(layer.z_sum.item() for layer in report.layers) / 2 / 32)

    totals = torch.zeros(2, dtype=torch.float64)
    for row, documents in ((0, slice(0, 3)), (1, slice(3, 5))):
        part = type(whole)(
            whole.tokens_BS[row : row + 1],
            whole.targets_BS[row : row + 1],
            whole.document_BS[row : row + 1] - documents.start,
            whole.document_ids_G[documents],
        )
        part_report = model(part, pools_of(sizes_LG[:, documents])).routing
        totals += torch.stack(router_loss(part_report, counts, report.num_tokens)).detach()
    torch.testing.assert_close(totals, torch.stack([balance, z]).detach())


@pytest.mark.parametrize("trained", ["", "router"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("expert", [0, 7])
def test_a_router_with_a_nan_is_never_trained_on(trained: str, layer: int, expert: int) -> None:
    """Also where a pool leaves out the expert that has it, so that all choices look sound, and
    where no gradient of an input passes it: the first layer, with the trunk frozen."""
    config = tiny_config(
        model__router__pool__kind="fixed", model__router__pool__size=4, losses__router_z=0.0
    )
    model = Transformer(config.model).initialize(0)
    optimizer = build_optimizer(model, config.optimizer)
    with torch.no_grad():
        model.blocks[layer].moe.router.weight_ED[expert, 3] = torch.nan
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    done = train_step(NativeEngine(model, optimizer), [tiny_batch()], config, 1, Ranks())
    assert not done.applied and done.loss != done.loss
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_a_dense_model_has_no_router_loss() -> None:
    dense = tiny_model(model__experts__routed=0, model__experts__top_k=0)
    report = dense(tiny_batch()).routing
    assert report.layers == () and report.num_tokens == 32
    assert [value.item() for value in router_loss(report, [], report.num_tokens)] == [0, 0]


# ---- banks shared by layers


def test_a_shared_bank_is_balanced_over_its_layers() -> None:
    """N * sum_i f_i P_i with f and P averaged over the layers of the bank, by loops."""
    model = tiny_model(model__num_layers=4, model__experts__sharing="groups").double()
    batch = tiny_batch()
    report = model(batch).routing
    assert [layer.bank for layer in report.layers] == [0, 0, 1, 1]
    counts = [layer.counts_N * (index + 1) for index, layer in enumerate(report.layers)]
    expected = 0.0
    for bank in ((0, 1), (2, 3)):
        for expert in range(8):
            share = sum((counts[i][expert] / counts[i].sum()).item() for i in bank) / 2
            mean = sum(report.layers[i].probability_sum_N[expert].item() for i in bank) / 2 / 32
            expected += 8 * share * mean / 2
    assert router_loss(report, counts, 32)[0].item() == pytest.approx(expected)


def test_layers_that_specialise_on_parts_of_a_shared_bank_are_balanced() -> None:
    """The reason of the joint loss: a layer may leave experts to the others."""
    half = torch.tensor([[4, 4, 0, 0], [0, 0, 4, 4]])
    assert load_balance_loss(half, half / 8 * 16, 16).item() == pytest.approx(1)
    assert load_balance_loss(half[:1], half[:1] / 8 * 16, 16).item() == pytest.approx(2)
