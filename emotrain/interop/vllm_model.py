"""EMO as vLLM 0.33 runs it: its attention, its grouped experts, its parallelism. Nothing imports
this file but vLLM, by the name that `vllm_plugin` gives it.

What is not arithmetic stands in `serving`. Every name of vLLM that this file uses is compared with
the sources of the wheel, and what it computes with our own forward pass, vLLM's layers replaced by
plain ones: tests/test_vllm.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from emotrain.interop.serving import ServedModel, split_softmax

logger = init_logger(__name__)


class SharedExperts(nn.Module):
    """The shared experts of a layer, side by side as one. Its result is a part of each process's
    sum, which the routed experts' runner adds up."""

    def __init__(self, width: int, hidden: int, quant_config: Any, prefix: str):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            width,
            [hidden, hidden],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.act_fn = SiluAndMul()
        self.down_proj = RowParallelLinear(
            hidden,
            width,
            bias=False,
            reduce_results=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(x_TD)
        y_TD, _ = self.down_proj(self.act_fn(gate_up))
        return y_TD


class Experts(nn.Module):
    """Router, routed experts and shared experts of a layer."""

    def __init__(self, served: ServedModel, layer: int, quant_config: Any, prefix: str):
        super().__init__()
        model, sizes = served.model, served.layer(layer)
        self.gate = GateLinear(
            model.d_model, sizes.experts, out_dtype=torch.float32, prefix=f"{prefix}.gate"
        )
        # Before the runner that has it too: parameters are known by the first of their names.
        self.shared_experts = (
            SharedExperts(
                model.d_model,
                sizes.shared * model.experts.hidden,
                quant_config,
                f"{prefix}.shared_experts",
            )
            if sizes.shared
            else None
        )
        self.experts = FusedMoEFactory(
            num_experts=sizes.experts,
            top_k=sizes.chosen,
            hidden_size=model.d_model,
            intermediate_size=model.experts.hidden,
            # It divides by the sum unless it is told not to.
            renormalize=model.router.normalize_weights,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
            custom_routing_function=(
                partial(split_softmax, num_routed=sizes.routed) if served.weighs_shared else None
            ),
            router_logits_dtype=torch.float32,
            shared_experts=self.shared_experts,
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE, _ = self.gate(x_TD)
        return self.experts(hidden_states=x_TD, router_logits=logits_TE)


class SelfAttention(nn.Module):
    """Attention with rotary positions; vLLM's layer keeps keys and values."""

    def __init__(self, served: ServedModel, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        model, ranks = served.model, get_tensor_model_parallel_world_size()
        num_heads, kv_heads = model.num_heads // ranks, max(1, model.kv_heads // ranks)
        self.sizes = [count * model.head_dim for count in (num_heads, kv_heads, kv_heads)]
        quant_config = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            model.d_model,
            model.head_dim,
            model.num_heads,
            model.kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            model.num_heads * model.head_dim,
            model.d_model,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            model.head_dim,
            max_position=vllm_config.model_config.max_model_len,
            is_neox_style=True,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        )
        self.attn = Attention(
            num_heads,
            model.head_dim,
            model.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions_T: Tensor, x_TD: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x_TD)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions_T, q, k)
        y_TD, _ = self.o_proj(self.attn(q, k, v))
        return y_TD


class DecoderLayer(nn.Module):
    """h = x + attention(norm(x)); out = h + experts(norm(h)). vLLM's norms add the residual."""

    def __init__(self, served: ServedModel, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        model, layer = served.model, int(prefix.rsplit(".", 1)[-1])
        self.pre_attention_layernorm = RMSNorm(model.d_model, eps=model.norm_eps)
        self.self_attn = SelfAttention(served, vllm_config, f"{prefix}.self_attn")
        self.pre_feedforward_layernorm = RMSNorm(model.d_model, eps=model.norm_eps)
        self.mlp = Experts(served, layer, vllm_config.quant_config, f"{prefix}.mlp")

    def forward(
        self, positions_T: Tensor, x_TD: Tensor, residual_TD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if residual_TD is None:
            residual_TD = x_TD
            x_TD = self.pre_attention_layernorm(x_TD)
        else:
            x_TD, residual_TD = self.pre_attention_layernorm(x_TD, residual_TD)
        x_TD = self.self_attn(positions_T, x_TD)
        x_TD, residual_TD = self.pre_feedforward_layernorm(x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD


# The dimensions by name: vLLM would read them from types, which are texts here.
@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": 0,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class EmoModel(nn.Module):
    """The layers of this process, with the embedding in the first stage and the last norm in the
    last."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", served: ServedModel):
        super().__init__()
        model, stage = served.model, get_pp_group()
        self.embed_tokens = (
            VocabParallelEmbedding(
                model.vocab_size,
                model.d_model,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
            if stage.is_first_rank
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            model.num_layers,
            lambda prefix: DecoderLayer(served, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            RMSNorm(model.d_model, eps=model.norm_eps) if stage.is_last_rank else PPMissingLayer()
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], model.d_model
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            x_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual_TD = None
        else:
            assert intermediate_tensors is not None
            x_TD = intermediate_tensors["hidden_states"]
            residual_TD = intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x_TD, residual_TD = layer(positions, x_TD, residual_TD)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x_TD, "residual": residual_TD})
        x_TD, _ = self.norm(x_TD, residual_TD)
        return x_TD


class EmoForCausalLM(nn.Module, SupportsPP):
    """An EMO model of either layout, without document pools, as the released code runs it."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
            ".shared_experts.gate_proj": (".shared_experts.gate_up_proj", 0),
            ".shared_experts.up_proj": (".shared_experts.gate_up_proj", 1),
        }
    )
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.config, self.quant_config = config, quant_config
        self.served = ServedModel.read(config.to_dict(), vllm_config.model_config.model)
        self.served.check_spread(
            vllm_config.parallel_config,
            vllm_config.aux_output_config.enable_return_routed_experts,
        )
        if self.served.unused:
            logger.warning("config.json: not used: %s", ", ".join(self.served.unused))
        model = self.served.model
        self.model = EmoModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), served=self.served
        )
        self.lm_head = (
            ParallelLMHead(
                model.vocab_size,
                model.d_model,
                quant_config=quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if get_pp_group().is_last_rank
            else PPMissingLayer()
        )
        self.logits_processor = LogitsProcessor(model.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a whole checkpoint, see `ServedModel.weights`."""
        loader = AutoWeightsLoader(self)
        return loader.load_weights(self.served.weights(weights), mapper=self.hf_to_vllm_mapper)
