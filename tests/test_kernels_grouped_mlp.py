"""Proves the Triton kernels of the experts, in Triton's interpreter: forward and all gradients
against the readable twin, over routings from empty to extremely skewed, in tiles that divide
nothing; that nothing is left unwritten, and that the same bits come out in whatever order
programs run. (`test_kernels_compile.py` proves the machine code.)"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import triton_interpreter
from helpers import decision_of, tiny_batch, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import backwards, poisoned_memory  # noqa: F401

from emotrain.config import PoolConfig
from emotrain.kernels import backends
from emotrain.kernels.backends import choose_backend
from emotrain.kernels.grouped_mlp import grouped_mlp
from emotrain.kernels.slots import SortedSlots, sort_slots
from emotrain.kernels.triton_grouped_mlp import grouped_mlp_triton
from emotrain.kernels.triton_launch import Launch, recording, tiles
from emotrain.kernels.tuning import (
    DEFAULTS,
    GEMM_KERNELS,
    SPACE,
    WALKERS,
    TileConfig,
    check_rows,
    default_tiles,
    joint_space,
)
from emotrain.model.router import LayerRequest

assert triton_interpreter.triton.knobs.runtime.interpret

SMALL = {name: TileConfig(32, 32, 32, warps=4, stages=1, group=2) for name in GEMM_KERNELS}
"""Tiles small enough that tiny shapes have several of them each way."""


def choices(
    num_tokens: int, num_experts: int, num_chosen: int, empty: float = 0.0, skew: float = 0.0
) -> Tensor:
    """Distinct random experts a token; a share of `empty` slots; `skew` draws tokens to the
    first experts."""
    preference_TN = torch.rand(num_tokens, num_experts) - skew * torch.rand(num_experts).sort(
        descending=True
    ).values.flip(0)
    experts_TK = preference_TN.argsort(dim=1, descending=True)[:, :num_chosen]
    return torch.where(torch.rand(num_tokens, num_chosen) < empty, num_experts, experts_TK)


def arguments(
    experts_TK: Tensor, num_experts: int, width: int, hidden: int, dtype: torch.dtype
) -> tuple[list[Tensor], SortedSlots]:
    """x, weights and both banks as leaves with gradient, and the sorted slots; NaN as the weight
    of empty slots."""
    num_tokens, num_chosen = experts_TK.shape
    weights_TK = torch.where(
        experts_TK < num_experts, torch.rand(num_tokens, num_chosen), torch.nan
    )
    tensors = [
        torch.randn(num_tokens, width),
        weights_TK,
        torch.randn(num_experts, 2 * hidden, width) / width**0.5,
        torch.randn(num_experts, hidden, width) / hidden**0.5,
    ]
    leaves = [tensor if index == 1 else tensor.to(dtype) for index, tensor in enumerate(tensors)]
    return [leaf.requires_grad_() for leaf in leaves], sort_slots(experts_TK, num_experts)


def run(function, leaves: list[Tensor], slots: SortedSlots, cotangent_TD: Tensor) -> list[Tensor]:
    """The result and the gradient of every leaf."""
    y_TD = function(leaves[0], leaves[1], slots, *leaves[2:])
    return [y_TD, *torch.autograd.grad(y_TD, leaves, cotangent_TD.to(y_TD.dtype))]


def assert_agrees(
    leaves: list[Tensor], slots: SortedSlots, config: dict[str, TileConfig] = SMALL
) -> None:
    """Against the twin in float32, whatever the dtype: the error is that of the kernels alone."""
    cotangent_TD = torch.randn(leaves[0].shape).to(leaves[0].dtype)
    with tiles(config):
        ours = run(grouped_mlp_triton, leaves, slots, cotangent_TD)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    theirs = run(grouped_mlp, wide, slots, cotangent_TD.float())
    # Relative to the largest entry, or to 0.3, the size of what they are sums of, where a lone
    # entry cancels to almost nothing.
    tolerance = 1e-5 if leaves[0].dtype == torch.float32 else 2e-2
    for leaf, mine, reference in zip([leaves[0], *leaves], ours, theirs, strict=True):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(
            mine.float(), reference, atol=tolerance * max(reference.abs().max().item(), 0.3), rtol=0
        )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---- against the twin

CASES = {
    "random": lambda: choices(40, 5, 3),
    "one token": lambda: choices(1, 5, 3),
    "one choice": lambda: choices(40, 5, 1),
    "all to one expert": lambda: torch.tensor([[2, 5, 5]] * 70),
    "extremely skewed": lambda: torch.cat(
        [torch.tensor([[0, 5, 5]] * 66), torch.tensor([[4, 3, 5]])]
    ),
    "first and last experts idle": lambda: torch.tensor([[1, 2, 3], [3, 1, 2]] * 10),
    "empty slots": lambda: choices(40, 5, 3, empty=0.4),
    "tokens without a slot": lambda: torch.cat([torch.full((4, 3), 5), choices(20, 5, 3)]),
    "nothing routed": lambda: torch.full((4, 3), 5),
    "groups of exactly a tile": lambda: torch.arange(64)[:, None] // 32,
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_twin(case: str) -> None:
    """D = 40 and H = 24 are multiples of no tile."""
    leaves, slots = arguments(CASES[case](), 5, 40, 24, torch.float32)
    assert_agrees(leaves, slots)


@pytest.mark.parametrize("case", ["random", "empty slots"])
def test_bfloat16_agrees_with_the_twin(case: str) -> None:
    leaves, slots = arguments(CASES[case](), 5, 40, 24, torch.bfloat16)
    assert_agrees(leaves, slots)


@pytest.mark.parametrize("width, hidden", [(64, 32), (33, 17), (16, 80)])
def test_any_width_agrees(width: int, hidden: int) -> None:
    leaves, slots = arguments(choices(24, 4, 2, empty=0.1), 4, width, hidden, torch.float32)
    assert_agrees(leaves, slots)


def test_the_published_number_of_experts_in_the_tiles_that_ship() -> None:
    """127 experts and 7 choices, most experts with fewer rows than a tile, many with none."""
    leaves, slots = arguments(choices(30, 127, 7, skew=2.0), 127, 24, 16, torch.bfloat16)
    assert (torch.diff(slots.ends_N) == 0).any()
    assert_agrees(leaves, slots, default_tiles("sm_90", torch.bfloat16))


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_tiles_of_any_rows_agree(rows: int) -> None:
    """Whatever kernel the rows are given for: those that walk the same tiles take the same."""
    leaves, slots = arguments(choices(70, 3, 2, skew=1.0), 3, 24, 16, torch.float32)
    other = TileConfig(rows, 32, 32, warps=4, stages=1, group=2)
    for kernel in WALKERS:
        assert_agrees(leaves, slots, {kernel: other})
    assert_agrees(leaves, slots, {**SMALL, **dict.fromkeys(WALKERS, other)})


@pytest.mark.parametrize("kernel", WALKERS)
def test_rows_that_kernels_cannot_share_are_refused(kernel: str) -> None:
    odd = TileConfig(64, 32, 32, warps=4, stages=1)
    with pytest.raises(ValueError, match="same tiles; give them the same rows"):
        with tiles({**SMALL, kernel: odd}):
            pass
    with tiles({**SMALL, "weight_grad": odd}):
        pass


def test_tables_agree_on_rows() -> None:
    for target in DEFAULTS.values():
        for configs in target.values():
            check_rows(configs)
    joint = list(joint_space())
    for configs in joint:
        check_rows(configs)
    # Nothing worth timing is left out, and those that ship are timed too.
    for kernel, space in SPACE.items():
        assert {configs[kernel] for configs in joint} == set(space)
    assert all(DEFAULTS[target][torch.bfloat16] in joint for target in DEFAULTS)


ROUTINGS = {
    "num_tokens": st.integers(1, 60),
    "num_experts": st.integers(1, 9),
    "num_chosen": st.integers(1, 4),
    "empty": st.sampled_from([0.0, 0.3, 0.9]),
    "skew": st.sampled_from([0.0, 3.0]),
    "width": st.sampled_from([16, 40]),
    "hidden": st.sampled_from([8, 24]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 1000),
}


def check_any_routing(
    num_tokens: int,
    num_experts: int,
    num_chosen: int,
    empty: float,
    skew: float,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    experts_TK = choices(num_tokens, num_experts, min(num_chosen, num_experts), empty, skew)
    leaves, slots = arguments(experts_TK, num_experts, width, hidden, dtype)
    assert_agrees(leaves, slots)


@given(**ROUTINGS)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_routing_agrees(**routing) -> None:
    check_any_routing(**routing)


@pytest.mark.long
@given(**ROUTINGS)
@settings(max_examples=150, deadline=None)
def test_many_routings_agree(**routing) -> None:
    check_any_routing(**routing)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "num_tokens, width, hidden, num_experts, num_chosen",
    [(300, 128, 64, 16, 4), (257, 96, 160, 64, 8), (64, 256, 128, 256, 7), (1000, 64, 64, 3, 2)],
)
def test_the_tiles_that_ship_agree(
    num_tokens: int, width: int, hidden: int, num_experts: int, num_chosen: int, dtype: torch.dtype
) -> None:
    leaves, slots = arguments(
        choices(num_tokens, num_experts, num_chosen, 0.05, 1.0), num_experts, width, hidden, dtype
    )
    assert_agrees(leaves, slots, default_tiles("sm_90", dtype))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_whole_layer_agrees() -> None:
    """Router logits to weighted sum, pools smaller than the choices included: result, counts,
    and gradients of everything."""
    x_TD, router_ND = torch.randn(30, 40).requires_grad_(), torch.randn(5, 40).requires_grad_()
    banks = [
        (torch.randn(5, 48, 40) / 6).requires_grad_(),
        (torch.randn(5, 24, 40) / 5).requires_grad_(),
    ]

    def layer(backend: str) -> list[Tensor]:
        routing = decision_of(
            x_TD @ router_ND.t(),
            torch.arange(30) // 8,
            4,
            3,
            torch.tensor([1, 2, 4, 5]),
            backend=backend,
        )
        y_TD = grouped_mlp(
            x_TD,
            routing.weights_TK,
            sort_slots(routing.experts_TK, len(routing.counts_N), backend=backend),
            *banks,
            backend=backend,
        )
        loss = (
            y_TD.square().sum()
            + routing.probabilities_TN.sum(dim=0).square().sum()
            + routing.lse_T.square().sum()
        )
        return [
            y_TD,
            routing.counts_N.float(),
            *torch.autograd.grad(loss, (x_TD, router_ND, *banks)),
        ]

    with tiles(SMALL):
        for ours, theirs in zip(layer("triton"), layer("torch"), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5 * theirs.abs().max().item(), rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_the_model_s_layer_agrees_under_either_setting(padded: bool) -> None:
    """`experts.backend` reaches router and experts: the layer as the model builds it, with
    shared experts and padding."""
    batch = tiny_batch(padded=padded)
    x_TD, pool_size_G = torch.randn(32, 16), torch.randint(1, 9, (batch.num_documents,))
    layers = {
        backend: tiny_model(model__experts__backend=backend).blocks[0].moe
        for backend in ("torch", "triton")
    }
    for parameter in layers["torch"].parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    layers["triton"].load_state_dict(layers["torch"].state_dict())
    results = {}
    for backend, layer in layers.items():
        y_TD, routing = layer(x_TD, batch, LayerRequest(PoolConfig(), pool_size_G, details=True))
        loss = y_TD.square().sum() + routing.probability_sum_N.square().sum() + routing.z_sum
        results[backend] = [
            y_TD,
            routing.counts_N.float(),
            routing.details.document_scores_GN,
            *torch.autograd.grad(loss, list(layer.parameters())),
        ]
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=2e-5 * max(1, theirs.abs().max().item()), rtol=0
        )


# ---- nothing unwritten, nothing unused, one order of every sum


def test_nothing_unused_is_read_and_nothing_is_left_unwritten(poisoned_memory: None) -> None:  # noqa: F811
    """NaN in every fresh byte, in the token without a slot and in the idle expert; weights of
    empty slots are NaN anyway."""
    experts_TK = choices(24, 5, 3, empty=0.3)
    experts_TK[experts_TK == 3] = 5
    experts_TK[0] = 5
    leaves, slots = arguments(experts_TK, 5, 40, 24, torch.float32)
    with torch.no_grad():
        leaves[0][0], leaves[2][3], leaves[3][3] = torch.nan, torch.nan, torch.nan
    with tiles(SMALL):
        y_TD, grad_x_TD, grad_weights_TK, grad_gate_up_NFD, grad_down_NHD = run(
            grouped_mlp_triton, leaves, slots, torch.ones(24, 40)
        )
    assert all(
        tensor.isfinite().all()
        for tensor in (y_TD, grad_x_TD, grad_weights_TK, grad_gate_up_NFD, grad_down_NHD)
    )
    assert (
        (y_TD[0] == 0).all()
        and (grad_x_TD[0] == 0).all()
        and (grad_weights_TK[experts_TK == 5] == 0).all()
    )
    assert (grad_gate_up_NFD[3] == 0).all() and (grad_down_NHD[3] == 0).all()


def test_the_same_bits_in_any_order(request: pytest.FixtureRequest) -> None:
    leaves, slots = arguments(choices(40, 5, 3, empty=0.2), 5, 40, 24, torch.bfloat16)
    cotangent_TD = torch.randn(40, 40)
    with tiles(SMALL):
        once = run(grouped_mlp_triton, leaves, slots, cotangent_TD)
        request.getfixturevalue("backwards")
        again = run(grouped_mlp_triton, leaves, slots, cotangent_TD)
    for first, second in zip(once, again, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_slots_that_are_known_to_be_empty_take_no_memory(backend: str) -> None:
    """As after an exchange of tokens, where a row has slots for all choices of its token and
    this rank's experts fill few."""
    leaves, slots = arguments(choices(20, 5, 3, empty=0.6), 5, 40, 24, torch.float32)
    used = int(slots.ends_N[-1])
    sizes = []

    def results(known: int | None) -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (sizes.append(tensor.shape), tensor)[1], lambda tensor: tensor
        ):
            return run(
                partial(grouped_mlp, backend=backend),
                leaves,
                replace(slots, in_use=known),
                torch.ones(20, 40),
            )

    every, few = results(None), results(used)
    assert all(torch.equal(a, b) for a, b in zip(every, few, strict=True))
    assert (used, 48) in sizes and used < 60


def test_no_tokens() -> None:
    leaves, slots = arguments(torch.empty(0, 3, dtype=torch.int64), 5, 40, 24, torch.float32)
    y_TD, *gradients = run(grouped_mlp_triton, leaves, slots, torch.empty(0, 40))
    assert y_TD.shape == (0, 40)
    assert all((gradient == 0).all() for gradient in gradients)


def test_gradients_that_nobody_wants_are_not_made() -> None:
    leaves, slots = arguments(choices(8, 5, 2), 5, 40, 24, torch.float32)
    frozen = [leaf.detach() for leaf in leaves]
    with tiles(SMALL):
        full = run(grouped_mlp_triton, leaves, slots, torch.ones(8, 40))
        for index in range(4):
            mixed = [
                leaf if position == index else still
                for position, (leaf, still) in enumerate(zip(leaves, frozen, strict=True))
            ]
            y_TD = grouped_mlp_triton(mixed[0], mixed[1], slots, *mixed[2:])
            (gradient,) = torch.autograd.grad(y_TD, mixed[index], torch.ones(8, 40))
            torch.testing.assert_close(gradient, full[1 + index], rtol=0, atol=0)


def test_inference_keeps_nothing_for_backward() -> None:
    leaves, slots = arguments(choices(8, 5, 2), 5, 40, 24, torch.float32)
    for mode, keeps in ((torch.enable_grad, True), (torch.no_grad, False)):
        seen: list[Launch] = []
        with recording("sm_90", seen.append), mode():
            grouped_mlp_triton(leaves[0], leaves[1], slots, *leaves[2:])
        assert [
            launch.options["KEEP_HIDDEN"] for launch in seen if "KEEP_HIDDEN" in launch.options
        ] == [keeps]


def test_a_gradient_without_strides_of_its_own() -> None:
    """`y.sum().backward()` hands over one number, expanded."""
    leaves, slots = arguments(choices(8, 5, 2), 5, 40, 24, torch.float32)
    with tiles(SMALL):
        y_TD = grouped_mlp_triton(leaves[0], leaves[1], slots, *leaves[2:])
        grads = torch.autograd.grad(y_TD.sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(y_TD, leaves, torch.ones(8, 40))
    for first, second in zip(grads, again, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


# ---- what is refused, in one line


def test_unsupported_operands_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD = torch.zeros(4, 8)
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=r"supports bfloat16 and float32, not float(64|16)"):
            choose_backend("triton", x_TD.to(dtype), 5)
    with pytest.raises(ValueError, match="supports 1 to 256 routed experts, not 257"):
        choose_backend("triton", x_TD, 257)
    with pytest.raises(
        ValueError,
        match="experts.backend=cuda is not known; choose one of auto, torch, triton, megablocks",
    ):
        choose_backend("cuda", x_TD, 5)
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs, not on cpu; use auto or torch"):
        choose_backend("triton", x_TD, 5)
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'emotrain\[kernels\]'"):
        choose_backend("triton", x_TD, 5)


def test_auto_on_a_cpu_is_the_twin() -> None:
    assert choose_backend("auto", torch.zeros(4, 8), 5) == "torch"
    assert choose_backend("auto", torch.zeros(4, 8, dtype=torch.float64), 500) == "torch"


def test_unsupported_strides_and_mixed_types_are_refused() -> None:
    (x_TD, weights_TK, gate_up_NFD, down_NHD), slots = arguments(
        choices(8, 5, 2), 5, 40, 24, torch.float32
    )
    with pytest.raises(
        ValueError,
        match=r"strides \(1, 8\) for shape \(8, 40\); only contiguous tensors are supported",
    ):
        grouped_mlp_triton(
            x_TD.detach().t().contiguous().t(), weights_TK, slots, gate_up_NFD, down_NHD
        )
    with pytest.raises(ValueError, match=r"give one dtype \(bfloat16 or float32\) on one device"):
        grouped_mlp_triton(x_TD.bfloat16(), weights_TK, slots, gate_up_NFD, down_NHD)
