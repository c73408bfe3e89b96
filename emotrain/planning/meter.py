"""What a piece of PyTorch code does to one device: memory by kind, kernels by part of the model,
collectives by axis.

A `Meter` sees every operator that runs inside it, in forward, backward and optimizer, on real
tensors or on fake ones that have no data. It follows storages from their allocation to their end;
torch's own MemTracker does so too, but refuses a model that is called several times a step, which
is what gradient accumulation does.
"""

from __future__ import annotations

import bisect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from emotrain.planning.operands import (
    FLOPS,
    MOVES_NOTHING,
    bytes_moved,
    first_dtype,
    nbytes,
    serial_additions,
    tensors,
)
from emotrain.planning.parts import Memory, Part
from emotrain.planning.trace import Collective, Kernel, Trace
from emotrain.training.engine import Phase, record_phases

COLLECTIVES = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "broadcast": "broadcast",
}
"""Start of an operator's name in torch's collective namespaces, without underscores in front ->
kind."""

MADE_IN = {
    Phase.BACKWARD: Memory.BACKWARD,
    Phase.RECOMPUTE: Memory.RECOMPUTED,
    Phase.CLIPPING: Memory.OPTIMIZER,
    Phase.OPTIMIZER: Memory.OPTIMIZER,
}
"""Kind of what a phase allocates; in the other phases, activations."""


class _Block:
    """Memory of one storage from one size to the next."""

    __slots__ = ("born", "bytes", "died", "kind")

    def __init__(self, size: int, kind: Memory, born: int):
        self.bytes, self.kind, self.born, self.died = size, kind, born, -1


class Meter(TorchDispatchMode):
    """Measures what runs inside `with meter:`. The phases of a step are those that training's
    engine names; backward and what it computes again are told apart without help.

    Args:
        parts: part of the model by class of a module; a module without an entry belongs to the part
            around it.
        axes: axis by name of a process group.
        granularity: allocations are rounded up to this many bytes (512 for the CUDA allocator).
    """

    def __init__(
        self,
        parts: Mapping[type[nn.Module], Part] | None = None,
        axes: Mapping[str, str] | None = None,
        granularity: int = 1,
    ):
        super().__init__()
        self.parts, self.axes, self.granularity = parts or {}, axes or {}, granularity
        self.trace = Trace()
        self._axis_of: dict[str, str] = {}
        self.formulas: dict[str, Callable[..., int]] = dict(FLOPS)
        self.phase = Phase.OTHER
        self._blocks: list[_Block] = []
        self._live: dict[int, tuple[weakref.ref, _Block]] = {}
        self._now = self._bytes = self.peak_bytes = self._peak_time = 0
        self._recorded = 0
        self._stack: list[Part] = []
        # Autograd numbers its nodes as they are made: the part of the model that made a node is
        # that of the last entry not above it.
        self._part_from: list[tuple[int, Part]] = [(0, Part.OTHER)]
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = original(storage, size)
            self._resized(storage)
            return result

        # FSDP2 frees and brings back gathered parameters by resizing their storages, which is no
        # operator.
        setattr(torch.UntypedStorage, "resize_", resize_)  # noqa: B010 - mypy: a method
        self._exits.callback(setattr, torch.UntypedStorage, "resize_", original)
        self._leave_out_propagation()
        self._exits.callback(record_phases, None)
        record_phases(lambda name: self.during(Phase(name)))
        self._exits.callback(register_module_forward_pre_hook(self._enter_module).remove)
        self._exits.callback(
            register_module_forward_hook(self._leave_module, always_call=True).remove
        )
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._exits.close()

    def _leave_out_propagation(self) -> None:
        """DTensor finds shapes by operators on stand-ins of whole parameters, which are no work of
        a step. torch 2.11 and 2.12 do so at every fused update, 2.13 once before."""
        from torch.distributed.tensor._sharding_prop import ShardingPropagator

        name = "_propagate_tensor_meta_non_cached"
        original = getattr(ShardingPropagator, name)

        def unseen(propagator: ShardingPropagator, schema: Any) -> Any:
            with _disable_current_modes():
                return original(propagator, schema)

        setattr(ShardingPropagator, name, unseen)
        self._exits.callback(setattr, ShardingPropagator, name, original)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls again with the tensors of this rank.
        kwargs = kwargs or {}
        recorded = self._recorded
        result = func(*args, **kwargs)
        outputs = tensors(result)
        for tensor in outputs:
            self.follow(tensor)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._collective(func, args, kwargs, outputs)
        elif (
            func.namespace != "prim"
            # An operator whose own launches were recorded is no kernel besides them.
            and self._recorded == recorded
            and not func.is_view
            and (name := func._opname) not in MOVES_NOTHING
        ):
            self._kernel(func, name, args, kwargs, result, outputs)
        return result

    def follow(self, tensor: Tensor, kind: Memory | None = None) -> None:
        """Count a tensor's storage, and call it `kind` from now on and at the peak."""
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None and known[0]() is storage:
            if kind is not None:
                known[1].kind = kind
            return
        block = self._born(storage.nbytes(), kind or self._kind())
        key = storage._cdata
        self._live[key] = (weakref.ref(storage, partial(self._ended, key)), block)

    def record(
        self,
        name: str,
        dtype: torch.dtype,
        flops: float,
        size: float,
        part: Part | None = None,
        launches: int = 1,
        ours: bool = False,
    ) -> None:
        """Count kernels that no operator stands for."""
        kernel = Kernel(
            name,
            part or self.part,
            self._current_phase(),
            dtype,
            int(flops / launches),
            int(size / launches),
            ours,
        )
        for _ in range(launches):
            self.trace.kernel(kernel)
        self._recorded += 1

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Name the phase that runs within this context."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def inside(self, part: Part) -> Iterator[None]:
        """Name a part of the model that is no module."""
        self._stack.append(part)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def bytes_at_peak(self) -> dict[Memory, int]:
        """Live bytes by kind when their sum was largest."""
        kinds: Counter[Memory] = Counter()
        for block in self._blocks:
            if block.born <= self._peak_time and (block.died < 0 or block.died > self._peak_time):
                kinds[block.kind] += block.bytes
        return dict(kinds)

    @property
    def kernels(self) -> Counter[Kernel]:
        """How often each was launched."""
        return self._count(Kernel)

    @property
    def collectives(self) -> Counter[Collective]:
        return self._count(Collective)

    def _count(self, kind: type[Any]) -> Counter[Any]:
        operations = (task.operation for task in self.trace.tasks)
        return Counter(operation for operation in operations if isinstance(operation, kind))

    @property
    def live_bytes(self) -> int:
        return self._bytes

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        # FSDP2 swaps a module's class for one that inherits from it.
        named = (self.parts[kind] for kind in type(module).__mro__ if kind in self.parts)
        self._stack.append(next(named, self._around))
        self._mark()

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._stack:
            self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        if not _in_backward():
            self._part_from.append((torch.autograd._get_sequence_nr(), self._around))

    @property
    def _around(self) -> Part:
        return self._stack[-1] if self._stack else Part.OTHER

    @property
    def part(self) -> Part:
        """Part of the model that runs now, or whose backward does."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return Part.OTHER
        index = (
            bisect.bisect_right(self._part_from, node._sequence_nr(), key=lambda entry: entry[0])
            - 1
        )
        return self._part_from[index][1]

    def _current_phase(self) -> Phase:
        if not _in_backward():
            return self.phase
        return Phase.RECOMPUTE if self._stack else Phase.BACKWARD

    def _kind(self) -> Memory:
        return MADE_IN.get(self._current_phase(), Memory.ACTIVATIONS)

    def _born(self, size: int, kind: Memory) -> _Block:
        size = -(-size // self.granularity) * self.granularity
        self._now += 1
        block = _Block(size, kind, self._now)
        if size:
            self._blocks.append(block)
        self._bytes += size
        if self._bytes > self.peak_bytes:
            self.peak_bytes, self._peak_time = self._bytes, self._now
        return block

    def _died(self, block: _Block) -> None:
        self._now += 1
        block.died = self._now
        self._bytes -= block.bytes

    def _ended(self, key: int, ref: weakref.ref) -> None:
        known = self._live.get(key)
        if known is not None and known[0] is ref:
            del self._live[key]
            self._died(known[1])

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is not None and known[0]() is storage:
            ref, block = known
            self._died(block)
            self._live[storage._cdata] = (ref, self._born(storage.nbytes(), block.kind))

    def _kernel(
        self, func: Any, name: str, args: tuple, kwargs: dict, result: Any, outputs: list[Tensor]
    ) -> None:
        inputs = tensors((args, kwargs))
        if not inputs and not outputs:
            return
        part = Part.PARAMETER_COPIES if func.namespace == "fsdp" else self.part
        formula = self.formulas.get(name) or flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        kernel = Kernel(
            name,
            part,
            self._current_phase(),
            first_dtype(inputs, outputs),
            int(flops),
            bytes_moved(func, name, args, kwargs, outputs),
            serial=serial_additions(name, args),
        )
        self.trace.kernel(kernel)

    def _collective(self, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
        name = func._opname.lstrip("_")
        kind = next((kind for start, kind in COLLECTIVES.items() if name.startswith(start)), None)
        if kind is None:
            return
        named = {
            argument.name: value
            for argument, value in zip(func._schema.arguments, args, strict=False)
        } | kwargs
        if "process_group" in named:
            group = dist.ProcessGroup.unbox(named["process_group"])
        else:
            group = dist.distributed_c10d._resolve_process_group(named["group_name"])
        operands = [*tensors((args, kwargs)), *outputs]
        payload = (
            named["input"].nbytes if kind == "all_to_all" else max(nbytes(t) for t in operands)
        )
        axis = self._axis(group)
        if axis == "world":  # An axis that spans all processes may share the default group.
            axis = {"all_gather": "shard", "reduce_scatter": "shard", "all_to_all": "ep"}.get(
                kind, axis
            )
        if kind in ("all_gather", "reduce_scatter"):
            # The big side is a buffer of gathered parameters or of gradients on their way, the
            # small one a part of this rank's own.
            big = max(operands, key=nbytes)
            self.follow(big, Memory.GATHERED if kind == "all_gather" else Memory.REDUCTION)
            for tensor in tensors(named.get("output_tensor")) if kind == "reduce_scatter" else ():
                self.follow(tensor, Memory.GRADIENTS)
        collective = Collective(kind, axis, self.part, self._current_phase(), group.size(), payload)
        # Arguments that have their default values are not handed on.
        defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
        is_async = named.get("async_op", defaults.get("async_op", False))
        self.trace.collective(collective, group.group_name, is_async)

    def _axis(self, group: dist.ProcessGroup) -> str:
        """That of the group, or of one with the same ranks: collectives of one kind may have a
        group of their own."""
        name = group.group_name
        if name not in self._axis_of:
            ranks = dist.get_process_group_ranks(group)
            groups = dist.distributed_c10d._world.pg_names
            same = (
                self.axes[known]
                for other, known in groups.items()
                if known in self.axes and ranks == dist.get_process_group_ranks(other)
            )
            self._axis_of[name] = self.axes.get(name) or next(same, name)
        return self._axis_of[name]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
