"""Proves on a GPU what tests/ proves on a CPU: compiled kernels against their twin, attention over
documents against the mask, and a step that asks for values at its end alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import tiny_batch, tiny_config, tiny_model
from torch import Tensor
from torch.nn import functional as F

from emotrain.distributed.ranks import Ranks
from emotrain.kernels.grouped_mlp import grouped_mlp
from emotrain.kernels.linear_cross_entropy import HeadGradient, linear_cross_entropy
from emotrain.kernels.slots import sort_slots
from emotrain.model import varlen
from emotrain.model.initial import fill_normal
from emotrain.training.engine import NativeEngine
from emotrain.training.optimizer import build_optimizer
from emotrain.training.step import train_step


def error(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_kernels_are_compiled() -> None:
    import triton

    assert not triton.knobs.runtime.interpret


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 5), (4097, 127), (16384, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_agree_with_their_twin_and_with_themselves(num_tokens, num_experts, dtype) -> None:
    experts_TK = torch.rand(num_tokens, num_experts, device="cuda").argsort(dim=1)[:, :3]
    # A tenth of the slots is empty, and the last expert idle.
    empty_TK = (torch.rand(num_tokens, 3, device="cuda") < 0.1) | (experts_TK == num_experts - 1)
    experts_TK = experts_TK.where(~empty_TK, num_experts)
    slots = sort_slots(experts_TK, num_experts, backend="triton")
    leaves = [
        torch.randn(num_tokens, 256, device="cuda").to(dtype),
        torch.rand(num_tokens, 3, device="cuda").where(~empty_TK, torch.nan),
        (torch.randn(num_experts, 2 * 128, 256, device="cuda") / 16).to(dtype),
        (torch.randn(num_experts, 128, 256, device="cuda") / 11).to(dtype),
    ]
    cotangent_TD = torch.randn(num_tokens, 256, device="cuda").to(dtype)

    def run(backend: str, tensors: list[Tensor], gradient_TD: Tensor) -> list[Tensor]:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        y_TD = grouped_mlp(tensors[0], tensors[1], slots, *tensors[2:], backend=backend)
        return [y_TD, *torch.autograd.grad(y_TD, tensors, gradient_TD)]

    ours, again = (run("triton", leaves, cotangent_TD) for _ in range(2))
    wanted = run("torch", [leaf.double() for leaf in leaves], cotangent_TD.double())
    for mine, same, reference in zip(ours, again, wanted, strict=True):
        assert torch.equal(mine, same)
        assert error(mine, reference) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "vocab"), [(1, 50), (300, 5000), (1000, 100_352)])
def test_the_head_agrees_with_its_twin_and_with_itself(num_tokens, vocab, dtype, monkeypatch):
    """In several blocks, so that the GEMM sums onto what is there."""
    monkeypatch.setitem(linear_cross_entropy.__globals__, "GPU_BLOCK_BYTES", 256 * vocab * 4)
    hidden_TD = torch.randn(num_tokens, 256, device="cuda").to(dtype)
    head_VD = (torch.randn(vocab, 256, device="cuda") / 16).to(dtype)
    targets_T = torch.randint(vocab, (num_tokens,), device="cuda")
    targets_T[1::3] = -100

    def run(backend: str, dtype: torch.dtype, shared: HeadGradient | None = None) -> list[Tensor]:
        leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in (hidden_TD, head_VD)]
        values = linear_cross_entropy(*leaves, targets_T, 1e-3, backend, shared)
        return [*values, *torch.autograd.grad(values[0] / num_tokens, leaves)]

    ours, again = run("triton", dtype), run("auto", dtype, HeadGradient())
    for mine, same, reference in zip(ours, again, run("torch", torch.float64), strict=True):
        assert torch.equal(mine, same)
        assert error(mine, reference) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_attention_sees_the_documents_of_the_mask(kv_heads: int) -> None:
    lengths, total = (1, 100, 27, 128), 256
    shapes = [(total, heads, 64) for heads in (8, kv_heads, kv_heads)]
    qkv = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    edges = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    document_T = torch.repeat_interleave(torch.tensor(lengths)).cuda()
    mask_TT = (document_T[:, None] == document_T) & torch.ones(total, total).tril().bool().cuda()
    ours_TAC = varlen.attend_documents(*qkv, edges, total)
    q_ATC, k_ATC, v_ATC = (part.float().transpose(0, 1) for part in qkv)
    wanted_ATC = F.scaled_dot_product_attention(
        q_ATC[None], k_ATC[None], v_ATC[None], attn_mask=mask_TT, enable_gqa=True
    )[0]
    assert error(ours_TAC, wanted_ATC.transpose(0, 1)) < 1e-2


def test_initial_values_are_those_of_a_cpu() -> None:
    """To the bit, also where a block ends."""
    made = [torch.empty(3, (1 << 23) + 5, device=device) for device in ("cpu", "cuda")]
    for tensor in made:
        fill_normal(tensor, 0, "weight", 0.02, [1, 0], [9, (1 << 23) + 5])
    assert torch.equal(made[0], made[1].cpu())


def test_a_step_waits_for_the_device_at_its_end_alone() -> None:
    """CUDA itself says where the host waits."""
    sizes = {"model__d_model": 64, "model__num_heads": 2, "model__experts__hidden": 64}
    config = tiny_config(training__precision="bfloat16", **sizes)
    model = tiny_model(**sizes).cuda()
    engine = NativeEngine(model, build_optimizer(model, config.optimizer), bfloat16=True)
    ranks = Ranks(device=torch.device("cuda", 0))
    batches = [tiny_batch().to("cuda"), tiny_batch(seed=1).to("cuda")]
    losses = [train_step(engine, batches, config, step, ranks).loss for step in (1, 2, 3)]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            losses.append(train_step(engine, batches, config, 4, ranks).loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    where = [f"{wait.filename}:{wait.lineno}" for wait in waits if "synchron" in str(wait.message)]
    assert 1 <= len(where) <= 6, where
    assert losses[-1] < losses[0]
