"""How the processes of a run are arranged. One equation, checked in one place:

    processes = replicate * shard        shard = ep * expert_dp

Every process has its own data. `shard` processes hold one copy of the model between them (FSDP2),
`replicate` copies exist (HSDP). Routed experts are spread over `ep` neighbouring processes first,
and each of those parts over the `expert_dp` that hold the same experts. The innermost axis is `ep`:
consecutive ranks, which launchers place on one node.

    8 processes, replicate=1, ep=4:    expert_dp 0 | 0 1 2 3
                                       expert_dp 1 | 4 5 6 7      (a row exchanges tokens)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emotrain.config import Config, ModelConfig
from emotrain.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes."""

    world_size: int
    replicate: int
    shard: int
    ep: int

    @property
    def expert_dp(self) -> int:
        """Processes of one copy of the model that hold the same routed experts."""
        return self.shard // self.ep

    @classmethod
    def of(cls, config: Config, world_size: int) -> Layout:
        """The layout that a configuration asks of this many processes.

        Raises:
            UserError: one that cannot be; names the equation that fails.
        """
        parallel, training = config.parallel, config.training
        shard = parallel.shard or world_size // parallel.replicate
        _require(
            parallel.replicate * shard == world_size,
            f"processes = replicate * shard fails: {world_size} != {parallel.replicate} * {shard}; "
            f"change parallel.replicate, parallel.shard or the number of processes",
        )
        _require(
            shard % parallel.ep == 0,
            f"shard = ep * expert_dp fails: parallel.ep={parallel.ep} does not divide "
            f"shard={shard}; choose a divisor",
        )
        layout = cls(world_size, parallel.replicate, shard, parallel.ep)
        if parallel.ep > 1:
            layout._check_experts(config.model)
        _require(
            training.global_batch % (training.micro_batch * world_size) == 0,
            f"training.global_batch={training.global_batch} is not a multiple of "
            f"training.micro_batch={training.micro_batch} x {world_size} processes; change one of "
            f"them",
        )
        return layout

    def shares_whole_experts(self, num_experts: int) -> bool:
        """Whether each of the `expert_dp` processes with the same routed experts of a layer keeps
        some of them whole, and not a part of the hidden width of every one.

        FSDP2 puts together again, in each gather and each reduction, what is cut along another axis
        than the first. Where expert_dp divides what most ranks of ep hold, these parts are also
        what torch says of them, equal shares of all experts that are each dealt out over ep.
        """
        return experts_of_rank(num_experts, self.ep, 0) % self.expert_dp == 0

    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        """Refuse a configuration that has no layout on this many processes, as `of` does."""
        cls.of(config, world_size)

    def _check_experts(self, model: ModelConfig) -> None:
        """Every rank must hold experts of every layer that has some, and an equal share of their
        hidden width."""
        for layer in range(model.num_layers):
            count = model.routed_in_layer(layer)
            # Whether the last rank gets an expert does not follow from a layer with fewer of them:
            # over 4 ranks 7 experts are 2, 2, 2, 1 and 9 are 3, 3, 3, 0.
            _require(
                experts_of_rank(count, self.ep, self.ep - 1) > 0,
                f"parallel.ep={self.ep} leaves ranks without any of the {count} routed experts of "
                f"layer {layer}; choose another parallel.ep",
            )
        _require(
            model.experts.hidden % self.expert_dp == 0,
            f"model.experts.hidden={model.experts.hidden} is not a multiple of "
            f"expert_dp={self.expert_dp} (shard / ep), over which each expert is cut; change "
            f"parallel.ep or parallel.shard",
        )


def experts_of_rank(num_experts: int, num_ranks: int, rank: int) -> int:
    """How many of a layer's experts a rank holds: ceil(num_experts / num_ranks) each, as
    torch.chunk deals them, and fewer or none on the last ranks."""
    per_rank = -(-num_experts // num_ranks)
    return max(0, min(per_rank, num_experts - rank * per_rank))


@dataclass(frozen=True)
class Holders:
    """Which processes hold the rows of a bank of routed experts. Every process of `group` has rows
    of all that it needs for a change of their order."""

    group: ProcessGroup
    rank_N: tuple[int, ...]
    """Rank in `group` of each position of the bank. Without an expert of its own, a rank is not
    there."""

    @classmethod
    def of(cls, meshes: Meshes, num_experts: int) -> Holders:
        """Where experts are cut along their hidden width, those of `ep` that exchange tokens have
        the same part of each: they hold whatever one of them needs. Else it is all processes of a
        copy of the model, (expert_dp, ep) by rank."""
        layout, ep = meshes.layout, meshes.layout.ep
        assert meshes.ep is not None
        whole = layout.shares_whole_experts(num_experts)
        parts = layout.expert_dp if whole else 1
        group = meshes.dense.get_group("shard") if whole else meshes.ep.get_group()
        return cls(
            group,
            tuple(
                part * ep + rank
                for rank in range(ep)
                for part in range(parts)
                for _ in range(experts_of_rank(experts_of_rank(num_experts, ep, rank), parts, part))
            ),
        )


@dataclass(frozen=True)
class Meshes:
    """The layout over this run's processes."""

    layout: Layout
    dense: DeviceMesh
    """Axes (replicate, shard), or shard alone with one copy: everything but routed experts is
    spread over `shard` and copied over `replicate`."""
    experts: DeviceMesh
    """Axes (replicate, expert_dp), or expert_dp alone: the same for this rank's routed experts."""
    ep: DeviceMesh | None
    """Axis ep: the processes that exchange tokens; None without expert parallelism."""


def build_meshes(layout: Layout, device_type: str, timeout_s: float | None = None) -> Meshes:
    """Process groups of a layout, with a limit on each of their collectives. Every process of
    the default group must call this."""
    from torch.distributed.device_mesh import init_device_mesh

    copies = {"replicate": layout.replicate} if layout.replicate > 1 else {}

    def mesh(**axes: int) -> DeviceMesh:
        axes = copies | axes
        made = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        if timeout_s is not None:
            limit_collectives(made.get_all_groups(), timeout_s)
        return made

    dense = mesh(shard=layout.shard)
    if layout.ep == 1:
        return Meshes(layout, dense, dense, None)
    whole = mesh(expert_dp=layout.expert_dp, ep=layout.ep)
    return Meshes(layout, dense, whole[(*copies, "expert_dp")], whole["ep"])


def limit_collectives(groups: Iterable[ProcessGroup], timeout_s: float) -> None:
    """Give groups the limit of the default group, which they do not take over from it."""
    from torch.distributed import get_backend

    from emotrain.distributed.joining import limit_of

    for group in groups:
        group.set_timeout(limit_of(get_backend(group), timeout_s))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
