"""A bank of routed experts that are in memory as far as they are used: it takes the place of
`RoutedExperts` in a model, and computes the same to the bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emotrain.config import ModelConfig
from emotrain.kernels import SortedSlots
from emotrain.kernels.cpu_rows import add_experts
from emotrain.kernels.paged_mlp import PagedMLP
from emotrain.model.moe import RoutedExperts
from emotrain.model.transformer import Transformer
from emotrain.modular.expert_store import ExpertReadError, ExpertStore


class LazyExperts(RoutedExperts):
    """Experts of one bank, held in a store while they run. Forward only: it has no parameters."""

    def __init__(self, store: ExpertStore, bank: int, config: ModelConfig):
        """
        Args:
            bank: key of the bank in the store.
        """
        nn.Module.__init__(self)  # without the parameters of a bank
        self.store, self.bank, self.backend = store, bank, config.experts.backend
        self.num_experts = config.routed_in_layer(bank)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots) -> Tensor:
        """Weighted sum of each token's routed experts -> [T, D].

        Where a step needs more experts than the store holds, it runs in several passes.

        Raises:
            ExpertReadError: an expert that tokens are routed to cannot be read; says which tokens.
        """
        store = self.store
        call = PagedMLP(x_TD, weights_TK, slots, store.gate_up_XFD, store.down_XHD, self.backend)
        starts = range(0, len(call.experts), store.slots)
        for start in starts:
            experts = call.experts[start : start + store.slots]
            try:
                with store.hold(self.bank, experts) as slot_of:
                    call.add(slot_of)
            except ExpertReadError as error:
                first, end = ([0, *slots.ends_N.tolist()][error.expert + at] for at in (0, 1))
                error.tokens = tuple(slots.token_R[first:end].tolist())
                raise
        return call.y_TD

    def add_rows(self, y_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> None:
        """`cpu_rows.add_experts` with the experts of this bank, to the bit.

        Raises:
            ExpertReadError: as `forward`.
        """
        store, num_experts = self.store, self.num_experts
        needed = [expert for expert in experts_TK.unique().tolist() if expert < num_experts]
        for start in range(0, len(needed), store.slots):
            try:
                with store.hold(self.bank, needed[start : start + store.slots]) as slot_of:
                    place_N = torch.full((num_experts,), -1)
                    place_N[list(slot_of)] = torch.tensor(list(slot_of.values()))
                    banks = store.gate_up_XFD, store.down_XHD
                    add_experts(y_TD, x_TD, weights_TK, experts_TK, *banks, place_N)
            except ExpertReadError as error:
                needs_T = (experts_TK == error.expert).any(dim=1)
                error.tokens = tuple(needs_T.nonzero()[:, 0].tolist())
                raise


def store_of(model: Transformer) -> ExpertStore | None:
    """The store that a model's experts are in; None where they are loaded."""
    banks = (bank for bank in model.expert_banks() if isinstance(bank, LazyExperts))
    return next((bank.store for bank in banks), None)
