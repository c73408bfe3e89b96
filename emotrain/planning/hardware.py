"""GPUs and the links between them: vendors' numbers, what of them real programs reach, and how the
links are shared.

Every number says what it is: a `fact` of a data sheet, or `typical` of published measurements, with
a range from pessimistic to optimistic. None was measured by this project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from emotrain.errors import UserError


@dataclass(frozen=True)
class GPU:
    """One GPU of a server with eight of them and one network adapter each."""

    name: str
    target: str
    """Architecture, as the kernels' tuning tables name it."""
    bf16_flops: float
    """Dense bfloat16 peak, FLOP/s."""
    fp32_flops: float
    """float32 peak without tensor cores, FLOP/s: what `highest` matrix precision uses."""
    memory_bytes_s: float
    """Peak bandwidth of its memory."""
    memory_gib: float
    """Memory that the driver reports, in GiB."""
    nvlink_bytes_s: float
    """Peak to all other GPUs of the server, in one direction."""
    network_bytes_s: float
    """Peak of its network adapter, in one direction."""
    source: str


def _gpu(
    name: str,
    target: str,
    bf16: float,
    fp32: float,
    tb_s: float,
    mib: int,
    nvlink_gb: float,
    nic_gbit: float,
    source: str,
) -> GPU:
    return GPU(
        name,
        target,
        bf16 * 1e12,
        fp32 * 1e12,
        tb_s * 1e12,
        mib / 1024,
        nvlink_gb * 1e9,
        nic_gbit * 1e9 / 8,
        source,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu(
            "h100-80gb",
            "sm_90",
            989.4,
            66.9,
            3.35,
            81559,
            450,
            400,
            "NVIDIA H100 SXM5 and DGX H100 data sheets",
        ),
        _gpu(
            "h200-141gb",
            "sm_90",
            989.4,
            66.9,
            4.8,
            143771,
            450,
            400,
            "NVIDIA H200 SXM and DGX H200 data sheets",
        ),
        _gpu(
            "a100-80gb",
            "sm_80",
            312.0,
            19.5,
            2.039,
            81920,
            300,
            200,
            "NVIDIA A100 SXM4 80 GB and DGX A100 data sheets",
        ),
        _gpu(
            "a100-40gb",
            "sm_80",
            312.0,
            19.5,
            1.555,
            40960,
            300,
            200,
            "NVIDIA A100 SXM4 40 GB and DGX A100 data sheets",
        ),
        _gpu(
            "b200-180gb",
            "sm_100",
            2250.0,
            80.0,
            8.0,
            183359,
            900,
            400,
            "NVIDIA DGX B200 data sheet (a GPU is an eighth of it)",
        ),
    )
}
"""By the name that `--gpu` takes."""


def find_gpu(name: str) -> GPU:
    """Raises: ValueError: a GPU that is not in the table."""
    if name not in GPUS:
        raise UserError(f"--gpu {name} is not known; choose one of {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class Rate:
    """A number that the time model assumes."""

    value: float
    pessimistic: float
    optimistic: float
    kind: str
    """`typical` of published measurements, or `assumed`: ours, without one."""
    meaning: str

    def at(self, view: str) -> float:
        return {
            "expected": self.value,
            "pessimistic": self.pessimistic,
            "optimistic": self.optimistic,
        }[view]


RATES = {
    "dense_gemm": Rate(
        0.65,
        0.55,
        0.75,
        "typical",
        "share of the peak that dense GEMMs reach (cuBLAS, thousands of rows and columns)",
    ),
    "grouped_gemm": Rate(
        0.45,
        0.30,
        0.60,
        "assumed",
        "share of the peak that our Triton grouped GEMMs reach; not timed on a GPU yet",
    ),
    "cutlass_grouped_gemm": Rate(
        0.35,
        0.28,
        0.42,
        "typical",
        "the same of MegaBlocks' grouped GEMM, which uses the A100's instructions",
    ),
    "flash_attention": Rate(
        0.33,
        0.22,
        0.40,
        "typical",
        "the same of FlashAttention 2 on an H100, for the scores it computes",
    ),
    "cudnn_attention": Rate(
        0.5,
        0.4,
        0.6,
        "typical",
        "the same of cuDNN's attention on an H100, as Transformer Engine uses it",
    ),
    "masked_attention": Rate(
        0.15,
        0.10,
        0.25,
        "assumed",
        "the same of torch's attention under a mask, which computes all scores",
    ),
    "memory": Rate(
        0.85,
        0.75,
        0.92,
        "typical",
        "share of the memory bandwidth that element-wise kernels and copies reach",
    ),
    "fusion": Rate(
        0.5,
        0.7,
        0.35,
        "typical",
        "traffic of element-wise kernels under torch.compile over that without",
    ),
    "nvlink": Rate(
        0.78,
        0.65,
        0.88,
        "typical",
        "share of NVLink that NCCL's gathers and reductions reach on large messages",
    ),
    "nvlink_exchange": Rate(
        0.65, 0.5, 0.8, "typical", "share of NVLink that NCCL's all-to-all reaches"
    ),
    "deepep": Rate(
        0.77,
        0.7,
        0.8,
        "typical",
        "the same of DeepEP's kernels (its docs/legacy.md: 153 and 158 of 200 GB/s)",
    ),
    "network": Rate(
        0.75,
        0.6,
        0.88,
        "typical",
        "share of the network adapters that NCCL's gathers and reductions reach on large messages",
    ),
    "network_exchange": Rate(
        0.5, 0.3, 0.7, "typical", "share of the network adapter that NCCL's all-to-all reaches"
    ),
    "start_s": Rate(25e-6, 40e-6, 15e-6, "typical", "seconds a collective takes without any bytes"),
    "hops": Rate(
        1.0,
        1.5,
        0.7,
        "typical",
        "time of a collective's hops over that in NCCL's own tables (src/graph/tuning.cc)",
    ),
    "launch_s": Rate(2e-6, 3e-6, 1e-6, "typical", "seconds between two kernels on the device"),
    "host_s": Rate(
        8e-6,
        12e-6,
        5e-6,
        "typical",
        "seconds the host takes to issue a kernel of eager PyTorch, autograd included",
    ),
    "sync_s": Rate(
        25e-6,
        50e-6,
        15e-6,
        "typical",
        "seconds from a number on the device to the host that waited for it and goes on",
    ),
    "atomic_s": Rate(
        1e-9, 2e-9, 0.5e-9, "assumed", "seconds of an atomic addition behind another to its address"
    ),
    "contention": Rate(
        0.15,
        0.2,
        0.08,
        "typical",
        "share of the device that a collective takes while it runs: 16 to 24 of NCCL's channels "
        "on 132 multiprocessors",
    ),
    "slowdown": Rate(
        1.05,
        1.10,
        1.02,
        "typical",
        "time of a step over that of the mean rank: stragglers, allocator, data, logging",
    ),
}
"""Whatever the time model assumes of software, by name."""


@dataclass(frozen=True)
class Protocol:
    """How NCCL sends: seconds of a hop within a server and between servers, and the share of the
    bandwidth that is left."""

    inside_s: float
    across_s: float
    share: float


PROTOCOLS = {
    "ring": (Protocol(3.4e-6, 9.6e-6, 1.0), Protocol(1.9e-6, 4.0e-6, 0.92)),
    "tree": (Protocol(1.2e-6, 8.5e-6, 0.82), Protocol(0.52e-6, 5.0e-6, 0.24)),
}
"""Simple and LL128, LL128 and LL: latencies and shares of NCCL's src/graph/tuning.cc, which picks
the fastest as `Cluster.traffic` does."""


@dataclass(frozen=True)
class Traffic:
    """One collective alone: its latency, and seconds that its bytes take on either kind of
    link."""

    latency_s: float
    nvlink_s: float
    network_s: float

    @property
    def seconds(self) -> float:
        return self.latency_s + max(self.nvlink_s, self.network_s)

    @property
    def links(self) -> dict[str, float]:
        """Share of each link while it runs."""
        used = {"nvlink": self.nvlink_s, "network": self.network_s}
        return {link: seconds / self.seconds for link, seconds in used.items() if seconds}


@dataclass(frozen=True)
class Cluster:
    """Servers of equal GPUs; rank r is GPU r mod `gpus_per_node` of server r // `gpus_per_node`."""

    gpu: GPU
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def traffic(
        self, kind: str, payload: float, ranks: Sequence[int], view: str = "expected"
    ) -> Traffic:
        """One collective among `ranks`, alike groups of the other ranks running the same at the
        same time.

        `payload` is in bytes, as in `trace.Collective`. Gathers and reductions are rings: each link
        carries (n - 1) / n of the payload, twice for an all-reduce, and what crosses between
        servers enters each of them once, spread over the adapters of the group's GPUs there. Small
        all-reduces are trees. An all-to-all sends each pair its own part.
        """
        rate = {name: entry.at(view) for name, entry in RATES.items()}
        n, nodes = len(ranks), len({rank // self.gpus_per_node for rank in ranks})
        if n == 1:
            return Traffic(0.0, 0.0, 0.0)
        local, start = n / nodes, rate["start_s"]
        if kind in ("all_to_all", "deepep"):
            simple = PROTOCOLS["ring"][0]
            hops = max(simple.inside_s * (local > 1), simple.across_s * (nodes > 1))
            share = rate["nvlink_exchange" if kind == "all_to_all" else "deepep"]
            inside = payload * (local - 1) / n / (self.gpu.nvlink_bytes_s * share)
            outside = self.gpu.network_bytes_s * rate["network_exchange"]
            return Traffic(start + rate["hops"] * hops, inside, payload * (n - local) / n / outside)
        passes = 2 if kind == "all_reduce" else 1
        carried = passes * payload * (n - 1) / n
        inside = carried / (self.gpu.nvlink_bytes_s * rate["nvlink"]) if local > 1 else 0.0
        outside = local * self.gpu.network_bytes_s * rate["network"]
        across = carried / outside if nodes > 1 else 0.0

        def over(protocol: Protocol, inner: float, outer: float) -> Traffic:
            hops = passes * (inner * protocol.inside_s + outer * protocol.across_s)
            return Traffic(
                start + rate["hops"] * hops, inside / protocol.share, across / protocol.share
            )

        ways = [over(protocol, n - nodes, nodes - 1) for protocol in PROTOCOLS["ring"]]
        if kind == "all_reduce":
            depth = math.ceil(math.log2(nodes))
            ways += [over(protocol, local - 1, depth) for protocol in PROTOCOLS["tree"]]
        return min(ways, key=lambda way: way.seconds)


@dataclass(frozen=True)
class Reserve:
    """Memory of a GPU that tensors cannot have."""

    context_gib: float = 0.7
    """CUDA context, the libraries' code and cuBLAS' workspace. Typical."""
    group_gib: float = 0.35
    """NCCL's buffers for one process group. Typical."""
    fragmentation: float = 0.05
    """Share of the rest lost between the allocator's blocks. Typical with expandable segments."""

    def usable_gib(self, gpu: GPU, groups: int) -> float:
        return (gpu.memory_gib - self.context_gib - groups * self.group_gib) * (
            1 - self.fragmentation
        )
