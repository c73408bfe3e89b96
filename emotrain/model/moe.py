"""The EMO layer: router, dispatch, experts, combine. A standard MoE is this layer with the pool
off, a dense model this layer with one shared expert and no router."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig
from emotrain.kernels import Decision, sort_slots
from emotrain.model.experts import RoutedExperts, SharedExperts
from emotrain.model.router import DocumentPoolRouter, LayerRequest, LayerStatistics

Result = TypeVar("Result")


class LocalDispatcher:
    """Takes each token to its experts where all experts are on this rank: a sort, no
    communication."""

    def __call__(
        self,
        x_TD: Tensor,
        decision: Decision,
        experts: RoutedExperts,
        meanwhile: Callable[[], Result],
    ) -> tuple[Tensor, Result]:
        """Weighted sum of the routed experts of each token [T, D], and the result of `meanwhile`,
        which is work that needs no token to have arrived."""
        slots = sort_slots(decision.experts_TK, decision.counts_N)
        return experts(x_TD, decision.weights_TK, slots), meanwhile()


class MoELayer(nn.Module):
    """x -> sum of the token's routed experts, weighted, plus its shared experts; and the statistics
    of the layer's routing."""

    def __init__(self, config: ModelConfig, layer: int, experts: RoutedExperts | None):
        """`experts`: the bank that the layer uses; None makes it dense."""
        super().__init__()
        self.router = DocumentPoolRouter(config, layer) if experts is not None else None
        self.experts = experts
        self.shared = SharedExperts(config) if config.experts.shared else None
        self.dispatcher = LocalDispatcher()

    def forward(
        self,
        x_TD: Tensor,
        batch: PackedBatch,
        request: LayerRequest,
    ) -> tuple[Tensor, LayerStatistics | None]:
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        if self.router is None:
            return self.shared(x_TD), None
        decision, logits_TE = self.router(x_TD, batch, request)

        def while_tokens_travel() -> tuple[LayerStatistics, Tensor | None]:
            statistics = self.router.statistics(decision, logits_TE, batch, request)
            if self.shared is None:
                return statistics, None
            return statistics, self.shared(x_TD, self.router.shared_weights(logits_TE))

        y_TD, (statistics, shared_TD) = self.dispatcher(
            x_TD, decision, self.experts, while_tokens_travel
        )
        return y_TD if shared_TD is None else y_TD + shared_TD, statistics
