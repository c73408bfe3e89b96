"""Proves the plan: what the meter counts is what a hand counts, the dry run of a cluster moves what
the layout's arithmetic says, its memory is that of real training (within 10 %), a small step
extrapolates to the whole one, the published throughput is predicted within 30 %, and what is
recommended was planned and fits."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_batch, tiny_config, tiny_model

from emotrain.cli import main
from emotrain.commands import plan as plan_command
from emotrain.config import Config, load_config
from emotrain.distributed.mesh import Layout
from emotrain.distributed.ranks import Ranks
from emotrain.planning import search as search_module
from emotrain.planning.cost import Work
from emotrain.planning.dry_run import Measured, dry_run, follow_state
from emotrain.planning.hardware import GPUS, RATES, Cluster, Reserve, find_gpu
from emotrain.planning.meter import Meter
from emotrain.planning.parts import PARTS, Memory, Part
from emotrain.planning.plan import make_plan, step_times
from emotrain.planning.search import (
    LAYERS,
    Change,
    advice,
    extrapolated,
    search,
    with_settings,
)
from emotrain.planning.stand_ins import Routing, held_experts, synthetic_batch
from emotrain.training.engine import NativeEngine, Phase
from emotrain.training.step import train_step
from tests.conftest import ROOT, run_command
from tests.processes import run_ranks

H100 = find_gpu("h100-80gb")


def config(**overrides) -> Config:
    """A run on 8 processes: 2 layers, 16 routed experts, 2 micro-batches of one sequence."""
    return tiny_config(
        **{
            "model__num_layers": 2,
            "model__vocab_size": 512,
            "model__d_model": 32,
            "model__experts__routed": 16,
            "model__experts__hidden": 32,
            "model__router__pool__max": 16,
            "data__sequence_length": 64,
            "training__global_batch": 16,
            "training__micro_batch": 1,
            "training__precision": "bfloat16",
            **overrides,
        }
    )


@cache
def planned(**overrides) -> Measured:
    return dry_run(config(**overrides), 8)


# ---- the meter


def test_the_meter_follows_storages_not_tensors() -> None:
    with Meter() as meter:
        a = torch.ones(1000)  # 4,000 bytes
        b = a.view(10, 100)[3:]  # no memory of its own
        c = a * 2  # 8,000 at once
        del a
        assert meter.live_bytes == 8000  # b keeps a's storage
        del b
        assert meter.live_bytes == 4000
        c.untyped_storage().resize_(0)  # as FSDP2 frees gathered parameters
        assert meter.live_bytes == 0
        c.untyped_storage().resize_(4000)
        d = torch.empty(500, dtype=torch.float64)
    assert meter.live_bytes == 8000 and meter.peak_bytes == 8000 and d.numel() == 500


def test_what_is_alive_at_the_peak_is_told_by_kind() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    meter = Meter(granularity=512)
    meter.follow(weight.detach(), Memory.PARAMETERS)
    with meter:
        y = (
            weight @ weight
        ).square()  # the product and its square are alive; backward keeps the product
        y.sum().backward()
    assert weight.grad is not None
    meter.follow(weight.grad, Memory.GRADIENTS)
    at_peak = meter.bytes_at_peak()
    rounded = 40_448  # 40,000 rounded up to 512
    assert at_peak[Memory.PARAMETERS] == rounded and sum(at_peak.values()) == meter.peak_bytes
    assert at_peak[Memory.ACTIVATIONS] >= 2 * rounded


def test_flops_by_part_are_those_of_the_formula() -> None:
    """Forward and backward of every matrix product: 6 a parameter and token; attention of the
    CPU kernel: all scores, 4 and 10 times."""
    settings, batch = tiny_config(), tiny_batch(((16,), (16,)))
    model = tiny_model()
    with Meter(PARTS) as meter:
        output = model(batch)
        (output.hidden_TD.sum() + sum(layer.z_sum for layer in output.routing.layers)).backward()
    flops: dict[Part, int] = {}
    for kernel, count in meter.kernels.items():
        flops[kernel.part] = flops.get(kernel.part, 0) + count * kernel.flops
    layers, width, hidden, tokens = 2, 16, 8, 32
    scores = layers * batch.tokens_BS.shape[0] * 16 * 16 * width
    assert flops[Part.ATTENTION] == 6 * layers * tokens * 4 * width * width + 14 * scores
    assert flops[Part.SHARED_EXPERTS] == 6 * layers * tokens * 3 * width * hidden
    assert flops[Part.ROUTER] == 6 * layers * tokens * settings.model.experts_in_layer(0) * width


# ---- the dry run


def test_a_rank_holds_its_part_of_the_state() -> None:
    """Routed experts divide evenly here: a rank of 8 holds an eighth of them, whatever the
    layout, and Adam twice as much."""
    settings = config()
    routed = 2 * 16 * 3 * 32 * 32 * 4
    for ep in (1, 4):
        state = planned(parallel__ep=ep).state_bytes
        rest = (
            planned(parallel__ep=ep, model__experts__hidden=64).state_bytes["parameters"]
            - state["parameters"]
        )
        shared = 2 * 3 * 32 * 32 * 4
        assert (
            routed // 8 <= rest <= routed // 8 + shared
        )  # doubling the experts adds as much as they were, and the shared ones
        assert state["gradients"] == state["parameters"]
        assert 2 * state["parameters"] < state["optimizer"] < 2 * state["parameters"] + 4 * 100
    assert settings.model.experts.routed == 16


@pytest.mark.parametrize(("ep", "replicate"), [(2, 1), (4, 1), (2, 2)])
def test_bytes_by_kind_and_axis_follow_from_the_layout(ep: int, replicate: int) -> None:
    measured, settings = planned(parallel__ep=ep, parallel__replicate=replicate), config()
    layout, sent, counts = (
        measured.layout,
        measured.bytes_by_kind_and_axis(),
        measured.counts_by_kind_and_axis(),
    )
    passes = measured.micro_batches * settings.model.num_layers
    held = 16 // ep * 3 * 32 * 32
    # Gathered in bf16 for forward and again for backward, reduced in fp32. The last layer stays
    # gathered from the first forward pass to the first backward pass.
    gathers = 2 * passes - measured.micro_batches
    assert sent["all_gather"]["expert_dp"] == gathers * held * 2
    assert sent["reduce_scatter"]["expert_dp"] == passes * held * 4
    if replicate > 1:
        # Copies sum their gradients once a step.
        assert (
            sent["all_reduce"]["replicate"]
            >= settings.model.num_layers * held * 4 // layout.expert_dp
        )
    tokens, width, chosen = 64, 32, 3
    rows = sum(Routing().sent(16, chosen, [16 // ep] * ep, tokens))
    # A row in bf16, its weights, its choices in a byte each, all in multiples of 32 bytes; back
    # without choices; both ways a row beside them.
    assert 4 * chosen + chosen <= 32
    there, home, back = (
        rows * (2 * width + 32),
        rows * 2 * width,
        rows * (2 * width + 32 + 2 * width),
    )
    sizes = ep * 2 * 8  # rows and slots for each rank, int64
    assert abs(sent["all_to_all"]["ep"] / (passes * (there + home + back + sizes)) - 1) < 0.01
    # Sizes; parcels; sums home; and the latter two back.
    assert counts["all_to_all"]["ep"] == 5 * passes
    per_layer = measured.dispatch_per_layer(settings.model.num_layers)
    assert per_layer["exchanges_per_layer"] == 4 and per_layer["size_exchanges_per_layer"] == 1
    assert len(measured.axes["ep"]) == ep and measured.axes["ep"] == tuple(range(ep))


def test_the_gradient_of_the_head_is_reduced_once_a_step() -> None:
    """The sum of all micro-batches; every other gradient after each."""
    for overrides in (
        {},
        {"parallel__ep": 2, "parallel__replicate": 2},
        {"losses__balance_schedule": "running"},
    ):
        measured, head = planned(**overrides), 512 * 32 * 4
        reduced = {
            collective.bytes: count
            for collective, count in measured.collectives.items()
            if collective.kind == "reduce_scatter"
        }
        assert measured.micro_batches == 2 and reduced.pop(head) == 1
        assert {count % 2 for count in reduced.values()} == {0}


def test_bringing_tokens_to_their_experts_takes_few_launches() -> None:
    """Forward: two for where parcels go, sizes into one tensor, one that packs, two that sort what
    arrives, one that adds up what came home, and the sum with the shared expert."""
    for overrides, launches, exchanges in (
        ({"parallel__ep": 4}, 8, 4),
        ({"parallel__ep": 4, "parallel__recompute": "full"}, 8, 6),
        ({}, 3, 0),  # sorted on this rank, and the sum
    ):
        per_layer = planned(**overrides).dispatch_per_layer(config().model.num_layers)
        assert per_layer["dispatch_launches_per_layer"] == launches
        assert per_layer["exchanges_per_layer"] == exchanges


def test_banks_of_experts_are_copied_only_where_they_cannot_be_shared_out_whole() -> None:
    """FSDP2 puts together again what it cut along another axis than the first: two banks, in each
    gather and each reduction."""
    for overrides, copies in (({"parallel__ep": 4}, 0), ({"parallel__ep": 2}, 0), ({}, 2)):
        overrides |= {"model__experts__routed": 15, "model__router__pool__max": 15}
        overrides |= {"model__num_layers": 1}
        measured = planned(**overrides)
        elements = -(-15 // measured.layout.ep) * 32 * 32
        found = sum(
            count
            for kernel, count in measured.kernels.items()
            if kernel.name == "cat" and kernel.bytes >= 2 * 2 * elements
        )
        # Of the one layer: gathered and reduced once a micro-batch.
        passes = 2 * measured.micro_batches
        assert found == copies * passes, (overrides, found, passes)


def test_a_token_goes_to_as_many_ranks_as_chance_has_it() -> None:
    """The closed form against a simulation, with as many experts a rank as torch.chunk gives."""
    generator, held, tokens = random.Random(0), [16] * 7 + [15], 20_000
    goes = [0] * 8
    for _ in range(tokens):
        for rank in {expert // 16 for expert in generator.sample(range(127), 7)}:
            goes[rank] += 1
    sent = Routing().sent(127, 7, held, tokens)
    assert sum(sent) / tokens == pytest.approx(sum(goes) / tokens, abs=0.03)
    assert all(abs(a - b) < 0.03 * tokens for a, b in zip(goes, sent, strict=True))
    assert sum(Routing(ranks_per_token=2.0).sent(127, 7, held, tokens)) == pytest.approx(
        2 * tokens, rel=1e-3
    )


def test_a_placement_says_the_rows_of_its_own_number_of_ranks(tmp_path: Path) -> None:
    """Measured rows and load, of layers of one model; other numbers of ranks are by chance."""
    file = tmp_path / "placement.json"
    settings = tiny_config(parallel__ep=4, model__experts__routed=7, model__router__pool__max=7)
    layers = [{"order": list(range(7)), "exchange_load_max_over_mean": load} for load in (1.1, 1.3)]
    file.write_text(json.dumps({"format": 1, "ep": 4, "rows_per_token": 1.25, "layers": layers}))
    args = argparse.Namespace(ranks_per_token={}, imbalance={})

    def routing(ep: int) -> Routing:
        changed = replace(settings.parallel, ep=ep, placement=str(file))
        return plan_command._routing(args, replace(settings, parallel=changed))

    measured = routing(4)
    assert measured == Routing(1.25, pytest.approx(1.2), 4, True)
    for count, expected in ((4, Routing(1.25, 1.2)), (2, Routing())):
        held = held_experts(7, count)
        assert measured.sent(7, 2, held, 1000) == expected.sent(7, 2, held, 1000)
        assert measured.received(7, 2, held, 1000) == expected.received(7, 2, held, 1000)
    assert sum(measured.sent(7, 2, held_experts(7, 4), 1000)) == pytest.approx(1250, abs=2)
    with pytest.raises(ValueError, match=r"is for ep=4, parallel.ep is 2; change it"):
        routing(2)
    args.ranks_per_token = {0: 2.0}
    with pytest.raises(ValueError, match="says what --ranks-per-token and --imbalance assume"):
        routing(4)


def test_rows_and_load_may_be_given_for_several_numbers_of_ranks() -> None:
    """For a search; a number of ranks that nothing is said of is by chance."""
    by_ep = plan_command._by_ep

    def routing(rows: str, load: str) -> Routing:
        args = argparse.Namespace(ranks_per_token=by_ep(rows), imbalance=by_ep(load))
        return plan_command._routing(args, tiny_config(parallel__ep=8))

    both = routing("2:1.5,8:2.9", "8:1.2")
    expected = {2: Routing(1.5, 1.0, 2), 4: Routing(), 8: Routing(2.9, 1.2, 8)}
    for count, wanted in expected.items():
        held = held_experts(16, count)
        assert both.on(count).sent(16, 3, held, 1000) == wanted.sent(16, 3, held, 1000)
        assert both.received(16, 3, held, 1000) == wanted.received(16, 3, held, 1000)
    mixed = routing("2.5", "4:1.3")
    assert [mixed.on(count).ranks_per_token for count in (4, 8)] == [2.5, 2.5]
    assert [mixed.on(count).imbalance for count in (4, 8)] == [1.3, 1.0]
    for text in ("four", "4:2:1", "2:", "0:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            by_ep(text)


def test_a_step_waits_for_the_sizes_of_every_exchange() -> None:
    """Once a layer and micro-batch, again where backward computes the block again, and at the end
    of the step for the gradient norm and for what it reports."""
    passes, end = 2 * 2, 2
    for overrides, waits in (
        ({}, end),
        ({"parallel__ep": 4}, end + passes),
        ({"parallel__ep": 4, "parallel__recompute": "full"}, end + 2 * passes),
    ):
        assert planned(**overrides).waits == waits


def test_every_part_and_phase_of_a_step_is_told_apart() -> None:
    """Parts by the classes of modules, phases by the names that the engine gives them."""
    measured = planned(parallel__ep=4, parallel__recompute="full")
    assert {kernel.part for kernel in measured.kernels} == set(Part)
    assert {kernel.phase for kernel in measured.kernels} == {
        Phase.FORWARD,
        Phase.LOSS,
        Phase.BACKWARD,
        Phase.RECOMPUTE,
        Phase.CLIPPING,
        Phase.OPTIMIZER,
        Phase.OTHER,
    }
    assert {kernel.part for kernel in measured.kernels if kernel.phase == Phase.CLIPPING} == {
        Part.OTHER
    }


def test_schedules_and_recomputation_show_in_the_memory() -> None:
    joint, running, full = (
        planned(
            **{
                "data__sequence_length": 512,
                "training__global_batch": 24,
                "model__num_layers": 1,
                **more,
            }
        )
        for more in ({}, {"losses__balance_schedule": "running"}, {"parallel__recompute": "full"})
    )
    # `joint` keeps the activations of three micro-batches, `running` of one.
    assert joint.at_peak[Memory.ACTIVATIONS] > 2 * running.at_peak[Memory.ACTIVATIONS] > 0
    assert full.at_peak[Memory.ACTIVATIONS] < joint.at_peak[Memory.ACTIVATIONS] / 2
    assert sum(full.flops_by_part().values()) > 1.2 * sum(joint.flops_by_part().values())


def test_imbalance_and_crowded_pools_show_in_memory_and_traffic() -> None:
    settings = config(parallel__ep=4, data__sequence_length=256, model__num_layers=1)
    plain, crowded, unequal = (
        dry_run(settings, 8, "sm_90", routing)
        for routing in (Routing(), Routing(ranks_per_token=1.2), Routing(imbalance=1.5))
    )
    assert (
        crowded.bytes_by_kind_and_axis()["all_to_all"]["ep"]
        < 0.7 * plain.bytes_by_kind_and_axis()["all_to_all"]["ep"]
    )
    assert (
        unequal.peak_bytes > plain.peak_bytes
        and unequal.flops_by_part()["experts"] > 1.4 * plain.flops_by_part()["experts"]
    )


def test_a_busier_rank_holds_more_where_all_tokens_come_already() -> None:
    """With two ranks nearly every token goes to both: rows cannot grow, but what the experts keep
    of each slot for backward does."""
    settings = config(parallel__ep=2, data__sequence_length=512, model__num_layers=1)
    tokens, chosen, layers = 512, 3, settings.model.num_layers
    plain, busy, busier = (
        dry_run(settings, 8, "sm_90", Routing(imbalance=imbalance)) for imbalance in (1.0, 1.2, 1.4)
    )
    rows, slots = Routing(imbalance=1.2).received(16, chosen, [8, 8], tokens)
    assert rows == tokens and slots == round(1.2 * tokens * chosen)
    # Gate and up side by side in bf16, of four micro-batches: `joint` keeps all.
    hidden = round(0.2 * tokens * chosen) * 2 * settings.model.experts.hidden * 2
    for less, more in ((plain, busy), (busy, busier)):
        # Whenever in the step the peak is.
        assert more.peak_bytes - less.peak_bytes >= layers * less.micro_batches * hidden
        assert more.flops_by_part()["experts"] == pytest.approx(
            less.flops_by_part()["experts"] + plain.flops_by_part()["experts"] / 5, rel=0.01
        )


def test_slots_end_where_choices_and_experts_do() -> None:
    assert Routing(imbalance=9.0).received(16, 3, [8, 8], 100) == (100, 2 * 100 * 3)
    assert Routing(imbalance=9.0).received(4, 3, [1] * 4, 100) == (100, 4 * 100)
    assert Routing().received(15, 3, [8, 7], 100)[1] == round(2 * 100 * 3 * 8 / 15)


def test_the_synthetic_batch_has_documents_of_the_published_length() -> None:
    batch = synthetic_batch(
        tiny_config(data__sequence_length=4096, training__micro_batch=64, training__global_batch=64)
    )
    # A window of S tokens over documents of mean length m shows S / m + 1 of them.
    assert batch.num_documents / 64 == pytest.approx(4096 / 1318 + 1, rel=0.03)


def without_triton() -> list[Any]:
    """A plan where there is no Triton, as on a laptop that has no wheels of it. Of a fork: all that
    knows of Triton is loaded anew."""
    for name in ("decision", "triton_routing"):
        if module := sys.modules.get(f"emotrain.kernels.{name}"):
            module._LIBRARY._destroy()
    for name in list(sys.modules):
        if name.split(".")[0] in ("triton", "emotrain", "helpers"):
            del sys.modules[name]
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: (
        None if name.split(".")[0] == "triton" else real(name, *rest)
    )
    sys.modules["triton"] = None
    from helpers import tiny_config

    from emotrain.planning.dry_run import dry_run

    del sys.modules["triton"]
    measured = dry_run(tiny_config(training__precision="bfloat16"), 2)
    return [measured.peak_bytes, dict(measured.flops_by_part()), "triton" in sys.modules]


def test_a_machine_without_triton_plans_the_same() -> None:
    """The GPU kernels' launch code runs without it."""
    (found,) = run_ranks(lambda _: without_triton(), 1)
    there = dry_run(tiny_config(training__precision="bfloat16"), 2)
    assert found == [there.peak_bytes, there.flops_by_part(), False]


@pytest.mark.parametrize(
    "overrides",
    [
        {"losses__balance_schedule": "running", "parallel__ep": 4},
        pytest.param({"parallel__ep": 4}, marks=pytest.mark.long),
        pytest.param(
            {
                "losses__balance_schedule": "running",
                "parallel__ep": 4,
                "parallel__recompute": "full",
            },
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_a_small_step_extrapolates(overrides: dict[str, Any]) -> None:
    """What a step computes, sends and keeps is linear in its layers and micro-batches."""
    # The counts of 64 experts fill whole blocks of the CUDA allocator: what is rounded up is not
    # linear.
    overrides |= {"model__experts__routed": 64, "model__experts__hidden": 8}
    # The least that is not itself one of the steps that are extrapolated from.
    settings = config(model__num_layers=LAYERS + 2, training__global_batch=32, **overrides)
    cluster = Cluster(H100, 1, 8)
    whole, quick = dry_run(settings, 8), extrapolated(settings, cluster, Routing())
    assert quick.flops_by_part() == whole.flops_by_part()
    assert quick.bytes_by_kind_and_axis() == whole.bytes_by_kind_and_axis()
    assert (quick.tokens, quick.micro_batches, quick.waits) == (
        whole.tokens,
        whole.micro_batches,
        whole.waits,
    )
    assert quick.at_peak == whole.at_peak and quick.peak_bytes == whole.peak_bytes
    times = [
        step_times(measured, cluster, lambda step, _: Work.of(step, False))["expected"].step
        for measured in (quick, whole)
    ]
    assert times[0] == pytest.approx(times[1], rel=0.01)


def test_the_running_schedule_keeps_no_tokens_of_earlier_micro_batches() -> None:
    """A real step of 16 micro-batches takes the memory of one, but for counts of experts and
    documents: what is added is the same, to the byte, with twice as many tokens."""

    def peak(schedule: str, micro_batches: int, tokens: int) -> int:
        settings = tiny_config(losses__balance_schedule=schedule)
        engine = NativeEngine.build(settings, Ranks(), fresh=True)
        engine.set_learning_rate(1e-3)
        batch = tiny_batch(((tokens // 2, tokens // 2), (tokens,)))
        # Optimizer state and gradients are there from the start, with one micro-batch too.
        train_step(engine, [batch], settings, 1, Ranks())
        engine.start_step = lambda: engine.model.zero_grad(set_to_none=False)
        meter = Meter()
        follow_state(meter, engine, [batch])
        with meter:
            train_step(engine, [batch] * micro_batches, settings, 2, Ranks())
        return meter.peak_bytes

    added = {
        tokens: peak("running", 16, tokens) - peak("running", 1, tokens) for tokens in (64, 128)
    }
    assert added[64] == added[128]
    # With one micro-batch the peak may be at another time of the step than with several.
    of_one = peak("joint", 3, 64) - peak("joint", 2, 64)
    assert added[64] < 15 * of_one / 100
    assert peak("joint", 8, 64) - peak("joint", 2, 64) == 6 * of_one


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_memory_is_that_of_a_real_step(recompute: str) -> None:
    """Of one process, whose tensors come and go in the same order every time."""
    settings = config(
        model__experts__backend="torch",
        model__experts__routed=8,
        model__router__pool__max=8,
        model__d_model=128,
        model__experts__hidden=128,
        data__sequence_length=256,
        losses__balance_schedule="joint",
        parallel__recompute=recompute,
        training__global_batch=4,
        training__micro_batch=2,
        training__precision="float32",
    )
    engine = NativeEngine.build(settings, Ranks(), fresh=True)
    batches = [tiny_batch(((100, 156), (256,)), vocab=512) for _ in range(2)]
    train_step(engine, batches, settings, 1, Ranks())
    engine.start_step()
    meter = Meter()
    follow_state(meter, engine, batches)
    with meter:
        train_step(engine, batches, settings, 2, Ranks())
    assert dry_run(settings, 1, "cpu").peak_bytes == pytest.approx(meter.peak_bytes, rel=0.05)


@pytest.mark.long
def test_memory_is_that_of_real_training() -> None:
    """1 and 2 processes, FSDP2 and expert parallelism, with and without recomputation; more and
    larger ones in the benchmark."""
    # 2.5 % on a quiet machine. On a busy one, collectives that gloo's threads finish late keep
    # their buffers for longer (6 % was seen once), so that one of three runs has to be near.
    # Resident memory, which is reported too, depends still more on what else the machine does.
    for _ in range(3):
        done = run_command("benchmarks/plan_memory.py", "--small", "--json", timeout=300)
        result = json.loads(done.stdout.splitlines()[-1])
        assert len(result["cases"]) == 3
        if result["worst_tensor_error"] < 0.05:
            break
    assert result["worst_tensor_error"] < 0.05, result["cases"]


# ---- the command


def run_plan(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    return plan_command.run(parser.parse_args(list(arguments)))


def test_the_command_prints_every_part(tmp_path, capsys) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "model: {vocab_size: 512, d_model: 32, num_layers: 2, num_heads: 2, experts: {routed: 16, "
        "shared: 1, top_k: 3, "
        "hidden: 32}}\ndata: {sequence_length: 64}\ntraining: {global_batch: 16, micro_batch: 1}\n"
    )
    assert run_plan(str(path), "parallel.ep=4", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["fits"] and result["layout"]["ep"] == 4 and result["gpu"] == "h100-80gb"
    kinds = (
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "gathered",
        "reduction",
        "backward",
        "recomputed",
        "other",
    )
    parts = sum(result[f"{kind}_gib"] for kind in kinds)
    assert parts == pytest.approx(result["peak_gib"])
    assert 0 < result["mfu"] < 1 and result["communication_bytes"]["all_to_all"]["ep"] > 0
    assert all(any(f" {name} = " in line for line in result["assumptions"]) for name in RATES)
    assert run_plan(str(path), "parallel.ep=4") == 0
    text = capsys.readouterr().out
    for word in ("Fits:", "all_to_all ep", "tokens/s a GPU", "Assumptions", "backward"):
        assert word in text


def test_settings_may_come_after_options(capsys) -> None:
    path = str(ROOT / "configs/emo_1b14b_1t.yaml")
    assert main(["plan", path, "--nodes", "1", "parallel.ep=3"]) == 2
    assert "parallel.ep=3 does not divide shard=8" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["plan", path, "parallel.ep=2", "--nonsense"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu", "h900"), "--gpu h900 is not known; choose one of h100-80gb"),
        (
            ("--nodes", "3"),
            "training.global_batch=1024 is not a multiple of training.micro_batch=4 x 24 processes",
        ),
        (("parallel.ep=3",), "parallel.ep=3 does not divide shard=8"),
        (("parallel.replicate=3",), "processes = replicate * shard fails"),
        (("--imbalance", "0.5"), "--imbalance 0.5 must be between 1 and parallel.ep=1"),
        (("--ranks-per-token", "4:2,2:2.1"), "--ranks-per-token 2:2.1 must be between 1 and 2"),
    ],
)
def test_mistakes_get_one_line(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        run_plan(str(ROOT / "configs/emo_1b14b_1t.yaml"), *arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.long
def test_what_is_recommended_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with less memory than the plan needs: each change was planned, and the first costs
    the least."""
    monkeypatch.setattr(Reserve, "usable_gib", lambda _, gpu, groups: gpu.memory_gib)
    settings, routing = config(data__sequence_length=512), Routing()
    needed = dry_run(settings, 8).peak_bytes / 2**30
    small = Cluster(replace(H100, memory_gib=0.7 * needed), 1, 8)
    assert not make_plan(settings, small, routing).fits
    changes = advice(settings, small, routing)
    assert changes and all(change.fits for change in changes)
    assert [change.tokens_per_second for change in changes] == sorted(
        (change.tokens_per_second for change in changes), reverse=True
    )
    best = with_settings(settings, changes[0].settings)
    assert make_plan(best, small, routing).fits


@pytest.mark.long
def test_the_search_ranks_layouts_that_fit() -> None:
    """The smallest search that has several layouts; the whole one is the benchmark's."""
    settings = config(training__global_batch=2, training__micro_batch=1)
    found = search(settings, Cluster(H100, 1, 2), Routing())
    assert found[0].plan is not None and all(change.fits for change in found)
    tried = {key: {dict(change.settings)[key] for change in found} for key, _ in found[0].settings}
    assert tried["parallel.ep"] == tried["parallel.replicate"] == {1, 2}
    speeds = [change.tokens_per_second for change in found if change.plan is not None]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) >= 3
    # Gathering again in backward is not faster, so that the search need not measure it.
    for change in found[:3]:
        kept, again = (
            make_plan(
                with_settings(
                    settings, [*change.settings, ("parallel.reshard_after_forward", value)]
                ),
                Cluster(H100, 1, 2),
                Routing(),
            )
            for value in (False, True)
        )
        assert kept.tokens_per_second >= again.tokens_per_second


@pytest.mark.parametrize("kept_gib", [1, 11, 27, 60])
def test_a_family_is_searched_for_the_fastest_that_fits(kept_gib, monkeypatch) -> None:
    """Against all its members, for several rooms. What is kept gathered may take all that is
    spare, whatever the size of the blocks."""
    settings = config(training__global_batch=16, training__micro_batch=1)
    tried = 0

    def measured(_config, _cluster, _routing, members: list[tuple[str, Any]]) -> Change:
        nonlocal tried
        tried += 1
        of = dict(members)
        micro_batch, recompute = of["training.micro_batch"], of["parallel.recompute"]
        kept = not of["parallel.reshard_after_forward"]
        several = of["losses.balance_schedule"] == "joint" and micro_batch < 2
        activations = {"none": 16, "selective": 8, "full": 4}[recompute] * micro_batch
        peak = 20 + activations * (2 if several else 1) + kept * kept_gib
        speed = micro_batch * {"none": 100, "selective": 80, "full": 60}[recompute] + kept
        return Change(tuple(members), peak <= room, peak, speed, 1.0, room - peak)

    monkeypatch.setattr(search_module, "_compiled_or_not", measured)
    cluster = Cluster(H100, 1, 8)
    family = [[("training.micro_batch", size)] for size in (2, 1)]
    keys = ("losses.balance_schedule", "parallel.recompute", "parallel.reshard_after_forward")
    values = (("joint", "running"), ("none", "selective", "full"), (True, False))
    for room in range(22, 100):
        every = [
            measured(None, None, None, [*size, *zip(keys, rest, strict=True)])
            for size in family
            for rest in itertools.product(*values)
        ]
        fitting = [change.tokens_per_second for change in every if change.fits]
        tried = 0
        found = search_module._best_of_family(settings, cluster, Routing(), family)
        assert max((c.tokens_per_second for c in found), default=0) == max(fitting, default=0)
        assert tried <= 12 and (tried == 1 or room < 52 + kept_gib)


def test_the_shipped_layout_is_a_layout_of_the_published_run() -> None:
    shipped, published = (
        load_config(ROOT / f"configs/{name}.yaml") for name in ("emo_1b14b_1t_ep", "emo_1b14b_1t")
    )
    Layout.check(shipped, 128)
    assert (
        shipped.model == published.model
        and shipped.training.global_batch == published.training.global_batch
    )
    assert (
        replace(
            shipped,
            parallel=published.parallel,
            losses=published.losses,
            training=published.training,
        )
        == published
    )


def test_every_gpu_names_its_source() -> None:
    assert set(GPUS) == {"h100-80gb", "h200-141gb", "a100-80gb", "a100-40gb", "b200-180gb"}
    for gpu in GPUS.values():
        assert (
            "data sheet" in gpu.source
            and gpu.fp32_flops < gpu.bf16_flops
            and gpu.network_bytes_s < gpu.nvlink_bytes_s
        )
