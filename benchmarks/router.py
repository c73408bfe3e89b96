"""What the document pool costs: forward + backward of the router with the pool, against the same
router without it.

    python benchmarks/router.py [--json] [--threads 2]

Both arms are one module, `DocumentPoolRouter`, with everything a training step asks of it: logits,
choices, counts, balance and z sums, entropy, document scores; one gets pool sizes, the other none.
Three numbers come out:

    pool_over_plain          at the published shape (T=16,384, D=2048, N=127, k=7, 40 documents in 4
                             sequences)
    pool_over_plain_small_d  the same with D=64: without the GEMM that both arms share and that
                             hides what the pool adds
    loop_over_pool           the same choice of pools by a Python loop over documents with a softmax
                             each, as the reference code does it, over ours, at D=64 (on a CPU; what
                             the loop costs a GPU is its copies to the host)
"""

from __future__ import annotations

import torch
from _measure import arguments, random_documents, report, time_in_turn
from torch import Tensor
from torch.nn import functional as F

from emotrain.batch import PackedBatch
from emotrain.config import config_from_dict
from emotrain.model.report import LayerStatistics
from emotrain.model.router import DocumentPoolRouter, LayerRequest, draw_pool_sizes


def loop_over_documents(
    router: DocumentPoolRouter, x_TD: Tensor, batch: PackedBatch, pool_size_G: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """The slow way: a softmax, an entropy and a top-k for every document.

    Returns:
        weights [T, K], probabilities [T, N], logits [T, N] with -inf outside the pool, counts [N],
        entropy.
    """
    logits_TN = F.linear(x_TD, router.weight_ED)[:, : router.num_routed]
    discarded_TN = torch.zeros_like(logits_TN, dtype=torch.bool)
    entropy = 0.0
    with torch.no_grad():
        for document in range(batch.num_documents):
            tokens = torch.nonzero(batch.document_T == document)[:, 0]
            probabilities_tN = torch.softmax(logits_TN[tokens], dim=1)
            entropy += float(torch.special.entr(probabilities_tN).sum())
            num_discarded = router.num_routed - int(pool_size_G[document])
            if num_discarded > 0:
                discarded_TN[
                    tokens[:, None], torch.topk(-probabilities_tN.sum(dim=0), num_discarded).indices
                ] = True
    logits_TN = logits_TN.masked_fill(discarded_TN, -torch.inf)
    probabilities_TN = torch.softmax(logits_TN, dim=1)
    weights_TK, experts_TK = torch.topk(probabilities_TN, router.num_chosen, dim=1)
    return (
        weights_TK,
        probabilities_TN,
        logits_TN,
        torch.bincount(experts_TK.reshape(-1), minlength=router.num_routed),
        entropy,
    )


class Arms:
    """The arms at one width, on the same tokens, weights and gradients."""

    def __init__(self, batch: PackedBatch, width: int, routed: int, chosen: int):
        generator = torch.Generator().manual_seed(0)
        pool = {"kind": "uniform", "min": min(chosen + 1, routed), "max": routed + 1}
        pool["allow_larger"] = True  # the published range ends one above the experts
        config = config_from_dict(
            {
                "model": {
                    "d_model": width,
                    "num_heads": 1,
                    "num_layers": 1,
                    "router": {"pool": pool},
                    "experts": {"routed": routed, "shared": 1, "top_k": chosen},
                }
            }
        )
        num_tokens = batch.tokens_BS.numel()
        self.batch, self.router = batch, DocumentPoolRouter(config.model, 0)
        torch.nn.init.normal_(self.router.weight_ED, std=width**-0.5, generator=generator)
        self.x_TD = torch.randn(num_tokens, width, generator=generator).requires_grad_()
        self.grad_TK = torch.randn(num_tokens, chosen, generator=generator) / num_tokens
        self.share_N = torch.rand(routed, generator=generator) / num_tokens
        sizes_LG = draw_pool_sizes(config.model.pool, batch.document_ids_G, 1, seed=0, step=1)
        assert sizes_LG is not None
        self.pool_size_G = sizes_LG[0]

    def plain(self) -> LayerStatistics:
        return self._route(LayerRequest())

    def pool(self) -> LayerStatistics:
        return self._route(LayerRequest(self.router.config.pool, self.pool_size_G))

    def loop(self) -> None:
        weights_TK, probabilities_TN, logits_TN, _, _ = loop_over_documents(
            self.router, self.x_TD, self.batch, self.pool_size_G
        )
        self._backward(
            weights_TK,
            probabilities_TN.sum(dim=0),
            torch.logsumexp(logits_TN, dim=1).square().sum(),
        )

    def _route(self, request: LayerRequest) -> LayerStatistics:
        decision, logits_TE = self.router(self.x_TD, self.batch, request)
        statistics = self.router.statistics(decision, logits_TE, self.batch, request)
        self._backward(decision.weights_TK, statistics.probability_sum_N, statistics.z_sum)
        return statistics

    def _backward(self, weights_TK: Tensor, probability_sum_N: Tensor, z_sum: Tensor) -> None:
        self.x_TD.grad = self.router.weight_ED.grad = None
        loss = (
            (weights_TK * self.grad_TK).sum()
            + (probability_sum_N * self.share_N).sum()
            + 1e-3 * z_sum / self.x_TD.shape[0]
        )
        loss.backward()


def main() -> None:
    parser = arguments(__doc__, repeats=15)
    parser.add_argument("--rows", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=4096, help="tokens of a sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--documents", type=int, default=40, help="documents in all (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=int, default=2048, help="D, width of a token (default: %(default)s)"
    )
    parser.add_argument(
        "--small-width", type=int, default=64, help="the small D (default: %(default)s)"
    )
    parser.add_argument(
        "--routed", type=int, default=127, help="N, routed experts (default: %(default)s)"
    )
    parser.add_argument(
        "--chosen", type=int, default=7, help="k, experts a token chooses (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    batch = random_documents(args.rows, args.length, args.documents, vocab_size=2)
    wide = Arms(batch, args.width, args.routed, args.chosen)
    small = Arms(batch, args.small_width, args.routed, args.chosen)
    timings = time_in_turn(
        {
            "plain": wide.plain,
            "pool": wide.pool,
            "plain, small D": small.plain,
            "pool, small D": small.pool,
            "loop over documents, small D": small.loop,
        },
        args.repeats,
        warmup=2,
    )
    results = {
        "pool_over_plain": timings["pool"].median / timings["plain"].median,
        "pool_ms": timings["pool"].median,
        "plain_ms": timings["plain"].median,
        "pool_over_plain_small_d": timings["pool, small D"].median
        / timings["plain, small D"].median,
        "loop_over_pool": timings["loop over documents, small D"].median
        / timings["pool, small D"].median,
        "tokens": batch.tokens_BS.numel(),
        "width": args.width,
        "small_width": args.small_width,
        "routed": args.routed,
        "chosen": args.chosen,
        "documents": batch.num_documents,
    }
    report("Router, forward + backward", timings, results, args.json)


if __name__ == "__main__":
    main()
