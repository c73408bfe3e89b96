"""The EMO layer: router, dispatch, experts, combine. A standard MoE is this layer with the pool
off, a dense model this layer with one shared expert and no router."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig
from emotrain.kernels import PoolRouting, sort_slots
from emotrain.model.experts import RoutedExperts, SharedExperts
from emotrain.model.router import DocumentPoolRouter, LayerRouting

Result = TypeVar("Result")


class LocalDispatcher:
    """Takes each token to its experts where all experts are on this rank: a sort, no
    communication."""

    def __call__(
        self,
        x_TD: Tensor,
        routing: PoolRouting,
        experts: RoutedExperts,
        meanwhile: Callable[[], Result],
    ) -> tuple[Tensor, Result]:
        """Weighted sum of the routed experts of each token [T, D], and the result of `meanwhile`,
        which is work that needs no token to have arrived."""
        slots = sort_slots(routing.experts_TK, routing.counts_N)
        return experts(x_TD, routing.weights_TK, slots), meanwhile()


class MoELayer(nn.Module):
    """x -> sum of the token's routed experts, weighted, plus its shared experts; and the layer's
    routing."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        has_routed = config.routed_in_layer(layer) > 0
        self.router = DocumentPoolRouter(config, layer) if has_routed else None
        self.experts = RoutedExperts(config, layer) if has_routed else None
        self.shared = SharedExperts(config) if config.experts.shared else None
        self.dispatcher = LocalDispatcher()

    def forward(
        self,
        x_TD: Tensor,
        batch: PackedBatch,
        pool_size_G: Tensor | None = None,
        kept_GN: Tensor | None = None,
        z_logits: str = "pool",
    ) -> tuple[Tensor, LayerRouting | None]:
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        if self.router is None:
            return self.shared(x_TD), None
        routing, logits_TE = self.router(x_TD, batch, pool_size_G, kept_GN)

        def while_tokens_travel() -> tuple[LayerRouting, Tensor | None]:
            report = self.router.statistics(routing, logits_TE, batch, pool_size_G, z_logits)
            return report, None if self.shared is None else self.shared(
                x_TD, report.shared_weights_TM
            )

        y_TD, (report, shared_TD) = self.dispatcher(
            x_TD, routing, self.experts, while_tokens_travel
        )
        return y_TD if shared_TD is None else y_TD + shared_TD, report
