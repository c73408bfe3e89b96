"""Exclusive experts on several processes: trained alone or with all the rest they become what they
become in one process, where FSDP2 cuts tensors, where ranks hold shares of the experts, and under
DeepSpeed; what is frozen is frozen to the bit."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from emotrain.config import Config, config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.subsets.exclusive import add_experts
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from tests.conftest import tiny_settings
from tests.processes import run_ranks

ALONE = {"train": "routed,router", "experts": "exclusive:kitchen"}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="pip install 'emotrain[deepspeed]'"
)


@pytest.fixture(scope="module")
def added(tiny_data, tmp_path_factory) -> Path:
    """A trained run of two layers of 7 routed experts, with 2 more for the kitchen."""
    folder = tmp_path_factory.mktemp("run")
    settings = tiny_settings(tiny_data, folder / "run", steps=2)
    settings["model"]["init_std"] = 0.2
    run_module.train(config_from_dict(settings), Ranks())
    return add_experts(folder / "run", folder / "added", "kitchen", 2).path


def settings(added: Path, data: Path, run_dir: Path, finetune: dict, **training) -> Config:
    made = tiny_settings(data, run_dir, **{"steps": 3, **training})
    made["model"] |= {"init_std": 0.2}
    made["model"]["experts"] |= {"routed": 9, "exclusive": {"kitchen": 2}}
    made["data"]["domain"] = "kitchen"
    made["optimizer"] |= {"weight_decay": 0.5, "eps": 1e-2}
    made["finetune"] = {"start": str(added), **finetune}
    return config_from_dict(made)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_model(find(checkpoint))[1].named_parameters()}


def rows(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of other experts, and those of the kitchen's."""
    own = [7, 8]
    return tensor[[i for i in range(len(tensor)) if i not in own]], tensor[own]


def check_same(one: Path, other: Path) -> None:
    alone, together = tensors(one), tensors(other)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=2e-4, msg=name)


def check_alone(begun: Path, trained: Path) -> None:
    before, after = tensors(begun), tensors(trained)
    for name, tensor in before.items():
        if ".experts." not in name and ".router." not in name:
            assert torch.equal(tensor, after[name]), name
            continue
        (others, own), (stayed, moved) = rows(name, tensor), rows(name, after[name])
        assert torch.equal(others, stayed) and not torch.equal(own, moved), name


LAYOUTS = [
    pytest.param(2, {"ep": 2}, id="2-ep2"),
    pytest.param(2, {}, id="2", marks=pytest.mark.long),
    pytest.param(4, {"ep": 2}, id="4-ep2", marks=pytest.mark.long),
    pytest.param(4, {"replicate": 2, "ep": 2}, id="4-2copies-ep2", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("processes", "parallel"), LAYOUTS)
def test_they_train_alone_on_several_processes(processes, parallel, added, tiny_data, tmp_path):
    def train(ranks: Ranks) -> None:
        for name, finetune in (("alone", ALONE), ("all", {})):
            made = settings(added, tiny_data, tmp_path / name, finetune, micro_batch=1)
            run_module.train(_with(made, parallel), ranks)

    run_ranks(train, processes)
    check_alone(added, tmp_path / "alone")
    for name, finetune in (("alone", ALONE), ("all", {})):
        run_module.train(settings(added, tiny_data, tmp_path / f"{name}-one", finetune), Ranks())
        check_same(tmp_path / f"{name}-one", tmp_path / name)


def _with(config: Config, parallel: dict) -> Config:
    from emotrain.config import config_to_dict

    made = config_to_dict(config)
    made["parallel"] |= parallel
    return config_from_dict(made)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "ep"),
    [
        pytest.param(2, 2, marks=pytest.mark.long),
        pytest.param(2, 1, marks=pytest.mark.long),
        pytest.param(3, 1, marks=pytest.mark.long),
    ],
)
def test_they_train_with_all_the_rest_under_deepspeed(
    stage, ep, added, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    file = tmp_path / "options.json"
    file.write_text(
        json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}})
    )
    made = _with(settings(added, tiny_data, tmp_path / "two", {}, micro_batch=2), {"ep": ep})

    def train(ranks: Ranks) -> None:
        from emotrain.training.deepspeed import DeepSpeedEngine

        os.environ["LOCAL_RANK"] = str(ranks.rank)
        run_module.train(made, ranks, partial(DeepSpeedEngine, file))

    run_ranks(train, 2)
    run_module.train(settings(added, tiny_data, tmp_path / "one", {}), Ranks())
    check_same(tmp_path / "one", tmp_path / "two")
    (_, before), (_, after) = (rows("", tensors(of)[NAME]) for of in (added, tmp_path / "two"))
    assert not torch.equal(before, after)


NAME = "blocks.0.moe.experts.gate_up_NFD"


@needs_deepspeed
@pytest.mark.parametrize(
    ("finetune", "says"),
    [
        (ALONE, "finetune.train=routed,router: under DeepSpeed all parameters learn from labels"),
        ({"experts": "exclusive:kitchen"}, "finetune.experts=exclusive:kitchen: under DeepSpeed"),
        ({"teacher": "runs/it"}, "finetune.teacher=runs/it: under DeepSpeed"),
    ],
)
def test_deepspeed_refuses_to_train_some_of_a_model(finetune, says, added, tiny_data, tmp_path):
    from emotrain.training.deepspeed_options import read_options

    file = tmp_path / "options.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}}))
    made = settings(added, tiny_data, tmp_path / "run", finetune)
    with pytest.raises(UserError, match=says):
        read_options(file, made, 1)
