"""The language model: embedding, pre-norm blocks of attention and experts, final norm, untied
head (spec 1.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig
from emotrain.kernels import rms_norm
from emotrain.model.attention import Attention, TokenView
from emotrain.model.initial import fill_normal
from emotrain.model.moe import MoELayer, RoutedExperts
from emotrain.model.parts import CHOICE_BIAS, stored_tensors
from emotrain.model.report import LayerStatistics, ModelOutput, RoutingReport
from emotrain.model.router import LayerRequest, RoutingRequest, sum_by_document

FULL = RoutingRequest()
"""The full model without pools."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32, returned in the dtype of x."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.eps, self.backend = config.norm_eps, config.experts.backend

    def forward(self, x: Tensor) -> Tensor:
        # FSDP hands the gain over in the type of x; rounded to it here, it is the same without.
        return rms_norm(x, self.weight.to(x.dtype), self.eps, self.backend)


class Block(nn.Module):
    """h = x + attention(norm(x)); out = h + experts(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int, experts: RoutedExperts | None):
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config)
        self.moe_norm = RMSNorm(config)
        self.moe = MoELayer(config, layer, experts)

    def forward(
        self, x_BSD: Tensor, batch: PackedBatch, view: TokenView, request: LayerRequest
    ) -> tuple[Tensor, LayerStatistics | None]:
        return self.use_experts(self.attend(x_BSD, view), batch, request)

    def attend(self, x_BSD: Tensor, view: TokenView) -> Tensor:
        """h = x + attention(norm(x))."""
        return x_BSD + self.attention(self.attention_norm(x_BSD), view)

    def use_experts(
        self, h_BSD: Tensor, batch: PackedBatch, request: LayerRequest
    ) -> tuple[Tensor, LayerStatistics | None]:
        """h + experts(norm(h)), and the statistics of the routing."""
        y_TD, statistics = self.moe(self.moe_norm(h_BSD).flatten(0, 1), batch, request)
        return h_BSD + y_TD.view_as(h_BSD), statistics


class Head(nn.Linear):
    """The output head. Its weights are used inside of a call alone: whoever spreads them over
    processes comes before and after it."""

    def forward(self, hidden_TD: Tensor, use: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Logits [T, V], or what `use(hidden_TD, weight_VD)` makes of hidden states and weights."""
        return super().forward(hidden_TD) if use is None else use(hidden_TD, self.weight)


class Transformer(nn.Module):
    """A plain single-device model. Parallelism is applied to it from outside."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        # Without nn.Embedding's own random start, which `initialize` replaces and which on the meta
        # device costs a second.
        self.embedding = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.d_model), freeze=False
        )
        banks: dict[int, RoutedExperts | None] = {}
        for layer in range(config.num_layers):
            if (bank := config.bank_of_layer(layer)) not in banks:
                routed = config.routed_in_layer(layer)
                banks[bank] = RoutedExperts(config, layer) if routed else None
        blocks = nn.ModuleList(
            Block(config, layer, banks[config.bank_of_layer(layer)])
            for layer in range(config.num_layers)
        )
        # A ModuleList does not say of what.
        self.blocks = cast(Sequence[Block], blocks)
        self.norm = RMSNorm(config)
        self.head = Head(config.d_model, config.vocab_size, bias=False)

    def forward(self, batch: PackedBatch, request: RoutingRequest = FULL) -> ModelOutput:
        """Run the model. It is a pure function of its arguments: nothing depends on train or eval
        mode.

        Args:
            request: pools, expert subsets and what to report; by default the full model without
                pools, as at inference.
        """
        x_BSD, view = self.embed(batch)
        layers = []
        for index, block in enumerate(self.blocks):
            x_BSD, statistics = block(x_BSD, batch, view, request.layer(index, batch.num_documents))
            if statistics is not None:
                layers.append(statistics)
        return ModelOutput(self.norm(x_BSD.flatten(0, 1)), self._report(batch, layers))

    def embed(self, batch: PackedBatch) -> tuple[Tensor, TokenView]:
        """What the first block gets: embedded tokens [B, S, D], and what each token sees."""
        x_BSD = self.embedding(batch.tokens_BS)
        if torch.is_autocast_enabled(x_BSD.device.type):
            x_BSD = x_BSD.to(torch.get_autocast_dtype(x_BSD.device.type))
        return x_BSD, TokenView.of(batch, self.head_dim, self.config)

    def expert_banks(self) -> list[RoutedExperts]:
        """Every bank of routed experts once, in the order of the layers. A bank is a part of each
        layer that uses it; its parameters have the name of the first."""
        return list(dict.fromkeys(b.moe.experts for b in self.blocks if b.moe.experts is not None))

    def logits(self, output: ModelOutput) -> Tensor:
        """Logits [T, V] of a forward pass."""
        return self.head(output.hidden_TD)

    @staticmethod
    def _report(batch: PackedBatch, layers: list[LayerStatistics]) -> RoutingReport:
        document_T, valid_T = batch.document_T, batch.valid_T
        ones_T1 = torch.ones_like(document_T)[:, None]
        num_tokens = ones_T1.sum() if valid_T is None else valid_T.sum()
        return RoutingReport(
            tuple(layers),
            num_tokens,
            sum_by_document(ones_T1, document_T, batch.num_documents)[:, 0],
            batch.document_ids_G >= 0,
        )

    @torch.no_grad()
    def initialize(self, seed: int) -> Transformer:
        """Give every parameter the values it starts from. In place; returns self."""
        for name, tensor in stored_tensors(self).items():
            self.fill(tensor, name, seed)
        return self

    def fill(self, part: Tensor, name: str, seed: int, *box: Sequence[int]) -> None:
        """Give a part of the parameter `name` the values it starts from, in place: every matrix is
        drawn from a normal distribution cut at three deviations, norms are one (spec 1.4), biases
        zero.

        Args:
            box: offsets of the part and shape of the whole, see `fill_normal`; all by default.
        """
        if part.ndim == 1:
            part.fill_(0.0 if name.endswith(CHOICE_BIAS) else 1.0)
        else:
            fill_normal(part, seed, name, self.config.init_std, *box)
