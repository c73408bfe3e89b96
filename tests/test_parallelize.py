"""Proves the plan apart from its numbers (test_layout.py): layouts that cannot be are refused with
the equation that fails, groups lie where they should, and recomputation keeps less and decides
nothing twice."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_batch, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from emotrain.config import Config, config_from_dict
from emotrain.distributed import parallelize as parallelize_module
from emotrain.distributed.mesh import Holders, Layout, Meshes, build_meshes, experts_of_rank
from emotrain.distributed.parallelize import _cut, build_model, parallelize
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.kernels.decision import ROUTING_DECISIONS, Decision
from emotrain.model import router as router_module
from emotrain.model.router import DocumentPoolRouter
from emotrain.model.transformer import Transformer
from emotrain.training.engine import NativeEngine
from emotrain.training.step import train_step
from tests.processes import run_ranks


def layout_config(**parallel: int) -> Config:
    return config_from_dict(
        {"parallel": parallel, "training": {"global_batch": 1024, "micro_batch": 4}}
    )


# ---- layouts


@pytest.mark.parametrize(
    ("world_size", "parallel", "expected"),
    [
        (128, {}, (1, 128, 1, 128)),
        (128, {"ep": 8}, (1, 128, 8, 16)),
        (128, {"replicate": 4, "ep": 8}, (4, 32, 8, 4)),
        (128, {"replicate": 16, "shard": 8, "ep": 8}, (16, 8, 8, 1)),
        (128, {"ep": 64}, (1, 128, 64, 2)),
        (1, {}, (1, 1, 1, 1)),
    ],
)
def test_axes_follow_from_the_equations(world_size: int, parallel: dict, expected: tuple) -> None:
    layout = Layout.of(layout_config(**parallel), world_size)
    assert (layout.replicate, layout.shard, layout.ep, layout.expert_dp) == expected
    assert layout.replicate * layout.ep * layout.expert_dp == world_size


@pytest.mark.parametrize(
    ("world_size", "parallel", "message"),
    [
        (128, {"shard": 48}, "processes = replicate * shard fails: 128 != 1 * 48"),
        (128, {"replicate": 3}, "processes = replicate * shard fails: 128 != 3 * 42"),
        (2, {"replicate": 4}, "processes = replicate * shard fails: 2 != 4 * 0"),
        (128, {"ep": 3}, "shard = ep * expert_dp fails: parallel.ep=3 does not divide shard=128"),
        (1, {"ep": 2}, "parallel.ep=2 does not divide shard=1"),
        (128, {"ep": 128}, "parallel.ep=128 leaves ranks without any of the 127 routed experts"),
        (96, {"ep": 2}, "model.experts.hidden=1024 is not a multiple of expert_dp=48"),
        (
            3,
            {},
            "training.global_batch=1024 is not a multiple of training.micro_batch=4 x 3 processes",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused_in_one_line(
    world_size: int, parallel: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        Layout.of(layout_config(**parallel), world_size)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("routed", "ep", "refused"),
    [
        ([7, 9], 4, "the 9 routed experts of layer 1"),
        ([4, 5], 4, "the 5 routed experts of layer 1"),
        ([5, 4], 4, "the 5 routed experts of layer 0"),
        ([3, 4], 3, "the 4 routed experts of layer 1"),
        ([7, 8], 4, None),
    ],
)
def test_every_layer_must_have_experts_for_every_rank(
    routed: list[int], ep: int, refused: str | None
) -> None:
    """A layer with more experts than another may leave a rank without any where the other does
    not: ceil(N / ep) of them go to each rank in turn."""
    settings = config_from_dict(
        {
            "model": {
                "num_layers": len(routed),
                "experts": {
                    "routed_per_layer": routed,
                    "shared": 1,
                    "top_k": 1,
                },
                "router": {"pool": {"kind": "none"}},
            },
            "parallel": {"ep": ep},
            "training": {"global_batch": ep, "micro_batch": 1},
        }
    )
    if refused is None:
        assert Layout.of(settings, ep).ep == ep
        return
    with pytest.raises(UserError, match=re.escape(refused)) as error:
        Layout.check(settings, ep)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_ranks", range(1, 10))
@pytest.mark.parametrize("num_experts", [1, 4, 7, 9, 31, 127])
def test_experts_are_dealt_as_torch_chunks_them(num_experts: int, num_ranks: int) -> None:
    dealt = [len(chunk) for chunk in torch.arange(num_experts).chunk(num_ranks)]
    dealt += [0] * (num_ranks - len(dealt))
    assert dealt == [experts_of_rank(num_experts, num_ranks, rank) for rank in range(num_ranks)]


def test_a_dense_model_has_no_experts_to_spread() -> None:
    dense = config_from_dict(
        {"model": {"experts": {"routed": 0, "shared": 1, "top_k": 0}}, "parallel": {"ep": 2}}
    )
    with pytest.raises(ValueError, match="leaves ranks without any of the 0 routed experts"):
        Layout.of(dense, 2)


def _groups(ranks: Ranks) -> None:
    rank = ranks.rank
    meshes = build_meshes(Layout(4, replicate=1, shard=4, ep=2), "cpu")
    assert dist.get_process_group_ranks(meshes.ep.get_group()) == [
        rank // 2 * 2,
        rank // 2 * 2 + 1,
    ], "neighbours exchange tokens"
    assert dist.get_process_group_ranks(meshes.experts.get_group()) == [rank % 2, rank % 2 + 2]
    copies = build_meshes(Layout(4, replicate=2, shard=2, ep=2), "cpu")
    assert copies.dense.mesh_dim_names == (
        "replicate",
        "shard",
    ) and copies.experts.mesh_dim_names == ("replicate", "expert_dp")
    assert dist.get_process_group_ranks(copies.ep.get_group()) == [rank // 2 * 2, rank // 2 * 2 + 1]


def test_token_exchange_stays_among_neighbouring_ranks() -> None:
    run_ranks(_groups, 4)


@pytest.mark.parametrize(
    ("shape", "num_ranks", "axis"),
    [
        ((1, 2048, 2048), 128, 1),  # the shared expert
        ((127, 2048, 2048), 128, 0),
        ((127, 2048, 2048), 16, 0),
        ((127, 2048, 2048), 256, 1),
        ((128, 2048), 1024, 1),  # a router
        ((100352, 2048), 128, 0),
        ((2048,), 1024, 0),
        ((3,), 2, 0),
    ],
)
def test_parameters_are_cut_where_nothing_is_padded(
    shape: tuple[int, ...], num_ranks: int, axis: int
) -> None:
    """FSDP pads the first axis to a multiple of the ranks: a shared expert over 128 ranks would
    weigh as much as 128."""
    assert _cut(torch.nn.Parameter(torch.empty(shape, device="meta")), num_ranks).dim == axis


@pytest.mark.parametrize(
    ("num_experts", "ep", "expert_dp", "whole"),
    [
        (127, 2, 64, True),  # the shipped layout: one a process, and one process without
        (127, 8, 16, True),
        (127, 8, 128, False),  # 16 experts for 128 processes
        (127, 2, 48, False),
        (7, 2, 2, True),
        (128, 4, 1, True),
        (9, 2, 5, True),
        (11, 2, 2, True),
        (397, 4, 3, False),  # 100, 100, 100 and 97 over 3: torch has no word for such parts
    ],
)
def test_spread_experts_are_shared_out_whole_where_they_divide(
    num_experts: int, ep: int, expert_dp: int, whole: bool
) -> None:
    layout = Layout(ep * expert_dp, 1, ep * expert_dp, ep)
    assert layout.shares_whole_experts(num_experts) == whole


@given(st.integers(1, 64), st.integers(2, 8), st.integers(1, 16))
def test_shares_of_experts_are_those_that_torch_describes(
    num_experts: int, ep: int, expert_dp: int
) -> None:
    """Offsets and sizes of a checkpoint's parts come from the description, parameters from FSDP."""
    layout = Layout(ep * expert_dp, 1, ep * expert_dp, ep)
    if not experts_of_rank(num_experts, ep, ep - 1) or not layout.shares_whole_experts(num_experts):
        return
    whole = SimpleNamespace(get_group=lambda *_: None)
    holders = Holders.of(Meshes(layout, whole, whole, whole), num_experts)
    of_rank = [rows.tolist() for rows in torch.arange(num_experts).chunk(ep)]
    for rank, (part, of_ep) in enumerate(itertools.product(range(expert_dp), range(ep))):
        (rows,), (first,) = _compute_local_shape_and_global_offset(
            (num_experts,),
            (expert_dp, ep),
            [part, of_ep],
            (_StridedShard(0, split_factor=ep), Shard(0)),
        )
        chunks = torch.tensor(of_rank[of_ep]).chunk(expert_dp)
        held = chunks[part].tolist() if part < len(chunks) else []
        assert rows == len(held) and (not held or first == held[0])
        assert held == [at for at, holder in enumerate(holders.rank_N) if holder == rank]


# ---- recomputation


class CountedOperations(TorchDispatchMode):
    """Counts what runs, below the modes of recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.ran[operation] += 1
        return operation(*args, **(kwargs or {}))


def test_recomputation_repeats_products_and_no_routing_decision() -> None:
    ran, products = {}, {}
    for recompute in ("none", "selective", "full"):
        settings = tiny_config(parallel__recompute=recompute)
        model = parallelize(Transformer(settings.model).initialize(0), settings)
        with CountedOperations() as counted:
            train_step(NativeEngine(model), [tiny_batch()], settings, 1, Ranks())
        ran[recompute] = {operation: counted.ran[operation] for operation in ROUTING_DECISIONS}
        products[recompute] = sum(
            count
            for operation, count in counted.ran.items()
            if operation.overloadpacket is torch.ops.aten.mm
        )
    assert (
        ran["none"] == ran["selective"] == ran["full"]
        and sum(ran["none"].values()) >= 2 * settings.model.num_layers
    )
    assert products["none"] < products["selective"] < products["full"]


RULES = {
    "topk": lambda scores_GN: torch.zeros_like(scores_GN, dtype=torch.bool).scatter_(
        1, scores_GN.topk(4, dim=1).indices, True
    ),
    "argsort": lambda scores_GN: scores_GN.argsort(dim=1).argsort(dim=1) >= 4,
    "kthvalue": lambda scores_GN: scores_GN >= scores_GN.kthvalue(5, dim=1, keepdim=True).values,
    "above the mean": lambda scores_GN: scores_GN > scores_GN.mean(dim=1, keepdim=True),
}
"""Pools by operators that have nothing in common."""


def noisy(calls: list, tensor: torch.Tensor) -> torch.Tensor:
    """Other noise in every call, so that a decision that is made again is another one."""
    generator = torch.Generator().manual_seed(len(calls))
    calls.append(None)
    return tensor + torch.randn(tensor.shape, generator=generator)


def gradients(settings: Config, model: Transformer) -> list[torch.Tensor]:
    train_step(NativeEngine(model), [tiny_batch()], settings, 1, Ranks())
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("rule", RULES)
def test_recomputation_keeps_a_pool_by_whatever_operators_it_was_drawn(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[torch.Tensor]] = {}
    for recompute in ("none", "full"):
        calls: list = []
        monkeypatch.setitem(
            router_module.POOL_RULES,
            "uniform",
            lambda scores_GN, _, calls=calls: RULES[rule](noisy(calls, scores_GN)),
        )
        settings = tiny_config(parallel__recompute=recompute, model__init_std=0.3)
        model = parallelize(Transformer(settings.model).initialize(0), settings)
        found[recompute] = gradients(settings, model)
        assert len(calls) == settings.model.num_layers * (2 if recompute == "full" else 1)
    for plain, recomputed in zip(found["none"], found["full"], strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["none", "uniform"])
def test_recomputation_decides_as_the_first_pass_did(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools, choices and counts, though the router's input is another one the second time."""
    calls: list = []
    decisions: list[Decision] = []
    forward = DocumentPoolRouter.forward

    def noted(router, x_TD, batch, request):
        decision, logits_TE = forward(router, noisy(calls, x_TD), batch, request)
        decisions.append(decision)
        return decision, logits_TE

    monkeypatch.setattr(DocumentPoolRouter, "forward", noted)
    settings = tiny_config(
        parallel__recompute="full", model__init_std=0.3, model__router__pool__kind=kind
    )
    model = parallelize(Transformer(settings.model).initialize(0), settings)
    for block in model.blocks:
        block.moe.router.backend = backend
    gradients(settings, model)
    # Backward goes through the blocks from the last to the first.
    for first, again in zip(decisions[:2], decisions[:1:-1], strict=True):
        assert not torch.equal(first.scores_GN, again.scores_GN)
        for name in ("experts_TK", "counts_N", "pool_GN"):
            kept, repeated = getattr(first, name), getattr(again, name)
            assert kept is repeated is None or torch.equal(kept, repeated), name


def test_compiled_blocks_stay_compiled_and_decide_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list = []
    decided: Counter = Counter()

    class Noted(parallelize_module._Decisions):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            decided[self.replay] += operation in ROUTING_DECISIONS
            return super().__torch_dispatch__(operation, types, args, kwargs)

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compile_with_torch = torch.compile
    monkeypatch.setattr(parallelize_module, "_Decisions", Noted)
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile_with_torch(function, backend=backend)
    )
    found = {}
    for recompute in ("none", "full"):
        torch.compiler.reset()
        graphs.clear()
        settings = tiny_config(
            parallel__recompute=recompute, training__compile=True, model__num_layers=1
        )
        model = parallelize(Transformer(settings.model).initialize(0), settings)
        found[recompute] = gradients(settings, model)
        assert graphs, recompute
    assert decided == {False: 2, True: 2}
    for plain, recomputed in zip(found["none"], found["full"], strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_recomputation_keeps_less() -> None:
    kept = {}
    for recompute in ("none", "selective", "full"):
        settings = tiny_config(parallel__recompute=recompute, model__experts__hidden=64)
        model = parallelize(Transformer(settings.model).initialize(0), settings)
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(tiny_batch())
        kept[recompute] = sum(sizes.values())
        del output
    assert kept["full"] < kept["selective"] < kept["none"]


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    settings = tiny_config()
    built, plain = (
        build_model(settings, Ranks()),
        Transformer(settings.model).initialize(settings.training.seed),
    )
    assert all(
        torch.equal(a, b) for a, b in zip(built.parameters(), plain.parameters(), strict=True)
    )
