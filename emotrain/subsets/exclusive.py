"""Checkpoints with exclusive experts added or removed: `emotrain experts` (spec 11).

A parameter of the new checkpoint is rows of the old one and, where experts are added, rows that
were made. Rows are read and written as they come, so that no more than a block of one parameter is
in memory. What a row was, it stays, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.config import Config, Counts, config_from_dict, config_to_dict
from emotrain.errors import UserError
from emotrain.interop.folder_tensors import BLOCK_BYTES
from emotrain.interop.import_folder import in_files, index_entry
from emotrain.model.initial import fill_normal
from emotrain.model.parts import layer_of, stored_tensors
from emotrain.model.subset import own_range
from emotrain.model.transformer import Transformer
from emotrain.progress import ProgressBar
from emotrain.staging import Staging
from emotrain.subsets.extraction import BY_EXPERT, check_batch
from emotrain.training.checkpoint import load_model, load_state, verified_model
from emotrain.training.checkpoint_folders import commit_checkpoint, find, read_config
from emotrain.training.safetensors_file import TensorSpec, write_safetensors
from emotrain.training.tensor_files import read_box
from emotrain.training.tensor_index import StoredTensors

INITS = ("random", "mean", "nearest")
NOISE = 0.1
"""Deviation of the noise that tells experts with one mean apart, as a share of the mean's own
deviation (spec 11.3). Without it they would get the same gradients for ever."""

MOST_NEW = 1 << 16
"""Experts that can be added at once."""

Sources = Sequence[Sequence[Sequence[int]]]
"""For each layer and new expert, the experts whose mean it begins as."""


@dataclass(frozen=True)
class Changed:
    """A checkpoint that was written."""

    path: Path
    exclusive: Counts
    experts_per_layer: tuple[int, ...]
    """Shared ones included."""
    parameters: int
    sources: Sources
    """What new experts were made of; none for random ones."""
    max_difference: float | None
    """Largest difference of a logit from the checkpoint before, of documents of no exclusive
    domain; None where it was not asked for."""


def add_experts(
    checkpoint: str | Path,
    out: str | Path,
    domain: str,
    count: int,
    *,
    sources: Callable[[], Sources | None] = lambda: None,
    seed: int | None = None,
    check: bool = False,
    bar: ProgressBar | None = None,
) -> Changed:
    """Write a checkpoint with `count` more experts in every layer, which are exclusive to a domain.

    Everything else is what it was. Training begins with a new optimizer.

    Args:
        sources: says, once everything else has been checked, what each new expert begins as, its
            row of the router too: a copy of one expert, or the mean of several with a little noise.
            None: the values that a new model with as many experts would begin with (spec 1.4).
        seed: of random values and noise; that of the checkpoint's training by default.
    Raises:
        UserError: a domain that has exclusive experts, a model that can have none, a damaged
            checkpoint, or a target that exists.
    """
    folder = find(checkpoint)
    config = read_config(folder)
    if not domain or not 1 <= count <= MOST_NEW:
        raise UserError(
            f"--domain {domain!r} --count {count}: give a name, and 1 to {MOST_NEW:,} experts"
        )
    if domain in dict(config.model.experts.exclusive):
        raise UserError(
            f"{folder}: has exclusive experts for {domain} already; remove those first, with "
            f"emotrain experts remove"
        )
    larger = with_exclusive(config, (*config.model.experts.exclusive, (domain, count)))
    seed = config.training.seed if seed is None else seed

    def filler(model: Transformer) -> _Filler:
        return _Filler(model, seed, sources())

    return _write(folder, config, larger, Path(out), domain, filler, check, bar)


def remove_experts(
    checkpoint: str | Path,
    out: str | Path,
    domain: str,
    *,
    check: bool = False,
    bar: ProgressBar | None = None,
) -> Changed:
    """Write a checkpoint without the exclusive experts of a domain.

    Raises:
        UserError: a domain that has none, a damaged checkpoint, or a target that exists.
    """
    folder = find(checkpoint)
    config = read_config(folder)
    exclusive = config.model.experts.exclusive
    if domain not in dict(exclusive):
        raise UserError(
            f"{folder}: has no exclusive experts for {domain!r}; it has them for "
            f"{', '.join(dict(exclusive)) or 'no domain'}"
        )
    smaller = with_exclusive(config, tuple(pair for pair in exclusive if pair[0] != domain))
    return _write(folder, config, smaller, Path(out), domain, None, check, bar)


def with_exclusive(config: Config, exclusive: Counts) -> Config:
    """The configuration with these exclusive experts, and as many common ones as before."""
    experts = config.model.experts
    more = sum(count for _, count in exclusive) - experts.num_exclusive
    experts = replace(
        experts,
        routed=experts.routed + more,
        routed_per_layer=tuple(routed + more for routed in experts.routed_per_layer),
        exclusive=exclusive,
    )
    changed = replace(config, model=replace(config.model, experts=experts))
    return config_from_dict(config_to_dict(changed))


@dataclass(frozen=True)
class _Filler:
    """The values of new experts."""

    model: Transformer
    """With them, on the meta device."""
    seed: int
    sources: Sources | None

    def row(self, name: str, layer: int, number: int, new: int, old: _Rows) -> Tensor:
        """The row of the expert `number`, the new one of index `new` -> [1, …]."""
        shape = stored_tensors(self.model)[name].shape
        row = torch.empty(1, *shape[1:])
        if self.sources is None:
            box = [number, *[0] * (len(shape) - 1)]
            self.model.fill(row, name, self.seed, box, shape)
            return row
        of_expert = self.sources[layer][new]
        total = sum(old.read(name, expert, expert + 1).double() for expert in of_expert)
        mean = torch.as_tensor(total).div(len(of_expert)).to(torch.float32)
        if len(of_expert) > 1 and mean.ndim > 1:
            deviation = NOISE * float(mean.std())
            fill_normal(row, self.seed, f"{name} noise of {number}", deviation)
            mean += row
        return mean


@dataclass(frozen=True)
class _Rows:
    """Rows of the parameters of a checkpoint."""

    folder: Path
    stored: StoredTensors

    def size(self, name: str) -> torch.Size:
        metadata: Any = self.stored.metadata.state_dict_metadata[name]
        return metadata.size

    def read(self, name: str, first: int, stop: int) -> Tensor:
        size = self.size(name)
        values = torch.empty(stop - first, *size[1:])
        return read_box(name, [first, *[0] * (len(size) - 1)], values, self.folder, self.stored)

    def blocks(self, name: str, first: int, stop: int) -> Iterator[Tensor]:
        """As `read`, a few rows at a time."""
        row_bytes = prod(self.size(name)[1:]) * torch.float32.itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(first, stop, step):
            yield self.read(name, start, min(stop, start + step))


def _write(
    folder: Path,
    config: Config,
    changed: Config,
    out: Path,
    domain: str,
    make_filler: Callable[[Transformer], _Filler] | None,
    check: bool,
    bar: ProgressBar | None,
) -> Changed:
    """Write the changed checkpoint: with the experts of a filler, or without those of `domain`."""
    with torch.device("meta"):
        model = Transformer(changed.model)
    specs = [
        TensorSpec(name, torch.float32, tuple(tensor.shape))
        for name, tensor in stored_tensors(model).items()
    ]
    num_bytes = sum(spec.num_bytes for spec in specs)
    bar = bar or ProgressBar(shown=False)
    with Staging(out, num_bytes) as staging:
        filler = None if make_filler is None else make_filler(model)
        _, stored = verified_model(folder, config)
        old, files = _Rows(folder, stored), []
        index: dict[str, Any] = {}

        def contents(spec: TensorSpec) -> Iterator[Tensor]:
            return _contents(spec.name, config, changed, domain, filler, old)

        bar.start("writing", num_bytes)
        for number, of_file in enumerate(in_files(specs)):
            name = f"model-{number:05d}.safetensors"
            file = staging.folder / name
            files.append(write_safetensors(file, of_file, contents, bar.advance))
            index |= {spec.name: index_entry(spec, name) for spec in of_file}
        state = load_state(folder)
        staging.commit(
            lambda: commit_checkpoint(
                staging.staged,
                files,
                {"tensors": index},
                changed,
                state,
                0,
                folder / "tokenizer.json",
            )
        )
    layers = range(changed.model.num_layers)
    return Changed(
        out,
        changed.model.experts.exclusive,
        tuple(map(changed.model.experts_in_layer, layers)),
        sum(parameter.numel() for parameter in model.parameters()),
        () if filler is None or filler.sources is None else filler.sources,
        max_difference(folder, out, domain) if check else None,
    )


def _contents(
    name: str, config: Config, changed: Config, domain: str, filler: _Filler | None, old: _Rows
) -> Iterator[Tensor]:
    """The values of a parameter of the changed checkpoint, in the order of its elements."""
    rows = old.size(name)[0]
    if not name.endswith(BY_EXPERT):
        yield from old.blocks(name, 0, rows)
        return
    layer = layer_of(name)
    routed = config.model.routed_in_layer(layer)
    if filler is None:
        own = own_range(config.model.experts.exclusive, routed, domain)
        yield from old.blocks(name, 0, own.start)
        yield from old.blocks(name, own.stop, rows)
        return
    yield from old.blocks(name, 0, routed)
    for new in range(dict(changed.model.experts.exclusive)[domain]):
        yield filler.row(name, layer, routed + new, new, old)
    # Of a router: shared experts come last.
    yield from old.blocks(name, routed, rows)


@torch.inference_mode()
def max_difference(before: Path, after: Path, domain: str) -> float:
    """Largest difference of a logit between two checkpoints on a few tokens of no exclusive domain,
    and of every one that both have, in fp32 on the CPU."""
    (config, old), (_, new) = load_model(before), load_model(after)
    batch = check_batch(old)
    worst = 0.0
    for name in ("", *dict(config.model.experts.exclusive)):
        if name != domain:
            of_domain = replace(batch, domain=name)
            pair = [model.logits(model(of_domain)) for model in (old, new)]
            worst = max(worst, float((pair[0] - pair[1]).abs().max()))
    return worst
