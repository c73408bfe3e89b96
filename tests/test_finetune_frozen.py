"""What is not trained stays as it is, to the bit, on every layout: `finetune.train` and
`finetune.experts`, with weight decay and moments that would move it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emotrain.config import config_from_dict
from emotrain.config.finetune import PARTS
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.model.parts import part_of
from emotrain.training import run as run_module
from emotrain.training.checkpoint import find, load_model
from emotrain.training.checkpoint_folders import read_state, verify
from tests.conftest import tiny_settings
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def start(tiny_data, tmp_path_factory) -> Path:
    """A trained run of two layers of 7 routed experts and a shared one, with moments everywhere."""
    folder = tmp_path_factory.mktemp("start")
    run_module.train(config_from_dict(tiny_settings(tiny_data, folder)), Ranks())
    return find(folder)


def settings(data: Path, run_dir: Path, start: Path, finetune: dict, **training) -> dict:
    """Few steps with a weight decay that would show."""
    made = tiny_settings(data, run_dir, **{"steps": 2, **training})
    made["optimizer"] |= {"weight_decay": 0.5}
    made["finetune"] = {"start": str(start), **finetune}
    return made


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_model(checkpoint)[1].named_parameters()}


def check_frozen(before: Path, after: Path, train: set[str], experts: list[int] | None) -> None:
    """Everything trained has moved, everything else has not; moments are of what is trained."""
    old, new = tensors(before), tensors(after)
    for name, tensor in old.items():
        part, moved = part_of(name), old[name] != new[name]
        if part not in train:
            assert torch.equal(tensor, new[name]), f"{name} is frozen"
        elif experts is None or part not in ("routed", "router"):
            # Norm gains of 1 decay; a row of the embedding whose token does not come does not.
            assert moved.any(), f"{name} is trained"
        else:
            rows = moved.flatten(1).any(1)
            assert rows[experts].all() and rows.sum() == len(experts), f"{name}: {rows.tolist()}"
    stored = verify(after).metadata.state_dict_metadata
    assert {name for name in stored if name.startswith("exp_avg.")} == {
        f"exp_avg.{name}" for name in old if part_of(name) in train
    }


CHOICES = {
    "router": ({"train": "router"}, {"router"}, None),
    "shared and trunk": ({"train": "shared, trunk"}, set(PARTS) - {"routed", "router"}, None),
    "one and its router": (
        {"train": "routed,router", "experts": "last:1"},
        {"routed", "router"},
        [6],
    ),
    "three experts and all the rest": ({"experts": "1,3,6"}, set(PARTS), [1, 3, 6]),
}
LAYOUTS = [
    pytest.param(1, {}, CHOICES, id="1"),
    # Shares of experts that FSDP2 cuts further, and tensors cut by rows.
    pytest.param(4, {"ep": 2}, ["router", "three experts and all the rest"], id="4-ep2"),
    pytest.param(2, {}, CHOICES, id="2", marks=pytest.mark.long),
    pytest.param(2, {"ep": 2}, CHOICES, id="2-ep2", marks=pytest.mark.long),
    pytest.param(4, {}, CHOICES, id="4", marks=pytest.mark.long),
    pytest.param(4, {"replicate": 2, "ep": 2}, CHOICES, id="4-2copies-ep2", marks=pytest.mark.long),
    pytest.param(4, {"ep": 4, "recompute": "full"}, CHOICES, id="4-ep4", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("processes", "parallel", "chosen"), LAYOUTS)
def test_what_is_frozen_is_frozen_to_the_bit(
    processes, parallel, chosen, start, tiny_data, tmp_path
):
    """And what is trained is the same on every layout, but for the order of sums."""

    def train_all(ranks: Ranks) -> None:
        for name in chosen:
            finetune, *_ = CHOICES[name]
            made = settings(tiny_data, tmp_path / name, start, finetune, micro_batch=1)
            made["parallel"] = parallel
            run_module.train(config_from_dict(made), ranks)

    run_ranks(train_all, processes)
    for name in chosen:
        finetune, train, experts = CHOICES[name]
        check_frozen(start, find(tmp_path / name), train, experts)
        if processes > 1 and name == "three experts and all the rest":
            made = settings(tiny_data, tmp_path / "one", start, finetune)
            run_module.train(config_from_dict(made), Ranks())
            alone = tensors(find(tmp_path / "one"))
            for key, tensor in tensors(find(tmp_path / name)).items():
                torch.testing.assert_close(tensor, alone[key], rtol=0, atol=2e-4)


def test_frozen_parameters_have_no_gradient_and_no_moments(start, tiny_data, tmp_path):
    from emotrain.training.engine import NativeEngine

    made = config_from_dict(settings(tiny_data, tmp_path, start, {"train": "router"}))
    engine = NativeEngine.build(made, Ranks(), fresh=True)
    run_module.train(made, Ranks(), lambda *_: engine)
    for name, parameter in engine.model.named_parameters():
        is_router = part_of(name) == "router"
        assert (parameter.grad is not None) == is_router
        assert (parameter in engine.optimizer.state) == is_router


def test_a_tuned_run_goes_on_as_if_it_had_not_stopped(start, tiny_data, tmp_path):
    finetune = {"train": "routed,router", "experts": "1,3"}
    for folder, steps in (("whole", (4,)), ("halves", (2, 4))):
        for stop in steps:
            made = settings(tiny_data, tmp_path / folder, start, finetune, steps=4)
            made["optimizer"]["schedule"] = "linear"
            made["optimizer"]["final_ratio"] = 1.0
            made["training"]["steps"] = stop
            run_module.train(config_from_dict(made), Ranks())
    whole, halves = tensors(find(tmp_path / "whole")), tensors(find(tmp_path / "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert read_state(find(tmp_path / "halves"))[0].step == 4


def test_moments_that_a_checkpoint_has_of_frozen_rows_do_not_move_them(start, tiny_data, tmp_path):
    """`training.resume` goes on with the optimizer of a run that trained every expert."""
    made = settings(tiny_data, tmp_path / "on", start, {"experts": "2"}, steps=9)
    made["finetune"]["start"] = ""
    made["training"]["resume"] = str(start)
    run_module.train(config_from_dict(made), Ranks())
    check_frozen(start, find(tmp_path / "on"), set(PARTS), [2])


def test_going_on_with_moments_of_other_parameters_is_refused(start, tiny_data, tmp_path):
    made = settings(tiny_data, tmp_path / "a", start, {"train": "router"})
    run_module.train(config_from_dict(made), Ranks())
    made["finetune"]["train"], made["training"]["steps"] = "shared", 5
    with pytest.raises(UserError, match="finetune.train=router, here it is shared.*finetune.start"):
        run_module.train(config_from_dict(made), Ranks())


def test_a_part_that_the_model_does_not_have_is_refused(tiny_data, tmp_path):
    made = tiny_settings(tiny_data, tmp_path)
    made["model"]["experts"]["shared"] = 0
    made["finetune"] = {"train": "shared"}
    with pytest.raises(UserError, match="finetune.train names no part that the model has"):
        run_module.train(config_from_dict(made), Ranks())


def test_one_routed_expert_leaves_its_router_nothing_to_learn(tiny_data, tmp_path):
    """The softmax over it is 1. docs/modules.md says so."""
    made = tiny_settings(tiny_data, tmp_path, steps=2)
    made["model"]["experts"] |= {"routed": 1, "top_k": 1}
    made["model"]["router"] = {"pool": {"kind": "none"}}
    made["losses"] = {"router_z": 0.0}
    made["finetune"] = {"train": "router"}
    result = run_module.train(config_from_dict(made), Ranks())
    assert result["metrics"]["grad_norm"] == 0


@pytest.mark.parametrize(
    ("finetune", "fault"),
    [
        ({"train": "router,gate"}, "'gate' is no part of a model"),
        ({"train": "shared", "experts": "1"}, "trains none; add routed"),
        ({"experts": "1,7"}, "layer 0 has routed experts 0 to 6"),
        ({"experts": "last:0"}, "layer 0 has routed experts 0 to 6"),
        ({"experts": "last:8"}, "layer 0 has routed experts 0 to 6"),
        ({"experts": "nowhere.json"}, "nowhere.json: no such subset"),
        ({"teacher_weight": 1.5}, "finetune.teacher_weight=1.5 is a share"),
        ({"start": "nowhere"}, "nowhere: no checkpoint here"),
    ],
)
def test_mistakes_are_one_line(finetune, fault, start, tiny_data, tmp_path):
    with pytest.raises(UserError, match=fault):
        made = settings(tiny_data, tmp_path, start, finetune)
        run_module.train(config_from_dict(made), Ranks())


# ---- one domain


def test_a_run_reads_one_domain_alone(tiny_data):
    from emotrain.data.formats import Dataset
    from emotrain.data.opening import open_loader

    documents = {
        number: ids.tolist() for number, ids, _ in Dataset(tiny_data).documents("train", "garden")
    }
    stream = [token for ids in documents.values() for token in ids]
    loader = open_loader(tiny_data, 32, 0, domain="garden", cross_document_targets=False)
    assert loader.num_sequences == len(stream) // 32 and loader.num_tokens == len(stream)
    windows = loader.windows(range(loader.num_sequences))
    assert sorted(windows.tolist()) == list(range(loader.num_sequences))
    batch = loader.batch(range(loader.num_sequences))
    for row, window in enumerate(windows.tolist()):
        assert batch.tokens_BS[row].tolist() == stream[window * 32 : window * 32 + 32]
    assert set(batch.document_ids_G.tolist()) <= set(documents)
    # A token's document is the one whose tokens are there.
    owner = [number for number, ids in documents.items() for _ in ids]
    for row, window in enumerate(windows.tolist()):
        here = batch.document_ids_G[batch.document_BS[row]].tolist()
        assert here == owner[window * 32 : window * 32 + 32]
    with pytest.raises(UserError, match="has no train documents of domain 'sea'"):
        open_loader(tiny_data, 32, 0, domain="sea")
    with pytest.raises(UserError, match="no whole sequence of 6000"):
        open_loader(tiny_data, 6000, 0, domain="garden")
