"""The EMO layer: router, dispatch, experts, combine. A standard MoE is this layer with the pool off, a dense model
this layer with one shared expert and no router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig
from emotrain.kernels import sort_slots
from emotrain.model.experts import ExpertBank
from emotrain.model.router import DocumentPoolRouter, LayerRouting


class LocalDispatcher:
    """Takes each token to its experts where all experts are on this rank: a sort, no communication."""

    def __call__(self, x_TD: Tensor, routing: LayerRouting, experts: ExpertBank) -> Tensor:
        """Weighted sum of the routed experts of each token -> [T, D]."""
        return experts.routed(x_TD, routing.weights_TK, sort_slots(routing.experts_TK, routing.counts_N))


class MoELayer(nn.Module):
    """x -> sum of the token's routed experts, weighted, plus its shared experts; and the layer's routing."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.router = DocumentPoolRouter(config, layer) if config.routed_in_layer(layer) else None
        self.experts = ExpertBank(config, layer)
        self.dispatcher = LocalDispatcher()

    def forward(self, x_TD: Tensor, batch: PackedBatch, pool_size_G: Tensor | None = None, kept_GN: Tensor | None = None,
                z_logits: str = "pool") -> tuple[Tensor, LayerRouting | None]:
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        if self.router is None:
            return self.experts.shared(x_TD), None
        routing = self.router(x_TD, batch, pool_size_G, kept_GN, z_logits)
        y_TD = self.dispatcher(x_TD, routing, self.experts)
        shared_TD = self.experts.shared(x_TD, routing.shared_weights_TM)
        return y_TD if shared_TD is None else y_TD + shared_TD, routing
