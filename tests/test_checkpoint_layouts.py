"""A checkpoint does not know the layout: what any arrangement of processes saves, any other loads
bit for bit.

Forked processes over gloo save real models that `build_model` has spread, with moments of a real
update, and load into others. The oracle is the first arrangement's tensors, gathered whole.
Failures on one rank reach all ranks, and nobody waits for ever.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from emotrain.config import Config, config_from_dict
from emotrain.distributed.parallelize import build_model
from emotrain.distributed.ranks import Ranks
from emotrain.training import checkpoint, tensor_files
from emotrain.training.checkpoint import CheckpointWriter, TrainingState
from emotrain.training.optimizer import build_optimizer
from emotrain.training.tensor_files import TensorFilesWriter, load_parts, save_parts
from emotrain.training.tensor_index import TensorPart, read_index
from tests.processes import run_ranks

pytestmark = [
    pytest.mark.layout,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@dataclass(frozen=True)
class Arrangement:
    processes: int
    replicate: int = 1
    ep: int = 1

    def __str__(self) -> str:
        return f"{self.processes}p-{self.replicate}x-ep{self.ep}"

    def config(self, seed: int = 0) -> Config:
        # 7 routed experts: the last of 4 ranks has one, the others two. 331 and 9 rows are cut
        # unevenly too.
        return config_from_dict(
            {
                "model": {
                    "vocab_size": 331,
                    "d_model": 16,
                    "num_layers": 1,
                    "num_heads": 2,
                    "experts": {"routed": 7, "shared": 2, "top_k": 2, "hidden": 8},
                    "router": {"pool": {"min": 2, "max": 7}},
                },
                "data": {"sequence_length": 16},
                "parallel": {"replicate": self.replicate, "ep": self.ep},
                "training": {"steps": 1, "global_batch": 4, "micro_batch": 1, "seed": seed},
            }
        )


ONE, FSDP2, FSDP4 = Arrangement(1), Arrangement(2), Arrangement(4)
REPLICATED2, HSDP = Arrangement(2, replicate=2), Arrangement(4, replicate=2)
EP2, EP4, EP2_DP2, EP2_HSDP = (
    Arrangement(2, ep=2),
    Arrangement(4, ep=4),
    Arrangement(4, ep=2),
    Arrangement(4, replicate=2, ep=2),
)


def state(step: int = 1) -> TrainingState:
    return TrainingState(step, 64, "abc", 0, 4, 1e-3)


def build(arrangement: Arrangement, seed: int = 0, updated: bool = True):
    """A model and optimizer, after one update with gradients that are a function of the values,
    alike on every layout."""
    config = arrangement.config(seed)
    model = build_model(
        config, Ranks(dist.get_rank() if dist.is_initialized() else 0, arrangement.processes)
    )
    optimizer = build_optimizer(model, config.optimizer)
    if updated:
        for parameter in model.parameters():
            parameter.grad = torch.sin(parameter.detach() * 100)
        optimizer.step()
    return config, model, optimizer


def gathered(model, optimizer) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors.items()
    }


def save(arrangement: Arrangement, run_dir: Path, asynchronous: bool = True):
    config, model, optimizer = build(arrangement)
    with CheckpointWriter(run_dir, asynchronous=asynchronous) as writer:
        writer.save(model, optimizer, config, state())
    return gathered(model, optimizer)


def restore(arrangement: Arrangement, path: Path):
    _, model, optimizer = build(arrangement, seed=1, updated=False)
    assert checkpoint.restore(path, model, optimizer) == state()
    return gathered(model, optimizer)


PAIRS = [
    (EP4, ONE),
    (EP2, EP4),
    (EP4, EP2),
    (EP2_DP2, FSDP2),
    (FSDP2, REPLICATED2),
    (ONE, FSDP4),
    (EP2_HSDP, EP2_DP2),
    (HSDP, EP4),
]
"""An arrangement that saves and one that loads."""
ALONE = [ONE, REPLICATED2, HSDP, EP2_HSDP, EP4]
"""Arrangements whose files are looked at; they save while training waits."""


def in_few_starts(body, cases: list[tuple]) -> dict[tuple, list]:
    """What each rank returns of `body(*case)`, by case. The first of a case is its arrangement;
    ranks are started once for each number of processes."""
    found = {}
    for processes in (1, 2, 4):
        mine = [case for case in cases if case[0].processes == processes]
        of_ranks = run_ranks(lambda _, mine=mine: [body(*case) for case in mine], processes)
        found |= dict(zip(mine, zip(*of_ranks, strict=True), strict=True))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The run folder and the first rank's gathered tensors of every arrangement that saves, by it
    and by whether training went on meanwhile."""
    folder = tmp_path_factory.mktemp("saved")
    cases = [(before, True) for before in dict.fromkeys(before for before, _ in PAIRS)]
    cases += [(arrangement, False) for arrangement in ALONE]
    found = in_few_starts(
        lambda arrangement, asynchronous: save(
            arrangement, folder / f"{arrangement}-{asynchronous}", asynchronous
        ),
        cases,
    )
    return {case: (folder / "-".join(map(str, case)), found[case][0]) for case in cases}


@pytest.fixture(scope="module")
def loaded(saved):
    """What every rank has gathered after it loaded, by pair."""
    found = in_few_starts(
        lambda after, before: restore(after, checkpoint.find(saved[before, True][0])),
        [(after, before) for before, after in PAIRS],
    )
    return {(before, after): ranks for (after, before), ranks in found.items()}


@pytest.mark.parametrize("before, after", PAIRS, ids=str)
def test_saved_on_one_layout_and_loaded_on_another(before, after, saved, loaded):
    run_dir, tensors = saved[before, True]
    assert len(loaded[before, after]) == after.processes
    for of_rank in loaded[before, after]:
        assert of_rank.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(of_rank[name], tensor), name
    assert any(tensor.any() for name, tensor in tensors.items() if name.startswith("exp_avg_sq."))
    _, model = checkpoint.load_model(checkpoint.find(run_dir))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name]), name


@pytest.mark.parametrize("arrangement", ALONE, ids=str)
def test_every_element_is_stored_once_by_a_rank_that_holds_it_and_nothing_is_a_pickle(
    arrangement, saved
):
    run_dir, gathered_tensors = saved[arrangement, False]
    path = checkpoint.find(run_dir)
    elements = {name: 0 for name in gathered_tensors if not name.startswith("step.")}
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                assert name.startswith("exp_avg") == file.name.startswith("optimizer-")
                elements[name] += torch.Size(tensors.get_slice(name).get_shape()).numel()
    assert elements == {name: gathered_tensors[name].numel() for name in elements}
    # Replicas share the work.
    assert len(files) == 2 * arrangement.processes
    others = {file.name for file in path.iterdir()} - {file.name for file in files}
    assert others == {"config.yaml", "state.json", "manifest.json", "tensors.json"}


def test_ranks_without_any_rows_and_cuts_along_several_axes(tmp_path):
    """Parts as FSDP2 and expert parallelism may leave them, of tensors smaller than the mesh."""

    def cut(shape, *placements):
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        return whole, distribute_tensor(
            whole, init_device_mesh("cpu", (2, 2)), placements, src_data_rank=None
        )

    shapes = {"three": (3,), "five": (5, 7), "one": (1, 2, 3)}

    def write():
        tensors = {
            name: cut(shape, *placements)[1]
            for (name, shape), placements in zip(
                shapes.items(),
                ([Shard(0), Shard(0)], [Shard(1), Shard(0)], [Shard(2), Shard(1)]),
                strict=True,
            )
        }
        group = dist.new_group(backend="gloo")
        (tmp_path / "files").mkdir(exist_ok=True)
        writer = TensorFilesWriter(
            tmp_path / "files",
            lambda num_bytes: None,
            lambda files, index: (tmp_path / "files" / tensor_files.INDEX).write_text(
                json.dumps(index)
            ),
        )
        save_parts({name: TensorPart.of(tensor) for name, tensor in tensors.items()}, writer, group)

    def read():
        stored = read_index(tmp_path / "files", os.listdir(tmp_path / "files"))
        for other in ([Shard(0), Shard(0)], [Shard(0), Shard(1)]):
            for name, shape in shapes.items():
                whole, tensor = cut(shape, *([Shard(0), Shard(0)] if len(shape) == 1 else other))
                tensor.to_local().fill_(-1)
                load_parts(
                    {name: TensorPart.of(tensor)}, tmp_path / "files", stored, distributed=True
                )
                assert torch.equal(tensor.full_tensor(), whole), name

    run_ranks(lambda _: write(), 4)
    run_ranks(lambda _: read(), 4)


# ---- failures of one rank


def fails_on_rank_1(run_dir: Path, on_error: str, asynchronous: bool):
    """Saves 1, 2, 3, of which the second meets a full disk on rank 1. Returns what this rank
    saw, and how long it waited for it."""
    config, model, optimizer = build(FSDP2)
    write_file, seen, records = tensor_files._write_file, [], []
    checkpoint.log.addHandler(handler := logging.Handler())
    handler.emit = lambda record: records.append(record.getMessage())
    with CheckpointWriter(run_dir, keep=2, asynchronous=asynchronous, on_error=on_error) as writer:
        for step in (1, 2, 3):

            def full_disk(*args, step=step):
                if step == 2 and dist.get_rank() == 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write_file(*args)

            tensor_files._write_file = full_disk
            started = time.monotonic()
            try:
                writer.save(model, optimizer, config, state(step))
                writer.wait()
                seen.append("")
            except OSError as error:
                seen.append(str(error))
            assert time.monotonic() - started < 10
            assert not checkpoint.list_leftovers(run_dir) or dist.get_rank() == 1
            dist.barrier()
    return [*seen, writer.last.path.name], records


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_full_disk_on_one_rank_is_known_to_all(on_error, asynchronous, tmp_path):
    run_dir = tmp_path / "run"
    (first_rank, logged), (second_rank, quiet) = run_ranks(
        lambda _: fails_on_rank_1(run_dir, on_error, asynchronous), 2
    )
    assert first_rank == second_rank and not quiet
    first, second, third, last = first_rank
    assert first == third == "" and last == "step-00000003"
    message = (
        f"{run_dir}/checkpoints/step-00000002: could not be written (No space left on device (rank "
        f"1)); "
        f"the last whole checkpoint is {run_dir}/checkpoints/step-00000001"
    )
    assert second == (
        f"{message}; free space or choose another training.run_dir, and start again"
        if on_error == "stop"
        else ""
    )
    warned = (
        [f"{message}; training goes on (training.on_checkpoint_error=warn)"]
        if on_error == "warn"
        else []
    )
    assert [line for line in logged if not line.startswith("checkpoint ")] == warned
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["step-00000001", "step-00000003"]
    for path in checkpoint.list_checkpoints(run_dir):
        checkpoint.verify(path)


def dies_while_writing(run_dir: Path):
    config, model, optimizer = build(FSDP2)
    writer = CheckpointWriter(run_dir, asynchronous=True)
    writer.save(model, optimizer, config, state(1))
    writer.wait()
    if dist.get_rank() == 1:
        tensor_files._write_file = lambda *_: os._exit(0)
    writer.save(model, optimizer, config, state(2))
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        writer.wait()
    (run_dir / "waited").write_text(str(time.monotonic() - started))
    os._exit(0)


def test_a_rank_that_dies_leaves_the_others_neither_waiting_nor_with_half_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):  # neither rank returns anything
        run_ranks(lambda _: dies_while_writing(tmp_path / "run"), 2)
    assert float((tmp_path / "run" / "waited").read_text()) < 10
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000001"]


def refused(arrangement: Arrangement, path: Path):
    """What each rank says of the checkpoint with a flipped bit in one file after the other."""
    _, model, optimizer = build(arrangement, seed=1)
    before, said = gathered(model, optimizer), []
    for file in sorted(path.glob("*.safetensors")):
        if dist.get_rank() == 0:
            contents = file.read_bytes()
            file.write_bytes(contents[:-3] + bytes([contents[-3] ^ 1]) + contents[-2:])
        dist.barrier()
        with pytest.raises(ValueError, match="use another checkpoint") as error:
            checkpoint.restore(path, model, optimizer)
        assert all(
            torch.equal(tensor, before[name]) for name, tensor in gathered(model, optimizer).items()
        )
        said.append(str(error.value))
        if dist.get_rank() == 0:
            file.write_bytes(contents)
        dist.barrier()
    return said


def test_damage_that_one_rank_finds_is_refused_by_all_and_changes_nothing(tmp_path):
    run_ranks(lambda _: save(FSDP2, tmp_path / "run"), 2)
    path = checkpoint.find(tmp_path / "run")
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == 4
    for said in run_ranks(lambda _: refused(EP4, path), 4):
        assert said == [
            f"{file}: contents differ from the checksum in manifest.json; use another checkpoint"
            for file in files
        ]
