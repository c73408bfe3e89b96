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
"""The configuration of an EMO model (arXiv 2605.06663): a Mixture-of-Experts language model with
shared experts, and as many routed ones in each layer as that layer has kept."""

from transformers import PreTrainedConfig


class EmoConfig(PreTrainedConfig):
    """Settings of an EMO model.

    `expert_layout` says how experts are counted and stored. In `published`, the layout of the
    released models, the shared experts are the last ones of `mlp.experts`, and `num_experts`,
    `num_experts_per_layer` and `num_experts_per_tok` count them. In `clean` these count routed
    experts alone, and the shared ones are one wide `mlp.shared_experts`.

    Raises:
        ValueError: a setting that the model code does not compute.
    """

    model_type = "emo"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"num_local_experts": "num_experts"}
    default_theta = 500000.0

    vocab_size: int = 100278
    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_theta: float = 500000.0
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    expert_layout: str = "published"
    num_experts: int = 128
    num_experts_per_tok: int = 8
    num_experts_per_layer: list[int] | None = None
    num_shared_experts: int | None = None
    n_shared_experts: int | None = None
    num_shared_experts_per_layer: list[int] | None = None
    always_active_experts: list[int] | None = None
    always_active_experts_per_layer: list[list[int]] | None = None
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        # Two names of one number, which different readers know; both are saved again.
        named = {n for n in (self.num_shared_experts, self.n_shared_experts) if n is not None}
        if len(named) > 1:
            raise ValueError(
                f"num_shared_experts={self.num_shared_experts} and n_shared_experts="
                f"{self.n_shared_experts} are two names of one number; correct one"
            )
        self.num_shared_experts = self.n_shared_experts = max(named, default=0)
        super().__post_init__(**kwargs)
        self.rope_theta = self.rope_parameters["rope_theta"]
        self._refuse_unsupported()

    def num_routed_experts(self, layer_idx: int) -> int:
        """Experts of a layer that a token chooses among."""
        count = self.num_experts
        if self.num_experts_per_layer:
            count = self.num_experts_per_layer[layer_idx]
        return count - self.num_counted_shared

    @property
    def num_counted_shared(self) -> int:
        """Shared experts that the counts of experts include."""
        return (self.num_shared_experts or 0) if self.expert_layout == "published" else 0

    def num_chosen_experts(self, layer_idx: int) -> int:
        """Routed experts that a token uses in a layer."""
        chosen = self.num_experts_per_tok - self.num_counted_shared
        return min(chosen, self.num_routed_experts(layer_idx))

    def _refuse_unsupported(self):
        rope_type = self.rope_parameters.get("rope_type", "default")
        of_layers = self.num_shared_experts_per_layer
        per_layer = self.num_experts_per_layer
        checks = (
            (self.expert_layout in ("published", "clean"), "expert_layout", "published or clean"),
            (not self.attention_bias, "attention_bias", "false"),
            (not self.tie_word_embeddings, "tie_word_embeddings", "false"),
            (not self.always_active_experts, "always_active_experts", "null"),
            (not self.always_active_experts_per_layer, "always_active_experts_per_layer", "null"),
            (rope_type == "default", "rope_parameters", "of rope_type default"),
            (
                self.head_dim * self.num_attention_heads == self.hidden_size,
                "head_dim",
                "hidden_size / num_attention_heads",
            ),
            (
                not self.norm_topk_prob or not self.num_shared_experts,
                "norm_topk_prob",
                "false where there are shared experts",
            ),
            (
                per_layer is None or len(per_layer) == self.num_hidden_layers,
                "num_experts_per_layer",
                "null or one number for each layer",
            ),
            (
                of_layers is None or set(of_layers) <= {self.num_shared_experts},
                "num_shared_experts_per_layer",
                "null or num_shared_experts in every layer",
            ),
        )
        for fits, name, supported in checks:
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {supported}")
        fewest = min(self.num_chosen_experts(layer) for layer in range(self.num_hidden_layers))
        if fewest < 1:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} with num_shared_experts="
                f"{self.num_shared_experts}: every layer needs a routed expert that a token uses; "
                f"dense layers are not supported"
            )


__all__ = ["EmoConfig"]
