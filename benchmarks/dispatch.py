"""Bytes that expert parallelism moves: a token once to each rank that holds one of its experts,
against one row for each expert.

    python benchmarks/dispatch.py [--json] [--tokens 2048] [--ep 8]

Local processes exchange real tokens over gloo through `AllToAllDispatcher`, forward and backward,
and count exchanges and what they hand to the collectives: rows there and back, their gradients,
routing weights, choices and split sizes. What stays on its own rank counts in both designs. The
other design moves each slot's row (no weight: it is applied on return) there and back, and its
gradients, and one int32 a slot that says which expert it is for.

    bytes_over_row_per_expert   under uniform routing: every token chooses any k of the N experts
    pool_P                      the same with documents of `--document-tokens` tokens that draw
                                pools of P experts

`--width` and the dtype (bf16) set the weight of a row against its routing weights; the published
width is 2048.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _measure import machine
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import PoolConfig, RouterConfig
from emotrain.distributed.dispatch import AllToAllDispatcher
from emotrain.kernels import Decision
from emotrain.model.router import LayerRequest, decide


class CountedBytes:
    """Counts what this process hands to all_to_all_single while it is entered."""

    def __enter__(self) -> CountedBytes:
        self.sent, self.calls, self._original = 0, 0, dist.all_to_all_single

        def counting(arriving: Tensor, leaving: Tensor, *args, **options):
            self.sent += leaving.nbytes
            self.calls += 1
            return self._original(arriving, leaving, *args, **options)

        setattr(dist, "all_to_all_single", counting)  # noqa: B010 - mypy: a function
        return self

    def __exit__(self, *_error) -> None:
        dist.all_to_all_single = self._original


def route(args: argparse.Namespace, rank: int, pool: int | None) -> Decision:
    """Routing of random logits; with a pool, those of a document share a bias, so that its pool
    is its own."""
    generator = torch.Generator().manual_seed(rank)
    documents = max(1, args.tokens // args.document_tokens)
    document_T = torch.arange(args.tokens) * documents // args.tokens
    logits_TN = torch.randn(args.tokens, args.experts, generator=generator)
    logits_TN += (
        torch.randn(documents, args.experts, generator=generator)[document_T] if pool else 0
    )
    document_BS = document_T[None]
    batch = PackedBatch(document_BS, document_BS, document_BS, torch.arange(documents))
    request = LayerRequest(PoolConfig(), torch.full((documents,), pool)) if pool else LayerRequest()
    return decide(logits_TN, batch, args.chosen, RouterConfig(), request)


def experts(rows_ID: Tensor, weights_IK: Tensor, _slots) -> Tensor:
    """In place of experts: what they compute has no part in what travels."""
    return rows_ID * weights_IK.sum(dim=1, keepdim=True).to(rows_ID.dtype)


def exchange(args: argparse.Namespace, routing: Decision) -> dict[str, float]:
    """Bytes of one layer, forward and backward, on this rank."""
    assert dist.group.WORLD is not None
    dispatcher = AllToAllDispatcher(dist.group.WORLD, args.experts)
    x_TD = torch.randn(args.tokens, args.width, dtype=torch.bfloat16, requires_grad=True)
    weights_TK = routing.weights_TK.clone().requires_grad_()
    leaf = SimpleNamespace(experts_TK=routing.experts_TK, weights_TK=weights_TK)
    with CountedBytes() as counted:
        y_TD, _ = dispatcher(x_TD, leaf, experts, lambda: None)
        y_TD.sum().backward()
    # Every chosen expert weighs its token's row: the sum says whether all of them were reached.
    torch.testing.assert_close(
        y_TD.float(), (x_TD * weights_TK.sum(1, keepdim=True)).float(), rtol=0.05, atol=0.05
    )
    slots = int((routing.experts_TK < args.experts).sum())
    return {
        "bytes": counted.sent,
        "exchanges": counted.calls,
        "row_per_expert_bytes": slots * (4 * args.width * 2 + 4),
        "slots": slots,
    }


def worker(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.ep
    )
    results = {}
    for name, pool in [("uniform", None), *((f"pool_{size}", size) for size in args.pools)]:
        parts = exchange(args, route(args, rank, pool))
        sums = torch.tensor([float(value) for value in parts.values()], dtype=torch.float64)
        dist.all_reduce(sums)
        total = dict(zip(parts, sums.tolist(), strict=True))
        results[name] = {
            "bytes_over_row_per_expert": total["bytes"] / total["row_per_expert_bytes"],
            "exchanges": total["exchanges"] / args.ep,
            "bytes_per_token": total["bytes"] / args.tokens / args.ep,
            "slots_per_token": total["slots"] / args.tokens / args.ep,
        }
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object as the last line of standard output",
    )
    parser.add_argument(
        "--ep", type=int, default=8, help="ranks, as local processes (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=2048, help="tokens of a rank (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=int, default=2048, help="D, width of a token (default: %(default)s)"
    )
    parser.add_argument(
        "--experts", type=int, default=127, help="N, routed experts (default: %(default)s)"
    )
    parser.add_argument(
        "--chosen", type=int, default=7, help="k, experts a token chooses (default: %(default)s)"
    )
    parser.add_argument(
        "--pools",
        type=int,
        nargs="*",
        default=[16, 32, 64],
        help="pool sizes (default: %(default)s)",
    )
    parser.add_argument(
        "--document-tokens",
        type=int,
        default=400,
        help="tokens of a document (default: %(default)s)",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (args, folder), nprocs=args.ep, start_method="fork")
        arms = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))

    from rich.console import Console
    from rich.table import Table

    table = Table(
        "routing",
        "exchanges",
        "bytes a token and layer",
        "over one row an expert",
        title=f"Exchange over {args.ep} ranks",
        title_justify="left",
        caption="forward and backward; width {width}, {experts} experts, {chosen} a token".format(
            **vars(args)
        ),
        caption_justify="left",
    )
    for name, arm in arms.items():
        table.add_row(
            name,
            f"{arm['exchanges']:.0f}",
            f"{arm['bytes_per_token']:,.0f}",
            f"{arm['bytes_over_row_per_expert']:.3f}",
        )
    Console(file=sys.stderr).print(table)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        print(
            json.dumps(
                {
                    "bytes_over_row_per_expert": arms["uniform"]["bytes_over_row_per_expert"],
                    **arms,
                    **settings,
                    "machine": machine(),
                }
            )
        )


if __name__ == "__main__":
    main()
