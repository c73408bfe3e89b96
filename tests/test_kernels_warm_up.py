"""Proves that a run compiles its kernels once, before its first step: numbers that change from call
to call choose no variant of a kernel, and what a step launches is what was compiled at the start.

Kernels are asked for their variants in a process of its own: in this one they are interpreted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import tiny_config

from emotrain.distributed.ranks import Ranks
from emotrain.kernels import warm_up
from emotrain.training.start import compile_kernels
from tests.conftest import run_command

PROGRAM = """
import json
import torch
from emotrain.kernels import launches, triton_launch
from emotrain.kernels.compile_check import activate
from emotrain.planning.dry_run import dry_run
from emotrain.training.start import layer_shapes
from tests.helpers import tiny_config

activate("sm_90")

def plain(a):
    '''A fake tensor has no address; on the meta device memory begins at 0.'''
    if not isinstance(a, torch.Tensor):
        return a
    first = a.storage_offset()
    return torch.empty(first + 1, dtype=a.dtype, device="meta")[first:]

def variant(launch):
    '''Kernel and variant: types, alignments, numbers of 1, compile-time constants.'''
    binder = launch.kernel.device_caches[90][-1]
    _, chosen, options = binder(*map(plain, launch.arguments), **launch.options)
    return launch.kernel.__name__, str(chosen) + str(sorted(options.items()))

def ready(*asked, **routing):
    return {variant(launch) for launch in launches.recorded_launches("sm_90", *asked, **routing)}

def launched(config, world_size):
    seen, real = set(), triton_launch.recording
    def recording(target, record):
        return real(target, lambda launch: (seen.add(variant(launch)), record(launch)))
    triton_launch.recording = recording
    try:
        dry_run(config, world_size)
    finally:
        triton_launch.recording = real
    return seen

counts = (4096, 1, 2, 16, 17, 64925, 64928)
by_count = [ready(torch.float32, {"tokens": n, "documents": n}) for n in counts]
other = sorted(set.union(*(of_count ^ by_count[0] for of_count in by_count)))
cold, number = [], []
for world_size, settings in (
    (1, {}),
    (1, {"model__experts__routed_per_layer": (7, 4), "losses__router_z_logits": "all"}),
    (2, {"parallel__ep": 2, "model__router__pool__kind": "none"}),
):
    config = tiny_config(training__precision="bfloat16", **settings)
    seen = launched(config, world_size)
    warm = set.union(*(ready(torch.bfloat16, shapes, routing=True)
                       for shapes in layer_shapes(config, 0)))
    cold += sorted(seen - warm)
    number.append(len(seen))
print(json.dumps({"kinds": len(by_count[0]), "other": other, "cold": cold, "launched": number}))
"""


@pytest.fixture(scope="module")
def variants() -> dict[str, Any]:
    done = run_command("-c", PROGRAM, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_number_of_rows_chooses_a_variant(variants: dict[str, Any]) -> None:
    """1 and multiples of 16 are numbers that Triton makes variants for."""
    assert variants["other"] == [] and variants["kinds"] > 20


def test_a_step_launches_what_was_compiled_at_the_start(variants: dict[str, Any]) -> None:
    """The launches of a planned step, for every layer of several models and layouts."""
    assert variants["cold"] == [] and min(variants["launched"]) > 8


def test_a_run_on_a_gpu_compiles_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(warm_up, "compile_launches", lambda *call: asked.append(call) or 0)
    config = tiny_config(training__precision="bfloat16")
    compile_kernels(config, Ranks())
    assert asked == []  # on a CPU nothing is compiled
    compile_kernels(config, Ranks(device=torch.device("cuda", 0)))
    ((device, dtype, layers, backend),) = asked
    assert (device.type, dtype, backend) == ("cuda", torch.bfloat16, "auto")
    assert len(layers) == config.model.num_layers
