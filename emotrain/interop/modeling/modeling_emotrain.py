# Copyright 2026 the emotrain authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""An EMO model (arXiv 2605.06663) for transformers 5: pre-norm blocks of attention and a mixture of
routed and shared experts. All experts of a layer are two tensors, so that `experts_implementation`
chooses how they are computed: `grouped_mm`, `batched_mm` or `eager`.

Shapes are suffixes of names:

    B  sequences       T  tokens, B * S        A  attention heads
    S  positions       N  routed experts       C  width of a head
    D  hidden_size     M  shared experts       V  vocabulary
    H  intermediate    E  rows of the router   K  experts that a token uses

No document pool is drawn: at inference a token chooses among all experts of the layer. Padding is
routed like any token; nothing of it reaches another position.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_emotrain import EmoAttention, EmoRMSNorm, rotary_table, wide_dtype
from .configuration_emotrain import EmoConfig

CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of an output's cache, which transformers 5.21 changed."""

# On disk every expert is three matrices, as in the released models; in memory a layer has two
# tensors. Code from outside of transformers gets a conversion only if it registers one.
register_checkpoint_conversion_mapping(
    EmoConfig.model_type,
    [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            ["mlp.experts.*.down_proj.weight"],
            "mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)


class EmoRouter(nn.Module):
    """Chooses the experts of each token.

    Routed experts are chosen by softmax over them alone, and weighed by their probabilities. The
    published layout has rows of the shared experts too: each token uses all of these, weighed by
    softmax over them alone, which is 1 where there is one.
    """

    def __init__(self, config: EmoConfig, layer_idx: int):
        super().__init__()
        self.num_routed = config.num_routed_experts(layer_idx)
        self.num_shared = config.num_counted_shared
        self.num_chosen = config.num_chosen_experts(layer_idx)
        self.normalize = config.norm_topk_prob
        rows = self.num_routed + self.num_shared
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E] in fp32 or wider; weights [T, K] and experts, int64 [T, K]. The shared
        experts are the last of E and of K."""
        wide = wide_dtype(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        weights_TK, experts_TK = logits_TE[:, : self.num_routed].softmax(-1).topk(self.num_chosen)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        if self.num_shared:
            weights_TM = logits_TE[:, self.num_routed :].softmax(-1)
            experts_M = torch.arange(self.num_shared, device=x_TD.device) + self.num_routed
            weights_TK = torch.cat([weights_TK, weights_TM], dim=-1)
            experts_TK = torch.cat([experts_TK, experts_M.expand_as(weights_TM)], dim=-1)
        return logits_TE, weights_TK.to(x_TD.dtype), experts_TK


@use_experts_implementation
class EmoExperts(nn.Module):
    """SwiGLU experts of a layer side by side. This forward pass is the `eager` one."""

    def __init__(self, config: EmoConfig, layer_idx: int):
        super().__init__()
        self.num_experts = config.num_routed_experts(layer_idx) + config.num_counted_shared
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.intermediate_size
        size = (self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        self.gate_up_proj = nn.Parameter(torch.empty(size))
        self.down_proj = nn.Parameter(torch.empty(size[0], size[2], self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for expert in experts_TK.unique().tolist():
            if expert >= self.num_experts:  # a slot that another process computes
                continue
            tokens, slots = torch.where(experts_TK == expert)
            gate, up = F.linear(x_TD[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            y_TD.index_add_(0, tokens, (out * weights_TK[tokens, slots, None]).to(y_TD.dtype))
        return y_TD


class EmoSharedExperts(nn.Module):
    """The shared experts of the clean layout, side by side: each has weight 1."""

    def __init__(self, config: EmoConfig):
        super().__init__()
        width = config.num_shared_experts * config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class EmoSparseMoeBlock(nn.Module):
    """Routed and shared experts of a layer."""

    def __init__(self, config: EmoConfig, layer_idx: int):
        super().__init__()
        self.gate = EmoRouter(config, layer_idx)
        self.experts = EmoExperts(config, layer_idx)
        apart = config.num_shared_experts and not config.num_counted_shared
        self.shared_experts = EmoSharedExperts(config) if apart else None

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The output [B, S, D] and the router's logits [T, E]. Logits are returned, and not only
        recorded: engines that replace blocks of a known form by a softmax over all rows of the
        router must not take this for one."""
        x_TD = x_BSD.flatten(0, 1)
        logits_TE, weights_TK, experts_TK = self.gate(x_TD)
        y_TD = self.experts(x_TD, experts_TK, weights_TK)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BSD), logits_TE


class EmoDecoderLayer(GradientCheckpointingLayer):
    """h = x + attention(norm(x)); out = h + experts(norm(h))."""

    def __init__(self, config: EmoConfig, layer_idx: int):
        super().__init__()
        self.pre_attention_layernorm = EmoRMSNorm(config)
        self.self_attn = EmoAttention(config, layer_idx)
        self.pre_feedforward_layernorm = EmoRMSNorm(config)
        self.mlp = EmoSparseMoeBlock(config, layer_idx)

    def forward(self, x_BSD: Tensor, **kwargs) -> Tensor:
        h_BSD = x_BSD + self.self_attn(self.pre_attention_layernorm(x_BSD), **kwargs)[0]
        return h_BSD + self.mlp(self.pre_feedforward_layernorm(h_BSD))[0]


class EmoPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the model."""

    config_class = EmoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmoDecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(EmoSparseMoeBlock, index=1),
        "hidden_states": EmoDecoderLayer,
        "attentions": EmoAttention,
    }

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (EmoRouter, EmoExperts)):
            for parameter in module.parameters(recurse=False):
                # What was loaded is marked, and stays.
                if not getattr(parameter, "_is_hf_initialized", False):
                    nn.init.normal_(parameter, std=self.config.initializer_range)


class EmoModel(EmoPreTrainedModel):
    """The model without its output head."""

    def __init__(self, config: EmoConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            EmoDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = EmoRMSNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Args as of any model of transformers. `cache` and `past_key_values` are the new and the
        old name of one."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + x_BSD.shape[1], device=x_BSD.device)[None]
        # By position, for its name is not the same in every version.
        mask = create_causal_mask(
            self.config, x_BSD, attention_mask, cache, position_ids=position_ids
        )
        position_embeddings = rotary_table(self.config, position_ids)
        for layer in self.layers:
            x_BSD = layer(
                x_BSD,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x_BSD), **{CACHE: cache})


def load_balancing_loss(
    router_logits: tuple[Tensor, ...],
    config: EmoConfig,
    counted_T: Tensor,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """N / K * sum over experts of (share of the tokens that chose it) * (its mean probability),
    the mean over layers. It is 1 where routed experts are used evenly.

    Args:
        router_logits: of each layer [T, E]; shared experts are left out.
        counted_T: bool, tokens that count.
        num_items: tokens of the whole batch, of which these are a part; by default these.
    """
    counted_T = counted_T.float()
    num_tokens = counted_T.sum().clamp(min=1)
    num_items = num_tokens if num_items is None else num_items
    losses = []
    for layer_idx, logits_TE in enumerate(router_logits):
        num_routed, chosen = (
            config.num_routed_experts(layer_idx),
            config.num_chosen_experts(layer_idx),
        )
        probabilities_TN = logits_TE[:, :num_routed].softmax(-1)
        counted = counted_T.to(logits_TE.device)
        experts_TK = probabilities_TN.topk(chosen).indices
        counts_N = counted.new_zeros(num_routed).index_add(
            0, experts_TK.flatten(), counted.repeat_interleave(chosen)
        )
        mean_N = (probabilities_TN * counted[:, None]).sum(0) / num_tokens.to(counted.device)
        share = num_routed / chosen * (counts_N * mean_N).sum()
        losses.append((share / num_items).to(router_logits[0].device))
    return torch.stack(losses).mean()


def counted_tokens(
    hidden_BSD: Tensor, labels: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """bool [T]: the tokens that have a label, or else are no padding."""
    if labels is not None:
        return (labels != -100).flatten().to(hidden_BSD.device)
    if attention_mask is not None and attention_mask.ndim == 2:
        # Of cached positions there are no logits any more.
        return attention_mask[:, -hidden_BSD.shape[1] :].bool().flatten().to(hidden_BSD.device)
    return torch.ones(hidden_BSD.shape[:2].numel(), dtype=torch.bool, device=hidden_BSD.device)


class EmoForCausalLM(EmoPreTrainedModel, GenerationMixin):
    """The language model."""

    def __init__(self, config: EmoConfig):
        super().__init__(config)
        self.model = EmoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Args and outputs as of any language model of transformers. With `output_router_logits`,
        `loss` has `router_aux_loss_coef` times `aux_loss` added."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        hidden_BSD = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(hidden_BSD[:, kept])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, self.config.vocab_size, **kwargs)
        if output_router_logits:
            aux_loss = load_balancing_loss(
                outputs.router_logits,
                self.config,
                counted_tokens(hidden_BSD, labels, attention_mask),
                kwargs.get("num_items_in_batch"),
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits_BSV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: outputs.get(CACHE)},
        )


__all__ = ["EmoForCausalLM", "EmoModel", "EmoPreTrainedModel"]
