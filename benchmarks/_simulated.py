"""Metadata of runs of published size, without their bytes: an index of 10^12 tokens, a checkpoint
of 1,024 ranks. For `scaling.py`.

What is measured in a process of its own is a function here that returns what JSON can hold; see
`in_fresh_process`.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emotrain.data.manifest import ShardInfo, write_manifest
from emotrain.data.shards import write_shard

if TYPE_CHECKING:
    from emotrain.config import Config
    from emotrain.distributed.mesh import Layout
    from emotrain.training.tensor_index import TensorPart

VOCABULARY, EOS = 100278, 100257
"""Of the published tokenizer: more than 2^16, so that a token takes four bytes."""
HOLE_BYTES = 2**20
"""Runs of zero bytes of this length are left out of the files."""


def in_fresh_process(function: str, **arguments: Any) -> dict[str, Any]:
    """Call a function of this file in a new interpreter."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import _simulated; "
        f"print(json.dumps(_simulated.{function}(**json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{function}({arguments}) failed in a process of its own; its error stands above"
        )
    return json.loads(done.stdout.splitlines()[-1])


class Watch:
    """Seconds, peak memory above that at the beginning, and bytes read, of a stretch of a
    process. Linux only."""

    def __init__(self) -> None:
        # Forgets the peak so far (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.resident, self.read = _status()["VmRSS"], _bytes_read()
        self.started, self.worked = time.perf_counter(), time.process_time()

    def so_far(self, prefix: str) -> dict[str, float]:
        seconds, worked, status, read = (
            time.perf_counter() - self.started,
            time.process_time() - self.worked,
            _status(),
            _bytes_read(),
        )
        return {
            f"{prefix}_seconds": seconds,
            f"{prefix}_cpu_seconds": worked,
            f"{prefix}_peak_mib": (status["VmHWM"] - self.resident) / 1024,
            f"{prefix}_read_bytes": read["rchar"] - self.read["rchar"],
            f"{prefix}_disk_bytes": read["read_bytes"] - self.read["read_bytes"],
        }


def start_loader(
    folder: str,
    sequence_length: int,
    first_step: int,
    steps: int,
    global_batch: int,
    sequences: int,
    packing: str = "concat",
) -> dict[str, float]:
    """Open a data set and read the first batches of a rank in the middle. `first_batch_...`
    counts from the start as `start_...` does."""
    import pyarrow.ipc  # noqa: F401  (a library, which the first shard would import)

    from emotrain.data.opening import open_loader

    imported, ranks = _seconds_alive(), global_batch // sequences
    watch = Watch()
    loader = open_loader(folder, sequence_length, seed=0, packing=packing)
    assert loader.fingerprint
    result = {
        "import_seconds": imported,
        "import_resident_mib": watch.resident / 1024,
        **watch.so_far("start"),
    }
    loader.step(first_step, global_batch, sequences, ranks // 2, ranks)
    result |= watch.so_far("first_batch") | {
        "total_seconds": _seconds_alive(),
        "total_peak_mib": _status()["VmHWM"] / 1024,
    }
    seconds = []
    for step in range(first_step + 1, first_step + 1 + steps):
        started = time.perf_counter()
        loader.step(step, global_batch, sequences, ranks // 2, ranks)
        seconds.append(time.perf_counter() - started)
    return result | {
        "step_seconds": sum(seconds) / max(1, len(seconds)),
        "steps_peak_mib": watch.so_far("x")["x_peak_mib"],
    }


def start_meshes(config: str, settings: list[str], world_size: int) -> dict[str, float]:
    """Process groups and plan of a rank on a fake process group: what it computes by itself,
    without the others' answers."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from emotrain.config import load_config
    from emotrain.distributed.mesh import Layout, build_meshes
    from emotrain.distributed.parallelize import parallelize
    from emotrain.model.transformer import Transformer

    imported = _seconds_alive()
    configured = load_config(config, settings)
    layout = Layout.of(configured, world_size)
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    watch = Watch()
    meshes = build_meshes(layout, "cpu")
    result = {"import_seconds": imported, **watch.so_far("meshes")}
    with torch.device("meta"):
        model = Transformer(configured.model)
    watch = Watch()
    parallelize(model, configured, meshes)
    return result | watch.so_far("parallelize")


def draw_initial_values(config: str, numbers: int) -> dict[str, float]:
    """Initial values that one thread makes in a second of processor time, from `numbers` of them
    in turn with torch's own rejection sampling, and how many a model has."""
    import torch

    from emotrain.config import load_config
    from emotrain.model.initial import fill_normal
    from emotrain.model.transformer import Transformer

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = Transformer(load_config(config).model)
    total = sum(parameter.numel() for parameter in model.parameters())
    values, generator = torch.empty(-(-numbers // 1024), 1024), torch.Generator()
    ways = {
        "ours": lambda: fill_normal(values, 0, "weight", 0.02),
        "torch": lambda: torch.nn.init.trunc_normal_(
            values, 0.0, 0.02, -0.06, 0.06, generator=generator
        ),
    }
    seconds = {name: float("inf") for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name] = min(seconds[name], time.process_time() - started)
    rate = values.numel() / seconds["ours"]
    return {
        "numbers": values.numel(),
        "numbers_per_cpu_second": rate,
        "of_torch": seconds["torch"] / seconds["ours"],
        "all_numbers": total,
        "cpu_seconds": total / rate,
    }


def save_metadata(
    config: str, settings: list[str], world_size: int, folder: str
) -> dict[str, float]:
    """What the first rank does for a checkpoint of `world_size` ranks besides its own tensors: the
    plan of all, the index, the manifest.

    The ranks' tensor files are holes of the right size; their checksums are invented.
    """
    from torch.distributed.checkpoint.storage import WriteResult

    from emotrain.folders import StagedFolder
    from emotrain.training.checkpoint import TrainingState
    from emotrain.training.checkpoint_folders import commit_checkpoint
    from emotrain.training.tensor_files import (
        TensorFilesWriter,
        WrittenFile,
        _data,
        _item_bytes,
        _SavePlanner,
    )
    from emotrain.training.tensor_index import stem_of

    configured, ranks = _parts(config, settings, world_size)
    planner = _SavePlanner()
    pickled: list[bytes] = []
    for parts in ranks:
        planner.set_up_planner(parts, is_coordinator=True)
        pickled.append(pickle.dumps(planner.create_local_plan()))
    state = TrainingState(1, 1, "0" * 16, 0, 1024, 0.0)
    staged = StagedFolder(Path(folder) / "checkpoints/step-00000001")
    staged.make()

    def commit(files: list[WrittenFile], index: dict[str, Any]) -> None:
        commit_checkpoint(staged, files, index, configured, state, 1, None)

    watch = Watch()
    # Plans come to the first rank pickled (torch.distributed.gather_object).
    plans, metadata = planner.create_global_plan([pickle.loads(plan) for plan in pickled])
    result = watch.so_far("plan") | {"parts": sum(len(plan.items) for plan in plans)}
    results, num_bytes = [], 0
    for rank, plan in enumerate(plans):
        sizes: dict[str, int] = defaultdict(int)
        for item in plan.items:
            sizes[stem_of(item.index.fqn)] += _item_bytes(item)
        files = {
            stem: WrittenFile(f"{stem}-{rank:05d}.safetensors", size, f"{rank:064x}")
            for stem, size in sizes.items()
        }
        for file in files.values():
            with open(staged.path / file.name, "wb") as stream:
                stream.truncate(file.bytes)
        num_bytes += sum(sizes.values())
        results.append(
            [
                WriteResult(
                    item.index,
                    _item_bytes(item),
                    (files[stem_of(item.index.fqn)], _data(item).chunk.sizes),
                )
                for item in plan.items
            ]
        )
    watch = Watch()
    TensorFilesWriter(staged.path, lambda _: None, commit).finish(metadata, results)
    result |= watch.so_far("write")
    of_metadata = [
        file.stat().st_size for file in staged.target.iterdir() if file.suffix != ".safetensors"
    ]
    return result | {
        "metadata_bytes": sum(of_metadata),
        "tensor_bytes": num_bytes,
        "files": len(list(staged.target.iterdir())),
    }


def load_metadata(
    config: str, settings: list[str], world_size: int, folder: str
) -> dict[str, float]:
    """What every rank does to load such a checkpoint besides reading tensors: check the list of
    files and the index, plan its reads."""
    from emotrain.training.checkpoint import verify
    from emotrain.training.tensor_files import _LoadPlanner

    own = next(_parts(config, settings, world_size)[1])
    watch = Watch()
    stored = verify(Path(folder) / "checkpoints/step-00000001", lambda names: [])
    result = watch.so_far("read")
    assert stored.mismatch(own) is None
    watch = Watch()
    planner = _LoadPlanner()
    planner.set_up_planner(own, stored.metadata)
    return result | {"reads": len(planner.create_local_plan().items)} | watch.so_far("load_plan")


def write_shards(
    folder: Path, shard_tokens: int, mean_document: int, distinct: int
) -> list[ShardInfo]:
    """`distinct` whole shards with exponential document lengths, by `write_shard`. All token ids
    are 0, and holes in the file."""
    (folder / "train").mkdir(parents=True)
    rng, infos = np.random.default_rng(0), []
    for number in range(distinct):
        lengths = np.maximum(
            1, rng.exponential(mean_document, 100 + int(1.2 * shard_tokens / mean_document))
        ).astype(np.int64)
        ends = np.cumsum(lengths)
        offsets = np.concatenate([[0], ends[ends < shard_tokens], [shard_tokens]])
        path = folder / "train" / f"distinct-{number:05d}.arrow"
        sources = [f"part-{number:05d}.jsonl.zst:{row}" for row in range(len(offsets) - 1)]
        infos.append(
            write_shard(
                path, np.zeros(shard_tokens, np.uint32), offsets, ["web"] * len(sources), sources
            )
        )
        _make_sparse(path)
    return infos


def link_index(
    shards_folder: Path, infos: Sequence[ShardInfo], folder: Path, num_shards: int
) -> dict[str, int]:
    """A data set of `num_shards` shards, hard links to those of `write_shards` in turn. Returns
    its size, by what is counted."""
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
    shards = []
    for number in range(num_shards):
        info = infos[number % len(infos)]
        shards.append(replace(info, file=f"train/shard-{number:05d}.arrow"))
        os.link(shards_folder / info.file, folder / shards[-1].file)
    counts = {
        "documents": sum(info.documents for info in shards),
        "tokens": sum(info.tokens for info in shards),
    }
    write_manifest(
        folder,
        vocab_size=VOCABULARY,
        eos_id=EOS,
        eos_token="<eos>",
        skipped_documents={},
        settings={},
        splits={
            "train": {"shards": shards, "domains": {"web": counts}},
            "valid": {"shards": [], "domains": {}},
        },
    )
    return {
        **counts,
        "shards": num_shards,
        "manifest_bytes": (folder / "dataset.json").stat().st_size,
    }


def forget_pages(folder: Path) -> None:
    """Drop a data set's files from the page cache, so that they are read from the disk again."""
    for path in [folder / "dataset.json", *folder.glob("train/*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def parts_of_ranks(config: Config, layout: Layout) -> Iterator[dict[str, TensorPart]]:
    """For each rank of a layout what it would put into a checkpoint: parameters and AdamW's
    moments, on the meta device.

    The real plan is made for rank 0 on a fake process group; the boxes of the other ranks follow
    from its placements.
    """
    import torch
    from torch.distributed.tensor._utils import (
        _compute_local_shape_and_global_offset as box_of,
    )

    from emotrain.distributed.mesh import build_meshes
    from emotrain.distributed.parallelize import parallelize
    from emotrain.model.transformer import Transformer
    from emotrain.training.checkpoint import MOMENTS
    from emotrain.training.tensor_index import TensorPart

    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, config, build_meshes(layout, "cpu"))
    of_mesh: dict[Any, list[Any]] = defaultdict(list)
    parameters: Any = model.named_parameters()
    for name, parameter in parameters:
        of_mesh[parameter.device_mesh].append((name, parameter.shape, parameter.placements))
    coordinates = {mesh: np.argwhere(np.ones(mesh.shape, dtype=bool)) for mesh in of_mesh}
    for rank in range(layout.world_size):
        parts: dict[str, Any] = {}
        for mesh, tensors in of_mesh.items():
            # Ranks count through each mesh with its last axis fastest.
            coordinate = coordinates[mesh][rank % len(coordinates[mesh])].tolist()
            alike: dict[Any, TensorPart] = {}
            for name, shape, placements in tensors:
                if (shape, placements) not in alike:
                    local, offsets = box_of(shape, mesh.shape, coordinate, placements)
                    alike[shape, placements] = TensorPart(
                        torch.empty(local, device="meta"), torch.Size(offsets), shape
                    )
                parts |= dict.fromkeys(
                    [name, *(f"{moment}.{name}" for moment in MOMENTS)], alike[shape, placements]
                )
        yield parts


def _parts(
    config: str, settings: list[str], world_size: int
) -> tuple[Config, Iterator[dict[str, TensorPart]]]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from emotrain.config import load_config
    from emotrain.distributed.mesh import Layout

    configured = load_config(config, settings)
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    return configured, parts_of_ranks(configured, Layout.of(configured, world_size))


def _seconds_alive() -> float:
    """Since this process was started, to 10 ms."""
    started = int(
        Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19]
    )
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _status() -> dict[str, int]:
    """Memory of this process, in KiB."""
    lines = (
        line.split()
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("Vm")
    )
    return {name.rstrip(":"): int(value) for name, value, *_ in lines}


def _bytes_read() -> dict[str, int]:
    """Bytes that this process has asked for by read calls (`rchar`), and those that came from a
    disk, mapped pages too (`read_bytes`)."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _make_sparse(path: Path) -> None:
    copy = path.with_suffix(".sparse")
    with open(path, "rb") as source, open(copy, "wb") as target:
        while piece := source.read(HOLE_BYTES):
            if piece.count(0) == len(piece):
                target.seek(len(piece), os.SEEK_CUR)
            else:
                target.write(piece)
        target.truncate()
    os.replace(copy, path)
