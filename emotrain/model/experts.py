"""SwiGLU experts: the routed ones by grouped GEMM, the shared ones on every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emotrain.config import ModelConfig
from emotrain.kernels import SortedSlots, grouped_mlp


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
        self.gate_up_MFD = nn.Parameter(torch.empty(shared, 2 * hidden, width))
        self.down_MHD = nn.Parameter(torch.empty(shared, hidden, width))

    def forward(self, x_TD: Tensor, weights_TM: Tensor | None = None) -> Tensor:
        """Sum of the shared experts, each with weight 1 unless `weights_TM` says otherwise -> [T,
        D].

        Side by side they are one wide expert, so this is two GEMMs whatever their number.
        """
        gate_up_MFD, down_MHD = self.gate_up_MFD.to(x_TD.dtype), self.down_MHD.to(x_TD.dtype)
        hidden_TMF = F.linear(x_TD, gate_up_MFD.flatten(0, 1)).unflatten(-1, gate_up_MFD.shape[:2])
        gate_TMH, up_TMH = hidden_TMF.chunk(2, dim=-1)
        act_TMH = F.silu(gate_TMH) * up_TMH
        if weights_TM is not None:
            act_TMH = act_TMH * weights_TM[:, :, None].to(act_TMH.dtype)
        return act_TMH.flatten(1) @ down_MHD.flatten(0, 1)
