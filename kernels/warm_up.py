"""Kernels compiled before they are needed.

Triton compiles a kernel at its first launch, in a second or two: in a step where padding, say,
first asks for a variant, all ranks would wait for the one that compiles it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from emotrain.kernels.backends import choose_backend
from emotrain.kernels.launches import recorded_launches


def compile_launches(
    device: torch.device, dtype: torch.dtype, layers: Iterable[Mapping[str, int]], backend: str
) -> int:
    """Compile, for a GPU, every kernel that layers of these shapes launch; returns how many
    launches those are. Nothing runs, and no memory of the device is taken.

    Numbers that change from call to call (`do_not_specialize` of a kernel) choose no variant, so
    that one compilation serves every number of tokens, documents and slots.

    Args:
        layers: for each layer what differs from `PUBLISHED` of launches.py; `held` is the
            number of routed experts on this rank.
        backend: see `choose_backend`. What torch computes needs no compilation.
    """
    compiled = 0
    for sizes in {tuple(sorted(layer.items())): layer for layer in layers}.values():
        sample, routed = torch.empty(0, dtype=dtype, device=device), sizes["num_experts"]
        if choose_backend(backend, sample, 1) != "triton":
            continue
        if routed and choose_backend(backend, sample, routed) != "triton":
            sizes = {**sizes, "num_experts": 0}
        target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        with torch.cuda.device(device):
            for launch in recorded_launches(target, dtype, sizes, routing=True):
                launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
                compiled += 1
    return compiled
