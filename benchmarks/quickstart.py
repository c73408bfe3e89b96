"""How much of this machine the quickstart takes: its seconds times the rate of a matrix product.

    python benchmarks/quickstart.py --seconds S [--json]

Seconds alone say more about the machine than about the program. Their product with the rate that
the machine's own fp32 matmul reaches on all cores, in TFLOP, compares across machines.
`make quickstart` ends with it.

    quickstart_machine_tflop   seconds * matmul rate
    matmul_gflops              the best of a second of products of 1536 x 1536 matrices
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

SIZE = 1536


def matmul_rate(seconds: float = 1.0) -> float:
    """FLOP/s of the fastest fp32 product on all cores."""
    a_NN, b_NN, out_NN = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE), torch.empty(SIZE, SIZE)
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(a_NN, b_NN, out=out_NN)
        now = time.perf_counter()
        best = max(best, 2 * SIZE**3 / (now - start))
        if now > end:
            return best


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds",
        type=float,
        required=True,
        help="what training, evaluation and report took together",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rate = matmul_rate()
    result = {
        "quickstart_machine_tflop": args.seconds * rate / 1e12,
        "seconds": args.seconds,
        "matmul_gflops": rate / 1e9,
        "threads": torch.get_num_threads(),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"quickstart_machine_tflop {result['quickstart_machine_tflop']:.1f}: "
            f"{args.seconds:.0f} s at {result['matmul_gflops']:.0f} GFLOP/s of fp32 matmul on "
            f"{result['threads']} threads"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
