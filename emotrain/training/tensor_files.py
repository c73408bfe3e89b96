"""Tensors cut into parts over many ranks, as safetensors files and one index, behind
torch.distributed.checkpoint (DCP).

    model-00000.safetensors      the parts of parameters that rank 0 wrote, each under the name of
                                 its tensor
    optimizer-00000.safetensors  likewise exp_avg.NAME and exp_avg_sq.NAME
    model-00001.safetensors ...
    tensors.json                 for each tensor its dtype, shape and parts: {"file", "offsets",
                                 "shape"} each

DCP plans: who writes what (a part that several ranks hold is written once), and which stored parts
overlap those that a rank wants, on whatever layout. Only the storage is ours. DCP's own keeps its
metadata as a pickle, which runs what it says when it is read; its safetensors variant holds a file
in memory a second time and loads a tensor with a part missing without a word.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from emotrain.errors import UserError
from emotrain.training.safetensors_file import (
    DTYPES,
    TensorSpec,
    WrittenFile,
    write_safetensors,
)
from emotrain.training.tensor_index import INDEX, StoredTensors, TensorPart, stem_of

T = TypeVar("T")
# One process without a process group is a use that is meant; DCP warns of it at every call.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


def save_parts(
    parts: Mapping[str, TensorPart],
    writer: TensorFilesWriter,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write every rank's parts through `writer`. With a process group (one with CPU collectives)
    all its ranks must call this.

    Raises:
        OSError: what the first rank that failed met, on all ranks alike, with its number where
            there are several.
        ValueError: the ranks' parts do not make up the tensors.
    """
    partial = next((name for name, part in parts.items() if part.local.shape != part.shape), None)
    if group is None and partial is not None:
        raise UserError(f"{partial} is spread over several processes: all of them must save it")
    with _one_failure(group is not None):
        dcp.save(
            dict(parts),
            storage_writer=writer,
            planner=_SavePlanner(),
            process_group=group,
            no_dist=group is None,
        )


def load_parts(
    parts: Mapping[str, TensorPart], folder: Path, stored: StoredTensors, distributed: bool
) -> None:
    """Fill this rank's parts from the files, which may be cut otherwise. With `distributed` all
    ranks must call this.

    Raises:
        ValueError: a file contradicts the index or cannot be read; on all ranks alike.
    """
    with _one_failure(distributed):
        dcp.load(
            dict(parts),
            storage_reader=_TensorFilesReader(folder, stored),
            planner=_LoadPlanner(),
            no_dist=not distributed,
        )


def read_box(
    name: str, offsets: Sequence[int], into: Tensor, folder: Path, stored: StoredTensors
) -> Tensor:
    """Fill `into` with the box of a tensor that begins at `offsets` and is as large, wherever the
    ranks that wrote it left its parts. On this process alone; returns `into`.

    Raises:
        ValueError: a file contradicts the index or cannot be read.
    """
    metadata: Any = stored.metadata.state_dict_metadata[name]
    part = TensorPart(into, torch.Size(offsets), metadata.size)
    load_parts({name: part}, folder, stored, distributed=False)
    return into


class TensorFilesWriter(StorageWriter):
    """Writes each rank's parts into files of its own, then on the coordinator calls `begin` before
    and `commit` after.

    Both run while the other ranks wait for the outcome: what they raise is raised on every rank.
    """

    def __init__(
        self,
        folder: Path,
        begin: Callable[[int], None],
        commit: Callable[[list[WrittenFile], dict[str, Any]], None],
    ):
        """begin(bytes of all ranks' parts); commit(all ranks' files, the index to be written as
        tensors.json)."""
        self.folder, self._begin, self._commit = folder, begin, commit
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs["rank"]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._begin(sum(_item_bytes(item) for plan in plans for item in plan.items))
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        by_stem: dict[str, list[WriteItem]] = defaultdict(list)
        for item in plan.items:
            by_stem[stem_of(item.index.fqn)].append(item)
        results = []
        for stem, items in by_stem.items():
            file = _write_file(
                self.folder / f"{stem}-{self._rank:05d}.safetensors", items, planner.resolve_data
            )
            results += [
                WriteResult(item.index, _item_bytes(item), (file, _data(item).chunk.sizes))
                for item in items
            ]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored: Any = metadata.state_dict_metadata
        tensors: dict[str, Any] = {
            name: {
                "dtype": DTYPES[tensor.properties.dtype],
                "shape": list(tensor.size),
                "parts": [],
            }
            for name, tensor in stored.items()
        }
        files = {}
        for result in (result for of_rank in results for result in of_rank):
            file, shape = result.storage_data
            offset = result.index.offset or ()
            files[file.name] = file
            tensors[result.index.fqn]["parts"].append(
                {"file": file.name, "offsets": list(offset), "shape": list(shape)}
            )
        self._commit([files[name] for name in sorted(files)], {"tensors": tensors})


def _item_bytes(item: WriteItem) -> int:
    return prod(_data(item).chunk.sizes) * _data(item).properties.dtype.itemsize


def _data(item: WriteItem) -> TensorWriteData:
    """Every item here is of a tensor."""
    assert item.tensor_data is not None
    return item.tensor_data


def _write_file(
    path: Path, items: list[WriteItem], resolve: Callable[[WriteItem], Any]
) -> WrittenFile:
    """One safetensors file. Tensors reach host memory one by one."""
    by_name = {item.index.fqn: item for item in sorted(items, key=lambda item: item.index.fqn)}
    tensors = [
        TensorSpec(name, _data(item).properties.dtype, tuple(_data(item).chunk.sizes))
        for name, item in by_name.items()
    ]
    return write_safetensors(path, tensors, lambda tensor: [resolve(by_name[tensor.name])])


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans with `TensorPart`s; replicas and gaps are left to the default planner."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    MetadataIndex(name, part.offsets),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        part.box, TensorProperties(part.local.dtype), part.shape
                    ),
                )
                for name, part in self.state_dict.items()
                if part.local.numel()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(
        self,
        state_dict: dict[str, TensorPart],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored: Any = self.metadata.state_dict_metadata
        return LoadPlan(
            [
                item
                for name, part in self.state_dict.items()
                if part.local.numel()
                for item in create_read_items_for_chunk_list(name, stored[name], [part.box])
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class _TensorFilesReader(StorageReader):
    def __init__(self, folder: Path, stored: StoredTensors):
        self.folder, self.stored = folder, stored

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def read_metadata(self) -> Metadata:
        return self.stored.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        from safetensors import SafetensorError, safe_open

        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.stored.files[item.storage_index]].append(item)
        for file, items in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as tensors:
                    for item in items:
                        box = tuple(
                            slice(at, at + length)
                            for at, length in zip(item.storage_offsets, item.lengths, strict=True)
                        )
                        values, target = (
                            tensors.get_slice(item.storage_index.fqn)[box],
                            planner.resolve_tensor(item),
                        )
                        if values.shape != target.shape or values.dtype != target.dtype:
                            raise UserError(f"{item.storage_index.fqn} is not what {INDEX} says")
                        target.copy_(values)
                        planner.commit_tensor(item, target)
            except (OSError, ValueError, SafetensorError) as error:
                raise UserError(
                    f"{self.folder / file}: not readable ({error}); use another checkpoint"
                ) from None
        return _done(None)


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


@contextmanager
def _one_failure(distributed: bool) -> Iterator[None]:
    """Raise what the first failing rank met, instead of DCP's report of all ranks' tracebacks."""
    try:
        yield
    except CheckpointException as failure:
        rank, (error, _) = next(iter(failure.failures.items()))
        if not distributed or not isinstance(error, (OSError, ValueError)):
            raise error from None
        if isinstance(error, OSError):
            raise OSError(
                error.errno, f"{error.strerror or error} (rank {rank})", error.filename
            ) from None
        raise UserError(f"{error} (rank {rank})") from None
