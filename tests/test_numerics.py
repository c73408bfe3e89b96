"""Proves what a run asks of torch: `training.deterministic` reaches attention, and a step on a GPU
has no operator that torch would refuse; FlashAttention 3 runs where it is installed. There is no
GPU here: its attention is imitated, and its operators are those of the dry run."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from typing import Any

import pytest
import torch
from helpers import tiny_batch, tiny_config, tiny_model
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.model import attention, router, varlen
from emotrain.model.attention import document_ends
from emotrain.planning import dry_run
from emotrain.planning.stand_ins import ZeroOnHost
from emotrain.training import numerics
from emotrain.training import run as run_module
from emotrain.training.numerics import reproducible, use_flash_attention_3
from tests.conftest import tiny_settings
from tests.test_training import losses, train
from tests.test_varlen import one_by_one

ON_GPU = Ranks(device=torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(numerics.WORKSPACE, ":16:8")  # Is put back at the end, also if it was unset.
    monkeypatch.delenv(numerics.WORKSPACE)


def strict() -> bool:
    """Whether torch's flash attention adds in a fixed order: with `warn_only` it does not."""
    asked = torch.are_deterministic_algorithms_enabled()
    return asked and not torch.is_deterministic_algorithms_warn_only_enabled()


# ---- deterministic algorithms


@pytest.mark.parametrize("wanted", [False, True])
def test_the_setting_reaches_the_backward_of_attention(
    monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    seen: list[bool] = []

    class Looks(torch.autograd.Function):
        """What flash attention's backward does first."""

        @staticmethod
        def forward(ctx: Any, y_TAC: Tensor) -> Tensor:
            return y_TAC.view_as(y_TAC)

        @staticmethod
        def backward(ctx: Any, grad_TAC: Tensor) -> Tensor:
            seen.append(strict())
            return grad_TAC

    attend = one_by_one(inspect.signature(varlen_attn))
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **k: Looks.apply(attend(*a, **k)))
    monkeypatch.setattr(attention, "documents_of", document_ends)
    model = tiny_model()
    with reproducible(tiny_config(training__deterministic=wanted), ON_GPU):
        model(tiny_batch()).hidden_TD.sum().backward()
    assert seen == [wanted] * model.config.num_layers and not strict()


def test_a_run_sets_it_and_ends_as_without(
    tiny_data: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it changes no bit, for there they always agree."""
    seen: list[tuple[bool, bool]] = []
    step = run_module.train_step

    def looks(*args: Any) -> Any:
        seen.append((strict(), torch.utils.deterministic.fill_uninitialized_memory))
        return step(*args)

    monkeypatch.setattr(run_module, "train_step", looks)
    for wanted in (False, True):
        settings = tiny_settings(tiny_data, tmp_path / str(wanted))
        settings["training"] |= {"deterministic": wanted, "steps": 2}
        train(settings)
    assert seen == [(False, True)] * 2 + [(True, False)] * 2
    assert losses(tmp_path / "True") == losses(tmp_path / "False") and not strict()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_what_cannot_keep_the_promise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(training__deterministic=True, model__experts__backend="megablocks")
    with (
        pytest.raises(UserError, match="does not cover model.experts.backend=megablocks"),
        reproducible(config, ON_GPU),
    ):
        pass
    monkeypatch.setenv(numerics.WORKSPACE, ":0:0")
    with (
        pytest.raises(
            UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0 leaves the order of sums open"
        ),
        reproducible(tiny_config(training__deterministic=True), ON_GPU),
    ):
        pass
    assert not strict()
    with reproducible(tiny_config(), ON_GPU):
        assert not strict()


REFUSED = {
    "adaptive_avg_pool2d", "avg_pool3d", "bincount", "cumsum", "ctc_loss", "embedding_bag",
    "_embedding_bag", "fractional_max_pool2d", "grid_sampler_2d", "histc", "histogram", "kthvalue",
    "max_unpool2d", "median", "nanmedian", "nll_loss2d_forward", "put", "put_", "reflection_pad1d",
    "scatter_reduce", "scatter_reduce_", "upsample_linear1d",
}  # fmt: skip
"""Operators on CUDA that `torch.use_deterministic_algorithms` lists as refused, or some uses of
which it does. A cumulative sum is, of floats."""


def refused(monkeypatch: pytest.MonkeyPatch, world_size: int, **settings: Any) -> set[str]:
    """Operators of a planned step on a GPU that torch would refuse."""
    found: set[str] = set()
    seen: set[str] = set()

    class Seeing(ZeroOnHost):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._opname)
            whole = func._opname == "cumsum" and not args[0].is_floating_point()
            if func._opname in REFUSED and not whole:
                found.add(func._opname)
            return super().__torch_dispatch__(func, types, args, kwargs)

    monkeypatch.setattr(dry_run, "ZeroOnHost", Seeing)
    config = tiny_config(training__deterministic=True, **settings)
    with reproducible(config, Ranks()):
        dry_run.dry_run(config, world_size)
    assert "mm" in seen and len(seen) > 40
    return found


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {"training__precision": "float32", "model__router__pool__kind": "none"}),
        (2, {"training__precision": "bfloat16", "parallel__ep": 2, "training__micro_batch": 1}),
    ],
)
def test_a_step_on_a_gpu_has_no_operator_that_is_refused(
    monkeypatch: pytest.MonkeyPatch, world_size: int, settings: dict[str, Any]
) -> None:
    assert refused(monkeypatch, world_size, **settings) == set()


def test_an_operator_that_is_refused_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""

    def wrong(*args: Any, whole: Any = router.decide) -> Any:
        args[0].detach().cumsum(0)
        return whole(*args)

    monkeypatch.setattr(router, "decide", wrong)
    assert refused(monkeypatch, 1, training__precision="bfloat16") == {"cumsum"}


# ---- FlashAttention 3


def hopper_with_package(patch: pytest.MonkeyPatch, activate: Any) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    find = importlib.util.find_spec
    patch.setattr(
        importlib.util,
        "find_spec",
        lambda name: object() if name == numerics.FLASH_ATTENTION_3 else find(name),
    )
    patch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)


def test_flash_attention_3_runs_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logging.getLogger("emotrain"), "propagate", True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        assert not use_flash_attention_3(ON_GPU)  # The package is not here.
    hopper_with_package(monkeypatch, asked.append)
    assert use_flash_attention_3(ON_GPU) and asked == ["FA3"]
    assert "attention runs FlashAttention 3" in caplog.text
    assert not use_flash_attention_3(Ranks())  # on a CPU
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        assert not use_flash_attention_3(ON_GPU)
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    assert not use_flash_attention_3(ON_GPU) and asked == ["FA3"]


def test_a_package_that_does_not_load_leaves_flash_attention_2(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: str) -> None:
        raise ImportError("libcudart.so.12: cannot open\nshared object")

    monkeypatch.setattr(logging.getLogger("emotrain"), "propagate", True)
    hopper_with_package(monkeypatch, broken)
    assert not use_flash_attention_3(ON_GPU)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("FlashAttention 2 runs: libcudart.so.12: cannot open shared object")


def test_torch_knows_this_implementation_by_that_name() -> None:
    """And imports the module that is looked for."""
    fa3 = pytest.importorskip("torch.nn.attention._fa3", reason="an older torch")
    assert "FA3" in torch.nn.attention.list_flash_attention_impls()
    module = inspect.signature(fa3.register_flash_attention_fa3).parameters["module_path"]
    assert module.default == numerics.FLASH_ATTENTION_3
