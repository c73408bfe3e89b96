"""Proves the Triton kernels of document-pool routing, in Triton's interpreter, against their
readable twin and against the rules: documents of any length, pools of any
size, ties to the lower index, the same bits in any order."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from helpers import decision_of, random_document_T
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import backwards, poisoned_memory  # noqa: F401

from emotrain.kernels import Decision
from emotrain.model.router import select_pool

assert triton_interpreter.triton.knobs.runtime.interpret
# Rows past the last token are -inf everywhere; their softmax is selected away.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gradient(routing: Decision, logits_TN: Tensor) -> Tensor:
    """Of one number that depends on every output with a gradient, each entry with a weight of
    its own."""
    generator = torch.Generator().manual_seed(1)
    weights_TK = torch.where(routing.experts_TK < logits_TN.shape[1], routing.weights_TK, 0)
    total = sum(
        (tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).sum()
        for tensor in (routing.probabilities_TN, weights_TK, routing.lse_T)
    )
    return torch.autograd.grad(total, logits_TN)[0]


def sorted_document_T(num_tokens: int, num_documents: int, seed: int) -> Tensor:
    """Documents of random lengths, one after the other."""
    return random_document_T(num_tokens, num_documents, seed).sort().values


def assert_agrees(
    logits_TN: Tensor, document_T: Tensor, num_documents: int, num_chosen: int, **options
) -> Decision:
    """Against the twin. Sums of floats differ in the last bits, and random scores do not tie:
    choices must be the same."""
    logits_TN = logits_TN.requires_grad_()
    ours, theirs = (
        decision_of(logits_TN, document_T, num_documents, num_chosen, backend=backend, **options)
        for backend in ("triton", "torch")
    )
    for name in ("probabilities_TN", "weights_TK", "lse_T", "scores_GN"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-6, rtol=1e-5)
    assert torch.equal(ours.experts_TK, theirs.experts_TK) and torch.equal(
        ours.counts_N, theirs.counts_N
    )
    assert (ours.pool_GN is None) == (theirs.pool_GN is None)
    assert ours.pool_GN is None or torch.equal(ours.pool_GN, theirs.pool_GN)
    torch.testing.assert_close(
        gradient(ours, logits_TN), gradient(theirs, logits_TN), atol=2e-6, rtol=1e-5
    )
    return ours


# ---- against the twin


@pytest.mark.parametrize(
    "num_tokens, num_experts, num_documents, num_chosen",
    [
        (70, 127, 5, 7),  # the published numbers
        (33, 5, 33, 3),  # every document one token
        (100, 256, 1, 8),  # the most experts, one document over several blocks
        (64, 12, 7, 12),  # every expert chosen; whole blocks
        (17, 1, 3, 1),  # one expert
        (1, 2, 1, 1),  # one token
    ],
)
def test_agrees_with_the_twin(
    num_tokens: int, num_experts: int, num_documents: int, num_chosen: int
) -> None:
    pool_size_G = torch.randint(1, num_experts + 2, (num_documents,))
    assert_agrees(
        torch.randn(num_tokens, num_experts),
        sorted_document_T(num_tokens, num_documents, seed=1),
        num_documents,
        num_chosen,
        pool_size_G=pool_size_G,
    )


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_options_agree_with_the_twin(pool: bool, kept: bool, padded: bool) -> None:
    document_T = sorted_document_T(50, 4, seed=2)
    kept_GN = torch.rand(4, 20) < 0.6
    kept_GN[:, 7] = True
    assert_agrees(
        torch.randn(50, 21)[:, :20],
        document_T,
        4,
        3,
        pool_size_G=torch.tensor([2, 9, 20, 30]) if pool else None,
        kept_GN=kept_GN if kept else None,
        valid_T=document_T != 3 if padded else None,
        normalize=padded,
        choice_bias_N=torch.randn(20) if pool == kept else None,
    )


@pytest.mark.parametrize("num_experts, num_chosen, size", [(127, 7, 5), (9, 3, 9), (1, 1, 1)])
def test_biases_agree_with_the_twin(num_experts: int, num_chosen: int, size: int) -> None:
    """Of any size and sign; a pool smaller than the choices leaves the same slots empty, and so
    does an expert that underflowed, however large its bias."""
    bias_N = torch.randn(num_experts) * 10.0 ** torch.randint(-4, 4, (num_experts,))
    for scale in (1, 100):
        ours = assert_agrees(
            torch.randn(20, num_experts) * scale,
            sorted_document_T(20, 3, seed=5),
            3,
            num_chosen,
            pool_size_G=torch.full((3,), size),
            choice_bias_N=bias_N,
        )
        assert (ours.experts_TK[:, size:] == num_experts).all()


def test_documents_in_order_agree() -> None:
    """As packing lays them out: documents one after the other, of very different lengths."""
    lengths = torch.tensor([1, 95, 1, 1, 32, 40])
    assert_agrees(
        torch.randn(170, 30),
        torch.arange(6).repeat_interleave(lengths),
        6,
        4,
        pool_size_G=torch.tensor([5, 4, 3, 2, 30, 31]),
    )


def test_a_document_without_tokens_scores_nothing() -> None:
    ours = assert_agrees(
        torch.randn(20, 6), torch.tensor([0, 2] * 10), 4, 2, pool_size_G=torch.tensor([3, 3, 3, 3])
    )
    assert (ours.scores_GN[[1, 3]] == 0).all()


def test_logits_far_apart() -> None:
    """Probabilities of exactly 0 and 1; an expert that underflowed is an empty slot."""
    ours = assert_agrees(
        torch.randn(20, 9) * 1e4, torch.arange(20) // 7, 3, 4, pool_size_G=torch.tensor([2, 5, 9])
    )
    assert (ours.experts_TK == 9).any() and ours.probabilities_TN.isfinite().all()


BATCHES = {
    "num_tokens": st.integers(1, 80),
    "num_experts": st.integers(1, 40),
    "num_documents": st.integers(1, 12),
    "num_chosen": st.integers(1, 6),
    "seed": st.integers(0, 10_000),
}


def check_any_batch(
    num_tokens: int, num_experts: int, num_documents: int, num_chosen: int, seed: int
) -> None:
    """Logits of few values, so that scores and probabilities tie: the rules, rather than the
    twin, say what must come out."""
    torch.manual_seed(seed)
    num_chosen = min(num_chosen, num_experts)
    logits_TN = torch.randint(-2, 3, (num_tokens, num_experts)).float()
    document_T = torch.randint(num_documents, (num_tokens,)).sort().values
    pool_size_G = torch.randint(1, num_experts + 3, (num_documents,))
    routing = decision_of(
        logits_TN, document_T, num_documents, num_chosen, pool_size_G, backend="triton"
    )
    expected_GN = torch.zeros(num_documents, num_experts).index_add(
        0, document_T, torch.softmax(logits_TN, dim=1)
    )
    torch.testing.assert_close(routing.scores_GN, expected_GN, atol=1e-5, rtol=1e-5)
    assert torch.equal(routing.pool_GN, select_pool(routing.scores_GN, pool_size_G))
    inside_TN = routing.pool_GN[document_T]
    masked_TN = torch.where(inside_TN, logits_TN, -torch.inf)
    torch.testing.assert_close(routing.probabilities_TN, torch.softmax(masked_TN, dim=1))
    torch.testing.assert_close(routing.lse_T, torch.logsumexp(masked_TN, dim=1))
    # Best first, ties to the lower index, and nothing outside the pool.
    order_TK = torch.sort(masked_TN, dim=1, descending=True, stable=True).indices[:, :num_chosen]
    assert torch.equal(
        routing.experts_TK, torch.where(inside_TN.gather(1, order_TK), order_TK, num_experts)
    )
    used_TK = routing.experts_TK < num_experts
    torch.testing.assert_close(
        routing.weights_TK, torch.where(used_TK, routing.probabilities_TN.gather(1, order_TK), 0)
    )
    assert torch.equal(
        routing.counts_N,
        torch.bincount(routing.experts_TK.flatten(), minlength=num_experts + 1)[:num_experts],
    )


@given(**BATCHES)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_batch_follows_the_rules(**batch) -> None:
    check_any_batch(**batch)


@pytest.mark.long
@given(**{**BATCHES, "num_tokens": st.integers(1, 400), "num_experts": st.integers(1, 256)})
@settings(max_examples=300, deadline=None)
def test_many_batches_follow_the_rules(**batch) -> None:
    check_any_batch(**batch)


# ---- nothing unwritten, one order of every sum


def test_nothing_is_left_unwritten_and_the_same_bits_in_any_order(
    request: pytest.FixtureRequest,
) -> None:
    logits_TN, document_T = torch.randn(75, 11).requires_grad_(), sorted_document_T(75, 6, seed=3)

    def everything() -> list[Tensor]:
        routing = decision_of(
            logits_TN, document_T, 6, 3, torch.tensor([1, 2, 5, 8, 11, 12]), backend="triton"
        )
        return [gradient(routing, logits_TN), *vars(routing).values()]

    once = everything()
    for fixture in ("poisoned_memory", "backwards"):
        request.getfixturevalue(fixture)
    for first, second in zip(once, everything(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_gradients_of_each_output_alone() -> None:
    logits_TN, document_T = torch.randn(20, 9).requires_grad_(), torch.arange(20) // 7
    both = [
        decision_of(logits_TN, document_T, 3, 2, torch.tensor([3, 4, 9]), backend=backend)
        for backend in ("triton", "torch")
    ]
    for name in ("probabilities_TN", "weights_TK", "lse_T"):
        ours, theirs = (
            torch.autograd.grad(
                getattr(routing, name).square().sum(), logits_TN, retain_graph=True
            )[0]
            for routing in both
        )
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_gradcheck_of_the_twin() -> None:
    logits_TN, document_T = (
        torch.randn(7, 6, dtype=torch.float64).requires_grad_(),
        torch.tensor([0, 1, 0, 2, 2, 2, 1]),
    )

    def outputs(logits_TN: Tensor) -> tuple[Tensor, ...]:
        routing = decision_of(logits_TN, document_T, 3, 3, torch.tensor([2, 4, 6]), backend="torch")
        return routing.probabilities_TN, routing.weights_TK, routing.lse_T

    assert torch.autograd.gradcheck(outputs, (logits_TN,))


# ---- what is refused, in one line


def test_unsupported_cases_are_refused() -> None:
    document_T = torch.zeros(4, dtype=torch.int64)
    for logits_TN, options, words in (
        (torch.zeros(4, 300), {}, "supports 1 to 256 routed experts, not 300"),
        (
            torch.zeros(4, 8).bfloat16(),
            {},
            "routing kernels support float32 logits of unit stride along the experts, not bfloat16",
        ),
        (torch.zeros(8, 4).t(), {}, "unit stride along the experts, not float32 of stride 4"),
        (
            torch.zeros(4, 8),
            {"gating": "sigmoid"},
            "does not route with pool.kind=none, gating=sigmoid .*; use auto or torch",
        ),
        (torch.zeros(4, 2), {}, "3 experts a token of 2; choose 1 to 2"),
    ):
        with pytest.raises(ValueError, match=words):
            decision_of(logits_TN, document_T, 1, 3, backend="triton", **options)
