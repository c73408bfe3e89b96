"""GPUs and the links between them: vendors' numbers, what of them real programs reach, and how the
links are shared.

Every number says what it is: a `fact` of a data sheet, or `typical` of published measurements, with
a range from pessimistic to optimistic. None was measured by this project.
"""

from __future__ import annotations

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
    "hop_s": Rate(3e-6, 6e-6, 1.5e-6, "typical", "seconds for each further rank of a ring"),
    "launch_s": Rate(2e-6, 3e-6, 1e-6, "typical", "seconds between two kernels on the device"),
    "host_s": Rate(
        8e-6,
        12e-6,
        5e-6,
        "typical",
        "seconds the host takes to issue a kernel of eager PyTorch, autograd included",
    ),
    "sync_s": Rate(
        60e-6,
        120e-6,
        30e-6,
        "typical",
        "seconds the device idles when the host waits for a number from it",
    ),
    "contention": Rate(
        0.10,
        0.20,
        0.03,
        "typical",
        "time that a second of hidden communication takes from the kernels it runs under",
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
class Cluster:
    """Servers of equal GPUs; rank r is GPU r mod `gpus_per_node` of server r // `gpus_per_node`."""

    gpu: GPU
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def collective_seconds(
        self, kind: str, payload: float, ranks: Sequence[int], view: str = "expected"
    ) -> float:
        """Seconds of one collective among `ranks`, alike groups of the other ranks running the same
        at the same time.

        `payload` is in bytes, as in `meter.Collective`. Gathers and reductions are rings: each link
        carries (n - 1) / n of the payload, twice for an all-reduce, and what crosses between
        servers enters each of them once, spread over the adapters of the group's GPUs there. An
        all-to-all sends each pair its own part.
        """
        rate = {name: entry.at(view) for name, entry in RATES.items()}
        n, nodes = len(ranks), len({rank // self.gpus_per_node for rank in ranks})
        if n == 1:
            return 0.0
        local = n / nodes
        latency = rate["start_s"] + rate["hop_s"] * (n - 1)
        if kind == "all_to_all":
            inside = payload * (local - 1) / n / (self.gpu.nvlink_bytes_s * rate["nvlink_exchange"])
            across = (
                payload * (n - local) / n / (self.gpu.network_bytes_s * rate["network_exchange"])
            )
            return latency + max(inside, across)
        passes = 2 if kind == "all_reduce" else 1
        seconds = (
            passes * payload * (n - 1) / n / (self.gpu.nvlink_bytes_s * rate["nvlink"])
            if local > 1
            else 0.0
        )
        if nodes > 1:
            seconds = max(
                seconds,
                passes
                * payload
                * (n - 1)
                / n
                / (local * self.gpu.network_bytes_s * rate["network"]),
            )
        return passes * latency + seconds


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
