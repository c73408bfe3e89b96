"""Triton kernels of document-pool routing: the same function as `decide_in_torch` of
model/router.py, its readable twin.

    score_kernel   softmax of TOKENS tokens, summed a document -> partial sums
    pool_kernel    a document's partial sums -> its scores -> their ranks -> its pool
    route_kernel   pool mask, softmax, top-k, weights, log-normaliser, histogram
    route_backward_kernel   gradients of probabilities, weights and log-normaliser -> gradient of
                            the logits

Logits are read twice, and between the kernels only [G, N] numbers move. Sums of floats have one
writer and a fixed order; only the histogram uses atomics, of integers, whose sum has no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emotrain.errors import UserError
from emotrain.kernels.cost import Cost
from emotrain.kernels.decision import Decision, decided
from emotrain.kernels.triton_launch import launch

SCORE_TOKENS, ROUTE_TOKENS = 32, 8
"""Tokens of one program of `score_kernel`, and of the kernels that route, which hold several rows
of experts a token: with 16, some variants spill registers."""


@torch.compiler.disable
def decide_in_triton(
    logits_TN: Tensor,
    document_T: Tensor,
    num_documents: int,
    num_chosen: int,
    pool_size_G: Tensor | None = None,
    kept_GN: Tensor | None = None,
    valid_T: Tensor | None = None,
    normalize: bool = False,
    num_forced: int = 0,
    choice_bias_N: Tensor | None = None,
) -> Decision:
    """`model.router.decide` for the rules of `TRITON_POOLS` and `TRITON_GATINGS`, on float32 logits
    with unit stride along the experts.

    Args:
        document_T: int64 document of each token in [0, G), never falling, as in a `PackedBatch`.
        pool_size_G: int64 pool size of each document; None draws no pool.
        kept_GN: bool, experts that each document may use at all, at least one each.
        valid_T: bool, False for padding, which is given no expert.
        num_forced: how many of the last experts are in every drawn pool, beyond its size.
        choice_bias_N: float32, added to probabilities where experts are chosen, and nowhere else.
    """
    if logits_TN.dtype != torch.float32 or logits_TN.stride(1) != 1:
        raise UserError(
            f"routing kernels support float32 logits of unit stride along the experts, not "
            f"{str(logits_TN.dtype).removeprefix('torch.')} of stride {logits_TN.stride(1)}"
        )
    if not 1 <= num_chosen <= logits_TN.shape[1]:
        raise UserError(
            f"{num_chosen} experts a token of {logits_TN.shape[1]}; choose 1 to "
            f"{logits_TN.shape[1]}"
        )
    with torch.no_grad():
        scores_GN, pool_GN = _pools(
            logits_TN, document_T, num_documents, pool_size_G, kept_GN, valid_T, num_forced
        )
    probabilities_TN, weights_TK, lse_T, experts_TK, counts_N = _Route.apply(
        logits_TN, document_T, pool_GN, valid_T, choice_bias_N, num_chosen
    )
    if normalize:
        total_T1 = weights_TK.sum(dim=1, keepdim=True)
        weights_TK = weights_TK / torch.where(total_T1 > 0, total_T1, 1)
    return Decision(probabilities_TN, weights_TK, experts_TK, lse_T, counts_N, scores_GN, pool_GN)


def _pools(
    logits_TN: Tensor,
    document_T: Tensor,
    num_documents: int,
    pool_size_G: Tensor | None,
    kept_GN: Tensor | None,
    valid_T: Tensor | None,
    num_forced: int,
) -> tuple[Tensor, Tensor | None]:
    """Scores of every document, and its pool as bool [G, N] (None: all experts)."""
    num_tokens, num_routed = logits_TN.shape
    document_T = document_T.contiguous()
    edges = torch.arange(num_documents + 1, device=document_T.device)
    starts_G1 = torch.searchsorted(document_T, edges, out_int32=True)
    # Block b of tokens and document g meet in row b + g of the partial sums:
    # along the blocks either grows, so that no two pairs share a row, and the rows of a document
    # follow each other.
    num_blocks = triton.cdiv(num_tokens, SCORE_TOKENS)
    partial_PN = logits_TN.new_empty(num_blocks + num_documents, num_routed)
    kept_u8 = None if kept_GN is None else kept_GN.to(torch.uint8).contiguous()
    counted_u8 = valid_T.to(torch.uint8) if valid_T is not None and pool_size_G is None else None
    block_n = triton.next_power_of_2(num_routed)
    launch(
        score_kernel,
        (num_blocks,),
        None,
        Cost(reads=(logits_TN, document_T, kept_u8, counted_u8), writes=(partial_PN,)),
        logits_TN,
        document_T,
        _or(kept_u8, partial_PN),
        _or(counted_u8, partial_PN),
        partial_PN,
        num_tokens,
        num_routed,
        logits_TN.stride(0),
        HAS_KEPT=kept_u8 is not None,
        HAS_COUNTED=counted_u8 is not None,
        TOKENS=SCORE_TOKENS,
        BLOCK_N=block_n,
        num_warps=4,
    )
    scores_GN = logits_TN.new_empty(num_documents, num_routed)
    pool_u8 = torch.empty_like(scores_GN, dtype=torch.uint8) if pool_size_G is not None else None
    launch(
        pool_kernel,
        (num_documents,),
        None,
        Cost(
            reads=(partial_PN, starts_G1, pool_size_G, kept_u8 if pool_u8 is not None else None),
            writes=(scores_GN, pool_u8),
        ),
        partial_PN,
        starts_G1,
        _or(pool_size_G, starts_G1),
        _or(kept_u8, partial_PN),
        scores_GN,
        _or(pool_u8, scores_GN),
        num_routed,
        num_routed - num_forced,
        HAS_SIZE=pool_size_G is not None,
        HAS_KEPT=kept_u8 is not None,
        TOKENS=SCORE_TOKENS,
        PARTIALS=32,
        BLOCK_N=block_n,
        num_warps=8,
    )
    if pool_u8 is not None and num_forced:
        # The kernel does without them: it would need twice the registers, in every model.
        pool_u8[:, -num_forced:] = 1 if kept_u8 is None else kept_u8[:, -num_forced:]
    return scores_GN, kept_GN if pool_u8 is None else decided(pool_u8).view(torch.bool)


def _route_options(num_routed: int) -> dict[str, int]:
    return {"TOKENS": ROUTE_TOKENS, "BLOCK_N": triton.next_power_of_2(num_routed), "num_warps": 4}


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A kernel's argument: a pointer that it does not read stands for None."""
    return placeholder if tensor is None else tensor


def _route(
    logits_TN: Tensor,
    document_T: Tensor,
    pool_GN: Tensor | None,
    valid_T: Tensor | None,
    choice_bias_N: Tensor | None,
    num_chosen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_routed = logits_TN.shape
    probabilities_TN = logits_TN.new_empty(num_tokens, num_routed)
    weights_TK, lse_T = logits_TN.new_empty(num_tokens, num_chosen), logits_TN.new_empty(num_tokens)
    experts_TK = document_T.new_empty(num_tokens, num_chosen)
    counts_N = document_T.new_zeros(num_routed)
    outputs = (probabilities_TN, weights_TK, experts_TK, lse_T, counts_N)
    pool_u8 = None if pool_GN is None else pool_GN.contiguous().view(torch.uint8)
    valid_u8 = None if valid_T is None else valid_T.contiguous().view(torch.uint8)
    of_document = () if pool_u8 is None else (document_T, pool_u8)
    launch(
        route_kernel,
        (triton.cdiv(num_tokens, ROUTE_TOKENS),),
        None,
        Cost(
            # Slots are added to the histogram, which is read for it.
            reads=(logits_TN, *of_document, valid_u8, choice_bias_N, counts_N),
            writes=outputs,
        ),
        logits_TN,
        document_T.contiguous(),
        *(_or(tensor, lse_T) for tensor in (pool_u8, valid_u8, choice_bias_N)),
        *outputs,
        num_tokens,
        num_routed,
        logits_TN.stride(0),
        K=num_chosen,
        HAS_POOL=pool_u8 is not None,
        HAS_VALID=valid_u8 is not None,
        HAS_BIAS=choice_bias_N is not None,
        **_route_options(num_routed),
    )
    return probabilities_TN, weights_TK, lse_T, experts_TK, counts_N


# An operation of its own, so that activation recomputation can keep its results and never routes a
# token twice.
_LIBRARY = torch.library.Library("emotrain", "FRAGMENT")
_LIBRARY.impl("route", _route, "CompositeExplicitAutograd")


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TN, document_T, pool_GN, valid_T, choice_bias_N, num_chosen):
        probabilities_TN, weights_TK, lse_T, experts_TK, counts_N = torch.ops.emotrain.route(
            logits_TN, document_T, pool_GN, valid_T, choice_bias_N, num_chosen
        )
        ctx.save_for_backward(probabilities_TN, experts_TK)
        ctx.mark_non_differentiable(experts_TK, counts_N)
        ctx.set_materialize_grads(False)
        return probabilities_TN, weights_TK, lse_T, experts_TK, counts_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads_of_outputs):
        probabilities_TN, experts_TK = ctx.saved_tensors
        num_tokens, num_routed = probabilities_TN.shape
        # Of probabilities, weights and log-normaliser; the others have none.
        grads = [None if grad is None else grad.contiguous() for grad in grads_of_outputs[:3]]
        grad_logits_TN = torch.empty_like(probabilities_TN)
        launch(
            route_backward_kernel,
            (triton.cdiv(num_tokens, ROUTE_TOKENS),),
            None,
            Cost(
                reads=(probabilities_TN, *grads, None if grads[1] is None else experts_TK),
                writes=(grad_logits_TN,),
            ),
            probabilities_TN,
            experts_TK,
            *(_or(grad, probabilities_TN) for grad in grads),
            grad_logits_TN,
            num_tokens,
            num_routed,
            K=experts_TK.shape[1],
            HAS_PROBABILITIES=grads[0] is not None,
            HAS_WEIGHTS=grads[1] is not None,
            HAS_LSE=grads[2] is not None,
            **_route_options(num_routed),
        )
        return grad_logits_TN, None, None, None, None, None


@triton.jit
def _softmax_row(logits):
    """(softmax, log-normaliser) of each row; logits of -inf get 0."""
    top = tl.max(logits, axis=1)
    exp = tl.exp(logits - top[:, None])
    total = tl.sum(exp, axis=1)
    return exp / total[:, None], top + tl.log(total)


@triton.jit(do_not_specialize=["num_tokens"])
def score_kernel(
    logits_TN,
    document_T,
    kept_GN,
    counted_T,
    partial_PN,
    num_tokens,
    N,
    stride,
    HAS_KEPT: tl.constexpr,
    HAS_COUNTED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over TOKENS tokens, one a document that has tokens among them."""
    block = tl.program_id(0)
    i = block * TOKENS + tl.arange(0, TOKENS)
    exists = i < num_tokens
    n = tl.arange(0, BLOCK_N)
    first = tl.load(document_T + block * TOKENS)
    last = tl.load(document_T + tl.minimum(block * TOKENS + TOKENS, num_tokens) - 1)
    document = tl.load(document_T + i, mask=exists, other=-1)
    inside = exists[:, None] & (n[None, :] < N)
    if HAS_KEPT:
        inside &= tl.load(kept_GN + document[:, None] * N + n[None, :], mask=inside, other=0) != 0
    logits = tl.load(
        logits_TN + i.to(tl.int64)[:, None] * stride + n[None, :], mask=inside, other=float("-inf")
    )
    # Rows past the last token are all -inf, and NaN after the softmax: selected away below, never
    # multiplied by 0.
    probabilities, _ = _softmax_row(logits)
    counted = exists
    if HAS_COUNTED:
        counted &= tl.load(counted_T + i, mask=exists, other=0) != 0
    for g in range(first, last + 1):
        total = tl.sum(tl.where((counted & (document == g))[:, None], probabilities, 0.0), axis=0)
        tl.store(partial_PN + (block + g) * N + n, total, mask=n < N)


# Sizes are a row of those of all layers, which begins where it may.
@triton.jit(do_not_specialize=["num_drawn"], do_not_specialize_on_alignment=["pool_size_G"])
def pool_kernel(
    partial_PN,
    starts_G1,
    pool_size_G,
    kept_GN,
    scores_GN,
    pool_GN,
    N,
    num_drawn,
    HAS_SIZE: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scores and pool of one document. A document without tokens scores 0 everywhere."""
    g = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts_G1 + g), tl.load(starts_G1 + g + 1)
    n = tl.arange(0, BLOCK_N)
    score = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first, stop = start // TOKENS, tl.where(end > start, (end - 1) // TOKENS + 1, start // TOKENS)
    for block in range(first, stop, PARTIALS):
        b = block + tl.arange(0, PARTIALS)
        partial = tl.load(
            partial_PN + (b[:, None] + g) * N + n[None, :],
            mask=(b[:, None] < stop) & (n[None, :] < N),
            other=0.0,
        )
        score += tl.sum(partial, axis=0)
    tl.store(scores_GN + g * N + n, score, mask=n < N)
    if HAS_SIZE:
        # Rank: how many experts are better, or as good and of a lower index. NaN ranks first, as in
        # torch.sort. Experts from num_drawn on are behind all others, and not drawn.
        score = tl.where(score == score, score, float("inf"))
        score = tl.where(n < num_drawn, score, -1.0)
        better = (score[None, :] > score[:, None]) | (
            (score[None, :] == score[:, None]) & (n[None, :] < n[:, None])
        )
        chosen = tl.sum(better.to(tl.int32), axis=1) < tl.load(pool_size_G + g)
        if HAS_KEPT:
            chosen &= tl.load(kept_GN + g * N + n, mask=n < N, other=0) != 0
        tl.store(pool_GN + g * N + n, chosen.to(tl.uint8), mask=n < N)


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits_TN,
    document_T,
    pool_GN,
    valid_T,
    bias_N,
    probabilities_TN,
    weights_TK,
    experts_TK,
    lse_T,
    counts_N,
    num_tokens,
    N,
    stride,
    K: tl.constexpr,
    HAS_POOL: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Softmax inside the pool and its K best experts, for TOKENS tokens."""
    # One 64-bit start and 32-bit steps from it: half the registers of 64-bit indices.
    start = tl.program_id(0).to(tl.int64) * TOKENS
    i = tl.arange(0, TOKENS)
    exists = i < num_tokens - start
    n = tl.arange(0, BLOCK_N)
    inside = exists[:, None] & (n[None, :] < N)
    if HAS_POOL:
        document = tl.load(document_T + start + i, mask=exists, other=0).to(tl.int32)
        inside &= tl.load(pool_GN + (document[:, None] * N + n[None, :]), mask=inside, other=0) != 0
    logits = tl.load(
        logits_TN + start * stride + (i[:, None] * stride + n[None, :]),
        mask=inside,
        other=float("-inf"),
    )
    probabilities, lse = _softmax_row(logits)
    tl.store(
        probabilities_TN + start * N + (i[:, None] * N + n[None, :]),
        probabilities,
        mask=exists[:, None] & (n[None, :] < N),
    )
    tl.store(lse_T + start + i, lse, mask=exists)
    may_use = exists
    if HAS_VALID:
        may_use &= tl.load(valid_T + start + i, mask=exists, other=0) != 0
    nothing = float("-inf") if HAS_BIAS else -1.0
    left = tl.where(inside, probabilities, nothing)
    if HAS_BIAS:
        bias = tl.load(bias_N + n, mask=n < N, other=0.0)[None, :]
        left = tl.where(left > 0, probabilities + bias, nothing)
    counts = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for k in range(K):
        weight, expert = tl.max(left, axis=1, return_indices=True)
        mine = n[None, :] == expert[:, None]
        # A weight of 0 is an expert outside the pool or one that underflowed: an empty slot.
        used = may_use & (weight > (nothing if HAS_BIAS else 0))
        if HAS_BIAS:
            weight = tl.sum(tl.where(mine, probabilities, 0.0), axis=1)
        tl.store(weights_TK + start * K + (i * K + k), tl.where(used, weight, 0.0), mask=exists)
        tl.store(experts_TK + start * K + (i * K + k), tl.where(used, expert, N), mask=exists)
        counts += tl.sum((mine & used[:, None]).to(tl.int32), axis=0)
        left = tl.where(mine, nothing, left)
    tl.atomic_add(counts_N + n, counts.to(tl.int64), mask=(n < N) & (counts > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def route_backward_kernel(
    probabilities_TN,
    experts_TK,
    grad_probabilities_TN,
    grad_weights_TK,
    grad_lse_T,
    grad_logits_TN,
    num_tokens,
    N,
    K: tl.constexpr,
    HAS_PROBABILITIES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dlogits = p * (dp - <p, dp>) + dlse * p, where dp adds a weight's gradient to that of its
    probability."""
    start = tl.program_id(0).to(tl.int64) * TOKENS
    i = tl.arange(0, TOKENS)
    exists = i < num_tokens - start
    n = tl.arange(0, BLOCK_N)
    inside = exists[:, None] & (n[None, :] < N)
    at = i[:, None] * N + n[None, :]
    probabilities = tl.load(probabilities_TN + start * N + at, mask=inside, other=0.0)
    grad = tl.zeros((TOKENS, BLOCK_N), dtype=tl.float32)
    if HAS_PROBABILITIES:
        grad += tl.load(grad_probabilities_TN + start * N + at, mask=inside, other=0.0)
    if HAS_WEIGHTS:
        for k in range(K):
            expert = tl.load(experts_TK + start * K + (i * K + k), mask=exists, other=N)
            grad_weight = tl.load(
                grad_weights_TK + start * K + (i * K + k), mask=exists & (expert < N), other=0.0
            )
            grad += tl.where(n[None, :] == expert[:, None], grad_weight[:, None], 0.0)
    grad = probabilities * (grad - tl.sum(probabilities * grad, axis=1)[:, None])
    if HAS_LSE:
        grad += probabilities * tl.load(grad_lse_T + start + i, mask=exists, other=0.0)[:, None]
    tl.store(grad_logits_TN + start * N + at, grad, mask=inside)
