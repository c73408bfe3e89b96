"""DeepSpeed as the engine of a run: ZeRO in place of FSDP2, with routed experts in DeepSpeed's
expert groups.

    stage 1, 2      any parallel.ep: routed experts are this rank's own, reduced over the ranks that
                    hold the same ones
    stage 3         parallel.ep=1: parameters are cut over all ranks, experts too

The loop, the losses, the model's start and the checkpoints are those of the native engine, and so
are the numbers. DeepSpeed would average gradients over ranks; losses here are divided by counts of
the whole global batch, so that gradients must be summed:

    stage 1, 2      gradient_allreduce_op=sum: nothing is divided, for dense parameters and for
                    experts
    stage 3         it always divides by the number of ranks; losses are multiplied by it before
    accumulation    scale_wrt_gas=False: losses are not divided by the number of micro-batches

Settings come from the configuration. The JSON file says the ZeRO stage and how DeepSpeed
communicates.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.distributed.dispatch import AllToAllDispatcher
from emotrain.distributed.joining import limit_of
from emotrain.distributed.mesh import Layout, limit_collectives
from emotrain.distributed.parallelize import parallelize
from emotrain.distributed.ranks import Ranks
from emotrain.errors import MissingPackageError, UserError
from emotrain.model.losses import language_model_sums
from emotrain.model.report import LossSums, RoutingReport
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Block, Transformer
from emotrain.training import checkpoint
from emotrain.training.deepspeed_options import (
    asks_for_reports,
    check_bucket,
    check_memory,
    read_options,
)
from emotrain.training.engine import Phase, part, spreading
from emotrain.training.engine_protocol import Update
from emotrain.training.optimizer import build_optimizer
from emotrain.training.tensor_index import TensorPart

OLDEST, TOO_NEW = (0, 19, 8), (0, 20)
"""DeepSpeed releases whose treatment of gradients is known."""
INSTALL = "pip install 'emotrain[deepspeed]'"


class DeepSpeedEngine:
    """As `training.engine.Engine`, by DeepSpeed. The model's parameters keep their names; of
    routed experts it holds this rank's."""

    def __init__(self, options: str | Path, config: Config, ranks: Ranks, fresh: bool):
        """
        Args:
            options: the JSON file; see `read_options` for its errors.
            fresh: whether the model gets its initial values, or waits for those of a checkpoint.

        Raises:
            MissingPackageError: DeepSpeed is not installed. UserError: a release that is not
                known; a layout that cannot be; a model that a GPU cannot hold; processes without a
                launcher.
        """
        settings = read_options(options, config, ranks.world_size)
        layout = Layout.of(config, ranks.world_size)
        if ranks.device.type == "cuda":
            gpu_bytes = torch.cuda.get_device_properties(ranks.device).total_memory
            check_memory(config, settings["zero_optimization"]["stage"], gpu_bytes)
        deepspeed = _import_deepspeed(ranks, asks_for_reports(settings))
        self.config, self.ranks, self.stage = config, ranks, settings["zero_optimization"]["stage"]
        timeout_s = config.training.collective_timeout_s
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(
            dist_backend=backend, verbose=False, timeout=limit_of(backend, timeout_s)
        )
        self._experts = _ExpertGroups(layout.ep) if layout.ep > 1 else None
        self._everyone = _limit_groups(self._experts, timeout_s)
        self.model = _build_model(config, ranks.device, self._experts, fresh)
        if self._experts is not None:
            bucket = settings["zero_optimization"]["reduce_bucket_size"]
            sizes = [p.numel() for p in self.model.parameters()]
            share = [p.numel() for p in self.model.parameters() if _is_spread(p)]
            check_bucket(bucket, *zip(*ranks.gather((share, sum(sizes))), strict=True))
        optimizer = build_optimizer(self.model, config.optimizer)
        _regroup(optimizer)
        wrapped = _WithLosses(self.model, config, ranks.device.type)
        if self._experts is not None:
            wrapped.marker = _expert_marker(config)
        if self.stage == 3:
            # Blocks are gathered whole: within them tensors travel in dataclasses, which
            # DeepSpeed's hooks do not look into.
            deepspeed.utils.set_z3_leaf_modules(wrapped, [Block])
        self._engine, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=settings)
        assert self.stage == 3 or not self._engine.gradient_average
        self.optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        """AdamW over this rank's flat partitions."""

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def start_step(self) -> None:
        """DeepSpeed has dropped the gradients of the step before."""

    def forward(
        self, batch: PackedBatch, request: RoutingRequest, z_weight: float
    ) -> tuple[LossSums, RoutingReport]:
        sums, report = self._engine(batch, request, z_weight)
        return LossSums(*sums), report

    def backward(self, loss: Tensor, is_last: bool) -> None:
        if self.stage == 3:
            loss = loss * self.ranks.world_size
        self._engine.set_gradient_accumulation_boundary(is_last)
        # What a forward pass does for the backward pass that follows; here several may lie between.
        self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(spreading(loss), scale_wrt_gas=False)

    def finish_step(self, max_norm: float, ranks: Ranks) -> Update:
        """As every engine; DeepSpeed clips to the norm of its own settings, which `read_options`
        makes the same."""
        with part(Phase.CLIPPING_AND_OPTIMIZER):
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return Update(norm, math.isfinite(norm))

    def save(
        self,
        writer: checkpoint.CheckpointWriter,
        config: Config,
        state: checkpoint.TrainingState,
        tokenizer: Path,
    ) -> None:
        """Write a checkpoint that any layout and the native engine go on from."""
        num_updates = self._num_updates()
        self._link_moments()
        writer.save_parts(
            dict(self._parts(checkpoint.MOMENTS if num_updates else ())),
            num_updates,
            config,
            state,
            tokenizer,
        )

    def restore(self, path: Path, weights_only: bool = False) -> checkpoint.TrainingState:
        """Load a checkpoint of any layout and engine. Host memory must hold the moments of all
        parameters of this rank."""
        values: dict[str, dict[str, Tensor]] = {}

        def wanted(num_updates: int) -> dict[str, TensorPart]:
            parts: dict[str, TensorPart] = {}
            kinds = checkpoint.MOMENTS if num_updates and not weights_only else ()
            for name, parameter in self.model.named_parameters():
                shape = getattr(parameter, "ds_shape", parameter.shape)
                values[name] = {"": parameter.detach() if self.stage < 3 else torch.empty(shape)}
                values[name] |= {moment: torch.empty(shape) for moment in kinds}
                parts |= {
                    f"{moment}.{name}" if moment else name: self._part(name, tensor)
                    for moment, tensor in values[name].items()
                }
            return parts

        state, num_updates = checkpoint.restore_parts(path, wanted)
        zero = self._engine.optimizer
        self.optimizer.state.clear()
        if num_updates and not weights_only:
            for flat in (
                zero.single_partition_of_fp32_groups
                if self.stage < 3
                else zero.fp32_partitioned_groups_flat
            ):
                step = torch.tensor(float(num_updates), device=flat.device)
                self.optimizer.state[flat] = {
                    "step": step,
                    **{moment: torch.zeros_like(flat) for moment in checkpoint.MOMENTS},
                }
        if self.stage < 3:
            zero.refresh_fp32_params()
        self._link_moments()
        for name, parameter in self.model.named_parameters():
            self._take(parameter, values.pop(name))
        return state

    def _take(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Put this rank's share of a whole parameter ("") and its moments where DeepSpeed keeps
        them."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import (
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        whole = values.pop("")
        if self.stage < 3:
            for moment, tensor in values.items():
                safe_set_full_optimizer_state(parameter, tensor.to(parameter.device), moment)
            return
        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(whole)
        size: int = getattr(parameter, "partition_numel")()  # noqa: B009 - of DeepSpeed

        def share(tensor: Tensor) -> Tensor:
            padded = tensor.new_zeros(size * self.ranks.world_size)
            padded[: tensor.numel()] = tensor.flatten()
            return padded.narrow(0, size * self.ranks.rank, size).to(parameter.device)

        safe_set_local_fp32_param(parameter, share(whole))
        for moment, tensor in values.items():
            safe_set_local_optimizer_state(parameter, share(tensor), moment)

    def _link_moments(self) -> None:
        """Tell DeepSpeed where the moments of each parameter are. It does so itself after the first
        update of the first parameter group, when there are none of the others yet, and never
        again."""
        if self.stage < 3 and self.optimizer.state:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _num_updates(self) -> int:
        state = self.optimizer.state
        return int(next(iter(state.values()))["step"]) if state else 0

    def _parts(self, moments: tuple[str, ...]) -> Iterator[tuple[str, TensorPart]]:
        """This rank's share of parameters and moments. What is gathered for it stays on one
        rank, by turns, in host memory."""
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
        )

        for index, (name, parameter) in enumerate(self.model.named_parameters()):
            group = self._group_of(parameter)
            gathered = {
                f"{moment}.{name}": safe_get_full_optimizer_state(parameter, moment)
                for moment in moments
            }
            if self.stage == 3:
                gathered[name] = safe_get_full_fp32_param(parameter)
            else:
                yield name, self._part(name, parameter.detach())
            if index % group.size() == group.rank():
                for key, tensor in gathered.items():
                    yield key, self._part(name, tensor.cpu())

    def _group_of(self, parameter: nn.Parameter) -> dist.ProcessGroup:
        """The ranks that a parameter is cut over."""
        if self._experts is not None and _is_spread(parameter):
            return self._experts.data_parallel
        return self._everyone

    def _part(self, name: str, local: Tensor) -> TensorPart:
        """The place of a parameter (or moment) of this rank in the whole one."""
        if self._experts is None or (layer := _expert_layer(name)) is None:
            return TensorPart.of(local)
        num_experts = self.config.model.routed_in_layer(layer)
        dispatcher = cast(AllToAllDispatcher, self.model.blocks[layer].moe.dispatcher)
        offsets = [self._experts.exchange.rank() * dispatcher.per_rank] + [0] * (local.ndim - 1)
        return TensorPart(local, torch.Size(offsets), torch.Size([num_experts, *local.shape[1:]]))


class _WithLosses(nn.Module):
    """The model up to its loss sums: DeepSpeed wants every use of a parameter inside of one forward
    pass, which returns tensors in a tuple, and turns off an autocast that it did not make."""

    def __init__(self, model: Transformer, config: Config, device_type: str):
        super().__init__()
        self.model = model
        self.autocast = (
            torch.autocast(device_type, torch.bfloat16)
            if config.training.uses_bfloat16(device_type)
            else nullcontext()
        )

    def forward(
        self, batch: PackedBatch, request: RoutingRequest, z_weight: float
    ) -> tuple[tuple[Tensor, ...], RoutingReport]:
        with self.autocast:
            output = self.model(batch, request)
            backend = self.model.config.experts.backend
            sums = language_model_sums(output, self.model.head, batch, z_weight, backend)
        tensors = (sums.lm, sums.cross_entropy, sums.z, sums.num_targets, sums.by_source)
        return tuple(tensor for tensor in tensors if tensor is not None), output.routing


class _ExpertGroups:
    """DeepSpeed's groups of processes for experts: neighbouring ranks exchange tokens."""

    def __init__(self, ep: int):
        from deepspeed.utils import groups

        groups._create_expert_and_data_parallel(ep)
        self.name = f"ep_size_{ep}"
        self.exchange: dist.ProcessGroup = groups._get_expert_parallel_group(self.name)
        self.data_parallel: dist.ProcessGroup = groups._get_expert_data_parallel_group(self.name)


def _limit_groups(experts: _ExpertGroups | None, timeout_s: float) -> dist.ProcessGroup:
    """Give every group that DeepSpeed communicates in a name and the limit of the run's
    collectives, before the first of them: it makes groups without. Returns that of all ranks."""
    from deepspeed.utils import groups

    everyone: dist.ProcessGroup = groups._get_data_parallel_group()
    named = {"data_parallel": everyone}
    if experts is not None:
        named["expert_exchange"] = experts.exchange
        named["expert_data_parallel"] = experts.data_parallel
    for name, group in named.items():
        group._set_group_desc(name)
    limit_collectives(named.values(), timeout_s)
    return everyone


def _import_deepspeed(ranks: Ranks, reports: bool) -> Any:
    """The package, told what this project knows already. `reports`: whether it shall say what it
    is doing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingPackageError(f"--deepspeed needs DeepSpeed, which is not installed; {INSTALL}")
    version = importlib.metadata.version("deepspeed")
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not OLDEST <= release < TOO_NEW:
        raise UserError(
            f"deepspeed=={version}: gradients are known to be right with 0.19.8 and later of "
            f"0.19; {INSTALL}"
        )
    launched = dist.is_initialized() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    if not launched:
        raise UserError(
            "--deepspeed needs a launcher of processes; start with `deepspeed launch/pretrain.py "
            "CONFIG --deepspeed JSON`"
        )
    # Otherwise it takes a GPU that is there, whatever training.device says.
    os.environ["DS_ACCELERATOR"] = ranks.device.type
    import deepspeed

    # Of use for inference alone, and minutes of g++ at the first start on a CPU. The list is read
    # for it alone; to be asked, it would run compilers in every process to find what others need.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.INFO if reports else logging.WARNING)
    for handler in logger.handlers:
        handler.setLevel(logger.level)
        # Its own writes to stdout, where results go.
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)
    return deepspeed


def _build_model(
    config: Config, device: torch.device, groups: _ExpertGroups | None, fresh: bool
) -> Transformer:
    """The model with this rank's experts; where `fresh`, the very values that one process would
    have."""
    with torch.device("meta"):
        model = Transformer(config.model)
        shapes = [parameter.shape for parameter in model.parameters()]
        if groups is not None:
            _spread_experts(model, config, groups)
    model.to_empty(device=device)
    for (name, parameter), shape in zip(model.named_parameters(), shapes, strict=True):
        offsets = [0] * len(shape)
        if groups is not None and (layer := _expert_layer(name)) is not None:
            dispatcher = cast(AllToAllDispatcher, model.blocks[layer].moe.dispatcher)
            offsets[0] = groups.exchange.rank() * dispatcher.per_rank
            # How DeepSpeed knows experts, and the ranks that hold the same ones.
            setattr(parameter, "allreduce", False)  # noqa: B010 - an attribute of DeepSpeed's
            setattr(parameter, "group_name", groups.name)  # noqa: B010
        if fresh:
            model.fill(parameter.data, name, config.training.seed, offsets, shape)
    return parallelize(model, config)


def _spread_experts(model: Transformer, config: Config, groups: _ExpertGroups) -> None:
    """Give this rank its part of every layer's routed experts, and dispatchers that take tokens
    to the others'."""
    for layer, block in enumerate(model.blocks):
        if block.moe.experts is None:
            continue
        dispatcher = AllToAllDispatcher(
            groups.exchange, config.model.routed_in_layer(layer), config.model.experts.backend
        )
        block.moe.dispatcher = dispatcher
        # Layers of a bank have one module, which gets the same share again.
        for name, parameter in list(block.moe.experts.named_parameters()):
            setattr(
                block.moe.experts,
                name,
                nn.Parameter(parameter.new_empty(dispatcher.num_local, *parameter.shape[1:])),
            )


def _regroup(optimizer: torch.optim.Optimizer) -> None:
    """Put experts into parameter groups of their own, as DeepSpeed wants them."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    named = [
        {**group, "name": f"group {index}"} for index, group in enumerate(optimizer.param_groups)
    ]
    # Without a largest size: ranks with fewer experts must not end up with fewer groups.
    split = split_params_into_different_moe_groups_for_optimizer(named, max_group_size=None)
    optimizer.param_groups[:] = [group for group in split if group["params"]]


def _expert_marker(config: Config) -> nn.Module:
    """An empty module that tells DeepSpeed of experts: it looks for its own layer, no other sign
    turns their groups on."""
    from deepspeed.moe.layer import MoE

    class HasExperts(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = config.model.experts.routed

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """Its groups are made before."""

    return HasExperts()


def _is_spread(parameter: Tensor) -> bool:
    """Whether a parameter is of experts that this rank shares with some ranks only."""
    return not getattr(parameter, "allreduce", True)


def _expert_layer(name: str) -> int | None:
    """The layer of a parameter of routed experts, from its name."""
    match = re.fullmatch(r"blocks\.(\d+)\.moe\.experts\.\w+", name)
    return int(match[1]) if match else None
