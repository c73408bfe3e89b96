"""Learning a teacher's predictions: the loss and its gradients against autograd over whole logits,
and a run on one process and several."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from emotrain.config import config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.kernels.linear_cross_entropy import linear_cross_entropy
from emotrain.model.imitation import Imitation
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from tests.conftest import tiny_settings
from tests.processes import run_ranks


def whole(hidden, head, targets, teacher_hidden, teacher_head, weight, temperature, z_weight):
    """The same with all logits at once, and autograd."""
    counted = targets >= 0
    logits, teacher = (hidden @ head.T)[counted], (teacher_hidden @ teacher_head.T)[counted]
    labels = F.cross_entropy(logits, targets[counted], reduction="sum")
    z = logits.logsumexp(1).square().sum()
    kl = F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="sum",
        log_target=True,
    )
    mixed = weight * temperature**2 * kl + (1 - weight) * (labels + z_weight * z)
    return mixed, labels, z, kl


@settings(max_examples=12, deadline=None)
@given(
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    block=st.sampled_from([1, 3, 100]),
    seed=st.integers(0, 99),
)
def test_blocks_give_the_loss_and_the_gradients_of_whole_logits(weight, temperature, block, seed):
    draw = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((10, 4), (13, 4), (10, 6), (13, 6))
    ]
    hidden, head, teacher_hidden, teacher_head = made
    targets = torch.randint(-1, 13, (10,), generator=draw)
    targets = torch.where(targets < 0, -100, targets)
    hidden.requires_grad_()
    head.requires_grad_()
    expected, *sums = whole(
        hidden, head, targets, teacher_hidden, teacher_head, weight, temperature, 0.01
    )
    gradients = torch.autograd.grad(expected, (hidden, head))
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[linear_cross_entropy.__module__]
        patch.setattr(module, "block_tokens", lambda *_: block)
        imitation = Imitation(teacher_hidden, teacher_head, weight, temperature)
        loss, _, _ = linear_cross_entropy(hidden, head, targets, 0.01, of_block=imitation)
        own = torch.autograd.grad(3 * loss, (hidden, head))
    torch.testing.assert_close(loss, expected)
    for one, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(one, 3 * other)
    for one, other in zip((imitation.cross_entropy, imitation.z, imitation.kl), sums, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def start(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    made = tiny_settings(tiny_data, folder)
    # Weights of the usual size would predict all tokens alike.
    made["model"]["init_std"] = 0.3
    run_module.train(config_from_dict(made), Ranks())
    return find(folder)


def with_teacher(data, run_dir, start, **finetune) -> dict:
    made = tiny_settings(data, run_dir, steps=3, micro_batch=1)
    # Pools would make the model another one than its teacher.
    made["model"]["router"] = {"pool": {"kind": "none"}}
    made["model"]["init_std"] = 0.3
    made["losses"] = {"balance": 0.0, "router_z": 0.0, "z": 0.0}
    made["finetune"] = {"start": str(start), "teacher": str(start), **finetune}
    return made


def test_a_model_has_nothing_to_learn_from_itself(start, tiny_data, tmp_path):
    made = with_teacher(tiny_data, tmp_path, start)
    made["optimizer"]["weight_decay"] = 0.0
    result = run_module.train(config_from_dict(made), Ranks())
    assert result["metrics"]["loss"] == pytest.approx(0, abs=1e-6)
    assert result["metrics"]["cross_entropy"] > 1


def test_another_model_comes_nearer_to_its_teacher(start, tiny_data, tmp_path):
    made = with_teacher(tiny_data, tmp_path, start, temperature=2.0)
    made["finetune"]["start"], made["training"]["steps"] = "", 20
    result = run_module.train(config_from_dict(made), Ranks())
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert result["metrics"]["loss"] < 0.6 * first["loss"]


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [
        (2, {"ep": 2}),
        pytest.param(2, {}, marks=pytest.mark.long),
        pytest.param(4, {"replicate": 2, "ep": 2}, marks=pytest.mark.long),
    ],
)
def test_the_layout_does_not_change_what_is_learned(
    processes, parallel, start, tiny_data, tmp_path
):
    made = with_teacher(tiny_data, tmp_path / "one", start, teacher_weight=0.5, temperature=2.0)
    made["finetune"]["start"] = ""
    made["training"]["seed"] = 4
    run_module.train(config_from_dict(made), Ranks())
    made["training"]["run_dir"], made["parallel"] = str(tmp_path / "many"), parallel
    run_ranks(lambda ranks: run_module.train(config_from_dict(made), ranks), processes)
    one, many = (load_model(find(tmp_path / name))[1] for name in ("one", "many"))
    for (name, own), other in zip(one.named_parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-4, msg=name)


def test_a_teacher_of_another_vocabulary_is_refused(start, tiny_data, tmp_path):
    made = with_teacher(tiny_data, tmp_path, start)
    made["model"]["vocab_size"] = 384
    made["finetune"]["start"] = ""
    with pytest.raises(UserError, match="predicts 320 tokens, the model 384"):
        run_module.train(config_from_dict(made), Ranks())
