"""The EMO layer: router, dispatch, SwiGLU experts, combine. A standard MoE is this layer with the
pool off, a dense model this layer with one shared expert and no router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig
from emotrain.kernels import Decision, SortedSlots, grouped_mlp, sort_slots, swiglu_down
from emotrain.kernels.backends import choose_backend
from emotrain.model.report import LayerStatistics
from emotrain.model.router import DocumentPoolRouter, LayerRequest

Result = TypeVar("Result")


class RoutedExperts(nn.Module):
    """A bank of N routed experts (spec 3.2), of one layer or shared by several; under expert
    parallelism, this rank's part of them."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        routed, hidden, width = config.routed_in_layer(layer), config.experts.hidden, config.d_model
        self.backend = config.experts.backend
        self.local: Callable[[Tensor], Tensor] = lambda parameter: parameter
        self.gate_up_NFD = nn.Parameter(torch.empty(routed, 2 * hidden, width))
        self.down_NHD = nn.Parameter(torch.empty(routed, hidden, width))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots) -> Tensor:
        """Weighted sum of each token's routed experts -> [T, D]."""
        gate_up_NFD, down_NHD = (
            self.local(parameter).to(x_TD.dtype) for parameter in (self.gate_up_NFD, self.down_NHD)
        )
        return grouped_mlp(x_TD, weights_TK, slots, gate_up_NFD, down_NHD, self.backend)


class SharedExperts(nn.Module):
    """The M experts that every token uses (spec 1.2, 2.6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        shared, hidden, width = config.experts.shared, config.experts.hidden, config.d_model
        self.backend = config.experts.backend
        self.gate_up_MFD = nn.Parameter(torch.empty(shared, 2 * hidden, width))
        self.down_MHD = nn.Parameter(torch.empty(shared, hidden, width))

    def forward(self, x_TD: Tensor, weights_TM: Tensor | None = None) -> Tensor:
        """Sum of the shared experts, each with weight 1 unless `weights_TM` says otherwise -> [T,
        D].

        Side by side they are one wide expert, so this is two GEMMs whatever their number.
        """
        gate_up_MFD, down_MHD = self.gate_up_MFD.to(x_TD.dtype), self.down_MHD.to(x_TD.dtype)
        hidden_TMF = F.linear(x_TD, gate_up_MFD.flatten(0, 1)).unflatten(-1, gate_up_MFD.shape[:2])
        if weights_TM is not None:
            gate_TMH, up_TMH = hidden_TMF.chunk(2, dim=-1)
            up_TMH = up_TMH * weights_TM[:, :, None].to(up_TMH.dtype)
            hidden_TMF = torch.cat((gate_TMH, up_TMH), dim=-1)
        return swiglu_down(hidden_TMF, down_MHD.flatten(0, 1), self.backend)


class Dispatcher(Protocol):
    """Takes tokens to their experts and back: expert parallelism is another dispatcher."""

    def __call__(
        self,
        x_TD: Tensor,
        decision: Decision,
        experts: RoutedExperts,
        meanwhile: Callable[[], Result],
    ) -> tuple[Tensor, Result]:
        """Weighted sum of the routed experts of each token [T, D], and the result of `meanwhile`,
        which is work that needs no token to have arrived."""


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
        num_experts = len(decision.counts_N)
        backend = choose_backend(experts.backend, x_TD, num_experts)
        slots = sort_slots(decision.experts_TK, num_experts, backend=backend)
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
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(
        self,
        x_TD: Tensor,
        batch: PackedBatch,
        request: LayerRequest,
    ) -> tuple[Tensor, LayerStatistics | None]:
        x_TD = _autocast(x_TD)
        if self.router is None or self.experts is None:
            assert self.shared is not None, "a dense layer has shared experts"
            return self.shared(x_TD), None
        router = self.router
        decision, logits_TE = router(x_TD, batch, request)

        def while_tokens_travel() -> tuple[LayerStatistics, Tensor | None]:
            statistics = router.statistics(decision, logits_TE, batch, request)
            if self.shared is None:
                return statistics, None
            return statistics, self.shared(x_TD, router.shared_weights(logits_TE))

        y_TD, (statistics, shared_TD) = self.dispatcher(
            x_TD, decision, self.experts, while_tokens_travel
        )
        return y_TD if shared_TD is None else y_TD + shared_TD, statistics

    def document_scores(self, x_TD: Tensor, batch: PackedBatch, request: LayerRequest) -> Tensor:
        """Routing probabilities summed over each document's tokens [G, N], without running an
        expert."""
        assert self.router is not None
        return self.router(_autocast(x_TD), batch, request)[0].scores_GN


def _autocast(x_TD: Tensor) -> Tensor:
    """In the type that autocast computes in, where it is on."""
    if not torch.is_autocast_enabled(x_TD.device.type):
        return x_TD
    return x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
