"""The smallest stand-ins for what the vLLM plugin uses of vLLM: plain float32 layers with the
names, parameters and habits of vLLM's. A rank of tensor or expert parallelism is a thread, a stage
of the pipeline a `Place` of its own.

Habits that matter: the loader groups names by their first part; grouped experts pass over an expert
that they do not have; they divide weights by their sum unless they are told not to; and parameters
of shared experts are reachable by two names.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AllReduce:
    """Sums a tensor of each of some threads."""

    def __init__(self, ranks: int):
        self.parts: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def __call__(self, part: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return part
        self.parts[PLACE.now.rank] = part
        self.barrier.wait()
        total = torch.stack(self.parts).sum(0)
        self.barrier.wait()
        return total


@dataclass
class Place:
    """Where a thread stands."""

    rank: int = 0
    ranks: int = 1
    expert_parallel: bool = False
    stage: int = 0
    stages: int = 1
    all_reduce: AllReduce = field(default_factory=lambda: AllReduce(1))


PLACE = threading.local()


def part(tensor: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """This rank's part."""
    size = tensor.shape[dim] // ranks
    assert size * ranks == tensor.shape[dim]
    return tensor.narrow(dim, rank * size, size)


def parameter(*shape: int) -> nn.Parameter:
    """Not a number before it is loaded."""
    return nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)


# ---- layers


class GateLinear(nn.Module):
    def __init__(self, input_size, output_size, out_dtype=None, prefix=""):
        super().__init__()
        self.weight, self.out_dtype = parameter(output_size, input_size), out_dtype

    def forward(self, x):
        return F.linear(x, self.weight).to(self.out_dtype), None


class MergedColumnParallelLinear(nn.Module):
    def __init__(self, input_size, output_sizes, bias=True, quant_config=None, prefix=""):
        super().__init__()
        assert not bias
        rows = [size // PLACE.now.ranks for size in output_sizes]
        self.rows = {index: rows[index] for index in range(len(rows))}
        self.weight = parameter(sum(rows), input_size)

    def load_weights(self, weights):
        for name, tensor in weights:
            assert name == "weight"
            first = sum(n for key, n in self.rows.items() if key < tensor.shard_id)
            rows = self.rows[tensor.shard_id]
            self.weight.data[first : first + rows] = self.of_rank(tensor)
            yield name

    def of_rank(self, tensor):
        return part(tensor, 0, PLACE.now.rank, PLACE.now.ranks)

    def forward(self, x):
        return F.linear(x, self.weight), None


class QKVParallelLinear(MergedColumnParallelLinear):
    """Where there are fewer heads of keys than ranks, several ranks have the same one."""

    def __init__(
        self,
        hidden_size,
        head_size,
        total_num_heads,
        total_num_kv_heads=None,
        bias=True,
        quant_config=None,
        prefix="",
    ):
        ranks = PLACE.now.ranks
        kv_rows = max(1, total_num_kv_heads // ranks) * head_size
        sizes = [total_num_heads * head_size, kv_rows * ranks, kv_rows * ranks]
        super().__init__(hidden_size, sizes, bias, quant_config, prefix)
        # In the order of their names, as in the matrix.
        self.rows = dict(zip(("q", "r", "s"), self.rows.values(), strict=True))
        self.groups = min(ranks, total_num_kv_heads)

    def load_weights(self, weights):
        for name, tensor in weights:
            shard = tensor.shard_id
            tensor = tensor.detach()
            tensor.shard_id = {"q": "q", "k": "r", "v": "s"}[shard]
            self.shared_by = 1 if shard == "q" else PLACE.now.ranks // self.groups
            yield from super().load_weights([(name, tensor)])

    def of_rank(self, tensor):
        place = PLACE.now
        return part(tensor, 0, place.rank // self.shared_by, place.ranks // self.shared_by)


class RowParallelLinear(nn.Module):
    def __init__(
        self,
        input_size,
        output_size,
        bias=True,
        reduce_results=True,
        quant_config=None,
        prefix="",
    ):
        super().__init__()
        assert not bias
        self.weight = parameter(output_size, input_size // PLACE.now.ranks)
        self.weight.weight_loader = lambda own, tensor: own.copy_(
            part(tensor, 1, PLACE.now.rank, PLACE.now.ranks)
        )
        self.reduce_results = reduce_results

    def forward(self, x):
        y = F.linear(x, self.weight)
        return PLACE.now.all_reduce(y) if self.reduce_results else y, None


class VocabParallelEmbedding(nn.Module):
    def __init__(self, num_embeddings, embedding_dim, quant_config=None, prefix=""):
        super().__init__()
        self.weight = parameter(num_embeddings, embedding_dim)

    def forward(self, input_ids):
        return F.embedding(input_ids, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    pass


class LogitsProcessor(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()

    def forward(self, lm_head, hidden_states):
        return F.linear(hidden_states, lm_head.weight)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = parameter(hidden_size), eps

    def forward(self, x, residual=None):
        x = x if residual is None else x + residual
        normed = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return normed if residual is None else (normed, x)


class SiluAndMul(nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


def get_rope(head_size, max_position, is_neox_style=True, rope_parameters=None):
    assert is_neox_style and rope_parameters["rope_type"] == "default"

    def rotate(positions, q, k):
        assert positions.max() < max_position
        frequency = rope_parameters["rope_theta"] ** (
            -torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
        )
        angle = positions[:, None, None] * frequency
        cos, sin = angle.cos().float(), angle.sin().float()
        turned = []
        for x in (q, k):
            first, second = x.unflatten(-1, (-1, head_size)).chunk(2, dim=-1)
            both = (first * cos - second * sin, second * cos + first * sin)
            turned.append(torch.cat(both, dim=-1).flatten(1))
        return turned

    return rotate


class Attention(nn.Module):
    """One sequence, all of it."""

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads=None,
        cache_config=None,
        quant_config=None,
        prefix="",
    ):
        super().__init__()
        self.heads, self.head_size, self.scale = (num_heads, num_kv_heads), head_size, scale

    def forward(self, query, key, value):
        q, k, v = (
            x.unflatten(-1, (heads, self.head_size)).transpose(0, 1)
            for x, heads in zip((query, key, value), (*self.heads, self.heads[1]), strict=True)
        )
        y = F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=self.scale, enable_gqa=True
        )
        return y[0].transpose(0, 1).flatten(1)


# ---- experts


def expert_map(num_experts: int, rank: int, ranks: int) -> dict[int, int]:
    """Expert -> its place on this rank: as evenly as it goes, the first ranks with one more."""
    each, more = divmod(num_experts, ranks)
    first = rank * each + min(rank, more)
    return {first + i: i for i in range(each + (rank < more))}


class FusedMoEFactory(nn.Module):
    """Also the runner that vLLM's function of this name makes."""

    def __init__(
        self,
        num_experts,
        top_k,
        hidden_size,
        intermediate_size,
        renormalize=True,
        quant_config=None,
        prefix="",
        custom_routing_function=None,
        router_logits_dtype=None,
        shared_experts=None,
    ):
        super().__init__()
        place = PLACE.now
        self.top_k, self.renormalize, self.route = top_k, renormalize, custom_routing_function
        own = (place.rank, place.ranks) if place.expert_parallel else (0, 1)
        self.cut = (0, 1) if place.expert_parallel else (place.rank, place.ranks)
        self.map, self.num_experts = expert_map(num_experts, *own), num_experts
        hidden = intermediate_size // self.cut[1]
        self.w13 = parameter(len(self.map), 2, hidden, hidden_size)
        self.w2 = parameter(len(self.map), hidden_size, hidden)
        self._shared_experts = None
        if shared_experts is not None:
            self._shared_experts = nn.Module()
            self._shared_experts.layer = shared_experts

    def load_weights(self, weights):
        for name, tensor in weights:
            expert, projection, kind = name.split(".")
            assert kind == "weight"
            if (place := self.map.get(int(expert))) is None:
                continue  # another rank's, or nobody's
            if projection == "down_proj":
                self.w2.data[place] = part(tensor, 1, *self.cut)
                yield "w2"
            else:
                half = ("gate_proj", "up_proj").index(projection)
                self.w13.data[place, half] = part(tensor, 0, *self.cut)
                yield "w13"

    def forward(self, hidden_states, router_logits):
        assert router_logits.dtype == torch.float32
        assert router_logits.shape == (len(hidden_states), self.num_experts)
        if self.route is not None:
            weights, ids = self.route(
                hidden_states=hidden_states,
                gating_output=router_logits,
                topk=self.top_k,
                renormalize=self.renormalize,
            )
        else:
            weights, ids = router_logits.softmax(-1).topk(self.top_k)
            weights = weights / weights.sum(-1, keepdim=True) if self.renormalize else weights
        assert weights.dtype == torch.float32 and ids.shape[-1] == self.top_k
        y = torch.zeros_like(hidden_states)
        for expert, place in self.map.items():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up = (F.linear(hidden_states[token], half) for half in self.w13[place])
            out = F.linear(F.silu(gate) * up, self.w2[place])
            y.index_add_(0, token, out * weights[token, slot, None])
        if self._shared_experts is not None:
            y = y + self._shared_experts.layer(hidden_states)
        return PLACE.now.all_reduce(y)


# ---- the model around them


class PPMissingLayer(nn.Module):
    pass


def make_layers(num_hidden_layers, layer_fn, prefix):
    stage, stages = PLACE.now.stage, PLACE.now.stages
    edges = [round(i * num_hidden_layers / stages) for i in range(stages + 1)]
    own = range(edges[stage], edges[stage + 1])
    layers = nn.ModuleList(
        layer_fn(prefix=f"{prefix}.{index}") if index in own else PPMissingLayer()
        for index in range(num_hidden_layers)
    )
    return own.start, own.stop, layers


@dataclass
class WeightsMapper:
    orig_to_new_stacked: dict[str, tuple[str, Any]] = field(default_factory=dict)

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            for old, (new, shard) in self.orig_to_new_stacked.items():
                if old in name:
                    name = name.replace(old, new, 1)
                    tensor.shard_id = shard
            yield name, tensor


class AutoWeightsLoader:
    def __init__(self, module):
        self.module = module

    def load_weights(self, weights, *, mapper):
        return set(self._load("", self.module, mapper.apply(weights)))

    def _load(self, base, module, weights):
        if isinstance(module, PPMissingLayer):
            return
        if module is not self.module and hasattr(module, "load_weights"):
            yield from (f"{base}{name}" for name in module.load_weights(weights))
            return
        children, parameters = dict(module.named_children()), dict(module.named_parameters())
        parts = ((name.partition("."), tensor) for name, tensor in weights)
        for first, group in itertools.groupby(parts, key=lambda item: item[0][0]):
            rest = ((name[2], tensor) for name, tensor in group)
            if first in children:
                yield from self._load(f"{base}{first}.", children[first], rest)
                continue
            for _, tensor in rest:
                own = parameters[first]
                getattr(own, "weight_loader", Tensor.copy_)(own.data, tensor)
                yield f"{base}{first}"


class IntermediateTensors(dict):
    pass


def support_torch_compile(*, dynamic_arg_dims: dict[str, int]) -> Callable[[type], type]:
    def decorated(cls):
        arguments = cls.forward.__code__.co_varnames
        assert dynamic_arg_dims.keys() <= set(arguments[: cls.forward.__code__.co_argcount])
        return cls

    return decorated


class ModelRegistry:
    models: dict[str, str] = {}

    @classmethod
    def register_model(cls, model_arch, model_cls):
        cls.models[model_arch] = model_cls


LAYERS = "vllm.model_executor.layers"
MODULES: dict[str, list[Any]] = {
    "vllm": [ModelRegistry],
    "vllm.compilation.decorators": [support_torch_compile],
    f"{LAYERS}.activation": [SiluAndMul],
    f"{LAYERS}.attention": [Attention],
    f"{LAYERS}.fused_moe": [FusedMoEFactory, GateLinear],
    f"{LAYERS}.layernorm": [RMSNorm],
    f"{LAYERS}.linear": [MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear],
    f"{LAYERS}.logits_processor": [LogitsProcessor],
    f"{LAYERS}.rotary_embedding": [get_rope],
    f"{LAYERS}.vocab_parallel_embedding": [ParallelLMHead, VocabParallelEmbedding],
    "vllm.model_executor.models.utils": [
        *(AutoWeightsLoader, PPMissingLayer, WeightsMapper, make_layers)
    ],
    "vllm.sequence": [IntermediateTensors],
}


def modules() -> dict[str, ModuleType]:
    """The modules of vLLM that the plugin imports from, by name."""
    made: dict[str, ModuleType] = {}

    def module(name: str) -> ModuleType:
        if name not in made:
            made[name] = ModuleType(name)
            made[name].__path__ = []  # a package
            if "." in name:
                module(name.rpartition(".")[0])
        return made[name]

    for name, members in MODULES.items():
        for member in members:
            setattr(module(name), member.__name__, member)
    module("vllm.config").VllmConfig = SimpleNamespace
    module("vllm.logger").init_logger = lambda name: SimpleNamespace(
        warning=lambda *args: print(*args, file=sys.stderr)
    )
    module("vllm.model_executor.models.interfaces").SupportsPP = type("SupportsPP", (), {})
    distributed = module("vllm.distributed")
    distributed.get_tensor_model_parallel_world_size = lambda: PLACE.now.ranks
    distributed.get_pp_group = lambda: SimpleNamespace(
        is_first_rank=PLACE.now.stage == 0, is_last_rank=PLACE.now.stage == PLACE.now.stages - 1
    )
    utils = module("vllm.model_executor.models.utils")
    utils.maybe_prefix = lambda prefix, name: f"{prefix}.{name}" if prefix else name
    utils.make_empty_intermediate_tensors_factory = lambda keys, hidden_size: (
        lambda batch_size, dtype, device: IntermediateTensors(
            {key: torch.zeros(batch_size, hidden_size, dtype=dtype) for key in keys}
        )
    )
    return made
